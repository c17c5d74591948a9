"""The size rule on mixtures of experts: what a token keeps of its experts, and what whole experts take.

tests/train/worker/test_memory_terms.py compares these terms with the pinned libraries.
"""

from __future__ import annotations

import pytest

from finetune_api.job import Task, TuningType
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.memory import GIB, estimate
from finetune_api.planner.optimization import optimization
from finetune_api.planner.shape import shape_of
from finetune_api.status import ModelFacts
from tests.unit.api.test_memory_rule import QLORA, shape
from tests.unit.api.values import model_facts, preflight, spec

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "layers": 32,
    "vocabulary_size": 32000,
    "experts": 8,
    "experts_per_token": 2,
    "expert_size": 14336,
}


def mixtral(**changes: object) -> ModelFacts:
    """Mixtral-8x7B by its config.json: 46.7 billion parameters."""
    return model_facts(46_702_792_704, **{**MIXTRAL, **changes})


def test_a_token_keeps_numbers_of_the_experts_that_it_passes_through() -> None:
    """Of each of two experts three numbers of its width and its output; LoRA sees the attention's four layers only."""
    layer = 2 * 4 * 4096 + 2 * (4 * 4096 + 2 * (3 * 14336 + 4096)) + 3 * 4 * 4096
    found = estimate(mixtral(), shape(task=Task.SEQUENCE_CLASSIFICATION)).activations_gib
    assert found == pytest.approx(512 * 32 * layer / GIB, abs=0.01)
    every = estimate(mixtral(experts_per_token=8), shape(task=Task.SEQUENCE_CLASSIFICATION)).activations_gib
    assert every - found == pytest.approx(512 * 32 * 2 * 6 * (3 * 14336 + 4096) / GIB, abs=0.01)
    shared = estimate(mixtral(shared_expert_size=5632), shape(task=Task.SEQUENCE_CLASSIFICATION)).activations_gib
    more = 2 * 3 * 5632 + 3 * (2 * 4096 + 5632)
    assert shared - found == pytest.approx(512 * 32 * more / GIB, abs=0.01)


def test_experts_that_train_keep_what_goes_in_to_them_in_the_number_format_of_their_weights() -> None:
    numbers = 2 * (3 * 14336 + 4096 + 4096 + 14336)
    layer = 2 * 4 * 4096 + 2 * 4 * 4096 + 2 * (4 * 4096 + 3 * 4096)
    classes = {"task": Task.SEQUENCE_CLASSIFICATION}
    for more, size in (({}, 4), ({"zero_stage": 2}, 2)):
        found = estimate(mixtral(), shape(TuningType.FULL, **classes, **more)).activations_gib
        assert found == pytest.approx(512 * 32 * (layer + size * numbers) / GIB, abs=0.01)


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ({}, 32),
        ({"gradient_checkpointing": True}, 1),
        ({"tuning": None}, 1),
        ({"adapted_experts": True}, 32 + 1 / 3),
        ({"adapted_experts": True, "gradient_checkpointing": True}, 1 + 1 / 3),
    ],
    ids=["stay", "checkpointing", "nothing trains", "LoRA on experts", "LoRA on experts, checkpointing"],
)
def test_quantised_experts_are_unpacked_whole_and_stay_until_the_backward_pass(more: dict, layers: float) -> None:
    """2.8 GB for a layer of Mixtral, 90 GB for all of them; a smaller micro batch does not help."""
    quantised, plain = shape(QLORA, **more), shape(**{**more, "adapted_experts": False})
    unpacked = estimate(mixtral(), quantised).activations_gib - estimate(mixtral(), plain).activations_gib
    inputs = 0.0
    if more.get("adapted_experts"):
        inputs = 512 * 2 * 2 * (4096 + 14336) * (1 if more.get("gradient_checkpointing") else 32)
    assert unpacked == pytest.approx((2 * 8 * 3 * 4096 * 14336 * layers + inputs) / GIB, abs=0.011)


def test_lora_on_experts_makes_their_weights_whole_without_quantisation_too() -> None:
    found = {adapted: estimate(mixtral(), shape(adapted_experts=adapted)) for adapted in (False, True)}
    more = found[True].activations_gib - found[False].activations_gib
    whole, inputs = 2 * 8 * 3 * 4096 * 14336 * (32 + 1 / 3), 512 * 32 * 2 * 2 * (4096 + 14336)
    assert more == pytest.approx((whole + inputs) / GIB, abs=0.011)
    trained = 16 * 32 * 8 * (2 * 4096 + 3 * 14336)
    assert found[True].trainable_gib - found[False].trainable_gib == pytest.approx(trained * 16 / GIB, abs=0.011)
    job = spec(tuning={"type": "LoRA", "lora": {"experts": True}})
    hp = optimization(job, model_facts(10**9), Ledger(), on_cpu=False, zero_stage=0)
    assert shape_of(job, preflight(job), hp, 512, world_size=1, zero_stage=0, on_cpu=False).adapted_experts


def test_experts_that_are_linear_layers_are_unpacked_one_at_a_time() -> None:
    switch = mixtral(model_type="switch_transformers", expert_size=None, experts_per_token=None)
    unpacked = estimate(switch, shape(QLORA)).activations_gib - estimate(switch, shape()).activations_gib
    assert unpacked == pytest.approx(2 * 4096 * 8 / 3 * 4096 / GIB, abs=0.011)
