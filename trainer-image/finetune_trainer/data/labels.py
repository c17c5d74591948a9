"""Texts with a class each: the names of the classes, and records as tokens for SequenceClassification."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.failures import FinetuneError
from finetune_api.job import Task, Truncation
from finetune_trainer.data.cutting import too_long
from finetune_trainer.data.encode import Encoding, as_array
from finetune_trainer.data.formats import Example
from finetune_trainer.data.kinds import EncodedLabel
from finetune_trainer.data.records import BadRecord
from finetune_trainer.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from finetune_trainer.data.encoders import EncodingRules

BIO = re.compile(r"O|[BI]-\S+")
"""A tag: outside, or the beginning or inside of an entity of a type."""


def label_names(task: Task, examples: Iterable[Example], base: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of the classes or tags of a data set, in the order of their numbers; the same in every attempt.

    They are those of the base's head where it knows all that the data has. Else they are sorted, whole numbers by
    value; for tags, O comes first and then B-X and I-X of each type X, both of them even if the data has one only.
    examples: of training and of everything held out. base: names that the base's config has, in their order.
    Raises DataInvalid for fewer than two.
    """
    tags = task is Task.TOKEN_CLASSIFICATION
    found: set[str] = set()
    for example in examples:
        if tags:
            found.update(tag for tag in example.tags if BIO.fullmatch(tag))
        elif example.label is not None:
            found.add(example.label)
    if found and found <= set(base) and len(base) > 1:
        return tuple(base)
    if tags:
        types = sorted({tag[2:] for tag in found if tag != "O"})
        names = ("O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI"))
    else:
        numbers = all(re.fullmatch(r"-?\d+", name) for name in found)
        order: Callable[[str], tuple[int, str]] = lambda name: (int(name) if numbers else 0, name)  # noqa: E731
        names = tuple(sorted(found, key=order))
    if len(names) < 2:
        what = "no tag but O" if tags else f"one label only ({names[0]!r})" if names else "no label"
        raise FinetuneError(
            f"The data has {what}, so there is nothing to tell apart. Add records of other "
            f"{'entities' if tags else 'labels'}.",
            failure_class="DataInvalid",
            field="spec.dataset.sources[0].uri",
        )
    return names


def base_labels(*folders: Path) -> tuple[str, ...]:
    """The label names in the first config.json of folders that has any; () if none has."""
    for folder in folders:
        try:
            named = json.loads((folder / "config.json").read_text())["id2label"]
            return tuple(str(named[key]) for key in sorted(named, key=int))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ()


class LabelEncoder:
    """Encodes texts with one label each, exactly as the model's own tokenizer does, special tokens included."""

    def __init__(self, tokenizer: TextTokenizer, rules: EncodingRules) -> None:
        """rules.labels: the names of the classes."""
        self.tokenizer = tokenizer
        self._limit = rules.max_length
        self._error = rules.truncation is Truncation.ERROR
        self._numbers = {name: number for number, name in enumerate(rules.labels)}

    def encode(self, example: Example) -> Encoding | BadRecord | None:
        """An EncodedLabel; a BadRecord for an unknown label, an empty text, or one that truncation Error refuses."""
        number = self._numbers.get(example.label or "")
        if number is None or example.label is None:
            known = ", ".join(list(self._numbers)[:12])
            return example.record.bad(f"the label {example.label!r} is not one of {known}", "Correct the label.")
        ids, _ = self.tokenizer.encode("".join(turn.text for turn in example.turns))
        if not ids:
            return example.record.bad("the text has no token", "Give it a text.")
        whole = self.tokenizer.framed(ids, len(ids) + len(self.tokenizer.prefix) + len(self.tokenizer.suffix))
        if len(whole) > self._limit and self._error:
            return too_long(example.record, len(whole), self._limit, field="hyperparameters.maxSequenceLength")
        kept = self.tokenizer.framed(ids, self._limit)
        return Encoding(EncodedLabel(as_array(kept), number), len(whole), len(kept), len(kept), example.label)

    def show(self, item: EncodedLabel) -> str:
        """The text and its label: `… → ⟦label⟧`."""
        names = {number: name for name, number in self._numbers.items()}
        return f"{self.tokenizer.decode(item.input_ids.tolist())} → ⟦{names[item.label]}⟧"
