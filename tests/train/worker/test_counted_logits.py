"""Logits of the labelled places only: the same numbers as picking them from all, and a head that sees nothing else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_api.job import Task
from finetune_trainer.worker.loss import IGNORED, counted_logits, next_token_loss_sum, shifted
from finetune_trainer.worker.objectives.distillation import Asked
from finetune_trainer.worker.tuning.prompts import keep_length
from tests.train.models import tiny_model

LABELS = torch.tensor([[IGNORED, IGNORED, 7, 8, 9], [IGNORED, 5, 6, IGNORED, IGNORED]])
INPUTS = {"input_ids": torch.tensor([[3, 4, 7, 8, 9], [3, 5, 6, 0, 0]])}


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()


def rows_seen(model: torch.nn.Module) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, given, _o: seen.append(tuple(given[0].shape)))
    return seen


def check(model: torch.nn.Module) -> None:
    everything = next_token_loss_sum(model(**INPUTS)["logits"][:, -LABELS.shape[1] :], LABELS)
    logits, targets, _ = counted_logits(model, INPUTS, shifted(LABELS))
    assert targets.tolist() == [7, 8, 9, 5, 6]
    chosen = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(chosen, everything, rtol=1e-6, atol=1e-6)


def test_the_output_layer_sees_the_labelled_places_alone(model):
    seen = rows_seen(model)
    counted_logits(model, INPUTS, shifted(LABELS))
    assert [shape[:2] for shape in seen] == [(5, 1)]
    check(model)


def test_the_hook_is_gone_afterwards(model):
    counted_logits(model, INPUTS, shifted(LABELS))
    assert model(**INPUTS)["logits"].shape[:2] == (2, 5)


def test_a_wrapped_model_gives_the_same(model):
    check(Asked(model))


def test_an_adapted_or_copied_output_layer_gives_the_same(model):
    check(get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)).eval())


def test_a_soft_prompt_is_left_out(model):
    prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    check(prompted)
    keep_length(prompted, Task.CAUSAL_LM)
    check(prompted)
    every = shifted(INPUTS["input_ids"])  # more places in all than one row is long
    logits, targets, _ = counted_logits(prompted, INPUTS, every)
    assert len(logits) == len(targets) == 8
    torch.testing.assert_close(logits, prompted(**INPUTS).logits[:, :-1].reshape(8, -1), rtol=1e-6, atol=1e-6)


def test_no_labelled_place_gives_a_loss_of_zero_with_a_gradient(model):
    logits, targets, _ = counted_logits(model, INPUTS, torch.full_like(LABELS, IGNORED))
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    assert loss.item() == 0.0
    assert float(model.get_input_embeddings().weight.grad.abs().sum()) == 0.0


def test_logits_that_do_not_come_from_the_output_layer_are_chosen_afterwards(model):
    model.get_output_embeddings = lambda: None
    check(model)
