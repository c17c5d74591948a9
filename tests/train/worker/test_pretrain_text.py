"""Running text as training sequences: nothing is lost, nothing leaks into the held-out part, every draw repeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.kinds import EncodedExample
from finetune_trainer.data.readers import read_folder
from finetune_trainer.data.records import Record
from finetune_trainer.data.windows import Blocks, RandomWindows, cut_at, joined_lines, part_border

DOCUMENTS = [(0, 5), (5, 6), (6, 20), (20, 20), (20, 33)]


def _documents(spans: Sequence[tuple[int, int]] = DOCUMENTS) -> list[EncodedExample]:
    arrays = [np.arange(start, stop, dtype=np.int32) for start, stop in spans]
    return [EncodedExample(array, array) for array in arrays]


def _texts(examples: Sequence[Example]) -> list[str]:
    return [example.turns[0].text for example in examples]


def _examples(*texts: str) -> list[Example]:
    return [
        Example(Record("dataset.sources[0].uri", "a.jsonl", row, {"text": text}), (Turn("text", text),))
        for row, text in enumerate(texts, 1)
    ]


@pytest.mark.parametrize("size", [1, 4, 8, 33, 100])
def test_blocks_hold_every_token_once_and_in_order(size: int) -> None:
    blocks = Blocks(_documents(), size)
    found = [block.input_ids.tolist() for block in blocks]
    assert [token for block in found for token in block] == list(range(33))
    assert [len(block) for block in found] == [size] * (33 // size) + ([33 % size] if 33 % size else [])
    assert blocks.lengths.tolist() == [len(block) for block in found]
    assert all(np.array_equal(block.input_ids, block.labels) for block in blocks)
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_windows_repeat_for_the_same_epoch_and_differ_between_epochs() -> None:
    def drawn(epoch: int, seed: int = 3) -> list[list[int]]:
        windows = RandomWindows(_documents(), 8, seed)
        windows.set_epoch(epoch)
        return [window.input_ids.tolist() for window in windows]

    assert len(drawn(0)) == 33 // 8
    assert drawn(1) == drawn(1)
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=4)
    assert all(window == list(range(window[0], window[0] + 8)) for window in drawn(0))
    assert RandomWindows(_documents(), 8, 3).lengths.tolist() == [8] * 4


def test_windows_reach_every_place_of_the_text() -> None:
    windows = RandomWindows(_documents(), 8, 0)
    starts: Counter[int] = Counter()
    for epoch in range(400):
        windows.set_epoch(epoch)
        starts.update(int(window.input_ids[0]) for window in windows)
    assert sorted(starts) == list(range(26)), "the first and the last place among them"
    assert max(starts.values()) < 2 * min(starts.values()), "no place is favoured"


def test_a_text_shorter_than_a_window_is_one_window() -> None:
    assert [window.input_ids.tolist() for window in RandomWindows(_documents([(0, 5)]), 8, 0)] == [[0, 1, 2, 3, 4]]


def _cut(borders: Sequence[int], *texts: str) -> list[list[str]]:
    parts: list[list[str]] = [[] for _ in (0, *borders)]
    begin = 0
    for example in _examples(*texts):
        for place, piece in cut_at(example, begin, borders):
            parts[place] += _texts([piece])
        begin += example.characters
    return parts


def test_the_held_out_part_of_a_running_text_is_its_end() -> None:
    assert part_border(100, 0.1) == 90
    assert _cut([90], "a" * 50, "b" * 45, "c" * 5) == [["a" * 50, "b" * 40], ["b" * 5, "c" * 5]]
    assert _cut([80, 90], "a" * 100) == [["a" * 80], ["a" * 10], ["a" * 10]], "one long text is cut too"
    assert _cut([50], "a" * 50, "b" * 50) == [["a" * 50], ["b" * 50]]


def test_a_text_too_short_to_hold_out_from_is_refused() -> None:
    with pytest.raises(FinetuneError, match="leaves one side empty") as error:
        part_border(2, 0.1)
    assert (error.value.failure_class, error.value.field) == ("DataInvalid", "spec.dataset.validation")


@pytest.mark.parametrize(
    ("borders", "expected"),
    [
        ([], [(0, True, True)]),
        ([14], [(0, True, False), (1, False, True)]),
        ([10], [(1, False, True)]),
        ([20], [(0, True, False)]),
    ],
)
def test_a_part_ends_its_texts_wherever_a_piece_of_them_is_cut(
    borders: list[int], expected: list[tuple[int, bool, bool]]
) -> None:
    example = _examples("0123456789")[0]
    middle = replace(example, record=replace(example.record, continues=True, unfinished=True))
    found = list(cut_at(middle, 10, borders))
    assert [(place, piece.record.continues, piece.record.unfinished) for place, piece in found] == expected
    assert "".join(_texts([piece for _, piece in found])) == "0123456789"


def test_a_text_file_is_one_document_with_its_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Chapter 1\n\nIt was\n  late.\n")
    (tmp_path / "b.txt").write_text("\n\nSecond book\n")
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = list(joined_lines(read_folder(tmp_path, "dataset.sources[0].uri")))
    found: list[Any] = [row.fields["text"] for row in rows if isinstance(row, Record)]
    assert found == ["Chapter 1\n\nIt was\n  late.", "Second book", "one", "two"]


def test_a_line_that_cannot_be_read_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\xff\xfe\nthree\n")
    first, *rest = joined_lines(read_folder(tmp_path, "dataset.sources[0].uri"))
    assert "not UTF-8" in first.problem  # type: ignore[union-attr]
    assert [row.fields["text"] for row in rest if isinstance(row, Record)] == ["one\n\nthree"]
