"""A txt file longer than a piece: tokenised bit by bit, and still one text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.job import LossOn, ObjectiveType, Task, Truncation
from finetune_api.runfile import RunFile
from finetune_trainer.data import load_dataset, windows
from finetune_trainer.data.encode import Encoding
from finetune_trainer.data.encoders import EncodingRules, make_encoder
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.readers import read_folder
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.table import Table
from finetune_trainer.data.tokenizer import PlacedTokens, TextTokenizer
from finetune_trainer.data.windows import TextStream, joined_lines
from tests.train.data.making import make_tokenizer, run_file

LINE = "The capital of France is Paris, said the assistant."
TEXT = "".join(f"{LINE} {number}\n{chr(10) * (number % 50 == 0)}" for number in range(12_000))
LONGEST = len(LINE) + 8


def _pieces(folder: Path, *, whole: bool = False) -> Iterator[Record]:
    for row in joined_lines(read_folder(folder, "dataset.sources[0].uri"), whole=whole):
        assert not isinstance(row, BadRecord)
        yield row


def test_a_long_text_comes_in_pieces_that_end_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(LINE)
    *pieces, other = _pieces(tmp_path)
    texts = [str(piece.fields["text"]) for piece in pieces]
    assert "".join(texts) == TEXT.strip()
    assert len(texts) == 3 > len(TEXT) >> 18
    assert all(1 << 18 <= len(text) < (1 << 18) + LONGEST and text.endswith("\n") for text in texts[:-1])
    assert [(piece.continues, piece.unfinished) for piece in pieces] == [(False, True), (True, True), (True, False)]
    assert (other.fields["text"], other.continues, other.unfinished) == (LINE, False, False)
    assert [row.fields["text"] for row in _pieces(tmp_path, whole=True)] == [TEXT.strip(), LINE]


def _run(*, random_windows: bool, packing: bool = True, **dataset: Any) -> RunFile:
    document = run_file(format="Text", lossOn="All", **dataset).to_json()
    settings = {"tokenizer": "Model", "randomWindows": random_windows, "blockSize": 64, "maskProbability": 0.15}
    document["objective"] = {"type": "Pretrain", "pretrain": {**settings, "meanSpanLength": 3.0}}
    document["hyperparameters"]["packing"] = packing and not random_windows
    return RunFile.from_json(document)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data/0").mkdir(parents=True)
    (folder / "data/0/novel.txt").write_text(TEXT[:400_000])
    return folder


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many characters were tokenised together, each time."""
    found: list[int] = []
    plain = TextTokenizer.place_many

    def counted(self: TextTokenizer, texts: list[str]) -> list[PlacedTokens]:
        found.append(sum(map(len, texts)))
        return plain(self, texts)

    monkeypatch.setattr(TextTokenizer, "place_many", counted)
    return found


def _streams(cache: Path) -> dict[str, Any]:
    """The tokens of each table, how many rows it has, and the tokens of the first row."""
    found = {}
    for header in cache.rglob("header.json"):
        table = Table(header.parent)
        stream = TextStream(table)
        ids = stream.read(0, len(stream))
        found[header.parent.name] = (ids.tolist(), len(table), table.tokens.tolist(), table.loss_tokens.tolist())
    return found


@pytest.mark.parametrize("random_windows", [False, True])
def test_a_text_in_pieces_gives_the_tokens_of_the_whole(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, at_once: list[int], random_windows: bool
) -> None:
    tokenizer, piece = make_tokenizer(adds_bos=True), 1 << 17
    monkeypatch.setattr(windows, "PIECE_CHARACTERS", piece)
    run = _run(
        random_windows=random_windows, **({"validationFraction": 0.1, "testFraction": 0.2} if random_windows else {})
    )
    load_dataset(run, inputs, tokenizer, cache=tmp_path / "pieces")
    assert max(at_once) < piece + LONGEST
    monkeypatch.setattr(windows, "PIECE_CHARACTERS", 1 << 30)
    load_dataset(run, inputs, tokenizer, cache=tmp_path / "whole")
    found, whole = _streams(tmp_path / "pieces"), _streams(tmp_path / "whole")
    assert found == whole
    assert {name: rows for name, (_, rows, _, _) in found.items()} == dict.fromkeys(found, 1)
    assert set(found) == ({"train-0", "validation", "test"} if random_windows else {"train-0"})
    for ids, *_ in found.values():
        begins, ends = np.flatnonzero(np.equal(ids, tokenizer.bos_token_id)), np.equal(ids, tokenizer.eos_token_id)
        assert (begins.tolist(), np.flatnonzero(ends).tolist()) == ([0], [len(ids) - 1])


def test_a_text_that_is_not_cut_into_blocks_stays_one_record(tmp_path: Path, inputs: Path) -> None:
    encoded = load_dataset(
        _run(random_windows=False, packing=False, truncation="Tail"), inputs, make_tokenizer(), cache=tmp_path
    )
    assert [len(item.input_ids) for item in encoded.train] == [512]
    assert encoded.stats.cut == 1


@pytest.mark.parametrize("task", [Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ])
def test_what_stands_round_a_text_stands_at_its_two_ends_only(task: Task) -> None:
    rules = EncodingRules(loss_on=LossOn.ALL, truncation=Truncation.TAIL, max_length=1 << 20)
    encoder = make_encoder(
        ObjectiveType.PRETRAIN, task, TextTokenizer.from_transformers(make_tokenizer(adds_bos=True)), rules
    )

    def ids(text: str, **flags: bool) -> list[int]:
        record = Record("dataset.sources[0].uri", "novel.txt", 1, {"text": text}, **flags)
        found = encoder.encode(Example(record, (Turn("text", text),)))
        assert isinstance(found, Encoding)
        return found.example.input_ids.tolist()

    first, middle, last = f"{LINE}\n", "x", f"\n{LINE}"
    pieces = ids(first, unfinished=True), ids(middle, continues=True, unfinished=True), ids(last, continues=True)
    assert list(chain(*pieces)) == ids(first + middle + last)
