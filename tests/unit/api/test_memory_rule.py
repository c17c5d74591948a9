"""The first size rule: near published measurements where they can be compared, and right in its directions.

The rows are those of the public reports with one GPU, no sharding, LoRA or QLoRA, and settings that are known to us.
Left out are full tuning in pure 16 bit (we keep fp32 master weights), adapters that also train embeddings, other
quantisations, several GPUs, gemma-2 (soft-capped attention) and phi-1.5 (up to 38% too much). docs/planning.md has the
residual of each. Most of the reports give allocated memory;
reserved memory is higher.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_api.job import MasterWeights, Optimizer, Precision, QuantizationType, Task, TuningType
from finetune_api.planner.ledger import Ledger
from finetune_api.planner.memory import GIB, Shape, estimate, layer_bytes
from finetune_api.planner.optimization import optimization
from finetune_api.planner.shape import shape_of
from finetune_api.status import ModelFacts
from tests.unit.api.values import model_facts, preflight, small_model, spec

LORA, QLORA = TuningType.LORA, TuningType.QLORA

# parameters, hidden size, layers, vocabulary, inner width, model type: from the models' config.json
SHAPES = {
    "Qwen-1.8B": (1.84e9, 2048, 24, 151936, 5504, "llama"),
    "Qwen-7B": (7.72e9, 4096, 32, 151936, 11008, "llama"),
    "Qwen-14B": (14.17e9, 5120, 40, 152064, 13696, "llama"),
    "llama-2-7b": (6.74e9, 4096, 32, 32000, 11008, "llama"),
    "llama-2-13b": (13.02e9, 5120, 40, 32000, 13824, "llama"),
    "llama-3-8b": (8.03e9, 4096, 32, 128256, 14336, "llama"),
    "llama-3.2-3b": (3.21e9, 3072, 28, 128256, 8192, "llama"),
    "mistral-7b": (7.24e9, 4096, 32, 32000, 14336, "mistral"),
    "falcon-7b": (7.22e9, 4544, 32, 65024, 18176, "falcon"),
    "gemma-2b": (2.51e9, 2048, 18, 256000, 16384, "gemma"),
    "gemma-7b": (8.54e9, 3072, 28, 256000, 24576, "gemma"),
    "phi-2": (2.78e9, 2560, 32, 51200, 10240, "phi"),
    "phi-3-mini": (3.82e9, 3072, 32, 32064, 8192, "phi3"),
    "stablelm-3b": (3.64e9, 4096, 16, 50432, 16384, "gpt_neox"),
    "tiny-llama-1.1b": (1.1e9, 2048, 22, 32000, 5632, "llama"),
}

QWEN = "QwenLM/Qwen README, profiling table (A100-80)"
LITGPT_A10G = "Lightning-AI/litgpt config_hub/finetune/README.md (A10G, allocated)"
LITGPT_A100 = "Lightning-AI/litgpt tutorials/resource-tables.md (A100-40, allocated)"
EVERY, QUERY_AND_VALUE = 1.0, 0.24
# model, method, micro batch, length, LoRA rank, share of the linear layers with an adapter, measured GB per GPU
MEASURED = [
    ("Qwen-1.8B", LORA, 1, 1024, 64, EVERY, 8.4, QWEN),
    ("Qwen-7B", LORA, 1, 1024, 64, EVERY, 21.5, QWEN),
    ("Qwen-7B", LORA, 1, 8192, 64, EVERY, 36.6, QWEN),
    ("Qwen-14B", LORA, 1, 2048, 64, EVERY, 37.4, QWEN),
    ("Qwen-14B", LORA, 1, 8192, 64, EVERY, 55.2, QWEN),
    ("falcon-7b", LORA, 1, 512, 32, QUERY_AND_VALUE, 16.69, LITGPT_A10G),
    ("gemma-2b", LORA, 2, 512, 8, EVERY, 12.62, LITGPT_A10G),
    ("llama-2-7b", LORA, 2, 512, 32, QUERY_AND_VALUE, 19.77, LITGPT_A10G),
    ("llama-3-8b", LORA, 1, 512, 32, QUERY_AND_VALUE, 19.73, LITGPT_A10G),
    ("llama-3.2-3b", LORA, 1, 512, 32, QUERY_AND_VALUE, 9.67, LITGPT_A10G),
    ("mistral-7b", LORA, 2, 512, 32, QUERY_AND_VALUE, 20.66, LITGPT_A10G),
    ("phi-2", LORA, 4, 512, 8, EVERY, 13.98, LITGPT_A10G),
    ("phi-3-mini", LORA, 4, 512, 8, EVERY, 19.75, LITGPT_A10G),
    ("stablelm-3b", LORA, 1, 512, 32, QUERY_AND_VALUE, 8.58, LITGPT_A10G),
    ("tiny-llama-1.1b", LORA, 8, 512, 32, EVERY, 13.5, LITGPT_A10G),
    ("llama-2-7b", LORA, 1, 1304, 8, QUERY_AND_VALUE, 21.3, LITGPT_A100),
    ("llama-2-7b", LORA, 2, 1304, 8, QUERY_AND_VALUE, 29.07, LITGPT_A100),
    ("llama-2-13b", LORA, 1, 1304, 8, QUERY_AND_VALUE, 38.12, LITGPT_A100),
    ("falcon-7b", QLORA, 1, 512, 32, QUERY_AND_VALUE, 9.44, LITGPT_A10G),
    ("gemma-2b", QLORA, 2, 512, 16, EVERY, 11.58, LITGPT_A10G),
    ("gemma-7b", QLORA, 1, 512, 16, EVERY, 17.18, LITGPT_A10G),
    ("llama-2-7b", QLORA, 2, 512, 32, QUERY_AND_VALUE, 13.68, LITGPT_A10G),
    ("llama-3-8b", QLORA, 2, 512, 32, QUERY_AND_VALUE, 17.41, LITGPT_A10G),
    ("llama-3.2-3b", QLORA, 2, 512, 32, QUERY_AND_VALUE, 10.3, LITGPT_A10G),
    ("mistral-7b", QLORA, 2, 512, 32, QUERY_AND_VALUE, 14.29, LITGPT_A10G),
    ("phi-2", QLORA, 4, 512, 8, EVERY, 14.27, LITGPT_A10G),
    ("phi-3-mini", QLORA, 4, 512, 8, EVERY, 19.13, LITGPT_A10G),
    ("stablelm-3b", QLORA, 1, 512, 32, QUERY_AND_VALUE, 5.24, LITGPT_A10G),
    ("tiny-llama-1.1b", QLORA, 8, 512, 32, EVERY, 16.24, LITGPT_A10G),
    ("llama-2-7b", QLORA, 1, 1304, 8, QUERY_AND_VALUE, 13.84, LITGPT_A100),
    ("llama-2-13b", QLORA, 1, 1304, 8, QUERY_AND_VALUE, 22.55, LITGPT_A100),
]


def facts(name: str) -> ModelFacts:
    parameters, hidden, layers, vocabulary, _, kind = SHAPES[name]
    return model_facts(int(parameters), hidden_size=hidden, layers=layers, vocabulary_size=vocabulary, model_type=kind)


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
def test_the_estimate_is_near_a_published_measurement_and_rather_above_it(row: tuple) -> None:
    name, kind, micro, length, rank, adapted, measured, source = row
    found = estimate(
        facts(name),
        shape(
            kind,
            micro_batch_size=micro,
            sequence_length=length,
            gradient_checkpointing=source == QWEN,
            lora_rank=rank,
            adapted_share=adapted,
            double_quant=source != LITGPT_A10G,
        ),
    )
    estimated = found.total_gib * GIB
    if kind == QLORA:
        estimated += kept_by_their_bitsandbytes(name, micro * length)
    assert 0.92 < estimated / (measured * 1e9) < 1.26


def kept_by_their_bitsandbytes(name: str, tokens: int) -> float:
    """Bytes that today's bitsandbytes does not hold: until July 2024 (its pull request 1270) a 4-bit layer kept its
    input. Layers with the same input share it; the attention's output is kept in any case."""
    _, hidden, layers, _, inner, _ = SHAPES[name]
    return 2.0 * tokens * layers * (2 * hidden + inner)


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


@pytest.mark.parametrize(
    ("stage", "weights", "trainable"),
    [
        (0, 4 + 2, 4 + 8 + 4),
        (1, 2, 4 + (4 + 8) / 8),
        (2, 2, (4 + 4 + 8) / 8),
        (3, 2 / 8, (4 + 4 + 8) / 8),
    ],
    ids=["DDP", "1", "2", "3"],
)
def test_sharding_divides_what_its_stage_shards(stage: int, weights: float, trainable: float) -> None:
    """Bytes a parameter with 8 processes: DDP holds master weights whole and gradients twice; DeepSpeed's master weights
    and states are shards, of stage 2 also the gradients, of stage 3 also the weights. Its buffers have sizes of their
    own: 5·10⁸ gradients, and 10⁹ weights that are whole at once."""
    bucket, whole = (0.5e9 * 2 if stage else 0), (1e9 * 2 if stage == 3 else 0)
    found = estimate(facts("mistral-7b"), shape(TuningType.FULL, world_size=8, zero_stage=stage))
    assert found.weights_gib == pytest.approx((7.24e9 * weights + whole) / GIB, abs=0.01)
    assert found.trainable_gib == pytest.approx((7.24e9 * trainable + bucket) / GIB, abs=0.01)


def test_several_processes_hold_each_gradient_once_more_in_the_buckets_of_the_exchange() -> None:
    model = facts("mistral-7b")
    for tuning, more, size in (
        (TuningType.FULL, {}, 7.24e9 * 4),
        (TuningType.FULL, {"master_weights": MasterWeights.BF16}, 7.24e9 * 2),
        (LORA, {"lora_rank": 256}, 256 * 32 * 18 * 4096 * 4),
    ):
        alone = estimate(model, shape(tuning, **more)).trainable_gib
        two = estimate(model, shape(tuning, world_size=2, **more)).trainable_gib
        assert two - alone == pytest.approx(size / GIB, abs=0.011)


def test_a_small_model_fills_little_of_the_buffers_on_a_cpu() -> None:
    small = small_model()
    found = estimate(small, shape(TuningType.FULL, on_cpu=True, precision=Precision.FP32, world_size=2, zero_stage=3))
    assert found.weights_gib == pytest.approx(134_515_008 * 4 * 1.5 / GIB, abs=0.01), "half of it, and the whole"
    assert found.trainable_gib == pytest.approx(134_515_008 * (16 / 2 + 4) / GIB, abs=0.01)


def test_block_inputs_that_checkpoints_keep_have_the_number_format_of_the_weights() -> None:
    model, kept = facts("mistral-7b"), 32 * 4096
    for more, size in (
        ({}, 4),
        ({"master_weights": MasterWeights.BF16}, 2),
        ({"world_size": 2, "zero_stage": 2}, 2),
    ):
        given = shape(TuningType.FULL, gradient_checkpointing=True, sequence_length=8192, **more)
        other = 8192 * (layer_bytes(model, given) + 10 * 32000)
        assert estimate(model, given).activations_gib == pytest.approx((8192 * kept * size + other) / GIB, abs=0.01)
    lora = shape(LORA, gradient_checkpointing=True, sequence_length=8192)
    other = 8192 * (layer_bytes(model, lora) + 10 * 32000)
    assert estimate(model, lora).activations_gib == pytest.approx((8192 * kept * 2 + other) / GIB, abs=0.01)


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


def test_a_layer_keeps_what_its_backward_pass_needs() -> None:
    """Llama-2-7b: fp32 inputs of two norms; q, k, v, attention; three numbers of the inner width; adapters' inputs."""
    model, tokens = facts("llama-2-7b"), 1304
    layer = 2 * 4 * 4096 + 2 * (4 * 4096 + 3 * 11008)
    adapters, norms = 3 * (6 * 4096 + 11008), 2 * 4 * 4096
    logits = 10 * 32000
    for share in (0.0, 0.5, 1.0):
        found = estimate(model, shape(sequence_length=tokens, adapted_share=share)).activations_gib
        assert found == pytest.approx(tokens * (32 * (layer + share * adapters) + logits) / GIB, rel=0.02)
    full = estimate(model, shape(TuningType.FULL, sequence_length=tokens)).activations_gib
    assert full == pytest.approx(tokens * (32 * (layer + norms + 2 * (5 * 4096 + 11008)) + logits) / GIB, rel=0.02)


def test_a_feed_forward_without_a_gate_keeps_less_and_a_wide_one_more() -> None:
    falcon = facts("falcon-7b")
    gated = estimate(falcon.model_copy(update={"model_type": "llama"}), shape()).activations_gib
    assert estimate(falcon, shape()).activations_gib < gated
    gemma = estimate(facts("gemma-7b"), shape(adapted_share=0.0)).activations_gib
    kept = 28 * (2 * 4 * 3072 + 2 * (4 * 3072 + 3 * 24576)) + 10 * 256000
    assert gemma == pytest.approx(512 * kept / GIB, rel=0.03)


def test_a_quantised_base_needs_room_to_unpack_its_largest_layer() -> None:
    model = facts("llama-2-7b")
    quantised, plain = estimate(model, shape(QLORA)), estimate(model, shape(LORA))
    assert quantised.activations_gib - plain.activations_gib == pytest.approx(2 * 4096 * 11008 / GIB, abs=0.011)


def test_constants_that_are_not_quantised_too_take_half_a_bit() -> None:
    model = facts("llama-2-7b")
    plain = estimate(model, shape(QLORA, double_quant=False)).weights_gib
    double = estimate(model, shape(QLORA)).weights_gib
    assert plain - double == pytest.approx((6.74e9 - 2 * 32000 * 4096) * (0.5 - 0.127) / 8 / GIB, abs=0.011)
    single = spec(tuning={"quantization": {"doubleQuant": False}})
    hp = optimization(single, model_facts(10**9), Ledger(), on_cpu=False, zero_stage=0)
    assert not shape_of(single, preflight(single), hp, 512, world_size=1, zero_stage=0, on_cpu=False).double_quant


@pytest.mark.parametrize(
    ("names", "share"),
    [(None, 1.0), (["q_proj", "v_proj"], 0.24), (["all-linear"], 1.0), ([".*attn.*"], 1.0)],
    ids=["default", "two names", "all-linear", "pattern"],
)
def test_named_target_modules_tell_the_share_of_layers_with_an_adapter(names: list[str] | None, share: float) -> None:
    job = spec(tuning={"lora": {"targetModules": names}} if names else {})
    hp = optimization(job, model_facts(10**9), Ledger(), on_cpu=False, zero_stage=0)
    found = shape_of(job, preflight(job), hp, 512, world_size=1, zero_stage=0, on_cpu=False)
    assert found.adapted_share == pytest.approx(share)


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
