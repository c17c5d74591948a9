"""Which records each rank sees in each micro batch.

The order depends on seed and epoch only, never on the number of ranks or the micro batch size: optimizer step k of
an epoch sees the same records under any split. No record is repeated to even out ranks; a rank with nothing left
gets an empty batch, which adds nothing to loss or gradient but keeps collectives in step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune_api.runfile import RunFile
from finetune_trainer.worker.ranks import Ranks


@dataclass(frozen=True)
class Split:
    """How one optimizer step is cut: micro_batch records per rank and forward pass, accumulation passes."""

    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    @classmethod
    def of(cls, run: RunFile, ranks: Ranks) -> Split:
        """The split that the run file plans."""
        hp = run.hyperparameters
        return cls(hp.micro_batch_size, hp.gradient_accumulation, ranks.rank, ranks.world_size)

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

    def __init__(self, lengths: Sequence[int], split: Split, *, seed: int | None) -> None:
        """seed None: the records' own order (evaluation)."""
        self.lengths = lengths
        self.split = split
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.split.pass_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for start in range(0, len(order), self.split.step_size):
            step = sorted(order[start : start + self.split.step_size], key=lambda i: -self.lengths[i])
            for first in range(0, len(step), self.split.pass_size):
                mine = first + self.split.rank * self.split.micro_batch
                yield step[mine : min(mine + self.split.micro_batch, first + self.split.pass_size)]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self.lengths), generator=generator).tolist()


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
    ) -> None:
        """length: tokens of an item. collate: items as a batch; it is given no items where a rank has none left."""
        batches = StepBatches([length(item) for item in items], split, seed=seed)
        super().__init__(
            Records(items), batch_sampler=batches, collate_fn=collate, pin_memory=pin, generator=torch.Generator()
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        assert isinstance(self.batch_sampler, StepBatches)
        self.batch_sampler.set_epoch(epoch)
