"""Brings built images into the embedded cluster's containerd without moving a layer that is already there.

The layers that containerd holds are linked into a temporary OCI layout before the export, so the builder skips them,
and they are left out of the stream that containerd imports. A change of our code moves a few kilobytes, not the
gigabytes below it, and no archive is ever written to disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from tests.cluster import images, tools
from tests.cluster.container_runtime import NAMESPACE, ContainerRuntime
from tests.cluster.paths import cache_root

SOURCE_LABEL = "finetune.dev/source-id"
CONTENT = "io.containerd.content.v1.content/blobs/sha256"


def load(tag: str, runtime: ContainerRuntime) -> int:
    """The image is in the cluster under this tag; returns the bytes moved, 0 when the same image is there already."""
    source = images.image_id(tag)
    if _loaded_source(tag, runtime) == source:
        return 0
    with images.locked("load"):
        if _loaded_source(tag, runtime) == source:
            return 0
        started = time.monotonic()
        layout = Path(tempfile.mkdtemp(prefix="layout-", dir=cache_root()))
        try:
            moved = _transfer(tag, runtime, layout)
        finally:
            shutil.rmtree(layout, ignore_errors=True)
        runtime.ctr("images", "label", tag, f"{SOURCE_LABEL}={source}")
        _remove_older(tag, runtime)
    tools.say(f"load image {tag}: {moved / 1e6:.0f} MB moved in {time.monotonic() - started:.1f} s")
    return moved


def load_pause(runtime: ContainerRuntime) -> None:
    """The pause image is in the cluster; built first when it is nowhere."""
    if _loaded_source(images.PAUSE_TAG, runtime) is None:
        load(images.build_pause(), runtime)


def _transfer(tag: str, runtime: ContainerRuntime, layout: Path) -> int:
    """Exports what containerd lacks into the layout, streams it over, and returns the bytes moved."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    present = set(runtime.ctr("content", "list", "--quiet").split())
    for digest in present:
        stored = runtime.root / CONTENT / digest.removeprefix("sha256:")
        if stored.exists():
            os.link(stored, blobs / stored.name)
    linked = {path.name for path in blobs.iterdir()}
    images.export(tag, layout)
    index = json.loads((layout / "index.json").read_text())
    for manifest in index["manifests"]:
        manifest["annotations"] = {"io.containerd.image.name": tag}
    (layout / "index.json").write_text(json.dumps(index))
    fresh = [path for path in sorted(blobs.iterdir()) if path.name not in linked]
    _import(runtime, layout, fresh)
    return sum(path.stat().st_size for path in fresh)


def _import(runtime: ContainerRuntime, layout: Path, blobs: list[Path]) -> None:
    command = ["ctr", "--address", str(runtime.socket), "--namespace", NAMESPACE, "images", "import", "-"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT)
        assert process.stdin is not None
        try:
            with tarfile.open(fileobj=process.stdin, mode="w|") as stream:
                for path in (layout / "oci-layout", *blobs, layout / "index.json"):
                    stream.add(path, arcname=str(path.relative_to(layout)))
            process.stdin.close()
        except BrokenPipeError:
            # containerd refused the stream; its own words below say why.
            pass
        if process.wait() != 0:
            said.seek(0)
            words = said.read().decode(errors="replace").strip()
            raise images.ImageError(f"containerd did not import the image: {words}")


def _loaded_source(tag: str, runtime: ContainerRuntime) -> str | None:
    for line in runtime.ctr("images", "list", f"name=={tag}").splitlines()[1:]:
        for word in line.replace(",", " ").split():
            if word.startswith(SOURCE_LABEL + "="):
                return word.split("=", 1)[1]
    return None


def _remove_older(newest: str, runtime: ContainerRuntime) -> None:
    """Drops the tags of this name that the builder no longer keeps, with the by-id names that would hold their layers."""
    digests = {}
    for line in runtime.ctr("images", "list").splitlines()[1:]:
        reference, _, digest = line.split()[:3]
        digests[reference] = digest
    name = newest.rsplit(":", 1)[0]
    same = [tag for tag in digests if tag.rsplit(":", 1)[0] == name and tag != newest]
    stale = [tag for tag in same if not images.exists(tag)]
    kept = {digests[tag] for tag in digests if not tag.startswith("sha256:") and tag not in stale}
    gone = {digests[tag] for tag in stale} - kept
    stale += [reference for reference, digest in digests.items() if digest in gone and reference not in stale]
    if stale:
        runtime.ctr("images", "remove", *stale)
