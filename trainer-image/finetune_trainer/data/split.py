"""Which records are held out, and how sources are mixed: fixed by seed and content, not by the order of files."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_api.digest import canonical_json
from finetune_api.failures import FinetuneError
from finetune_trainer.data.formats import Example

if TYPE_CHECKING:
    from array import array

    import numpy as np
    from numpy.typing import NDArray

TRAIN, VALIDATION, TEST = "train", "validation", "test"


def validation_rows(rows: int, fraction: float) -> int:
    """How many of rows are held out: the rounded share, at least 1, and never all."""
    return min(max(round(rows * fraction), 1), rows - 1)


def rank_of(example: Example, seed: int) -> int:
    """Where an example stands among all: 64 bits of a hash of seed and of what it says, wherever it was read.

    Of a judged completion its prompt counts only: all completions of one prompt, such as both of a pair that was taken
    apart, are on one side of a split.
    """
    said = [[turn.role, turn.text] for turn in example.turns]
    judged = example.label is not None and (example.chosen or example.rejected)
    if not judged:
        said += [["chosen", turn.text] for turn in example.chosen]
        said += [["rejected", turn.text] for turn in example.rejected]
        said += [["label", example.label]] if example.label is not None else []
        said += [list(pair) for pair in zip(example.words, example.tags, strict=False)]
    content = hashlib.sha256(canonical_json(said).encode()).digest()
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "big") + content).digest()[:8], "big")


@dataclass(frozen=True)
class HeldOut:
    """Which ranks are held out: those up to `validation`, and from there up to `test`."""

    validation: int = -1
    test: int = -1

    def part(self, rank: int) -> str:
        """The part that an example of this rank belongs to."""
        if rank <= self.validation:
            return VALIDATION
        return TEST if rank <= self.test else TRAIN


def choose_held_out(ranks: array[int], validation: float | None, test: float | None) -> HeldOut:
    """Which examples are held out, from the ranks of all of them (64 bits each).

    Equal examples have one rank and stay on one side, so that nothing that is evaluated was trained on; a few more
    than the share may therefore be held out. Raises FinetuneError(DataInvalid) if there are too few different examples.
    """
    import numpy as np  # the light image does not split

    different, counts = np.unique(np.frombuffer(ranks, np.uint64), return_counts=True)
    last, taken_groups = -1, 0
    borders: dict[str, int] = {}
    for part, fraction, left in ((VALIDATION, validation, 1 + (test is not None)), (TEST, test, 1)):
        if fraction is not None:
            room = len(different) - left - taken_groups
            if room < 1:
                raise _too_few(part, len(different), left + taken_groups + 1)
            sums = np.cumsum(counts[taken_groups : taken_groups + room])
            wanted = validation_rows(len(ranks), fraction)
            taken_groups += min(int(np.searchsorted(sums, wanted)) + 1, room)
            last = int(different[taken_groups - 1])
        borders[part] = last
    return HeldOut(borders[VALIDATION], borders[TEST])


def _too_few(part: str, different: int, needed: int) -> FinetuneError:
    return FinetuneError(
        f"dataset.{part}.fraction needs at least {needed} different records, but there are {different}. "
        f"Add records, or remove dataset.{part}.",
        failure_class="DataInvalid",
        field=f"spec.dataset.{part}",
    )


def mix(counts: Sequence[int], weights: Sequence[float | None], seed: int) -> NDArray[np.int64] | None:
    """The rows of all sources, each source in its share, counted through the sources one after another: int64.

    None, which means every row once, where no source has a weight. With weights (an absent one counts as 1) a source
    has its share of as many records as there are in all: whole repetitions, and a part of it drawn by seed.
    """
    if all(weight is None for weight in weights):
        return None
    import numpy as np  # the light image does not mix

    shares = [1.0 if weight is None else weight for weight in weights]
    total, rows = sum(shares), sum(counts)
    mixed: list[NDArray[np.int64]] = []
    start = 0
    for number, (count, share) in enumerate(zip(counts, shares, strict=True)):
        wanted = max(round(rows * share / total), 1) if count else 0
        repeats = math.floor(wanted / count) if count else 0
        drawn = random.Random(f"{seed}:{number}").sample(  # noqa: S311  # a draw that anybody may repeat
            range(count), wanted - repeats * count
        )
        mixed += [np.arange(start, start + count, dtype=np.int64)] * repeats
        mixed.append(np.array(sorted(drawn), np.int64) + start)
        start += count
    return np.concatenate(mixed)
