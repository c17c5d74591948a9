"""Where each field of a YAML document stands."""

from __future__ import annotations

from collections.abc import Sequence

import yaml


class Lines:
    """Finds the line of a field, counted from 1, in one YAML document."""

    def __init__(self, root: yaml.Node) -> None:
        self._root = root

    def of(self, path: Sequence[str | int]) -> int:
        """The line of the field at path; of the nearest field around it if it is absent."""
        node, line = self._root, self._root.start_mark.line
        for part in path:
            found = _child(node, part)
            if found is None:
                break
            node, line = found
        return int(line) + 1

    def duplicates(self) -> list[tuple[str, int]]:
        """Keys that stand twice in one mapping, with the line of the second."""
        return list(_duplicates(self._root))


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if getattr(key, "value", None) == part:
                return value, key.start_mark.line
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part].start_mark.line
    return None


def _duplicates(node: yaml.Node) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(getattr(key, "value", ""))
            if name in seen:
                found.append((name, key.start_mark.line + 1))
            seen.add(name)
            found += _duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found += _duplicates(item)
    return found
