"""What all ranks agree upon once per optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def over_ranks(values: Tensor, how: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM) -> Tensor:
    """values joined with those of all other ranks, in place; those of a lone process stay. Every rank calls it."""
    if distributed.is_initialized():
        distributed.all_reduce(values, how)
    return values


class Agreement:
    """One small all-reduce per optimizer step: stop, non-finite loss, save now, tokens of the step.

    All ranks then see the same answer at the same step, so none waits in a collective that another left.
    """

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self.non_finite = False
        self.tokens = 0
        self.step_tokens = 0
        self._bad: Tensor | None = None

    def note_loss(self, loss: Tensor) -> None:
        """Remember on the device whether loss is finite; the host is not made to wait."""
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad

    def any_of(self, flag: bool, device: torch.device) -> bool:
        """Whether flag is set on any rank; every rank calls it."""
        return bool(over_ranks(torch.tensor(float(flag), device=device)))

    def reach(self, *, stop: bool, save: bool, device: torch.device) -> None:
        """Join the views of all ranks; stop, save, non_finite and step_tokens hold the result."""
        bad = self._bad.double() if self._bad is not None else torch.zeros((), dtype=torch.float64, device=device)
        mine = torch.tensor([float(stop), float(save), float(self.tokens)], dtype=torch.float64, device=device)
        stops, saves, tokens, bads = over_ranks(torch.cat([mine, bad.reshape(1)])).tolist()
        self.stop, self.save, self.non_finite = stops > 0, saves > 0, bads > 0
        self.step_tokens = int(tokens)
        self.tokens, self._bad = 0, None
