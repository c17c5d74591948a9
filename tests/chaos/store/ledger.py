"""What must be true, whatever went wrong: the model that the real store is checked against.

It looks at the objects themselves, never through the code under test, and knows what was handed in, what
was answered, and what was damaged on purpose.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from finetune_api.guards import GuardState
from finetune_trainer.store.documents import Fence, Manifest, Part, Removal
from finetune_trainer.store.errors import CheckpointInvalid

Id = tuple[int, int]
"""Fence and step of a checkpoint."""
Content = dict[str, bytes]
MANIFEST = "MANIFEST.json"


class Violation(AssertionError):
    """The store broke a promise; kind is what the summary counts it under."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class Ledger:
    """All that is known of one output. root: the folder that holds the objects below its prefix."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.handed_in: dict[Id, Content] = {}
        self.committed: dict[int, list[Id]] = {}
        """By fence, the checkpoints whose commit has returned, in that order."""
        self.rollbacks: dict[int, int] = {}
        """By attempt, the step that it goes back to."""
        self.records: dict[int, Fence] = {}
        self.damaged: set[Path] = set()
        self.checks: Counter[str] = Counter()
        self._good: set[Id] = set()  # committed, or restored by a start: no later start may miss it
        self._late: set[Path] = set()
        self._before: dict[int, int] = {}  # by number taken, the highest record at that moment
        self._manifests: dict[Id, Manifest] = {}
        self._may_go: dict[int, set[Id]] = {}  # by fence, what its prunes may remove

    # What happened

    def number_taken(self, number: int) -> None:
        """A start has cut off every lower fence."""
        self.sync()
        self._before.setdefault(number, max(self.records, default=0))

    def commit_returned(self, fence: int, step: int, manifest: Manifest) -> None:
        """The writer was told that every later attempt sees it."""
        self.committed.setdefault(fence, []).append((fence, step))
        self._manifests[fence, step] = manifest
        self._good.add((fence, step))
        self.checks["commits"] += 1
        for number in sorted(n for n in self.records if n > fence):
            if self._before[number] == fence:
                self._check_record(number)

    def prune_called(self, fence: int, keep_last: int, keep_steps: Collection[int], guards: GuardState) -> None:
        """From here on the rule allows that what it does not keep goes; nothing if the fence was cut off before."""
        self.sync()
        if max(self._before, default=0) > fence:
            return
        own = {place for place in self._stored() if place[0] == fence}
        candidates = [*sorted(own, reverse=True), *self._chain(fence)]
        gone = self._announced(fence)
        whole = [place for place in candidates if place not in gone and self._in_full_length(fence, place)]
        kept = {*whole[:keep_last], *(place for place in whole if place[1] in keep_steps)}
        kept.update(self._chain(fence)[:1])
        for rollback in guards.rollbacks:
            if whole and whole[0][1] < rollback.until_step:
                kept.update([place for place in whole if place[1] <= rollback.to_step][:1])
        if whole:
            self._may_go.setdefault(fence, set()).update(set(candidates) - kept)

    def landed_late(self, manifest: Path) -> None:
        """A manifest has landed after its writer went on; its files may have been swept meanwhile."""
        self._late.add(manifest)

    def started(self, fence: Fence, resumed: Id | None, restored: Content | None) -> None:
        """An attempt was told what it resumes from, and has it on its disk."""
        self.sync()
        self.checks["starts"] += 1
        for found in fence.skipped:
            self._skipped((found.fence, found.step))
        if resumed != (self._chain(fence.fence)[0] if fence.chain else None):
            raise Violation("lost", f"fence {fence.fence} resumed from {resumed}, its record says {fence.base}")
        if resumed is not None:
            self.restored(resumed, restored)
            self._note(resumed)
            self._good.add(resumed)

    def restored(self, place: Id, content: Content | None) -> None:
        """A reader was given this as the checkpoint."""
        self.checks["restores"] += 1
        if content != self.handed_in.get(place):
            raise Violation("torn", f"what was restored as {place} is not what was handed in")

    def nothing_whole(self, number: int, max_step: int | None) -> None:
        """A start has said that checkpoints are there, but none is whole."""
        before = [self._before[number], *(n for n in self.records if self._before[number] < n < number)]
        for place in self._stored():
            if place[0] in before and (max_step is None or place[1] <= max_step):
                self._skipped(place)
        needed = [self._required(record, max_step) for record in before]
        if all(needed):
            raise Violation("lost", f"the start {number} finds nothing whole, but {needed[0][0]} is")

    def _skipped(self, place: Id) -> None:
        """Only what was damaged on purpose may look committed and not be whole."""
        path = self._manifest_path(place)
        if path in self._late or path in self.damaged:
            return
        if not path.is_file():  # a prune of the attempt before may still have been at work
            if not any(place in places for places in self._may_go.values()):
                raise Violation("lost", f"{place} was skipped, and its manifest is gone")
            return
        manifest = Manifest.parse(path.read_bytes(), str(path))
        self._manifests.setdefault(place, manifest)
        if self.damaged.isdisjoint(self.keys(place)):
            raise Violation("torn", f"{place} was committed before it was whole")

    # What must be true

    def sync(self) -> None:
        """Takes note of the records that have landed, and checks each."""
        folder = self.root / "fences"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        for number in sorted(int(name) for name in names if name.isdigit()):
            if number not in self.records:
                counts = number > max(self.records, default=0)  # below another it never says what counts
                self.records[number] = Fence.parse((folder / str(number)).read_bytes(), str(number))
                if counts:
                    self._excuse_ghosts(number)
                    self._check_record(number)

    def verify(self) -> None:
        """Every byte of what counts now is as it was handed in."""
        self.sync()
        for place in self._required(max(self.records, default=0), None):
            manifest = self._manifests[place]
            for part in manifest.parts:
                self.checks["parts"] += 1
                path = self._file(place, part)
                if not path.is_file():
                    raise Violation("lost", f"{path.relative_to(self.root)}, a part of {place}, is gone")
                if hashlib.sha256(path.read_bytes()).hexdigest() != part.sha256:
                    raise Violation("overwritten", f"{path.relative_to(self.root)}, a part of {place}")
            path = self._manifest_path(place)
            if not path.is_file():
                raise Violation("lost", f"the manifest of {place} is gone")
            if Manifest.parse(path.read_bytes(), "") != manifest:
                raise Violation("overwritten", f"the manifest of {place}")

    def keys(self, place: Id) -> list[Path]:
        """The objects that a checkpoint consists of."""
        manifest = self._manifests[place]
        return [self._manifest_path(place), *(self._file(place, part) for part in manifest.parts)]

    def counting(self) -> list[Id]:
        """The undamaged checkpoints that a start now has to find, newest first."""
        return self._required(max(self.records, default=0), None)

    def _check_record(self, number: int) -> None:
        """The chain has all that its attempt had to find: by the record that was the highest when it looked."""
        record = self.records[number]
        max_step = self.rollbacks.get(record.attempt)
        before = self._before[number]
        lost: list[Id] = []
        for candidate in [before, *(n for n in self.records if before < n < number)]:
            lost = [place for place in self._required(candidate, max_step) if place not in self._chain(number)]
            if not lost:
                return
        raise Violation("lost", f"fence {number} does not know of {lost}, which were committed and are whole")

    def _excuse_ghosts(self, number: int) -> None:
        """A repeated manifest may land after its checkpoint was pruned: it is listed again, and nobody needs it."""
        pruned = set().union(*(places for fence, places in self._may_go.items() if fence < number))
        ghosts = {
            place for place in self._chain(number) if place in pruned and self._manifest_path(place) in self._late
        }
        self._may_go.setdefault(number, set()).update(ghosts)

    def _required(self, number: int, max_step: int | None) -> list[Id]:
        """What counts under a record and is neither damaged on purpose nor given up by a prune's rule."""
        if number == 0:
            return []
        places = [*reversed(self.committed.get(number, [])), *self._chain(number)]
        excused = self._may_go.get(number, set())
        return [
            place
            for place in dict.fromkeys(places)
            if place in self._good
            and place not in excused
            and (max_step is None or place[1] <= max_step)
            and self.damaged.isdisjoint(self.keys(place))
        ]

    def _chain(self, number: int) -> list[Id]:
        record = self.records.get(number)
        return [(ref.fence, ref.step) for ref in record.chain] if record else []

    def _note(self, place: Id) -> None:
        if place not in self._manifests:  # its commit was never answered
            path = self._manifest_path(place)
            try:
                self._manifests[place] = Manifest.parse(path.read_bytes(), str(path))
            except (FileNotFoundError, CheckpointInvalid) as error:
                raise Violation("lost", f"a record names {place}, which is not there: {error}") from None

    def _file(self, place: Id, part: Part) -> Path:
        return self._manifest_path(place).parent / part.path

    def _manifest_path(self, place: Id) -> Path:
        return self.root / f"checkpoints/fence-{place[0]}/step-{place[1]}" / MANIFEST

    def _stored(self) -> set[Id]:
        found = (self.root / "checkpoints").glob(f"fence-*/step-*/{MANIFEST}")
        return {(int(path.parts[-3][6:]), int(path.parts[-2][5:])) for path in found}

    def _announced(self, fence: int) -> set[Id]:
        found = (self.root / "removals" / str(fence)).glob("[0-9a-f]*")
        return {(place.fence, place.step) for path in found for place in Removal.parse(path.read_bytes(), "").places}

    def _in_full_length(self, fence: int, place: Id) -> bool:
        """Whether the fence's holder sees a checkpoint there, all of it in full length."""
        hashes = {(ref.fence, ref.step): ref.manifest_sha256 for ref in self.records[fence].chain}
        try:
            data = self._manifest_path(place).read_bytes()
            manifest = Manifest.parse(data, "")
        except (FileNotFoundError, CheckpointInvalid):
            return False
        if (manifest.fence, manifest.step) != place:
            return False
        if place[0] != fence and hashlib.sha256(data).hexdigest() != hashes[place]:
            return False
        paths = ((self._file(place, part), part.size) for part in manifest.parts)
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)
