"""Data of a run: read (readers), understood (detect, examples), put into words (chat), encoded (encoders), kept (table).

`load_dataset` in load.py is the main flow, prepare.py its pass over the records. transformers is never imported here;
its tokenizer comes as an argument.
"""

from finetune_trainer.data.kinds import EncodedExample
from finetune_trainer.data.load import Encoded, load_dataset
from finetune_trainer.data.prepared import DataStats, HeldOutPrompt

__all__ = ["DataStats", "Encoded", "EncodedExample", "HeldOutPrompt", "load_dataset"]
