"""Bad data: what is refused, what may be left out, and that everything is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.data import Encoded, load_dataset
from tests.train.data.making import make_tokenizer, run_file, write_rows

GOOD = [{"prompt": f"Question {k}?", "completion": f"Answer {k}."} for k in range(40)]


def load(inputs: Path, **changes: Any) -> Encoded:
    return load_dataset(run_file(**changes), inputs, make_tokenizer(), cache=inputs / "cache")


def refused(inputs: Path, **changes: Any) -> FinetuneError:
    with pytest.raises(FinetuneError) as caught:
        load(inputs, **changes)
    assert caught.value.failure_class == "DataInvalid"
    return caught.value


def test_all_bad_records_are_counted_and_the_first_twenty_shown_with_row_and_mend(tmp_path: Path) -> None:
    error = refused(write_rows(tmp_path, [*GOOD, *[{"prompt": "p", "completion": ""}] * 30]))
    text = str(error)
    assert text.startswith("30 of 70 records cannot be used, and every one must be usable. train.jsonl line 41: column")
    assert text.count("column 'completion' is empty") == 20 and "; and 10 more. " in text
    assert text.endswith("Give each record a text in 'completion'.")
    assert error.field == "spec.dataset.sources[0].uri"


def test_a_share_of_bad_records_may_be_left_out_and_is_counted(tmp_path: Path) -> None:
    rows = [*GOOD, {"prompt": "p", "completion": ""}, {"prompt": "p"}]
    inputs = write_rows(tmp_path, rows)
    encoded = load(inputs, maxBadShare=0.05)
    assert len(encoded.train) == 40
    assert encoded.stats.bad_records == 2
    assert encoded.stats.bad_rows == [
        "train.jsonl line 41: column 'completion' is empty",
        "train.jsonl line 42: there is no column 'completion'; there are prompt",
    ]
    error = refused(inputs, maxBadShare=0.04)
    assert "2 of 42 records cannot be used, and dataset.maxBadShare allows 0.04 of them" in str(error)


@pytest.mark.parametrize("split", [{}, {"validationFraction": 0.25}])
def test_bad_records_do_not_move_the_split(tmp_path: Path, split: dict[str, float]) -> None:
    clean = load(write_rows(tmp_path / "a", GOOD), **split)
    mixed = load(write_rows(tmp_path / "b", [{"prompt": "p"}, *GOOD]), maxBadShare=0.1, **split)
    for part in ("train", "validation"):
        ids = [[item.input_ids.tolist() for item in getattr(e, part)] for e in (clean, mixed)]
        assert ids[0] == ids[1]


def test_nothing_trains_where_every_record_is_bad_whatever_share_is_allowed(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path, [{"prompt": "p", "completion": ""}] * 5)
    assert "5 of 5 records cannot be used" in str(refused(inputs, maxBadShare=0.99))


def test_data_that_is_masked_completely_is_refused(tmp_path: Path) -> None:
    # The completion is so short that its first and only token is the first of the text, which nothing predicts.
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% endfor %}"
    inputs = write_rows(tmp_path, GOOD)
    with pytest.raises(FinetuneError, match="40 of 40 records cannot be used") as caught:
        load_dataset(run_file(), inputs, tokenizer, cache=tmp_path / "cache")
    assert "Correct the messages, or set dataset.promptTemplate" in str(caught.value)


def test_text_that_is_cut_is_counted_and_refused_above_a_set_share(tmp_path: Path) -> None:
    rows = [*GOOD, *[{"prompt": "p", "completion": "word " * 100}] * 10]
    inputs = write_rows(tmp_path, rows)
    encoded = load(inputs, truncation="Tail", max_sequence_length=64, maxCutShare=0.2)
    assert encoded.stats.cut == 10 and encoded.stats.cut_tokens > 1000
    error = refused(inputs, truncation="Tail", max_sequence_length=64, maxCutShare=0.19)
    assert "10 of 50 records are longer than they may be and lost" in str(error)
    assert error.field == "spec.dataset.maxCutShare"


def test_limits_of_source_and_target_cut_each_of_them_and_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "alpha " * 30, "completion": "beta " * 30}]
    inputs = write_rows(tmp_path, rows)
    whole = load(inputs).train[0]
    encoded = load(inputs, truncation="Tail", maxSourceTokens=12, maxTargetTokens=8)
    tokenizer = make_tokenizer()
    source = tokenizer.backend_tokenizer.encode(rows[0]["prompt"], add_special_tokens=False)
    target = tokenizer.backend_tokenizer.encode(rows[0]["completion"], add_special_tokens=False)
    asked = rows[0]["prompt"][: source.offsets[11][1]].strip()
    answer = rows[0]["completion"][: target.offsets[7][1]].strip()
    assert encoded.sample == f"User: {asked}\nAssistant:⟦ {answer}</s>⟧"
    assert encoded.stats.cut == 1
    assert encoded.stats.cut_tokens == len(source.ids) - 12 + len(target.ids) - 8
    assert len(encoded.train[0].input_ids) < len(whole.input_ids)
    error = refused(inputs, maxTargetTokens=8)
    assert f"message 2 (assistant) has {len(target.ids)} tokens, more than dataset.maxTargetTokens 8" in str(error)


def test_a_templates_prompt_keeps_the_words_that_ask_for_the_answer(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path, [{"prompt": "alpha " * 30, "completion": "beta"}])
    template = "{prompt}\nAnswer: {completion}"
    encoded = load(inputs, promptTemplate=template, truncation="Tail", maxSourceTokens=20)
    assert encoded.sample.endswith("\nAnswer: ⟦beta</s>⟧") and encoded.sample.count("alpha") < 10


def test_test_records_are_apart_from_validation_and_training(tmp_path: Path) -> None:
    encoded = load(write_rows(tmp_path, GOOD * 2), validationFraction=0.2, testFraction=0.1)
    parts = [{item.input_ids.tobytes() for item in part} for part in (encoded.train, encoded.validation, encoded.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert [len(encoded.train), len(encoded.validation), len(encoded.test)] == [56, 16, 8]
    assert (encoded.stats.validation_records, encoded.stats.test_records) == (16, 8)
    # What the model is asked in the end comes from the test records.
    assert len(encoded.held_out_prompts) == 8


def test_a_test_source_of_its_own_is_used_whole(tmp_path: Path) -> None:
    write_rows(tmp_path, GOOD)
    write_rows(tmp_path, GOOD[:3], "test")
    encoded = load(tmp_path, test={"uri": "s3://team/t", "access": {}})
    assert (len(encoded.train), len(encoded.test)) == (40, 3)


def test_bad_records_of_a_held_out_source_name_its_field(tmp_path: Path) -> None:
    write_rows(tmp_path, GOOD)
    write_rows(tmp_path, [{"prompt": "p"}], "test")
    error = refused(tmp_path, test={"uri": "s3://team/t", "access": {}})
    assert error.field == "spec.dataset.test.source.uri" and "1 of 1 record cannot be used" in str(error)


def test_a_label_or_tag_that_is_wrong_is_told_with_its_row(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ann", "left"], "tags": tags} for tags in (["B-PER", "O"], ["O", "I-PER"])]
    inputs = write_rows(tmp_path, rows)
    document = run_file(format="Tags").to_json()
    document["model"]["task"] = "TokenClassification"
    run = type(run_file()).from_json(document)
    with pytest.raises(FinetuneError) as caught:
        load_dataset(run, inputs, make_tokenizer(), cache=tmp_path / "cache")
    assert "train.jsonl line 2: tag 2 is 'I-PER', but the tag before it is 'O'" in str(caught.value)
    assert json.loads(json.dumps(str(caught.value))).endswith("Begin an entity with B-PER.")


def test_a_number_or_a_label_that_never_ends_is_a_bad_record(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path / "numbers", GOOD[:2])
    with (inputs / "data/0/train.jsonl").open("a") as file:
        file.write('{"prompt": ' + "1" * 5000 + "}\n")
    assert "train.jsonl line 3: a number of more digits than Python reads" in str(refused(inputs))
    rows = [{"text": f"text {k}", "label": "9" * 300 if k == 2 else str(k)} for k in range(4)]
    document = run_file(format="Labels").to_json()
    document["model"]["task"] = "SequenceClassification"
    inputs = write_rows(tmp_path / "labels", rows)
    with pytest.raises(FinetuneError) as caught:
        load_dataset(type(run_file()).from_json(document), inputs, make_tokenizer(), cache=tmp_path / "cache")
    assert "train.jsonl line 3: column 'label' has 300 characters" in str(caught.value)
