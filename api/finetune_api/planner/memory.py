"""A first, rough size rule: peak GPU memory of one process from the model's shape.

Bytes per parameter follow mixed-precision training with fp32 master weights: 4 weights + 4 gradients + 8 Adam states.
The activation figures are the usual per-layer counts of a decoder with a fused attention kernel (34 · hidden bytes per
token and layer in 16 bit, Korthikanti et al. 2022, without the attention matrix).
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_api.job import MasterWeights, Optimizer, Precision, QuantizationType, Task, TuningType
from finetune_api.status import MemoryEstimate, ModelFacts

GIB = 2**30
USABLE_SHARE = 0.92  # what is left of a GPU's memory after the driver and the allocator's fragments
_EIGHT_BIT = (
    Optimizer.ADAMW_8BIT,
    Optimizer.PAGED_ADAMW_8BIT,
    Optimizer.LION_8BIT,
    Optimizer.PAGED_LION_8BIT,
)
_WRITERS = (Task.CAUSAL_LM, Task.SEQ2SEQ, Task.MASKED_LM)


@dataclass(frozen=True)
class Shape:
    """What the size rule looks at beside the model.

    tuning: None where nothing trains. sequences: of one record that pass through the model at once. trained_share: of
    the parameters under Full. reference: whether a second copy of the base stays in memory. further_bytes: weights of
    teacher and reward models.
    """

    tuning: TuningType | None
    precision: Precision
    optimizer: Optimizer
    micro_batch_size: int
    sequence_length: int
    gradient_checkpointing: bool
    lora_rank: int
    world_size: int
    zero_stage: int
    on_cpu: bool
    quantization: QuantizationType | None = None
    task: Task = Task.CAUSAL_LM
    master_weights: MasterWeights = MasterWeights.FP32
    sequences: int = 1
    trained_share: float = 1.0
    virtual_tokens: int = 0
    projection: bool = False
    reference: bool = False
    further_bytes: int = 0


def estimate(model: ModelFacts, shape: Shape) -> MemoryEstimate:
    """Estimated peak memory in GiB of one process."""
    weights = _weight_bytes(model, shape) + shape.further_bytes
    if shape.reference:
        weights += model.parameters * _compute_bytes(shape)
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
    if shape.quantization is not None:
        embedding = min(model.parameters, 2 * model.vocabulary_size * model.hidden_size)
        # 4 bits, and 0.127 bits of doubly quantised constants (Dettmers et al. 2023); embeddings stay in 16 bit
        bits = 8.0 if shape.quantization == QuantizationType.INT8 else 4.127
        return (model.parameters - embedding) * (bits / 8) + 2 * embedding
    if model.quantization is not None:
        return float(model.weight_bytes)
    if shape.tuning == TuningType.FULL and shape.master_weights == MasterWeights.FP32:
        # fp32 master weights; autocast adds a copy in the compute type
        copy = 0 if shape.precision == Precision.FP32 else 2
        return model.parameters * (4 + copy) / sharded
    return model.parameters * _compute_bytes(shape) / sharded


def _trainable_bytes(model: ModelFacts, shape: Shape) -> float:
    """Gradients, optimizer states, and the weights of an adapter."""
    if shape.tuning is None:
        return 0.0
    states = 2 if shape.optimizer in _EIGHT_BIT else 8
    if shape.tuning == TuningType.FULL:
        if shape.master_weights == MasterWeights.BF16:
            per_parameter = 2 + min(states, 4)
        else:
            per_parameter = 4 + states
        sharded = shape.world_size if shape.zero_stage >= 2 else 1
        return model.parameters * shape.trained_share * per_parameter / sharded
    return float(_adapter_parameters(model, shape) * (4 + 4 + states))


def _adapter_parameters(model: ModelFacts, shape: Shape) -> int:
    width, layers = model.hidden_size, model.layers
    if shape.tuning == TuningType.IA3:
        return layers * 6 * width  # keys, values and the inner width of the feed-forward
    if shape.tuning == TuningType.PROMPT_TUNING:
        return shape.virtual_tokens * width
    if shape.tuning == TuningType.P_TUNING:
        return shape.virtual_tokens * width + 3 * width * width  # the prompt encoder has three layers
    if shape.tuning == TuningType.PREFIX_TUNING:
        prefix = shape.virtual_tokens * layers * 2 * width
        return prefix if not shape.projection else width * width + width * layers * 2 * width
    # every linear layer of a decoder block: about 18 · hidden inputs and outputs
    return shape.lora_rank * layers * 18 * width


def _activation_bytes(model: ModelFacts, shape: Shape) -> float:
    tokens = shape.micro_batch_size * shape.sequences * (shape.sequence_length + shape.virtual_tokens)
    width = _compute_bytes(shape)
    layer = 17 * model.hidden_size * width
    if shape.tuning is None:
        blocks = 2 * layer
    elif shape.gradient_checkpointing:
        blocks = model.layers * model.hidden_size * width + layer
    else:
        blocks = model.layers * layer
    # fp32 logits, their gradient and the model's own copy; a classifier has a handful of outputs
    logits = model.vocabulary_size * (4 + 4 + width) if shape.task in _WRITERS else 0
    return float(tokens * (blocks + logits))
