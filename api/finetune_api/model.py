"""The base model of a job."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.access import Credentials, Storage
from finetune_api.base import Document
from finetune_api.enums import Attention, Task
from finetune_api.fields import LabelName, ModelUri, ObjectName, ShortText


class Tokenizer(Document):
    """Changes to the model's tokenizer."""

    add_special_tokens: Annotated[list[ShortText], Field(min_length=1, max_length=64)] | None = None
    """Tokens to add; the embeddings are resized and saved with the artifact."""


class AdapterReference(Document):
    """An adapter to continue from."""

    uri: ModelUri
    """Where the adapter is: hf://, s3:// or pvc://."""
    revision: ShortText | None = None
    """Branch, tag or commit of an hf:// adapter."""
    credentials: Credentials | None = None
    """Instead of the job's credentials, for the adapter only."""
    storage: Storage | None = None
    """Instead of the job's storage, for the adapter only."""


class ModelCache(Document):
    """A volume that holds downloaded models."""

    claim_name: ObjectName
    """A PersistentVolumeClaim in the job's namespace; trainers mount it read-only."""


class FurtherModel(Document):
    """A model that is only asked: a teacher, or a trained reward model."""

    uri: ModelUri | None = None
    """hf://owner/name, s3://bucket/prefix or pvc://claim/path. Safetensors weights only."""
    revision: ShortText | None = None
    """Branch, tag or commit of an hf:// model."""
    from_job: LabelName | None = None
    """An earlier FineTuneJob of this namespace whose artifact is the model; instead of uri."""
    credentials: Credentials | None = None
    """Instead of the job's credentials, for the model only."""
    storage: Storage | None = None
    """Instead of the job's storage, for the model only."""


class Model(FurtherModel):
    """The base model."""

    task: Task | None = None
    """What the model computes; absent means CausalLM, or SequenceClassification with objective Reward."""
    attention: Attention | None = None
    """The attention kernel."""
    tokenizer: Tokenizer | None = None
    """Changes to the model's tokenizer."""
    adapter: AdapterReference | None = None
    """An earlier adapter to continue from."""
    cache: ModelCache | None = None
    """A volume that holds downloaded models."""
