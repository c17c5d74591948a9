"""The main flow: from files to encoded examples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.data import Encoded, load_dataset
from finetune_trainer.data.encode import IGNORED
from tests.train.data.making import CHATML, make_tokenizer, run_file, write_rows

TOKENIZER = make_tokenizer()
ROWS = [{"prompt": f"Question {k}?", "completion": f"Answer {k}."} for k in range(20)]


def load(inputs: Path, **changes: object) -> Encoded:
    sources = int(str(changes.pop("sources", 1)))
    return load_dataset(run_file(sources=sources, **changes), inputs, TOKENIZER, cache=inputs / "cache")


def texts(examples: list[object]) -> set[str]:
    return {TOKENIZER.decode(example.input_ids) for example in examples}  # type: ignore[attr-defined]


def test_records_come_out_as_int32_arrays_with_the_loss_on_the_answer(tmp_path: Path) -> None:
    encoded = load(write_rows(tmp_path, ROWS))
    first = encoded.train[0]
    assert (first.input_ids.dtype, first.labels.dtype) == (np.int32, np.int32)
    assert TOKENIZER.decode(first.input_ids) == "User: Question 0?\nAssistant: Answer 0.</s>"
    assert encoded.sample == "User: Question 0?\nAssistant:⟦ Answer 0.</s>⟧"
    assert len(encoded.train) == 20 and encoded.validation == [] and encoded.held_out_prompts == []


def test_statistics_say_what_became_of_the_data(tmp_path: Path) -> None:
    encoded = load(write_rows(tmp_path, ROWS), validationFraction=0.1)
    stats = encoded.stats.to_json()
    tokens = sum(len(example.input_ids) for example in encoded.train)
    loss = sum(int((example.labels != IGNORED).sum()) for example in encoded.train)
    assert stats == {
        "format": "PromptCompletion",
        "formatReason": "set by dataset.format",
        "promptForm": "plain (User: … Assistant: …)",
        "trainRecords": 18,
        "validationRecords": 2,
        "testRecords": 0,
        "trainTokens": tokens,
        "lossTokens": loss,
        "longestTokens": max(len(example.input_ids) for example in encoded.train),
        "cut": 0,
        "cutTokens": 0,
        "leftOut": 0,
        "badRecords": 0,
        "badRows": [],
        "recordsBySource": {"s3://team/d0": 18},
        "packing": "",
    }


def test_the_split_is_fixed_by_seed_and_content_and_not_by_file_order(tmp_path: Path) -> None:
    one = load(write_rows(tmp_path / "a", ROWS), validationFraction=0.25)
    two = load(write_rows(tmp_path / "b", ROWS[::-1], name="other.jsonl"), validationFraction=0.25)
    other = load(write_rows(tmp_path / "c", ROWS), validationFraction=0.25, seed=8)
    assert len(one.validation) == 5 and len(one.train) == 15
    assert texts(one.validation) == texts(two.validation) and texts(one.validation) != texts(other.validation)
    assert not texts(one.validation) & texts(one.train)


def test_equal_records_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    for seed in range(10):
        encoded = load(write_rows(tmp_path, ROWS[:4] * 3), validationFraction=0.3, seed=seed)
        assert not texts(encoded.validation) & texts(encoded.train)
        assert (
            len(encoded.validation) == 6
        )  # two of four, three times each: the share of 3.6 rounded up to whole groups


def test_held_out_prompts_end_where_the_answer_begins(tmp_path: Path) -> None:
    encoded = load(write_rows(tmp_path, ROWS), validationFraction=0.25)
    assert len(encoded.held_out_prompts) == 5
    prompt = encoded.held_out_prompts[0]
    number = prompt.prompt.split()[1].rstrip("?")
    assert prompt.prompt == f"Question {number}?" and prompt.reference == f"Answer {number}."
    assert TOKENIZER.decode(prompt.prompt_ids) == f"User: Question {number}?\nAssistant:"
    assert prompt.origin == f"train.jsonl line {int(number) + 1}"


def test_own_validation_files_are_used_whole(tmp_path: Path) -> None:
    write_rows(tmp_path, ROWS)
    write_rows(tmp_path, [{"prompt": "Held?", "completion": "Out."}], "validation")
    encoded = load(tmp_path, validation={"uri": "s3://team/v", "access": {}})
    assert len(encoded.train) == 20
    assert texts(encoded.validation) == {"User: Held?\nAssistant: Out.</s>"}


def test_sources_are_mixed_by_weight_and_the_same_way_each_time(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"prompt": "a", "completion": str(k)} for k in range(30)], 0)
    write_rows(tmp_path, [{"prompt": "b", "completion": str(k)} for k in range(10)], 1)
    encoded = load(tmp_path, sources=2, weights=[1.0, 3.0])
    from_a = [e for e in encoded.train if TOKENIZER.decode(e.input_ids).startswith("User: a")]
    assert (len(from_a), len(encoded.train)) == (10, 40)
    again = load(tmp_path, sources=2, weights=[1.0, 3.0])
    assert [e.input_ids.tolist() for e in again.train] == [e.input_ids.tolist() for e in encoded.train]


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    inputs = write_rows(tmp_path, [{"messages": messages}])
    tokenizer = make_tokenizer(chat_template=CHATML)
    encoded = load_dataset(run_file(format="Messages"), inputs, tokenizer)
    assert encoded.sample == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧"
    assert encoded.stats.prompt_form == "the model's chat template"


def test_a_prompt_template_takes_the_place_of_the_chat_template(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path, [{"question": "Who?", "answer": "Me."}])
    run = run_file(format="QuestionAnswer", promptTemplate="<human>: {question}\n<assistant>: {answer}")
    encoded = load_dataset(run, inputs, make_tokenizer(chat_template=CHATML))
    assert encoded.sample.replace("⟦", "").replace("⟧", "") == "<human>: Who?\n<assistant>: Me.</s>"
    assert encoded.sample.endswith("Me.</s>⟧") and "Who" not in encoded.sample.split("⟦")[1]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_data_is_refused(tmp_path: Path, content: str) -> None:
    write_rows(tmp_path, [])
    (tmp_path / "data" / "0" / "train.jsonl").write_text(content)
    with pytest.raises(FinetuneError, match=r"dataset.sources\[0\].uri holds no record") as caught:
        load(tmp_path)
    assert (caught.value.failure_class, caught.value.field) == ("DataInvalid", "spec.dataset.sources[0].uri")


def test_one_broken_line_refuses_the_data_and_names_the_line(tmp_path: Path) -> None:
    write_rows(tmp_path, ROWS)
    path = tmp_path / "data" / "0" / "train.jsonl"
    path.write_text(path.read_text().replace('"Question 4?"', '"Question 4?'))
    with pytest.raises(FinetuneError, match=r"1 of 20 records .* train.jsonl line 5: not valid JSON at column"):
        load(tmp_path)


def test_a_missing_column_refuses_the_data_and_names_the_columns(tmp_path: Path) -> None:
    write_rows(tmp_path, [*ROWS, {"prompt": "p", "reply": "r"}])
    with pytest.raises(FinetuneError, match="line 21: there is no column 'completion'; there are prompt, reply"):
        load(tmp_path)


def test_records_that_are_too_long_are_refused_unless_they_may_be_cut(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "p", "completion": "word " * 100}]
    inputs = write_rows(tmp_path, rows)
    with pytest.raises(
        FinetuneError, match=r"1 of 21 records .* line 21: .* more than hyperparameters.maxSequenceLength 64"
    ):
        load(inputs, max_sequence_length=64)
    encoded = load(inputs, max_sequence_length=64, truncation="Tail")
    assert max(len(example.input_ids) for example in encoded.train) == 64
    assert encoded.stats.cut == 1 and encoded.stats.cut_tokens > 100


def test_data_of_which_the_cut_leaves_nothing_is_refused(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path, ROWS)
    with pytest.raises(FinetuneError, match="20 of 20 training records have nothing left to learn") as caught:
        load(inputs, max_sequence_length=8, truncation="Tail")
    assert caught.value.field == "spec.hyperparameters.maxSequenceLength"


def test_a_few_records_without_anything_left_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*ROWS * 2, {"prompt": "word " * 100, "completion": "x"}]
    encoded = load(write_rows(tmp_path, rows), max_sequence_length=64, truncation="Tail")
    assert encoded.stats.left_out == 1 and len(encoded.train) == 40


def test_a_split_of_one_record_is_refused(tmp_path: Path) -> None:
    inputs = write_rows(tmp_path, ROWS[:1] * 5)
    with pytest.raises(FinetuneError, match="needs at least 2 different records, but there are 1"):
        load(inputs, validationFraction=0.5)


def test_data_sources_and_preflight_import_no_heavy_library() -> None:
    code = (
        "import json, sys; import finetune_trainer.data, finetune_trainer.sources, finetune_trainer.preflight.__main__; "
        "print(json.dumps([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy') if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert json.loads(done.stdout) == []
