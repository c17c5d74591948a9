"""Classes and tags of the records: what training cannot learn, and what a head that exists does not know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from finetune_api.failures import FinetuneError
from finetune_api.job import ObjectiveType, Task
from finetune_api.runfile import PreflightFile
from finetune_trainer.data.formats import Example

LABELLED = (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)
TEACHER = "objective.distillation.teacher.uri"
_SOURCES = "dataset.sources[0].uri"
_SHOWN = 8


@dataclass
class LabelsSeen:
    """The classes of the training records, counted, and where each class of held-out records was first seen.

    Of tags those that name an entity count, each as its type: PER of B-PER and I-PER. held_out: class → (spec path of
    the source, the record's place).
    """

    tags: bool
    training: Counter[str] = field(default_factory=Counter)
    held_out: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, example: Example, *, trains: bool) -> None:
        """Count the classes of one record."""
        names = {tag[2:] for tag in example.tags if tag != "O"} if self.tags else {example.label or ""}
        if trains:
            self.training.update(names)
            return
        for name in names:
            self.held_out.setdefault(name, (example.record.source, example.record.where))


def labelled(file: PreflightFile) -> bool:
    """Whether each record has a class or tags; a reward model compares texts instead."""
    return file.task in LABELLED and file.objective is not ObjectiveType.REWARD


def check_labels(file: PreflightFile, seen: LabelsSeen | None, heads: Mapping[str, tuple[str, ...]]) -> None:
    """Raises FinetuneError(DataInvalid or InvalidSpec) for classes that cannot be learnt, measured or compared.

    heads: the label names of the base, of an earlier adapter and of the teacher, by the spec path of their URI.
    """
    if seen is None or not seen.training:
        return
    known = heads.get("model.adapter.uri") or heads.get("model.uri") or ()
    if file.objective is ObjectiveType.EVALUATION:
        if known:  # without a head, or where the model cannot be read, the check of the model tells so
            _check_known(seen, known)
        return
    if not seen.tags and len(seen.training) == 1:
        only = next(iter(seen.training))
        raise _refused(
            f"Every training record has the label {only[:40]!r}, so there is nothing to tell apart. Add records of "
            "other labels.",
            _SOURCES,
        )
    continues = "model.adapter.uri" in heads
    for name, (source, where) in seen.held_out.items():
        if name not in seen.training and not (continues and name in types_of(known, seen.tags)):
            word = "entity" if seen.tags else "label"
            raise _refused(
                f"{where} has the {word} {name[:40]!r}, which no training record has; training has "
                f"{_some(sorted(seen.training))}. Correct it, or add training records of that {word}.",
                source,
            )
    if TEACHER in heads:
        _check_teacher(seen, known, heads[TEACHER])


def types_of(names: Sequence[str], tags: bool) -> set[str]:
    """The classes, or the types of entity, that label names stand for."""
    return {name[2:] for name in names if name != "O"} if tags else set(names)


def _check_known(seen: LabelsSeen, known: Sequence[str]) -> None:
    names = types_of(known, seen.tags)
    unknown = sorted(seen.training.keys() - names)
    if unknown and not (_nameless(known) and len(seen.training) <= len(known)):
        raise _refused(
            f"The records have the {'entity' if seen.tags else 'label'} {unknown[0][:40]!r}, which the model does not "
            f"know; it knows {_some(sorted(names)) or 'none by name'}. Write the names as the model does.",
            _SOURCES,
        )


def _check_teacher(seen: LabelsSeen, known: Sequence[str], teacher: Sequence[str]) -> None:
    found = seen.training.keys() | seen.held_out.keys()
    names = set(known) if found <= set(known) else found
    if _nameless(teacher) and len(teacher) == len(names):
        return
    if set(teacher) != names:
        raise FinetuneError(
            f"The teacher's classes are {_some(sorted(teacher)) or 'without names'}, but the data's labels are "
            f"{_some(sorted(names))}. Choose a teacher of the same task, or name the labels as the teacher does.",
            failure_class="InvalidSpec",
            field=f"spec.{TEACHER}",
        )


def _nameless(names: Sequence[str]) -> bool:
    return bool(names) and all(name == f"LABEL_{number}" for number, name in enumerate(names))


def _refused(message: str, source: str) -> FinetuneError:
    return FinetuneError(message, failure_class="DataInvalid", field=f"spec.{source}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:40] for name in names[:_SHOWN]) + more
