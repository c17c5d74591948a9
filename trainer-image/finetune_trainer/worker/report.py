"""The report: where the artifact comes from, and what the tuning changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from finetune_api.runfile import RunFile
from finetune_trainer.data import Encoded, HeldOutPrompt
from finetune_trainer.worker.adapters import parameter_shares

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")
_METRICS = {
    "step": "step",
    "epoch": "epoch",
    "loss": "loss",
    "grad_norm": "gradNorm",
    "learning_rate": "learningRate",
    "eval_loss": "evalLoss",
}


@dataclass(frozen=True)
class Outcome:
    """What came out of a run.

    artifact: `adapter` or `model`. Losses are token-weighted means over the held-out records, None without any.
    history: one entry per logged step, over all attempts.
    """

    artifact: str
    base_eval_loss: float | None
    eval_loss: float | None
    answers: list[dict[str, str]]
    parameters: dict[str, Any]
    history: list[dict[str, Any]]
    step: int
    tokens: int
    train_seconds: float

    @classmethod
    def of(cls, engine: Any, eval_loss: float | None, prompts: list[HeldOutPrompt], tuned: list[str]) -> Outcome:
        """Collect from the engine after training."""
        carry = engine.supervision.carry
        shares = parameter_shares(engine.model)
        return cls(
            artifact="adapter" if hasattr(engine.model, "peft_config") else "model",
            base_eval_loss=carry.base_eval_loss,
            eval_loss=eval_loss,
            answers=[
                {"prompt": p.prompt, "reference": p.reference, "base": base, "tuned": answer}
                for p, base, answer in zip(prompts, carry.base_answers, tuned, strict=True)
            ],
            parameters=shares,
            history=[line for entry in engine.state.log_history if (line := metrics_line(entry))],
            step=engine.state.global_step,
            tokens=carry.tokens,
            train_seconds=carry.train_seconds,
        )


def metrics_line(entry: dict[str, Any]) -> dict[str, Any] | None:
    """One line of metrics.jsonl from an entry of the library's history; None if it holds neither loss.

    A figure that is not finite (a norm in a step that the FP16 scaler skipped) is left out.
    """
    if "loss" not in entry and "eval_loss" not in entry:
        return None
    return {name: entry[key] for key, name in _METRICS.items() if key in entry and math.isfinite(entry[key])}


def perplexity(loss: float | None) -> float | None:
    """exp(loss); None without a loss or beyond what a float holds."""
    return None if loss is None or loss > 700 else math.exp(loss)


def change_percent(before: float | None, after: float | None) -> float | None:
    """How much after differs from before, in percent of before; negative is smaller."""
    return None if before is None or after is None or before == 0 else (after - before) / before * 100


def build_report(run: RunFile, data: Encoded, outcome: Outcome) -> dict[str, Any]:
    """The content of report.json."""
    base_perplexity, tuned_perplexity = perplexity(outcome.base_eval_loss), perplexity(outcome.eval_loss)
    return {
        "version": 1,
        "job": run.job.to_json(),
        "artifact": outcome.artifact,
        "merged": run.output.merge_adapter and outcome.artifact == "adapter",
        "lineage": _lineage(run),
        "settings": run.settings,
        "objective": run.objective.to_json(),
        "tuning": run.tuning.to_json(),
        "hyperparameters": run.hyperparameters.to_json(),
        "data": data.stats.to_json(),
        "parameters": outcome.parameters,
        "training": {
            "steps": outcome.step,
            "globalBatchSize": run.global_batch_size,
            "processes": run.world_size,
            "tokens": outcome.tokens,
            "seconds": round(outcome.train_seconds, 1),
            "finalLoss": next((e["loss"] for e in reversed(outcome.history) if "loss" in e), None),
        },
        "evaluation": {
            "records": len(data.validation),
            "baseLoss": outcome.base_eval_loss,
            "loss": outcome.eval_loss,
            "lossChangePercent": change_percent(outcome.base_eval_loss, outcome.eval_loss),
            "basePerplexity": base_perplexity,
            "perplexity": tuned_perplexity,
            "perplexityChangePercent": change_percent(base_perplexity, tuned_perplexity),
        },
        "answers": outcome.answers,
    }


def _lineage(run: RunFile) -> dict[str, Any]:
    source = run.model.source
    return {
        "baseModel": source.uri,
        "baseModelRevision": source.revision,
        "baseModelDigest": run.model.digest,
        "datasets": [reference.uri for reference in run.dataset.sources],
        "validation": run.dataset.validation.uri if run.dataset.validation else None,
        "datasetDigest": run.dataset.digest,
        "runFileDigest": run.digest(),
        "libraries": {name: version(name) for name in _LIBRARIES},
    }
