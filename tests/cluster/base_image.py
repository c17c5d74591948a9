"""The base image where no image registry can be reached: Debian trixie with Python, made by debootstrap."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.cluster import images, tools
from tests.cluster.paths import cache_root

SUITE = "trixie"
PACKAGES = ("ca-certificates", "python3", "python3-venv")
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Nothing at run time reads these; they are half of the image.
REMOVED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale", "var/log")


def ensure_base() -> str:
    """Returns the tag of the base image, making it first when it is missing (about a minute, root only)."""
    recipe = hashlib.sha256("\0".join([SUITE, *PACKAGES, *REMOVED]).encode()).hexdigest()[:12]
    tag = f"{images.PREFIX}finetune-base:{SUITE}-{recipe}"
    if images.exists(tag):
        return tag
    with images.locked("finetune-base"):
        if not images.exists(tag):
            _make(tag)
    return tag


def _make(tag: str) -> None:
    program = shutil.which("debootstrap") or "/usr/sbin/debootstrap"
    if not Path(program).exists():
        raise images.ImageError("debootstrap is not installed; run: hack/bootstrap.sh e2e")
    if os.geteuid() != 0:
        raise images.ImageError("the base image needs root (debootstrap); or use a machine with a Docker engine")
    rootfs = cache_root() / "base-rootfs"
    log = cache_root() / "logs" / "debootstrap.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(rootfs, ignore_errors=True)
    started = time.monotonic()
    command = [program, "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(rootfs)]
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            tools.wait_visibly(process, f"base system {SUITE}", started)
        if process.returncode != 0:
            raise images.ImageError(f"debootstrap failed; log {log}:\n{log.read_text(errors='replace')[-2000:]}")
        for name in REMOVED:
            shutil.rmtree(rootfs / name, ignore_errors=True)
        # apt refuses to work without its own folders.
        for name in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial", "var/log/apt"):
            (rootfs / name).mkdir(parents=True)
        container = images.run(images.buildah("from", "scratch")).strip()
        try:
            images.run(images.buildah("copy", container, str(rootfs), "/"))
            images.run(images.buildah("config", "--cmd", "bash", "--env", f"PATH={SEARCH_PATH}", container))
            images.run(images.buildah("commit", container, tag))
        finally:
            images.run(images.buildah("rm", container))
    finally:
        shutil.rmtree(rootfs, ignore_errors=True)
