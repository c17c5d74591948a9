"""FineTuneJob: the status that the operator writes.

`state` and the text fields are for people; programs read conditions.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.base import Tolerant, is_empty
from finetune_api.preflight import DataFacts, Finding, ModelFacts, Preflight
from finetune_api.progress import Goodput, GuardChanges, Progress, Time, TimeSpent

__all__ = [
    "Artifacts",
    "AttemptRecord",
    "Condition",
    "ConditionStatus",
    "ConditionType",
    "Current",
    "DataFacts",
    "Failure",
    "Finding",
    "FineTuneJobStatus",
    "Goodput",
    "GuardChanges",
    "MemoryEstimate",
    "ModelFacts",
    "Plan",
    "Preflight",
    "Progress",
    "ResolvedModel",
    "Setting",
    "State",
    "Time",
    "TimeSpent",
]


class ConditionType(StrEnum):
    """The conditions, in the order in which they are shown."""

    VALIDATED = "Validated"
    PLANNED = "Planned"
    QUEUED = "Queued"
    SCHEDULED = "Scheduled"
    TRAINING = "Training"
    CHECKPOINTED = "Checkpointed"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    FINISHED = "Finished"
    SUSPENDED = "Suspended"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class ConditionStatus(StrEnum):
    """Three-valued truth."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class State(StrEnum):
    """One word for people, computed from the conditions and the attempt."""

    PENDING = "Pending"
    PREFLIGHT = "Preflight"
    INVALID = "Invalid"
    QUEUED = "Queued"
    STARTING = "Starting"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    RETRYING = "Retrying"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class Condition(Tolerant):
    """One condition, as in metav1.Condition."""

    type: str
    """The condition."""
    status: ConditionStatus
    """True, False or Unknown."""
    reason: str
    """A CamelCase word; where it tells of a failure, a row of the failure table."""
    message: str = ""
    """A sentence for people."""
    observed_generation: int
    """The generation of the spec that this is about."""
    last_transition_time: Time
    """When status last changed."""


class Setting(Tolerant):
    """One resolved setting and where it came from."""

    name: str
    """The spec path."""
    value: Any = None
    """The value that the run uses; absent where there is none."""
    reason: str
    """"Set by the job" or why the planner chose it."""


class MemoryEstimate(Tolerant):
    """Estimated peak GPU memory in GiB per GPU."""

    total_gib: Annotated[float, Field(alias="totalGiB")]
    """Sum."""
    weights_gib: Annotated[float, Field(alias="weightsGiB")]
    """Base weights."""
    trainable_gib: Annotated[float, Field(alias="trainableGiB")]
    """Trainable weights, gradients and optimizer state."""
    activations_gib: Annotated[float, Field(alias="activationsGiB")]
    """Activations and logits."""
    reserve_gib: Annotated[float, Field(alias="reserveGiB")]
    """CUDA context and fragmentation."""


class Plan(Tolerant):
    """What will run; fixed from the moment it is written."""

    spec_digest: str
    """Digest of the run-defining part of the spec."""
    pool: str
    """The GPUPool."""
    pool_reason: str
    """Why this pool."""
    nodes: int
    """Pods."""
    gpus_per_node: int
    """GPUs (processes on a cpu pool) in each pod."""
    micro_batch_size: int
    """Records per forward pass on one GPU."""
    gradient_accumulation: int
    """Forward passes per optimizer step."""
    zero_stage: int
    """DeepSpeed ZeRO stage; 0 means no DeepSpeed."""
    total_steps: int
    """Optimizer steps."""
    settings: list[Setting]
    """Each resolved setting with its reason."""
    memory: MemoryEstimate
    """Estimated peak GPU memory."""
    run_digest: str
    """Digest of the run file; every attempt runs the same one."""
    trainer_image: str
    """The trainer image that every attempt uses."""


class Current(Tolerant):
    """The attempt that is under way."""

    number: int
    """The attempt's number: recorded before its Job is created."""
    job_uid: Annotated[str | None, Field(alias="jobUID")] = None
    """UID of its Job, once created."""
    released: bool = False
    """Whether its Job was allowed to start pods."""
    start_time: Time
    """When the number was recorded."""
    scheduled_time: Time | None = None
    """When the last of its pods got a node."""
    running_time: Time | None = None
    """When all its pods were first seen running."""
    stop_reason: str | None = None
    """Why it is being stopped: Suspended, Cancelled or a row of the failure table. Recorded before its Job is deleted."""
    avoid_node: str | None = None
    """The node at fault: one that was lost under the attempt, or that stopReason is about."""


class AttemptRecord(Tolerant):
    """One finished attempt."""

    number: int
    """The attempt's number."""
    pool: str
    """The GPUPool."""
    start_time: Time
    """Start."""
    end_time: Time
    """End."""
    outcome: str
    """Succeeded, Suspended, Cancelled or a row of the failure table."""
    resumed_from_step: int | None = None
    """The checkpoint that it went on from."""
    step: int | None = None
    """Optimizer steps that it reached."""
    checkpoint_step: int | None = None
    """Newest committed checkpoint."""
    tokens_per_second: float | None = None
    """Tokens per second over all GPUs, as last heard."""
    avoid_node: str | None = None
    """The node that was lost or unusable; later attempts avoid it until one of them finds no room elsewhere."""


class Failure(Tolerant):
    """The last failure."""

    failure_class: Annotated[str, Field(alias="class")]
    """Row of the failure table."""
    message: str
    """What happened and where."""
    field: str | None = None
    """The spec path to change."""
    hint: str
    """What to do."""
    retriable: bool
    """Whether another attempt may help without a change."""
    runbook: str
    """Where the runbook is."""


class ResolvedModel(Tolerant):
    """What a fromJob of the spec stands for; fixed once the named job has succeeded."""

    field: str
    """The spec path of the model that names the job."""
    job: str
    """The FineTuneJob."""
    uri: str
    """Its whole model, or the base of its adapter."""
    revision: str | None = None
    """Revision of an hf:// base."""
    adapter: str | None = None
    """URI of its adapter."""
    task: str | None = None
    """Its task, where it is not CausalLM."""


class Artifacts(Tolerant):
    """Where the results are."""

    uri: str
    """The output URI."""
    adapter: str | None = None
    """URI of the adapter."""
    model: str | None = None
    """URI of the full or merged model."""
    report: str
    """URI of report.md."""
    published: str | None = None
    """The repository on the hub that received the artifact."""
    base_eval_loss: float | None = None
    """Evaluation loss of the base model."""
    eval_loss: float | None = None
    """Evaluation loss of the tuned model."""


class FineTuneJobStatus(Tolerant):
    """What the operator knows about the job."""

    observed_generation: int = -1
    """The generation of the spec that was last acted on; -1 before the operator saw the job."""
    conditions: list[Condition] = []
    """The conditions."""
    state: State | None = None
    """One word for people."""
    message: str | None = None
    """One sentence for people."""
    resolved: list[ResolvedModel] = []
    """What each fromJob of the spec stands for."""
    preflight: Preflight | None = None
    """What preflight found."""
    plan: Plan | None = None
    """What runs."""
    attempt: int | None = None
    """Number of the newest attempt."""
    current: Current | None = None
    """The attempt that is under way."""
    failures: int | None = None
    """Failed attempts so far; before the plan, failed preflights of this generation."""
    preflight_failures: Annotated[dict[str, int], Field(exclude_if=is_empty)] = {}
    """The failed preflights of this generation by row of the failure table; empty once the run is planned."""
    interruptions: int | None = None
    """Interrupted attempts so far."""
    interruptions_without_checkpoint: int | None = None
    """Interruptions in a row without a new checkpoint."""
    endings: Annotated[dict[str, int], Field(exclude_if=is_empty)] = {}
    """How many attempts ended in which way: Succeeded, Suspended, Cancelled or a row of the failure table."""
    guards: GuardChanges | None = None
    """What guards have changed about the run."""
    next_attempt_time: Time | None = None
    """Not before this time does the next attempt start."""
    progress: Progress | None = None
    """Where training is."""
    attempts: list[AttemptRecord] = []
    """The last finished attempts."""
    failure: Failure | None = None
    """The last failure."""
    artifacts: Artifacts | None = None
    """Where the results are."""
    start_time: Time | None = None
    """When the first attempt's pods ran."""
    goodput: Goodput | None = None
    """Where the time went; written when an attempt ends."""
    suspended_seconds: int | None = None
    """Seconds spent suspended since startTime; deadlineSeconds does not count them."""
    completion_time: Time | None = None
    """When the job reached its end."""

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of that type, if it was ever written."""
        return next((c for c in self.conditions if c.type == kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        """Whether the condition of that type is True."""
        found = self.condition(kind)
        return found is not None and found.status == ConditionStatus.TRUE
