"""FineTuneJob: the status that the operator writes.

`state` and the text fields are for people; programs read conditions.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_api.base import Tolerant
from finetune_api.failures import FinetuneError
from finetune_api.fields import LongText

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


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
    digests: Annotated[dict[str, str], Field(max_length=16)] = {}
    """Digests of adapter, teacher and reward models, by the spec path of their URI."""
    further_weight_bytes: Annotated[dict[str, int], Field(max_length=16)] = {}
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
    summary: str
    """For people: "42% 420/1000"."""
    loss_text: str = ""
    """For people: "1.234"."""
    eta: str = ""
    """For people: "2h04m"."""
    update_time: Time
    """When the trainer said this; nothing is written while it says the same."""


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
    running_time: Time | None = None
    """When all its pods were first seen running."""
    stop_reason: str | None = None
    """Why it is being stopped: Suspended, Cancelled or a row of the failure table. Recorded before its Job is deleted."""
    lost_node: str | None = None
    """The node that stopped answering, with stopReason NodeLost."""


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
    checkpoint_step: int | None = None
    """Newest committed checkpoint."""
    lost_node: str | None = None
    """The node that stopped answering; later attempts avoid it."""


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
    preflight: Preflight | None = None
    """What preflight found."""
    plan: Plan | None = None
    """What runs."""
    attempt: int | None = None
    """Number of the newest attempt."""
    current: Current | None = None
    """The attempt that is under way."""
    failures: int | None = None
    """Failed attempts so far."""
    interruptions: int | None = None
    """Interrupted attempts so far."""
    interruptions_without_checkpoint: int | None = None
    """Interruptions in a row without a new checkpoint."""
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
