"""FineTuneJob: the spec that a tenant writes.

Absent means that the planner chooses. No field that defines the run has a default in the schema,
because a default that an upgrade changes would change jobs that already exist.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.access import Credentials, Storage
from finetune_api.base import Document
from finetune_api.data import Columns, Dataset, HeldOut, Source
from finetune_api.enums import (
    Attention,
    Benchmark,
    BuiltInReward,
    ComputeType,
    DataFormat,
    LoraBias,
    LoraVariant,
    LossOn,
    LossSpikeGuard,
    MasterWeights,
    ObjectiveType,
    OnExisting,
    Optimizer,
    Precision,
    Preset,
    PretrainTokenizer,
    QuantizationType,
    Schedule,
    SoftPromptInit,
    Task,
    Truncation,
    TuningType,
)
from finetune_api.evaluation import BenchmarkRun, Evaluation, Generation, Requirement
from finetune_api.fields import (
    Fraction,
    LabelName,
    NonNegative,
    ObjectName,
    OutputUri,
    Positive,
    Rate,
    ShortText,
)
from finetune_api.method import (
    DistillationSettings,
    DpoSettings,
    FullTuning,
    GrpoSettings,
    Ia3,
    KtoSettings,
    Lora,
    Objective,
    PpoSettings,
    PreferenceSettings,
    PretrainSettings,
    Quantization,
    ReinforcementSettings,
    RewardFunction,
    SoftPrompt,
    Tuning,
)
from finetune_api.model import AdapterReference, Model, ModelCache, Tokenizer

__all__ = [
    "API_VERSION",
    "FROZEN_FIELDS",
    "GROUP",
    "VERSION",
    "AdapterReference",
    "Attention",
    "Benchmark",
    "BenchmarkRun",
    "BuiltInReward",
    "Checkpoint",
    "Columns",
    "ComputeType",
    "Credentials",
    "DataFormat",
    "Dataset",
    "DistillationSettings",
    "DpoSettings",
    "EarlyStopping",
    "Evaluation",
    "FineTuneJobSpec",
    "FullTuning",
    "Generation",
    "GrpoSettings",
    "Guards",
    "HeldOut",
    "Hyperparameters",
    "Ia3",
    "KtoSettings",
    "Lora",
    "LoraBias",
    "LoraVariant",
    "LossOn",
    "LossSpikeGuard",
    "MasterWeights",
    "Model",
    "ModelCache",
    "Objective",
    "ObjectiveType",
    "OnExisting",
    "Optimizer",
    "Output",
    "PpoSettings",
    "Precision",
    "PreferenceSettings",
    "Preset",
    "PretrainSettings",
    "PretrainTokenizer",
    "Publish",
    "Quantization",
    "QuantizationType",
    "ReinforcementSettings",
    "Requirement",
    "Resources",
    "Retry",
    "RewardFunction",
    "Schedule",
    "SoftPrompt",
    "SoftPromptInit",
    "Source",
    "Storage",
    "Task",
    "Tokenizer",
    "Truncation",
    "Tuning",
    "TuningType",
]

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


class EarlyStopping(Document):
    """When to stop before the last step."""

    patience: Annotated[int, Field(ge=1, le=1000)]
    """Evaluations without improvement."""
    min_delta: Annotated[float, Field(ge=0, le=100)] | None = None
    """Improvement of checkpoint.bestMetric that counts."""


class Hyperparameters(Document):
    """How to optimise. Every field is optional; status.plan shows what was chosen and why."""

    epochs: Annotated[float, Field(gt=0, le=10000)] | None = None
    """Passes over the data; not with maxSteps."""
    max_steps: Positive | None = None
    """Optimizer steps; not with epochs."""
    learning_rate: Rate | None = None
    """Peak learning rate."""
    schedule: Schedule | None = None
    """The learning-rate schedule."""
    warmup_ratio: Fraction | None = None
    """Share of the steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    """Decoupled weight decay; not applied to biases and norms."""
    global_batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Records per optimizer step, over all GPUs."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Records per forward pass on one GPU."""
    max_sequence_length: Annotated[int, Field(ge=8, le=1048576)] | None = None
    """Longest record in tokens."""
    packing: bool | None = None
    """Put several records into one sequence, isolated from one another."""
    group_by_length: bool | None = None
    """Draw optimizer steps from records of like length, so that less is padded."""
    precision: Precision | None = None
    """The number format of forward and backward passes."""
    optimizer: Optimizer | None = None
    """The optimizer."""
    master_weights: MasterWeights | None = None
    """The number format in which weights that train are held; BF16 saves memory and loses small updates."""
    neftune_alpha: Annotated[float, Field(gt=0, le=100)] | None = None
    """Strength of NEFTune's noise on the embeddings."""
    compile: bool | None = None
    """Compile the model by torch.compile."""
    liger: bool | None = None
    """Use Liger kernels where the image has them (GPU only)."""
    router_loss_weight: Annotated[float, Field(ge=0, le=100)] | None = None
    """Weight of the router's load-balancing loss in a mixture-of-experts model."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass to save memory."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Gradients are clipped to this norm."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """DeepSpeed ZeRO stage; 0 means no DeepSpeed."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seed of every random choice."""
    early_stopping: EarlyStopping | None = None
    """When to stop before the last step."""


class Checkpoint(Document):
    """When progress is saved. A checkpoint is always written at the end and on a stop."""

    every_minutes: Annotated[float, Field(gt=0, le=10080)] | None = None
    """Save each N minutes."""
    every_steps: Positive | None = None
    """Save each N optimizer steps."""
    keep_last: Annotated[int, Field(ge=1, le=100)] | None = None
    """How many of the newest checkpoints stay."""
    keep_best: Annotated[int, Field(ge=0, le=10)] | None = None
    """How many of the best by bestMetric stay; the best of all is the result."""
    best_metric: ShortText | None = None
    """What tells the best step: `loss`, or another metric that each evaluation measures, such as `accuracy`."""


class Guards(Document):
    """What happens when the training loss goes wrong."""

    loss_spike: LossSpikeGuard | None = None
    """When the loss jumps and stays high, is stuck far above its best level, or is not finite."""
    rollback_steps: Annotated[int, Field(ge=1, le=100000)] | None = None
    """The run goes back to a checkpoint at least this many steps before the loss rose; only with lossSpike Rollback."""


class Publish(Document):
    """A repository on the hub that receives the artifact too."""

    uri: Annotated[str, Field(max_length=256, pattern=r"^hf://[^/\s?#]+/[^/\s?#]+$")]
    """hf://owner/name; it is created where it does not exist."""
    public: bool | None = None
    """Whether everybody may read it; absent means private."""
    credentials: Credentials | None = None
    """Instead of the job's credentials: the secret with HF_TOKEN."""


class Output(Document):
    """Where the artifact goes."""

    uri: OutputUri
    """s3://bucket/prefix or pvc://claim/path; holds adapter/ or model/, the report and checkpoints/."""
    merge_adapter: bool | None = None
    """Also write the adapter merged into the base model."""
    max_shard_size_gib: Annotated[Annotated[float, Field(gt=0, le=1024)] | None, Field(alias="maxShardSizeGiB")] = None
    """Largest safetensors file of a whole model; absent means 5."""
    publish: Publish | None = None
    """Publish the artifact to the hub as well."""
    on_existing: OnExisting | None = None
    """What happens when the output already holds a run; absent means Fail."""
    credentials: Credentials | None = None
    """Instead of the job's credentials, for the output only."""
    storage: Storage | None = None
    """Instead of the job's storage, for the output only."""


class Resources(Document):
    """Where it runs. Absent means the cheapest pool that fits."""

    pool: LabelName | None = None
    """A GPUPool by name; a pinned pool never falls back to another."""
    gpus: Annotated[int, Field(ge=1, le=64)] | None = None
    """GPUs per node (processes per node on a cpu pool)."""
    nodes: Annotated[int, Field(ge=1, le=256)] | None = None
    """Nodes."""
    spot: bool | None = None
    """Whether spot capacity may be used."""


class Retry(Document):
    """How often a failed attempt is repeated. Interruptions do not count."""

    max_failures: Annotated[int, Field(ge=0, le=100)] | None = None
    """Failed attempts that are retried; absent means 3. Some classes are retried less often, the user's errors never."""


class FineTuneJobSpec(Document):
    """What to tune, on what, how, and where the result goes.

    The run freezes when it is planned: until then each field may be mended in place, after that only
    suspend, cancel, retry, deadlineSeconds and ttlSecondsAfterFinished.
    """

    model: Model
    """The base model."""
    dataset: Dataset
    """The records to train on."""
    objective: Objective | None = None
    """What is optimised; absent means Supervised."""
    tuning: Tuning | None = None
    """Which parameters change; absent with objective.type: Evaluation, or QLoRA there to load the base quantised."""
    output: Output
    """Where the artifact goes."""
    hyperparameters: Hyperparameters | None = None
    """How to optimise."""
    evaluation: Evaluation | None = None
    """What is measured."""
    checkpoint: Checkpoint | None = None
    """When progress is saved."""
    guards: Guards | None = None
    """What happens when the training loss goes wrong."""
    resources: Resources | None = None
    """Where it runs."""
    credentials: Credentials | None = None
    """Whose keys reach model, data and output."""
    storage: Storage | None = None
    """How to reach the S3 server."""
    queue_name: LabelName | None = None
    """A Kueue LocalQueue."""
    priority_class_name: ObjectName | None = None
    """The PriorityClass of the pods."""
    retry: Retry | None = None
    """How often a failed attempt is repeated."""
    deadline_seconds: Positive | None = None
    """Longest time from the first attempt's start to the end, suspension not counted."""
    suspend: bool | None = None
    """Stop after a checkpoint and hold no resources until set to false."""
    cancel: bool | None = None
    """Stop for good after a checkpoint; cannot be taken back."""
    ttl_seconds_after_finished: NonNegative | None = None
    """Delete the pods' Jobs this long after the end; the FineTuneJob itself stays."""

    @property
    def objective_type(self) -> ObjectiveType:
        """The objective: Supervised where it is absent."""
        return self.objective.type if self.objective is not None else ObjectiveType.SUPERVISED

    @property
    def tuning_type(self) -> TuningType | None:
        """The tuning; None with objective Evaluation, where no parameter changes."""
        if self.tuning is None or self.objective_type == ObjectiveType.EVALUATION:
            return None
        return self.tuning.type

    @property
    def task(self) -> Task:
        """The task: where it is absent SequenceClassification for a Reward model, which is a head of one output over
        a whole text, and CausalLM for the rest."""
        if self.model.task is not None:
            return self.model.task
        return Task.SEQUENCE_CLASSIFICATION if self.objective_type == ObjectiveType.REWARD else Task.CAUSAL_LM


FROZEN_FIELDS = (
    "model",
    "dataset",
    "objective",
    "tuning",
    "output",
    "hyperparameters",
    "evaluation",
    "checkpoint",
    "guards",
    "resources",
    "credentials",
    "storage",
    "queueName",
    "priorityClassName",
)
