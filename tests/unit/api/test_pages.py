"""The generated pages: the same as the checked-in ones, and complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from finetune_api import crd
from finetune_api.failures import TABLE
from finetune_api.planner.support import CHOICES, NOT_YET
from hack import generate
from hack.markdown import cell

ROOT = Path(__file__).parents[3]
PAGES = generate.pages()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_source_gives(name: str) -> None:
    assert (ROOT / name).read_text() == PAGES[name], f"{name}: run make generate"


@pytest.mark.parametrize("row", TABLE.values(), ids=lambda row: row.name)
def test_every_failure_class_has_a_section_where_its_runbook_points(row) -> None:
    path, anchor = row.runbook.split("#")
    headings = re.findall(r"^## (.+)$", PAGES[path], re.MULTILINE)
    assert [heading.lower() for heading in headings].count(anchor) == 1
    section = PAGES[path].split(f"\n## {row.name}\n")[1].split("\n## ")[0]
    assert row.summary in section and row.hint in section
    for part in (
        "**Symptom:**",
        "**Who acts:**",
        "**Retried:**",
        "**Does another attempt help?**",
        "How to look:",
        "Likely causes:",
        "What to do:",
    ):
        assert part in section, part
    if row.exit_code is not None:
        assert f"**Exit code:** {row.exit_code}" in section


def test_every_refused_field_is_on_the_page_of_what_is_missing() -> None:
    page = PAGES["docs/supported.md"]
    for path in (*CHOICES, *NOT_YET):
        assert f"| `{path}` |" in page


@pytest.mark.parametrize(
    ("name", "definition"), [("finetunejob", crd.finetunejob()), ("gpupool", crd.gpupool())], ids=lambda v: str(v)[:12]
)
def test_every_top_level_field_is_on_the_reference_page(name: str, definition: dict) -> None:
    page = PAGES[f"docs/reference/{name}.md"]
    root = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for part in ("spec", "status"):
        for field, node in root["properties"][part]["properties"].items():
            assert f"| `{field}`" in page or f"### {part}.{field}" in page, field
            assert cell(node["description"]) in page, field


@pytest.mark.parametrize("name", PAGES)
def test_links_between_headings_lead_somewhere(name: str) -> None:
    page = PAGES[name]
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    }
    missing = [anchor for anchor in re.findall(r"\]\(#([^)]+)\)", page) if anchor not in anchors]
    assert missing == []
