"""FineTuneJob: the spec that a tenant writes.

Absent means that the planner chooses. No field that defines the run has a default in the schema,
because a default that an upgrade changes would change jobs that already exist.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import Document
from finetune_api.fields import (
    DataUri,
    Endpoint,
    Fraction,
    LabelName,
    LongText,
    ModelUri,
    NonNegative,
    ObjectName,
    OutputUri,
    Pattern,
    Positive,
    Rate,
    ShortText,
)

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


class Task(StrEnum):
    """What the model computes."""

    CAUSAL_LM = "CausalLM"
    SEQ2SEQ = "Seq2Seq"
    MASKED_LM = "MaskedLM"
    SEQUENCE_CLASSIFICATION = "SequenceClassification"
    TOKEN_CLASSIFICATION = "TokenClassification"


class ObjectiveType(StrEnum):
    """What is optimised."""

    SUPERVISED = "Supervised"
    PRETRAIN = "Pretrain"
    DISTILLATION = "Distillation"
    REWARD = "Reward"
    DPO = "DPO"
    ORPO = "ORPO"
    KTO = "KTO"
    PPO = "PPO"
    GRPO = "GRPO"


class TuningType(StrEnum):
    """Which parameters change."""

    FULL = "Full"
    LORA = "LoRA"
    QLORA = "QLoRA"
    IA3 = "IA3"
    PROMPT_TUNING = "PromptTuning"
    P_TUNING = "PTuning"
    PREFIX_TUNING = "PrefixTuning"


class Attention(StrEnum):
    """The attention kernel."""

    EAGER = "Eager"
    SDPA = "Sdpa"
    FLASH = "Flash"


class DataFormat(StrEnum):
    """The shape of one record."""

    TEXT = "Text"
    PROMPT_COMPLETION = "PromptCompletion"
    MESSAGES = "Messages"
    ALPACA = "Alpaca"
    SHARE_GPT = "ShareGPT"
    QUESTION_ANSWER = "QuestionAnswer"
    PREFERENCE = "Preference"
    LABELS = "Labels"
    TAGS = "Tags"


class LossOn(StrEnum):
    """Which tokens the loss counts."""

    COMPLETION = "Completion"
    ALL = "All"


class Truncation(StrEnum):
    """What happens to a record longer than the maximum."""

    ERROR = "Error"
    TAIL = "Tail"
    OLDEST_TURNS = "OldestTurns"


class LoraBias(StrEnum):
    """Which bias terms train."""

    NONE = "None"
    ALL = "All"
    LORA_ONLY = "LoraOnly"


class LoraVariant(StrEnum):
    """The form of the low-rank update."""

    STANDARD = "Standard"
    DORA = "DoRA"
    RS_LORA = "RsLoRA"


class QuantizationType(StrEnum):
    """The number format of quantised weights."""

    NF4 = "NF4"
    FP4 = "FP4"
    INT8 = "Int8"


class ComputeType(StrEnum):
    """The number format in which quantised layers compute."""

    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


class SoftPromptInit(StrEnum):
    """How virtual tokens start."""

    RANDOM = "Random"
    TEXT = "Text"


class Schedule(StrEnum):
    """The learning-rate schedule."""

    CONSTANT = "Constant"
    LINEAR = "Linear"
    COSINE = "Cosine"


class Precision(StrEnum):
    """The number format of forward and backward passes; FP32 master weights are kept either way."""

    FP32 = "FP32"
    BF16 = "BF16"
    FP16 = "FP16"


class Optimizer(StrEnum):
    """The optimizer."""

    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"
    ADAFACTOR = "Adafactor"
    LION = "Lion"


class OnExisting(StrEnum):
    """What happens when the output URI already holds a run."""

    FAIL = "Fail"
    RESUME = "Resume"


class Credentials(Document):
    """Whose keys reach the storage. Exactly one of the two."""

    secret_name: ObjectName | None = None
    """A secret in the job's namespace with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where needed,
    AWS_SESSION_TOKEN and HF_TOKEN."""
    service_account_name: ObjectName | None = None
    """A service account in the job's namespace that carries a cloud identity."""


class Storage(Document):
    """How to reach an S3 server. The chart's values fill what is absent."""

    endpoint: Endpoint | None = None
    """URL of the S3 server; absent means AWS."""
    region: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Region of the bucket."""
    path_style: bool | None = None
    """Address buckets as endpoint/bucket rather than bucket.endpoint."""
    ca_config_map_name: ObjectName | None = None
    """A ConfigMap in the job's namespace whose key ca.crt holds the server's CA certificates in PEM."""


class Tokenizer(Document):
    """Changes to the model's tokenizer."""

    add_special_tokens: Annotated[list[ShortText], Field(min_length=1, max_length=64)] | None = None
    """Tokens to add; the embeddings are resized and saved with the artifact."""


class AdapterReference(Document):
    """An adapter to continue from."""

    uri: ModelUri
    """Where the adapter is: hf://, s3:// or pvc://."""


class ModelCache(Document):
    """A volume that holds downloaded models."""

    claim_name: ObjectName
    """A PersistentVolumeClaim in the job's namespace; trainers mount it read-only."""


class Model(Document):
    """The base model."""

    uri: ModelUri | None = None
    """hf://owner/name, s3://bucket/prefix or pvc://claim/path. Safetensors weights only."""
    revision: ShortText | None = None
    """Branch, tag or commit of an hf:// model."""
    task: Task | None = None
    """What the model computes; absent means CausalLM."""
    attention: Attention | None = None
    """The attention kernel."""
    tokenizer: Tokenizer | None = None
    """Changes to the model's tokenizer."""
    adapter: AdapterReference | None = None
    """An earlier adapter to continue from."""
    from_job: LabelName | None = None
    """An earlier FineTuneJob of this namespace whose artifact is the base; instead of uri."""
    cache: ModelCache | None = None
    """A volume that holds downloaded models."""
    credentials: Credentials | None = None
    """Instead of the job's credentials, for the model only."""
    storage: Storage | None = None
    """Instead of the job's storage, for the model only."""


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


class Dataset(Document):
    """The records to train on."""

    sources: Annotated[list[Source], Field(min_length=1, max_length=16)]
    """Where the records are."""
    format: DataFormat | None = None
    """The shape of a record; detected when absent."""
    columns: Columns | None = None
    """The names of the columns where they differ from the format's own."""
    prompt_template: LongText | None = None
    """Text with {column} in braces, such as '<human>: {question}\\n<assistant>: {answer}'. The completion column
    must come last. Absent means the model's chat template."""
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


class Lora(Document):
    """Settings of LoRA and QLoRA."""

    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = None
    """Scale of the update; it is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout before the update."""
    target_modules: Annotated[list[Pattern], Field(min_length=1, max_length=64)] | None = None
    """Names of the linear layers to adapt, or the single word all-linear."""
    bias: LoraBias | None = None
    """Which bias terms train."""
    modules_to_save: Annotated[list[Pattern], Field(min_length=1, max_length=16)] | None = None
    """Modules that train in full and are saved with the adapter."""
    variant: LoraVariant | None = None
    """The form of the update."""


class Quantization(Document):
    """How the frozen base is quantised."""

    bits: Annotated[int, Field(ge=4, le=8)] | None = None
    """4 or 8."""
    type: QuantizationType | None = None
    """The number format."""
    double_quant: bool | None = None
    """Quantise the quantisation constants too."""
    compute_type: ComputeType | None = None
    """The number format in which quantised layers compute."""


class SoftPrompt(Document):
    """Settings of PromptTuning, PTuning and PrefixTuning."""

    virtual_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """How many virtual tokens."""
    init: SoftPromptInit | None = None
    """How they start."""
    init_text: LongText | None = None
    """The text they start from, with init: Text."""
    projection: bool | None = None
    """Project the prefix through a small network (PrefixTuning)."""


class FullTuning(Document):
    """Which parameters train under Full."""

    freeze: Annotated[list[Pattern], Field(min_length=1, max_length=64)] | None = None
    """Name patterns of parameters that stay fixed."""
    trainable: Annotated[list[Pattern], Field(min_length=1, max_length=64)] | None = None
    """Name patterns of the only parameters that train."""
    first_layers: Positive | None = None
    """Train only the first N layers."""


class Tuning(Document):
    """Which parameters change."""

    type: TuningType
    """The method."""
    lora: Lora | None = None
    """Settings of LoRA and QLoRA."""
    quantization: Quantization | None = None
    """How the frozen base is quantised; with QLoRA."""
    soft_prompt: SoftPrompt | None = None
    """Settings of PromptTuning, PTuning and PrefixTuning."""
    full: FullTuning | None = None
    """Settings of Full."""


class PreferenceSettings(Document):
    """Settings of a preference objective."""

    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    """Strength of the pull towards the reference model."""


class DistillationSettings(Document):
    """Settings of Distillation: alpha · label loss + (1 − alpha) · T² · KL."""

    teacher: Model
    """The model to learn from."""
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """T, applied to both models' logits."""
    alpha: Fraction | None = None
    """Weight of the label loss."""


class BuiltInReward(StrEnum):
    """Reward functions that come with the trainer."""

    EXACT_MATCH = "ExactMatch"
    REGULAR_EXPRESSION = "RegularExpression"
    LENGTH = "Length"


class RewardFunction(Document):
    """One term of the reward: a trained reward model or a built-in function."""

    model: Model | None = None
    """A trained reward model."""
    function: BuiltInReward | None = None
    """A built-in function."""
    pattern: Pattern | None = None
    """The regular expression, with function: RegularExpression."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    """Weight of this term."""


class ReinforcementSettings(Document):
    """Settings of PPO and GRPO."""

    rewards: Annotated[list[RewardFunction], Field(min_length=1, max_length=8)]
    """The terms of the reward."""
    beta: Annotated[float, Field(ge=0, le=100)] | None = None
    """Strength of the pull towards the reference model."""
    generations: Annotated[int, Field(ge=2, le=256)] | None = None
    """Completions per prompt (GRPO)."""


class PretrainSettings(Document):
    """Settings of Pretrain: training from random initialisation."""

    vocabulary_size: Positive | None = None
    """Size of a tokenizer trained on the data; absent means the model's own tokenizer."""


class Objective(Document):
    """What is optimised, with the settings of that type only."""

    type: ObjectiveType
    """The objective."""
    pretrain: PretrainSettings | None = None
    """Settings of Pretrain."""
    distillation: DistillationSettings | None = None
    """Settings of Distillation."""
    dpo: PreferenceSettings | None = None
    """Settings of DPO."""
    orpo: PreferenceSettings | None = None
    """Settings of ORPO."""
    kto: PreferenceSettings | None = None
    """Settings of KTO."""
    ppo: ReinforcementSettings | None = None
    """Settings of PPO."""
    grpo: ReinforcementSettings | None = None
    """Settings of GRPO."""


class EarlyStopping(Document):
    """When to stop before the last step."""

    patience: Annotated[int, Field(ge=1, le=1000)]
    """Evaluations without improvement."""
    min_delta: Annotated[float, Field(ge=0, le=100)] | None = None
    """Improvement of the evaluation loss that counts."""


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
    precision: Precision | None = None
    """The number format of forward and backward passes."""
    optimizer: Optimizer | None = None
    """The optimizer."""
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


class Generation(Document):
    """How answers are generated in evaluation."""

    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Longest answer in tokens."""
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


class Checkpoint(Document):
    """When progress is saved. A checkpoint is always written at the end and on a stop."""

    every_minutes: Annotated[float, Field(gt=0, le=10080)] | None = None
    """Save each N minutes."""
    every_steps: Positive | None = None
    """Save each N optimizer steps."""
    keep_last: Annotated[int, Field(ge=1, le=100)] | None = None
    """How many of the newest checkpoints stay."""
    keep_best: Annotated[int, Field(ge=0, le=10)] | None = None
    """How many of the best by evaluation loss stay."""


class Output(Document):
    """Where the artifact goes."""

    uri: OutputUri
    """s3://bucket/prefix or pvc://claim/path; holds adapter/ or model/, the report and checkpoints/."""
    merge_adapter: bool | None = None
    """Also write the adapter merged into the base model."""
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
    """Failed attempts that are retried; absent means 3. Errors of the user are never retried."""


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
    tuning: Tuning
    """Which parameters change."""
    output: Output
    """Where the artifact goes."""
    hyperparameters: Hyperparameters | None = None
    """How to optimise."""
    evaluation: Evaluation | None = None
    """What is measured."""
    checkpoint: Checkpoint | None = None
    """When progress is saved."""
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


FROZEN_FIELDS = (
    "model",
    "dataset",
    "objective",
    "tuning",
    "output",
    "hyperparameters",
    "evaluation",
    "checkpoint",
    "resources",
    "credentials",
    "storage",
    "queueName",
    "priorityClassName",
)
