"""Formats, their detection, columns and the prompt template."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import Columns, DataFormat, ObjectiveType, Task
from finetune_trainer.data.detect import resolve_shape
from finetune_trainer.data.examples import to_example
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.template import parse_braces

USER_ASSISTANT = (Turn("user", "Why?"), Turn("assistant", "So."))


def convert(
    fields: dict[str, Any],
    format: DataFormat | None = None,
    columns: Columns | None = None,
    template: str | None = None,
    objective: ObjectiveType = ObjectiveType.SUPERVISED,
    task: Task = Task.CAUSAL_LM,
) -> tuple[str, str, Example | BadRecord]:
    shape = resolve_shape(format, columns, template, fields, objective=objective, task=task)
    return shape.format.value, shape.reason, to_example(Record("dataset.sources[0].uri", "t.jsonl", 1, fields), shape)


@pytest.mark.parametrize(
    ("fields", "format", "reason", "turns"),
    [
        (
            {"question": "Why?", "answer": "So.", "id": 3},
            "QuestionAnswer",
            "read as QuestionAnswer because the first record has the columns question and answer",
            USER_ASSISTANT,
        ),
        (
            {"prompt": "Why?", "completion": "So."},
            "PromptCompletion",
            "read as PromptCompletion because the first record has the columns prompt and completion",
            USER_ASSISTANT,
        ),
        (
            {"instruction": "Why?", "input": "", "output": "So."},
            "Alpaca",
            "read as Alpaca because the first record has the columns instruction and output",
            USER_ASSISTANT,
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "Alpaca",
            "read as Alpaca because the first record has the columns instruction and output",
            (Turn("user", "Add\n\n1 2"), Turn("assistant", "3")),
        ),
        (
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
            "Messages",
            "read as Messages because the first record has the column messages",
            USER_ASSISTANT,
        ),
        (
            {"text": "Once."},
            "Text",
            "read as Text because the first record has the column text",
            (Turn("text", "Once."),),
        ),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            "ShareGPT",
            "read as ShareGPT because the first record has the column conversations",
            USER_ASSISTANT,
        ),
    ],
)
def test_the_format_is_told_from_the_columns_with_the_reason(
    fields: dict[str, Any], format: str, reason: str, turns: tuple[Turn, ...]
) -> None:
    found, why, example = convert(fields)
    assert (found, why) == (format, reason)
    assert isinstance(example, Example) and example.turns == turns


def test_own_column_names_are_mapped() -> None:
    columns = Columns(prompt="frage", completion="antwort")
    format, _, example = convert({"frage": "Why?", "antwort": "So."}, columns=columns)
    assert format == "PromptCompletion"
    assert isinstance(example, Example) and example.turns == USER_ASSISTANT


def test_columns_that_fit_no_format_are_listed_with_what_is_known() -> None:
    with pytest.raises(
        FinetuneError,
        match=r"columns source, target, but a CausalLM model needs .*QuestionAnswer \(question, answer\)",
    ) as e:
        convert({"source": "a", "target": "b"})
    assert (e.value.failure_class, e.value.field) == ("DataInvalid", "spec.dataset.columns")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"question": "Why?"}, "there is no column 'answer'; there are question"),
        ({"question": "Why?", "answer": " \n"}, "column 'answer' is empty"),
        ({"question": "Why?", "answer": None}, "column 'answer' is null, not text"),
        ({"question": ["Why?"], "answer": "So."}, "column 'question' is a list, not text"),
        ({"question": 4, "answer": "So."}, "column 'question' is a number, not text"),
    ],
)
def test_an_unusable_record_says_which_column_and_why(fields: dict[str, Any], problem: str) -> None:
    _, _, bad = convert(fields, DataFormat.QUESTION_ANSWER)
    assert isinstance(bad, BadRecord) and bad.problem == problem
    assert repr(problem.split("'")[1]) in bad.mend


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages is an empty list"),
        ("hello", "messages is text, not a list of messages"),
        ([{"role": "critic", "content": "a"}], "message 1 has the role 'critic'"),
        ([{"role": "user", "content": None}], "the content of message 1 (user) is null, not text"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}],
            "the content of message 2 (assistant) is empty",
        ),
        ([{"role": "user", "content": "a"}], "no message of the assistant, so there is nothing to learn"),
    ],
)
def test_a_broken_conversation_says_which_message(messages: Any, problem: str) -> None:
    _, _, bad = convert({"messages": messages}, DataFormat.MESSAGES)
    assert isinstance(bad, BadRecord) and bad.problem == problem


def test_a_template_is_filled_and_split_before_its_last_column() -> None:
    fields = {"question": "Why?", "answer": "So.", "n": 4}
    format, reason, example = convert(fields, template="{{{n}}} <human>: {question}\n<assistant>: {answer}")
    assert (format, reason) == (
        "QuestionAnswer",
        "read as QuestionAnswer because the first record has the columns question and answer",
    )
    assert isinstance(example, Example)
    assert example.turns == (Turn("prompt", "{4} <human>: Why?\n<assistant>: "), Turn("completion", "So."))


def test_a_template_alone_says_which_column_is_the_completion() -> None:
    format, reason, example = convert({"source": "a", "target": "b"}, template="{source} => {target}")
    assert (format, reason) == (
        "PromptCompletion",
        "read as PromptCompletion because dataset.promptTemplate ends with {target}",
    )
    assert isinstance(example, Example) and example.turns == (Turn("prompt", "a => "), Turn("completion", "b"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question} {reply}", "names the column 'reply', but the data has question, answer"),
        ("{answer} to {question}", r"ends with \{question\}, but the completion \{answer\} has to come last"),
        ("{question}: {answer} END", r"has the text 'END' after \{answer\}"),
        ("{question} {answer} {answer}", "shows the completion .* in the prompt too"),
        ("no column", "names no column"),
        ('{"q": {question}}', "has a lone '{' at character 1"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(template: str, message: str) -> None:
    with pytest.raises(FinetuneError, match=message) as caught:
        convert({"question": "q", "answer": "a"}, DataFormat.QUESTION_ANSWER, template=template)
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.dataset.promptTemplate")


def test_a_template_reads_names_only_and_never_attributes() -> None:
    template = parse_braces("{question.__class__}: {answer!r}")
    assert template.columns == ("question.__class__", "answer!r")


def test_a_template_is_refused_for_conversations() -> None:
    with pytest.raises(FinetuneError, match="cannot be used with Messages"):
        convert({"messages": [], "answer": "a"}, DataFormat.MESSAGES, template="{answer}")
