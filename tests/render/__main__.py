"""`PYTHONPATH=api:operator:. python -m tests.render` writes the golden files anew."""

from __future__ import annotations

from tests.render.cases import CASES, FOLDER, path, render

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for stale in set(FOLDER.glob("*.yaml")) - {path(name) for name in CASES}:
        stale.unlink()
    for name in CASES:
        path(name).write_text(render(name))
