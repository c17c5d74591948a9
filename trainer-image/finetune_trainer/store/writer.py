"""What the holder of a fence may do: commit checkpoints and prune old ones. checkpoints.py says why it is safe."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.store import files
from finetune_trainer.store.checkpoints import (
    Checkpoint,
    ensure_newest,
    load_checkpoint,
    read_checkpoint,
    survey,
)
from finetune_trainer.store.documents import CheckpointRef, Fence, Manifest, Part, Place, Removal
from finetune_trainer.store.errors import CheckpointInvalid, ObjectNotFound
from finetune_trainer.store.layout import (
    MANIFEST,
    NODES,
    checkpoint_prefix,
    parse_checkpoint_key,
    parse_removal_key,
    removal_key,
)
from finetune_trainer.store.nodes import collect
from finetune_trainer.store.objects import ObjectStore, join_key

WAIT_FOR_NODES_SECONDS = 600.0
Stored = Mapping[tuple[int, int], Mapping[str, int]]
"""The sizes of all files below `checkpoints/`, by fence and step."""


BEST = "best"
"""In a manifest's meta: the steps with the best evaluations up to this one, the best first."""


class CheckpointWriter:
    """Commits for one attempt, synchronously. One per fence; its methods take turns between threads."""

    def __init__(self, store: ObjectStore, prefix: str, fence: Fence) -> None:
        self.store = store
        self.prefix = prefix
        self.fence = fence
        self._newest = fence.base.step if fence.base else None
        self._before: Manifest | None = None
        self._lock = threading.Lock()

    @property
    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that counts; None before the first."""
        return self._newest

    def ensure_current(self) -> None:
        """Returns if no later attempt has taken the output over, else raises Superseded."""
        ensure_newest(self.store, self.prefix, self.fence.fence)

    def commit(
        self,
        step: int,
        folder: Path,
        *,
        world_size: int,
        meta: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        nodes: int = 1,
        wait_seconds: float = WAIT_FOR_NODES_SECONDS,
    ) -> Checkpoint:
        """Upload folder as the checkpoint of step; once this returns, every later attempt sees it.

        Large files that the checkpoint before it had are copied by the storage, and not sent again. With several
        nodes it waits until each has uploaded its own files (NodeUploader), at most wait_seconds or until one gives
        its part up; their files count where no lower node has one of the same name. The folder's files must not
        change meanwhile. After an error, the same call may be made again; a commit that had got through is then
        found. Raises Superseded, NodeFilesMissing, storage errors, and ValueError for a step that is not above
        newest_step or a folder with links or odd names.
        """
        with self._lock:
            self.ensure_current()
            found = files.scan(folder)
            for file in found:
                if file.entry.name == MANIFEST or file.entry.name.split("/")[0] == NODES:
                    raise ValueError(f"{file.path}: {file.entry.name} is a name of the store's own. Rename the file.")
            manifest = Manifest(
                job_uid=self.fence.job_uid,
                attempt=self.fence.attempt,
                fence=self.fence.fence,
                step=step,
                world_size=world_size,
                parts=tuple(Part(**dict(file.entry)) for file in found),
                metrics=dict(metrics or {}),
                meta=dict(meta or {}),
            )
            checkpoint = self._committed(manifest)
            if checkpoint is None:
                base = checkpoint_prefix(self.prefix, self.fence.fence, step)
                keys = [(join_key(base, file.entry.name), file) for file in found]
                files.upload_all(self.store, keys, self._stored_before())
                if nodes > 1:
                    place = Place(fence=self.fence.fence, step=step)
                    others = collect(self.store, self.prefix, place, nodes, wait_seconds, self.ensure_current)
                    mine = {part.name for part in manifest.parts}
                    parts = (*manifest.parts, *(part for part in others if part.name not in mine))
                    manifest = Manifest(**{**dict(manifest), "parts": parts})
                key = join_key(base, MANIFEST)
                self.store.put_if_absent(key, manifest.to_bytes())
                checkpoint = self._committed(manifest)
                if checkpoint is None:
                    self.ensure_current()  # a newer attempt sweeps what an older one writes in vain
                    raise CheckpointInvalid(f"{self.store.uri(key)} is gone. Do not edit the output.")
            # Only now is it sure that whoever starts next has seen it.
            self.ensure_current()
            self._newest, self._before = step, checkpoint.manifest
            return checkpoint

    def _stored_before(self) -> dict[str, str]:
        """The keys of the newest checkpoint's files by their SHA-256."""
        manifest = self._before or (self._manifest(self.fence.base) if self.fence.base else None)
        if manifest is None:
            return {}
        base = checkpoint_prefix(self.prefix, manifest.fence, manifest.step)
        return {part.sha256: join_key(base, part.path) for part in manifest.parts}

    def _committed(self, manifest: Manifest) -> Checkpoint | None:
        """The checkpoint of this fence and step, if its manifest is there; node 0's files must be the same."""
        step = manifest.step
        if self._newest is not None and step < self._newest:
            raise ValueError(f"step {step} is older than the newest checkpoint, step {self._newest}")
        try:
            checkpoint = read_checkpoint(self.store, self.prefix, self.fence.fence, step)
        except ObjectNotFound:
            if step == self._newest:
                raise ValueError(f"step {step} is the one that this attempt resumed from") from None
            return None
        if _of_node_0(checkpoint.manifest) != _of_node_0(manifest):
            raise ValueError(f"step {step} was committed before with other content")
        return checkpoint

    def prune(self, keep_last: int, keep_steps: Collection[int] = (), keep_back: int = 0) -> tuple[int, ...]:
        """Remove all but the newest keep_last whole checkpoints; returns the removed steps, ascending.

        Also kept: keep_steps, the best one that any kept checkpoint names (meta `best`), the one that this attempt
        resumed from, and for each rollback that is not yet passed the one that it goes back to. With keep_back, for
        rollbacks to come: the newest of those that are keep_back steps older than the newest, and the oldest one after
        it, which takes its place in time. Left-overs of uploads that never ended, and what older fences wrote in vain,
        go too. Nothing is removed unless a whole checkpoint is kept. Whole means here that all parts are there in full
        length. Raises Superseded.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but the newest checkpoint stays: use 1 or more")
        with self._lock:
            stored = self._stored()
            seen = survey(self.store, self.prefix, self.fence.fence)
            known = ((ref, seen.manifests.get(ref) or self._manifest(ref)) for ref in seen.refs)
            manifests = {ref: manifest for ref, manifest in known if manifest}
            whole = [ref for ref, manifest in manifests.items() if _is_whole(manifest, stored)]
            self.ensure_current()
            if not whole:
                return ()
            kept = self._kept(whole, keep_last, keep_steps) | far_back(whole, keep_back)
            kept |= _named_as_best(kept, manifests, whole)
            doomed = self._doomed(stored, kept, newest=max(seen.refs[0].step, self._newest or 0))
            self._remove(doomed)
            return tuple(sorted(ref.step for ref in whole if (ref.fence, ref.step) in doomed))

    def _kept(self, whole: list[CheckpointRef], keep_last: int, keep_steps: Collection[int]) -> set[CheckpointRef]:
        kept = {*whole[:keep_last], *(ref for ref in whole if ref.step in keep_steps)}
        if self.fence.base:
            kept.add(self.fence.base)
        for rollback in self.fence.guards.rollbacks:
            if whole[0].step < rollback.until_step:
                kept.update([ref for ref in whole if ref.step <= rollback.to_step][:1])
        return kept

    def _doomed(self, stored: Stored, kept: Collection[CheckpointRef], newest: int) -> Stored:
        """What to remove: all but the kept checkpoints and what is on its way."""
        spared = {(ref.fence, ref.step) for ref in kept}
        mine = self.fence.fence
        return {
            (fence, step): sizes
            for (fence, step), sizes in stored.items()
            # Of this fence only steps above the newest can still be committed: other nodes may be uploading them.
            if (fence < mine or (fence == mine and step <= newest)) and (fence, step) not in spared
        }

    def _remove(self, doomed: Stored) -> None:
        if not doomed:
            return
        places = tuple(Place(fence=fence, step=step) for fence, step in sorted(doomed))
        key = removal_key(self.prefix, self.fence.fence, uuid.uuid4().hex)
        self.store.put(key, Removal(places=places).to_bytes())
        # Whoever starts after this has seen the list. If somebody started before, nothing is deleted.
        self.ensure_current()
        for place in sorted(doomed):
            # The manifest first: a checkpoint that lost a part must not look committed.
            for name in sorted(doomed[place], key=lambda name: (name != MANIFEST, name)):
                self.store.delete(join_key(checkpoint_prefix(self.prefix, *place), name))
        # All that earlier prunes of this attempt had listed is gone now too, and nobody reads those of older ones.
        for item in list(self.store.list(join_key(self.prefix, "removals") + "/")):
            if (number := parse_removal_key(self.prefix, item.key)) and number <= self.fence.fence:
                self.store.delete(item.key)

    def _stored(self) -> Stored:
        found: dict[tuple[int, int], dict[str, int]] = {}
        for item in self.store.list(join_key(self.prefix, "checkpoints") + "/"):
            if place := parse_checkpoint_key(self.prefix, item.key):
                found.setdefault(place[:2], {})[place[2]] = item.size
        return found

    def _manifest(self, ref: CheckpointRef) -> Manifest | None:
        try:
            return load_checkpoint(self.store, self.prefix, ref).manifest
        except CheckpointInvalid:
            return None


def _is_whole(manifest: Manifest, stored: Stored) -> bool:
    sizes = stored.get((manifest.fence, manifest.step), {})
    return all(sizes.get(part.path) == part.size for part in manifest.parts)


def far_back(whole: list[CheckpointRef], steps: int) -> set[CheckpointRef]:
    """What a rollback by so many steps goes back to, now and when the newest ones are as old. So two are enough."""
    if steps == 0:
        return set()
    limit = whole[0].step - steps
    far = [ref for ref in whole if ref.step <= limit]
    near = [ref for ref in whole if ref.step > limit]
    return {*far[:1], *near[-1:]}


def _named_as_best(
    kept: Collection[CheckpointRef], manifests: Mapping[CheckpointRef, Manifest], whole: Collection[CheckpointRef]
) -> set[CheckpointRef]:
    """The best steps that the kept ones know of: a run that goes on from one of them asks for its best one."""
    steps = {
        best[0] for ref in kept if ref in manifests and isinstance(best := manifests[ref].meta.get(BEST), list) and best
    }
    return {ref for ref in whole if ref.step in steps}


def _of_node_0(manifest: Manifest) -> set[Part]:
    return {part for part in manifest.parts if part.node == 0}
