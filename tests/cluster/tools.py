"""Builds the cluster's binaries from pinned Go modules, once, into a cache outside the tree.

Standard library only: it runs before any virtual environment exists. The pins are the committed `go.mod` and `go.sum`
under `hack/tools/<module>`; the cache key is their hash, so an unchanged pin never builds twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.paths import TOOL_MODULES, cache_root

MINIMUM_GO = (1, 26)
# Kubernetes shares most packages between its six binaries, so the cache must outlive one module but not grow for ever.
GO_CACHE_LIMIT_BYTES = 6 * 1024**3


class ToolError(RuntimeError):
    """A binary cannot be provided; the message says which, why and what to do."""


@dataclass(frozen=True)
class Tool:
    """One binary: the folder of its pinned module and the Go package that holds its `main`."""

    name: str
    module: str
    package: str


def _kubernetes(name: str) -> Tool:
    return Tool(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}")


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool("versitygw", "versitygw", "github.com/versity/versitygw/cmd/versitygw"),
        Tool("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
        _kubernetes("kube-apiserver"),
        _kubernetes("kubectl"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        Tool("kwok", "kwok", "sigs.k8s.io/kwok/cmd/kwok"),
        Tool("helm", "helm", "helm.sh/helm/v3/cmd/helm"),
        _kubernetes("kubelet"),
        _kubernetes("kube-proxy"),
        Tool("coredns", "coredns", "github.com/coredns/coredns"),
        Tool("kind", "kind", "sigs.k8s.io/kind"),
    )
}

CONTROL_PLANE_TOOLS = ("etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kwok")
FULL_TOOLS = (*CONTROL_PLANE_TOOLS, "helm", "kubelet", "kube-proxy", "coredns")
TIER_TOOLS: dict[str, tuple[str, ...]] = {
    "unit": (),
    "train": ("versitygw",),
    "chart": ("helm",),
    "api": (*CONTROL_PLANE_TOOLS, "versitygw"),
    "e2e": (*FULL_TOOLS, "versitygw"),
}


def expand(names: Iterable[str]) -> list[str]:
    """Binary names for a mix of binaries and tiers, in the order of `TOOLS`; raises ToolError on an unknown name."""
    wanted: set[str] = set()
    for name in names:
        if name in TIER_TOOLS:
            wanted.update(TIER_TOOLS[name])
        elif name in TOOLS:
            wanted.add(name)
        else:
            known = ", ".join([*TIER_TOOLS, *TOOLS])
            raise ToolError(f"unknown tool or tier {name!r}; known are: {known}")
    return [name for name in TOOLS if name in wanted]


def module_version(tool: Tool) -> str:
    """The pinned version of the module that holds the tool's package, with its leading `v`."""
    text = (TOOL_MODULES / tool.module / "go.mod").read_text()
    pins: dict[str, str] = dict(re.findall(r"^\s*(?:require\s+)?([\w./-]+\.[\w./-]+) (v\S+)", text, re.MULTILINE))
    owners = [path for path in pins if tool.package == path or tool.package.startswith(path + "/")]
    if not owners:
        raise ToolError(f"hack/tools/{tool.module}/go.mod pins no module that holds {tool.package}")
    return pins[max(owners, key=len)]


def binary_path(name: str) -> Path:
    """Where the binary of the current pin lives, whether or not it is built yet."""
    tool = TOOLS[name]
    folder = TOOL_MODULES / tool.module
    digest = hashlib.sha256()
    for part in ("go.mod", "go.sum"):
        digest.update((folder / part).read_bytes())
    return cache_root() / "bin" / f"{tool.module}-{digest.hexdigest()[:16]}" / name


def current_dir() -> Path:
    """Folder of links to the newest binaries, to put on the PATH."""
    return cache_root() / "bin" / "current"


def ensure(names: Iterable[str]) -> dict[str, Path]:
    """Returns the path of every named binary (tiers allowed), building what the cache lacks, one build at a time."""
    wanted = expand(names)
    missing = [name for name in wanted if not binary_path(name).exists()]
    if missing:
        go = find_go()
        for number, name in enumerate(missing, start=1):
            with _one_build_at_a_time(name):
                if not binary_path(name).exists():
                    _build(go, TOOLS[name], f"{number} of {len(missing)}")
        with _one_build_at_a_time("cache"):
            _trim_go_cache()
    for name in wanted:
        _link_current(name)
    return {name: binary_path(name) for name in wanted}


def find_go() -> Path:
    """A Go toolchain new enough for the pins: the PATH's, else the one that bootstrap put into the cache."""
    candidates = [shutil.which("go"), str(cache_root() / "go" / "bin" / "go")]
    for candidate in candidates:
        if candidate and _go_version(candidate) >= MINIMUM_GO:
            return Path(candidate)
    wanted = ".".join(map(str, MINIMUM_GO))
    raise ToolError(f"no Go {wanted} or newer on the PATH or in the cache; run: hack/bootstrap.sh api")


def _go_version(go: str) -> tuple[int, int]:
    try:
        said = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return (0, 0)
    match = re.match(r"go(\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _build(go: Path, tool: Tool, position: str) -> None:
    target = binary_path(tool.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{tool.name}.{os.getpid()}")
    command = [str(go), "build", "-trimpath", "-ldflags", _ldflags(tool), "-o", str(partial), tool.package]
    started = time.monotonic()
    log = target.with_name(f"{tool.name}.build.log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=TOOL_MODULES / tool.module, env=_go_env(go), stdout=out, stderr=subprocess.STDOUT
        )
        try:
            wait_visibly(process, f"build {tool.name} {module_version(tool)} ({position})", started)
        except BaseException:
            process.kill()
            process.wait()
            partial.unlink(missing_ok=True)
            raise
    if process.returncode != 0:
        partial.unlink(missing_ok=True)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ToolError(f"go build of {tool.name} failed (rc {process.returncode}); log {log}:\n{tail}")
    partial.rename(target)
    log.unlink()


def wait_visibly(process: subprocess.Popen[bytes], label: str, started: float) -> None:
    """Waits for the process; a terminal sees a running clock, a log file a line every 20 s."""
    live = sys.stderr.isatty()
    say(f"{label}: started")
    last = started
    while process.poll() is None:
        time.sleep(0.5)
        now = time.monotonic()
        if live:
            print(f"\r  {label}: {now - started:.0f} s", end="", file=sys.stderr, flush=True)
        elif now - last >= 20:
            say(f"{label}: {now - started:.0f} s")
            last = now
    if live:
        print("\r", end="", file=sys.stderr)
    say(f"{label}: {'done' if process.returncode == 0 else 'failed'} after {time.monotonic() - started:.0f} s")


def _ldflags(tool: Tool) -> str:
    flags = ["-s", "-w"]
    version = module_version(tool)
    major, minor, *_ = version.lstrip("v").split(".")
    if tool.module == "kubernetes":
        # Without these the server reports v0.0.0 and version constraints of charts fail.
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            flags += [f"-X {package}.gitVersion={version}", f"-X {package}.gitMajor={major}"]
            flags += [f"-X {package}.gitMinor={minor}", f"-X {package}.gitTreeState=clean"]
    elif tool.module == "helm":
        flags.append(f"-X helm.sh/helm/v3/internal/version.version={version}")
        # Helm assumes the Kubernetes version of its client library when it renders without a cluster.
        client = re.search(r"k8s\.io/client-go v0\.(\d+)\.", (TOOL_MODULES / "helm" / "go.mod").read_text())
        if client:
            for package in ("chartutil", "lint/rules"):
                prefix = f"-X helm.sh/helm/v3/pkg/{package}.k8sVersion"
                flags += [f"{prefix}Major=1", f"{prefix}Minor={client[1]}"]
    elif tool.module == "kwok":
        flags.append(f"-X sigs.k8s.io/kwok/pkg/consts.Version={version}")
    return " ".join(flags)


def _go_env(go: Path) -> dict[str, str]:
    env = dict(os.environ)
    env.update(CGO_ENABLED="0", GOTOOLCHAIN="local", GOWORK="off", GOCACHE=str(_go_cache()))
    env["GOFLAGS"] = "-mod=readonly -buildvcs=false"
    # A toolchain from a wheel finds its own standard library only without a foreign GOROOT.
    env.pop("GOROOT", None)
    env["PATH"] = f"{go.parent}{os.pathsep}{env.get('PATH', '')}"
    return env


def _go_cache() -> Path:
    return cache_root() / "go-build"


def _trim_go_cache() -> None:
    """Drops our own Go build cache once it is large; the binaries stay, so only a change of pins pays for it."""
    size = sum(entry.stat().st_size for entry in _go_cache().rglob("*") if entry.is_file())
    if size > GO_CACHE_LIMIT_BYTES:
        say(f"remove the Go build cache ({size / 1024**3:.1f} GiB)")
        shutil.rmtree(_go_cache(), ignore_errors=True)


@contextmanager
def _one_build_at_a_time(name: str) -> Iterator[None]:
    """Serialises the builds of all processes: two at once thrash a small machine or do the same work twice."""
    path = cache_root() / "bin" / ".build.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"build {name}: waits for another build")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _link_current(name: str) -> None:
    link, target = current_dir() / name, binary_path(name)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and os.readlink(link) == str(target):
        return
    fresh = link.with_name(f".{name}.{os.getpid()}")
    fresh.symlink_to(target)
    fresh.replace(link)


def say(line: str) -> None:
    """One line of progress for people, on stderr, so that stdout stays free for answers."""
    print(f"  {line}", file=sys.stderr, flush=True)
