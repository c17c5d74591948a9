"""What the guards of a run have changed: it travels from attempt to attempt in the store's fence records.

The run file never changes. An attempt works with the run file and the newest guards; `GuardState` says by how much they
differ.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import Document

MAX_ROLLBACKS = 5
MAX_MICRO_BATCH_DIVISOR = 64
MAX_STEP = 2**31

Step = Annotated[int, Field(ge=0, le=MAX_STEP)]


class RollbackReason(StrEnum):
    """What the training loss did."""

    SPIKE = "LossSpike"
    PLATEAU = "LossPlateau"
    NON_FINITE = "NonFiniteLoss"


class Rollback(Document):
    """One return to an earlier checkpoint, with a lower learning rate until the spot is passed."""

    reason: RollbackReason
    onset_step: Step
    """The first step whose loss was too high."""
    to_step: Step
    """The run goes on from the newest checkpoint up to this step."""
    until_step: Step
    """From the step after this one on, the planned learning rate is back."""
    factor: Annotated[float, Field(gt=0, lt=1)]
    """What the planned learning rate is multiplied by up to until_step."""


class GuardState(Document):
    """All changes so far; the default is none."""

    micro_batch_divisor: Annotated[int, Field(ge=1, le=MAX_MICRO_BATCH_DIVISOR)] = 1
    """The planned micro batch is divided by this and the accumulation multiplied: the effective batch is the planned."""
    rollbacks: Annotated[tuple[Rollback, ...], Field(max_length=MAX_ROLLBACKS)] = ()
    """In the order in which they happened."""

    def learning_rate_factor(self, step: int) -> float:
        """What the planned learning rate of optimizer step `step` (the first is 1) is multiplied by."""
        return min((found.factor for found in self.rollbacks if step <= found.until_step), default=1.0)

    def split(self, micro_batch: int, accumulation: int) -> tuple[int, int]:
        """Micro batch and accumulation in force, from the planned ones; their product is the planned.

        The micro batch is the largest one, up to the planned one divided and rounded up, that divides the product.
        """
        records = micro_batch * accumulation
        most = -(-micro_batch // self.micro_batch_divisor)
        size = next(size for size in range(most, 0, -1) if records % size == 0)
        return size, records // size
