"""How many parameters a model will have that is made from a config alone: matrices and embeddings, without torch.

Norms and biases are left out, about a hundredth of a small model and less of a large one. A transformer layer of width
h with inner width f, n heads of size d and k key-value heads has 2·h·n·d + 2·h·k·d parameters in its attention and 2·h·f
(3·h·f where the activation is gated) in its feed-forward part, once for each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.job import Task
from finetune_trainer.sources.architectures import MIXTURES, TASKS, first_size, is_tied, model_shape

_GATED = frozenset(
    {
        "cohere",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "modernbert",
        "olmo",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
    }
)
_LEARNED_POSITIONS = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "opt"})
_ENCODERS_WITHOUT_POSITIONS = frozenset({"modernbert"})
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HEAD_SIZES = ("head_dim", "d_kv")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
_INNER = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "hidden_dim")


def estimate_parameters(config: Mapping[str, Any], *, field: str = "model.uri") -> int:
    """The number of parameters, within a few percent. Raises FinetuneError(ModelUnsupported) for a missing size."""
    model_type = str(config.get("model_type"))
    shape = model_shape(config, field=field)
    width = shape.hidden_size
    attention = _attention(config, width)
    sparse, dense = _feed_forward(config, width)
    if Task.SEQ2SEQ in TASKS.get(model_type, frozenset()):
        decoders = first_size(config, ("num_decoder_layers",)) or shape.layers // 2
        sparse_layers = _sparse_layers(config, shape.layers) if model_type in MIXTURES else 0
        layers = (shape.layers + decoders) * attention  # a decoder's layer also looks at the encoder
        layers += sparse_layers * sparse + (shape.layers - sparse_layers) * dense
    else:
        count = first_size(config, ("num_hidden_groups",)) or shape.layers  # ALBERT's layers share their weights
        layers = count * (attention + (sparse if model_type in MIXTURES else dense))
    return layers + _embeddings(config, model_type, width, shape.vocabulary_size)


def _attention(config: Mapping[str, Any], width: int) -> int:
    heads = first_size(config, _HEADS) or 1
    size = first_size(config, _HEAD_SIZES) or width // heads
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        key_value = 1
    else:
        key_value = first_size(config, _KEY_VALUE_HEADS) or heads
    return 2 * width * heads * size + 2 * width * key_value * size


def _feed_forward(config: Mapping[str, Any], width: int) -> tuple[int, int]:
    """(of a layer with experts, of a layer without)."""
    inner = first_size(config, _INNER) or 4 * width
    gated = config.get("model_type") in _GATED or str(config.get("feed_forward_proj", "")).startswith("gated")
    matrices = 3 if gated else 2
    experts = first_size(config, ("num_local_experts", "num_experts")) or 1
    each = first_size(config, ("moe_intermediate_size",)) or inner
    shared = first_size(config, ("shared_expert_intermediate_size",)) or 0
    if config.get("model_type") != "qwen2_moe":
        shared = 0
    return matrices * width * (experts * each + shared) + experts * width, matrices * width * inner


def _sparse_layers(config: Mapping[str, Any], layers: int) -> int:
    names = ("num_sparse_encoder_layers", "num_sparse_decoder_layers")
    given = [first_size(config, (name,)) for name in names]
    return sum(count or layers // 4 for count in given)


def _embeddings(config: Mapping[str, Any], model_type: str, width: int, vocabulary: int) -> int:
    encoder = Task.MASKED_LM in TASKS.get(model_type, frozenset())
    size = first_size(config, ("embedding_size", "word_embed_proj_dim")) or width
    total = vocabulary * size
    if size != width:
        total += size * width
    if encoder:
        total += size * width  # the head's dense layer; its last one is the embedding again
    elif not is_tied(config):
        total += vocabulary * size
    learned = model_type in _LEARNED_POSITIONS or (encoder and model_type not in _ENCODERS_WITHOUT_POSITIONS)
    if learned:
        total += size * (first_size(config, ("max_position_embeddings", "n_positions")) or 0)
    return total
