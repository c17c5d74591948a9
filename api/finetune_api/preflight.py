"""What preflight tells: findings, and the facts about model and data that the planner needs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Tolerant, is_empty
from finetune_api.failures import FinetuneError
from finetune_api.fields import LongText


class Finding(Tolerant):
    """One thing that preflight found."""

    failure_class: Annotated[str, Field(alias="class")]
    """A row of the failure table; Info for a remark that stops nothing."""
    message: LongText
    """What, where and how to mend it."""
    field: str | None = None
    """The spec path to change."""


class ModelFacts(Tolerant):
    """What preflight read about the base model without loading it."""

    model_type: str
    """transformers' model_type."""
    architecture: str | None = None
    """The class name in the model's config."""
    parameters: int
    """Number of parameters, from the safetensors headers."""
    weight_bytes: int
    """Size of the weight files in bytes."""
    hidden_size: int
    """Width."""
    layers: int
    """Depth."""
    vocabulary_size: int
    """Entries of the vocabulary."""
    max_positions: int | None = None
    """Longest sequence in tokens that the model was built for."""
    has_chat_template: bool = False
    """Whether the tokenizer has a chat template."""
    quantization: str | None = None
    """How the weight files are quantised already, such as gptq, awq or bitsandbytes; absent where they are not."""
    experts: int | None = None
    """Experts of each layer of a mixture; absent where it is none."""
    experts_per_token: int | None = None
    """Experts of a layer that one token passes through."""
    expert_size: int | None = None
    """Inner width of one expert, where one weight holds all experts of a layer."""
    shared_expert_size: int | None = None
    """Inner width of the expert that every token passes through beside the others."""
    encoder: bool = False
    """Whether it has an encoder: encoder and decoder, or an encoder only."""
    digest: str
    """Digest of config and weight file sizes or ETags."""


class DataFacts(Tolerant):
    """What preflight read about the dataset."""

    rows: int
    """Usable records."""
    bad_rows: int = 0
    """Records that cannot be used."""
    format: str
    """The format, given or detected."""
    format_reason: str = ""
    """Why that format: "set by dataset.format" or what was seen in the first record."""
    tokens: int
    """Estimated tokens of all records: exact where the tokenizer could be read, else bytes / 3.6."""
    longest_tokens: int
    """Estimated tokens of the longest record."""
    p95_tokens: int
    """95% of the records have at most this many tokens (estimated)."""
    bytes: int
    """Size of the source files."""
    digest: str
    """Digest of source URIs, sizes and ETags or contents."""


class Preflight(Tolerant):
    """What preflight found: also the termination message of the preflight container.

    Keys of digests and furtherWeightBytes are spec paths without `spec.`, as in the run file's inputs.
    """

    ok: bool
    """Whether nothing stands in the way."""
    spec_digest: str
    """Digest of the run-defining part of the spec that was checked."""
    model: ModelFacts | None = None
    """About the base model."""
    data: DataFacts | None = None
    """About the dataset."""
    digests: Annotated[dict[str, str], Field(max_length=16, exclude_if=is_empty)] = {}
    """Digests of adapter, teacher and reward models, by the spec path of their URI."""
    further_weight_bytes: Annotated[dict[str, int], Field(max_length=16, exclude_if=is_empty)] = {}
    """Size of the weight files of teacher and reward models, by the spec path of their URI."""
    findings: list[Finding] = []
    """What has to be mended, or remarks; the first is the most important."""
    findings_total: int = 0
    """How many findings there were before the list was cut to size."""

    def digest_of(self, path: str) -> str:
        """The digest of a further model; raises FinetuneError(Internal) where preflight gave none."""
        if path not in self.digests:
            raise FinetuneError(f"preflight did not describe {path}", field=f"spec.{path}")
        return self.digests[path]
