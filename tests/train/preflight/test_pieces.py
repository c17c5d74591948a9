"""A txt file longer than a piece is measured bit by bit and is still one record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data import windows
from tests.train.preflight.local import Folder, faults


def test_a_text_in_pieces_is_counted_as_the_one_record_that_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    (folder.root / "train" / "rows.jsonl").unlink()
    (folder.root / "train" / "novel.txt").write_text("".join(f"Line {number} of a novel.\n" for number in range(2000)))
    asked: dict[str, Any] = {"objective": "Pretrain", "tuning": "Full"}
    choices: list[dict[str, Any]] = [
        {},
        {"randomWindows": True},
        {"randomWindows": True, "pretrainTokenizer": "Character"},
    ]
    whole = [folder.check(**asked, **choice) for choice in choices]
    monkeypatch.setattr(windows, "PIECE_CHARACTERS", 10_000)
    for before, choice in zip(whole, choices, strict=True):
        found = folder.check(**asked, **choice)
        assert [fault.message for fault in faults(found)] == [fault.message for fault in faults(before)]
        assert found.data is not None and before.data is not None
        assert found.data.rows == before.data.rows == 1
        assert found.data.tokens == found.data.longest_tokens == pytest.approx(before.data.tokens, rel=1e-3)
    assert "the 1 training records hold 1" in faults(whole[0])[0].message, "pieces are no records to hold out"
