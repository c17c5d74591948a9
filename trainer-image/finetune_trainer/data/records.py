"""Records as they were read, the ones that cannot be used, and how faults are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.failures import FinetuneError

SHOWN_BAD_ROWS = 20
BAD_ROWS_ALLOWED = 0
"""How many unusable records a data set may have: a record that is dropped in silence is a record that is missing."""
_MAX_NAME = 60
_MAX_PROBLEM = 160


@dataclass(frozen=True, slots=True)
class Record:
    """One record. source: the spec path of its source's URI, such as `dataset.sources[0].uri`.

    row counts from 1: the line number in jsonl, csv and txt files, the record's position in json and parquet files.
    """

    source: str
    file: str
    row: int
    fields: Mapping[str, Any]

    @property
    def where(self) -> str:
        """For people: `train.jsonl line 12`."""
        return position(self.file, self.row)

    def bad(self, problem: str, mend: str) -> BadRecord:
        """This record as one that cannot be used."""
        return BadRecord(self.source, self.file, self.row, problem, mend)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used: what is wrong with it and how to mend it. row as in Record; 0 is the whole file."""

    source: str
    file: str
    row: int
    problem: str
    mend: str

    @property
    def where(self) -> str:
        """For people: `train.jsonl line 12`."""
        return position(self.file, self.row)


@dataclass
class BadRows:
    """All bad records of a data set: counted, the first ones kept to be shown."""

    total: int = 0
    shown: list[BadRecord] = field(default_factory=list)

    def add(self, bad: BadRecord) -> None:
        """Count one; keep it if it is among the first."""
        self.total += 1
        if len(self.shown) < SHOWN_BAD_ROWS:
            self.shown.append(bad)

    def check(self, usable: int) -> None:
        """Raises FinetuneError(DataInvalid) that lists the bad records if there are more than are allowed."""
        if self.total <= BAD_ROWS_ALLOWED:
            return
        rows = "; ".join(f"{bad.where}: {bad.problem[:_MAX_PROBLEM]}" for bad in self.shown)
        rest = f"; and {self.total - len(self.shown)} more" if self.total > len(self.shown) else ""
        mends = list(dict.fromkeys(bad.mend for bad in self.shown))
        noun = "record" if self.total + usable == 1 else "records"
        raise FinetuneError(
            f"{self.total} of {self.total + usable} {noun} cannot be used, and every one must be usable. "
            f"{rows}{rest}. {' '.join(mends[:3])}",
            failure_class="DataInvalid",
            field=f"spec.{self.shown[0].source}",
        )


def position(file: str, row: int) -> str:
    """Where a record is, for people."""
    name = file if len(file) <= _MAX_NAME else "…" + file[-_MAX_NAME:]
    if row == 0:
        return name
    word = {"json": "record", "parquet": "row"}.get(file.rsplit(".", 1)[-1].lower(), "line")
    return f"{name} {word} {row}"
