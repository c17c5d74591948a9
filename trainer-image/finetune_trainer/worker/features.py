"""Features that only make a run faster: on where this machine has what they need, else off with the reason."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from finetune_api.runfile import RunFile


@dataclass(frozen=True)
class Features:
    """compile: by torch.compile. liger: Liger kernels. off: the fields that were asked for in vain, with the reason."""

    compile: bool
    liger: bool
    off: dict[str, str]

    @classmethod
    def of(cls, run: RunFile) -> Features:
        """What of the run's wishes can be had here. None of them changes what is learnt, so a lack ends no run."""
        hp, off = run.hyperparameters, {}
        on_gpu = run.resources.accelerator != "cpu"
        if hp.compile and (why := _why_no_compile(hp.zero_stage)) is not None:
            off["hyperparameters.compile"] = why
        if hp.liger and (why := _why_no_liger(on_gpu=on_gpu)) is not None:
            off["hyperparameters.liger"] = why
        return cls(
            hp.compile and "hyperparameters.compile" not in off, hp.liger and "hyperparameters.liger" not in off, off
        )

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {"compile": self.compile, "liger": self.liger, "off": self.off}


def _why_no_compile(zero_stage: int) -> str | None:
    """torch.compile writes C++ (and, on a GPU, launchers in C), which something has to compile."""
    if zero_stage > 0:
        return "torch.compile is not combined with ZeRO"
    compiler = os.environ.get("CXX") or "g++"
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and this image has no {compiler}"


def _why_no_liger(*, on_gpu: bool) -> str | None:
    if not on_gpu:
        return "Liger kernels run on GPUs only"
    return None if find_spec("liger_kernel") else "the image has no package liger-kernel"
