"""Whether what a run asks of its evaluation can be measured; said before anything is loaded."""

from __future__ import annotations

from finetune_api.failures import FinetuneError
from finetune_api.job import Task
from finetune_api.metrics import check_best_metric, check_metrics, offered_metrics
from finetune_api.runfile import RunFile
from finetune_trainer.worker.evaluate.measuring import evaluates_only


def check_evaluation(run: RunFile) -> None:
    """Raises InvalidSpec for an unknown metric, and for a wish that needs held-out records where there are none."""
    wish, dataset = run.evaluation, run.dataset
    offered = offered_metrics(
        run.objective.type,
        run.model.task,
        retention=wish.retention is not None,
        benchmarks=[benchmark.name for benchmark in wish.benchmarks],
    )
    check_metrics(offered, wish.metrics, wish.require)
    if not evaluates_only(run):
        check_best_metric(run.objective.type, run.model.task, run.checkpoint.best_metric)
    validates = dataset.validation is not None or dataset.validation_fraction is not None
    tests = dataset.test is not None or dataset.test_fraction is not None
    if (wish.metrics or wish.require) and not (validates or tests or evaluates_only(run)):
        field = "spec.evaluation.metrics" if wish.metrics else "spec.evaluation.require"
        raise FinetuneError(
            "Metrics need records to be measured on. Set dataset.validation or dataset.test.",
            failure_class="InvalidSpec",
            field=field,
        )
    early = run.hyperparameters.early_stopping is not None
    if (early or run.checkpoint.keep_best > 0) and (not validates or (early and wish.every_steps is None)):
        raise FinetuneError(
            "The best step is told by evaluations. Set dataset.validation and evaluation.everySteps.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.earlyStopping" if early else "spec.checkpoint.keepBest",
        )
    general = "evaluation.benchmarks" if wish.benchmarks else "evaluation.retention" if wish.retention else None
    if general is not None and run.model.task is not Task.CAUSAL_LM:
        raise FinetuneError(
            f"{general} is measured of CausalLM models, not of {run.model.task} models. Remove it.",
            failure_class="InvalidSpec",
            field=f"spec.{general}",
        )
    if evaluates_only(run) and run.hyperparameters.zero_stage > 0:
        raise FinetuneError(
            "Objective Evaluation runs without ZeRO. Set hyperparameters.zeroStage to 0.",
            failure_class="InvalidSpec",
            field="spec.hyperparameters.zeroStage",
        )
