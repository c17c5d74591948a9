"""A storage without conditional writes is refused by preflight, long before a GPU is held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_trainer.preflight import checks
from finetune_trainer.preflight.outcome import Outcome
from finetune_trainer.store.errors import ConditionalWriteUnsupported
from finetune_trainer.store.local import LocalStore


class Ignores(LocalStore):
    """Writes whether the key is free or not, as old S3 servers do."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class Refuses(LocalStore):
    """Says that it knows no conditions."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        raise ConditionalWriteUnsupported(
            "the storage refuses If-None-Match, without which two jobs could overwrite one another. "
            "Use a server with conditional writes."
        )


@pytest.mark.parametrize("kind", [Ignores, Refuses])
def test_preflight_names_the_field_the_reason_and_the_way_out(
    kind: Callable[[Path], LocalStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "open_output", lambda *_, **__: (kind(tmp_path), "out"))
    file: Any = SimpleNamespace(output=None, job=SimpleNamespace(uid="uid-a"))
    reach: Any = SimpleNamespace(beat=lambda: None)
    with pytest.raises(ConditionalWriteUnsupported) as caught:
        checks.check_output(file, reach, Outcome())
    assert caught.value.field == "spec.storage" and caught.value.failure_class == "InvalidSpec"
    assert "two jobs could overwrite one another. Use a server with conditional writes." in str(caught.value)
    assert list((tmp_path / "out").glob(".*")) == []
