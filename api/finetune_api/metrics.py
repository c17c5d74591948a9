"""The names of all metrics: what each objective on each task can measure.

One source for the planner, which refuses an unknown name before a GPU is taken, for the report and for the docs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from finetune_api.enums import Benchmark, ObjectiveType, Task
from finetune_api.evaluation import Requirement
from finetune_api.failures import FinetuneError

LOSS = "loss"
"""What tells the best step where a job asks for no other metric."""
TEXT_METRICS = ("bleu", "rouge1", "rouge2", "rougeL", "exactMatch")
"""Of generated answers against the references: BLEU from 0 to 100, the others from 0 to 1."""
RETENTION_METRICS = ("retentionLoss", "retentionPerplexity")
"""On the general text of evaluation.retention."""
BENCHMARK_METRICS = {
    Benchmark.ARC_EASY: "arcEasy",
    Benchmark.ARC_CHALLENGE: "arcChallenge",
    Benchmark.HELLA_SWAG: "hellaSwag",
    Benchmark.MMLU: "mmlu",
    Benchmark.TRUTHFUL_QA: "truthfulQa",
}
"""The accuracy of each benchmark, from 0 to 1."""

_TOKENS = ("loss", "perplexity", "tokenAccuracy")
_TASKS: dict[Task, tuple[str, ...]] = {
    Task.CAUSAL_LM: _TOKENS,
    Task.SEQ2SEQ: _TOKENS,
    Task.MASKED_LM: _TOKENS,
    Task.SEQUENCE_CLASSIFICATION: ("loss", "accuracy", "f1", "precision", "recall"),
    Task.TOKEN_CLASSIFICATION: ("loss", "accuracy", "f1", "precision", "recall"),
}
_OBJECTIVES: dict[ObjectiveType, tuple[str, ...]] = {
    ObjectiveType.REWARD: ("loss", "accuracy", "rewardMargin"),
    ObjectiveType.DPO: ("loss", "rewardMargin", "rewardAccuracy"),
    ObjectiveType.ORPO: ("loss", "rewardMargin", "rewardAccuracy"),
    ObjectiveType.KTO: ("loss", "rewardMargin", "desirableReward", "undesirableReward"),
    ObjectiveType.PPO: ("loss", "reward"),
    ObjectiveType.GRPO: ("loss", "reward"),
}
_DISTILLATION = ("labelLoss", "divergence")
"""Beside those of the task: both parts of the loss, the divergence being the KL itself."""
_LOWER_IS_BETTER = (LOSS, "labelLoss", "divergence", "undesirableReward")
ANSWERED = (ObjectiveType.SUPERVISED, ObjectiveType.DISTILLATION, ObjectiveType.EVALUATION)
"""Objectives whose records say what the model should write, predict or find."""
WRITERS = (Task.CAUSAL_LM, Task.SEQ2SEQ)
"""Tasks whose models write text."""


def offered_metrics(
    objective: ObjectiveType, task: Task, *, retention: bool = False, benchmarks: Iterable[Benchmark] = ()
) -> tuple[str, ...]:
    """The names that evaluation.metrics and evaluation.require may hold for this job, in the report's order."""
    names = _OBJECTIVES.get(objective) or _TASKS[task]
    if objective is ObjectiveType.DISTILLATION:
        names += _DISTILLATION
    if objective in ANSWERED and task in WRITERS:
        names += TEXT_METRICS
    if retention:
        names += RETENTION_METRICS
    return (*names, *(BENCHMARK_METRICS[benchmark] for benchmark in benchmarks))


def step_metrics(objective: ObjectiveType, task: Task) -> tuple[str, ...]:
    """The names that checkpoint.bestMetric may have: what each evaluation of a run measures.

    Without perplexity, which orders steps as the loss does, and without what generates text.
    """
    return tuple(name for name in offered_metrics(objective, task) if name not in (*TEXT_METRICS, "perplexity"))


def cost(metric: str, value: float) -> float:
    """Lower, the better a step is by a metric of step_metrics."""
    return value if metric in _LOWER_IS_BETTER else -value


def check_best_metric(objective: ObjectiveType, task: Task, metric: str) -> None:
    """Raises InvalidSpec for a name that no evaluation of such a run measures."""
    offered = step_metrics(objective, task)
    if metric not in offered:
        raise FinetuneError(
            f"No step can be the best by {metric!r}. The evaluations of this job measure {', '.join(offered)}.",
            failure_class="InvalidSpec",
            field="spec.checkpoint.bestMetric",
        )


def check_metrics(offered: Sequence[str], metrics: Sequence[str], require: Sequence[Requirement]) -> None:
    """Raises InvalidSpec for a name that is not offered, or for a requirement without a bound or with an empty range."""
    asked = [(f"spec.evaluation.metrics[{k}]", name) for k, name in enumerate(metrics)]
    asked += [(f"spec.evaluation.require[{k}].metric", item.metric) for k, item in enumerate(require)]
    for field, name in asked:
        if name not in offered:
            raise FinetuneError(
                f"There is no metric {name!r} for this job. It can measure {', '.join(offered)}.",
                failure_class="InvalidSpec",
                field=field,
            )
    for number, item in enumerate(require):
        if (item.min is None and item.max is None) or (
            item.min is not None and item.max is not None and item.min > item.max
        ):
            raise FinetuneError(
                f"The requirement on {item.metric} needs min or max, and min may not be above max.",
                failure_class="InvalidSpec",
                field=f"spec.evaluation.require[{number}]",
            )
