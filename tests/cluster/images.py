"""Builds container images where a Docker engine answers, and with buildah where none does.

A tag carries a hash of everything that goes in, so an unchanged image is neither built nor loaded twice.
`image_loading` brings images into a cluster, `base_image` makes the base where no registry can be reached.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cluster import tools
from tests.cluster.paths import IMAGE_FILES, cache_root

# `localhost/` keeps the name the same in Docker, buildah, containerd and kind, and can never be pulled by mistake.
PREFIX = "localhost/"
PAUSE_TAG = PREFIX + "finetune-pause:1"
HOST_CERTIFICATES = Path("/etc/ssl/certs")
CERTIFICATE_BUNDLE = HOST_CERTIFICATES / "ca-certificates.crt"
KEPT_PER_NAME = 1
# Otherwise every builder call leaves a mount of the store behind.
STORAGE_OPTION = "overlay.skip_mount_home=true"
_IGNORED = {"__pycache__", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache"}


class ImageError(RuntimeError):
    """An image cannot be built, loaded or pushed; the message ends with the builder's last words."""


@functools.cache
def docker_answers() -> bool:
    """Whether a Docker engine is there and answers; asked once per process."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=30, check=False).returncode == 0


def build(
    dockerfile: Path,
    context: Path,
    name: str,
    *,
    build_args: Mapping[str, str] | None = None,
    target: str | None = None,
    base: str | None = None,
) -> str:
    """Returns the tag `localhost/<name>:<hash of the inputs>` of the built image; does nothing when it exists.

    `base` (default: our own base image where no Docker engine answers) is passed as the build argument BASE to a
    Dockerfile that declares it. Raises ImageError with the end of the build log.
    """
    declared = "ARG BASE" in dockerfile.read_text()
    arguments = dict(build_args or {})
    if declared and base is None and not docker_answers():
        from tests.cluster.base_image import ensure_base

        base = ensure_base()
    if declared and base:
        arguments["BASE"] = base
    tag = f"{PREFIX}{name}:{content_digest(dockerfile, context, arguments, target)}"
    if exists(tag):
        return tag
    with locked(name):
        if not exists(tag):
            options = [item for key, value in arguments.items() for item in ("--build-arg", f"{key}={value}")]
            options += ["--target", target] if target else []
            _build(dockerfile, context, tag, options)
            _remove_older(name, tag)
    return tag


def exists(tag: str) -> bool:
    """Whether the image is in the builder's store."""
    command = ["docker", "image", "inspect", tag] if docker_answers() else buildah("inspect", "--type", "image", tag)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def image_id(tag: str) -> str:
    """The content address of the built image."""
    if docker_answers():
        return run(["docker", "image", "inspect", "--format", "{{.Id}}", tag]).strip()
    return run(buildah("inspect", "--type", "image", "--format", "{{.FromImageID}}", tag)).strip()


def push(tag: str, registry: str) -> str:
    """Pushes the image to the registry (`host[:port]/path`) and returns its name there."""
    remote = f"{registry.rstrip('/')}/{tag.removeprefix(PREFIX)}"
    if docker_answers():
        run(["docker", "tag", tag, remote])
        run(["docker", "push", remote])
    else:
        run(buildah("push", tag, f"docker://{remote}"))
    return remote


def build_pause() -> str:
    """The pause image of the embedded cluster; needs only busybox-static on the host."""
    with locked("finetune-pause"):
        if not exists(PAUSE_TAG):
            busybox = shutil.which("busybox")
            if busybox is None:
                raise ImageError("busybox is not installed; run: hack/bootstrap.sh e2e")
            with _context_of({"busybox": Path(busybox)}) as context:
                _build(IMAGE_FILES / "pause" / "Dockerfile", context, PAUSE_TAG, [])
    return PAUSE_TAG


def build_s3() -> str:
    """The S3 server image for pods: the same binary that runs on the host in the train and api tiers."""
    with _context_of({"versitygw": tools.ensure(["versitygw"])["versitygw"]}) as context:
        return build(IMAGE_FILES / "s3" / "Dockerfile", context, "finetune-s3")


def export(tag: str, layout: Path) -> None:
    """Writes a buildah image into an OCI layout, uncompressed, leaving out the blobs that the layout holds already.

    skopeo, because buildah 1.28 compresses whatever goes into an OCI layout: gzip of the torch layer alone costs
    minutes, and a compressed layer never matches the one that is there.
    """
    if shutil.which("skopeo") is None:
        raise ImageError("skopeo is not installed; run: hack/bootstrap.sh e2e")
    storage, runroot = _store()
    source = f"containers-storage:[overlay@{storage}+{runroot}:{STORAGE_OPTION}]{tag}"
    run(["skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers", source, f"oci:{layout}:image"])


def buildah(*arguments: str) -> list[str]:
    """A buildah command line on our own image store in the cache."""
    if shutil.which("buildah") is None:
        raise ImageError("neither a Docker engine nor buildah is there; run: hack/bootstrap.sh e2e")
    storage, runroot = _store()
    where = ["--root", storage, "--runroot", runroot, "--storage-driver", "overlay", "--storage-opt", STORAGE_OPTION]
    return ["buildah", *where, *arguments]


def _store() -> tuple[str, str]:
    folder = cache_root() / "buildah"
    return str(folder / "storage"), str(folder / "run")


def run(command: Sequence[str]) -> str:
    """Runs a builder command and returns stdout; raises ImageError with its words."""
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ImageError(f"{command[0]} failed ({shlex.join(command)}): {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextmanager
def locked(what: str) -> Iterator[None]:
    """One build per image name, and one load, at a time on this machine: two would do the same work twice."""
    path = cache_root() / "locks" / f"image-{what}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(dockerfile: Path, context: Path, tag: str, options: Sequence[str]) -> None:
    if docker_answers():
        command = ["docker", "build", "-f", str(dockerfile), "-t", tag, *options, str(context)]
    else:
        command = buildah("bud", "--isolation", "chroot", "--layers", "--pull-never", *_host_mounts())
        # Declared by a Dockerfile as ARG they reach its RUN lines and are not kept in the image.
        command += [f"--build-arg={key}={CERTIFICATE_BUNDLE}" for key in ("PIP_CERT", "SSL_CERT_FILE")]
        command += ["--build-arg=UV_CACHE_DIR=/root/.cache/uv"]
        command += ["-f", str(dockerfile), "-t", tag, *options, str(context)]
    log = cache_root() / "logs" / f"build-{tag.removeprefix(PREFIX).split(':')[0]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        tools.wait_visibly(process, f"build image {tag}", started)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise ImageError(f"image {tag} did not build (rc {process.returncode}); log {log}:\n{tail}")


def _host_mounts() -> list[str]:
    """Host folders that a build may use: trusted certificates, and the download caches of pip and uv."""
    mounts = [f"{HOST_CERTIFICATES}:/etc/ssl/certs:ro"] if CERTIFICATE_BUNDLE.exists() else []
    for name in ("pip", "uv"):
        folder = Path.home() / ".cache" / name
        folder.mkdir(parents=True, exist_ok=True)
        mounts.append(f"{folder}:/root/.cache/{name}")
    return [item for mount in mounts for item in ("--volume", mount)]


def _remove_older(name: str, newest: str) -> None:
    """Keeps only the newest image of a name: an old layer of several GB would otherwise stay for ever."""
    if docker_answers():
        return
    listed = json.loads(run(buildah("images", "--json")) or "[]") or []
    same = [image for image in listed if any(tag.startswith(f"{PREFIX}{name}:") for tag in image.get("names") or ())]
    same.sort(key=lambda image: str(image.get("createdatraw", "")), reverse=True)
    for image in same[KEPT_PER_NAME:]:
        for tag in image["names"]:
            if tag != newest:
                subprocess.run(buildah("rmi", tag), capture_output=True, check=False)


@contextmanager
def _context_of(files: Mapping[str, Path]) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="finetune-context-"))
    try:
        for name, source in files.items():
            shutil.copy(source, folder / name)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def content_digest(dockerfile: Path, context: Path, arguments: Mapping[str, str], target: str | None) -> str:
    """Hash of the Dockerfile, of every file that it copies from the context, and of arguments and target."""
    digest = hashlib.sha256(dockerfile.read_bytes())
    digest.update(json.dumps([sorted(arguments.items()), target]).encode())
    for source in copied_sources(dockerfile.read_text()):
        matches = sorted(context.glob(source.strip("/"))) if source.strip("./") else [context]
        for match in matches:
            for path in sorted(_files(match)):
                mode = path.stat().st_mode & 0o777
                digest.update(f"{path.relative_to(context)}\0{mode:o}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def copied_sources(dockerfile: str) -> list[str]:
    """What COPY and ADD take from the context, in order; copies from other stages and images do not count."""
    sources: list[str] = []
    for line in re.sub(r"\\\n", " ", dockerfile).splitlines():
        words = line.split(maxsplit=1)
        if len(words) < 2 or words[0].upper() not in ("COPY", "ADD"):
            continue
        rest = words[1]
        flags = re.findall(r"^\s*(?:--\S+\s+)+", rest)
        if flags and "--from=" in flags[0]:
            continue
        rest = rest[len(flags[0]) :] if flags else rest
        parts = json.loads(rest) if rest.lstrip().startswith("[") else shlex.split(rest)
        sources.extend(parts[:-1])
    return sources


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir() and path.name not in _IGNORED:
        for below in path.iterdir():
            yield from _files(below)
