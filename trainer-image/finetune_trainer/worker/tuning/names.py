"""Names of parameters and modules: patterns that people write, and what to say when one matches nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from finetune_api.failures import FinetuneError

_SHOWN = 5


def matching(names: Iterable[str], patterns: Sequence[str], *, field: str) -> set[str]:
    """The names that a pattern matches (`*`, `?` and `[…]` as in a shell, over the whole name).

    Raises InvalidSpec for a pattern that matches nothing, with the names that come closest.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in known if fnmatchcase(name, pattern)}
        if not hits:
            raise FinetuneError(
                f"The pattern {pattern!r} matches no parameter of this model. Close are: {closest(pattern, known)}.",
                failure_class="InvalidSpec",
                field=f"spec.{field}",
            )
        found |= hits
    return found


def closest(wanted: str, names: Iterable[str]) -> str:
    """The names most like wanted, one for each kind of layer, as text."""
    # Layers repeat: one name stands for those that differ in a number only.
    kinds = {re.sub(r"\.\d+\.", ".*.", name): name for name in reversed(list(names))}
    plain = wanted.strip("*.")
    holding = [kind for kind in kinds if plain and plain in kind]
    alike = difflib.get_close_matches(wanted, kinds, n=_SHOWN, cutoff=0.0)
    return ", ".join(list(dict.fromkeys([*holding, *alike]))[:_SHOWN])


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
