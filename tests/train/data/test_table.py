"""Encoded records on disk: what is written is what is read, by one process or many."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_trainer.data import kinds, load_dataset
from finetune_trainer.data.cache import made_once
from finetune_trainer.data.table import Picked, Table, TableWriter
from tests.train.data.making import make_tokenizer, run_file, write_rows


def ids(*numbers: int) -> Any:
    return np.array(numbers, np.int32)


ITEMS = [
    [kinds.EncodedExample(ids(5, 6, 7), ids(-100, 6, 7)), kinds.EncodedExample(ids(8, 9), ids(-100, 9))],
    [kinds.EncodedPair(ids(1, 2), ids(-100, 2), ids(3, 4, 5), ids(-100, 4, 5))],
    [kinds.EncodedJudged(ids(1, 2), ids(-100, 2), 1, 0)],
    [kinds.EncodedTarget(ids(1, 2), ids(3))],
    [kinds.EncodedLabel(ids(1, 2), 4), kinds.EncodedLabel(ids(1), 0)],
    [kinds.EncodedTags(ids(1, 2, 3), ids(-100, 0, 2))],
    [
        kinds.EncodedPrompt(ids(1, 2), np.frombuffer("né".encode(), np.uint8)),
        kinds.EncodedPrompt(ids(3), ids()[:0].astype(np.uint8)),
    ],
    [kinds.EncodedPacked(ids(1, 2, 3, 4), ids(-100, 2, -100, 4), ids(0, 2))],
]


def write(folder: Path, items: list[Any]) -> Table:
    writer = TableWriter(folder)
    for item in items:
        writer.add(item, 10)
    writer.close()
    return Table(folder)


def same(one: Any, other: Any) -> bool:
    assert type(one) is type(other)
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)


@pytest.mark.parametrize("items", ITEMS, ids=lambda items: type(items[0]).__name__)
def test_every_kind_of_item_is_read_back_as_it_was_written(tmp_path: Path, items: list[Any]) -> None:
    table = write(tmp_path / "t", items)
    assert len(table) == len(items)
    assert all(same(one, other) for one, other in zip(table, items, strict=True))
    assert same(table[-1], items[-1]) and len(table[0:1]) == 1
    with pytest.raises(IndexError):
        table[len(items)]


def test_each_kind_counts_its_tokens_and_those_in_the_loss(tmp_path: Path) -> None:
    tables = [write(tmp_path / str(k), items) for k, items in enumerate(ITEMS)]
    assert [table.lengths.tolist() for table in tables] == [[3, 2], [3], [2], [2], [2, 1], [3], [2, 1], [4]]
    assert [table.loss_tokens.tolist() for table in tables] == [[2, 1], [3], [1], [1], [1, 1], [2], [0, 0], [2]]
    assert tables[4].column("label").tolist() == [4, 0] and tables[0].tokens.tolist() == [10, 10]


def test_many_rows_are_read_back_and_picked_in_any_order(tmp_path: Path) -> None:
    items = [
        kinds.EncodedExample(np.arange(k % 7 + 1, dtype=np.int32) + k, ids(*[k] * (k % 7 + 1))) for k in range(9000)
    ]
    tables = [write(tmp_path / "a", items[:5000]), write(tmp_path / "b", items[5000:])]
    rows = np.array([8999, 0, 5000, 4999, 0], np.int64)
    picked = Picked(tables, rows)
    assert all(same(one, items[row]) for one, row in zip(picked, rows, strict=True))
    assert picked.lengths.tolist() == [len(items[row].input_ids) for row in rows]


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    table = write(tmp_path / "t", [])
    assert len(table) == 0 and list(table) == [] and table.lengths.tolist() == [] and table.tokens.tolist() == []


def test_a_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t", ITEMS[0])
    path = tmp_path / "t" / "input_ids"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="input_ids has 16 bytes instead of 20"):
        Table(tmp_path / "t")


# ---- the cache


def _load_in_process(inputs: Path, out: Any) -> None:
    tokenizer = make_tokenizer()
    beats = []
    encoded = load_dataset(run_file(validationFraction=0.2), inputs, tokenizer, beat=lambda: beats.append(1))
    out.put(([item.input_ids.tolist() for item in encoded.train], len(beats)))


def test_ranks_share_one_encoding(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "inputs", [{"prompt": f"q {k}", "completion": f"a {k}"} for k in range(3000)])
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [context.Process(target=_load_in_process, args=(inputs, out)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [out.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert found[0][0] == found[1][0] == found[2][0] and len(found[0][0]) == 2400
    folders = [path for path in (tmp_path / "cache" / "data").iterdir() if path.is_dir()]
    assert len(folders) == 1


def test_a_later_attempt_reads_what_an_earlier_one_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_rows(tmp_path, [{"prompt": f"q {k}", "completion": f"a {k}"} for k in range(20)])
    run = run_file(validationFraction=0.2)
    first = load_dataset(run, inputs, make_tokenizer(), cache=tmp_path / "cache")

    def never(*_: object) -> None:
        raise AssertionError("the data was read again")

    monkeypatch.setattr("finetune_trainer.data.prepare.read_folder", never)
    again = load_dataset(run, inputs, make_tokenizer(), cache=tmp_path / "cache")
    assert again.stats == first.stats and again.sample == first.sample
    assert [p.to_json() for p in again.held_out_prompts] == [p.to_json() for p in first.held_out_prompts]
    assert all(same(one, other) for one, other in zip(again.train, first.train, strict=True))


@pytest.mark.parametrize("change", ["file", "seed", "length", "tokenizer"])
def test_other_data_settings_or_tokenizers_are_encoded_anew(tmp_path: Path, change: str) -> None:
    rows = [{"prompt": f"q {k}", "completion": f"a {k}"} for k in range(20)]
    inputs = write_rows(tmp_path, rows)
    load_dataset(run_file(), inputs, make_tokenizer(), cache=tmp_path / "cache")
    options: dict[str, Any] = {}
    tokenizer = make_tokenizer(adds_bos=change == "tokenizer")
    if change == "file":
        rows[0]["completion"] = "b 0"
        write_rows(tmp_path, rows)
    elif change != "tokenizer":
        options = {"seed": 8} if change == "seed" else {"max_sequence_length": 100}
    encoded = load_dataset(run_file(**options), inputs, tokenizer, cache=tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
    if change == "file":
        assert encoded.sample.endswith("⟦ b 0</s>⟧")


def _die(folder: Path) -> None:
    def make(partial: Path, _: Callable[[], None]) -> None:
        (partial / "half").write_text("x")
        raise SystemExit(3)

    made_once(folder, make, lambda: None)


def _slow(folder: Path, started: Any) -> None:
    def make(partial: Path, go_on: Callable[[], None]) -> None:
        started.set()
        for _ in range(4):
            time.sleep(0.3)
            go_on()
        (partial / "whole").write_text("x")

    made_once(folder, make, lambda: None)


def test_what_a_maker_that_died_left_is_made_anew(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_die, args=(tmp_path / "f",))
    process.start()
    process.join(60)
    assert process.exitcode == 3 and not (tmp_path / "f").exists()
    made_once(tmp_path / "f", lambda partial, _: (partial / "whole").write_text("y") and None, lambda: None)
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["whole"]


def test_those_that_wait_beat_only_while_the_maker_goes_on(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_slow, args=(tmp_path / "f", started))
    process.start()
    assert started.wait(60)
    beats: list[float] = []

    def never(*_: object) -> None:
        raise AssertionError("made twice")

    made_once(tmp_path / "f", never, lambda: beats.append(time.monotonic()))
    process.join(60)
    assert (tmp_path / "f" / "whole").exists() and 2 <= len(beats) <= 6


def test_the_cache_holds_nothing_that_could_run_code(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path, [{"prompt": "q", "completion": "a"}])
    load_dataset(run_file(), inputs, make_tokenizer(), cache=tmp_path / "cache")
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert names == {
        "index.json",
        "header.json",
        "input_ids",
        "input_ids.offsets",
        "labels",
        "labels.offsets",
        "tokens",
        "lossTokens",
    }
    header = json.loads(next((tmp_path / "cache").rglob("header.json")).read_text())
    assert header["kind"] == "EncodedExample" and header["rows"] == 1
