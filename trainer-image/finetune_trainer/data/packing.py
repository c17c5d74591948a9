"""Several records in one training sequence: which go together, and the sequences as they are read.

Best fit, longest first: each record goes to the sequence that it leaves the least room in. It has first fit's bound
(at most 11/9 of the best possible number of sequences, and one more; Johnson 1974), and finds its place in one step
however many sequences are open.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.encode import IGNORED
from finetune_trainer.data.kinds import EncodedPacked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Isolation(StrEnum):
    """How a model keeps the records of a sequence apart."""

    POSITIONS = "Positions"
    """No mask: positions that begin again at 0 tell where a record begins."""
    ONE_ROW = "OneRow"
    """As Positions, with all sequences of a batch in one row: kernels that know of one row only."""
    FLOAT_MASK = "FloatMask"
    """A mask [batch, 1, length, length] that is added to the scores of attention."""


class Packed(Sequence[EncodedPacked]):
    """Records in sequences of at most max_length tokens, put together as they are read."""

    def __init__(self, items: Sequence[Any], lengths: Sequence[int] | NDArray[Any], max_length: int, seed: int) -> None:
        """items: EncodedExample; lengths: their tokens, none above max_length. seed: which of equal length comes first."""
        import numpy as np  # the light image does not pack

        self._items = items
        sizes = np.asarray(lengths, np.int64)
        places = best_fit(sizes, max_length, seed)
        self._order = np.argsort(places, kind="stable")
        self._ends = np.cumsum(np.bincount(places))
        self.lengths = np.bincount(places, weights=sizes).astype(np.int32)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> EncodedPacked:  # type: ignore[override]  # no slices
        import numpy as np  # the light image does not pack

        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        first = int(self._ends[index - 1]) if index else 0
        parts = [self._items[int(row)] for row in self._order[first : int(self._ends[index])]]
        starts = np.cumsum([0, *(len(part.input_ids) for part in parts[:-1])]).astype(np.int32)
        labels = np.concatenate([part.labels for part in parts])
        labels[starts] = IGNORED
        return EncodedPacked(np.concatenate([part.input_ids for part in parts]), labels, starts)

    @property
    def fill(self) -> float:
        """Share of the tokens that padding to the longest sequence would leave to records."""
        return float(self.lengths.sum()) / (len(self) * int(self.lengths.max()))


def best_fit(lengths: NDArray[np.int64], capacity: int, seed: int) -> NDArray[np.int64]:
    """The number of the sequence that each record goes to, from 0: int64 [records]; the same for the same seed.

    lengths: tokens of each record, none above capacity.
    """
    import numpy as np  # the light image does not pack

    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    places = np.zeros(len(lengths), np.int64)
    open_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where a sequence with room for r tokens is open
    count = 0
    for record in order.tolist():
        length = int(lengths[record])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            place = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, place, count = capacity, count, count + 1
        places[record] = place
        if room > length:
            open_by_room[room - length].append(place)
            rooms |= 1 << (room - length)
    return places
