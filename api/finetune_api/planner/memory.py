"""A first, rough size rule: peak GPU memory of one process from the model's shape.

Bytes per parameter follow mixed-precision training with fp32 master weights: 4 weights + 4 gradients + 8 Adam states.
Activations are counted as what autograd keeps of a decoder's block with a fused attention kernel (the way of counting
is that of Korthikanti et al. 2022). docs/planning.md names each term and compares the sum with published measurements.
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
# Model types whose feed-forward has no gate; any other is taken to have one, which keeps more.
_UNGATED = frozenset(
    {
        *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mpnet", "roberta"),
        *("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi"),
        *("starcoder2", "xlm-roberta"),
    }
)
_WRITERS = (Task.CAUSAL_LM, Task.SEQ2SEQ, Task.MASKED_LM)
# DeepSpeed's defaults: the gradients that it gathers before it exchanges them (reduce_bucket_size), and the weights that
# stage 3 holds whole at once (stage3_max_live_parameters).
_ZERO_BUCKET = 500_000_000
_ZERO_WHOLE = 1_000_000_000


@dataclass(frozen=True)
class Shape:
    """What the size rule looks at beside the model.

    tuning: None where nothing trains. sequences: of one record that pass through the model at once. trained_share: of
    the parameters under Full. reference: whether a second copy of the base stays in memory. further_bytes: weights of
    teacher and reward models. adapted_experts: whether LoRA is also on the fused experts of a mixture.
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
    double_quant: bool = True
    task: Task = Task.CAUSAL_LM
    master_weights: MasterWeights = MasterWeights.FP32
    sequences: int = 1
    trained_share: float = 1.0
    virtual_tokens: int = 0
    projection: bool = False
    reference: bool = False
    further_bytes: int = 0
    adapted_share: float = 1.0
    adapted_experts: bool = False


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


def _held_bytes(shape: Shape) -> int:
    """Of one weight of the base: Full without ZeRO holds the master weights themselves."""
    masters = shape.tuning == TuningType.FULL and shape.master_weights == MasterWeights.FP32
    return 4 if masters and shape.zero_stage == 0 else _compute_bytes(shape)


def _weight_bytes(model: ModelFacts, shape: Shape) -> float:
    if shape.quantization is not None:
        embedding = min(model.parameters, 2 * model.vocabulary_size * model.hidden_size)
        # 4 bits, and a constant of 32 bits for 64 weights, or 0.127 bits where the constants are quantised too
        # (Dettmers et al. 2023); embeddings and the output layer stay in 16 bit
        bits = 8.0 if shape.quantization == QuantizationType.INT8 else 4.127 if shape.double_quant else 4.5
        return (model.parameters - embedding) * (bits / 8) + 2 * embedding
    if model.quantization is not None:
        return float(model.weight_bytes)
    held = _held_bytes(shape)
    if shape.zero_stage == 3:
        return held * (model.parameters / shape.world_size + min(model.parameters, _ZERO_WHOLE))
    copy = _compute_bytes(shape) if held > _compute_bytes(shape) else 0  # autocast's
    return float(model.parameters * (held + copy))


def _trainable_bytes(model: ModelFacts, shape: Shape) -> float:
    """Gradients, optimizer states, master weights of their own, and what gathers gradients for the other processes."""
    if shape.tuning is None:
        return 0.0
    states = 2 if shape.optimizer in _EIGHT_BIT else 8
    if shape.tuning != TuningType.FULL:
        trained = _adapter_parameters(model, shape)
        return trained * (4 + 4 + states) + _exchange_bytes(trained, 4, shape)
    trained = model.parameters * shape.trained_share
    if shape.zero_stage > 0:
        masters_and_states = trained * (4 + states) / shape.world_size
        gradients = trained * 4 / (shape.world_size if shape.zero_stage >= 2 else 1)
        return masters_and_states + gradients + _exchange_bytes(trained, 4, shape)
    gradient = 2 if shape.master_weights == MasterWeights.BF16 else 4
    return trained * (gradient + min(states, 2 * gradient)) + _exchange_bytes(trained, gradient, shape)


def _exchange_bytes(trained: float, gradient: int, shape: Shape) -> float:
    """DDP's buckets hold each gradient once more; DeepSpeed's is one of a fixed size, of which a CPU holds what is used.

    gradient: bytes of one.
    """
    if shape.zero_stage > 0:
        return _compute_bytes(shape) * (min(trained, _ZERO_BUCKET) if shape.on_cpu else _ZERO_BUCKET)
    return trained * gradient if shape.world_size > 1 else 0.0


def _adapter_parameters(model: ModelFacts, shape: Shape) -> float:
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
    rows = shape.adapted_share * 18 * width
    if shape.adapted_experts:
        rows += (model.experts or 0) * (2 * width + 3 * (model.expert_size or 0))  # of two fused weights
    return shape.lora_rank * layers * rows


def _activation_bytes(model: ModelFacts, shape: Shape) -> float:
    tokens = shape.micro_batch_size * shape.sequences * (shape.sequence_length + shape.virtual_tokens)
    layer = layer_bytes(model, shape)
    if shape.tuning is None:
        blocks = 2 * layer
    elif shape.gradient_checkpointing:
        # what goes in to a block has the number format of the weights
        blocks = model.layers * model.hidden_size * _held_bytes(shape) + layer
    else:
        blocks = model.layers * layer
    # fp32 logits, their gradient and the model's own copy; a classifier has a handful of outputs
    logits = model.vocabulary_size * (4 + 4 + _compute_bytes(shape)) if shape.task in _WRITERS else 0
    return float(tokens * (blocks + logits)) + unpacked_bytes(model, shape)


def layer_bytes(model: ModelFacts, shape: Shape) -> float:
    """What the backward pass of one layer needs of its forward pass, in bytes per token.

    Two norms, which compute in fp32; queries, keys, values and the attention's output; of a feed-forward what goes into
    its activation, and with a gate also what comes out and the other factor. And the inputs of what trains: autocast
    makes a copy of them for each linear layer.
    """
    hidden, width, gated = model.hidden_size, _compute_bytes(shape), model.model_type not in _UNGATED
    inner = _inner_size(model)
    kept = 2 * 4 * hidden + width * (4 * hidden + (3 if gated else 1) * inner)
    inputs = 4 * hidden + (((2 if gated else 1) * hidden + inner) if inner else 0)
    if shape.tuning in (TuningType.LORA, TuningType.QLORA):
        # after dropout, and dropout's mask of a byte per number
        kept += shape.adapted_share * (width + 1) * inputs
    elif shape.tuning in (TuningType.FULL, TuningType.IA3):
        # the attention's output is an input that is kept already; a norm that trains also keeps its result in fp32
        kept += width * (inputs - hidden) + (2 * 4 * hidden if shape.tuning == TuningType.FULL else 0)
    return kept + _expert_bytes(model, shape)


def _expert_bytes(model: ModelFacts, shape: Shape) -> float:
    """What a token keeps in the fused experts that it passes through: three numbers of an expert's width and what comes
    out; where the experts train, also what goes in to their two weights. Autocast leaves their number format alone.
    """
    if model.experts is None or model.expert_size is None:
        return 0.0
    numbers = 3 * model.expert_size + model.hidden_size
    if shape.tuning == TuningType.FULL or shape.adapted_experts:
        numbers += model.hidden_size + model.expert_size
    return _held_bytes(shape) * (model.experts_per_token or model.experts) * numbers


def _inner_size(model: ModelFacts) -> float:
    """The inner width of the feed-forward beside fused experts, by the parameters of one layer, of which 4 · hidden²
    belong to attention.

    At least that of the usual layer of 12 · hidden². Of a mixture it is the shared expert's width; where its experts are
    linear layers of their own, few of the layer's parameters are for one token.
    """
    if model.expert_size is not None:
        return float(model.shared_expert_size or 0)
    hidden, matrices = model.hidden_size, 2 if model.model_type in _UNGATED else 3
    rows = 12.0 * hidden
    if model.experts is None:
        rows = max(rows, (model.parameters - model.vocabulary_size * hidden) / model.layers / hidden)
    return (rows - 4 * hidden) / matrices


def unpacked_bytes(model: ModelFacts, shape: Shape) -> float:
    """Weights that a pass makes in the compute type, in bytes.

    Of a quantised base the largest linear layer: bitsandbytes unpacks one at a time, forward and backward. Fused experts
    are made whole where they are quantised, or adapted by LoRA, and each layer's stay until the backward pass comes to
    it. Under LoRA a third more is there at once: the gradient of one of their weights, or a weight without its update.
    """
    quantised = shape.quantization is not None or model.quantization is not None
    linear = _compute_bytes(shape) * model.hidden_size * _inner_size(model) if quantised else 0.0
    if model.experts is None or model.expert_size is None or not (quantised or shape.adapted_experts):
        return linear
    experts = _compute_bytes(shape) * 3 * model.experts * model.hidden_size * model.expert_size
    layers = 1 if shape.tuning is None or shape.gradient_checkpointing else model.layers
    return experts * (layers + (1 / 3 if shape.adapted_experts else 0))
