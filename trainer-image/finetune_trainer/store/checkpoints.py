"""The checkpoints of one output: which of them count, how an attempt starts, how one is restored.

Below the output's prefix:

    CLAIM.json                                  the owner (claims.py)
    fences/<n>                                  one per start of an attempt, created if absent
    checkpoints/fence-<n>/step-<s>/<part>       the parts
    checkpoints/fence-<n>/step-<s>/MANIFEST.json   last, created if absent

A checkpoint counts if it was committed by the highest fence, or if the highest fence's record lists it
in its chain. What an older fence writes after that record was made is in no chain and never counts, so
an attempt that was cut off can neither commit nor overwrite, however long it lives.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune_trainer.store import files
from finetune_trainer.store.documents import (
    MAX_CHAIN,
    MAX_REASON,
    CheckpointRef,
    Fence,
    Manifest,
    Skipped,
    read_bounded,
)
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound, Superseded
from finetune_trainer.store.objects import ObjectStore, join_key

MANIFEST = "MANIFEST.json"
_FENCE_KEY = re.compile(r"[1-9]\d{0,8}")
_STEP_KEY = re.compile(r"fence-([1-9]\d{0,8})/step-(0|[1-9]\d{0,11})/(.+)")


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

    refs: newest first, steps falling. skipped: manifests of the highest fence that are not valid.
    """

    fence: int
    record: Fence | None
    refs: tuple[CheckpointRef, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """A started attempt: its fence record, the checkpoint it resumes from, and those it had to skip."""

    fence: Fence
    resumed: Checkpoint | None
    skipped: tuple[Skipped, ...]


def checkpoint_prefix(prefix: str, fence: int, step: int) -> str:
    """The key under which the parts of one checkpoint lie."""
    return join_key(prefix, f"checkpoints/fence-{fence}/step-{step}")


def parse_checkpoint_key(prefix: str, key: str) -> tuple[int, int, str] | None:
    """Fence, step and part name of a key below `checkpoints/`; None for a key of another shape."""
    match = _STEP_KEY.fullmatch(key.removeprefix(join_key(prefix, "checkpoints") + "/"))
    return (int(match[1]), int(match[2]), match[3]) if match else None


def highest_fence(store: ObjectStore, prefix: str) -> int:
    """The number of the newest fence; 0 if there is none."""
    base = join_key(prefix, "fences") + "/"
    names = (item.key.removeprefix(base) for item in store.list(base))
    return max((int(name) for name in names if _FENCE_KEY.fullmatch(name)), default=0)


def survey(store: ObjectStore, prefix: str, fence: int | None = None) -> Survey:
    """What counts under the given fence; the highest one if None.

    Raises CheckpointInvalid if the fence's own record is damaged: nothing can be told without it.
    """
    number = highest_fence(store, prefix) if fence is None else fence
    if number == 0:
        return Survey(0, None, (), ())
    record = Fence.read(store, join_key(prefix, f"fences/{number}"))
    manifests = {
        (place[0], place[1])
        for item in store.list(join_key(prefix, "checkpoints") + "/")
        if (place := parse_checkpoint_key(prefix, item.key)) and place[2] == MANIFEST
    }
    refs: list[CheckpointRef] = []
    skipped: list[Skipped] = []
    for _, step in sorted((place for place in manifests if place[0] == number), reverse=True):
        try:
            refs.append(read_checkpoint(store, prefix, number, step).ref)
        except ObjectNotFound:
            continue  # pruned since the listing
        except CheckpointInvalid as error:
            skipped.append(Skipped(fence=number, step=step, reason=str(error)[:MAX_REASON]))
    refs += record.chain
    return Survey(number, record, tuple(_without_pruned(refs, manifests)), tuple(skipped))


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
    """Write the checkpoint's parts to target, every byte checked; target appears whole or not at all.

    target must be absent or empty. Raises CheckpointInvalid if what is stored is not what was written.
    """
    checkpoint = load_checkpoint(store, prefix, ref)
    files.download(store, checkpoint_prefix(prefix, ref.fence, ref.step), checkpoint.manifest.parts, target)
    return checkpoint


def start_attempt(
    store: ObjectStore,
    prefix: str,
    *,
    job_uid: str,
    attempt: int,
    restore_to: Path,
    max_step: int | None = None,
) -> Start:
    """Take the output over from every earlier attempt and restore the newest checkpoint that is whole.

    Damaged checkpoints are skipped, with the reason in the result and in the fence's record. With
    max_step, only checkpoints up to that step count from now on (a rollback); none is a fresh start.
    To be called after claim_output. Raises CheckpointInvalid if there are checkpoints but none is whole,
    and Superseded if a later attempt of the job has started.
    """
    seen = survey(store, prefix)
    top = seen.fence
    damaged: dict[CheckpointRef, Skipped] = {}
    while True:
        refs = [ref for ref in seen.refs if ref not in damaged and (max_step is None or ref.step <= max_step)]
        skipped = (*seen.skipped, *damaged.values())
        if damaged and not refs:
            # No fence is made: its empty chain would turn the next start into one from the base model.
            raise CheckpointInvalid(
                f"none of the {len(damaged)} checkpoints of {store.uri(prefix)} is whole; the newest: "
                f"{skipped[0].reason}. Start again with a new output.uri."
            )
        _refuse_older_attempt(store, prefix, seen.record, job_uid, attempt)
        fence = _create_fence(store, prefix, top + 1, job_uid, attempt, refs, skipped)
        if fence is None:
            seen = survey(store, prefix)
            top = seen.fence
            continue
        top = fence.fence
        # A commit that ended between the survey and the fence was told that it counts, so it has to.
        # Any that ends later is told Superseded, so this settles.
        again = survey(store, prefix, seen.fence)
        if again.refs != seen.refs:
            seen = again
            continue
        if not refs:
            return Start(fence, None, skipped)
        try:
            return Start(fence, restore(store, prefix, refs[0], restore_to), skipped)
        except CheckpointInvalid as error:
            reason = str(error)[:MAX_REASON]
            damaged[refs[0]] = Skipped(fence=refs[0].fence, step=refs[0].step, reason=reason)


def _refuse_older_attempt(store: ObjectStore, prefix: str, record: Fence | None, job_uid: str, attempt: int) -> None:
    if record is not None and record.job_uid == job_uid and record.attempt > attempt:
        raise Superseded(
            f"attempt {record.attempt} has taken {store.uri(prefix)} over, so attempt {attempt} ends. Nothing to do."
        )


def _create_fence(
    store: ObjectStore,
    prefix: str,
    number: int,
    job_uid: str,
    attempt: int,
    refs: list[CheckpointRef],
    skipped: tuple[Skipped, ...],
) -> Fence | None:
    """The fence of that number if this call made it, None if another one did."""
    fence = Fence(
        fence=number,
        job_uid=job_uid,
        attempt=attempt,
        token=uuid.uuid4().hex,
        chain=tuple(refs[:MAX_CHAIN]),
        skipped=skipped[:MAX_CHAIN],
    )
    key = join_key(prefix, f"fences/{number}")
    if store.put_if_absent(key, fence.to_bytes()):
        return fence
    # The answer to a write that got through may have been lost, and its repetition refused.
    return fence if Fence.read(store, key).token == fence.token else None
