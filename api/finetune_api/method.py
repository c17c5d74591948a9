"""What a job optimises and which parameters change: objective and tuning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_api.base import Document
from finetune_api.enums import (
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
from finetune_api.fields import Fraction, LongText, Pattern, Positive
from finetune_api.model import FurtherModel


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
    experts: bool | None = None
    """Adapt the experts of a mixture-of-experts model too."""


class Ia3(Document):
    """Settings of IA3."""

    target_modules: Annotated[list[Pattern], Field(min_length=1, max_length=64)] | None = None
    """Names of the layers whose outputs are scaled."""
    feedforward_modules: Annotated[list[Pattern], Field(min_length=1, max_length=64)] | None = None
    """Those of them whose inputs are scaled instead."""


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
    """Train only the first N layers, counted from the input."""
    preset: Preset | None = None
    """A named choice instead of patterns."""


class Tuning(Document):
    """Which parameters change."""

    type: TuningType
    """The method."""
    lora: Lora | None = None
    """Settings of LoRA and QLoRA."""
    ia3: Ia3 | None = None
    """Settings of IA3."""
    quantization: Quantization | None = None
    """How the frozen base is quantised; with QLoRA, IA3 and soft prompts."""
    soft_prompt: SoftPrompt | None = None
    """Settings of PromptTuning, PTuning and PrefixTuning."""
    full: FullTuning | None = None
    """Settings of Full."""


class PreferenceSettings(Document):
    """Settings of a preference objective."""

    beta: Annotated[float, Field(gt=0, le=100)] | None = None
    """Strength of the pull towards the reference model; for ORPO the weight of the odds ratio."""


class DpoSettings(PreferenceSettings):
    """Settings of DPO."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Assumed share of swapped preferences."""


class KtoSettings(PreferenceSettings):
    """Settings of KTO."""

    desirable_weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Weight of desirable completions."""
    undesirable_weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Weight of undesirable completions."""


class DistillationSettings(Document):
    """Settings of Distillation: alpha · label loss + (1 − alpha) · T² · KL."""

    teacher: FurtherModel
    """The model to learn from."""
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """T, applied to both models' logits."""
    alpha: Fraction | None = None
    """Weight of the label loss."""
    quantize_teacher: bool | None = None
    """Hold the teacher in 4 bits."""


class RewardFunction(Document):
    """One term of the reward: a trained reward model or a built-in function."""

    model: FurtherModel | None = None
    """A trained reward model."""
    function: BuiltInReward | None = None
    """A built-in function."""
    pattern: Pattern | None = None
    """The regular expression that the completion must contain, with function: RegularExpression."""
    target_length: Positive | None = None
    """The wished length of the completion in tokens, with function: Length."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    """Weight of this term."""


class ReinforcementSettings(Document):
    """Settings that PPO and GRPO share."""

    rewards: Annotated[list[RewardFunction], Field(min_length=1, max_length=8)]
    """The terms of the reward."""
    beta: Annotated[float, Field(ge=0, le=100)] | None = None
    """Strength of the pull towards the reference model."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None
    """Sampling temperature of the completions."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How far the probability of a token may move before its gradient is cut."""
    iterations: Annotated[int, Field(ge=1, le=16)] | None = None
    """Optimizer steps for each set of completions."""


class GrpoSettings(ReinforcementSettings):
    """Settings of GRPO."""

    generations: Annotated[int, Field(ge=2, le=256)] | None = None
    """Completions per prompt."""


class PpoSettings(ReinforcementSettings):
    """Settings of PPO."""

    discount: Annotated[float, Field(gt=0, le=1)] | None = None
    """Discount of later rewards, gamma."""
    gae_lambda: Fraction | None = None
    """Lambda of generalised advantage estimation."""
    value_coefficient: Annotated[float, Field(gt=0, le=100)] | None = None
    """Weight of the value loss."""


class PretrainSettings(Document):
    """Settings of Pretrain, which starts from random weights, of running text, and of hidden tokens."""

    tokenizer: PretrainTokenizer | None = None
    """The model's own tokenizer, or one trained on the data: byte pairs or single characters."""
    vocabulary_size: Annotated[int, Field(ge=8, le=1_000_000)] | None = None
    """Size of a BytePair tokenizer."""
    random_windows: bool | None = None
    """Draw windows from random places of the text instead of packing whole documents."""
    block_size: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Tokens of one training sequence; absent means hyperparameters.maxSequenceLength.

    With Supervised and CausalLM it makes the records one running text that is cut into blocks of this size.
    """
    mask_probability: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of tokens to predict (MaskedLM) or to drop in spans (Seq2Seq)."""
    mean_span_length: Annotated[float, Field(ge=1, le=100)] | None = None
    """Mean length of a dropped span in tokens (Seq2Seq)."""


class Objective(Document):
    """What is optimised, with the settings of that type only."""

    type: ObjectiveType
    """The objective."""
    pretrain: PretrainSettings | None = None
    """Settings of Pretrain; with Supervised those of plain text: running text (CausalLM), hidden tokens (MaskedLM,
    Seq2Seq)."""
    distillation: DistillationSettings | None = None
    """Settings of Distillation."""
    dpo: DpoSettings | None = None
    """Settings of DPO."""
    orpo: PreferenceSettings | None = None
    """Settings of ORPO."""
    kto: KtoSettings | None = None
    """Settings of KTO."""
    ppo: PpoSettings | None = None
    """Settings of PPO."""
    grpo: GrpoSettings | None = None
    """Settings of GRPO."""
