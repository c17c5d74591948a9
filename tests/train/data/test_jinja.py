"""Jinja templates of a dataset: when a text is one, how it is split, and what it cannot do."""

from __future__ import annotations

import time
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_api.job import Columns, DataFormat
from finetune_trainer.data.detect import resolve_shape
from finetune_trainer.data.examples import to_example
from finetune_trainer.data.formats import Example
from finetune_trainer.data.records import BadRecord, Record

ROW = {"question": "Why?", "answer": "So.", "context": "It is.", "n": 3, "tags": ["a", "b"], "none": None}


def fill(template: str, fields: dict[str, Any] = ROW, columns: Columns | None = None) -> Example | BadRecord:
    shape = resolve_shape(None, columns, template, fields)
    return to_example(Record("dataset.sources[0].uri", "t.jsonl", 1, fields), shape)


def turns(template: str, fields: dict[str, Any] = ROW) -> list[tuple[str, str]]:
    example = fill(template, fields)
    assert isinstance(example, Example), example
    return [(turn.role, turn.text) for turn in example.turns]


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        ("{{ question }}\n{{ answer }}", "Why?\n", "So."),
        ("{% if context %}{{ context }} {% endif %}{{ question }} {{ answer | trim }}\n", "It is. Why? ", "So."),
        ("{{ question | upper }}: {{ tags | join(', ') }} {{ n + 1 }} {{ answer }}", "WHY?: a, b 4 ", "So."),
        ("{% for tag in tags %}[{{ tag }}]{% endfor %} {{ question.strip('?') }} {{ answer }}", "[a][b] Why ", "So."),
        ("{{ question }} {% if missing is defined %}!{% endif %}{{ answer }}", "Why? ", "So."),
    ],
)
def test_a_jinja_template_is_split_before_the_completion(template: str, prompt: str, completion: str) -> None:
    assert turns(template) == [("prompt", prompt), ("completion", completion)]


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ('{{"q": "{question}"}} {answer}', '{"q": "Why?"} '),
        ("{{ }} {question} {answer}", "{ } Why? "),
        ("{{unknown}} {question} {answer}", "{unknown} Why? "),
    ],
)
def test_doubled_braces_stay_braces_where_the_text_is_no_jinja_or_names_no_column(template: str, prompt: str) -> None:
    assert turns(template) == [("prompt", prompt), ("completion", "So.")]


def test_the_last_expression_is_the_completion_of_columns_of_ones_own() -> None:
    assert turns("{{ source }} => {{ target }}", {"source": "a", "target": "b"}) == [
        ("prompt", "a => "),
        ("completion", "b"),
    ]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ answer }} to {{ question }}", r"ends with \{question\}, but the completion \{answer\} has to come last"),
        ("{{ question }} {{ answer }} END", r"has the text 'END' after \{answer\}"),
        ("{{ question }} {{ answer }} {{ answer }}", "shows the completion .* in the prompt too"),
        ("{{ question }} {% if n %}{{ answer }}{% endif %}", "ends with something that is no column"),
        ("{{ question }} {answer}", r"ends with \{question\}, but the completion \{answer\} has to come last"),
    ],
)
def test_a_completion_that_does_not_come_last_is_refused(template: str, message: str) -> None:
    with pytest.raises(FinetuneError, match=message) as caught:
        resolve_shape(DataFormat.QUESTION_ANSWER, None, template, {"question": "Why?", "answer": "So.", "n": 1})
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", "spec.dataset.promptTemplate")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ question }}{{ other }} {{ answer }}", "names a column that is not there: 'other' is undefined"),
        ("{{ question }}{{ none }} {{ answer }}", "it prints null; use a filter such as join or tojson"),
        ("{{ question }}{{ tags }} {{ answer }}", "it prints a list; use a filter such as join or tojson"),
    ],
)
def test_a_record_that_cannot_be_filled_in_is_told(template: str, problem: str) -> None:
    bad = fill(template)
    assert isinstance(bad, BadRecord) and problem in bad.problem


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__[1].__subclasses__() }} {{ answer }}",
        "{{ ''.__class__ }}{{ question }} {{ answer }}",
        "{{ question }}{{ self.__init__.__globals__ }} {{ answer }}",
        "{{ question }}{{ tags.append('c') }} {{ answer }}",
        "{{ question }}{% include 'etc/passwd' %} {{ answer }}",
        "{{ question.format(n) }} {{ answer }}",
    ],
)
def test_a_template_reaches_nothing_but_its_record(template: str) -> None:
    bad = fill(template, dict(ROW))
    assert isinstance(bad, BadRecord) and bad.problem.startswith("dataset.promptTemplate")
    assert ROW["tags"] == ["a", "b"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ question * 1000000000 }} {{ answer }}",
        "{% for i in range(1000000000) %}{{ question }}{% endfor %} {{ answer }}",
        "{{ question.ljust(1000000000) }} {{ answer }}",
        "{{ question | center(1000000000) }} {{ answer }}",
        "{{ '%1000000000d' % n }}{{ question }} {{ answer }}",
        "{{ question }}{{ 9 ** 999999999 }} {{ answer }}",
        "{% set a = question %}" + "{% set a = a ~ a %}" * 40 + "{{ a }} {{ answer }}",
        "{{ question" + " | list | join(question)" * 20 + " }} {{ answer }}",
        "{{ question.replace('h', question) }} {{ answer }}",
    ],
)
def test_a_template_cannot_grow_beyond_its_record(template: str) -> None:
    began = time.monotonic()
    try:
        bad = fill(template)
    except FinetuneError as error:  # a filter that is not known: the text is no Jinja
        assert error.failure_class == "InvalidSpec"
    else:
        assert isinstance(bad, BadRecord)
    assert time.monotonic() - began < 5


def test_the_length_of_what_a_template_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.data.jinja_template.MAX_CHARACTERS", 1000)
    row = {"question": "q" * 100, "answer": "a", "tags": list("0123456789ab")}
    bad = fill("{% for t in tags %}{{ question }}{% endfor %}{{ answer }}", row)
    assert isinstance(bad, BadRecord) and "writes more than 1000 characters" in bad.problem
