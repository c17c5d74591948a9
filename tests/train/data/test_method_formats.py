"""Which formats go with which objective and task, and the records of classifiers, taggers and prompts."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import DataFormat, ObjectiveType, Task
from finetune_trainer.data.detect import resolve_shape
from finetune_trainer.data.examples import to_example
from finetune_trainer.data.formats import Example, Turn, fitting_formats
from finetune_trainer.data.records import BadRecord, Record

SEQUENCE, TOKEN = Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION


def convert(
    fields: dict[str, Any],
    *,
    objective: ObjectiveType = ObjectiveType.SUPERVISED,
    task: Task = Task.CAUSAL_LM,
    template: str | None = None,
    format: DataFormat | None = None,
) -> tuple[str, Example | BadRecord]:
    shape = resolve_shape(format, None, template, fields, objective=objective, task=task)
    return shape.format.value, to_example(Record("dataset.sources[0].uri", "t.jsonl", 1, fields), shape)


def test_every_objective_and_task_has_a_format() -> None:
    for objective in ObjectiveType:
        for task in Task:
            assert fitting_formats(objective, task)


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        (
            SEQUENCE,
            {"question": "q", "answer": "a"},
            r"QuestionAnswer, but a SequenceClassification model needs Labels",
        ),
        (TOKEN, {"text": "t", "label": "x"}, r"TokenClassification model needs Tags \(tokens, tags\)"),
        (Task.MASKED_LM, {"prompt": "p", "completion": "c"}, r"a MaskedLM model needs Text \(text\)"),
        (Task.SEQ2SEQ, {"messages": []}, r"looks like Messages, but a Seq2Seq model needs Alpaca"),
    ],
)
def test_data_that_does_not_fit_the_task_says_what_it_needs(task: Task, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneError, match=message) as caught:
        convert(fields, task=task)
    assert caught.value.failure_class == "DataInvalid"


def test_a_format_that_does_not_fit_is_an_error_of_the_spec() -> None:
    with pytest.raises(
        FinetuneError, match=r"dataset.format Labels does not fit: objective GRPO needs Messages"
    ) as caught:
        convert({"text": "t"}, objective=ObjectiveType.GRPO, format=DataFormat.LABELS)
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.dataset.format")


@pytest.mark.parametrize(("label", "name"), [("spam", "spam"), (1, "1"), (2.0, "2"), (True, "true"), (" a b ", "a b")])
def test_a_label_is_a_text_or_a_whole_number(label: object, name: str) -> None:
    format, example = convert({"text": "Buy!", "label": label}, task=SEQUENCE)
    assert format == "Labels" and isinstance(example, Example)
    assert (example.turns, example.label) == ((Turn("text", "Buy!"),), name)


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (1.5, "column 'label' is a fraction, not the name of a class"),
        (None, "column 'label' is null, not the name of a class"),
        (["a", "b"], "column 'label' is a list, not the name of a class"),
        (" ", "column 'label' is empty"),
    ],
)
def test_what_is_no_label_is_told(label: object, problem: str) -> None:
    _, bad = convert({"text": "Buy!", "label": label}, task=SEQUENCE)
    assert isinstance(bad, BadRecord) and bad.problem == problem


def test_text_and_label_are_plain_text_for_a_model_that_writes() -> None:
    format, example = convert({"text": "Buy!", "label": "spam"})
    assert format == "Text" and isinstance(example, Example) and example.label is None


def test_a_template_puts_the_text_to_be_classified_together() -> None:
    fields = {"premise": "It rains.", "claim": "It is wet.", "label": 1}
    _, example = convert(fields, task=SEQUENCE, template="{premise} Therefore: {claim}")
    assert isinstance(example, Example)
    assert (example.turns, example.label) == ((Turn("text", "It rains. Therefore: It is wet."),), "1")
    with pytest.raises(FinetuneError, match=r"shows the label \{label\}, which is what the model has to find"):
        convert(fields, task=SEQUENCE, template="{premise} {label}")


def test_a_template_with_the_label_last_teaches_a_writing_model_to_classify() -> None:
    format, example = convert({"text": "Late!", "label": "complaint"}, template="Tweet text : {text} Label : {label}")
    assert format == "PromptCompletion" and isinstance(example, Example)
    assert example.turns == (Turn("prompt", "Tweet text : Late! Label : "), Turn("completion", "complaint"))


@pytest.mark.parametrize("columns", [("tokens", "tags"), ("words", "ner_tags")])
def test_words_and_tags_are_lists_or_texts(columns: tuple[str, str]) -> None:
    for words, tags in ((["Ann", "left"], ["B-PER", "O"]), ("Ann left", "B-PER O")):
        format, example = convert({columns[0]: words, columns[1]: tags}, task=TOKEN)
        assert format == "Tags" and isinstance(example, Example)
        assert (example.words, example.tags) == (("Ann", "left"), ("B-PER", "O"))


@pytest.mark.parametrize(
    ("tags", "problem", "mend"),
    [
        (["B-PER"], "2 words, but 1 tags", "Give each word one tag."),
        (["O", "PER"], "tag 2 is 'PER'", "Write tags as O, B-<type> for the first word of an entity, I-<type>."),
        (["O", "I-PER"], "tag 2 is 'I-PER', but the tag before it is 'O'", "Begin an entity with B-PER."),
        (["B-LOC", "I-PER"], "tag 2 is 'I-PER', but the tag before it is 'B-LOC'", "Begin an entity with B-PER."),
        (
            [0, 1],
            "item 1 of column 'tags' is a number, not text",
            "Write the names of the tags in 'tags', such as O, B-PER, I-PER, not their numbers.",
        ),
        ([], "column 'tags' is empty", "Give each record a list of texts in 'tags'."),
    ],
)
def test_a_broken_tag_says_which_and_how_to_mend_it(tags: list[Any], problem: str, mend: str) -> None:
    _, bad = convert({"tokens": ["Ann", "left"], "tags": tags}, task=TOKEN)
    assert isinstance(bad, BadRecord) and (bad.problem, bad.mend) == (problem, mend)


@pytest.mark.parametrize(
    ("fields", "format", "turns"),
    [
        ({"prompt": "Why?"}, "PromptCompletion", (Turn("user", "Why?"),)),
        ({"question": "Why?"}, "QuestionAnswer", (Turn("user", "Why?"),)),
        ({"question": "Why?", "answer": "So."}, "QuestionAnswer", (Turn("user", "Why?"), Turn("assistant", "So."))),
        ({"instruction": "Add", "input": "1 2"}, "Alpaca", (Turn("user", "Add\n\n1 2"),)),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "Messages", (Turn("user", "Why?"),)),
    ],
)
@pytest.mark.parametrize("objective", [ObjectiveType.PPO, ObjectiveType.GRPO])
def test_a_prompt_needs_no_completion_where_the_model_answers_itself(
    objective: ObjectiveType, fields: dict[str, Any], format: str, turns: tuple[Turn, ...]
) -> None:
    found, example = convert(fields, objective=objective)
    assert found == format and isinstance(example, Example) and example.turns == turns


def test_a_template_may_leave_the_completion_out_where_the_model_answers_itself() -> None:
    fields = {"question": "Why?", "answer": "So."}
    _, example = convert(fields, objective=ObjectiveType.GRPO, template="Q: {question} A:")
    assert isinstance(example, Example) and example.turns == (Turn("prompt", "Q: Why? A:"),)
    _, example = convert(fields, objective=ObjectiveType.GRPO, template="Q: {question} A: {answer}")
    assert isinstance(example, Example)
    assert example.turns == (Turn("prompt", "Q: Why? A: "), Turn("completion", "So."))
    with pytest.raises(FinetuneError, match=r"shows the wished completion \{answer\} in the prompt"):
        convert(fields, objective=ObjectiveType.GRPO, template="{answer} to {question}?")


def test_share_gpt_knows_the_roles_of_others() -> None:
    said = [("system", "s"), ("human", "q"), ("function_call", "f()"), ("observation", "3"), ("gpt", "Three.")]
    _, example = convert({"conversations": [{"from": who, "value": text} for who, text in said]})
    assert isinstance(example, Example)
    assert [turn.role for turn in example.turns] == ["system", "user", "assistant", "tool", "assistant"]


def test_a_broken_share_gpt_record_says_which_message() -> None:
    for message, problem in (
        ({"from": "critic", "value": "x"}, "message 2 has the role 'critic'"),
        ({"from": "gpt", "value": None}, "the content of message 2 (gpt) is null, not text"),
        ("hello", "message 2 has the role 'None'"),
    ):
        _, bad = convert({"conversations": [{"from": "human", "value": "q"}, message]})
        assert isinstance(bad, BadRecord) and bad.problem == problem
