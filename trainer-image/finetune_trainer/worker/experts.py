"""Mixtures of experts: where the experts are, their quantisation, and what ZeRO-3 has to know of them.

Most families hold the experts of a layer in fused 3-D parameters ([experts, out, in]), which neither quantisation nor
LoRA of linear layers reaches; Switch holds a linear layer for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from finetune_api.job import QuantizationType
from finetune_api.runfile import RunQuantization

EXPERTS = "experts"


def sparse_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a router and its experts, by name; none in a dense model."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, EXPERTS, None), nn.Module) and EXPERTS in dict(module.named_children())
    ]


def fused_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, name in it, name in the model) of each 3-D expert weight, also where it is quantised."""
    for block_name, block in sparse_blocks(model):
        for inner, module in block.get_submodule(EXPERTS).named_modules():
            path = ".".join(part for part in (block_name, EXPERTS, inner) if part)
            for name in _own_weights(module):
                if len(_shape(module, name)) == 3:
                    yield module, name, f"{path}.{name}"


def _own_weights(module: nn.Module) -> list[str]:
    quantised = list(getattr(module, "parametrizations", {}))
    return [*(name for name, _ in module.named_parameters(recurse=False)), *quantised]


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    state = expert_state(module, name)
    if state is not None:
        return tuple(state.shape)
    parameter = module.get_parameter(name)
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def expert_state(module: nn.Module, name: str) -> Any:
    """bitsandbytes' quantisation state of a fused weight; None where it is not quantised."""
    if not parametrize.is_parametrized(module, name):
        return None
    return next((p.quant_state for p in module.parametrizations[name] if hasattr(p, "quant_state")), None)


def quantise_experts(model: nn.Module, quantization: RunQuantization, device: torch.device | None) -> None:
    """Hold the fused experts in 4 bits, as the linear layers are; without this they stay in 16 bits without a word.

    device: where they are quantised and stay; each is moved there on its own, so that the whole never lies there in
    16 bits.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module, name, _ in list(fused_parameters(model)):
        parameter = module.get_parameter(name)
        if device is not None:
            parameter.data = parameter.data.to(device)
        replace_parameter_4bit(
            module,
            name,
            compress_statistics=quantization.double_quant,
            quant_type="fp4" if quantization.type is QuantizationType.FP4 else "nf4",
        )


def dequantise_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn quantised fused experts back into plain parameters of dtype."""
    for module, name, _ in list(fused_parameters(model)):
        if expert_state(module, name) is not None:
            value = getattr(module, name).detach().to(dtype)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(value, requires_grad=False))


def mark_leaf_modules(model: nn.Module) -> None:
    """Tell ZeRO-3 to gather a block of experts as one.

    Ranks route differently: gathered expert by expert, they would wait for each other in different collectives. It is
    also what makes LoRA on fused experts work, whose weights are read outside their own modules' passes.
    """
    from deepspeed.utils import set_z3_leaf_module

    for _, block in sparse_blocks(model):
        set_z3_leaf_module(block, True)
        _own_input(block)


def _own_input(block: nn.Module) -> None:
    """Switch's router changes its input in place, which autograd forbids on the views that ZeRO-3 hands out."""
    compute = block.forward
    block.forward = lambda hidden_states: compute(hidden_states.clone())  # type: ignore[method-assign]


def has_experts(config: Any) -> bool:
    """Whether a config is that of a mixture."""
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


def has_separate_experts(model: nn.Module) -> bool:
    """Whether an expert without tokens gets no gradient at all: where each expert has parameters of its own."""
    return bool(sparse_blocks(model)) and not any(True for _ in fused_parameters(model))
