"""Documents that the agent hands out: the progress document and the termination message."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, Field

from finetune_api.base import Document
from finetune_api.guards import GuardState

TERMINATION_BYTES = 4096
PROGRESS_BYTES = 64 * 1024


class Stage(StrEnum):
    """What the trainer is doing."""

    STARTING = "Starting"
    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    DONE = "Done"


Finite = Annotated[float, Field(allow_inf_nan=False)]


def _readable(value: object) -> object:
    # A file name that is not UTF-8 reaches an error message as lone surrogates, which have no JSON form.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


Readable = Annotated[str, BeforeValidator(_readable)]


Seconds = Annotated[float, Field(ge=0, le=2**31, allow_inf_nan=False)]


class Spent(Document):
    """Where the time of one attempt went on node 0, in seconds; each moment is in one of them."""

    start: Seconds = 0.0
    """From the agent's start to the first step, without restore and evaluate: inputs, libraries, model, data."""
    restore: Seconds = 0.0
    """Reading the checkpoint from the store and taking it up."""
    train: Seconds = 0.0
    """Optimizer steps that count."""
    evaluate: Seconds = 0.0
    """Measuring on held-out data, the untuned model's measurement included."""
    save: Seconds = 0.0
    """Steps waiting for a checkpoint to be taken, the last upload, and publishing."""
    redo: Seconds = 0.0
    """Optimizer steps that a guard of this attempt threw away."""

    @property
    def total(self) -> float:
        """Seconds of the attempt so far."""
        return self.start + self.restore + self.train + self.evaluate + self.save + self.redo


class ProgressDocument(Document):
    """GET /progress of the agent. The operator reads it as hostile input: strict and at most 64 KiB."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    attempt: Annotated[int, Field(ge=0, le=100_000)]
    stage: Stage
    step: Annotated[int, Field(ge=0, le=2**31)]
    total_steps: Annotated[int, Field(ge=0, le=2**31)]
    epoch: Finite | None = None
    loss: Finite | None = None
    eval_loss: Finite | None = None
    learning_rate: Finite | None = None
    grad_norm: Finite | None = None
    tokens_per_second: Finite | None = None
    eta_seconds: Annotated[int, Field(ge=0, le=2**31)] | None = None
    checkpoint_step: Annotated[int, Field(ge=0, le=2**31)] | None = None
    resumed_from_step: Annotated[int, Field(ge=0, le=2**31)] | None = None
    spent: Spent | None = None
    guards: GuardState | None = None


class TerminationMessage(Document):
    """What the agent leaves in the termination log: class and URIs, at most 4,096 bytes of JSON."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    outcome: Annotated[str, Field(max_length=64)]
    """`Succeeded` or a row of the failure table."""
    message: Annotated[Readable, Field(max_length=2048)] = ""
    """What happened, where, what to do."""
    field: Annotated[Readable, Field(max_length=256)] | None = None
    """The spec path to change."""
    step: Annotated[int, Field(ge=0, le=2**31)] | None = None
    checkpoint_step: Annotated[int, Field(ge=0, le=2**31)] | None = None
    artifact: Annotated[str, Field(max_length=64)] | None = None
    """What lies below output.uri: adapter or model, or report where no model was made. Also with RequirementNotMet."""
    base_eval_loss: Finite | None = None
    eval_loss: Finite | None = None
    resumed_from_step: Annotated[int, Field(ge=0, le=2**31)] | None = None
    spent: Spent | None = None

    def encode(self) -> bytes:
        """At most 4,096 bytes of JSON; the message is cut to fit.

        The other fields are bounded so that they always fit: a character takes at most six bytes of JSON.
        """
        document = self
        while len(data := document.model_dump_json(by_alias=True, exclude_none=True).encode()) > TERMINATION_BYTES:
            document = document.model_copy(update={"message": document.message[: len(document.message) * 3 // 4]})
        return data
