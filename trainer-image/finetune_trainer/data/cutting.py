"""What is said of a record that is too long to be used whole, where a task has one text and one limit."""

from __future__ import annotations

from finetune_trainer.data.records import BadRecord, Record


def too_long(record: Record, tokens: int, limit: int, *, field: str, what: str = "") -> BadRecord:
    """record as one that truncation Error refuses. what: the part that is too long, such as `the target has `."""
    return record.bad(
        f"{what}{tokens} tokens, more than {field} {limit}",
        f"Raise {field}, shorten the records, or set dataset.truncation to Tail.",
    )
