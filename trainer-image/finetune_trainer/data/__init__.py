"""Data of a run: read (readers), understood (formats, template), put into words (chat) and encoded (encode).

`load_dataset` in load.py is the main flow. transformers is never imported here; its tokenizer comes as an argument.
"""

from finetune_trainer.data.kinds import EncodedExample
from finetune_trainer.data.load import DataStats, Encoded, HeldOutPrompt, load_dataset

__all__ = ["DataStats", "Encoded", "EncodedExample", "HeldOutPrompt", "load_dataset"]
