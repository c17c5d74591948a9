"""One method as a case: a tiny model, rows, and the run. Golden curves and learning tests run every case."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.runfile import RunFile
from tests.train.worker.runs import Work, made_model, run_document

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Learning:
    """What a method learns on a task made for it.

    metric: a name below `evaluation.base` and `evaluation.tuned` of report.json. The base is worse than `base` and the
    tuned model reaches `tuned`; higher: whether larger is better. changes: as in Case, on top of the case's own.
    """

    metric: str
    base: float
    tuned: float
    higher: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] | None = None


@dataclass(frozen=True)
class Case:
    """One method.

    name: also of its golden file. model: arguments of tests.train.models.tiny_model. rows: of the one training source.
    changes: merged into the run document (tests.train.worker.runs.run_document), camelCase. folders: further inputs
    with rows, such as {"validation": rows}. models: further inputs with a model, such as {"teacher": {"seed": 1}}.
    """

    name: str
    model: Mapping[str, Any]
    rows: Sequence[Row]
    changes: Mapping[str, Any]
    folders: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    learning: Learning | None = None
    deterministic: bool = True
    """Whether another kind of machine gives nearly the same losses: not where the model writes what it trains on."""

    def work(self, root: Path, changes: Mapping[str, Any] | None = None, rows: Sequence[Row] | None = None) -> Work:
        """The case's work directory at root; changes on top of its own."""
        document = merged(merged(run_document(), self.changes), changes or {})
        work = Work.make(root, RunFile.from_json(document), made_model(**self.model), rows or self.rows)
        for name, further in self.folders.items():
            (root / "inputs" / name).mkdir(parents=True)
            text = "".join(json.dumps(row) + "\n" for row in further)
            (root / "inputs" / name / "rows.jsonl").write_text(text)
        for name, options in self.models.items():
            shutil.copytree(made_model(**options), root / "inputs" / name)
        return work


def merged(document: Any, changes: Any) -> Any:
    """document with changes put in: mappings are merged, anything else is replaced, None removes."""
    if not isinstance(document, Mapping) or not isinstance(changes, Mapping):
        return changes
    found = {**document}
    for key, value in changes.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(document.get(key), value)
    return found
