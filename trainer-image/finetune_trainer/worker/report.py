"""The report: where the artifact comes from, and what the tuning changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from finetune_api.guards import GuardState
from finetune_api.runfile import RunFile
from finetune_trainer.data import Encoded, HeldOutPrompt
from finetune_trainer.worker.card import model_id
from finetune_trainer.worker.evaluate.gate import Verdict, judge, unmet_message
from finetune_trainer.worker.evaluate.measuring import NOT_METRICS, Measurement, Measurer, evaluates_only, measured_on
from finetune_trainer.worker.features import Features
from finetune_trainer.worker.tuning import parameter_shares

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")
_LOGGED = {"grad_norm": "gradNorm", "learning_rate": "learningRate", "tokens_per_second": "tokensPerSecond"}
FLOPS_FORMULA = "(4 N + 2 T) D; N: all parameters, T: those that train, D: input tokens"
"""2 N D forward, 2 N D for the gradients of activations, 2 T D for those of weights: 6 N D where everything trains
(Kaplan et al. 2020, section 2.1). Not counted: attention's quadratic part, recomputation, teachers and generation."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a run.

    model_id: the result's name. artifact: `adapter`, `model`, or `report` where nothing was trained. history: one entry
    per logged step or evaluation, over all attempts. step: the last one made; kept_step: the one that the artifact has
    the weights of. guards: what they have changed on the way.
    """

    model_id: str
    artifact: str
    base: Measurement
    tuned: Measurement
    prompts: Sequence[HeldOutPrompt]
    records: int
    notes: Mapping[str, str]
    parameters: dict[str, Any]
    history: list[dict[str, Any]]
    step: int
    planned_steps: int
    kept_step: int
    stopped_early: bool
    tokens: int
    train_seconds: float
    verdicts: tuple[Verdict, ...]
    guards: GuardState

    @classmethod
    def of(cls, engine: Any, measurer: Measurer, base: Measurement, tuned: Measurement, kept_step: int) -> Outcome:
        """Collect from the engine after the last measurement."""
        carry, run = engine.supervision.carry, engine.objective.run
        artifact = "adapter" if hasattr(engine.model, "peft_config") else "model"
        return cls(
            model_id=model_id(run, carry.run_id),
            artifact="report" if evaluates_only(run) else artifact,
            base=base,
            tuned=tuned,
            prompts=measurer.prompts,
            records=len(measurer.items),
            notes=measurer.notes(engine),
            parameters=parameter_shares(engine.model),
            history=[line for entry in engine.state.log_history if (line := metrics_line(entry))],
            step=engine.state.global_step,
            planned_steps=engine.supervision.total_steps,
            kept_step=kept_step,
            stopped_early=carry.stopped_early,
            tokens=carry.tokens,
            train_seconds=carry.train_seconds,
            verdicts=judge(run.evaluation.require, tuned.metrics),
            guards=engine.supervision.guards,
        )

    @property
    def base_eval_loss(self) -> float | None:
        """The base's loss on what was measured on; None without any."""
        return self.base.metrics.get("loss")

    @property
    def eval_loss(self) -> float | None:
        """The tuned model's loss on what was measured on; None without any."""
        return self.tuned.metrics.get("loss")

    @property
    def unmet(self) -> str | None:
        """What the tuned model fails of evaluation.require, in words; None if it meets all of it."""
        return unmet_message(self.verdicts)


def metrics_line(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """One line of metrics.jsonl from an entry of the library's history; None if it holds neither loss.

    Names are camelCase; those of an evaluation begin with `eval`. A figure that is not finite (a norm in a step that
    the FP16 scaler skipped) is left out.
    """
    if "loss" not in entry and "eval_loss" not in entry:
        return None
    numbers = {key: value for key, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {_name(key): value for key, value in numbers.items() if key.removeprefix("eval_") not in NOT_METRICS}


def _name(key: str) -> str:
    if key.startswith("eval_"):
        name = key.removeprefix("eval_")
        return "eval" + name[0].upper() + name[1:]
    return _LOGGED.get(key, key)


def change_percent(before: float | None, after: float | None) -> float | None:
    """How much after differs from before, in percent of before; negative is smaller."""
    return None if before is None or after is None or before == 0 else (after - before) / abs(before) * 100


def build_report(run: RunFile, data: Encoded, outcome: Outcome, artifact_bytes: int) -> dict[str, Any]:
    """The content of report.json. artifact_bytes: the size of what was written beside the report."""
    return {
        "version": 1,
        "job": run.job.to_json(),
        "modelId": outcome.model_id,
        "artifact": outcome.artifact,
        "artifactBytes": artifact_bytes,
        "merged": run.output.merge_adapter and outcome.artifact == "adapter",
        "lineage": _lineage(run),
        "settings": run.settings,
        "task": run.model.task.value,
        "objective": run.objective.to_json(),
        "tuning": run.tuning.to_json(),
        "hyperparameters": run.hyperparameters.to_json(),
        "features": Features.of(run).to_json(),
        "data": data.stats.to_json(),
        "parameters": outcome.parameters,
        "training": None if evaluates_only(run) else _training(run, outcome),
        "guards": _guards(run, outcome.guards),
        "evaluation": _evaluation(data, outcome),
        "answers": [
            {"prompt": asked.prompt, "reference": asked.reference, "base": base, "tuned": tuned}
            for asked, base, tuned in zip(outcome.prompts, outcome.base.answers, outcome.tuned.answers, strict=False)
        ][:SHOWN_ANSWERS],
        "probes": [
            {"prompt": probe, "base": base, "tuned": tuned}
            for probe, base, tuned in zip(
                run.evaluation.probes, outcome.base.probes, outcome.tuned.probes, strict=False
            )
        ],
    }


SHOWN_ANSWERS = 8
"""Answers in the report; the rest is in predictions.jsonl."""


def _training(run: RunFile, outcome: Outcome) -> dict[str, Any]:
    parameters = outcome.parameters
    flops = (4 * parameters["total"] + 2 * parameters["trainable"]) * outcome.tokens
    seconds = outcome.train_seconds
    return {
        "steps": outcome.step,
        "plannedSteps": outcome.planned_steps,
        "stoppedEarly": outcome.stopped_early,
        "publishedStep": outcome.kept_step,
        "bestMetric": run.checkpoint.best_metric,
        "globalBatchSize": run.global_batch_size,
        "processes": run.world_size,
        "tokens": outcome.tokens,
        "seconds": round(seconds, 1),
        "tokensPerSecond": round(outcome.tokens / seconds, 1) if seconds > 0 else None,
        "finalLoss": next((e["loss"] for e in reversed(outcome.history) if "loss" in e), None),
        "flops": flops,
        "flopsFormula": FLOPS_FORMULA,
        "peakGpuMemoryGiB": peak_gpu_memory_gib(),
    }


def _guards(run: RunFile, guards: GuardState) -> dict[str, Any]:
    """What the guards have changed: micro batch and accumulation in force, and each rollback."""
    planned = run.hyperparameters
    micro_batch, accumulation = guards.split(planned.micro_batch_size, planned.gradient_accumulation)
    return {
        "microBatchSize": micro_batch,
        "gradientAccumulation": accumulation,
        "rollbacks": [rollback.to_json() for rollback in guards.rollbacks],
    }


def peak_gpu_memory_gib() -> float | None:
    """The most that this process had allocated on its GPU in this attempt, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def _evaluation(data: Encoded, outcome: Outcome) -> dict[str, Any]:
    base, tuned = outcome.base.metrics, outcome.tuned.metrics
    changes = {name: change_percent(base.get(name), value) for name, value in tuned.items()}
    return {
        "records": outcome.records,
        "on": measured_on(data) if outcome.records else None,
        "generated": len(outcome.tuned.answers),
        "base": base,
        "tuned": tuned,
        "changePercent": {name: value for name, value in changes.items() if value is not None},
        "notes": dict(outcome.notes),
        "requirements": [verdict.to_json() for verdict in outcome.verdicts],
        "unmet": outcome.unmet,
    }


def prediction_lines(outcome: Outcome) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl: of each record what was asked and what base and tuned model say.

    For models that decide: prompt, label, base, tuned, baseProbabilities, tunedProbabilities. For models that write:
    prompt, reference, base, tuned.
    """
    if outcome.tuned.predictions:
        pairs = zip(outcome.base.predictions, outcome.tuned.predictions, strict=True)
        return [_prediction(base, tuned) for base, tuned in pairs]
    return [
        {"prompt": asked.prompt, "reference": asked.reference, "base": base, "tuned": tuned, "origin": asked.origin}
        for asked, base, tuned in zip(outcome.prompts, outcome.base.answers, outcome.tuned.answers, strict=False)
    ]


def _prediction(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    said = {"base": base, "tuned": tuned}
    line = {key: value for key, value in tuned.items() if key in ("prompt", "label")}
    line |= {who: prediction["prediction"] for who, prediction in said.items() if "prediction" in prediction}
    others = [key for key in tuned if key not in ("prompt", "label", "prediction")]
    return line | {who + key[0].upper() + key[1:]: values[key] for key in others for who, values in said.items()}


def _lineage(run: RunFile) -> dict[str, Any]:
    source, adapter = run.model.source, run.model.adapter
    return {
        "baseModel": source.uri,
        "baseModelRevision": source.revision,
        "baseModelDigest": run.model.digest,
        "adapter": adapter.uri if adapter else None,
        "adapterDigest": run.model.adapter_digest,
        "datasets": [reference.uri for reference in run.dataset.sources],
        "validation": run.dataset.validation.uri if run.dataset.validation else None,
        "test": run.dataset.test.uri if run.dataset.test else None,
        "datasetDigest": run.dataset.digest,
        "runFileDigest": run.digest(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
