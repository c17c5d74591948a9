"""Where everything lies below an output's prefix.

    CLAIM.json                                     the owner (claims.py)
    fences/<n>.taken                               number n is taken: every lower one is cut off
    fences/<n>                                     the record of attempt n: what counts from here on
    checkpoints/fence-<n>/step-<s>/<name>          the files of node 0
    checkpoints/fence-<n>/step-<s>/nodes/<k>/<name>   the files of node k
    checkpoints/fence-<n>/step-<s>/nodes/<k>.json  what node k has uploaded, after its files; or why it brings none
    checkpoints/fence-<n>/step-<s>/MANIFEST.json   last, created if absent
    removals/<n>/<token>                           what a prune of attempt n is about to remove

What is published lies directly below the prefix (artifacts.py).
"""

from __future__ import annotations

import re

from finetune_trainer.store.objects import join_key

MANIFEST = "MANIFEST.json"
NODES = "nodes"
_FENCE_KEY = re.compile(r"([1-9]\d{0,8})(\.taken)?")
_STEP_KEY = re.compile(r"fence-([1-9]\d{0,8})/step-(0|[1-9]\d{0,11})/(.+)")
_REMOVAL_KEY = re.compile(r"([1-9]\d{0,8})/[0-9a-f]+")


def fence_key(prefix: str, number: int) -> str:
    """The record of a fence."""
    return join_key(prefix, f"fences/{number}")


def taken_key(prefix: str, number: int) -> str:
    """What cuts every lower fence off."""
    return f"{fence_key(prefix, number)}.taken"


def parse_fence_key(prefix: str, key: str) -> tuple[int, bool] | None:
    """The fence's number and whether the key is its record (else it only takes the number); None for other keys."""
    match = _FENCE_KEY.fullmatch(key.removeprefix(join_key(prefix, "fences") + "/"))
    return (int(match[1]), match[2] is None) if match else None


def checkpoint_prefix(prefix: str, fence: int, step: int) -> str:
    """The key under which the files of one checkpoint lie."""
    return join_key(prefix, f"checkpoints/fence-{fence}/step-{step}")


def parse_checkpoint_key(prefix: str, key: str) -> tuple[int, int, str] | None:
    """Fence, step and the rest of a key below `checkpoints/`; None for a key of another shape."""
    match = _STEP_KEY.fullmatch(key.removeprefix(join_key(prefix, "checkpoints") + "/"))
    return (int(match[1]), int(match[2]), match[3]) if match else None


def path_of(node: int, name: str) -> str:
    """Where a node's file lies below its checkpoint: files of two nodes never share a key."""
    return name if node == 0 else f"{NODES}/{node}/{name}"


def node_document(node: int) -> str:
    """Where a node's list of files lies below its checkpoint."""
    return f"{NODES}/{node}.json"


def removal_key(prefix: str, fence: int, token: str) -> str:
    """What one prune is about to remove."""
    return join_key(prefix, f"removals/{fence}/{token}")


def parse_removal_key(prefix: str, key: str) -> int | None:
    """The fence whose prune wrote it; None for a key of another shape."""
    match = _REMOVAL_KEY.fullmatch(key.removeprefix(join_key(prefix, "removals") + "/"))
    return int(match[1]) if match else None
