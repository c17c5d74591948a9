"""Each kind of item: encoded for its objective, kept on disk, and one of them shown with its mask at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.runfile import RunFile
from finetune_trainer.data import load_dataset
from tests.train.data.making import make_tokenizer, run_file, write_rows

REINFORCEMENT = {
    "rewards": [{"function": "ExactMatch", "weight": 1.0}],
    "beta": 0.1,
    "generations": 2,
    "maxNewTokens": 8,
    "temperature": 1.0,
    "clipRange": 0.2,
    "iterations": 1,
}
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
ASKED = {"prompt": "Why?", "completion": "So."}
CASES: list[tuple[str, str, str, list[dict[str, Any]], str, str]] = [
    ("Supervised", "CausalLM", "PromptCompletion", [ASKED], "EncodedExample", "User: Why?\nAssistant:⟦ So.</s>⟧"),
    (
        "DPO",
        "CausalLM",
        "Preference",
        [PAIR],
        "EncodedPair",
        "chosen: User: Why?\nAssistant:⟦ So.</s>⟧\nrejected: User: Why?\nAssistant:⟦ No.</s>⟧",
    ),
    (
        "Reward",
        "SequenceClassification",
        "Preference",
        [PAIR],
        "EncodedPair",
        "chosen: User: Why?\nAssistant:⟦ So.</s>⟧\nrejected: User: Why?\nAssistant:⟦ No.</s>⟧",
    ),
    (
        "KTO",
        "CausalLM",
        "Preference",
        [PAIR],
        "EncodedJudged",
        "desirable: User: Why?\nAssistant:⟦ So.</s>⟧",
    ),
    ("GRPO", "CausalLM", "PromptCompletion", [ASKED], "EncodedPrompt", "User: Why?\nAssistant:⟦So.⟧"),
    ("Supervised", "Seq2Seq", "PromptCompletion", [ASKED], "EncodedTarget", "So."),
    (
        "Supervised",
        "SequenceClassification",
        "Labels",
        [{"text": "Why?", "label": name} for name in ("b", "a")],
        "EncodedLabel",
        "Why? → ⟦b⟧",
    ),
    (
        "Supervised",
        "TokenClassification",
        "Tags",
        [{"tokens": ["Paris", "is"], "tags": ["B-LOC", "O"]}],
        "EncodedTags",
        "⟦B-LOC⟧",
    ),
]


@pytest.mark.parametrize(("objective", "task", "format", "rows", "kind", "shown"), CASES, ids=lambda v: str(v)[:14])
def test_one_sample_of_each_kind_is_shown_with_its_mask(
    tmp_path: Path, objective: str, task: str, format: str, rows: list[dict[str, Any]], kind: str, shown: str
) -> None:
    document = run_file(format=format).to_json()
    document["objective"] = {"type": objective} | ({"reinforcement": REINFORCEMENT} if objective == "GRPO" else {})
    document["model"]["task"] = task
    encoded = load_dataset(
        RunFile.from_json(document), write_rows(tmp_path, rows), make_tokenizer(), cache=tmp_path / "cache"
    )
    assert type(encoded.train[0]).__name__ == kind
    # How a target and a tag are written round their tokens is their encoders' own affair.
    exact = kind not in ("EncodedTarget", "EncodedTags")
    assert encoded.sample == shown if exact else shown in encoded.sample and "⟦" in encoded.sample
    assert encoded.train.lengths[0] >= 2  # type: ignore[attr-defined]
    if task == "SequenceClassification" and objective == "Supervised":
        assert encoded.labels == ("a", "b") and [item.label for item in encoded.train] == [1, 0]
    if kind == "EncodedTags":
        assert encoded.labels == ("O", "B-LOC", "I-LOC")
    if kind == "EncodedJudged":
        assert [item.desirable for item in encoded.train] == [1, 0]
