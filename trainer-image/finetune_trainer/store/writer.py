"""What the holder of a fence may do: commit checkpoints and prune old ones. checkpoints.py says why it is safe."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from finetune_trainer.store import files
from finetune_trainer.store.checkpoints import (
    Checkpoint,
    ensure_newest,
    load_checkpoint,
    part_key,
    read_checkpoint,
    survey,
)
from finetune_trainer.store.documents import CheckpointRef, Fence, FileEntry, Manifest, Part, Place, Removal
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
"""In a manifest's meta: the steps with the lowest evaluation loss up to this one, the lowest first."""


class CheckpointWriter:
    """Commits for one attempt, synchronously. One per fence; its methods take turns between threads."""

    def __init__(self, store: ObjectStore, prefix: str, fence: Fence) -> None:
        self.store = store
        self.prefix = prefix
        self.fence = fence
        self._newest = fence.base.step if fence.base else None
        # Whose files a commit may name again: whole when it was last looked at, and kept by every prune.
        self._source = fence.base
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
        give_up: Callable[[], bool] = lambda: False,
    ) -> Checkpoint:
        """Upload folder as the checkpoint of step; once this returns, every later attempt sees it.

        Files that the checkpoint before it had are not uploaded again. With several nodes it waits until each has
        uploaded its own (NodeUploader), at most wait_seconds or until give_up() says so; their files count where
        no lower node has one of the same name. The folder's files must not change meanwhile. After an error,
        the same call may be made again; a commit that had got through is then found. Raises Superseded,
        NodeFilesMissing, storage errors, and ValueError for a step that is not above newest_step or a folder with
        links or odd names.
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
                parts=tuple(_part(file.entry) for file in found),
                metrics=dict(metrics or {}),
                meta=dict(meta or {}),
            )
            checkpoint = self._committed(manifest)
            if checkpoint is None:
                parts = self._upload(step, found)
                if nodes > 1:
                    place = Place(fence=self.fence.fence, step=step)
                    others = collect(self.store, self.prefix, place, nodes, wait_seconds, give_up, self.ensure_current)
                    mine = {part.name for part in parts}
                    parts += tuple(part for part in others if part.name not in mine)
                manifest = Manifest(**{**dict(manifest), "parts": parts})
                key = join_key(checkpoint_prefix(self.prefix, self.fence.fence, step), MANIFEST)
                self.store.put_if_absent(key, manifest.to_bytes())
                checkpoint = self._committed(manifest)
                if checkpoint is None:
                    self.ensure_current()  # a newer attempt sweeps what an older one writes in vain
                    raise CheckpointInvalid(f"{self.store.uri(key)} is gone. Do not edit the output.")
            # Only now is it sure that whoever starts next has seen it.
            self.ensure_current()
            self._newest, self._source = step, checkpoint.ref
            return checkpoint

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
        if _contents(checkpoint.manifest) != _contents(manifest):
            raise ValueError(f"step {step} was committed before with other content")
        return checkpoint

    def _upload(self, step: int, found: tuple[files.LocalFile, ...]) -> tuple[Part, ...]:
        known = self._known_parts()
        base = checkpoint_prefix(self.prefix, self.fence.fence, step)
        parts = tuple(known.get(_content(file.entry)) or _part(file.entry) for file in found)
        new = [file for file, part in zip(found, parts, strict=True) if part.at is None]
        files.upload_all(self.store, [(join_key(base, file.entry.name), file) for file in new])
        return parts

    def _known_parts(self) -> dict[tuple[str, int, str], Part]:
        """Node 0's files of the newest checkpoint, as far as they are still there in full length."""
        if self._source is None:
            return {}
        try:
            source = load_checkpoint(self.store, self.prefix, self._source)
        except CheckpointInvalid:
            return {}
        here = Place(fence=source.ref.fence, step=source.ref.step)
        parts = [part.model_copy(update={"at": part.at or here}) for part in source.manifest.parts if part.node == 0]
        folders = sorted({checkpoint_prefix(self.prefix, part.at.fence, part.at.step) for part in parts if part.at})
        sizes = {item.key: item.size for folder in folders for item in self.store.list(folder + "/")}
        return {
            _content(part): part for part in parts if sizes.get(part_key(self.prefix, source.ref, part)) == part.size
        }

    def prune(self, keep_last: int, keep_steps: Collection[int] = (), keep_back: int = 0) -> tuple[int, ...]:
        """Remove all but the newest keep_last whole checkpoints; returns the removed steps, ascending.

        Also kept: keep_steps, the best one that any kept checkpoint names (meta `best`), the one that this attempt
        resumed from, and for each rollback that is not yet passed the one that it goes back to. With keep_back, for
        rollbacks to come: the newest of those that are keep_back steps older than the newest, and the oldest one after
        it, which takes its place in time. Files that a kept checkpoint shares stay. Left-overs of uploads that never
        ended, and what older fences wrote in vain, go too. Nothing is removed unless a whole checkpoint is kept. Whole
        means here that all parts are there in full length. Raises Superseded.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but the newest checkpoint stays: use 1 or more")
        with self._lock:
            stored = self._stored()
            refs = survey(self.store, self.prefix, self.fence.fence).refs
            manifests = {ref: manifest for ref in refs if (manifest := self._manifest(ref))}
            whole = [ref for ref, manifest in manifests.items() if _is_whole(ref, manifest, stored)]
            self.ensure_current()
            if not whole:
                return ()
            kept = self._kept(whole, keep_last, keep_steps) | far_back(whole, keep_back)
            kept |= _named_as_best(kept, manifests, whole)
            if self._source not in kept:
                self._source = None
            newest = max(refs[0].step, self._newest or 0)
            doomed = self._doomed(stored, {ref: manifests.get(ref) for ref in kept}, newest)
            self._remove(doomed)
            return tuple(sorted(ref.step for ref in whole if (ref.fence, ref.step) in doomed and ref not in kept))

    def _kept(self, whole: list[CheckpointRef], keep_last: int, keep_steps: Collection[int]) -> set[CheckpointRef]:
        kept = {*whole[:keep_last], *(ref for ref in whole if ref.step in keep_steps)}
        if self.fence.base:
            kept.add(self.fence.base)
        for rollback in self.fence.guards.rollbacks:
            if whole[0].step < rollback.until_step:
                kept.update([ref for ref in whole if ref.step <= rollback.to_step][:1])
        return kept

    def _doomed(
        self, stored: Stored, kept: Mapping[CheckpointRef, Manifest | None], newest: int
    ) -> dict[tuple[int, int], list[str]]:
        """What to remove of each place: all but what the kept checkpoints consist of and what is on its way."""
        whole_places = {(ref.fence, ref.step) for ref in kept}
        needed = {
            (part.at.fence, part.at.step, part.path)
            for manifest in kept.values()
            for part in (manifest.parts if manifest else ())
            if part.at
        }
        doomed = {}
        for (fence, step), sizes in stored.items():
            # Of this fence only steps above the newest can still be committed: other nodes may be uploading them.
            on_its_way = fence == self.fence.fence and step > newest
            if fence > self.fence.fence or on_its_way or (fence, step) in whole_places:
                continue
            if names := [name for name in sizes if (fence, step, name) not in needed]:
                doomed[fence, step] = names
        return doomed

    def _remove(self, doomed: Mapping[tuple[int, int], list[str]]) -> None:
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


def _is_whole(ref: CheckpointRef, manifest: Manifest, stored: Stored) -> bool:
    places = ((part, (part.at.fence, part.at.step) if part.at else (ref.fence, ref.step)) for part in manifest.parts)
    return all(stored.get(place, {}).get(part.path) == part.size for part, place in places)


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


def _part(entry: FileEntry) -> Part:
    return Part(name=entry.name, size=entry.size, sha256=entry.sha256)


def _content(entry: FileEntry) -> tuple[str, int, str]:
    return entry.name, entry.size, entry.sha256


def _contents(manifest: Manifest) -> set[tuple[str, int, str]]:
    return {_content(part) for part in manifest.parts if part.node == 0}
