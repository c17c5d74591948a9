"""One measurement of a model: made of the untuned base before training, and of the tuned model after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType
from finetune_api.metrics import TEXT_METRICS
from finetune_api.runfile import RunFile
from finetune_trainer.data import Encoded
from finetune_trainer.worker.engine import reduce_sums
from finetune_trainer.worker.evaluate.benchmarks import run_benchmarks
from finetune_trainer.worker.evaluate.generation import Generator
from finetune_trainer.worker.evaluate.retention import retention_metrics

SHOWN_PROMPTS = 3
"""Answers that the report shows side by side, where no metric asks for more."""
MAX_PREDICTIONS = 1000
"""Held-out records whose predicted classes go into predictions.jsonl."""
_PREFIX = "eval_"
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What the library adds to each evaluation."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    metrics: by the names of finetune_api.metrics. answers: to the first held-out prompts. probes: answers to
    evaluation.probes. predictions: of the first held-out records, as Objective.predict gives them.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)


def logged_metrics(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of one evaluation, from what the library logged or returned for it."""
    return {
        name: float(value)
        for key, value in entry.items()
        if key.startswith(_PREFIX) and (name := key.removeprefix(_PREFIX)) not in NOT_METRICS
    }


class Measurer:
    """Measures the model that an engine holds, the same way each time."""

    def __init__(self, run: RunFile, data: Encoded, generator: Generator, tokenizer: Any) -> None:
        """data: what is measured on is its test set, else what is held out, else (Evaluation) all of it."""
        self._run = run
        self._data = data
        self._generator = generator
        self._tokenizer = tokenizer
        self.items: Sequence[Any] = data.test or data.validation or (data.train if evaluates_only(run) else ())
        asked = {*run.evaluation.metrics, *(item.metric for item in run.evaluation.require)}
        self._scores_text = bool(asked & set(TEXT_METRICS))
        shown = run.evaluation.max_generated if self._scores_text or evaluates_only(run) else SHOWN_PROMPTS
        self.prompts = data.held_out_prompts[:shown]

    def measure(self, engine: Any, known: Mapping[str, float] | None = None) -> Measurement:
        """Everything that the run asks for, of the model as it is now. Every rank calls it.

        known: metrics on the held-out records where they were measured at this step already. Raises NonFiniteLoss.
        """
        metrics = dict(known) if known and not self._data.test else self._metrics(engine)
        if engine.objective.likelihood and "loss" in metrics and (found := perplexity(metrics["loss"])) is not None:
            metrics["perplexity"] = found
        answers, probes = self._texts(engine)
        if self._scores_text and answers:
            # Imported where it is needed: its libraries take seconds.
            from finetune_trainer.worker.metrics import bleu, exact_match, rouge

            references = [prompt.reference for prompt in self.prompts]
            metrics |= {"bleu": bleu(answers, references), **rouge(answers, references)}
            metrics["exactMatch"] = exact_match(answers, references)
        metrics |= retention_metrics(engine, self._run, self._tokenizer)
        metrics |= run_benchmarks(engine, self._run, self._tokenizer)
        return Measurement(metrics, answers, probes, self._predictions(engine))

    def notes(self, engine: Any) -> dict[str, str]:
        """What the report says beside what was measured, by the name of a metric or of a setting."""
        writes = engine.objective.generates and (self.prompts or self._run.evaluation.probes)
        return engine.objective.metric_notes() | (self._generator.notes(engine.model) if writes else {})

    def _metrics(self, engine: Any) -> dict[str, float]:
        return measure_items(engine, self.items) if self.items else {}

    def _texts(self, engine: Any) -> tuple[list[str], list[str]]:
        if not engine.objective.generates:
            return [], []
        probes = [probe_ids(self._tokenizer, probe) for probe in self._run.evaluation.probes]
        return (
            self._generator.answers(engine, [prompt.prompt_ids for prompt in self.prompts]),
            self._generator.answers(engine, probes),
        )

    @torch.no_grad()
    def _predictions(self, engine: Any) -> list[dict[str, Any]]:
        """Every rank predicts every record: the same passes, so that sharded weights can be gathered."""
        objective, model, size = engine.objective, engine.model_wrapped, self._run.hyperparameters.micro_batch_size
        was_training = model.training
        model.eval()
        found: list[dict[str, Any]] = []
        count = min(len(self.items), MAX_PREDICTIONS)
        for start in range(0, count, size):
            engine.look_for_stop()
            part = [self.items[k] for k in range(start, min(start + size, count))]
            with engine.accelerator.autocast():
                rows = objective.predict(model, engine._prepare_inputs(objective.collate(part)))
            if not rows:
                break
            found += [{"prompt": self._text(item), **row} for item, row in zip(part, rows, strict=True)]
        model.train(was_training)
        return found

    def _text(self, item: Any) -> str:
        """What the record says, or of a pair of answers the preferred one."""
        ids = item.input_ids if hasattr(item, "input_ids") else item.chosen_ids
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def measure_items(engine: Any, items: Sequence[Any]) -> dict[str, float]:
    """The objective's metrics over items, over all ranks. Raises NonFiniteLoss."""
    split = replace(engine.split, accumulation=max(1, len(items)))
    means = reduce_sums(engine.measure(engine.loader(items, split, seed=None)), engine.args.device)
    if not math.isfinite(means["loss"]):
        raise FinetuneError(
            "The loss on the records of the evaluation is not finite. Look for broken records or weights.",
            failure_class="NonFiniteLoss",
        )
    return dict(engine.objective.metrics(means))


def measured_on(data: Encoded) -> str:
    """Which records a Measurer of data measures on: `test`, `validation` or `data`."""
    return "test" if data.test else "validation" if data.validation else "data"


def evaluates_only(run: RunFile) -> bool:
    """Whether the run trains nothing."""
    return run.objective.type is ObjectiveType.EVALUATION


def perplexity(loss: float | None) -> float | None:
    """exp(loss); None without a loss or beyond what a float holds."""
    return None if loss is None or loss > 700 else math.exp(loss)


def probe_ids(tokenizer: Any, text: str) -> Any:
    """What the model sees of a probe: a user's turn by the chat template where there is one, else the text alone."""
    import numpy as np

    if tokenizer.chat_template:
        shown = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return np.asarray(ids, dtype=np.int32)
