"""Which models can be tuned, and their shape as config.json tells it. Shared by preflight and worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.failures import FinetuneError

SUPPORTED = frozenset(
    {
        "bloom",
        "codegen",
        "cohere",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mpt",
        "olmo",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
"""transformers' model_type of the dense causal language models. Mixtures of experts are not among them: quantisation
and LoRA skip fused experts without a word."""

_HEADS = ("ForCausalLM", "LMHeadModel", "Model")
# The same size has another name in some families.
_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class ModelShape:
    """Sizes that the planner needs. max_positions: longest sequence in tokens, None where the model has no limit."""

    hidden_size: int
    layers: int
    vocabulary_size: int
    max_positions: int | None


def check_architecture(config: Mapping[str, Any], *, field: str = "model.uri") -> None:
    """Returns if this release can tune a model with this config, else raises FinetuneError(ModelUnsupported)."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise _unsupported("config.json has no model_type", field)
    if model_type not in SUPPORTED:
        raise _unsupported(
            f"model type {model_type!r} is not supported; supported are {', '.join(sorted(SUPPORTED))}", field
        )
    architecture = architecture_of(config)
    if architecture is not None and not architecture.endswith(_HEADS):
        raise _unsupported(f"{architecture} is not a causal language model", field)
    if config.get("quantization_config"):
        raise _unsupported("the weights are quantised already; tuning starts from 16- or 32-bit weights", field)


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first class name of config's architectures."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def model_shape(config: Mapping[str, Any], *, field: str = "model.uri") -> ModelShape:
    """The sizes in config; raises FinetuneError(ModelUnsupported) that names the one that is missing."""
    return ModelShape(
        hidden_size=_size(config, _HIDDEN, field),
        layers=_size(config, _LAYERS, field),
        vocabulary_size=_size(config, ("vocab_size",), field),
        max_positions=_first(config, _POSITIONS),
    )


def _size(config: Mapping[str, Any], names: tuple[str, ...], field: str) -> int:
    value = _first(config, names)
    if value is None:
        raise _unsupported(f"config.json has no {names[0]}", field)
    return value


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _unsupported(why: str, field: str) -> FinetuneError:
    return FinetuneError(
        f"The base model cannot be tuned: {why}. Choose another model.",
        failure_class="ModelUnsupported",
        field=f"spec.{field}",
    )
