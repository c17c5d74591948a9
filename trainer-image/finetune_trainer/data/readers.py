"""Read jsonl, json, csv, parquet and txt files into records. What cannot be read becomes a BadRecord, no exception.

jsonl: one object a line. json: an array of objects, an object of objects, or an object whose only list holds them;
one object a line is read too. A json file above WHOLE_JSON_BYTES has to be an array, which is read piece by piece, or one
object a line. csv: comma-separated with a header line. parquet: one record a row. txt: one record a line, in the column
`text`. Empty lines are skipped.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from finetune_trainer.data.records import BadRecord, Record

Row = Record | BadRecord
MAX_LINE_BYTES = 64 << 20
MAX_FIELD_CHARACTERS = 16 << 20
WHOLE_JSON_BYTES = 32 << 20
"""Up to this size a json file is read whole."""
_CHUNK_CHARACTERS = 1 << 20
_PARQUET_ROWS = 1024
_ENCODING_MEND = "Save the file as UTF-8."
_LONG_NUMBER = "a number of more digits than Python reads (4,300)"
_JSON_MEND = "Correct the JSON."


def read_folder(folder: Path, source: str) -> Iterator[Row]:
    """The records of all files below folder whose ending is known, in the order of their names."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in READERS and path.is_file()):
        yield from read_file(path, source, path.relative_to(folder).as_posix())


def read_file(path: Path, source: str, name: str) -> Iterator[Row]:
    """The records of one file; name is what messages call it, source the spec path of its URI."""
    return READERS[path.suffix.lower()](path, source, name)


def read_jsonl(path: Path, source: str, name: str) -> Iterator[Row]:
    """The records of a jsonl file."""
    with path.open("rb") as file:
        for number, line in _lines(file, source, name):
            if isinstance(line, BadRecord):
                yield line
            elif line.strip():
                yield _parsed(line, source, name, number)


def read_json(path: Path, source: str, name: str) -> Iterator[Row]:
    """The records of a json file."""
    if path.stat().st_size > WHOLE_JSON_BYTES:
        yield from _read_array(path, source, name)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield BadRecord(source, name, 0, f"not UTF-8 at byte {error.start}", _ENCODING_MEND)
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second value follows: one object a line
            yield from read_jsonl(path, source, name)
        elif text.strip():
            yield BadRecord(
                source, name, 0, f"line {error.lineno} column {error.colno} is not valid JSON: {error.msg}", _JSON_MEND
            )
        return
    except ValueError:
        yield BadRecord(source, name, 0, _LONG_NUMBER, _JSON_MEND)
        return
    except RecursionError:
        yield BadRecord(source, name, 0, "nested too deeply", _JSON_MEND)
        return
    items = _items(value)
    if items is None:
        yield BadRecord(
            source, name, 0, "neither an array nor an object of records", "Write an array of objects: [{...}, {...}]."
        )
        return
    for number, item in enumerate(items, 1):
        yield _record(item, source, name, number)


def _read_array(path: Path, source: str, name: str) -> Iterator[Row]:
    """The records of a json array, one after another in memory; of a file with one object a line, those."""
    number, rest = 0, ""
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as file:
        try:
            rest = file.read(_CHUNK_CHARACTERS).lstrip()
            if not rest.startswith("["):
                yield from read_jsonl(path, source, name)
                return
            rest = rest[1:]
            while not (rest := rest.lstrip().removeprefix(",").lstrip()).startswith("]"):
                try:
                    item, end = decode(rest)
                except json.JSONDecodeError as error:
                    more = file.read(max(_CHUNK_CHARACTERS, len(rest)))
                    if not more or len(rest) > MAX_LINE_BYTES:
                        problem = f"record {number + 1} is not valid JSON: {error.msg}"
                        yield BadRecord(source, name, number + 1, problem, _JSON_MEND)
                        return
                    rest += more
                    continue
                except ValueError:
                    yield BadRecord(source, name, number + 1, _LONG_NUMBER, _JSON_MEND)
                    return
                number += 1
                yield _record(item, source, name, number)
                rest = rest[end:]
        except UnicodeDecodeError as error:
            yield BadRecord(source, name, number + 1, f"not UTF-8 ({error.reason})", _ENCODING_MEND)
        except RecursionError:
            yield BadRecord(source, name, number + 1, "nested too deeply", _JSON_MEND)


def read_csv(path: Path, source: str, name: str) -> Iterator[Row]:
    """The records of a csv file; row is the line on which a record begins. Every value is text."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    broken: dict[int, BadRecord] = {}

    def text() -> Iterator[str]:
        with path.open("rb") as file:
            for number, line in _lines(file, source, name):
                if isinstance(line, BadRecord):
                    broken[number] = line
                    yield "\n"
                else:
                    yield line

    reader = csv.reader(text(), strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            values = None
        except csv.Error as error:
            yield BadRecord(source, name, first, f"not valid csv: {error}", "Quote values that hold commas or quotes.")
            continue
        for number in sorted(broken):
            yield broken.pop(number)
        if values is None:
            return
        if not values:
            continue
        if header is None:
            header = [column.strip() for column in values]
        elif len(values) != len(header):
            yield BadRecord(
                source, name, first, f"{len(values)} values for {len(header)} columns", "Quote values that hold commas."
            )
        else:
            yield Record(source, name, first, dict(zip(header, values, strict=True)))


def read_parquet(path: Path, source: str, name: str) -> Iterator[Row]:
    """The records of a parquet file."""
    import pyarrow as pa  # a quarter of a second that jsonl data does not need
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for item in batch.to_pylist():
                    number += 1
                    yield _record(item, source, name, number)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield BadRecord(source, name, 0, f"not a readable parquet file: {reason}", "Write the file again.")


def read_txt(path: Path, source: str, name: str) -> Iterator[Row]:
    """The lines of a txt file as records with the column `text`."""
    with path.open("rb") as file:
        for number, line in _lines(file, source, name):
            if isinstance(line, BadRecord):
                yield line
            elif line.strip():
                yield Record(source, name, number, {"text": line.rstrip("\r\n")})


READERS: dict[str, Callable[[Path, str, str], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}


def _lines(file: BinaryIO, source: str, name: str) -> Iterator[tuple[int, str | BadRecord]]:
    """Numbered lines with their end, decoded; a line that is not UTF-8 or too long as a BadRecord."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            yield (
                number,
                BadRecord(
                    source,
                    name,
                    number,
                    f"longer than {MAX_LINE_BYTES} bytes",
                    "Check that the file has one record a line.",
                ),
            )
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 at byte {error.start} of the line"
            yield number, BadRecord(source, name, number, problem, _ENCODING_MEND)


def _parsed(line: str, source: str, name: str, number: int) -> Row:
    try:
        return _record(json.loads(line), source, name, number)
    except json.JSONDecodeError as error:
        return BadRecord(source, name, number, f"not valid JSON at column {error.colno}: {error.msg}", _JSON_MEND)
    except ValueError:
        return BadRecord(source, name, number, _LONG_NUMBER, _JSON_MEND)
    except RecursionError:
        return BadRecord(source, name, number, "nested too deeply", _JSON_MEND)


def _record(item: Any, source: str, name: str, number: int) -> Row:
    if isinstance(item, dict):
        return Record(source, name, number, item)
    problem = f"{type_word(item)}, not an object"
    return BadRecord(source, name, number, problem, 'Write each record as {"column": value}.')


def _items(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return None
    if value and all(isinstance(item, dict) for item in value.values()):
        return list(value.values())
    lists = [item for item in value.values() if isinstance(item, list)]
    return lists[0] if len(lists) == 1 else None


def type_word(value: Any) -> str:
    """What a JSON value is, for people."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"
