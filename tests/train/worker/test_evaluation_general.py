"""What is measured beside the run's own records: benchmarks, retention, and a job that only evaluates."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import Benchmark
from tests.train.methods.case import Case
from tests.train.worker.runs import NF4, Work, in_child, records

TEXTS = [{"text": "The capital of France is Paris. hello world"}, {"text": "What is the capital of Spain? Madrid."}]
QUESTIONS = [
    {
        "question": f"What colour is number {n}?",
        "choices": {"text": ["red", "blue blue", "green"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[n % 3],
    }
    for n in range(6)
]
ROWS: dict[Benchmark, list[dict[str, Any]]] = {
    Benchmark.ARC_EASY: QUESTIONS,
    Benchmark.ARC_CHALLENGE: QUESTIONS,
    Benchmark.HELLA_SWAG: [
        {
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "activity_label": "Sitting",
            "endings": ["stands up.", "flies [title] away.", "eats.", "is blue."],
            "label": str(n % 4),
        }
        for n in range(4)
    ],
    Benchmark.MMLU: [
        {"question": " Which? ", "subject": "high_school_physics", "choices": ["a", "b", "c", "d"], "answer": answer}
        for answer in (0, "B", 3)
    ],
    Benchmark.TRUTHFUL_QA: [
        {"question": "Is the sky blue?", "mc2_targets": {"choices": ["Yes.", "No.", "It is."], "labels": [1, 0, 1]}}
    ],
}
NAMES = {"ArcEasy": "arcEasy", "ArcChallenge": "arcChallenge", "HellaSwag": "hellaSwag", "MMLU": "mmlu"}
NAMES["TruthfulQA"] = "truthfulQa"


def general(root: Path, changes: dict[str, Any], **options: Any) -> Work:
    """A run of two steps with retention text and all benchmarks."""
    evaluation = {
        "retention": {"uri": "s3://b/general", "access": {}},
        "benchmarks": [
            {"name": name.value, "source": {"uri": f"s3://b/{name.value}", "access": {}}, "maxRecords": 3}
            for name in ROWS
        ],
    }
    folders = {f"benchmarks/{number}": rows for number, rows in enumerate(ROWS.values())}
    own = {"evaluation": evaluation, "hyperparameters": {"totalSteps": 2}}
    given = {"model": {"spread": 0.2}, "rows": records(), "folders": {"retention": TEXTS, **folders}, **options}
    return Case("general", changes={**own, **changes}, **given).work(root)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Work:
    work = general(tmp_path_factory.mktemp("general") / "w", {})
    assert work.train() == [0], work.logged()
    return work


def test_each_benchmark_is_scored_before_and_after_without_a_network(measured: Work) -> None:
    found = measured.read("artifact/report.json")["evaluation"]
    for name in NAMES.values():
        assert 0 <= found["base"][name] <= 1
        assert 0 <= found["tuned"][name] <= 1
        assert f"| {name} |" in (measured.root / "artifact/report.md").read_text()
    assert found["base"]["truthfulQa"] != found["tuned"]["truthfulQa"], "a share of probabilities moves with any step"


def test_a_benchmark_leaves_every_source_of_randomness_as_it_was() -> None:
    import random

    import numpy as np
    import torch

    from finetune_trainer.worker.evaluate.benchmarks import _own_randomness

    def states() -> tuple[object, list[int], list[int]]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    with _own_randomness():
        random.seed(1234)
        np.random.seed(1234)
        torch.manual_seed(1234)
    assert states() == before


def test_arc_is_scored_by_log_likelihood_for_each_character(measured: Work) -> None:
    """The harness's own score of the base, worked out again by plain torch on the first three records."""
    expected = in_child(_arc_by_hand, str(measured.root / "inputs/model"), QUESTIONS[:3])
    found = measured.read("artifact/report.json")["evaluation"]["base"]
    assert found["arcEasy"] == pytest.approx(expected)
    assert found["arcChallenge"] == pytest.approx(expected)


def _arc_by_hand(folder: str, rows: list[dict[str, Any]]) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]["text"]:
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            whole = tokenizer(f"Question: {row['question']}\nAnswer: {choice}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            total = sum(float(logs[k - 1, whole[k]]) for k in range(len(prompt), len(whole)))
            scores.append(total / len(choice))
        right += row["choices"]["label"][scores.index(max(scores))] == row["answerKey"]
    return right / len(rows)


def test_retention_is_the_mean_loss_of_a_token_of_the_text(measured: Work) -> None:
    found = measured.read("artifact/report.json")["evaluation"]
    expected = in_child(_loss_by_hand, str(measured.root / "inputs/model"), [row["text"] for row in TEXTS])
    assert found["base"]["retentionLoss"] == pytest.approx(expected, rel=1e-5)
    assert found["base"]["retentionPerplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert found["tuned"]["retentionLoss"] != found["base"]["retentionLoss"]


def _loss_by_hand(folder: str, texts: list[str]) -> float:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    losses: list[float] = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        losses += [-float(logs[k - 1, ids[0, k]]) for k in range(1, ids.shape[1])]
    return sum(losses) / len(losses)


def test_a_benchmark_record_without_its_columns_is_named(tmp_path: Path) -> None:
    work = general(tmp_path / "w", {})
    path = work.root / "inputs/benchmarks/2/rows.jsonl"
    path.write_text(path.read_text() + json.dumps({"ctx_a": "x", "label": 0}) + "\n")
    document = work.run.to_json()
    document["evaluation"]["benchmarks"][2].pop("maxRecords")
    work = Work(work.root, type(work.run).from_json(document))
    assert work.train() == [65], work.logged()
    error = work.read("state/error-0.json")
    assert "rows.jsonl line 5" in error["message"]
    assert "'ctx_b'" in error["message"]


def evaluating(root: Path, **options: Any) -> Work:
    changes = {
        "objective": {"type": "Evaluation"},
        "tuning": {"type": "Full", "lora": None},
        "dataset": {"validationFraction": None},
        "hyperparameters": {"totalSteps": 0, "learningRate": 0.0},
        "evaluation": {"maxGenerated": 3, "require": [{"metric": "loss", "max": 100.0}]},
        **options.pop("changes", {}),
    }
    return Case("evaluating", {"spread": 0.2}, records(), changes, **options).work(root)


def test_a_job_of_evaluation_trains_nothing_and_writes_a_report(tmp_path: Path) -> None:
    work = evaluating(tmp_path / "w")
    assert work.train() == [0], work.logged()
    report = work.read("artifact/report.json")
    found = report["evaluation"]
    assert (report["artifact"], report["training"]) == ("report", None)
    assert (found["on"], found["records"], found["generated"]) == ("data", 24, 3)
    assert found["base"] == found["tuned"]
    assert report["parameters"]["trainable"] >= 0
    names = {path.name for path in (work.root / "artifact").iterdir()}
    assert names == {"report.json", "report.md", "metrics.jsonl", "predictions.jsonl"}
    assert list((work.root / "checkpoints").glob("step-*")) == []
    assert len((work.root / "artifact/predictions.jsonl").read_text().splitlines()) == 3
    assert "Nothing was trained." in (work.root / "artifact/report.md").read_text()
    result = work.read("state/result.json")
    assert (result["artifact"], result["step"], result["unmet"]) == ("report", 0, None)
    assert result["evalLoss"] == found["tuned"]["loss"]


def test_a_job_of_evaluation_measures_a_base_and_the_adapter_on_it(tmp_path: Path) -> None:
    trained = Case("trained", {"spread": 0.2}, records(), {"hyperparameters": {"totalSteps": 6}}).work(tmp_path / "t")
    assert trained.train() == [0], trained.logged()
    adapter = {"source": trained.run.model.source.to_json(), "adapter": {"uri": "s3://b/adapter", "access": {}}}
    work = evaluating(tmp_path / "w", changes={"model": {**adapter, "adapterDigest": "sha256:a"}})

    shutil.copytree(trained.root / "artifact/adapter", work.root / "inputs/adapter")
    assert work.train() == [0], work.logged()
    found = work.read("artifact/report.json")["evaluation"]
    assert found["tuned"]["loss"] < found["base"]["loss"] - 0.1
    assert work.read("artifact/report.json")["lineage"]["adapterDigest"] == "sha256:a"


@pytest.mark.parametrize("tuning", ["IA3", "LoRA"])
def test_an_adapter_is_evaluated_in_bf16_on_a_quantised_base(tmp_path: Path, tuning: str) -> None:
    adapter = {"ia3": {}, "lora": None} if tuning == "IA3" else {}
    precise = {"hyperparameters": {"totalSteps": 2, "precision": "BF16"}}
    method = {"tuning": {"type": tuning, **adapter, "quantization": NF4 if tuning == "IA3" else None}}
    trained = Case("trained", {"spread": 0.2}, records(), {**precise, **method}).work(tmp_path / "t")
    assert trained.train() == [0], trained.logged()
    report = trained.read("artifact/report.json")
    work = evaluating(
        tmp_path / "w",
        changes={
            "model": {"adapter": {"uri": "s3://b/adapter", "access": {}}, "adapterDigest": "sha256:a"},
            "hyperparameters": {"totalSteps": 0, "learningRate": 0.0, "precision": "BF16"},
            "tuning": {"type": "Full", "lora": None, "quantization": method["tuning"]["quantization"]},
        },
    )
    shutil.copytree(trained.root / "artifact/adapter", work.root / "inputs/adapter")
    assert work.train() == [0], work.logged()
    assert report["evaluation"]["tuned"]["loss"] < report["evaluation"]["base"]["loss"]
    found = work.read("artifact/report.json")["evaluation"]
    assert found["tuned"]["loss"] < found["base"]["loss"]
