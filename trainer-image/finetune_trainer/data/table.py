"""Encoded records on disk: written once, mapped by every process of a node, one column for each field of an item.

A column of arrays is two files, its values one after another and int64 offsets; a column of whole numbers is one file.
Only numbers are read back, into the classes of kinds.py: nothing in a table can run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

from finetune_trainer.data import kinds
from finetune_trainer.data.encode import IGNORED
from finetune_trainer.data.kinds import EncodedLabel, EncodedPrompt, EncodedTags, EncodedTarget, Item

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEADER = "header.json"
_KINDS = {kind.__name__: kind for kind in kinds.ITEMS}
# Beside the fields: tokens and tokens in the loss of each item, for statistics of any choice of rows.
_TOKENS, _LOSS = "tokens", "lossTokens"
_FLUSH_TOKENS = 1 << 16


class TableWriter:
    """Writes items of one kind below a folder; complete only after close."""

    def __init__(self, folder: Path) -> None:
        """folder is made; it must not hold a table."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._kind: type[Any] | None = None
        self._columns: dict[str, str] = {}
        self._files: dict[str, BinaryIO] = {}
        self._pending: dict[str, list[Any]] = {}
        self._ends: dict[str, int] = {}
        self._waiting = 0
        self.rows = 0

    def add(self, item: Item, tokens: int, *, continues: bool = False) -> None:
        """One more item; tokens: how many it was encoded to. continues: it is more of the item before."""
        if self._kind is None:
            self._open(item)
        assert type(item) is self._kind  # one encoder makes one kind
        for name, dtype in self._columns.items():
            if name == _TOKENS:
                value: Any = tokens
            elif name == _LOSS:
                value = loss_tokens(item, begins=not continues)
            else:
                value = getattr(item, name)
            numbers = name
            if dtype != "int64":
                self._pending[name].append(value)
                self._ends[name] += len(value)
                numbers, value = f"{name}.offsets", self._ends[name]
            elif continues:
                value += self._pending[name][-1]
            if continues:
                self._pending[numbers].pop()
            self._pending[numbers].append(value)
        self.rows += not continues
        self._waiting += tokens
        if self._waiting >= _FLUSH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Everything is on disk, and the header with it."""
        self._flush(last=True)
        for file in self._files.values():
            file.close()
        kind = self._kind.__name__ if self._kind is not None else None
        header = {"kind": kind, "rows": self.rows, "columns": self._columns}
        (self._folder / HEADER).write_text(json.dumps(header))

    def _open(self, item: Item) -> None:
        self._kind = type(item)
        named = {spec.name: getattr(item, spec.name) for spec in fields(item)}
        self._columns = {name: "int64" if isinstance(value, int) else str(value.dtype) for name, value in named.items()}
        self._columns |= {_TOKENS: "int64", _LOSS: "int64"}
        for name, dtype in self._columns.items():
            self._ends[name] = 0
            for file in (name,) if dtype == "int64" else (name, f"{name}.offsets"):
                self._pending[file] = [0] if file != name else []
                self._files[file] = (self._folder / file).open("wb")

    def _flush(self, *, last: bool = False) -> None:
        """Writes what waits; the numbers of the last item wait on, unless it is the last: it may be continued."""
        import numpy as np  # the light image counts tokens without it

        self._waiting = 0
        for name, values in self._pending.items():
            whole = self._columns.get(name, "int64") == "int64"
            kept = values[-1:] if whole and not last else []
            if written := values[: len(values) - len(kept)]:
                block = np.array(written, np.int64) if whole else np.concatenate(written)
                self._files[name].write(block.tobytes())
                values[:] = kept


class Table(Sequence[Any]):
    """Items on disk, read when they are asked for. Equal on every process that maps the same folder."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of folder. Raises ValueError or OSError for a table that is not complete."""

        header = json.loads((folder / HEADER).read_text())
        self._rows = int(header["rows"])
        self._kind = _KINDS[header["kind"]] if self._rows else None
        self._values: dict[str, NDArray[Any]] = {}
        self._offsets: dict[str, NDArray[np.int64]] = {}
        for name, dtype in header["columns"].items():
            rows = self._rows
            if dtype != "int64":
                self._offsets[name] = _mapped(folder / f"{name}.offsets", "int64", self._rows + 1)
                rows = int(self._offsets[name][-1])
            self._values[name] = _mapped(folder / name, dtype, rows)

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(self._rows))]
        if not -self._rows <= index < self._rows:
            raise IndexError(index)
        index %= self._rows
        assert self._kind is not None  # there is a row
        return self._kind(**{spec.name: self._cell(spec.name, index) for spec in fields(self._kind)})

    def __iter__(self) -> Iterator[Any]:
        return (self[k] for k in range(self._rows))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of the longest sequence of each item: int32 [rows]."""
        import numpy as np  # the light image counts tokens without it

        longest = np.zeros(self._rows, np.int32)
        for name, offsets in self._offsets.items():
            if self._values[name].dtype == np.int32:
                np.maximum(longest, np.diff(offsets).astype(np.int32), out=longest)
        return longest

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens that each item was encoded to, all its sequences together: int64 [rows]."""
        return self._column(_TOKENS)

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Tokens of each item that the loss counts: int64 [rows]."""
        return self._column(_LOSS)

    def column(self, name: str) -> NDArray[np.int64]:
        """A field of whole numbers, such as `label`: int64 [rows]. Raises KeyError if the items have no such field."""
        if name in self._offsets:
            raise KeyError(name)
        return self._values[name]

    def _column(self, name: str) -> NDArray[np.int64]:
        import numpy as np  # the light image counts tokens without it

        return self._values[name] if self._rows else np.zeros(0, np.int64)

    def _cell(self, name: str, index: int) -> Any:
        values = self._values[name]
        if name not in self._offsets:
            return int(values[index])
        offsets = self._offsets[name]
        return values[offsets[index] : offsets[index + 1]]


class Picked(Sequence[Any]):
    """Rows of several tables in a given order. rows: int64, counted through the tables one after another."""

    def __init__(self, tables: Sequence[Table], rows: NDArray[np.int64]) -> None:
        """A row may be picked more than once."""
        import numpy as np  # the light image counts tokens without it

        self._tables = tables
        self._starts = np.cumsum([0, *(len(table) for table in tables)])
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        number = int(self._starts.searchsorted(row, side="right")) - 1
        return self._tables[number][row - int(self._starts[number])]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of the longest sequence of each item: int32 [rows]."""
        return self._picked([table.lengths for table in self._tables])

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens that each item was encoded to: int64 [rows]."""
        return self._picked([table.tokens for table in self._tables])

    @property
    def loss_tokens(self) -> NDArray[np.int64]:
        """Tokens of each item that the loss counts: int64 [rows]."""
        return self._picked([table.loss_tokens for table in self._tables])

    def column(self, name: str) -> NDArray[np.int64]:
        """A field of whole numbers: int64 [rows]. Raises KeyError if the items have no such field."""
        return self._picked([table.column(name) for table in self._tables if len(table)])

    def _picked(self, columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        import numpy as np  # the light image counts tokens without it

        return np.concatenate(columns)[self._rows]


def loss_tokens(item: Item, *, begins: bool = True) -> int:
    """How many tokens of an item the loss counts: none of a prompt, one for a class. begins: nothing is before it."""
    if isinstance(item, EncodedPrompt):
        return 0
    if isinstance(item, EncodedLabel):
        return 1
    # Nothing before a text predicts its first token; a target and tags are predicted whole.
    first = 0 if isinstance(item, EncodedTarget | EncodedTags) or not begins else 1
    labels = [getattr(item, spec.name) for spec in fields(item) if spec.name.endswith("labels")]
    return sum(int((array[first:] != IGNORED).sum()) for array in labels)


def _mapped(path: Path, dtype: str, count: int) -> NDArray[Any]:
    """A file as a read-only array. Raises ValueError if its size is another."""
    import numpy as np  # the light image counts tokens without it

    size = count * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {size}")
    if count == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
