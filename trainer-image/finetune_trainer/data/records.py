"""Records as they were read, the ones that cannot be used, and how faults are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api.failures import FinetuneError

SHOWN_BAD_ROWS = 20
_MAX_NAME = 60
_MAX_PROBLEM = 160


@dataclass(frozen=True, slots=True)
class Record:
    """One record. source: the spec path of its source's URI, such as `dataset.sources[0].uri`.

    row counts from 1: the line number in jsonl, csv and txt files, the record's position in json and parquet files.
    continues: its text goes on where that of the record before ended. unfinished: the next record's text continues it.
    """

    source: str
    file: str
    row: int
    fields: Mapping[str, Any]
    continues: bool = False
    unfinished: bool = False

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

    def check(self, usable: int, allowed: float = 0.0) -> None:
        """Raises FinetuneError(DataInvalid) that lists the bad records if they are more than are allowed.

        allowed: their largest share of all records (dataset.maxBadShare); at least one record must be usable.
        """
        records = self.total + usable
        if self.total <= allowed * records and (usable or not self.total):
            return
        rule = f"dataset.maxBadShare allows {allowed:.3g} of them" if allowed else "every one must be usable"
        rest = f"; and {self.total - len(self.shown)} more" if self.total > len(self.shown) else ""
        mends = list(dict.fromkeys(bad.mend for bad in self.shown))
        noun = "record" if records == 1 else "records"
        raise FinetuneError(
            f"{self.total} of {records} {noun} cannot be used, and {rule}. "
            f"{'; '.join(self.lines())}{rest}. {' '.join(mends[:3])}",
            failure_class="DataInvalid",
            field=f"spec.{self.shown[0].source}",
        )

    def lines(self) -> list[str]:
        """The records that are shown, each with where it is and what is wrong with it."""
        return [f"{bad.where}: {bad.problem[:_MAX_PROBLEM]}" for bad in self.shown]


def position(file: str, row: int) -> str:
    """Where a record is, for people."""
    name = file if len(file) <= _MAX_NAME else "…" + file[-_MAX_NAME:]
    if row == 0:
        return name
    word = {"json": "record", "parquet": "row"}.get(file.rsplit(".", 1)[-1].lower(), "line")
    return f"{name} {word} {row}"
