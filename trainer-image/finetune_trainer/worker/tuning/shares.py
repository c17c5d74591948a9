"""How much of a model trains, is adapted and is quantised: counted, not taken from what was asked for."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize

from finetune_trainer.worker.experts import expert_state


def parameter_shares(model: nn.Module) -> dict[str, Any]:
    """Counts of all, trainable, adapted and quantised parameters, and the shares of all that they are.

    adapted: parameters of the base that an adapter changes (LoRA's update, IA3's scaling). Sharded parameters and
    quantised ones are counted by the shape that they stand for.
    """
    adapted_weights = _adapted(model)
    total = trainable = quantised = adapted = 0
    for module in model.modules():
        packed = getattr(module, "parametrizations", {})
        for name in packed:
            state = expert_state(module, name)
            weights = module.parametrizations[name].original
            count = prod(state.shape) if state is not None else weights.numel()
            quantised += count if state is not None else 0
            total += count
            trainable += count if weights.requires_grad else 0
            adapted += count if id(weights) in adapted_weights else 0
    seen = {id(m.original) for m in model.modules() if isinstance(m, parametrize.ParametrizationList)}
    for parameter in model.parameters():
        if id(parameter) in seen:
            continue
        state = getattr(parameter, "quant_state", None)
        count = prod(state.shape if state is not None else getattr(parameter, "ds_shape", parameter.shape))
        total += count
        trainable += count if parameter.requires_grad else 0
        quantised += count if state is not None or parameter.dtype is torch.int8 else 0
        adapted += count if id(parameter) in adapted_weights else 0
    return {
        "total": total,
        "trainable": trainable,
        "trainableShare": trainable / total,
        "adapted": adapted,
        "adaptedShare": adapted / total,
        "quantised": quantised,
        "quantisedShare": quantised / total,
    }


def _adapted(model: nn.Module) -> set[int]:
    """Identities of the base's weights that an adapter layer stands on."""
    found: set[int] = set()
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base, name = module.get_base_layer(), getattr(module, "parameter_name", "weight")
        if parametrize.is_parametrized(base, name):
            found.add(id(base.parametrizations[name].original))
        elif isinstance(weight := getattr(base, name, None), nn.Parameter):
            found.add(id(weight))
    return found
