"""What is in the loss: checked by decoding the tokens whose labels are set."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from finetune_api.job import LossOn, ObjectiveType, Task, Truncation
from finetune_trainer.data.encode import IGNORED, Encoder, Encoding
from finetune_trainer.data.formats import Example, Turn
from finetune_trainer.data.records import BadRecord, Record
from finetune_trainer.data.tokenizer import TextTokenizer
from finetune_trainer.preflight.measure import Measure
from tests.train.data.making import CHATML, LLAMA, make_tokenizer

QUESTION = (Turn("user", "What is the capital?"), Turn("assistant", "Paris."))
TWO_TURNS = (
    Turn("system", "Be kind."),
    Turn("user", "Hello"),
    Turn("assistant", "Good morning"),
    Turn("user", "assistant"),
    Turn("assistant", "assistant"),
)


def make_encoder(
    tokenizer: PreTrainedTokenizerFast,
    *,
    loss_on: LossOn = LossOn.COMPLETION,
    truncation: Truncation = Truncation.ERROR,
    max_length: int = 512,
) -> Encoder:
    return Encoder(
        TextTokenizer.from_transformers(tokenizer), loss_on=loss_on, truncation=truncation, max_length=max_length
    )


def example(*turns: Turn) -> Example:
    return Example(Record("dataset.sources[0].uri", "t.jsonl", 3, {}), turns)


def encode(encoder: Encoder, *turns: Turn) -> Encoding:
    encoding = encoder.encode(example(*turns))
    assert isinstance(encoding, Encoding), encoding
    return encoding


def learnt(tokenizer: PreTrainedTokenizerFast, encoding: Encoding) -> str:
    ids, labels = encoding.example.input_ids, encoding.example.labels
    assert ids.shape == labels.shape and all(a == b for a, b in zip(ids, labels, strict=True) if b != IGNORED)
    return tokenizer.decode(ids[labels != IGNORED], skip_special_tokens=False)


def whole(tokenizer: PreTrainedTokenizerFast, encoding: Encoding) -> str:
    return tokenizer.decode(encoding.example.input_ids, skip_special_tokens=False)


def test_the_plain_form_learns_the_answer_and_the_end_token_though_it_is_also_the_pad_token() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoding = encode(make_encoder(tokenizer), *QUESTION)
    assert whole(tokenizer, encoding) == "User: What is the capital?\nAssistant: Paris.</s>"
    assert learnt(tokenizer, encoding) == " Paris.</s>"
    assert encoding.example.labels[-1] == tokenizer.eos_token_id


def test_every_assistant_turn_is_learnt_and_nothing_else() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    encoding = encode(make_encoder(tokenizer), *TWO_TURNS)
    assert learnt(tokenizer, encoding) == "Good morning<|im_end|>assistant<|im_end|>"
    assert whole(tokenizer, encoding).endswith("<|im_start|>assistant\nassistant<|im_end|>")


def test_a_template_with_the_end_token_learns_it_once() -> None:
    tokenizer = make_tokenizer(chat_template=LLAMA)
    encoding = encode(make_encoder(tokenizer), *QUESTION)
    assert whole(tokenizer, encoding) == "<s>[INST] What is the capital? [/INST] Paris.</s>"
    assert learnt(tokenizer, encoding) == " Paris.</s>"


def test_a_template_without_an_end_token_gets_one_that_is_learnt() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    encoding = encode(make_encoder(tokenizer), *QUESTION)
    assert whole(tokenizer, encoding) == "user: What is the capital?\nassistant: Paris.</s>"
    assert learnt(tokenizer, encoding) == " Paris.</s>"  # the blank of the template is one token with the word


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [None, CHATML, LLAMA])
def test_there_is_one_bos_wherever_it_comes_from(adds_bos: bool, template: str | None) -> None:
    tokenizer = make_tokenizer(chat_template=template, adds_bos=adds_bos)
    ids = encode(make_encoder(tokenizer), *QUESTION).example.input_ids
    expected = 1 if adds_bos or template == LLAMA else 0
    assert (ids == tokenizer.bos_token_id).sum() == expected
    assert expected == 0 or ids[0] == tokenizer.bos_token_id


def test_a_template_that_writes_bos_twice_still_gives_one() -> None:
    tokenizer = make_tokenizer(chat_template="{{ bos_token }}" + LLAMA, adds_bos=True)
    encoding = encode(make_encoder(tokenizer), *QUESTION)
    assert whole(tokenizer, encoding).startswith("<s>[INST]") and learnt(tokenizer, encoding) == " Paris.</s>"
    assert whole(tokenizer, encoding)[: len("<s>[INST] What")] == "<s>[INST] What"


def test_a_token_that_reaches_over_the_boundary_is_learnt_and_the_prompt_ends_before_it() -> None:
    tokenizer = make_tokenizer()
    encoder = make_encoder(tokenizer)
    encoding = encode(encoder, Turn("prompt", "<human>: Who?\n<assistant>: "), Turn("completion", "Paris"))
    assert " Paris" in [tokenizer.decode([token]) for token in encoding.example.input_ids]  # the blank merged
    assert learnt(tokenizer, encoding) == " Paris</s>"
    ids, reference = encoder.prompt_of(encoding)
    assert (tokenizer.decode(ids), reference) == ("<human>: Who?\n<assistant>:", "Paris")
    # The whole text gets the very tokens that the tokenizer gives it: no seam between prompt and completion.
    text = "<human>: Who?\n<assistant>: Paris</s>"
    assert encoding.example.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_white_space_at_the_edges_of_a_completion_is_placed_right_though_offsets_are_trimmed() -> None:
    tokenizer = make_tokenizer()
    encoding = encode(make_encoder(tokenizer), Turn("prompt", "Q: "), Turn("completion", "\n\n  a é  "))
    assert whole(tokenizer, encoding) == "Q: \n\n  a é  </s>"
    assert learnt(tokenizer, encoding) == "\n\n  a é  </s>"
    plain = encode(make_encoder(tokenizer), Turn("prompt", "Q: é"), Turn("completion", "é ü"))
    assert learnt(tokenizer, plain) == "é ü</s>"


def test_loss_on_all_learns_prompt_and_answer_but_not_the_bos() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    encoder = make_encoder(tokenizer, loss_on=LossOn.ALL)
    encoding = encode(encoder, *QUESTION)
    assert learnt(tokenizer, encoding) == "User: What is the capital?\nAssistant: Paris.</s>"
    assert tokenizer.decode(encoder.prompt_of(encoding)[0]) == "<s>User: What is the capital?\nAssistant:"


def test_plain_text_is_learnt_whole_with_an_end_token() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    encoding = encode(make_encoder(tokenizer), Turn("text", "The capital of France"))
    assert whole(tokenizer, encoding) == "<s>The capital of France</s>"
    assert learnt(tokenizer, encoding) == "The capital of France</s>"


def test_the_sample_shows_what_is_in_the_loss() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    encoder = make_encoder(tokenizer)
    shown = encoder.show(encode(encoder, *QUESTION).example)
    assert shown == "<|im_start|>user\nWhat is the capital?<|im_end|>\n<|im_start|>assistant\n⟦Paris.<|im_end|>⟧"


def test_a_record_that_is_too_long_is_refused_with_both_lengths() -> None:
    tokenizer = make_tokenizer()
    length = len(encode(make_encoder(tokenizer), *QUESTION).example.input_ids)
    bad = make_encoder(tokenizer, max_length=length - 1).encode(example(*QUESTION))
    assert isinstance(bad, BadRecord) and bad.where == "t.jsonl line 3"
    assert bad.problem == f"{length} tokens, more than hyperparameters.maxSequenceLength {length - 1}"
    assert isinstance(make_encoder(tokenizer, max_length=length).encode(example(*QUESTION)), Encoding)


def test_tail_cuts_the_end_and_says_how_much() -> None:
    tokenizer = make_tokenizer()
    full = encode(make_encoder(tokenizer), *QUESTION)
    cut = encode(
        make_encoder(tokenizer, truncation=Truncation.TAIL, max_length=len(full.example.input_ids) - 1), *QUESTION
    )
    assert cut.example.input_ids.tolist() == full.example.input_ids.tolist()[:-1]
    assert cut.cut and cut.length == len(full.example.input_ids) and not full.cut


def test_a_cut_that_leaves_nothing_to_learn_is_told() -> None:
    tokenizer = make_tokenizer()
    assert make_encoder(tokenizer, truncation=Truncation.TAIL, max_length=4).encode(example(*QUESTION)) is None


def test_oldest_turns_drops_whole_exchanges_and_keeps_the_system_message() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    full = encode(make_encoder(tokenizer), *TWO_TURNS)
    encoder = make_encoder(tokenizer, truncation=Truncation.OLDEST_TURNS, max_length=len(full.example.input_ids) - 1)
    shorter = encode(encoder, *TWO_TURNS)
    assert whole(tokenizer, shorter) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nassistant<|im_end|>\n"
        "<|im_start|>assistant\nassistant<|im_end|>"
    )
    assert shorter.cut and shorter.dropped_turns == 2 and shorter.length == len(full.example.input_ids)


def test_what_follows_the_last_answer_is_left_out() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    encoding = encode(make_encoder(tokenizer), *QUESTION, Turn("user", "Thanks"))
    assert "Thanks" not in whole(tokenizer, encoding) and learnt(tokenizer, encoding) == "Paris.<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_told_in_its_words() -> None:
    bad = make_encoder(make_tokenizer(chat_template=LLAMA)).encode(example(Turn("system", "s"), *QUESTION))
    assert isinstance(bad, BadRecord)
    assert bad.problem == "the model's chat template refuses it: only user and assistant roles are supported"


def test_the_preflight_count_equals_the_tokens_that_are_trained_on() -> None:
    for template, adds_bos in ((None, True), (CHATML, True), (LLAMA, True), (CHATML, False)):
        tokenizer = make_tokenizer(chat_template=template, adds_bos=adds_bos)
        encoder = make_encoder(tokenizer)
        cases = [QUESTION, (Turn("text", "Once upon</s>"),), (Turn("prompt", "a: "), Turn("completion", "b"))]
        measure = Measure(
            TextTokenizer.from_transformers(tokenizer), ObjectiveType.SUPERVISED, Task.CAUSAL_LM, LossOn.COMPLETION
        )
        sizes = [found[1].tokens for found in measure.sizes(example(*turns) for turns in cases)]  # type: ignore[index]
        assert sizes == [encode(encoder, *turns).length for turns in cases]


def test_several_examples_at_once_are_encoded_as_each_alone() -> None:
    tokenizer = make_tokenizer(chat_template=CHATML, adds_bos=True)
    encoder = make_encoder(tokenizer, truncation=Truncation.OLDEST_TURNS, max_length=40)
    examples = [
        example(*TWO_TURNS),
        example(*QUESTION),
        example(Turn("text", "Paris é ü" * 9)),
        example(Turn("text", "a")),
    ]
    for found, alone in zip(encoder.encode_many(examples), [encoder.encode(item) for item in examples], strict=True):
        assert isinstance(found, Encoding) and isinstance(alone, Encoding)
        assert found.example.input_ids.tolist() == alone.example.input_ids.tolist()
        assert found.example.labels.tolist() == alone.example.labels.tolist()
        assert (found.length, found.prompt, found.dropped_turns) == (alone.length, alone.prompt, alone.dropped_turns)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    from finetune_api.failures import FinetuneError

    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(FinetuneError, match="has no eos_token"):
        TextTokenizer.from_transformers(tokenizer)
