"""The run file: what to train, resolved. Written by the operator or by `finetune run`, read by the trainer.

Nothing in it is left to be chosen: the planner has filled every field. It holds no secrets; a reference names a
credentials profile whose keys stand in the environment (naming.credential_env).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Document
from finetune_api.digest import digest
from finetune_api.job import (
    Attention,
    Benchmark,
    Columns,
    DataFormat,
    FullTuning,
    Generation,
    Ia3,
    Lora,
    LossOn,
    LossSpikeGuard,
    MasterWeights,
    ObjectiveType,
    OnExisting,
    Optimizer,
    Precision,
    PretrainTokenizer,
    Requirement,
    Schedule,
    SoftPrompt,
    Task,
    Truncation,
    TuningType,
)
from finetune_api.metrics import LOSS
from finetune_api.runmethod import (
    Reference,
    RunDistillation,
    RunFull,
    RunIa3,
    RunLora,
    RunObjective,
    RunPreference,
    RunPretrain,
    RunQuantization,
    RunReinforcement,
    RunReward,
    RunSoftPrompt,
    RunTuning,
    StorageAccess,
)

__all__ = [
    "RUN_FILE_VERSION",
    "Input",
    "InputKind",
    "PreflightFile",
    "PreflightInput",
    "Reference",
    "RunBenchmark",
    "RunCheckpoint",
    "RunDataset",
    "RunDistillation",
    "RunEarlyStopping",
    "RunEvaluation",
    "RunFile",
    "RunFull",
    "RunGuards",
    "RunHyperparameters",
    "RunIa3",
    "RunJob",
    "RunLora",
    "RunModel",
    "RunObjective",
    "RunOutput",
    "RunPreference",
    "RunPretrain",
    "RunPublish",
    "RunQuantization",
    "RunReinforcement",
    "RunResources",
    "RunReward",
    "RunSoftPrompt",
    "RunTuning",
    "StorageAccess",
]

RUN_FILE_VERSION: Literal[1] = 1


class RunJob(Document):
    """Which job this is: names the owner of the output."""

    name: str
    namespace: str
    uid: str


class RunModel(Document):
    """The base model. `adapter`: an earlier adapter on it, to continue from or to evaluate."""

    source: Reference
    task: Task
    attention: Attention
    digest: str
    adapter: Reference | None = None
    adapter_digest: str | None = None
    add_special_tokens: list[str] | None = None


class RunDataset(Document):
    """The data. `validation_fraction` and `validation` exclude each other; neither means no evaluation."""

    sources: list[Reference]
    format: DataFormat
    columns: Columns | None = None
    prompt_template: str | None = None
    validation_fraction: float | None = None
    validation: Reference | None = None
    test_fraction: float | None = None
    test: Reference | None = None
    loss_on: LossOn
    truncation: Truncation
    max_source_tokens: int | None = None
    max_target_tokens: int | None = None
    max_bad_share: float = 0.0
    max_cut_share: float = 1.0
    balance_labels: bool = False
    digest: str


class RunEarlyStopping(Document):
    """Stop after `patience` evaluations without an improvement of at least `min_delta`."""

    patience: int
    min_delta: float


class RunHyperparameters(Document):
    """How to optimise. `total_steps` is what runs; with packing it follows from `epochs` at start."""

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
    packing: bool = False
    group_by_length: bool = False
    master_weights: MasterWeights = MasterWeights.FP32
    neftune_alpha: float | None = None
    compile: bool = False
    liger: bool = False
    router_loss_weight: float | None = None
    early_stopping: RunEarlyStopping | None = None


class RunBenchmark(Document):
    """One benchmark on local data."""

    name: Benchmark
    source: Reference
    max_records: int | None = None


class RunEvaluation(Document):
    """What is measured. `metrics` are beside loss and perplexity; the names are those of the report."""

    every_steps: int | None = None
    generation: Generation
    metrics: list[str] = []
    require: list[Requirement] = []
    max_generated: int = 64
    probes: list[str] = []
    retention: Reference | None = None
    benchmarks: list[RunBenchmark] = []


class RunCheckpoint(Document):
    """When progress is saved: whichever comes first. best_metric: what tells the best steps."""

    every_minutes: float | None = None
    every_steps: int | None = None
    keep_last: int
    keep_best: int = 0
    best_metric: str = LOSS


class RunGuards(Document):
    """What happens when the training loss goes wrong. With loss_spike Rollback, in optimizer steps but for the last two:

    spike: `spike_steps` losses in a row far above the `window` losses before them. plateau: two blocks of `window` losses
    in a row whose median is far above the best block's. The run then goes back to the newest checkpoint that is at
    least `rollback_steps` older than the onset, and takes `rate_factor` of the planned learning rate up to
    `lowered_steps` after the onset. min_rise: share of the loss by which it has to rise to count as far above.
    """

    loss_spike: LossSpikeGuard = LossSpikeGuard.OFF
    window: Annotated[int, Field(ge=8)] = 64
    spike_steps: Annotated[int, Field(ge=1)] = 8
    rollback_steps: Annotated[int, Field(ge=1)] = 10
    lowered_steps: Annotated[int, Field(ge=1)] = 20
    rate_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    min_rise: Annotated[float, Field(ge=0)] = 0.25


class RunPublish(Document):
    """A repository on the hub that receives the artifact."""

    target: Reference
    public: bool = False


class RunOutput(Document):
    """Where the artifact goes."""

    target: Reference
    merge_adapter: bool
    on_existing: OnExisting
    max_shard_size_gib: Annotated[float, Field(alias="maxShardSizeGiB")] = 5.0
    publish: RunPublish | None = None


class RunResources(Document):
    """The gang."""

    pool: str
    nodes: int
    processes_per_node: int
    accelerator: str
    """`cpu` or the name of a GPU."""


class InputKind(StrEnum):
    """What a folder of inputs holds."""

    MODEL = "Model"
    CONFIG = "Config"
    """A model's config and tokenizer without its weights: what Pretrain starts from."""
    ADAPTER = "Adapter"
    DATA = "Data"


@dataclass(frozen=True)
class Input:
    """One thing that the agent fetches. folder: below WORK/inputs. field: spec path of its URI, without `spec.`.

    digest: what was planned; None for data, where one digest (dataset.digest) covers all of it in this order.
    """

    folder: str
    kind: InputKind
    field: str
    reference: Reference
    digest: str | None = None


class RunFile(Document):
    """The whole run. Every attempt of a job runs the same run file."""

    version: Literal[1] = RUN_FILE_VERSION
    job: RunJob
    model: RunModel
    dataset: RunDataset
    objective: RunObjective
    tuning: RunTuning
    hyperparameters: RunHyperparameters
    evaluation: RunEvaluation
    checkpoint: RunCheckpoint
    guards: RunGuards = RunGuards()
    output: RunOutput
    resources: RunResources
    settings: list[dict[str, object]] = []
    """Each resolved setting with where it came from, for the report."""

    def digest(self) -> str:
        """Digest of the whole document."""
        return digest(self.to_json())

    @property
    def joins_text(self) -> bool:
        """Whether a supervised causal model reads plain text as one running text in blocks, from its own weights."""
        kind = (self.objective.type, self.model.task)
        return kind == (ObjectiveType.SUPERVISED, Task.CAUSAL_LM) and self.objective.pretrain is not None

    def inputs(self) -> list[Input]:
        """Everything that has to lie below WORK/inputs before a worker starts."""
        return [*self._models(), *self._data()]

    def _models(self) -> Iterator[Input]:
        model = self.model
        fresh = self.objective.type == ObjectiveType.PRETRAIN
        kind = InputKind.CONFIG if fresh else InputKind.MODEL
        yield Input("model", kind, "model.uri", model.source, model.digest)
        if model.adapter is not None:
            yield Input("adapter", InputKind.ADAPTER, "model.adapter.uri", model.adapter, model.adapter_digest)
        if (distillation := self.objective.distillation) is not None:
            field = "objective.distillation.teacher.uri"
            yield Input("teacher", InputKind.MODEL, field, distillation.teacher, distillation.teacher_digest)
        reinforcement = self.objective.reinforcement
        for number, reward in enumerate(reinforcement.rewards if reinforcement else []):
            if reward.model is not None:
                field = f"objective.{self.objective.type.lower()}.rewards[{number}].model.uri"
                yield Input(f"rewards/{number}", InputKind.MODEL, field, reward.model, reward.model_digest)

    def _data(self) -> Iterator[Input]:
        for number, source in enumerate(self.dataset.sources):
            yield Input(f"data/{number}", InputKind.DATA, f"dataset.sources[{number}].uri", source)
        further = (
            ("validation", "dataset.validation.source.uri", self.dataset.validation),
            ("test", "dataset.test.source.uri", self.dataset.test),
            ("retention", "evaluation.retention.uri", self.evaluation.retention),
        )
        for folder, field, reference in further:
            if reference is not None:
                yield Input(folder, InputKind.DATA, field, reference)
        for number, benchmark in enumerate(self.evaluation.benchmarks):
            field = f"evaluation.benchmarks[{number}].source.uri"
            yield Input(f"benchmarks/{number}", InputKind.DATA, field, benchmark.source)

    @property
    def world_size(self) -> int:
        """Processes of the whole gang."""
        return self.resources.nodes * self.resources.processes_per_node

    @property
    def global_batch_size(self) -> int:
        """Records per optimizer step."""
        hp = self.hyperparameters
        return hp.micro_batch_size * hp.gradient_accumulation * self.world_size


class PreflightInput(Document):
    """A further place that preflight looks at. field as in Input. benchmark: whose columns its records must have."""

    kind: InputKind
    field: str
    reference: Reference
    benchmark: Benchmark | None = None


class PreflightFile(Document):
    """What preflight has to check: references with their access, and the spec's data settings."""

    version: Literal[1] = RUN_FILE_VERSION
    job: RunJob
    spec_digest: str
    model: Reference
    task: Task
    objective: ObjectiveType = ObjectiveType.SUPERVISED
    tuning: TuningType | None = None
    sources: list[Reference]
    validation: Reference | None = None
    further: list[PreflightInput] = []
    """Adapter, teacher, reward models, test, retention and benchmark data."""
    lora: Lora | None = None
    soft_prompt: SoftPrompt | None = None
    """With lora: what the settings of an earlier adapter are compared with."""
    ia3: Ia3 | None = None
    full: FullTuning | None = None
    """With ia3 and lora: the layers and parameters that the model must have."""
    loss_on: LossOn | None = None
    truncation: Truncation | None = None
    max_sequence_length: int | None = None
    max_source_tokens: int | None = None
    max_target_tokens: int | None = None
    new_tokens: int = 0
    """How much of the sequence the model itself writes (PPO, GRPO)."""
    validation_fraction: float | None = None
    test_fraction: float | None = None
    max_bad_share: float = 0.0
    max_cut_share: float = 1.0
    format: DataFormat | None = None
    columns: Columns | None = None
    prompt_template: str | None = None
    pretrain_tokenizer: PretrainTokenizer | None = None
    random_windows: bool = False
    joins_text: bool = False
    """Whether a supervised causal model reads plain text as one running text in blocks."""
    output: Reference
    publish: RunPublish | None = None
    on_existing: OnExisting
    local: bool = False
    """True under `finetune run`: only then is file:// allowed."""
