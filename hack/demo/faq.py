"""The demo's data: the questions and answers of the Debian FAQ.

They are read at run time from Debian's package debian-faq, whose licence allows distribution of derived works under the
same terms; nothing of it is kept in this project.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

LONGEST_ANSWER = 400  # characters, so that a record fits the example's 192 tokens; whole sentences are kept


@dataclass
class _Section:
    title: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)


class _Chapter(HTMLParser):
    """Collects each section's heading and the paragraphs below it."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[_Section] = []
        self._heading = False
        self._paragraph = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("h2", "h3"):
            self.sections.append(_Section())
            self._heading = True
        elif tag == "p":
            self._paragraph = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "h3"):
            self._heading = False
        elif tag == "p":
            self._paragraph = False
            if self.sections:
                self.sections[-1].body.append("\n")

    def handle_data(self, data: str) -> None:
        if self.sections and self._heading:
            self.sections[-1].title.append(data)
        elif self.sections and self._paragraph:
            self.sections[-1].body.append(data)


def faq_records(pages: list[Path]) -> list[dict[str, str]]:
    """Question and answer of every section that asks something, in the order of the pages."""
    records = []
    for page in pages:
        chapter = _Chapter()
        chapter.feed(page.read_text(encoding="utf-8"))
        for section in chapter.sections:
            question = " ".join("".join(section.title).split()).lstrip("0123456789. ")
            answer = _cut(" ".join("".join(section.body).split()))
            if question.endswith("?") and len(answer) >= 40:
                records.append({"question": question, "answer": answer})
    return records


def _cut(text: str) -> str:
    if len(text) <= LONGEST_ANSWER:
        return text
    end = text.rfind(". ", 0, LONGEST_ANSWER)
    return text[: end + 1] if end > 0 else text[:LONGEST_ANSWER]


def fetch_faq(cache: Path) -> Path:
    """A jsonl file of the FAQ's records; downloads Debian's package on the first call."""
    target = cache / "data" / f"debian-faq-{LONGEST_ANSWER}.jsonl"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _download(Path(scratch))
        pages = sorted(Path(scratch).glob("x/usr/share/doc/debian/FAQ/*.en.html"))
        records = faq_records(pages)
        if len(records) < 50:
            raise RuntimeError(f"the package debian-faq held only {len(records)} questions; its layout has changed")
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        target.write_text(text, encoding="utf-8")
    return target


def _download(folder: Path) -> None:
    script = "apt-get download -q debian-faq 2>/dev/null && dpkg-deb -x debian-faq_*.deb x"
    if shutil.which("apt-get"):
        subprocess.run(["sh", "-c", script], cwd=folder, check=True)
        return
    # A laptop with Docker and another system: let a Debian container fetch it.
    mount = f"{folder}:/work"
    subprocess.run(
        [
            "docker",
            "run",
            "--rm",
            "-v",
            mount,
            "-w",
            "/work",
            "debian:trixie-slim",
            "sh",
            "-c",
            f"apt-get update -q >/dev/null && {script} && chmod -R a+rwX .",
        ],
        check=True,
    )
