"""Where models and data come from: hf://, s3://, pvc:// and, in local runs only, file://.

`open_source` gives a place whose files can be listed and read in part; `fetch` brings what a run needs into a
folder. Weights are safetensors; files that could run code are never downloaded.
"""

from finetune_trainer.sources.access import hub_token, resolve_access
from finetune_trainer.sources.fetch import Fetched, fetch
from finetune_trainer.sources.place import Place, Purpose, Reach, SourceFile, data_digest, model_digest
from finetune_trainer.sources.places import open_output, open_source

__all__ = [
    "Fetched",
    "Place",
    "Purpose",
    "Reach",
    "SourceFile",
    "data_digest",
    "fetch",
    "hub_token",
    "model_digest",
    "open_output",
    "open_source",
    "resolve_access",
]
