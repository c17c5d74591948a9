"""Fences: of several attempts that believe they own the output, the newest one does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune_trainer.store.checkpoints import list_checkpoints
from finetune_trainer.store.errors import StorageUnavailable, Superseded
from finetune_trainer.store.writer import CheckpointWriter
from tests.train.store.conftest import Between, Place, Run, Same, committed, steps


def test_what_an_older_attempt_writes_after_a_newer_one_started_never_counts(run: Run, same_folder: Same) -> None:
    old, _ = committed(run, 10)
    start, new, _ = run.start(attempt=2)
    with pytest.raises(Superseded, match="fence 2 has taken"):
        old.commit(20, run.saved(20), world_size=1)
    assert start.resumed is not None and start.resumed.step == 10 and steps(run.place) == [10]
    assert [key for key in run.place.list_keys() if "step-20" in key] == []
    # Even one that was past its check when the newer attempt started: its manifest lands late.
    folder = run.saved(30, "late")
    blind = CheckpointWriter(run.place.store, run.place.prefix, old.fence)
    blind.ensure_current = lambda: None  # type: ignore[method-assign]
    blind.commit(30, folder, world_size=1)
    assert steps(run.place) == [10]
    new.commit(15, run.saved(15), world_size=1)
    assert steps(run.place) == [15, 10]
    third, _, target = run.start(attempt=3)
    assert third.resumed is not None and third.resumed.step == 15
    assert not same_folder(target, folder)


def test_an_attempt_overtaken_in_mid_commit_is_told_that_it_does_not_count(run: Run) -> None:
    class Overtaken(Between):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            run.start(attempt=2)
            return self.real.put_if_absent(key, data)

    old, _ = committed(run, 10)
    overtaken = CheckpointWriter(Overtaken(run.place.store), run.place.prefix, old.fence)
    with pytest.raises(Superseded, match="fence 2 has taken"):
        overtaken.commit(20, run.saved(20), world_size=1)
    assert steps(run.place) == [10] and overtaken.newest_step is None


def test_an_overtaken_commit_whose_manifest_was_swept_is_superseded_not_damaged(run: Run) -> None:
    class Overtaken(Between):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            _, newer, _ = run.start(attempt=2)
            newer.commit(20, run.saved(20), world_size=1)
            done = self.real.put_if_absent(key, data)
            newer.prune(keep_last=1)
            return done

    old, _ = committed(run, 10)
    with pytest.raises(Superseded, match="fence 2 has taken"):
        CheckpointWriter(Overtaken(run.place.store), run.place.prefix, old.fence).commit(
            20, run.saved(20), world_size=1
        )


def test_an_older_attempt_cannot_prune_what_the_newer_one_needs(run: Run) -> None:
    old, _ = committed(run, 10, 20, 30)
    run.start(attempt=2)
    with pytest.raises(Superseded):
        old.prune(keep_last=1)
    assert steps(run.place) == [30, 20, 10]


def test_an_older_attempt_that_starts_late_is_turned_away(run: Run) -> None:
    run.start(attempt=5)
    with pytest.raises(Superseded, match="attempt 5 has taken"):
        run.start(attempt=4)
    assert run.place.list_keys() == ["fences/1", "fences/1.taken"]


def test_a_commit_between_survey_and_fence_is_not_lost(run: Run) -> None:
    """The old attempt commits step 20 just before the fence of the new one is made."""
    old, _ = committed(run, 10)
    late = run.saved(20)

    class Interleaved(Between):
        done = False

        def put_if_absent(self, key: str, data: bytes) -> bool:
            if not self.done and key.endswith(".taken"):
                self.done = True
                old.commit(20, late, world_size=1)
            return self.real.put_if_absent(key, data)

    place = Place(Interleaved(run.place.store), run.place.prefix, run.place.folder)
    start, _, _ = Run(place, run.work).start(attempt=2)
    assert start.resumed is not None and start.resumed.step == 20
    assert steps(run.place) == [20, 10]


@pytest.mark.parametrize("last_write", ["fences/2.taken", "fences/2"])
def test_a_start_that_is_killed_hides_no_commit(run: Run, last_write: str) -> None:
    """The old attempt commits step 20 just before its successor takes a number, and that dies soon after."""
    old, _ = committed(run, 10)
    late = run.saved(20)

    class Killed(Between):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if key.endswith(".taken"):
                old.commit(20, late, world_size=1)
            done = self.real.put_if_absent(key, data)
            if key.endswith(last_write):
                raise StorageUnavailable("the process is gone")
            return done

    place = Place(Killed(run.place.store), run.place.prefix, run.place.folder)
    with pytest.raises(StorageUnavailable):
        Run(place, run.work).start(attempt=2)
    start, _, _ = run.start(attempt=3)
    assert start.resumed is not None and start.resumed.step == 20


def test_a_fence_whose_answer_was_lost_is_ones_own(run: Run) -> None:
    class Losing(Between):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.real.put_if_absent(key, data)
            return False  # what a client says that repeats a write of its own that had got through

    place = Place(Losing(run.place.store), run.place.prefix, run.place.folder)
    assert Run(place, run.work).start()[0].fence.fence == 1
    assert run.place.list_keys() == ["fences/1", "fences/1.taken"]


def test_a_start_that_was_overtaken_does_not_blame_the_checkpoints(run: Run) -> None:
    """The newer attempt prunes what the older one is about to restore."""
    committed(run, 10)

    class Overtaken(Between):
        turn = threading.Lock()  # several files come down at once
        done = False

        def download(self, key: str, path: Path) -> None:
            with self.turn:
                if not self.done:
                    self.overtake()
                self.done = True
            self.real.download(key, path)

        def overtake(self) -> None:
            _, newer, _ = run.start(attempt=3)
            newer.commit(20, run.saved(20), world_size=1)
            _, newer, _ = run.start(attempt=4)
            newer.prune(keep_last=1)

    place = Place(Overtaken(run.place.store), run.place.prefix, run.place.folder)
    with pytest.raises(Superseded, match="fence 4 has taken"):
        Run(place, run.work).start(attempt=2)
    assert steps(run.place) == [20]


def test_attempts_that_start_at_once_leave_one_owner(run: Run) -> None:
    committed(run, 10)
    barrier = threading.Barrier(4)

    def attempt(_: int) -> CheckpointWriter | None:
        barrier.wait()
        try:
            return run.start(attempt=2)[1]
        except Superseded:
            return None  # another one came later, while this one was starting

    with ThreadPoolExecutor(4) as pool:
        writers = [writer for writer in pool.map(attempt, range(4)) if writer]
    assert len({writer.fence.fence for writer in writers}) == len(writers) >= 1
    assert max(writer.fence.fence for writer in writers) == 5

    def commit(writer: CheckpointWriter) -> str:
        try:
            writer.commit(20, run.saved(20, f"by {writer.fence.fence}"), world_size=1)
            return "committed"
        except Superseded:
            return "superseded"

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(commit, writers))
    assert results.count("committed") == 1
    owner = max(writers, key=lambda writer: writer.fence.fence)
    assert results[writers.index(owner)] == "committed"
    assert [c.ref.fence for c in list_checkpoints(run.place.store, run.place.prefix)] == [owner.fence.fence, 1]


def test_a_rollback_forgets_the_later_checkpoints(run: Run) -> None:
    committed(run, 10, 20, 30)
    start, writer, _ = run.start(attempt=1, max_step=25)
    assert start.resumed is not None and start.resumed.step == 20
    assert steps(run.place) == [20, 10]
    writer.commit(30, run.saved(30, "again"), world_size=1)
    assert steps(run.place) == [30, 20, 10]
    start, _, _ = run.start(attempt=1, max_step=5)
    assert start.resumed is None and steps(run.place) == []
