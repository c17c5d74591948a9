"""Which parameters of a model train, and how: one function for each kind of tuning, behind `prepare_tuning`."""

from __future__ import annotations

from finetune_trainer.worker.tuning.prepare import as_base, prepare_tuning
from finetune_trainer.worker.tuning.shares import parameter_shares

__all__ = ["as_base", "parameter_shares", "prepare_tuning"]
