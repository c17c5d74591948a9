"""What the holder of a fence may do: commit checkpoints and prune old ones."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.store import files
from finetune_trainer.store.checkpoints import (
    MANIFEST,
    Checkpoint,
    checkpoint_prefix,
    highest_fence,
    load_checkpoint,
    parse_checkpoint_key,
    read_checkpoint,
    survey,
)
from finetune_trainer.store.documents import CheckpointRef, Fence, FileEntry, Manifest
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound, Superseded
from finetune_trainer.store.objects import ObjectStore, join_key


class CheckpointWriter:
    """Commits for one attempt, synchronously. One per fence; its methods take turns between threads."""

    def __init__(self, store: ObjectStore, prefix: str, fence: Fence) -> None:
        self.store = store
        self.prefix = prefix
        self.fence = fence
        self._newest = fence.base.step if fence.base else None
        self._lock = threading.Lock()

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that counts; None before the first."""
        return self._newest

    def ensure_current(self) -> None:
        """Returns if no later attempt has taken the output over, else raises Superseded."""
        highest = highest_fence(self.store, self.prefix)
        if highest > self.fence.fence:
            raise Superseded(
                f"fence {highest} has taken {self.store.uri(self.prefix)} over from fence "
                f"{self.fence.fence}: what this attempt writes no longer counts, so it ends. Nothing to do."
            )

    def commit(
        self,
        step: int,
        folder: Path,
        *,
        world_size: int,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Checkpoint:
        """Upload folder as the checkpoint of step; once this returns, every later attempt sees it.

        The folder's files must not change meanwhile. After an error, the same call may be made again;
        a commit that had got through is then found. Raises Superseded, storage errors, and ValueError
        for a step that is not above newest_step or a folder with links or odd names.
        """
        with self._lock:
            self.ensure_current()
            found = files.scan(folder)
            manifest = Manifest(
                job_uid=self.fence.job_uid,
                attempt=self.fence.attempt,
                fence=self.fence.fence,
                step=step,
                world_size=world_size,
                parts=tuple(file.entry for file in found),
                metrics=dict(metrics or {}),
                meta=dict(meta or {}),
            )
            if any(file.entry.name == MANIFEST for file in found):
                raise ValueError(f"{folder} holds a file named {MANIFEST}, which is the store's own")
            checkpoint = self._committed(step, manifest.parts)
            if checkpoint is None:
                base = checkpoint_prefix(self.prefix, self.fence.fence, step)
                files.upload(self.store, base, found)
                self.store.put_if_absent(join_key(base, MANIFEST), manifest.to_bytes())
                checkpoint = self._committed(step, manifest.parts)
            if checkpoint is None:
                raise CheckpointInvalid(f"{self.store.uri(base)}/{MANIFEST} is gone. Do not edit the output.")
            # Only now is it sure that whoever starts next has seen it.
            self.ensure_current()
            self._newest = step
            return checkpoint

    def _committed(self, step: int, parts: tuple[FileEntry, ...]) -> Checkpoint | None:
        """The checkpoint of this fence and step, if its manifest is there; the parts must be the same."""
        if self._newest is not None and step < self._newest:
            raise ValueError(f"step {step} is older than the newest checkpoint, step {self._newest}")
        try:
            checkpoint = read_checkpoint(self.store, self.prefix, self.fence.fence, step)
        except ObjectNotFound:
            if step == self._newest:
                raise ValueError(f"step {step} is the one that this attempt resumed from") from None
            return None
        if checkpoint.manifest.parts != parts:
            raise ValueError(f"step {step} was committed before with other content")
        return checkpoint

    def prune(self, keep_last: int, keep_steps: Collection[int] = ()) -> tuple[int, ...]:
        """Remove all but the newest keep_last whole checkpoints; returns the removed steps, ascending.

        Also kept: keep_steps, and the one that this attempt resumed from. Left-overs of uploads that
        never ended, and what older fences wrote in vain, go too. Nothing is removed unless a whole
        checkpoint is kept. Whole means here that all parts are there in full length. Raises Superseded.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but the newest checkpoint stays: use 1 or more")
        with self._lock:
            folders = self._folders()
            refs = survey(self.store, self.prefix, self.fence.fence).refs
            whole = [ref for ref in refs if self._is_whole(ref, folders)]
            # After the reading, before the first deletion: were this process to stall from here on, every
            # later fence would have the checkpoints that are kept, and lack only older ones.
            self.ensure_current()
            if not whole:
                return ()
            kept = {(ref.fence, ref.step) for ref in whole[:keep_last]}
            kept |= {(ref.fence, ref.step) for ref in whole if ref.step in keep_steps}
            if self.fence.base:
                kept.add((self.fence.base.fence, self.fence.base.step))
            doomed = [place for place in folders if place not in kept and place[0] <= self.fence.fence]
            counted = {(ref.fence, ref.step) for ref in whole}
            for fence, step in doomed:
                self._remove(fence, step, folders[fence, step])
            return tuple(sorted(step for fence, step in doomed if (fence, step) in counted))

    def _folders(self) -> dict[tuple[int, int], dict[str, int]]:
        """The sizes of all stored parts, by fence and step."""
        found: dict[tuple[int, int], dict[str, int]] = {}
        for item in self.store.list(join_key(self.prefix, "checkpoints") + "/"):
            if place := parse_checkpoint_key(self.prefix, item.key):
                found.setdefault(place[:2], {})[place[2]] = item.size
        return found

    def _is_whole(self, ref: CheckpointRef, folders: Mapping[tuple[int, int], Mapping[str, int]]) -> bool:
        try:
            parts = load_checkpoint(self.store, self.prefix, ref).manifest.parts
        except CheckpointInvalid:
            return False
        sizes = folders.get((ref.fence, ref.step), {})
        return all(sizes.get(part.name) == part.size for part in parts)

    def _remove(self, fence: int, step: int, names: Collection[str]) -> None:
        base = checkpoint_prefix(self.prefix, fence, step)
        # The manifest first: a checkpoint that lost a part must not look committed.
        for name in sorted(names, key=lambda name: (name != MANIFEST, name)):
            self.store.delete(join_key(base, name))
