"""LoRA on fused experts that are held in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper, _LoraFactorsProxy
from torch import Tensor, nn
from torch.nn.utils import parametrize

from finetune_trainer.worker.experts import expert_state, fused_parameters


@contextmanager
def as_if_plain(model: nn.Module) -> Iterator[None]:
    """While adapters are attached, 4-bit fused weights look like plain ones of the same shape, without values.

    PEFT names the adapters of a layer's two expert weights by the order in which it finds them, and that order is
    another one for quantised weights: the file would not fit the unquantised base, or fit it crosswise.
    """
    packed = [(m, n, expert_state(m, n)) for m, n, _ in list(fused_parameters(model)) if expert_state(m, n) is not None]
    kept = []
    for module, name, state in packed:
        steps = list(module.parametrizations[name])
        original = module.parametrizations[name].original
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, nn.Parameter(_shape_only(original, state), requires_grad=False))
        kept.append((module, name, original, steps))
    try:
        yield
    finally:
        for module, name, original, steps in kept:
            setattr(module, name, original)
            for step in steps:
                parametrize.register_parametrization(module, name, step, unsafe=True)


def _shape_only(packed: Tensor, state: Any) -> Tensor:
    """Shape, number format and device of a quantised weight, at the cost of one number."""
    return torch.empty((), dtype=state.dtype, device=packed.device).expand(state.shape)


class QuantisedExperts(ParamWrapper):
    """PEFT's wrapper for a weight that bitsandbytes holds in 4 bits.

    PEFT's own reads the weight before it has put its update on it. Where both weights of a layer's experts are adapted,
    that reading lands in torch's cache of dequantised weights and the update is lost, or it ends in an error. This one
    asks for nothing but shape and number format, and hangs the update behind the dequantisation.
    """

    def get_param(self) -> Tensor:
        """A tensor with the weight's shape, number format and device, but without its values."""
        base = self.get_base_layer()
        packed = base.parametrizations[self.parameter_name].original
        return _shape_only(packed, expert_state(base, self.parameter_name))

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        steps = self.get_base_layer().parametrizations[self.parameter_name]
        own = [_LoraFactorsProxy(*self.get_delta_factors(name)) for name in active_adapters if name in self.lora_A]
        before = len(steps)
        steps.extend(own)
        try:
            yield
        finally:
            del steps[before : before + len(own)]


def adapt_quantised_experts(model: nn.Module) -> None:
    """Let each adapter on a 4-bit fused weight of model be a QuantisedExperts. Names and files stay PEFT's."""
    for module in model.modules():
        if type(module) is ParamWrapper and expert_state(module.get_base_layer(), module.parameter_name) is not None:
            module.__class__ = QuantisedExperts
