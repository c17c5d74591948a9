"""Where the cluster code keeps things: the source tree is read, the cache is written, nothing else is touched.

This module and everything it imports is standard library only, because it runs before any virtual environment exists.
"""

from __future__ import annotations

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).resolve().parent
TOOL_MODULES = REPO / "hack" / "tools"
IMAGE_FILES = REPO / "hack" / "images"


def cache_root() -> Path:
    """The folder outside the tree that holds binaries, images and cluster state; created on first use."""
    override = os.environ.get("FINETUNE_CACHE")
    root = Path(override) if override else Path.home() / ".cache" / "finetune-operator"
    root.mkdir(parents=True, exist_ok=True)
    return root.resolve()


def write_if_changed(path: Path, text: str) -> None:
    """The file holds the text; an equal file is not touched, since kube-proxy ends when its own is written."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def state_dir(profile: str) -> Path:
    """State of one cluster profile: pids, logs, certificates, kubeconfig, etcd data."""
    return cache_root() / "cluster" / profile
