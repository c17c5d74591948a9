"""A first, rough size rule: peak GPU memory of one process from the model's shape.

Bytes per parameter follow mixed-precision training with fp32 master weights: 4 weights + 4 gradients + 8 Adam states.
The activation figures are the usual per-layer counts of a decoder with a fused attention kernel (34 · hidden bytes per
token and layer in 16 bit, Korthikanti et al. 2022, without the attention matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.job import Optimizer, Precision, TuningType
from finetune_api.status import MemoryEstimate, ModelFacts

GIB = 2**30
USABLE_SHARE = 0.92  # what is left of a GPU's memory after the driver and the allocator's fragments
_EIGHT_BIT = (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT)


@dataclass(frozen=True)
class Shape:
    """What the size rule looks at beside the model."""

    tuning: TuningType
    precision: Precision
    optimizer: Optimizer
    micro_batch_size: int
    sequence_length: int
    gradient_checkpointing: bool
    lora_rank: int
    world_size: int
    zero_stage: int
    on_cpu: bool


def estimate(model: ModelFacts, shape: Shape) -> MemoryEstimate:
    """Estimated peak memory in GiB of one process."""
    weights = _weight_bytes(model, shape)
    trainable = _trainable_bytes(model, shape)
    activations = _activation_bytes(model, shape)
    reserve = 0.2 * GIB if shape.on_cpu else 1.0 * GIB + 0.05 * (weights + trainable + activations)
    total = weights + trainable + activations + reserve
    return MemoryEstimate(
        total_gib=round(total / GIB, 2),
        weights_gib=round(weights / GIB, 2),
        trainable_gib=round(trainable / GIB, 2),
        activations_gib=round(activations / GIB, 2),
        reserve_gib=round(reserve / GIB, 2),
    )


def _compute_bytes(shape: Shape) -> int:
    return 4 if shape.precision == Precision.FP32 else 2


def _weight_bytes(model: ModelFacts, shape: Shape) -> float:
    sharded = shape.world_size if shape.zero_stage == 3 else 1
    if shape.tuning == TuningType.QLORA:
        embedding = min(model.parameters, 2 * model.vocabulary_size * model.hidden_size)
        # 4 bits, and 0.127 bits of doubly quantised constants (Dettmers et al. 2023); embeddings stay in 16 bit
        return (model.parameters - embedding) * (4.127 / 8) + 2 * embedding
    if shape.tuning == TuningType.FULL:
        # fp32 master weights; autocast adds a copy in the compute type
        copy = 0 if shape.precision == Precision.FP32 else 2
        return model.parameters * (4 + copy) / sharded
    return model.parameters * _compute_bytes(shape) / sharded


def _trainable_bytes(model: ModelFacts, shape: Shape) -> float:
    states = 2 if shape.optimizer in _EIGHT_BIT else 8
    if shape.tuning == TuningType.FULL:
        per_parameter = 4 + states
        sharded = shape.world_size if shape.zero_stage >= 2 else 1
        return model.parameters * per_parameter / sharded
    # every linear layer of a decoder block: about 18 · hidden inputs and outputs
    adapter = shape.lora_rank * model.layers * 18 * model.hidden_size
    return float(adapter * (4 + 4 + states))


def _activation_bytes(model: ModelFacts, shape: Shape) -> float:
    tokens = shape.micro_batch_size * shape.sequence_length
    width = _compute_bytes(shape)
    layer = 17 * model.hidden_size * width
    if shape.gradient_checkpointing:
        blocks = model.layers * model.hidden_size * width + layer
    else:
        blocks = model.layers * layer
    logits = model.vocabulary_size * (4 + 4 + width)  # fp32 logits, their gradient and the model's own copy
    return float(tokens * (blocks + logits))
