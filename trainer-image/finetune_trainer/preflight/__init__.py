"""Preflight: whether a job can run at all, told within a minute and before a GPU is taken.

Runs in the light image and under `finetune run`. Model, data and output are checked at the same time, and each
to its end, so that all faults are told at once.
"""

from finetune_trainer.preflight.document import encode_preflight, exit_code
from finetune_trainer.preflight.run import run_preflight

__all__ = ["encode_preflight", "exit_code", "run_preflight"]
