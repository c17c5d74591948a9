"""Chat templates: rendered as transformers renders them, and where the answers stand."""

from __future__ import annotations

import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.data.chat import ChatError, ChatFormat, compile_template
from finetune_trainer.data.formats import Turn
from finetune_trainer.data.tokenizer import TextTokenizer
from tests.train.data.making import CHATML, LLAMA, make_tokenizer

# Puts the system's words before the LAST question, so that an earlier turn reads otherwise once a later one follows.
LATE_SYSTEM = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 >= messages | length - 2 %}{{ ns.system }} {% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Drops earlier turns' reasoning, as reasoning models do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A {% generation %}{{ m.content }}{% endgeneration %}</s>"
    "{% else %}{{ m | tojson }}{% continue %}{% endif %}{% endfor %}{% if add_generation_prompt %}A {% endif %}"
)
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "Hello <b>"),
    Turn("assistant", "<think>\nhm\n</think>\n\nGood morning"),
    Turn("user", "How?"),
    Turn("assistant", "<think>\nok\n</think>\n\nSo."),
)


def chat(template: str | None) -> ChatFormat:
    return ChatFormat(TextTokenizer.from_transformers(make_tokenizer(chat_template=template)))


@pytest.mark.parametrize("template", [CHATML, LLAMA, LATE_SYSTEM, THINKING, MARKED])
@pytest.mark.parametrize("ask", [True, False])
def test_templates_render_as_transformers_renders_them(template: str, ask: bool) -> None:
    turns = TURNS[1:] if template == LLAMA else TURNS
    turns = turns[:-1] if ask else turns
    tokenizer = make_tokenizer(chat_template=template)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    assert chat(template).render(turns, ask=ask) == expected


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["<think>\nhm\n</think>\n\nGood morning<|im_end|>", "<think>\nok\n</think>\n\nSo.<|im_end|>"]),
        (THINKING, ["Good morning<|im_end|>", "<think>\nok\n</think>\n\nSo.<|im_end|>"]),
        (MARKED, ["<think>\nhm\n</think>\n\nGood morning</s>", "<think>\nok\n</think>\n\nSo.</s>"]),
        (None, [" <think>\nhm\n</think>\n\nGood morning</s>", " <think>\nok\n</think>\n\nSo.</s>"]),
    ],
)
def test_each_answer_is_found_with_its_end_token(template: str | None, answers: list[str]) -> None:
    format = chat(template)
    text = format.render(TURNS)
    assert [text[start:end] for start, end in format.answers(TURNS, text)] == answers


def test_answers_are_found_when_earlier_turns_change_under_later_ones() -> None:
    turns = (
        Turn("system", "S"),
        Turn("user", "yes"),
        Turn("assistant", "yes"),
        Turn("user", "no"),
        Turn("assistant", "no"),
    )
    format = chat(LATE_SYSTEM)
    text = format.render(turns)
    assert text == "<s>[INST] yes[/INST] yes</s>[INST] S no[/INST] no</s>"
    spans = format.answers(turns, text)
    assert [text[start:end].strip() for start, end in spans] == ["yes</s>", "no</s>"]


def test_a_template_that_hides_an_answer_is_told() -> None:
    format = chat("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    turns = (Turn("user", "a"), Turn("assistant", "hello"))
    with pytest.raises(ChatError, match="changes the text of message 2"):
        format.answers(turns, format.render(turns))


def test_a_broken_template_is_told_with_what_to_do() -> None:
    with pytest.raises(FinetuneError, match=r"chat template is broken.*promptTemplate") as caught:
        compile_template("{% for m in messages %}")
    assert caught.value.failure_class == "ModelUnsupported"


def test_a_template_cannot_reach_python() -> None:
    format = chat("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ChatError, match="refuses it"):
        format.render((Turn("user", "a"),))
