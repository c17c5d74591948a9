"""Running text as training sequences: documents one after another, cut into blocks or read through random windows.

Nothing here copies the text: each class is a view of the encoded documents, so a memory-mapped table stays on disk.
What is drawn depends on seed, epoch and index only, never on a global random state: a resumed run sees the same.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from finetune_api.failures import FinetuneError
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.kinds import EncodedExample
from finetune_trainer.data.readers import Row
from finetune_trainer.data.records import BadRecord, Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finetune_trainer.data.kinds import Ids


PIECE_CHARACTERS = 1 << 18
"""From this length on the text of a txt file is passed on in pieces: tokenising takes more than 100 bytes of each character."""


@runtime_checkable
class Redrawn(Protocol):
    """Items that are drawn anew for each epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Draw for this epoch from now on; the same epoch always gives the same items."""


class TextStream:
    """The tokens of all documents in their order, read by position."""

    def __init__(self, documents: Sequence[EncodedExample]) -> None:
        self._documents = documents
        known = getattr(documents, "lengths", None)  # a table on disk knows them without reading the documents
        lengths = [len(document.input_ids) for document in documents] if known is None else known.tolist()
        self._ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Ids:
        """Tokens start to stop (at most to the end): int32 [stop - start]."""
        import numpy as np  # the light image counts tokens without it

        number = bisect.bisect_right(self._ends, start)
        parts = []
        while number < len(self._ends) and start < stop:
            begin = self._ends[number - 1] if number else 0
            end = min(stop, self._ends[number])
            parts.append(self._documents[number].input_ids[start - begin : end - begin])
            start, number = end, number + 1
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


class Blocks(Sequence[EncodedExample]):
    """The stream cut into blocks of size tokens: each token stands in exactly one, the last block may be shorter."""

    def __init__(self, documents: Sequence[EncodedExample], size: int) -> None:
        self._stream = TextStream(documents)
        self._size = size

    def __len__(self) -> int:
        return math.ceil(len(self._stream) / self._size)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each block, without reading them."""
        import numpy as np  # the light image counts tokens without it

        return np.minimum(self._size, len(self._stream) - self._size * np.arange(len(self))).astype(np.int32)

    def __getitem__(self, index: int) -> EncodedExample:  # type: ignore[override]  # no slices
        index = checked_index(index, len(self))
        ids = self._stream.read(index * self._size, min((index + 1) * self._size, len(self._stream)))
        return EncodedExample(ids, ids)


class RandomWindows(Sequence[EncodedExample]):
    """Windows of size tokens from random places of the stream; an epoch has as many as whole ones lie side by side.

    Window i of epoch e begins where default_rng([seed, e, i]) says, each place being as likely as any other. A text
    shorter than size is one window.
    """

    def __init__(self, documents: Sequence[EncodedExample], size: int, seed: int) -> None:
        self._stream = TextStream(documents)
        self._size = min(size, len(self._stream))
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the windows of this epoch from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._stream) // self._size if self._size else 0

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each window, without drawing them."""
        import numpy as np  # the light image counts tokens without it

        return np.full(len(self), self._size, np.int32)

    def __getitem__(self, index: int) -> EncodedExample:  # type: ignore[override]  # no slices
        index = checked_index(index, len(self))
        places = len(self._stream) - self._size + 1
        start = int(generator(self._seed, self._epoch, index).integers(places))
        ids = self._stream.read(start, start + self._size)
        return EncodedExample(ids, ids)


def generator(*numbers: int) -> np.random.Generator:
    """A source of random numbers that depends on numbers only (whole numbers, not negative)."""
    import numpy as np  # the light image counts tokens without it

    return np.random.default_rng(numbers)


def checked_index(index: int, length: int) -> int:
    """index, counted from the end if negative; raises IndexError outside, which ends a loop over a sequence."""
    if not -length <= index < length:
        raise IndexError(index)
    return index % length


def part_border(total: int, fraction: float) -> int:
    """Where the last part of a running text of total characters begins: it has fraction of them.

    A random split would put windows that overlap on both sides. Raises FinetuneError(DataInvalid) if either side would
    be empty.
    """
    border = total - round(total * fraction)
    if not 0 < border < total:
        raise FinetuneError(
            f"dataset.validation.fraction {fraction} of a text of {total} characters leaves one side empty. "
            "Add text, or remove dataset.validation.",
            failure_class="DataInvalid",
            field="spec.dataset.validation",
        )
    return border


def cut_at(example: Example, begin: int, borders: Sequence[int]) -> Iterator[tuple[int, Example]]:
    """(number of the part, example) of a plain-text example that begins at character begin of a running text.

    borders: where the parts after the first begin, rising. The example across a border is cut there, so that a single
    long text can be split too; each part ends its own texts.
    """
    text, record = example.turns[0].text, example.record
    end = begin + len(text)
    for start, stop in pairwise([begin, *(border for border in borders if begin < border < end), end]):
        piece = replace(
            record,
            continues=record.continues and start == begin and start not in borders,
            unfinished=record.unfinished and stop == end and stop not in borders,
        )
        turns = (Turn("text", text[start - begin : stop - begin]),)
        yield bisect.bisect_right(borders, start), replace(example, record=piece, turns=turns)


def joined_lines(rows: Iterable[Row], *, whole: bool = False) -> Iterator[Row]:
    """rows with the lines of each txt file as one text, blank lines and line breaks kept: a novel is one document.

    Unless whole, a text longer than PIECE_CHARACTERS comes as several records that continue each other. Each but the
    last ends with the line that reaches that length, its line break included. Lines that could not be read stay
    records of their own.
    """
    pending: Record | None = None
    parts: list[str] = []
    last = characters = 0
    for row in rows:
        follows = pending is not None and (row.source, row.file) == (pending.source, pending.file)
        if pending is not None and not follows:
            yield replace(pending, fields={"text": "".join(parts)})
            pending = None
        if isinstance(row, BadRecord) or not row.file.endswith(".txt"):
            yield row
            continue
        if pending is None:
            pending, parts, last, characters = row, [], row.row, 0
        breaks = "\n" * (row.row - last)
        if characters >= PIECE_CHARACTERS and not whole:
            yield replace(pending, fields={"text": "".join([*parts, breaks])}, unfinished=True)
            pending, parts, characters, breaks = replace(row, continues=True), [], 0, ""
        parts.append(breaks + str(row.fields["text"]))
        last, characters = row.row, characters + len(parts[-1])
    if pending is not None:
        yield replace(pending, fields={"text": "".join(parts)})
