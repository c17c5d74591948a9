"""Jobs whose places are folders of this machine: as real as S3 for what preflight reads, and much quicker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_api.runfile import PreflightFile
from finetune_api.status import Finding, Preflight
from finetune_trainer.preflight import run_preflight
from tests.train.sources.making import model_files, write_files

ASKED = [{"prompt": f"Question {number}?", "completion": f" Answer {number}."} for number in range(30)]
LABELLED = [{"text": f"text {number}", "label": "yes" if number % 2 else "no"} for number in range(30)]
TAGGED = [{"tokens": ["Ann", "lives"], "tags": ["B-PER", "O"]}, {"tokens": ["in", "Rome"], "tags": ["O", "B-LOC"]}] * 15


def classifier(labels: Sequence[str], *, family: str = "bert", kind: str = "Sequence") -> dict[str, bytes]:
    """The files of a classifier with a head for labels."""
    names = {"bert": "Bert", "llama": "Llama"}
    config = {
        "model_type": family,
        "architectures": [f"{names[family]}For{kind}Classification"],
        "id2label": {str(number): label for number, label in enumerate(labels)},
    }
    return model_files(config=config)


class Folder:
    """One job below a folder. model, data, …: what `put` was given under that name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.put_model("model", model_files())
        self.put("train", ASKED)

    def uri(self, name: str) -> str:
        return (self.root / name).as_uri()

    def put_model(self, name: str, files: Mapping[str, bytes]) -> str:
        write_files(self.root / name, files)
        return self.uri(name)

    def put(self, name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        path = self.root / name / "rows.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.uri(name)

    def file(self, further: Mapping[str, str] | None = None, **changes: Any) -> PreflightFile:
        """further: spec path → `Kind name` or `Data name Benchmark`; other arguments replace fields."""
        inputs = []
        for field, place in (further or {}).items():
            kind, name, *benchmark = place.split()
            reference = {"uri": self.uri(name), "access": {}}
            inputs.append(
                {"kind": kind, "field": field, "reference": reference, "benchmark": next(iter(benchmark), None)}
            )
        document = {
            "job": {"name": "faq", "namespace": "team-a", "uid": "u1"},
            "specDigest": "sha256:spec",
            "task": "CausalLM",
            "tuning": "LoRA",
            "onExisting": "Fail",
            "promptTemplate": None,
            "model": {"uri": self.uri("model"), "access": {}},
            "sources": [{"uri": self.uri("train"), "access": {}}],
            "output": {"uri": self.uri("out"), "access": {}},
            "further": inputs,
            "local": True,
        }
        held_out = changes.pop("validation", None)
        if held_out is not None:
            document["validation"] = {"uri": self.uri(held_out), "access": {}}
        return PreflightFile.from_json(document | changes)

    def check(self, further: Mapping[str, str] | None = None, **changes: Any) -> Preflight:
        """What preflight finds."""
        return run_preflight(self.file(further, **changes), {})


def faults(result: Preflight) -> list[Finding]:
    """What stands in the way."""
    return [item for item in result.findings if item.failure_class != "Info"]


def told(result: Preflight) -> list[tuple[str, str | None]]:
    """(class, field) of each."""
    return [(item.failure_class, item.field) for item in faults(result)]


def remarks(result: Preflight) -> str:
    """All remarks."""
    return "\n".join(item.message for item in result.findings if item.failure_class == "Info")
