"""The `finetune` command: the same FineTuneJob on one machine, without a cluster."""

from finetune_trainer.cli.commands import main

__all__ = ["main"]
