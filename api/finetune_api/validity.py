"""What can be combined with what: objective × tuning × task × quantisation × ZeRO stage × precision.

One table of rules. A cell that no rule refuses is expected to work and is tested; every other is refused with the
reason before a GPU is taken. The table is the source of CEL rules, of the operator's answer, of docs/supported.md and of
the tests. What depends on the model's own config (mixtures, quantised weight files) is preflight's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from finetune_api.job import ObjectiveType, Precision, QuantizationType, Task, TuningType

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Cell:
    """One combination. tuning: None for an evaluation; quantization: of the frozen base, None where it is not."""

    objective: ObjectiveType
    tuning: TuningType | None
    task: Task
    quantization: QuantizationType | None = None
    zero_stage: int = 0
    precision: Precision = Precision.FP32
    on_cpu: bool = False


@dataclass(frozen=True)
class Rule:
    """Refuses each cell that has, in every dimension named here, one of the values; an empty dimension is any value.

    field: the spec path to change, without `spec.`. reason: what is wrong and what to choose instead, as one clause
    after the path.
    """

    field: str
    reason: str
    objective: tuple[ObjectiveType, ...] = ()
    tuning: tuple[TuningType | None, ...] = ()
    task: tuple[Task, ...] = ()
    quantization: tuple[QuantizationType | None, ...] = ()
    zero_stage: tuple[int, ...] = ()
    precision: tuple[Precision, ...] = ()
    on_cpu: bool | None = None

    @property
    def message(self) -> str:
        """The refusal as a person reads it."""
        return f"{self.field}: {self.reason}"

    def refuses(self, cell: Cell) -> bool:
        """Whether the rule is against the cell."""
        pairs: tuple[tuple[tuple[object, ...], object], ...] = (
            (self.objective, cell.objective),
            (self.tuning, cell.tuning),
            (self.task, cell.task),
            (self.quantization, cell.quantization),
            (self.zero_stage, cell.zero_stage),
            (self.precision, cell.precision),
        )
        return all(not values or value in values for values, value in pairs) and self.on_cpu in (None, cell.on_cpu)


_O, _T, _Q = ObjectiveType, TuningType, QuantizationType
_SOFT = (_T.PROMPT_TUNING, _T.P_TUNING, _T.PREFIX_TUNING)
_QUANTIZED = (_Q.NF4, _Q.FP4, _Q.INT8)
_SHARDED = (1, 2, 3)
_REINFORCED = (_O.PPO, _O.GRPO)


def _but(*kept: ObjectiveType) -> tuple[ObjectiveType, ...]:
    return tuple(kind for kind in ObjectiveType if kind not in kept)


def _tasks_but(*kept: Task) -> tuple[Task, ...]:
    return tuple(task for task in Task if task not in kept)


# The first rule that is against a cell gives its reason, so what is plain comes before what is subtle.
RULES: tuple[Rule, ...] = (
    # objective × tuning
    Rule("tuning", "is missing; choose tuning.type", objective=_but(_O.EVALUATION), tuning=(None,)),
    Rule(
        "tuning",
        "an evaluation changes no parameter; remove it, or choose tuning.type QLoRA to load the base quantised",
        objective=(_O.EVALUATION,),
        tuning=tuple(kind for kind in TuningType if kind != _T.QLORA),
    ),
    Rule(
        "tuning.type",
        "random weights hold nothing that an adapter could build on; choose Full",
        objective=(_O.PRETRAIN,),
        tuning=tuple(kind for kind in TuningType if kind != _T.FULL),
    ),
    Rule(
        "tuning.type",
        "soft prompts are tested with objective Supervised only; choose LoRA or Full",
        objective=_but(_O.SUPERVISED, _O.EVALUATION, _O.PRETRAIN),
        tuning=_SOFT,
    ),
    # objective × task
    Rule(
        "model.task",
        "preferences and rewards are about the tokens of a causal model; choose CausalLM",
        objective=(_O.DPO, _O.ORPO, _O.KTO, *_REINFORCED),
        task=_tasks_but(Task.CAUSAL_LM),
    ),
    Rule(
        "model.task",
        "a reward model is a head of one output over a whole text; choose SequenceClassification or remove it",
        objective=(_O.REWARD,),
        task=_tasks_but(Task.SEQUENCE_CLASSIFICATION),
    ),
    Rule(
        "model.task",
        "a teacher is followed over the next token or over classes; choose CausalLM or SequenceClassification",
        objective=(_O.DISTILLATION,),
        task=_tasks_but(Task.CAUSAL_LM, Task.SEQUENCE_CLASSIFICATION),
    ),
    Rule(
        "model.task",
        "random weights learn language first; choose CausalLM, MaskedLM or Seq2Seq",
        objective=(_O.PRETRAIN,),
        task=_tasks_but(Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ),
    ),
    # tuning × task
    Rule(
        "tuning.type",
        "a soft prompt does not fit a masked model; choose LoRA, IA3 or Full",
        tuning=_SOFT,
        task=(Task.MASKED_LM,),
    ),
    Rule(
        "tuning.type",
        "a prefix of keys and values needs a decoder, which most classifiers are not; choose PTuning or LoRA",
        tuning=(_T.PREFIX_TUNING,),
        task=(Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION),
    ),
    # quantisation
    Rule(
        "tuning.quantization",
        "Full trains the weights, and quantised ones cannot train; remove it",
        tuning=(_T.FULL,),
        quantization=_QUANTIZED,
    ),
    Rule(
        "tuning.quantization",
        "LoRA on a quantised base is QLoRA; choose tuning.type QLoRA, or remove it",
        tuning=(_T.LORA,),
        quantization=_QUANTIZED,
    ),
    Rule("tuning.quantization", "QLoRA quantises its base; choose LoRA", tuning=(_T.QLORA,), quantization=(None,)),
    Rule(
        "tuning.quantization",
        "without tuning the model is loaded as it is; remove it",
        tuning=(None,),
        quantization=_QUANTIZED,
    ),
    # ZeRO
    Rule(
        "hyperparameters.zeroStage",
        "an evaluation has no optimizer state to shard; choose 0",
        objective=(_O.EVALUATION,),
        zero_stage=_SHARDED,
    ),
    Rule(
        "hyperparameters.zeroStage",
        "generation under sharded state is not tested; choose 0",
        objective=_REINFORCED,
        zero_stage=_SHARDED,
    ),
    Rule(
        "hyperparameters.zeroStage",
        "3 cannot shard quantised weights; choose 0 or 2, or tuning.type LoRA",
        quantization=_QUANTIZED,
        zero_stage=(3,),
    ),
    Rule(
        "hyperparameters.zeroStage",
        "8-bit weights under ZeRO are not tested; choose 0",
        quantization=(_Q.INT8,),
        zero_stage=_SHARDED,
    ),
    Rule(
        "hyperparameters.zeroStage",
        "quantised weights under ZeRO are tested with QLoRA only; choose 0",
        tuning=(_T.IA3, *_SOFT),
        quantization=_QUANTIZED,
        zero_stage=_SHARDED,
    ),
    Rule(
        "hyperparameters.zeroStage",
        "a soft prompt starts from embeddings that stage 3 shards; choose 0 or 2",
        tuning=_SOFT,
        zero_stage=(3,),
    ),
    Rule(
        "hyperparameters.zeroStage",
        "3 shards the weights of which Full needs a second copy as the reference; choose 0 or 2, or tuning.type LoRA",
        objective=(_O.DPO, _O.KTO),
        tuning=(_T.FULL,),
        zero_stage=(3,),
    ),
    Rule(
        "hyperparameters.zeroStage",
        "DeepSpeed cannot follow IA3 through KTO's reference under stage 3; choose 0 or 2, or tuning.type LoRA",
        objective=(_O.KTO,),
        tuning=(_T.IA3,),
        zero_stage=(3,),
    ),
    # precision
    Rule(
        "hyperparameters.precision",
        "FP16 needs a GPU, on a CPU nothing scales its loss; choose BF16 or FP32 on a CPU pool",
        precision=(Precision.FP16,),
        on_cpu=True,
    ),
)


def refusing(cell: Cell) -> Rule | None:
    """The first rule that is against the cell; None where it works."""
    return next((rule for rule in RULES if rule.refuses(cell)), None)


def refusal(cell: Cell) -> str | None:
    """Why the cell is refused, with the spec path to change; None where it works."""
    found = refusing(cell)
    return found.message if found is not None else None


def cells(**fixed: object) -> Iterator[Cell]:
    """Every cell, those that are refused included; fixed: values of single dimensions, by their names."""
    dimensions: dict[str, tuple[object, ...]] = {
        "objective": tuple(ObjectiveType),
        "tuning": (*TuningType, None),
        "task": tuple(Task),
        "quantization": (None, *QuantizationType),
        "zero_stage": ZERO_STAGES,
        "precision": tuple(Precision),
        "on_cpu": (False, True),
    }
    dimensions.update({name: (value,) for name, value in fixed.items()})
    for values in product(*dimensions.values()):
        yield Cell(**dict(zip(dimensions, values, strict=True)))  # type: ignore[arg-type]
