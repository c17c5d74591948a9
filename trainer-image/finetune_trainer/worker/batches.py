"""Which records each rank sees in each micro batch.

The order depends on seed, epoch and the size of a step only, never on how a step is cut: optimizer step k of an epoch
sees the same records with any number of ranks and any micro batch. No record is repeated to even out ranks; a rank with
nothing left gets an empty batch, which adds nothing to loss or gradient but keeps collectives in step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune_api.runfile import RunFile
from finetune_trainer.data.windows import Redrawn
from finetune_trainer.worker.ranks import Ranks

_SPAN_STEPS = 50
"""How many steps' records are sorted by length together: their order stays random enough."""


@dataclass(frozen=True)
class Split:
    """How one optimizer step is cut: micro_batch records per rank and forward pass, accumulation passes.

    And how training draws the records of a step. group_by_length: of about equal length. balance_labels: the records of
    each label equally often.
    """

    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    group_by_length: bool = False
    balance_labels: bool = False

    @classmethod
    def of(cls, run: RunFile, ranks: Ranks) -> Split:
        """The split that the run file plans."""
        hp = run.hyperparameters
        return cls(
            hp.micro_batch_size,
            hp.gradient_accumulation,
            ranks.rank,
            ranks.world_size,
            hp.group_by_length,
            run.dataset.balance_labels,
        )

    @property
    def pass_size(self) -> int:
        """Records of all ranks in one forward pass."""
        return self.micro_batch * self.world_size

    @property
    def step_size(self) -> int:
        """Records of all ranks in one optimizer step."""
        return self.pass_size * self.accumulation


class Records(Dataset[Any]):
    """The encoded records by their index."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index]


class StepBatches(Sampler[list[int]]):
    """Micro batches of one rank for one epoch, as lists of record indices.

    Within an optimizer step records are sorted by length, so that a micro batch needs little padding; the step's
    gradient is a sum over its records, so their order inside it does not matter.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        split: Split,
        *,
        seed: int | None,
        repeats: int = 1,
        labels: Sequence[int] | None = None,
        redrawn: Redrawn | None = None,
    ) -> None:
        """seed None: the records' own order (evaluation). repeats: how many steps in a row see the same records.

        labels: the class of each record, to balance them. redrawn: the records, where an epoch draws them anew.
        """
        self.lengths = lengths
        self.labels = labels
        self.split = split
        self.seed = seed
        self.repeats = repeats
        self.redrawn = redrawn
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch, and draw the items that are drawn anew.

        The library calls it here, not on the loader, where it resumes in the middle of an epoch.
        """
        self.epoch = epoch
        if self.redrawn is not None:
            self.redrawn.set_epoch(epoch)

    def __len__(self) -> int:
        if self.repeats == 1:
            return math.ceil(len(self.lengths) / self.split.pass_size)
        return math.ceil(len(self.lengths) / self.split.step_size) * self.split.accumulation * self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, len(order), self.split.step_size):
            step = sorted(map(int, order[start : start + self.split.step_size]), key=lambda i: -self.lengths[i])
            # The library counts the passes of a step, so that a repeated one has to have all of them, if empty.
            length = len(step) if self.repeats == 1 else self.split.step_size
            for _ in range(self.repeats):
                for first in range(0, length, self.split.pass_size):
                    mine = first + self.split.rank * self.split.micro_batch
                    yield step[mine : min(mine + self.split.micro_batch, first + self.split.pass_size)]

    def _order(self) -> Sequence[int]:
        """The records of the epoch in the order of its steps: as many as there are."""
        if self.seed is None:
            return range(len(self.lengths))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: Sequence[int] = torch.randperm(len(self.lengths), generator=generator).numpy()
        if self.labels is not None and self.split.balance_labels:
            order = balanced(order, self.labels)
        if self.split.group_by_length:
            order = grouped(order, self.lengths, self.split.step_size, generator)
        return order


def balanced(order: Sequence[int], labels: Sequence[int]) -> list[int]:
    """As many records as in order, of each label equally often (the first labels once more where it does not divide).

    The records of a label come in their order, all of them before any comes again.
    """
    by_label: dict[int, list[int]] = {}
    for record in order:
        by_label.setdefault(int(labels[record]), []).append(int(record))
    turns = [cycle(by_label[label]) for label in sorted(by_label)]
    # Label after label, so that a step has them in equal shares too.
    return [next(turns[k % len(turns)]) for k in range(len(order))]


def grouped(order: Sequence[int], lengths: Sequence[int], step_size: int, generator: torch.Generator) -> list[int]:
    """order with records of about equal length in one step: sorted within spans of many steps, the steps drawn anew.

    The step with the longest record comes first, so that memory that does not suffice shows at once.
    """
    steps: list[list[int]] = []
    for start in range(0, len(order), step_size * _SPAN_STEPS):
        span = sorted(order[start : start + step_size * _SPAN_STEPS], key=lambda record: -lengths[record])
        steps += [span[first : first + step_size] for first in range(0, len(span), step_size)]
    # The last step of an epoch may be short: it stays the last, or all later steps would be cut elsewhere.
    rest = steps.pop() if len(steps[-1]) < step_size else []
    drawn = [steps[k] for k in torch.randperm(len(steps), generator=generator).tolist()]
    if drawn:
        longest = max(range(len(drawn)), key=lambda k: max(lengths[record] for record in drawn[k]))
        drawn.insert(0, drawn.pop(longest))
    return [record for step in [*drawn, rest] for record in step]


class EpochLoader(DataLoader[Any]):
    """A loader that draws nothing from the global random state and knows its epoch."""

    def __init__(
        self,
        items: Sequence[Any],
        split: Split,
        *,
        length: Callable[[Any], int],
        collate: Callable[[Sequence[Any]], dict[str, Tensor]],
        seed: int | None,
        pin: bool,
        repeats: int = 1,
    ) -> None:
        """length: tokens of an item. collate: items as a batch; it is given no items where a rank has none left."""
        # A table knows the lengths of its items without reading them.
        known = getattr(items, "lengths", None)
        lengths = [length(item) for item in items] if known is None else known
        labels = _labels(items) if split.balance_labels and seed is not None else None
        redrawn = items if isinstance(items, Redrawn) else None
        batches = StepBatches(lengths, split, seed=seed, repeats=repeats, labels=labels, redrawn=redrawn)
        super().__init__(
            Records(items), batch_sampler=batches, collate_fn=collate, pin_memory=pin, generator=torch.Generator()
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        assert isinstance(self.batch_sampler, StepBatches)
        self.batch_sampler.set_epoch(epoch)


def _labels(items: Sequence[Any]) -> list[int]:
    """The class of each item."""
    return items.column("label") if hasattr(items, "column") else [item.label for item in items]
