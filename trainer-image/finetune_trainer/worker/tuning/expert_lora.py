"""LoRA on fused experts that are held in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import ParamWrapper, _LoraFactorsProxy
from torch import Tensor, nn

from finetune_trainer.worker.experts import expert_state


class QuantisedExperts(ParamWrapper):
    """PEFT's wrapper for a weight that bitsandbytes holds in 4 bits.

    PEFT's own reads the weight before it has put its update on it. Where both weights of a layer's experts are adapted,
    that reading lands in torch's cache of dequantised weights and the update is lost, or it ends in an error. This one
    asks for nothing but shape and number format, and hangs the update behind the dequantisation.
    """

    def get_param(self) -> Tensor:
        """A tensor with the weight's shape, number format and device, but without its values."""
        base = self.get_base_layer()
        state = expert_state(base, self.parameter_name)
        return base.parametrizations[self.parameter_name].original.new_empty((), dtype=state.dtype).expand(state.shape)

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
