"""Settings that contradict the model or the pool are refused by their field, before a GPU is taken."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FinetuneError
from tests.unit.api import values


@pytest.mark.parametrize(
    ("changes", "model", "field"),
    [
        ({"tuning": {"lora": {"experts": True}}}, {}, "spec.tuning.lora.experts"),
        ({"hyperparameters": {"routerLossWeight": 0.01}}, {}, "spec.hyperparameters.routerLossWeight"),
        (
            {"tuning": {"type": "Full", "full": {"preset": "RouterAndExperts"}}, "hyperparameters": {}},
            {},
            "spec.tuning.full.preset",
        ),
        ({"tuning": {"type": "QLoRA"}}, {"quantization": "bitsandbytes"}, "spec.tuning.quantization"),
        (
            {"tuning": {"type": "QLoRA", "quantization": {"bits": 8}}, "hyperparameters": {"seed": 1}},
            {"experts": 8},
            "spec.tuning.quantization.bits",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused_by_the_field(
    changes: dict[str, Any], model: dict[str, Any], field: str
) -> None:
    with pytest.raises(FinetuneError, match=r"remove it|choose") as caught:
        values.plan(values.spec(**changes), model=values.small_model(**model))
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", field)
    other = {} if model.get("experts") else {"experts": 8}
    values.plan(values.spec(**changes), model=values.small_model(**other))


@pytest.mark.parametrize(
    ("changes", "refused", "fits", "field"),
    [
        (
            {"tuning": {"type": "Full", "full": {"firstLayers": 5}}},
            {"layers": 4},
            {"layers": 5},
            "tuning.full.firstLayers",
        ),
        *(
            (
                {"tuning": {"type": "LoRA", "lora": {"experts": True, **setting}}},
                {"experts": 8, "model_type": "mixtral"},
                {"experts": 8, "model_type": "switch_transformers"},
                "tuning.lora.experts",
            )
            for setting in ({"dropout": 0.1}, {"variant": "DoRA"})
        ),
        *(
            (
                {"tuning": {"type": kind}, "model": {"task": "SequenceClassification"}},
                {"encoder": False},
                {"encoder": True, "model_type": "bert"},
                "tuning.type",
            )
            for kind in ("PromptTuning", "PTuning")
        ),
        *(
            (
                values.merge(values.OBJECTIVES["Pretrain"], changes),
                {"max_positions": 512},
                {"max_positions": 512, "model_type": "bloom"},
                field,
            )
            for changes, field in (
                ({"objective": {"pretrain": {"blockSize": 513}}}, "objective.pretrain.blockSize"),
                ({"hyperparameters": {"maxSequenceLength": 513}}, "hyperparameters.maxSequenceLength"),
            )
        ),
    ],
)
def test_what_goes_beyond_the_model_is_refused_by_the_field(
    changes: dict[str, Any], refused: dict[str, Any], fits: dict[str, Any], field: str
) -> None:
    with pytest.raises(FinetuneError, match=r"remove it|choose|lower it") as caught:
        values.plan(values.spec(**changes), model=values.small_model(**refused))
    assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", f"spec.{field}")
    values.plan(values.spec(**changes), model=values.small_model(**fits))


def test_kernels_of_the_gpu_and_pure_16_bit_weights_are_refused_on_a_cpu_pool() -> None:
    for changes, field in (
        ({"hyperparameters": {"liger": True}, "tuning": {"type": "LoRA"}}, "spec.hyperparameters.liger"),
        (
            {"hyperparameters": {"masterWeights": "BF16"}, "tuning": {"type": "Full"}},
            "spec.hyperparameters.masterWeights",
        ),
    ):
        with pytest.raises(FinetuneError) as caught:
            values.plan(values.spec(**changes), values.cpu_pool(), model=values.small_model())
        assert (caught.value.failure_class, caught.value.field) == ("InvalidSpec", field)
        values.plan(values.spec(**changes), values.L4, model=values.small_model())
