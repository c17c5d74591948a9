"""The written pages: links lead somewhere, examples in them are valid, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import unsupported

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    prose = re.sub(r"`[^`\n]*`(?!\])", "", page.read_text())  # a pattern in a code span is no link
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = page if not path else (page.parent / path).resolve()
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def manifests() -> list[Any]:
    found = []
    for page in PAGES:
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
            document = yaml.safe_load(block)
            if document.get("kind") == "FineTuneJob":
                found.append(pytest.param(document, id=f"{page.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.parametrize("document", manifests())
def test_jobs_in_the_pages_are_valid(document: dict[str, Any]) -> None:
    assert unsupported(FineTuneJobSpec.from_json(document["spec"])) == []


def test_the_readme_shows_the_main_example() -> None:
    example = (ROOT / "examples" / "finetunejob.yaml").read_text()
    assert f"```yaml\n{example}```" in (ROOT / "README.md").read_text()


def test_every_direct_dependency_has_a_line() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for source in sorted((ROOT / "requirements").glob("*.in")):
        for line in source.read_text().splitlines():
            name = re.match(r"[a-z][a-z0-9-]*", line)
            if name:
                assert re.search(rf"^\|.*\b{re.escape(name[0])}\b.*\|", text, re.MULTILINE), f"{source.name}: {name[0]}"


def test_make_targets_and_files_in_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}( [a-z-]+)*:|^[a-z -]*\b{target}\b[a-z -]*:", makefile, re.MULTILINE), (
                f"{page.name}: make {target}"
            )


def test_the_map_names_files_that_exist() -> None:
    block = re.search(r"## The map of files.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    folder = ROOT
    for line in block[1].splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT / names[0]
        for name in names:
            assert (ROOT / name if not line.startswith(" ") else folder / name).exists(), line


def test_every_test_that_the_page_on_numerics_names_exists() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "numerics.md").read_text())
    written = "".join(path.read_text() for path in (ROOT / "tests" / "train").rglob("test_*.py"))
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in written] == []
