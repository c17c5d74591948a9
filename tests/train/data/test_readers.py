"""What is read from each kind of file, and how broken records are told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.data.readers import read_file, read_folder
from finetune_trainer.data.records import BadRecord, BadRows, Record

ROWS = [{"question": "Wo?", "answer": "Grüße, dort"}, {"question": "Who?", "answer": 'she said "me"'}]
SOURCE = "dataset.sources[0].uri"


def read(path: Path) -> list[Record | BadRecord]:
    return list(read_file(path, SOURCE, path.name))


def fields(rows: list[Record | BadRecord]) -> list[dict[str, object]]:
    return [dict(row.fields) for row in rows if isinstance(row, Record)]


def test_the_same_records_come_out_of_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS, "version": 1}))
    (tmp_path / "d.json").write_text(json.dumps({"first": ROWS[0], "second": ROWS[1]}))
    (tmp_path / "e.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "f.csv").write_text('question,answer\nWo?,"Grüße, dort"\nWho?,"she said ""me"""\n')
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "g.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert fields(read(path)) == ROWS, path.name


def test_a_text_file_has_one_record_a_line_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_bytes(b"\xef\xbb\xbfIt was\r\n\r\na dark night\n")
    assert [(row.row, row.fields["text"]) for row in read(path) if isinstance(row, Record)] == [
        (1, "It was"),
        (3, "a dark night"),
    ]


def test_a_folder_is_read_in_the_order_of_names_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text('{"n": 2}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "README.md").write_text("# not data")
    assert [(row.file, row.fields["n"]) for row in read_folder(tmp_path, SOURCE) if isinstance(row, Record)] == [
        ("a.jsonl", 1),
        ("sub/b.jsonl", 2),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"question": "a", "answer": ', "not valid JSON at column"),
        (b'["a", "b"]', "a list, not an object"),
        (b'{"question": "\xff\xfe"}', "not UTF-8 at byte 14 of the line"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_a_broken_jsonl_line_is_told_with_its_number_and_the_rest_is_read(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"question": "q1"}\n\n' + line + b'\n{"question": "q4"}\n')
    rows = read(path)
    bad = [row for row in rows if isinstance(row, BadRecord)]
    assert [row.where for row in bad] == ["train.jsonl line 3"]
    assert problem in bad[0].problem and bad[0].mend
    assert [row["question"] for row in fields(rows)] == ["q1", "q4"]


def test_broken_json_names_the_line_of_the_fault(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[\n {"a": "1"},\n {"a": }\n]')
    [bad] = read(path)
    assert isinstance(bad, BadRecord) and bad.where == "train.json" and "line 3 column 8" in bad.problem


def test_json_that_holds_no_records_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"a": 1, "b": 2}')
    [bad] = read(path)
    assert isinstance(bad, BadRecord) and bad.problem == "neither an array nor an object of records"


def test_csv_faults_are_told_with_the_line_where_the_record_begins(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(b'question,answer\n"two\nlines",yes\na,b,c\nd\xff,e\nlast,one\n')
    rows = read(path)
    assert fields(rows) == [{"question": "two\nlines", "answer": "yes"}, {"question": "last", "answer": "one"}]
    assert [(row.where, row.problem) for row in rows if isinstance(row, BadRecord)] == [
        ("train.csv line 4", "3 values for 2 columns"),
        ("train.csv line 5", "not UTF-8 at byte 1 of the line"),
    ]


def test_a_quote_that_never_closes_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('question,answer\nq1,a1\n"open,a2\n')
    rows = read(path)
    assert fields(rows) == [{"question": "q1", "answer": "a1"}]
    assert [row.where for row in rows if isinstance(row, BadRecord)] == ["train.csv line 3"]


def test_a_file_that_is_no_parquet_is_told(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_text("hello")
    [bad] = read(path)
    assert isinstance(bad, BadRecord) and "not a readable parquet file" in bad.problem


def test_all_bad_rows_are_counted_and_the_first_twenty_shown() -> None:
    bad = BadRows()
    for row in range(1, 31):
        bad.add(BadRecord(SOURCE, "t.jsonl", row, "column 'answer' is empty", "Give each record a text in 'answer'."))
    with pytest.raises(FinetuneError, match="30 of 130 records cannot be used") as caught:
        bad.check(100)
    message = str(caught.value)
    assert "t.jsonl line 20: " in message and "t.jsonl line 21: " not in message and "and 10 more" in message
    assert message.count("Give each record a text") == 1
    assert (caught.value.failure_class, caught.value.field) == ("DataInvalid", "spec.dataset.sources[0].uri")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_a_large_json_array_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    rows = [{"n": k, "text": "é, ] }" * (k % 5)} for k in range(50)]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False))
    monkeypatch.setattr("finetune_trainer.data.readers.WHOLE_JSON_BYTES", 100)
    monkeypatch.setattr("finetune_trainer.data.readers._CHUNK_CHARACTERS", chunk)
    found = read(path)
    assert fields(found) == rows and [row.row for row in found] == list(range(1, 51))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"n": 1}, {"n": 2', "record 2 is not valid JSON: Expecting ',' delimiter"),
        ('[{"n": 1}, 3]', "a number, not an object"),
    ],
)
def test_a_large_json_array_tells_its_broken_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    monkeypatch.setattr("finetune_trainer.data.readers.WHOLE_JSON_BYTES", 1)
    good, bad = read(tmp_path / "a.json")
    assert isinstance(good, Record) and isinstance(bad, BadRecord) and (bad.row, bad.problem) == (2, problem)
