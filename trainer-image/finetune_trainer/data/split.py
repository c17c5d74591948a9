"""Which records are held out, and how sources are mixed: fixed by seed and content, not by the order of files."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import TypeVar

from finetune_api.digest import canonical_json
from finetune_api.failures import FinetuneError
from finetune_trainer.data.formats import Example

T = TypeVar("T")


def validation_rows(rows: int, fraction: float) -> int:
    """How many of rows are held out: the rounded share, at least 1, and never all."""
    return min(max(round(rows * fraction), 1), rows - 1)


def fingerprint(example: Example) -> bytes:
    """A hash of what the example says, wherever it was read."""
    return hashlib.sha256(canonical_json([[turn.role, turn.text] for turn in example.turns]).encode()).digest()


def choose_held_out(examples: Sequence[Example], fraction: float, seed: int) -> list[bool]:
    """For each example whether it is held out.

    Examples are ranked by a hash of seed and content. Equal examples stay on one side, so that nothing that is
    evaluated was trained on; a few more than the share may therefore be held out. Raises FinetuneError(DataInvalid)
    if there are not two different examples.
    """
    ranks = [hashlib.sha256(seed.to_bytes(8, "big") + fingerprint(example)).digest() for example in examples]
    different = sorted(set(ranks))
    if len(different) < 2:
        raise FinetuneError(
            f"dataset.validation.fraction needs at least 2 different records, but there are {len(different)}. "
            "Add records, or remove dataset.validation.",
            failure_class="DataInvalid",
            field="spec.dataset.validation",
        )
    counts = {rank: 0 for rank in different}
    for rank in ranks:
        counts[rank] += 1
    wanted, taken = validation_rows(len(examples), fraction), 0
    held_out: set[bytes] = set()
    for rank in different[:-1]:
        if taken >= wanted:
            break
        held_out.add(rank)
        taken += counts[rank]
    return [rank in held_out for rank in ranks]


def mix(sources: Sequence[Sequence[T]], weights: Sequence[float | None], seed: int) -> list[T]:
    """The records of all sources, each in its share: as they are where no source has a weight.

    With weights (an absent one counts as 1) a source has its share of as many records as there are in all: whole
    repetitions, and a part of it drawn by seed.
    """
    if all(weight is None for weight in weights):
        return [item for source in sources for item in source]
    shares = [1.0 if weight is None else weight for weight in weights]
    total, rows = sum(shares), sum(len(source) for source in sources)
    mixed: list[T] = []
    for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
        wanted = max(round(rows * share / total), 1) if source else 0
        repeats = math.floor(wanted / len(source)) if source else 0
        mixed += list(source) * repeats
        drawn = random.Random(f"{seed}:{number}").sample(  # noqa: S311  # a draw that anybody may repeat
            range(len(source)), wanted - repeats * len(source)
        )
        mixed += [source[k] for k in sorted(drawn)]
    return mixed
