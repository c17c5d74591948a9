"""The store keeps its promises under random faults, and the harness notices when it does not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_trainer.store import checkpoints, files, writer
from finetune_trainer.store.errors import NodeFilesMissing
from finetune_trainer.store.writer import CheckpointWriter
from tests.chaos.store.__main__ import local_place
from tests.chaos.store.faults import Fault
from tests.chaos.store.ledger import Violation
from tests.chaos.store.rounds import Chaos, Tally


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness sets these; the next test has the old values again."""
    monkeypatch.setattr(files, "AT_ONCE", files.AT_ONCE)
    monkeypatch.setattr(files, "SMALLEST_COPY", files.SMALLEST_COPY)


def run(faults: int, seed: int) -> Tally:
    """Random faults against a folder."""
    with local_place() as (store, root, work):
        return Chaos(store, root, work, seed).run(faults)


def test_nothing_is_torn_lost_or_overwritten() -> None:
    tally = run(faults=200, seed=7)
    assert tally.count >= 200 and set(Fault) <= set(tally.faults)
    assert tally.checks["restores"] > 100 and tally.checks["commits"] > 100


Patch = Callable[[pytest.MonkeyPatch], None]


def _manifest_first(patch: pytest.MonkeyPatch) -> None:
    """The parts go up once the manifest is there."""
    waiting: list[Any] = []
    committed = CheckpointWriter._committed

    def late(self: CheckpointWriter, manifest: Any) -> Any:
        found = committed(self, manifest)
        while waiting:
            store, parts = waiting.pop()
            upload_all(store, parts)
        return found

    upload_all = files.upload_all
    patch.setattr(CheckpointWriter, "_committed", late)
    later = SimpleNamespace(scan=files.scan, upload_all=lambda store, parts, _: waiting.append((store, list(parts))))
    patch.setattr(writer, "files", later)


def _no_look_at_the_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CheckpointWriter, "ensure_current", lambda self: None)


def _missing_parts_passed_over(patch: pytest.MonkeyPatch) -> None:
    """What a node has given up is left out of the checkpoint."""
    collect = writer.collect

    def lenient(*arguments: Any) -> Any:
        try:
            return collect(*arguments)
        except NodeFilesMissing:
            return ()

    patch.setattr(writer, "collect", lenient)


def _removals_not_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoints, "_removed", lambda store, prefix, fence: set())


def _looks_before_it_takes(patch: pytest.MonkeyPatch) -> None:
    """A start reads what counts, and only then cuts the others off."""
    seen: list[Any] = []
    take, survey = checkpoints._take, checkpoints.survey

    def take_late(store: Any, prefix: str, *arguments: Any) -> Any:
        seen[:] = [survey(store, prefix)]
        return take(store, prefix, *arguments)

    patch.setattr(checkpoints, "_take", take_late)
    patch.setattr(
        checkpoints, "survey", lambda store, prefix, fence=None: seen.pop() if seen else survey(store, prefix, fence)
    )


def _no_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "_check", lambda found, expected, uri: None)


def _newest_goes(patch: pytest.MonkeyPatch) -> None:
    """Pruning keeps the oldest instead of the newest."""
    kept = CheckpointWriter._kept
    patch.setattr(CheckpointWriter, "_kept", lambda self, whole, last, steps: kept(self, whole[::-1], last, steps))


@pytest.mark.parametrize(
    ("mutation", "kind"),
    [
        (_manifest_first, "torn"),
        (_no_look_at_the_fence, "lost"),
        (_missing_parts_passed_over, "torn"),
        # A race that seldom comes up: the other forms are enough for each change.
        pytest.param(_removals_not_read, "lost", marks=pytest.mark.slow),
        (_looks_before_it_takes, "lost"),
        (_no_hash, "torn"),
        (_newest_goes, "lost"),
    ],
)
def test_a_broken_protocol_is_found(mutation: Patch, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    with pytest.raises(Violation) as caught:
        run(faults=2000, seed=7)
    assert caught.value.kind == kind
