"""How to optimise: the settings that do not depend on the batch."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.job import (
    Attention,
    FineTuneJobSpec,
    Hyperparameters,
    MasterWeights,
    ObjectiveType,
    Optimizer,
    Precision,
    Schedule,
    Task,
    TuningType,
)
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.objective import PREFERENCES, REINFORCEMENTS
from finetune_api.planner.pretrain import draws_windows, joins_text
from finetune_api.planner.tuning import SOFT_PROMPTS
from finetune_api.preflight import ModelFacts
from finetune_api.runfile import RunEarlyStopping

LARGE = 10**9  # parameters from which a model is short of memory on most GPUs
NEVER_PACKED = frozenset({"bloom"})
"""Model types that no way of the trainer's packing keeps records apart in. Of any other the trainer finds out at start."""


@dataclass(frozen=True)
class Optimization:
    """Settings of the optimisation, as they go into RunHyperparameters, and the attention kernel."""

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
    packing: bool
    group_by_length: bool
    master_weights: MasterWeights
    neftune_alpha: float | None
    compile: bool
    liger: bool
    router_loss_weight: float | None
    early_stopping: RunEarlyStopping | None


def optimization(
    spec: FineTuneJobSpec, model: ModelFacts, ledger: Ledger, *, on_cpu: bool, zero_stage: int
) -> Optimization:
    """How to optimise the model."""
    hp = spec.hyperparameters or Hyperparameters()
    full = spec.tuning_type == TuningType.FULL
    paged = spec.tuning_type == TuningType.QLORA and zero_stage == 0
    path = "hyperparameters"
    rate, why = learning_rate(spec)
    pretrains = spec.objective_type == ObjectiveType.PRETRAIN
    return Optimization(
        learning_rate=ledger.pick(f"{path}.learningRate", hp.learning_rate, rate, why),
        schedule=ledger.pick(f"{path}.schedule", hp.schedule, Schedule.COSINE, "decays to zero at the end"),
        warmup_ratio=ledger.pick(f"{path}.warmupRatio", hp.warmup_ratio, 0.03, "a short rise avoids an early spike"),
        weight_decay=ledger.pick(
            f"{path}.weightDecay",
            hp.weight_decay,
            (0.1 if pretrains else 0.01) if full else 0.0,
            ("as in GPT-3" if pretrains else "mild regularisation") if full else "an adapter is small already",
        ),
        optimizer=ledger.pick(
            f"{path}.optimizer",
            hp.optimizer,
            Optimizer.PAGED_ADAMW_8BIT if paged else Optimizer.ADAMW,
            "as in the QLoRA paper" if paged else "the usual choice",
        ),
        precision=_precision(hp, ledger, on_cpu=on_cpu),
        attention=ledger.pick("model.attention", spec.model.attention, Attention.SDPA, "PyTorch's fused kernel"),
        max_grad_norm=ledger.pick(f"{path}.maxGradNorm", hp.max_grad_norm, 1.0, "the usual bound"),
        seed=ledger.pick(f"{path}.seed", hp.seed, 42, "fixed, so that a rerun repeats"),
        gradient_checkpointing=_checkpointing(spec, model, ledger, on_cpu=on_cpu),
        packing=_packing(spec, model.model_type, ledger),
        group_by_length=ledger.pick(f"{path}.groupByLength", hp.group_by_length, False, "the order stays random"),
        master_weights=ledger.pick(
            f"{path}.masterWeights", hp.master_weights, MasterWeights.FP32, "16-bit weights swallow small updates"
        ),
        neftune_alpha=ledger.keep(f"{path}.neftuneAlpha", hp.neftune_alpha),
        compile=ledger.pick(f"{path}.compile", hp.compile, False, "compiling pays in long runs only"),
        liger=ledger.pick(f"{path}.liger", hp.liger, False, "the model's own kernels are the reference"),
        router_loss_weight=ledger.keep(f"{path}.routerLossWeight", hp.router_loss_weight),
        early_stopping=_early_stopping(hp, ledger),
    )


def learning_rate(spec: FineTuneJobSpec) -> tuple[float, str]:
    """The usual peak learning rate of a method, and why."""
    tuning, objective = spec.tuning_type, spec.objective_type
    full = tuning == TuningType.FULL
    if tuning is None:
        return 0.0, "an evaluation changes nothing"
    if tuning in SOFT_PROMPTS:
        return 3e-2, "a soft prompt is small and starts far from its end"
    if tuning == TuningType.IA3:
        return 8e-3, "scales of single outputs move slowly"
    if objective in REINFORCEMENTS:
        return (1e-6 if full else 1e-5), "a policy that moves fast loses its rewards"
    if objective == ObjectiveType.ORPO:
        return (5e-6 if full else 5e-5), "between tuning on answers and on preferences"
    if objective in PREFERENCES:
        return (5e-7 if full else 5e-6), "preferences are learnt near the reference model"
    if objective == ObjectiveType.REWARD:
        return (1e-5 if full else 1e-4), "a new head on a model that must not forget"
    if objective == ObjectiveType.PRETRAIN:
        return 3e-4, "usual for a small model from random weights"
    if not full:
        return 2e-4, "usual for adapters"
    return _full_rate(spec.task, objective)


def _full_rate(task: Task, objective: ObjectiveType) -> tuple[float, str]:
    if task == Task.SEQUENCE_CLASSIFICATION:
        return 2e-5, "within the BERT paper's range, and every weight moves"
    if task in (Task.TOKEN_CLASSIFICATION, Task.MASKED_LM):
        return 5e-5, "the upper end of the BERT paper's range"
    if task == Task.SEQ2SEQ:
        return 1e-4, "usual for T5 with AdamW"
    if objective == ObjectiveType.DISTILLATION:
        return 5e-5, "a student is small"
    return 2e-5, "small, because every weight moves"


def _precision(hp: Hyperparameters, ledger: Ledger, *, on_cpu: bool) -> Precision:
    return ledger.pick(
        "hyperparameters.precision",
        hp.precision,
        Precision.FP32 if on_cpu else Precision.BF16,
        "exact on a CPU" if on_cpu else "fast on the pool's GPUs and needs no loss scaling",
    )


def _checkpointing(spec: FineTuneJobSpec, model: ModelFacts, ledger: Ledger, *, on_cpu: bool) -> bool:
    hp = spec.hyperparameters or Hyperparameters()
    if spec.tuning_type == TuningType.PREFIX_TUNING:
        chosen, why = False, "PrefixTuning passes keys and values that recomputation would lose"
    elif spec.tuning_type is None:
        chosen, why = False, "an evaluation has no backward pass"
    elif on_cpu:
        chosen, why = False, "memory is not short on a CPU"
    else:
        chosen, why = model.parameters >= LARGE, "saves memory on models of a billion parameters or more"
    return ledger.pick("hyperparameters.gradientCheckpointing", hp.gradient_checkpointing, chosen, why)


def _packing(spec: FineTuneJobSpec, model_type: str, ledger: Ledger) -> bool:
    hp, name = spec.hyperparameters or Hyperparameters(), "hyperparameters.packing"
    if hp.packing and spec.objective_type != ObjectiveType.PRETRAIN and model_type in NEVER_PACKED:
        ledger.state(name, False, f"off though asked for: packed records would see one another in a {model_type} model")
        return False
    chosen, why = False, "blocks are full already" if joins_text(spec) else "each record keeps a row of its own"
    if spec.objective_type == ObjectiveType.PRETRAIN:
        windows = draws_windows(spec)
        chosen, why = not windows, "windows are full already" if windows else "text is packed into full blocks"
    return ledger.pick(name, hp.packing, chosen, why)


def _early_stopping(hp: Hyperparameters, ledger: Ledger) -> RunEarlyStopping | None:
    given = hp.early_stopping
    if given is None:
        return None
    path = "hyperparameters.earlyStopping"
    return RunEarlyStopping(
        patience=ledger.pick(f"{path}.patience", given.patience, given.patience, ""),
        min_delta=ledger.pick(f"{path}.minDelta", given.min_delta, 0.0, "any improvement counts"),
    )
