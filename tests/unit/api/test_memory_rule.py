"""The first size rule: near published measurements where they can be compared, and right in its directions.

The rows are a hand-picked part of the public reports: one GPU, no sharding, LoRA or QLoRA, and a model whose width,
depth and vocabulary are known to us. Left out are full tuning in pure 16 bit (we keep fp32 master weights), adapters
that also train embeddings, other quantisations, and several GPUs. A tolerance of 30% is wide: this is a rule of thumb
that chooses a pool, not a promise. Most of the reports give allocated memory; reserved memory is higher.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_api.job import MasterWeights, Optimizer, Precision, QuantizationType, Task, TuningType
from finetune_api.planner.memory import GIB, Shape, estimate
from finetune_api.status import ModelFacts
from tests.unit.api.values import model_facts

LORA, QLORA = TuningType.LORA, TuningType.QLORA

# parameters, hidden size, layers, vocabulary: from the models' config.json
SHAPES = {
    "Qwen-1.8B": (1.84e9, 2048, 24, 151936),
    "Qwen-7B": (7.72e9, 4096, 32, 151936),
    "Qwen-14B": (14.17e9, 5120, 40, 152064),
    "llama-2-7b": (6.74e9, 4096, 32, 32000),
    "llama-2-13b": (13.02e9, 5120, 40, 32000),
    "mistral-7b": (7.24e9, 4096, 32, 32000),
    "falcon-7b": (7.22e9, 4544, 32, 65024),
    "phi-2": (2.78e9, 2560, 32, 51200),
    "tiny-llama-1.1b": (1.1e9, 2048, 22, 32000),
}

# model, method, micro batch, length, gradient checkpointing, LoRA rank, measured GB per GPU
QWEN = "QwenLM/Qwen README, profiling table (A100-80)"
LITGPT_A10G = "Lightning-AI/litgpt config_hub/finetune/README.md (A10G, allocated)"
LITGPT_A100 = "Lightning-AI/litgpt tutorials/resource-tables.md (A100-40, allocated)"
MEASURED = [
    ("Qwen-1.8B", LORA, 1, 1024, True, 64, 8.4, QWEN),
    ("Qwen-7B", LORA, 1, 1024, True, 64, 21.5, QWEN),
    ("Qwen-7B", LORA, 1, 8192, True, 64, 36.6, QWEN),
    ("Qwen-14B", LORA, 1, 2048, True, 64, 37.4, QWEN),
    ("Qwen-14B", LORA, 1, 8192, True, 64, 55.2, QWEN),
    ("falcon-7b", LORA, 1, 512, False, 32, 16.69, LITGPT_A10G),
    ("falcon-7b", QLORA, 1, 512, False, 32, 9.44, LITGPT_A10G),
    ("mistral-7b", LORA, 2, 512, False, 32, 20.66, LITGPT_A10G),
    ("phi-2", LORA, 4, 512, False, 32, 13.98, LITGPT_A10G),
    ("tiny-llama-1.1b", LORA, 8, 512, False, 32, 13.5, LITGPT_A10G),
    ("llama-2-7b", LORA, 1, 1304, False, 8, 21.3, LITGPT_A100),
    ("llama-2-7b", QLORA, 1, 1304, False, 8, 13.84, LITGPT_A100),
    ("llama-2-13b", LORA, 1, 1304, False, 8, 38.12, LITGPT_A100),
    ("llama-2-13b", QLORA, 1, 1304, False, 8, 22.55, LITGPT_A100),
]


def facts(name: str) -> ModelFacts:
    parameters, hidden, layers, vocabulary = SHAPES[name]
    return model_facts(int(parameters), hidden_size=hidden, layers=layers, vocabulary_size=vocabulary)


def shape(kind: TuningType = LORA, **changes: object) -> Shape:
    base = Shape(
        tuning=kind,
        precision=Precision.BF16,
        optimizer=Optimizer.PAGED_ADAMW_8BIT if kind == QLORA else Optimizer.ADAMW,
        micro_batch_size=1,
        sequence_length=512,
        gradient_checkpointing=False,
        lora_rank=16,
        world_size=1,
        zero_stage=0,
        on_cpu=False,
        quantization=QuantizationType.NF4 if kind == QLORA else None,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}x{row[3]}")
def test_the_estimate_is_within_30_percent_of_a_published_measurement(row: tuple) -> None:
    name, kind, micro, length, recompute, rank, measured, _source = row
    found = estimate(
        facts(name),
        shape(
            kind,
            micro_batch_size=micro,
            sequence_length=length,
            gradient_checkpointing=recompute,
            lora_rank=rank,
        ),
    )
    decimal = found.total_gib * GIB / 1e9
    assert decimal == pytest.approx(measured, rel=0.30)


def test_the_parts_add_up_to_the_total() -> None:
    found = estimate(facts("falcon-7b"), shape(QLORA))
    parts = found.weights_gib + found.trainable_gib + found.activations_gib + found.reserve_gib
    assert found.total_gib == pytest.approx(parts, abs=0.03)


def test_weights_of_the_methods_differ_by_their_bits() -> None:
    model = facts("llama-2-7b")
    full = estimate(model, shape(TuningType.FULL)).weights_gib
    lora = estimate(model, shape(LORA)).weights_gib
    qlora = estimate(model, shape(QLORA)).weights_gib
    assert full == pytest.approx(6.74e9 * 6 / GIB, abs=0.01), "fp32 master weights and a 16-bit copy"
    assert lora == pytest.approx(6.74e9 * 2 / GIB, abs=0.01)
    assert qlora < lora / 3


@pytest.mark.parametrize(
    "more",
    [
        {"micro_batch_size": 2},
        {"sequence_length": 1024},
        {"lora_rank": 64},
        {"precision": Precision.FP32},
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_work_never_needs_less_memory(more: dict) -> None:
    model = facts("mistral-7b")
    assert estimate(model, shape(**more)).total_gib > estimate(model, shape()).total_gib


def test_recomputation_and_an_eight_bit_optimizer_save_memory() -> None:
    model = facts("mistral-7b")
    plain = estimate(model, shape(TuningType.FULL))
    assert estimate(model, shape(TuningType.FULL, gradient_checkpointing=True)).activations_gib < plain.activations_gib
    eight_bit = estimate(model, shape(TuningType.FULL, optimizer=Optimizer.ADAMW_8BIT))
    assert plain.trainable_gib - eight_bit.trainable_gib == pytest.approx(7.24e9 * 6 / GIB, abs=0.02)


@pytest.mark.parametrize(("stage", "weights", "trainable"), [(0, 1, 1), (2, 1, 8), (3, 8, 8)])
def test_sharding_divides_what_its_stage_shards(stage: int, weights: int, trainable: int) -> None:
    model = facts("mistral-7b")
    alone = estimate(model, shape(TuningType.FULL))
    sharded = estimate(model, shape(TuningType.FULL, world_size=8, zero_stage=stage))
    assert sharded.weights_gib == pytest.approx(alone.weights_gib / weights, abs=0.02)
    assert sharded.trainable_gib == pytest.approx(alone.trainable_gib / trainable, abs=0.02)
    assert sharded.activations_gib == alone.activations_gib


def test_eight_bits_lie_between_four_and_sixteen() -> None:
    model = facts("llama-2-7b")
    four = estimate(model, shape(QLORA)).weights_gib
    eight = estimate(model, shape(QLORA, quantization=QuantizationType.INT8)).weights_gib
    sixteen = estimate(model, shape(LORA)).weights_gib
    assert four < eight < sixteen
    assert eight == pytest.approx((6.74e9 + 2 * 32000 * 4096) / GIB, rel=0.01), "a byte each, embeddings two"


def test_weights_that_come_quantised_are_as_large_as_their_files() -> None:
    model = facts("llama-2-7b").model_copy(update={"quantization": "bitsandbytes", "weight_bytes": 4 * GIB})
    assert estimate(model, shape(LORA)).weights_gib == 4.0


@pytest.mark.parametrize(
    ("kind", "more", "parameters"),
    [
        (TuningType.PROMPT_TUNING, {"virtual_tokens": 20}, 20 * 4096),
        (TuningType.P_TUNING, {"virtual_tokens": 20}, 20 * 4096 + 3 * 4096**2),
        (TuningType.PREFIX_TUNING, {"virtual_tokens": 128}, 128 * 32 * 2 * 4096),
        (TuningType.PREFIX_TUNING, {"virtual_tokens": 128, "projection": True}, 4096**2 + 4096 * 32 * 2 * 4096),
        (TuningType.IA3, {}, 32 * 6 * 4096),
    ],
)
def test_what_an_adapter_trains_is_counted(kind: TuningType, more: dict, parameters: int) -> None:
    found = estimate(facts("llama-2-7b"), shape(kind, **more))
    assert found.trainable_gib == pytest.approx(parameters * 16 / GIB, abs=0.01)
    assert found.weights_gib == estimate(facts("llama-2-7b"), shape(LORA)).weights_gib


def test_virtual_tokens_lengthen_every_row() -> None:
    model = facts("llama-2-7b")
    plain = estimate(model, shape(TuningType.PROMPT_TUNING, sequence_length=412))
    longer = estimate(model, shape(TuningType.PROMPT_TUNING, sequence_length=412, virtual_tokens=100))
    assert longer.activations_gib == pytest.approx(plain.activations_gib * 512 / 412, rel=0.01)


def test_a_frozen_share_needs_no_gradients() -> None:
    model = facts("llama-2-7b")
    whole = estimate(model, shape(TuningType.FULL))
    half = estimate(model, shape(TuningType.FULL, trained_share=0.5))
    assert half.trainable_gib == pytest.approx(whole.trainable_gib / 2, abs=0.01)
    assert half.weights_gib == whole.weights_gib


def test_master_weights_in_16_bit_halve_what_full_tuning_holds() -> None:
    model = facts("llama-2-7b")
    found = estimate(model, shape(TuningType.FULL, master_weights=MasterWeights.BF16))
    assert found.weights_gib == pytest.approx(6.74e9 * 2 / GIB, abs=0.01)
    assert found.trainable_gib == pytest.approx(6.74e9 * (2 + 4) / GIB, abs=0.02), "gradient 2, Adam's states 2 + 2"


def test_a_reference_a_teacher_and_judges_stay_beside_the_model() -> None:
    model = facts("llama-2-7b")
    alone = estimate(model, shape(TuningType.FULL)).weights_gib
    assert estimate(model, shape(TuningType.FULL, reference=True)).weights_gib == pytest.approx(
        alone + 6.74e9 * 2 / GIB, abs=0.02
    )
    assert estimate(model, shape(TuningType.FULL, further_bytes=3 * GIB)).weights_gib == pytest.approx(alone + 3)


def test_a_classifier_holds_no_logits_of_the_vocabulary_and_pairs_double_the_rows() -> None:
    model = facts("Qwen-7B")
    words = estimate(model, shape()).activations_gib
    classes = estimate(model, shape(task=Task.SEQUENCE_CLASSIFICATION)).activations_gib
    assert words - classes == pytest.approx(512 * 151936 * 10 / GIB, abs=0.02)
    assert estimate(model, shape(sequences=2)).activations_gib == pytest.approx(2 * words, abs=0.02)


def test_an_evaluation_holds_weights_and_one_layer() -> None:
    model = facts("llama-2-7b")
    found = estimate(model, shape(None))  # type: ignore[arg-type]
    assert found.trainable_gib == 0.0
    assert found.weights_gib == estimate(model, shape(LORA)).weights_gib
    assert found.activations_gib < estimate(model, shape(LORA, gradient_checkpointing=True)).activations_gib
