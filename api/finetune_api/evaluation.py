"""What a job measures."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Document
from finetune_api.data import Source
from finetune_api.enums import Benchmark
from finetune_api.fields import LongText, Positive, ShortText


class Generation(Document):
    """How answers are generated in evaluation."""

    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Longest answer in tokens; past the model's positions it goes on from the newest half of them."""
    do_sample: bool | None = None
    """Sample rather than take the likeliest token."""
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """Sampling temperature."""
    top_k: Positive | None = None
    """Sample among the k likeliest tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens that hold this probability."""
    num_beams: Annotated[int, Field(ge=1, le=64)] | None = None
    """Beams of beam search."""
    no_repeat_ngram_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """No n-gram of this size appears twice."""


class Requirement(Document):
    """A bound that the tuned model must meet."""

    metric: ShortText
    """Name of the metric, as in the report."""
    min: float | None = None
    """Smallest value that passes."""
    max: float | None = None
    """Largest value that passes."""


class BenchmarkRun(Document):
    """One benchmark on data of yours, measured before and after."""

    name: Benchmark
    """Which benchmark; its prompts and scoring are lm-evaluation-harness's own."""
    source: Source
    """Records in the benchmark's own columns."""
    max_records: Positive | None = None
    """Use only the first N records."""


class Evaluation(Document):
    """What is measured."""

    every_steps: Positive | None = None
    """Evaluate each N optimizer steps; the end is always evaluated."""
    metrics: Annotated[list[ShortText], Field(min_length=1, max_length=16)] | None = None
    """Metrics beside loss and perplexity."""
    require: Annotated[list[Requirement], Field(min_length=1, max_length=16)] | None = None
    """Bounds that the tuned model must meet, else the job fails with the artifact kept."""
    generation: Generation | None = None
    """How answers are generated."""
    max_generated: Positive | None = None
    """For how many held-out records answers are generated."""
    probes: Annotated[list[LongText], Field(min_length=1, max_length=32)] | None = None
    """Further prompts, such as off-topic questions, that base and tuned model answer side by side."""
    retention: Source | None = None
    """General text whose loss is measured before and after, to see what was forgotten."""
    benchmarks: Annotated[list[BenchmarkRun], Field(min_length=1, max_length=8)] | None = None
    """Benchmarks on local data, measured before and after."""
