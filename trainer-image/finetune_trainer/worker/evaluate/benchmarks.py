"""Benchmarks through lm-evaluation-harness, on local records in the benchmark's own columns. Nothing is downloaded.

Prompts and scoring are the harness's own task definitions, without examples in the prompt; only where the records come
from is replaced. The library is imported when a run asks for a benchmark, and not before.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.failures import FinetuneError
from finetune_api.job import Benchmark
from finetune_api.metrics import BENCHMARK_METRICS
from finetune_api.runfile import RunFile
from finetune_trainer.data.readers import read_folder
from finetune_trainer.data.records import BadRecord, BadRows

_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class _Task:
    """definition: a file of lm_eval.tasks. columns: what each record needs. score: the harness's name of the metric."""

    definition: str
    columns: tuple[str, ...]
    score: str
    changes: Mapping[str, Any] = field(default_factory=dict)


# Scores as on the public leader boards: by length for ARC and HellaSwag, the share of the true answers for TruthfulQA.
_TASKS = {
    Benchmark.ARC_EASY: _Task("arc/arc_easy.yaml", ("question", "choices", "answerKey"), "acc_norm"),
    Benchmark.ARC_CHALLENGE: _Task("arc/arc_challenge.yaml", ("question", "choices", "answerKey"), "acc_norm"),
    Benchmark.HELLA_SWAG: _Task(
        "hellaswag/hellaswag.yaml", ("ctx_a", "ctx_b", "activity_label", "endings", "label"), "acc_norm"
    ),
    Benchmark.MMLU: _Task(
        "mmlu/default/_default_template_yaml",
        ("question", "subject", "choices", "answer"),
        "acc",
        {
            "task": "mmlu",
            "description": "The following are multiple choice questions (with answers) about "
            "{{subject|replace('_', ' ')}}.\n\n",
            "fewshot_split": None,
            "fewshot_config": None,
        },
    ),
    Benchmark.TRUTHFUL_QA: _Task("truthfulqa/truthfulqa_mc2.yaml", ("question", "mc2_targets"), "acc"),
}


def run_benchmarks(engine: Any, run: RunFile, tokenizer: Any) -> dict[str, float]:
    """The score of each benchmark by its name in finetune_api.metrics, from 0 to 1, of the model as it is now.

    Every rank calls it and scores every record: sharded weights need them all. A score that is not a number (answers so
    unlikely that their probabilities are 0) is left out. Raises DataInvalid.
    """
    if not run.evaluation.benchmarks:
        return {}
    inputs = engine.supervision.work.inputs
    tasks = {
        BENCHMARK_METRICS[wanted.name]: (
            _TASKS[wanted.name],
            benchmark_rows(inputs / "benchmarks" / str(number), wanted.name, number, wanted.max_records),
        )
        for number, wanted in enumerate(run.evaluation.benchmarks)
    }
    model = engine.model
    was_training = model.training
    model.eval()
    with engine.supervision.heartbeat.long_phase(), engine.accelerator.autocast():
        found = _score(engine, tokenizer, tasks, run)
    model.train(was_training)
    return found


def benchmark_rows(folder: Path, name: Benchmark, number: int, limit: int | None) -> list[dict[str, Any]]:
    """The first limit records of a benchmark, each with the columns that it needs. Raises DataInvalid."""
    source, needed = f"evaluation.benchmarks[{number}].source.uri", _TASKS[name].columns
    bad, rows = BadRows(), []
    for record in islice(read_folder(folder, source), limit):
        if isinstance(record, BadRecord):
            bad.add(record)
        elif missing := [column for column in needed if record.fields.get(column) is None]:
            bad.add(record.bad(f"{name} needs the column {missing[0]!r}", f"name the columns {', '.join(needed)}"))
        else:
            rows.append(_row(name, {column: record.fields[column] for column in needed}))
    bad.check(len(rows))
    if not rows:
        raise FinetuneError(
            f"{source} holds no record. Add records, or remove the benchmark.",
            failure_class="DataInvalid",
            field=f"spec.{source}",
        )
    return rows


def _row(name: Benchmark, fields: dict[str, Any]) -> dict[str, Any]:
    if name is Benchmark.MMLU and str(fields["answer"]).strip().upper() in _LETTERS:
        return {**fields, "answer": _LETTERS.index(str(fields["answer"]).strip().upper())}
    return {**fields, "answer": int(fields["answer"])} if name is Benchmark.MMLU else fields


def _score(
    engine: Any, tokenizer: Any, tasks: Mapping[str, tuple[_Task, Sequence[dict[str, Any]]]], run: RunFile
) -> dict[str, float]:
    for library in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Model(HFLM):
        """The model in hand; our soft prompts want their ids by name."""

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            engine.look_for_stop()
            return self.model(input_ids=inps).logits

    batch = run.hyperparameters.micro_batch_size
    harness = Model(pretrained=engine.model, tokenizer=tokenizer, backend="causal", batch_size=batch)
    with _own_randomness():
        results = lm_eval.simple_evaluate(
            model=harness,
            tasks=[_definition(name, task, rows) for name, (task, rows) in tasks.items()],
            num_fewshot=0,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_defaults=False),
            random_seed=run.hyperparameters.seed,
        )
    assert results is not None  # only ranks of the harness's own get none
    scores = {name: float(results["results"][name][f"{task.score},none"]) for name, (task, _) in tasks.items()}
    return {name: score for name, score in scores.items() if math.isfinite(score)}


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The harness seeds every global source of randomness: training goes on with its own as if nothing had been."""
    plain, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


def _definition(name: str, task: _Task, rows: Sequence[dict[str, Any]]) -> Any:
    """The harness's task with our records as its test split."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / task.definition) | dict(task.changes)
    splits = {"test": Dataset.from_list(list(rows))}
    ours = {
        "task": name,
        "tag": None,
        "custom_dataset": lambda **_: splits,
        "dataset_path": None,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "metadata": {},
    }
    return ConfigurableTask(config=config | ours)
