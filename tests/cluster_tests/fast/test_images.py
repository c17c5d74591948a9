"""An image's tag changes exactly when something that goes into it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.images import content_digest, copied_sources

DOCKERFILE = """\
ARG BASE=debian:trixie-slim
FROM ${BASE} AS build
COPY --chown=1:1 requirements.txt \\
     /requirements.txt
FROM ${BASE}
COPY --from=build /opt /opt
COPY ["app folder", "/app"]
ADD src/*.py /src/
"""


@pytest.fixture
def context(tmp_path: Path) -> Path:
    for name in ("requirements.txt", "app folder/main.py", "src/a.py", "src/notes.md", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    return tmp_path


def digest(context: Path, **arguments: str) -> str:
    return content_digest(context / "Dockerfile", context, arguments, None)


def test_only_copies_from_the_context_count() -> None:
    assert copied_sources(DOCKERFILE) == ["requirements.txt", "app folder", "src/*.py"]


def test_a_file_that_is_not_copied_changes_nothing(context: Path) -> None:
    before = digest(context)
    (context / "README.md").write_text("new")
    (context / "src" / "notes.md").write_text("new")
    (context / "app folder" / "__pycache__").mkdir()
    (context / "app folder" / "__pycache__" / "main.pyc").write_text("new")
    assert digest(context) == before


@pytest.mark.parametrize("name", ["requirements.txt", "app folder/main.py", "src/a.py", "Dockerfile"])
def test_a_changed_input_changes_the_tag(context: Path, name: str) -> None:
    before = digest(context)
    with (context / name).open("a") as file:
        file.write("\n# more")
    assert digest(context) != before


def test_mode_arguments_and_target_count(context: Path) -> None:
    tags = {
        digest(context),
        digest(context, BASE="other"),
        content_digest(context / "Dockerfile", context, {}, "build"),
    }
    (context / "src" / "a.py").chmod(0o755)
    tags.add(digest(context))
    assert len(tags) == 4
