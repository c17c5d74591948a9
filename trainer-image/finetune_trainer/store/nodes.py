"""How the files of the nodes other than 0 get into a checkpoint: through the store alone.

Node k uploads its files of a step, then the list of them (`nodes/<k>.json`); node 0 waits for the lists of all
nodes and commits their entries in its manifest. Without the list a node's files do not exist, and without the
manifest no list counts. Where a node cannot bring its part, it says so in the place of the list: created if absent,
so that of the two only one is ever there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from finetune_trainer.store import files
from finetune_trainer.store.checkpoints import ensure_newest
from finetune_trainer.store.documents import MAX_REASON, FileEntry, NodeFiles, Part, Place
from finetune_trainer.store.errors import CheckpointInvalid, NodeFilesMissing, ObjectNotFound
from finetune_trainer.store.layout import checkpoint_prefix, node_document, path_of
from finetune_trainer.store.objects import ObjectStore, join_key

_POLL_SECONDS = 0.5


class NodeUploader:
    """Uploads the files of one node other than 0 for one attempt. It can never commit."""

    def __init__(self, store: ObjectStore, prefix: str, fence_number: int, node: int) -> None:
        if node < 1:
            raise ValueError(f"node {node} does not upload this way: node 0 commits")
        self._store = store
        self._prefix = prefix
        self._fence = fence_number
        self._node = node

    def upload(self, step: int, folder: Path) -> None:
        """Node 0 can commit folder's files of this step once this returns.

        They must not change meanwhile. After an error the same call may be made again; one that had got through
        is then found. Raises Superseded, storage errors, and ValueError for a step that was uploaded before
        with other content or given up, or a folder with links or odd names.
        """
        ensure_newest(self._store, self._prefix, self._fence)
        found = files.scan(folder)
        base, key = self._places(step)
        mine = NodeFiles(files=tuple(file.entry for file in found))
        # What a list vouches for is never written again: node 0 may have committed it.
        if not self._listed(key, mine, step):
            names = ((path_of(self._node, file.entry.name), file) for file in found)
            files.upload_all(self._store, [(join_key(base, name), file) for name, file in names])
            self._store.put_if_absent(key, mine.to_bytes())
            self._listed(key, mine, step)
        ensure_newest(self._store, self._prefix, self._fence)

    def give_up(self, step: int, why: str) -> None:
        """Node 0 waits no longer for this node's part of the step, and never commits it; unless it is there already.

        Raises Superseded and storage errors.
        """
        ensure_newest(self._store, self._prefix, self._fence)
        _, key = self._places(step)
        told = why.encode(errors="backslashreplace").decode()[:MAX_REASON]  # file names may be no text
        self._store.put_if_absent(key, NodeFiles(missing=told).to_bytes())

    def _places(self, step: int) -> tuple[str, str]:
        base = checkpoint_prefix(self._prefix, self._fence, step)
        return base, join_key(base, node_document(self._node))

    def _listed(self, key: str, mine: NodeFiles, step: int) -> bool:
        stored = _read(self._store, key)
        if stored is not None and stored != mine:
            did = "gave" if stored.missing else "uploaded"
            what = "up before" if stored.missing else "before with other content"
            raise ValueError(f"node {self._node} {did} step {step} {what}")
        return stored is not None


def collect(
    store: ObjectStore,
    prefix: str,
    place: Place,
    nodes: int,
    wait_seconds: float,
    ensure_current: Callable[[], None],
) -> tuple[Part, ...]:
    """The files of nodes 1 to nodes - 1, all there in full length; of one name, that of the lowest node. For node 0.

    Raises NodeFilesMissing after wait_seconds or when a node gives its part up, what ensure_current raises, and
    CheckpointInvalid if a file is not as its node listed it.
    """
    base = checkpoint_prefix(prefix, place.fence, place.step)
    deadline = time.monotonic() + wait_seconds
    found: dict[int, tuple[FileEntry, ...]] = {}
    while True:
        for node in range(1, nodes):
            if node not in found and (listed := _read(store, join_key(base, node_document(node)))):
                if listed.missing:
                    raise NodeFilesMissing(f"step {place.step} is not stored: node {node} lacks it: {listed.missing}")
                found[node] = listed.files
        missing = [node for node in range(1, nodes) if node not in found]
        if not missing:
            break
        if time.monotonic() >= deadline:
            raise NodeFilesMissing(
                f"step {place.step} is not stored: no files of node {', '.join(map(str, missing))} after "
                f"{wait_seconds:g} s. Look at the log of the pod with that index."
            )
        time.sleep(_POLL_SECONDS)
        ensure_current()
    parts: dict[str, Part] = {}
    for node, entries in sorted(found.items()):
        for file in entries:
            parts.setdefault(file.name, Part(name=file.name, size=file.size, sha256=file.sha256, node=node))
    sizes = {item.key: item.size for item in store.list(base + "/")}
    for part in parts.values():
        key = join_key(base, part.path)
        if sizes.get(key) != part.size:
            ensure_current()  # a newer attempt sweeps what an older one writes in vain
            raise CheckpointInvalid(f"{store.uri(key)} is not as node {part.node} listed it. Do not edit the output.")
    return tuple(parts.values())


def _read(store: ObjectStore, key: str) -> NodeFiles | None:
    try:
        return NodeFiles.read(store, key)
    except ObjectNotFound:
        return None
