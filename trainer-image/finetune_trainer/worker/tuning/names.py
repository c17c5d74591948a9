"""Names of parameters and modules: patterns that people write, and what to say when one matches nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from finetune_trainer.sources.names import unmatched


def matching(names: Iterable[str], patterns: Sequence[str], *, field: str) -> set[str]:
    """The names that a pattern matches (`*`, `?` and `[…]` as in a shell, over the whole name).

    Raises InvalidSpec for a pattern that matches nothing, with the names that come closest.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in known if fnmatchcase(name, pattern)}
        if not hits:
            raise unmatched(pattern, known, field=field)
        found |= hits
    return found


def linear_names(model: nn.Module) -> list[str]:
    """Last names of the linear layers."""
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})


def layer_lists(model: nn.Module, length: int | None = None) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers in the order of the data's way; length: only lists of that many."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        if length is None or len(module) == length:
            found.append((name, module))
    return found
