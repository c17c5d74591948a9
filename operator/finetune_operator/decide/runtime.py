"""What it means that the container runtime of a node could not start a container."""

from __future__ import annotations

import re

from finetune_operator.decide.cause import Cause
from finetune_operator.decide.documents import clean

# What the NVIDIA runtime hook, and containerd for devices by CDI, say about a driver or device they cannot use.
_ACCELERATOR = re.compile(
    r"nvidia-container-cli|nvidia-container-runtime|unresolvable CDI device|inject CDI|version mismatch.*NVML"
    r"|NVML.*version mismatch",
    re.IGNORECASE,
)
_WRONG_ARCHITECTURE = re.compile(r"exec format error", re.IGNORECASE)


def start_failure(text: str, where: str, node: str | None) -> Cause:
    """The class of a container that its node could not start; text is what the runtime said."""
    said = clean(text)
    if _ACCELERATOR.search(said):
        return Cause("AcceleratorMismatch", f"{where} got no usable accelerator: {said}", node=node)
    return Cause("ContainerCannotRun", f"{where} could not be started: {said or 'the node gives no reason'}", node=node)


def has_wrong_architecture(last_words: str) -> bool:
    """Whether the program is for another processor than the node's: the container starts and ends at once."""
    return _WRONG_ARCHITECTURE.search(last_words) is not None
