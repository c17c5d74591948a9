"""The words of the API: every enumeration that a tenant may write."""

from __future__ import annotations

from enum import StrEnum


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
    EVALUATION = "Evaluation"
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


class PretrainTokenizer(StrEnum):
    """Where the tokenizer of a Pretrain run comes from."""

    MODEL = "Model"
    BYTE_PAIR = "BytePair"
    CHARACTER = "Character"


class Preset(StrEnum):
    """Named choices of the parameters that train under Full."""

    ROUTER_AND_EXPERTS = "RouterAndExperts"


class Benchmark(StrEnum):
    """Benchmarks that run on local data."""

    ARC_EASY = "ArcEasy"
    ARC_CHALLENGE = "ArcChallenge"
    HELLA_SWAG = "HellaSwag"
    MMLU = "MMLU"
    TRUTHFUL_QA = "TruthfulQA"


class LossOn(StrEnum):
    """Which tokens the loss counts."""

    COMPLETION = "Completion"
    ALL = "All"


class LossSpikeGuard(StrEnum):
    """What a loss that has gone wrong leads to."""

    ROLLBACK = "Rollback"
    OFF = "Off"


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
    COSINE_TO_TENTH = "CosineToTenth"
    POLYNOMIAL = "Polynomial"
    INVERSE_SQRT = "InverseSqrt"


class Precision(StrEnum):
    """The number format of forward and backward passes."""

    FP32 = "FP32"
    BF16 = "BF16"
    FP16 = "FP16"


class MasterWeights(StrEnum):
    """The number format in which weights that train are held between steps."""

    FP32 = "FP32"
    BF16 = "BF16"


class Optimizer(StrEnum):
    """The optimizer."""

    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    PAGED_ADAMW_8BIT = "PagedAdamW8bit"
    ADAFACTOR = "Adafactor"
    LION = "Lion"
    LION_8BIT = "Lion8bit"
    PAGED_LION_8BIT = "PagedLion8bit"


class OnExisting(StrEnum):
    """What happens when the output URI already holds a run."""

    FAIL = "Fail"
    RESUME = "Resume"


class BuiltInReward(StrEnum):
    """Reward functions that come with the trainer."""

    EXACT_MATCH = "ExactMatch"
    REGULAR_EXPRESSION = "RegularExpression"
    LENGTH = "Length"
