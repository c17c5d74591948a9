"""The balance of a mixture's router as a part of the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from finetune_api.runfile import RunFile


def router_inputs(model: nn.Module, run: RunFile) -> dict[str, bool]:
    """What to pass to model so that its output holds the router's part; empty for a dense model or weight 0."""
    return {"output_router_logits": True} if router_weight(model, run) else {}


def router_weight(model: nn.Module, run: RunFile) -> float:
    """The run's weight of the router's loss, else the model's own coefficient; 0 for a dense model."""
    own = getattr(_config(model), "router_aux_loss_coef", None)
    if own is None:
        return 0.0
    asked = run.hyperparameters.router_loss_weight
    return float(own) if asked is None else asked


def router_loss(output: Any, model: nn.Module, run: RunFile) -> Tensor | None:
    """The weighted balance loss of a pass made with router_inputs; None for a dense model.

    It is the load-balancing loss of Switch Transformers (Fedus et al., 2021, equations 4 to 6) over all layers as the
    model works it out. Switch models add the z-loss of ST-MoE (Zoph et al., 2022) by the config's own coefficient.
    """
    weight = router_weight(model, run)
    if not weight:
        return None
    if getattr(output, "aux_loss", None) is not None:
        return weight * output.aux_loss.float()
    # The decoder or the encoder of a model may be dense; its part is then the number 0.
    balance = output.encoder_aux_loss + output.decoder_aux_loss
    z_loss = output.encoder_z_loss + output.decoder_z_loss
    total = weight * balance + getattr(_config(model), "router_z_loss_coef", 0.0) * z_loss
    return total.float() if isinstance(total, Tensor) else None


def _config(model: nn.Module) -> Any:
    while not hasattr(model, "config") or not hasattr(model.config, "model_type"):
        model = model.module
    return model.config
