"""FineTuneJob: the parts of the status that tell how the run goes and where its time went."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Tolerant

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class TimeSpent(Tolerant):
    """Where an attempt's time went so far, in whole seconds, by the first node's clock.

    The parts are those of documents.Spent, which says what belongs to which.
    """

    start_seconds: int = 0
    """Fetching inputs, loading model and data."""
    restore_seconds: int = 0
    """Taking up a checkpoint."""
    train_seconds: int = 0
    """Optimizer steps."""
    evaluate_seconds: int = 0
    """Measuring on held-out data."""
    save_seconds: int = 0
    """Waiting for checkpoints, and publishing."""
    redo_seconds: int = 0
    """Optimizer steps that a guard threw away."""


class Progress(Tolerant):
    """Where training is. Written by the progress poller alone."""

    attempt: int
    """The attempt that this is about."""
    stage: str
    """Loading, Training, Evaluating or Publishing."""
    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps in all."""
    epoch: float | None = None
    """Passes over the data done."""
    percent: int
    """step / totalSteps in percent."""
    loss: float | None = None
    """Training loss of the last logged step."""
    eval_loss: float | None = None
    """Last evaluation loss."""
    learning_rate: float | None = None
    """Learning rate of the last logged step."""
    tokens_per_second: float | None = None
    """Tokens per second over all GPUs."""
    eta_seconds: int | None = None
    """Estimated seconds to the end of training."""
    checkpoint_step: int | None = None
    """Step of the newest committed checkpoint."""
    resumed_from_step: int | None = None
    """Step of the checkpoint that the attempt went on from."""
    micro_batch_size: int | None = None
    """Records per forward pass on one GPU, where guards made it smaller than planned."""
    rollbacks: int | None = None
    """How often guards have gone back to an earlier checkpoint."""
    last_rollback: str | None = None
    """For people: what the newest of them was."""
    spent: TimeSpent | None = None
    """Where the attempt's time went."""
    summary: str
    """For people: "42% 420/1000"."""
    loss_text: str = ""
    """For people: "1.234"."""
    eta: str = ""
    """For people: "2h04m"."""
    update_time: Time
    """When the trainer said this; nothing is written while it says the same."""


class GuardChanges(Tolerant):
    """What guards have changed about the run so far, over all attempts; the plan and the run file stay as they are."""

    rollbacks: int = 0
    """How often the run went back to an earlier checkpoint."""
    last_rollback: str | None = None
    """For people: what the newest of them was."""
    micro_batch_size: int | None = None
    """Records per forward pass on one GPU, where it is smaller than planned; the effective batch is as planned."""


class Goodput(Tolerant):
    """Where the time went, in whole seconds: the parts add up to untilTime − sinceTime without suspension."""

    since_time: Time
    """When the first attempt's number was recorded."""
    until_time: Time
    """The end of the newest attempt that is counted in."""
    queue_seconds: int
    """Waiting for GPUs: from an attempt's number to all its pods having a node."""
    start_seconds: int
    """Starting containers, fetching inputs, loading model and data."""
    train_seconds: int
    """Optimizer steps that count."""
    evaluate_seconds: int
    """Measuring on held-out data."""
    save_seconds: int
    """Steps waiting for a checkpoint to be taken, and publishing."""
    restore_seconds: int
    """Taking up a checkpoint."""
    redo_seconds: int
    """Optimizer steps that were lost and had to be made again."""
    down_seconds: int
    """Everything else: between attempts, and pods that could say nothing any more."""
    percent: int
    """Training that counts, as a share of the whole."""
