"""All records of an optimizer step, over micro batches and ranks, in an order that does not depend on the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from finetune_trainer.worker.agreement import over_ranks
from finetune_trainer.worker.loss import IGNORED
from finetune_trainer.worker.objectives.base import Batch


@dataclass(frozen=True)
class StepRecord:
    """One record, on the host. ids and labels: [length]. prompt: tokens before the completion.

    batch: the number of its micro batch within the step. own: whether it is one of this rank's.
    """

    ids: Tensor
    labels: Tensor
    prompt: int
    batch: int
    own: bool


def step_records(batches: Sequence[Batch], device: torch.device) -> list[StepRecord]:
    """The records of batches and of all other ranks; every rank calls it with as many batches, at least one.

    batches: as Kto.collate makes them. Batches deals out a step's records by micro batch, then rank, then row: put
    together in that order they are the same list under any split.
    """
    sizes = torch.tensor([max(len(batch["real"]) for batch in batches), max(map(_width, batches))], device=device)
    rows, width = over_ranks(sizes, distributed.ReduceOp.MAX).tolist()
    mine = torch.zeros((len(batches), rows, 2 * width + 2), dtype=torch.long)
    for number, batch in enumerate(batches):
        count, length = batch["input_ids"].shape
        mine[number, :count, 0] = batch["attention_mask"].sum(-1) * batch["real"]
        mine[number, :count, 1] = batch["prompt"]
        mine[number, :count, 2 : 2 + length] = batch["input_ids"]
        mine[number, :count, 2 + width : 2 + width + length] = batch["labels"]
    shares, rank = [mine], 0
    if distributed.is_initialized():
        rank = distributed.get_rank()
        on_device = mine.to(device)
        gathered = [torch.empty_like(on_device) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, on_device)
        shares = [share.cpu() for share in gathered]
    found = []
    for number in range(len(batches)):
        for owner, share in enumerate(shares):
            for row in share[number]:
                length, prompt = row[:2].tolist()
                if length:
                    ids, labels = row[2 : 2 + length], row[2 + width : 2 + width + length].clone()
                    labels[:prompt] = IGNORED
                    found.append(StepRecord(ids, labels, prompt, number, owner == rank))
    return found


def _width(batch: Batch) -> int:
    return int(batch["input_ids"].shape[1])
