"""The run file: what to train, resolved. Written by the operator or by `finetune run`, read by the trainer.

Nothing in it is left to be chosen: the planner has filled every field. It holds no secrets; a reference names a
credentials profile whose keys stand in the environment (naming.credential_env).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Document
from finetune_api.digest import digest
from finetune_api.job import (
    Attention,
    Columns,
    ComputeType,
    DataFormat,
    Generation,
    LoraBias,
    LoraVariant,
    LossOn,
    ObjectiveType,
    OnExisting,
    Optimizer,
    Precision,
    QuantizationType,
    Schedule,
    Task,
    Truncation,
    TuningType,
)

RUN_FILE_VERSION: Literal[1] = 1


class StorageAccess(Document):
    """How to reach the place that a URI names."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    ca_file: str | None = None
    """Path of a PEM file inside the pod."""
    profile: str | None = None
    """Credentials profile; None means the environment's own identity."""


class Reference(Document):
    """A URI and the way to it."""

    uri: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    weight: float | None = None
    access: StorageAccess


class RunJob(Document):
    """Which job this is: names the owner of the output."""

    name: str
    namespace: str
    uid: str


class RunModel(Document):
    """The base model."""

    source: Reference
    task: Task
    attention: Attention
    digest: str


class RunDataset(Document):
    """The data. `validation_fraction` and `validation` exclude each other; neither means no evaluation."""

    sources: list[Reference]
    format: DataFormat
    columns: Columns | None = None
    prompt_template: str | None = None
    validation_fraction: float | None = None
    validation: Reference | None = None
    loss_on: LossOn
    truncation: Truncation
    digest: str


class RunLora(Document):
    """LoRA settings; targetModules ["all-linear"] means every linear layer but the head."""

    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    bias: LoraBias
    modules_to_save: list[str] | None = None
    variant: LoraVariant


class RunQuantization(Document):
    """Quantisation of the frozen base."""

    bits: int
    type: QuantizationType
    double_quant: bool
    compute_type: ComputeType


class RunTuning(Document):
    """Which parameters change."""

    type: TuningType
    lora: RunLora | None = None
    quantization: RunQuantization | None = None


class RunHyperparameters(Document):
    """How to optimise. `total_steps` is what runs; `epochs` is kept for the report."""

    total_steps: int
    epochs: float | None = None
    learning_rate: float
    schedule: Schedule
    warmup_ratio: float
    weight_decay: float
    micro_batch_size: int
    gradient_accumulation: int
    max_sequence_length: int
    precision: Precision
    optimizer: Optimizer
    gradient_checkpointing: bool
    max_grad_norm: float
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    seed: int


class RunEvaluation(Document):
    """What is measured."""

    every_steps: int | None = None
    generation: Generation


class RunCheckpoint(Document):
    """When progress is saved: whichever comes first."""

    every_minutes: float | None = None
    every_steps: int | None = None
    keep_last: int


class RunOutput(Document):
    """Where the artifact goes."""

    target: Reference
    merge_adapter: bool
    on_existing: OnExisting


class RunResources(Document):
    """The gang."""

    pool: str
    nodes: int
    processes_per_node: int
    accelerator: str
    """`cpu` or the name of a GPU."""


class RunFile(Document):
    """The whole run. Every attempt of a job runs the same run file."""

    version: Literal[1] = RUN_FILE_VERSION
    job: RunJob
    model: RunModel
    dataset: RunDataset
    objective: ObjectiveType
    tuning: RunTuning
    hyperparameters: RunHyperparameters
    evaluation: RunEvaluation
    checkpoint: RunCheckpoint
    output: RunOutput
    resources: RunResources
    settings: list[dict[str, object]] = []
    """Each resolved setting with where it came from, for the report."""

    def digest(self) -> str:
        """Digest of the whole document."""
        return digest(self.to_json())

    @property
    def world_size(self) -> int:
        """Processes of the whole gang."""
        return self.resources.nodes * self.resources.processes_per_node

    @property
    def global_batch_size(self) -> int:
        """Records per optimizer step."""
        hp = self.hyperparameters
        return hp.micro_batch_size * hp.gradient_accumulation * self.world_size


class PreflightFile(Document):
    """What preflight has to check: references with their access, and the spec's data settings."""

    version: Literal[1] = RUN_FILE_VERSION
    job: RunJob
    spec_digest: str
    model: Reference
    task: Task
    sources: list[Reference]
    validation: Reference | None = None
    format: DataFormat | None = None
    columns: Columns | None = None
    prompt_template: str | None = None
    output: Reference
    on_existing: OnExisting
    local: bool = False
    """True under `finetune run`: only then is file:// allowed."""
