"""Resolved settings: every value that the run uses, and why.

`Ledger.pick` records each choice with its reason; the same records become status.plan.settings, the report and the
lines that the trainer prints at its start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune_api.job import (
    Attention,
    ComputeType,
    FineTuneJobSpec,
    Generation,
    Hyperparameters,
    LoraBias,
    LoraVariant,
    LossOn,
    OnExisting,
    Optimizer,
    Precision,
    QuantizationType,
    Schedule,
    Truncation,
    TuningType,
)
from finetune_api.runfile import RunCheckpoint, RunEvaluation, RunLora, RunQuantization, RunTuning
from finetune_api.status import DataFacts, Setting

T = TypeVar("T")

SET_BY_JOB = "set by the job"
LONGEST_DEFAULT_SEQUENCE = 2048
DEFAULT_GLOBAL_BATCH = 16
SMALLEST_SPLIT_ROWS = 20  # below this a held-out tenth says nothing


@dataclass
class Ledger:
    """Collects the resolved settings with their reasons."""

    settings: list[Setting] = field(default_factory=list)

    def pick(self, name: str, given: T | None, chosen: T, reason: str) -> T:
        """The given value if there is one, else the chosen one; either is recorded."""
        value = chosen if given is None else given
        shown: Any = value.value if hasattr(value, "value") else value
        self.settings.append(Setting(name=name, value=shown, reason=SET_BY_JOB if given is not None else reason))
        return value


def tuning(spec: FineTuneJobSpec, ledger: Ledger) -> RunTuning:
    """The method's settings. LoRA's defaults follow Hu et al. 2021 and Dettmers et al. 2023."""
    kind = spec.tuning.type
    if kind == TuningType.FULL:
        return RunTuning(type=kind)
    given = spec.tuning.lora
    path = "tuning.lora"
    rank: int = ledger.pick(f"{path}.rank", given.rank if given else None, 16, "a common rank for adapting to one task")
    lora = RunLora(
        rank=rank,
        alpha=ledger.pick(f"{path}.alpha", given and given.alpha, 2.0 * rank, "twice the rank"),
        dropout=ledger.pick(f"{path}.dropout", given and given.dropout, 0.05, "the QLoRA paper's choice"),
        target_modules=ledger.pick(
            f"{path}.targetModules",
            given and given.target_modules,
            ["all-linear"],
            "every linear layer but the head, as in the QLoRA paper",
        ),
        bias=ledger.pick(f"{path}.bias", given and given.bias, LoraBias.NONE, "biases stay fixed"),
        modules_to_save=given.modules_to_save if given else None,
        variant=ledger.pick(f"{path}.variant", given and given.variant, LoraVariant.STANDARD, "the plain form"),
    )
    return RunTuning(
        type=kind, lora=lora, quantization=_quantization(spec, ledger) if kind == TuningType.QLORA else None
    )


def _quantization(spec: FineTuneJobSpec, ledger: Ledger) -> RunQuantization:
    given = spec.tuning.quantization
    path = "tuning.quantization"
    why = "as in the QLoRA paper"
    return RunQuantization(
        bits=ledger.pick(f"{path}.bits", given and given.bits, 4, why),
        type=ledger.pick(f"{path}.type", given and given.type, QuantizationType.NF4, why),
        double_quant=ledger.pick(f"{path}.doubleQuant", given and given.double_quant, True, why),
        compute_type=ledger.pick(f"{path}.computeType", given and given.compute_type, ComputeType.BF16, why),
    )


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimisation that do not depend on the batch."""

    learning_rate: float
    schedule: Schedule
    warmup_ratio: float
    weight_decay: float
    optimizer: Optimizer
    precision: Precision
    attention: Attention
    max_grad_norm: float
    seed: int
    gradient_checkpointing: bool


def optimization(
    spec: FineTuneJobSpec, parameters: int, ledger: Ledger, *, on_cpu: bool, zero_stage: int
) -> Optimization:
    """How to optimise a model of that many parameters."""
    hp = spec.hyperparameters or Hyperparameters()
    full = spec.tuning.type == TuningType.FULL
    paged = spec.tuning.type == TuningType.QLORA and zero_stage == 0
    path = "hyperparameters"
    return Optimization(
        learning_rate=ledger.pick(
            f"{path}.learningRate",
            hp.learning_rate,
            2e-5 if full else 2e-4,
            "small, because every weight moves" if full else "usual for adapters",
        ),
        schedule=ledger.pick(f"{path}.schedule", hp.schedule, Schedule.COSINE, "decays to zero at the end"),
        warmup_ratio=ledger.pick(f"{path}.warmupRatio", hp.warmup_ratio, 0.03, "a short rise avoids an early spike"),
        weight_decay=ledger.pick(
            f"{path}.weightDecay",
            hp.weight_decay,
            0.01 if full else 0.0,
            "mild regularisation" if full else "an adapter is small already",
        ),
        optimizer=ledger.pick(
            f"{path}.optimizer",
            hp.optimizer,
            Optimizer.PAGED_ADAMW_8BIT if paged else Optimizer.ADAMW,
            "as in the QLoRA paper" if paged else "the usual choice",
        ),
        precision=ledger.pick(
            f"{path}.precision",
            hp.precision,
            Precision.FP32 if on_cpu else Precision.BF16,
            "exact on a CPU" if on_cpu else "fast on the pool's GPUs and needs no loss scaling",
        ),
        attention=ledger.pick("model.attention", spec.model.attention, Attention.SDPA, "PyTorch's fused kernel"),
        max_grad_norm=ledger.pick(f"{path}.maxGradNorm", hp.max_grad_norm, 1.0, "the usual bound"),
        seed=ledger.pick(f"{path}.seed", hp.seed, 42, "fixed, so that a rerun repeats"),
        gradient_checkpointing=ledger.pick(
            f"{path}.gradientCheckpointing",
            hp.gradient_checkpointing,
            not on_cpu and parameters >= 10**9,
            "saves memory on models of a billion parameters or more" if not on_cpu else "memory is not short on a CPU",
        ),
    )


def sequence_length(spec: FineTuneJobSpec, data: DataFacts, max_positions: int | None, ledger: Ledger) -> int:
    """Longest sequence in tokens: the longest record, within the model's and our own bound."""
    hp = spec.hyperparameters or Hyperparameters()
    bound = min(LONGEST_DEFAULT_SEQUENCE, max_positions or LONGEST_DEFAULT_SEQUENCE)
    longest = max(8, -(-data.longest_tokens // 8) * 8)
    if longest <= bound:
        reason = f"the longest record has about {data.longest_tokens} tokens"
    else:
        reason = f"the longest record has about {data.longest_tokens} tokens, the default bound is {bound}"
    return ledger.pick("hyperparameters.maxSequenceLength", hp.max_sequence_length, min(longest, bound), reason)


def loss_on(spec: FineTuneJobSpec, data: DataFacts, ledger: Ledger) -> LossOn:
    """Completion where a record has one."""
    plain = data.format == "Text"
    return ledger.pick(
        "dataset.lossOn",
        spec.dataset.loss_on,
        LossOn.ALL if plain else LossOn.COMPLETION,
        "plain text has no completion" if plain else "the model learns to answer, not to ask",
    )


def truncation(spec: FineTuneJobSpec, ledger: Ledger) -> Truncation:
    """What happens to a record that is too long."""
    return ledger.pick(
        "dataset.truncation",
        spec.dataset.truncation,
        Truncation.TAIL,
        "the end of a record that is too long is cut and counted",
    )


def validation_fraction(spec: FineTuneJobSpec, rows: int, ledger: Ledger) -> float | None:
    """The share held out; None where the job brings its own records or there are too few."""
    held_out = spec.dataset.validation
    if held_out is not None and held_out.source is not None:
        return None
    if held_out is None and rows < SMALLEST_SPLIT_ROWS:
        ledger.settings.append(
            Setting(name="dataset.validation", value=None, reason=f"{rows} records are too few to hold some out")
        )
        return None
    return ledger.pick(
        "dataset.validation.fraction",
        held_out.fraction if held_out else None,
        0.1,
        "a tenth is held out to measure the result",
    )


def held_out_rows(rows: int, fraction: float) -> int:
    """How many of rows the trainer's split holds out: the rounded share, at least 1, and never all.

    Equal records stay on one side of the split, so a few more may be held out.
    """
    return min(max(round(rows * fraction), 1), rows - 1)


def evaluation(spec: FineTuneJobSpec, total_steps: int, has_validation: bool, ledger: Ledger) -> RunEvaluation:
    """When and how to evaluate."""
    given = spec.evaluation
    generation = given.generation if given and given.generation else Generation()
    every = None
    if has_validation:
        every = ledger.pick(
            "evaluation.everySteps", given and given.every_steps, max(1, total_steps // 5), "five times in the run"
        )
    resolved = generation.model_copy(
        update={
            "max_new_tokens": ledger.pick(
                "evaluation.generation.maxNewTokens", generation.max_new_tokens, 64, "enough to read an answer"
            ),
            "do_sample": ledger.pick(
                "evaluation.generation.doSample", generation.do_sample, False, "greedy answers repeat"
            ),
        }
    )
    return RunEvaluation(every_steps=every, generation=resolved)


def checkpoint(spec: FineTuneJobSpec, ledger: Ledger) -> RunCheckpoint:
    """When to save."""
    given = spec.checkpoint
    every_steps = given.every_steps if given else None
    every_minutes = given.every_minutes if given else None
    if every_steps is None or every_minutes is not None:
        every_minutes = ledger.pick("checkpoint.everyMinutes", every_minutes, 10.0, "at most ten minutes are lost")
    if every_steps is not None:
        ledger.pick("checkpoint.everySteps", every_steps, every_steps, "")
    return RunCheckpoint(
        every_minutes=every_minutes,
        every_steps=every_steps,
        keep_last=ledger.pick("checkpoint.keepLast", given and given.keep_last, 2, "the newest and one before it"),
    )


def on_existing(spec: FineTuneJobSpec, ledger: Ledger) -> OnExisting:
    """What to do where the output is taken."""
    return ledger.pick("output.onExisting", spec.output.on_existing, OnExisting.FAIL, "nothing is overwritten")
