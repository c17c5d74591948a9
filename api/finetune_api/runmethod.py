"""The run file's part on references and on the method: objective and tuning, resolved."""

from __future__ import annotations

from finetune_api.base import Document
from finetune_api.job import (
    BuiltInReward,
    ComputeType,
    LoraBias,
    LoraVariant,
    ObjectiveType,
    Preset,
    PretrainTokenizer,
    QuantizationType,
    SoftPromptInit,
    TuningType,
)


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


class RunLora(Document):
    """LoRA settings; targetModules ["all-linear"] means every linear layer but the head."""

    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]
    bias: LoraBias
    modules_to_save: list[str] | None = None
    variant: LoraVariant
    experts: bool = False
    """Adapt the fused experts of a mixture too."""


class RunIa3(Document):
    """IA3 settings; None means PEFT's own choice for the architecture."""

    target_modules: list[str] | None = None
    feedforward_modules: list[str] | None = None


class RunSoftPrompt(Document):
    """Settings of PromptTuning, PTuning and PrefixTuning."""

    virtual_tokens: int
    init: SoftPromptInit
    init_text: str | None = None
    projection: bool = False


class RunFull(Document):
    """Which parameters train under Full: all of them where every field is None."""

    freeze: list[str] | None = None
    trainable: list[str] | None = None
    first_layers: int | None = None
    preset: Preset | None = None


class RunQuantization(Document):
    """Quantisation of the frozen base."""

    bits: int
    type: QuantizationType
    double_quant: bool
    compute_type: ComputeType


class RunTuning(Document):
    """Which parameters change; with objective Evaluation none does, and type is Full."""

    type: TuningType
    lora: RunLora | None = None
    ia3: RunIa3 | None = None
    soft_prompt: RunSoftPrompt | None = None
    full: RunFull | None = None
    quantization: RunQuantization | None = None
    """How the frozen base is quantised at load; None where it is not (or comes quantised)."""


class RunPretrain(Document):
    """Settings of Pretrain, and of Supervised text that is joined (CausalLM) or noised (MaskedLM, span corruption)."""

    tokenizer: PretrainTokenizer
    vocabulary_size: int | None = None
    random_windows: bool
    block_size: int
    mask_probability: float
    mean_span_length: float


class RunDistillation(Document):
    """Settings of Distillation: alpha · label loss + (1 − alpha) · T² · KL(teacher ‖ student)."""

    teacher: Reference
    teacher_digest: str
    temperature: float
    alpha: float
    quantize_teacher: bool


class RunPreference(Document):
    """Settings of DPO, ORPO and KTO."""

    beta: float
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


class RunReward(Document):
    """One term of the reward: `model` or `function`."""

    model: Reference | None = None
    model_digest: str | None = None
    function: BuiltInReward | None = None
    pattern: str | None = None
    target_length: int | None = None
    weight: float


class RunReinforcement(Document):
    """Settings of PPO and GRPO. `generations` is 1 for PPO."""

    rewards: list[RunReward]
    beta: float
    generations: int
    max_new_tokens: int
    temperature: float
    clip_range: float
    iterations: int
    discount: float = 1.0
    gae_lambda: float = 0.95
    value_coefficient: float = 0.1


class RunObjective(Document):
    """What is optimised, with the settings of its type only."""

    type: ObjectiveType
    pretrain: RunPretrain | None = None
    """With Pretrain, and with Supervised text that is joined (CausalLM) or noised (MaskedLM, Seq2Seq)."""
    distillation: RunDistillation | None = None
    preference: RunPreference | None = None
    reinforcement: RunReinforcement | None = None
