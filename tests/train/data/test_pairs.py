"""Preferences: pairs with and without a prompt, and judged completions."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import Columns, DataFormat, ObjectiveType
from finetune_trainer.data.detect import resolve_shape
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.reader import ExampleReader
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.split import rank_of


def read(
    *rows: dict[str, Any], objective: ObjectiveType = ObjectiveType.DPO, template: str | None = None
) -> list[Example | BadRecord]:
    reader = ExampleReader(None, None, template, objective=objective)
    return list(reader.read(Record("dataset.sources[0].uri", "t.jsonl", k, row) for k, row in enumerate(rows, 1)))


def only(*rows: dict[str, Any], **options: Any) -> Example:
    (found,) = read(*rows, **options)
    assert isinstance(found, Example), found
    return found


ASK, GOOD, BAD = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "assistant", "content": "No."},
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": "Why?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score": 3},
    ],
)
def test_a_pair_is_a_prompt_and_two_ways_to_go_on_however_it_is_written(row: dict[str, Any]) -> None:
    example = only(row)
    assert example.turns == (Turn("user", "Why?"),)
    assert (example.chosen, example.rejected) == ((Turn("assistant", "So."),), (Turn("assistant", "No."),))


def test_texts_without_a_prompt_share_their_beginning_up_to_a_whole_word() -> None:
    example = only({"chosen": "\n\nHuman: Why?\n\nAssistant: Sorry", "rejected": "\n\nHuman: Why?\n\nAssistant: Sober"})
    assert example.turns == (Turn("prompt", "\n\nHuman: Why?\n\nAssistant: "),)
    assert (example.chosen, example.rejected) == ((Turn("completion", "Sorry"),), (Turn("completion", "Sober"),))


def test_a_conversation_of_several_turns_is_the_prompt() -> None:
    more = {"role": "user", "content": "Really?"}
    example = only({"chosen": [ASK, GOOD, more, GOOD], "rejected": [ASK, GOOD, more, BAD]})
    assert [turn.role for turn in example.turns] == ["user", "assistant", "user"]
    assert (example.chosen, example.rejected) == ((Turn("assistant", "So."),), (Turn("assistant", "No."),))


def test_a_template_gives_the_prompt_and_both_completions() -> None:
    row = {"question": "Why?", "chosen": "So.", "rejected": "No."}
    example = only(row, template="Q: {question}\nA: {chosen}")
    assert example.turns == (Turn("prompt", "Q: Why?\nA: "),)
    assert (example.chosen, example.rejected) == ((Turn("completion", "So."),), (Turn("completion", "No."),))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"prompt": "p", "chosen": "a"}, "there is no column 'rejected'; there are prompt, chosen"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "column 'rejected' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "column 'rejected' is a number, not text"),
        (
            {"chosen": "Yes it is", "rejected": "No it is not"},
            "there is no column 'prompt', and the two completions do not begin with one prompt",
        ),
        (
            {"chosen": [GOOD], "rejected": [BAD]},
            "chosen and rejected have no message of the user in common, so there is no prompt",
        ),
        ({"chosen": [ASK, GOOD], "rejected": [ASK, ASK]}, "rejected does not end with the assistant"),
    ],
)
def test_an_unusable_pair_says_what_is_wrong(row: dict[str, Any], problem: str) -> None:
    first = {"prompt": "p", "chosen": "a", "rejected": "b"}
    _, bad = read(first, row)
    assert isinstance(bad, BadRecord) and bad.problem == problem
    assert bad.where == "t.jsonl line 2" and bad.mend


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), ("true", True), (0, False), ("no", False)])
def test_kto_reads_one_completion_and_whether_it_is_good(label: object, good: bool) -> None:
    example = only({"prompt": "Why?", "completion": "So.", "label": label}, objective=ObjectiveType.KTO)
    said = (Turn("assistant", "So."),)
    assert example.turns == (Turn("user", "Why?"),)
    assert (example.chosen, example.rejected) == ((said, ()) if good else ((), said))
    assert example.label == ("true" if good else "false")


def test_kto_takes_a_pair_as_a_good_and_a_bad_completion() -> None:
    good, bad = read({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, objective=ObjectiveType.KTO)
    assert isinstance(good, Example) and isinstance(bad, Example)
    assert (good.label, good.chosen, good.rejected) == ("true", (Turn("assistant", "So."),), ())
    assert (bad.label, bad.chosen, bad.rejected) == ("false", (), (Turn("assistant", "No."),))


def test_a_verdict_that_is_neither_true_nor_false_is_told() -> None:
    rows = [{"prompt": "p", "completion": "c", "label": value} for value in (True, "maybe")]
    _, bad = read(*rows, objective=ObjectiveType.KTO)
    assert isinstance(bad, BadRecord) and bad.problem == "column 'label' is 'maybe', neither true nor false"


def test_columns_of_ones_own_are_mapped() -> None:
    columns = Columns(prompt="q", chosen="better", rejected="worse")
    shape = resolve_shape(None, columns, None, {"q": "a", "better": "b", "worse": "c"}, objective=ObjectiveType.ORPO)
    assert shape.format is DataFormat.PREFERENCE
    assert shape.reason == "read as Preference because the first record has the columns better and worse"
    assert shape.columns == {"prompt": "q", "chosen": "better", "rejected": "worse"}


def test_data_that_has_no_pairs_says_what_the_objective_needs() -> None:
    with pytest.raises(FinetuneError) as caught:
        read({"prompt": "a", "completion": "b"}, objective=ObjectiveType.DPO)
    assert str(caught.value).startswith(
        "The data does not fit the objective: the first record has the columns prompt, completion, which looks like "
        "PromptCompletion, but objective DPO needs Preference (chosen, rejected)."
    )
    assert (caught.value.failure_class, caught.value.field) == ("DataInvalid", "spec.dataset.columns")


def test_both_completions_of_a_prompt_are_on_one_side_of_a_split() -> None:
    good, bad = read({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, objective=ObjectiveType.KTO)
    (other,) = read({"prompt": "How?", "completion": "So.", "label": True}, objective=ObjectiveType.KTO)
    ranks = [rank_of(example, 7) for example in (good, bad, other) if isinstance(example, Example)]
    assert ranks[0] == ranks[1] != ranks[2]
