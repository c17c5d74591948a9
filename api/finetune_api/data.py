"""The dataset of a job."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.access import Credentials, Storage
from finetune_api.base import Document
from finetune_api.enums import DataFormat, LossOn, Truncation
from finetune_api.fields import DataUri, Fraction, LongText, Positive, ShortText


class Source(Document):
    """One source of records."""

    uri: DataUri
    """A file or a folder of files: s3://, pvc:// or hf://datasets/owner/name. jsonl, json, csv, parquet or txt."""
    config: ShortText | None = None
    """The configuration of an hf:// dataset."""
    split: ShortText | None = None
    """The split of an hf:// dataset; absent means train."""
    revision: ShortText | None = None
    """Branch, tag or commit of an hf:// dataset."""
    weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Share of this source in the mixture, relative to the others."""
    credentials: Credentials | None = None
    """Instead of the job's credentials, for this source only."""
    storage: Storage | None = None
    """Instead of the job's storage, for this source only."""


class HeldOut(Document):
    """Records kept out of training. A fraction of the sources, or a source of its own."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training sources, chosen by the seed."""
    source: Source | None = None
    """A source of its own."""


class Columns(Document):
    """The names of the columns where they differ from the format's own."""

    text: ShortText | None = None
    """The column of plain text."""
    prompt: ShortText | None = None
    """The column of the prompt, question or instruction."""
    completion: ShortText | None = None
    """The column of the completion, answer or output."""
    input: ShortText | None = None
    """The column of an Alpaca record's input."""
    messages: ShortText | None = None
    """The column of the list of messages."""
    chosen: ShortText | None = None
    """The column of the preferred completion."""
    rejected: ShortText | None = None
    """The column of the rejected completion."""
    label: ShortText | None = None
    """The column of the label."""
    tokens: ShortText | None = None
    """The column of the list of words (Tags)."""
    tags: ShortText | None = None
    """The column of the list of BIO tags (Tags)."""


class Dataset(Document):
    """The records to train on."""

    sources: Annotated[list[Source], Field(min_length=1, max_length=16)]
    """Where the records are."""
    format: DataFormat | None = None
    """The shape of a record; detected when absent."""
    columns: Columns | None = None
    """The names of the columns where they differ from the format's own."""
    prompt_template: LongText | None = None
    """Text with {column} in braces, such as '<human>: {question}\\n<assistant>: {answer}', or a Jinja template if it
    holds '{{' or '{%'. The completion column must come last. Absent means the model's chat template."""
    validation: HeldOut | None = None
    """Records for evaluation while training."""
    test: HeldOut | None = None
    """Records for evaluation at the end only."""
    loss_on: LossOn | None = None
    """Which tokens the loss counts; absent means Completion where a record has one."""
    truncation: Truncation | None = None
    """What happens to a record longer than hyperparameters.maxSequenceLength."""
    max_source_tokens: Positive | None = None
    """Limit of the prompt in tokens."""
    max_target_tokens: Positive | None = None
    """Limit of the completion in tokens."""
    max_bad_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the records that may be unusable and are then left out and counted; absent means none."""
    max_cut_share: Fraction | None = None
    """Share of the records that truncation may shorten; absent means any."""
    balance_labels: bool | None = None
    """Draw the records of each label equally often (SequenceClassification)."""
