"""Preference pairs, judged completions and prompts as tokens: what is in the loss, and what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import LossOn, Truncation
from finetune_trainer.data.encode import IGNORED
from finetune_trainer.data.encoders import EncodingRules
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.preference import JudgedEncoder, PairEncoder
from finetune_trainer.data.prompts import PromptEncoder
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.sources.inspect import TokenizerFiles
from tests.train.models import CHAT_TEMPLATE, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(found)
    return found


def _tokenizer(folder: Path, template: str | None = None) -> TextTokenizer:
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return TextTokenizer.from_files(
        TokenizerFiles(tokenizer_json=(folder / "tokenizer.json").read_bytes(), config=config, chat_template=template)
    )


def _rules(length: int = 200, truncation: Truncation = Truncation.ERROR, new_tokens: int = 0) -> EncodingRules:
    return EncodingRules(LossOn.ALL, truncation, length, new_tokens=new_tokens)


def _example(prompt: list[tuple[str, str]], chosen: list[tuple[str, str]], rejected: list[tuple[str, str]]) -> Example:
    def turns(pairs: list[tuple[str, str]]) -> tuple[Turn, ...]:
        return tuple(Turn(*pair) for pair in pairs)

    record = Record("dataset.sources[0].uri", "train.jsonl", 3, {})
    return Example(record, turns(prompt), turns(chosen), turns(rejected))


def _learnt(tokenizer: TextTokenizer, ids: Any, labels: Any) -> str:
    return tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != IGNORED])


def test_only_the_completions_of_a_pair_are_in_the_loss_each_with_its_end_token(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    encoder = PairEncoder(tokenizer, _rules())
    found = encoder.encode(_example([("prompt", "say red:")], [("completion", " RED")], [("completion", " blue")]))
    assert not isinstance(found, BadRecord)
    assert found is not None
    item = found.example
    assert tokenizer.decode(item.chosen_ids.tolist()) == "say red: RED</s>"
    assert _learnt(tokenizer, item.chosen_ids.tolist(), item.chosen_labels.tolist()) == " RED</s>"
    assert _learnt(tokenizer, item.rejected_ids.tolist(), item.rejected_labels.tolist()) == " blue</s>"
    assert found.length == found.kept == len(item.chosen_ids) + len(item.rejected_ids)
    assert encoder.show(item) == "chosen: say red:⟦ RED</s>⟧\nrejected: say red:⟦ blue</s>⟧"


def test_earlier_answers_of_the_prompt_are_not_in_the_loss(folder: Path) -> None:
    tokenizer = _tokenizer(folder, CHAT_TEMPLATE)
    prompt = [("user", "hi"), ("assistant", "hello"), ("user", "bye?")]
    found = PairEncoder(tokenizer, _rules()).encode(_example(prompt, [("assistant", "bye")], [("assistant", "no")]))
    assert found is not None
    assert not isinstance(found, BadRecord)
    item = found.example
    text = tokenizer.decode(item.chosen_ids.tolist())
    assert text.count("<s>") == 1
    assert "hello" in text
    assert _learnt(tokenizer, item.chosen_ids.tolist(), item.chosen_labels.tolist()) == "bye</s>"


def test_a_pair_that_is_too_long_loses_the_beginning_of_its_prompt_on_both_sides(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    example = _example([("prompt", "abcdefghij" * 5)], [("completion", "xyz" * 3)], [("completion", "z")])
    whole = PairEncoder(tokenizer, _rules()).encode(example)
    assert whole is not None
    assert not isinstance(whole, BadRecord)
    limit = len(whole.example.chosen_ids) - 20
    cut = PairEncoder(tokenizer, _rules(limit, Truncation.TAIL)).encode(example)
    assert cut is not None
    assert not isinstance(cut, BadRecord)
    assert len(cut.example.chosen_ids) == limit
    assert len(cut.example.rejected_ids) == len(whole.example.rejected_ids) - 20
    assert cut.example.chosen_ids[1:].tolist() == whole.example.chosen_ids[21:].tolist()
    assert cut.example.rejected_ids[1:].tolist() == whole.example.rejected_ids[21:].tolist()
    assert (cut.length - cut.kept, cut.prompt) == (40, whole.prompt - 20)


def test_a_completion_is_never_cut(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    example = _example([("prompt", "ab")], [("completion", "xyz" * 20)], [("completion", "z")])
    assert PairEncoder(tokenizer, _rules(30, Truncation.TAIL)).encode(example) is None


def test_a_pair_that_is_too_long_is_an_error_where_that_is_wished(folder: Path) -> None:
    example = _example([("prompt", "ab" * 40)], [("completion", "x")], [("completion", "z")])
    found = PairEncoder(_tokenizer(folder), _rules(30)).encode(example)
    assert isinstance(found, BadRecord)
    assert found.where == "train.jsonl line 3"
    assert "more than hyperparameters.maxSequenceLength 30" in found.problem


def test_equal_completions_are_a_bad_record(folder: Path) -> None:
    example = _example([("prompt", "ab")], [("completion", "x")], [("completion", "x")])
    found = PairEncoder(_tokenizer(folder), _rules()).encode(example)
    assert isinstance(found, BadRecord)
    assert found.problem == "chosen and rejected are the same"


@pytest.mark.parametrize("good", [True, False])
def test_a_judged_completion_keeps_its_verdict(folder: Path, good: bool) -> None:
    tokenizer = _tokenizer(folder)
    way = [("completion", " RED")]
    example = _example([("prompt", "say red:")], way if good else [], [] if good else way)
    encoder = JudgedEncoder(tokenizer, _rules())
    found = encoder.encode(example)
    assert found is not None
    assert not isinstance(found, BadRecord)
    item = found.example
    assert item.desirable == int(good)
    assert item.labels[: item.prompt].tolist() == [IGNORED] * item.prompt
    assert tokenizer.decode(item.input_ids[item.prompt :].tolist()) == " RED</s>"
    assert encoder.show(item).startswith("desirable" if good else "undesirable")


def test_a_prompt_ends_where_the_model_is_to_write(folder: Path) -> None:
    tokenizer = _tokenizer(folder, CHAT_TEMPLATE)
    encoder = PromptEncoder(tokenizer, _rules(new_tokens=8))
    found = encoder.encode(_example([("user", "say red"), ("assistant", " Red ")], [], []))
    assert found is not None
    assert not isinstance(found, BadRecord)
    assert tokenizer.decode(found.example.input_ids.tolist()) == "<s><|user|>\nsay red<|assistant|>\n"
    assert found.example.reference.tobytes().decode() == found.answer == "Red"


def test_a_prompt_leaves_room_for_the_completion(folder: Path) -> None:
    tokenizer = _tokenizer(folder)
    example = _example([("prompt", "abcdefghij" * 4)], [], [])
    refused = PromptEncoder(tokenizer, _rules(32, new_tokens=8)).encode(example)
    assert isinstance(refused, BadRecord)
    assert "more than the 24 that hyperparameters.maxSequenceLength leaves" in refused.problem
    cut = PromptEncoder(tokenizer, _rules(32, Truncation.TAIL, new_tokens=8)).encode(example)
    assert cut is not None
    assert not isinstance(cut, BadRecord)
    assert len(cut.example.input_ids) == 24
    assert tokenizer.decode(cut.example.input_ids.tolist()).endswith("fghij")
    assert cut.answer == ""
