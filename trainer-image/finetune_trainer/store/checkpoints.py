"""The checkpoints of one output: which of them count, how an attempt starts, how one is restored.

layout.py has the keys. A checkpoint counts if the attempt with the highest fence record committed it, or
if that record lists it in its chain, unless that attempt has begun to prune it.

Why an attempt that was cut off can do no harm, however long it lives and however late its requests arrive
(reads and listings see every write that was answered before; nothing else is asked of the storage):

1. A start takes a number (`<n>.taken`, created if absent) before it looks at what is there. A commit counts
   only if, after its manifest was written, no higher number was taken. So each commit that was told so is seen
   by every later start, and a start that is killed between the two leaves nothing behind that hides it: what
   counts changes by the fence record alone, which is written once, with the whole chain in it.
2. A start that finds a higher number after it has written its record is told Superseded and never commits, so
   of two records the higher one never lacks a commit that the lower one's attempt was told of.
3. Each attempt writes below its own fence only, and never a second time what a manifest, or a node's list of
   files, vouches for. So an old attempt cannot overwrite. Its late manifests are in no chain.
4. A prune writes down the places that it is about to empty (`removals/`), then looks whether a higher number was
   taken, then deletes. If one was taken, it deletes nothing. If none was, every later start sees the list and
   counts none of these checkpoints, so it does not resume from them.
5. A change in mid-attempt (a guard's) is a start of its own, which takes the number right after its attempt's own, or
   none. So it cannot take the output back from whoever has taken it over.

Each checkpoint has all its files for itself, also those that did not change since the one before: damage to one file
spoils one checkpoint. What changes at each step (weights, optimizer) is nearly all of it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune_api.guards import GuardState
from finetune_trainer.store import files
from finetune_trainer.store.documents import (
    MAX_CHAIN,
    MAX_REASON,
    CheckpointRef,
    Fence,
    Manifest,
    Removal,
    Skipped,
    Taken,
    read_bounded,
)
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound, Superseded
from finetune_trainer.store.layout import (
    MANIFEST,
    checkpoint_prefix,
    fence_key,
    parse_checkpoint_key,
    parse_fence_key,
    taken_key,
)
from finetune_trainer.store.objects import ObjectStore, join_key


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose manifest is valid; its parts are checked when it is restored."""

    ref: CheckpointRef
    manifest: Manifest
    uri: str

    @property
    def step(self) -> int:
        """The optimizer step it was taken after."""
        return self.manifest.step


@dataclass(frozen=True, slots=True)
class Survey:
    """What counts at one moment: the highest fence (0 is none), its record and its checkpoints.

    refs: newest first, steps falling. manifests: those of the highest fence's own checkpoints. skipped: manifests of the
    highest fence that are not valid.
    """

    fence: int
    record: Fence | None
    refs: tuple[CheckpointRef, ...]
    manifests: Mapping[CheckpointRef, Manifest]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """A started attempt: its fence record, the checkpoint it resumes from, and those it had to skip."""

    fence: Fence
    resumed: Checkpoint | None
    skipped: tuple[Skipped, ...]


def highest_fences(store: ObjectStore, prefix: str) -> tuple[int, int]:
    """The highest number that was taken, and the highest that has a record; 0 is none."""
    found = [parse_fence_key(prefix, item.key) for item in store.list(join_key(prefix, "fences") + "/")]
    known = [place for place in found if place is not None]
    return max((number for number, _ in known), default=0), max((n for n, record in known if record), default=0)


def survey(store: ObjectStore, prefix: str, fence: int | None = None) -> Survey:
    """What counts under the given fence; the highest one if None.

    Raises CheckpointInvalid if the fence's own record is damaged: nothing can be told without it.
    """
    number = highest_fences(store, prefix)[1] if fence is None else fence
    if number == 0:
        return Survey(0, None, (), {}, ())
    record = Fence.read(store, fence_key(prefix, number))
    # Before the manifests are listed: a prune takes its list away once these are gone.
    removed = _removed(store, prefix, number)
    manifests = {
        (place[0], place[1])
        for item in store.list(join_key(prefix, "checkpoints") + "/")
        if (place := parse_checkpoint_key(prefix, item.key)) and place[2] == MANIFEST
    } - removed
    own: dict[CheckpointRef, Manifest] = {}
    skipped: list[Skipped] = []
    for _, step in sorted((place for place in manifests if place[0] == number), reverse=True):
        try:
            found = read_checkpoint(store, prefix, number, step)
            own[found.ref] = found.manifest
        except ObjectNotFound:
            continue  # pruned since the listing
        except CheckpointInvalid as error:
            skipped.append(Skipped(fence=number, step=step, reason=str(error)[:MAX_REASON]))
    refs = [*own, *(ref for ref in record.chain if (ref.fence, ref.step) not in removed)]
    return Survey(number, record, tuple(_without_pruned(refs, manifests)), own, tuple(skipped))


def _removed(store: ObjectStore, prefix: str, fence: int) -> set[tuple[int, int]]:
    """What the holder of the fence has begun to prune. A list that is gone meanwhile is of what is gone."""
    places: set[tuple[int, int]] = set()
    for item in store.list(join_key(prefix, f"removals/{fence}") + "/"):
        try:
            places.update((place.fence, place.step) for place in Removal.read(store, item.key).places)
        except ObjectNotFound:
            continue
    return places


def _without_pruned(refs: list[CheckpointRef], manifests: set[tuple[int, int]]) -> Iterable[CheckpointRef]:
    """Drops the missing ones that are older than one that is there.

    Pruning takes the oldest, so those are gone by intent. One that is missing before any other is damage
    that somebody should hear of.
    """
    found_one = False
    for ref in refs:
        present = (ref.fence, ref.step) in manifests
        found_one = found_one or present
        if present or not found_one:
            yield ref


def list_checkpoints(store: ObjectStore, prefix: str) -> tuple[Checkpoint, ...]:
    """The checkpoints that count and whose manifest is valid, newest first."""
    found = []
    for ref in survey(store, prefix).refs:
        try:
            found.append(load_checkpoint(store, prefix, ref))
        except CheckpointInvalid:
            continue
    return tuple(found)


def load_checkpoint(store: ObjectStore, prefix: str, ref: CheckpointRef) -> Checkpoint:
    """The checkpoint that ref names. Raises CheckpointInvalid if its manifest is missing or altered."""
    try:
        checkpoint = read_checkpoint(store, prefix, ref.fence, ref.step)
    except ObjectNotFound as error:
        raise CheckpointInvalid(f"the manifest is missing: {error}") from None
    if checkpoint.ref != ref:
        raise CheckpointInvalid(f"{checkpoint.uri}/{MANIFEST} was altered after it was committed")
    return checkpoint


def read_checkpoint(store: ObjectStore, prefix: str, fence: int, step: int) -> Checkpoint:
    """What a fence stored for a step, whether it counts or not. Raises ObjectNotFound, CheckpointInvalid."""
    base = checkpoint_prefix(prefix, fence, step)
    key = join_key(base, MANIFEST)
    data = read_bounded(store, key)
    manifest = Manifest.parse(data, store.uri(key))
    if (manifest.fence, manifest.step) != (fence, step):
        raise CheckpointInvalid(f"{store.uri(key)} is the manifest of another checkpoint")
    ref = CheckpointRef(fence=fence, step=step, manifest_sha256=hashlib.sha256(data).hexdigest())
    return Checkpoint(ref, manifest, store.uri(base))


def restore(store: ObjectStore, prefix: str, ref: CheckpointRef, target: Path) -> Checkpoint:
    """Write the files of all nodes to target, every byte checked; target appears whole or not at all.

    target must be absent or empty. Raises CheckpointInvalid if what is stored is not what was written.
    """
    checkpoint = load_checkpoint(store, prefix, ref)
    base = checkpoint_prefix(prefix, ref.fence, ref.step)
    files.download(store, ((join_key(base, part.path), part) for part in checkpoint.manifest.parts), target)
    return checkpoint


def start_attempt(
    store: ObjectStore,
    prefix: str,
    *,
    job_uid: str,
    attempt: int,
    restore_to: Path | None,
    max_step: int | None = None,
    guards: GuardState | None = None,
    follows: int | None = None,
) -> Start:
    """Take the output over from every earlier attempt and restore the newest checkpoint that is whole.

    Damaged checkpoints are skipped, with the reason in the result and in the fence's record. With
    max_step, only checkpoints up to that step count from now on (a rollback); none is a fresh start.
    restore_to: None leaves the restoring, and with it the look whether they are whole, to a later start.
    guards: what the guards have changed up to now; None takes over what the last attempt had.
    follows: the fence that the caller holds already, for a change in mid-attempt; any start since then, by whichever
    job, supersedes it. None: to be called after claim_output.
    Raises CheckpointInvalid if there are checkpoints but none is whole, and Superseded if a later attempt has started;
    then nothing has changed but that earlier ones are cut off.
    """
    taken = _take(store, prefix, job_uid, attempt, follows)
    seen = survey(store, prefix)
    if seen.fence > taken.fence:
        raise Superseded(_superseded(store, prefix, seen.fence, taken.fence))
    refs = [ref for ref in seen.refs if max_step is None or ref.step <= max_step]
    resumed, damaged = _restore_newest(store, prefix, refs, restore_to) if restore_to else (None, [])
    chain, skipped = tuple(refs[len(damaged) :]), (*seen.skipped, *damaged)
    if not chain and (lost := [found for found in skipped if max_step is None or found.step <= max_step]):
        # A later attempt may have pruned what this one still looked for.
        ensure_newest(store, prefix, taken.fence)
        # No record is made: its empty chain would turn the next start into one from the base model.
        raise CheckpointInvalid(
            f"none of the {len(lost)} checkpoints of {store.uri(prefix)} is whole; the newest: {lost[0].reason}. "
            "Start again with a new output.uri."
        )
    before = seen.record.guards if seen.record else GuardState()
    fence = Fence(
        fence=taken.fence,
        job_uid=job_uid,
        attempt=attempt,
        token=taken.token,
        chain=chain[:MAX_CHAIN],
        skipped=skipped[:MAX_CHAIN],
        guards=guards or before,
    )
    _record(store, prefix, fence)
    ensure_newest(store, prefix, taken.fence)
    return Start(fence, resumed, skipped)


def _record(store: ObjectStore, prefix: str, fence: Fence) -> None:
    key = fence_key(prefix, fence.fence)
    if not store.put_if_absent(key, fence.to_bytes()) and Fence.read(store, key) != fence:
        raise CheckpointInvalid(
            f"{store.uri(key)} is not the record of this start. Do not edit files below output.uri."
        )


def ensure_newest(store: ObjectStore, prefix: str, fence: int) -> None:
    """Returns if no later attempt has taken the output over from that fence, else raises Superseded."""
    highest, _ = highest_fences(store, prefix)
    if highest > fence:
        raise Superseded(_superseded(store, prefix, highest, fence))


def _superseded(store: ObjectStore, prefix: str, newer: int, older: int) -> str:
    return (
        f"fence {newer} has taken {store.uri(prefix)} over from fence {older}: "
        "what this attempt writes no longer counts, so it ends. Nothing to do."
    )


@dataclass(frozen=True, slots=True)
class _Number:
    fence: int
    token: str


def _take(store: ObjectStore, prefix: str, job_uid: str, attempt: int, follows: int | None) -> _Number:
    """A fence number of one's own, higher than every other. Raises Superseded for a start that comes late."""
    mine = Taken(job_uid=job_uid, attempt=attempt, token=uuid.uuid4().hex)
    while True:
        highest, _ = highest_fences(store, prefix)
        if follows is not None and highest > follows:
            raise Superseded(_superseded(store, prefix, highest, follows))
        other = _holder(store, prefix, highest) if highest else None
        if other is not None and other.job_uid == job_uid and other.attempt > attempt:
            raise Superseded(
                f"attempt {other.attempt} has taken {store.uri(prefix)} over, so attempt {attempt} ends. Nothing to do."
            )
        key = taken_key(prefix, highest + 1)
        # The answer to a write that got through may have been lost, and its repetition refused.
        if store.put_if_absent(key, mine.to_bytes()) or Taken.read(store, key).token == mine.token:
            return _Number(highest + 1, mine.token)


def _holder(store: ObjectStore, prefix: str, number: int) -> Taken | Fence:
    try:
        return Taken.read(store, taken_key(prefix, number))
    except ObjectNotFound:
        return Fence.read(store, fence_key(prefix, number))  # of a release that wrote the record alone


def _restore_newest(
    store: ObjectStore, prefix: str, refs: list[CheckpointRef], target: Path
) -> tuple[Checkpoint | None, list[Skipped]]:
    """The newest checkpoint that is whole, restored, and those before it in refs, which are not."""
    damaged: list[Skipped] = []
    for ref in refs:
        try:
            return restore(store, prefix, ref, target), damaged
        except CheckpointInvalid as error:
            damaged.append(Skipped(fence=ref.fence, step=ref.step, reason=str(error)[:MAX_REASON]))
    return None, damaged
