"""The gradient that an optimizer step is made with, written down for comparison with a formula's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.train.worker.runs import build_engine_in


def flat_gradient(model: Any) -> Any:
    """The gradients of all parameters in the order of their names, fp64; every parameter must have one."""
    return np.concatenate([p.grad.double().numpy().ravel() for _, p in sorted(model.named_parameters())])


def save_gradient(root: str, env: dict[str, str], flat: Callable[[Any], Any] = flat_gradient) -> int:
    """In a child: train the work directory at root; each step's gradient goes to gradient-<rank>.npy."""
    from transformers import TrainerCallback

    engine = build_engine_in(root)

    class Save(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            np.save(f"{root}/gradient-{env['RANK']}.npy", flat(engine.model))

    engine.add_callback(Save())
    engine.train()
    return 0
