"""Names of parameters: what to say when a pattern matches none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from finetune_api.failures import FinetuneError

_SHOWN = 5


def unmatched(pattern: str, names: Iterable[str], *, field: str) -> FinetuneError:
    """The refusal of a pattern that matches none of names; field: its spec path, without `spec.`."""
    return FinetuneError(
        f"The pattern {pattern!r} matches no parameter of this model. Close are: {closest(pattern, names)}.",
        failure_class="InvalidSpec",
        field=f"spec.{field}",
    )


def closest(wanted: str, names: Iterable[str]) -> str:
    """The names most like wanted, one for each kind of layer, as text."""
    # Layers repeat: one name stands for those that differ in a number only.
    kinds = {re.sub(r"\.\d+\.", ".*.", name): name for name in reversed(list(names))}
    plain = wanted.strip("*.")
    holding = [kind for kind in kinds if plain and plain in kind]
    alike = difflib.get_close_matches(wanted, kinds, n=_SHOWN, cutoff=0.0)
    return ", ".join(list(dict.fromkeys([*holding, *alike]))[:_SHOWN])
