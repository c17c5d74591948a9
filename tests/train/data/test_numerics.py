"""Rows of the table of known pitfalls that are decided when records become tokens, and TRL's own processing as oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from finetune_trainer.data import load_dataset
from finetune_trainer.data.encode import IGNORED
from tests.train.data.making import CHATML, LLAMA, make_tokenizer, run_file, write_rows
from tests.train.worker.runs import in_child, work_for

CHAT = [
    {"role": "user", "content": "What is the capital?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "Yes."},
]
# The same as CHATML and LLAMA, with the marks by which TRL finds the assistant's tokens.
MARKED_CHATML = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}"
    "{{ message['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encoded(tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any, **changes: Any) -> Any:
    return load_dataset(run_file(**changes), write_rows(tmp_path, rows), tokenizer, cache=tmp_path / "cache")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [None, CHATML, LLAMA, "{{ bos_token }}" + LLAMA])
def test_double_bos_from_template_plus_tokenizer_never_happens(
    tmp_path: Path, template: str | None, adds_bos: bool
) -> None:
    tokenizer = make_tokenizer(chat_template=template, adds_bos=adds_bos)
    for item in encoded(tmp_path, [{"messages": CHAT}], tokenizer, format="Messages").train:
        wanted = 1 if adds_bos or (template or "").endswith(LLAMA) else 0
        assert (item.input_ids == tokenizer.bos_token_id).sum() == wanted
        assert not wanted or item.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [None, LLAMA, CHATML])
def test_eos_is_in_the_loss_though_it_is_the_pad_token(tmp_path: Path, template: str | None) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (item,) = encoded(tmp_path, [{"messages": CHAT}], tokenizer, format="Messages").train
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>") if template == CHATML else tokenizer.eos_token_id
    assert (item.labels == stop).sum() == 2, "the end of each of the two answers"
    assert (item.input_ids == stop).sum() == (4 if template == CHATML else 2)


def _collated() -> tuple[list[int], list[int], list[int]]:
    """input_ids, mask and labels of the shorter of two records in one batch."""
    import numpy as np

    from finetune_trainer.data.kinds import EncodedExample
    from finetune_trainer.worker.padding import pad_sequences

    eos = 1
    short = np.array([5, 6, eos], np.int32)
    long = np.array([5, 6, 7, 8, eos], np.int32)
    batch = pad_sequences([EncodedExample(short, short), EncodedExample(long, long)])
    return tuple(batch[name][0].tolist() for name in ("input_ids", "attention_mask", "labels"))


def test_padding_never_hides_eos_from_the_loss() -> None:
    ids, mask, labels = in_child(_collated)
    assert ids[:3] == [5, 6, 1] and mask == [1, 1, 1, 0, 0]
    assert labels == [IGNORED, 6, 1, IGNORED, IGNORED]


def _answers(root: str) -> list[tuple[str, bool]]:
    """(answer, whether it stopped by itself) of the tuned model to each prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(f"{root}/artifact/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{root}/artifact/model")
    found = []
    for letter in "abc":
        ids = torch.tensor([tokenizer(f"User: say {letter}\nAssistant:", add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)[0]
        new = out[ids.shape[1] :].tolist()
        found.append((tokenizer.decode(new, skip_special_tokens=True), tokenizer.eos_token_id in new))
    return found


def test_a_tuned_model_stops_though_pad_is_eos(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {letter}", "completion": letter * 3} for letter in "abc"] * 8
    work = work_for(
        tmp_path / "w",
        rows=rows,
        model={"spread": 0.2},
        type="Full",
        lora=None,
        totalSteps=60,
        microBatchSize=6,
        gradientAccumulation=1,
        validationFraction=None,
    )
    settings = work.root / "inputs/model/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "</s>"}))
    assert work.train() == [0], work.logged()
    answers = in_child(_answers, str(work.root))
    assert answers == [(f" {letter * 3}", True) for letter in "abc"]


@pytest.mark.parametrize("template", [CHATML, LLAMA, MARKED_CHATML])
def test_the_stop_token_of_each_answer_stands_inside_the_mask(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    found = encoded(tmp_path, [{"messages": CHAT}], tokenizer, format="Messages")
    (item,) = found.train
    stop = "</s>" if template == LLAMA else "<|im_end|>"
    learnt = [tokenizer.decode([token]) for token in item.labels if token != IGNORED]
    assert [token for token in learnt if token in ("</s>", "<|im_end|>")] == [stop, stop]
    assert found.sample.count(f"{stop}⟧") == 2


def test_data_whose_mask_is_empty_is_refused(tmp_path: Path) -> None:
    # The template shows the question only, so that nothing of an answer can be learnt.
    questions = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(FinetuneError, match="1 of 1 record cannot be used") as caught:
        encoded(tmp_path, [{"messages": CHAT}], make_tokenizer(chat_template=questions), format="Messages")
    assert caught.value.failure_class == "DataInvalid"


def test_text_longer_than_the_maximum_is_refused_or_counted_and_refused_above_a_share(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "short"}] * 3 + [{"prompt": "p", "completion": "word " * 99}]
    with pytest.raises(FinetuneError, match=r"more than hyperparameters\.maxSequenceLength 64"):
        encoded(tmp_path, rows, make_tokenizer(), max_sequence_length=64)
    stats = encoded(tmp_path, rows, make_tokenizer(), max_sequence_length=64, truncation="Tail").stats
    assert stats.cut == 1 and stats.cut_tokens > 100
    with pytest.raises(FinetuneError, match="1 of 4 records are longer than they may be"):
        encoded(tmp_path, rows, make_tokenizer(), max_sequence_length=64, truncation="Tail", maxCutShare=0.2)


# ---- TRL as oracle


def _by_trl(
    rows: list[dict[str, Any]], template: str | None, assistant_only: bool
) -> list[tuple[list[int], list[int]]]:
    """(ids, labels without padding) of each row as TRL's SFTTrainer hands them to its model."""
    import tempfile

    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tests.train.models import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            assistant_only_loss=assistant_only,
            max_length=None,
            per_device_train_batch_size=len(rows),
            use_cpu=True,
            bf16=False,
            report_to=[],
            eos_token="</s>",
            loss_type="nll",
        )
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny_model("llama", vocabulary=512)),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(chat_template=template),
        )
        batch = trainer.data_collator([trainer.train_dataset[k] for k in range(len(rows))])
    found = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        found.append((ids[:length].tolist(), labels[:length].tolist()))
    return found


def _ours(tmp_path: Path, rows: list[dict[str, Any]], template: str | None, **changes: Any) -> list[tuple[Any, Any]]:
    found = encoded(tmp_path, rows, make_tokenizer(chat_template=template), **changes)
    return [(item.input_ids.tolist(), item.labels.tolist()) for item in found.train]


def test_prompt_and_completion_have_the_tokens_and_labels_of_trl(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Question: what is it?\nAnswer:", "completion": " Paris."},
        {"prompt": "Hello", "completion": "\n\nGood morning, how can I help?"},
    ]
    ours = _ours(tmp_path, rows, None, promptTemplate="{prompt}{completion}")
    assert ours == in_child(_by_trl, rows, None, False)


def test_where_a_token_reaches_over_the_boundary_the_tokens_agree_with_trl_and_it_is_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": "Question: what is it?\nAnswer: ", "completion": "Paris."}]
    assert _ours(tmp_path, rows, None, promptTemplate="{prompt}{completion}") == in_child(_by_trl, rows, None, False)


def test_a_conversation_has_the_tokens_of_trl_but_for_what_follows_the_last_answer(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}, {"messages": CHAT[:2]}]
    trl = in_child(_by_trl, rows, MARKED_CHATML, True)
    ours = _ours(tmp_path, rows, MARKED_CHATML, format="Messages")
    newline = make_tokenizer().convert_tokens_to_ids("Ċ")
    for (ids, labels), (their_ids, their_labels) in zip(ours, trl, strict=True):
        # The template writes a line feed behind the last answer, which nobody learns from: ours leaves it out.
        assert [*ids, newline] == their_ids and [*labels, IGNORED] == their_labels
