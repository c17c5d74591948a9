"""One way to call kubectl: our binary, our kubeconfig, errors with the server's words."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class KubectlError(RuntimeError):
    """kubectl ended with an error; the message is what it said on stderr."""


class Kubectl:
    """Calls kubectl against one cluster.

    >>> kubectl("get", "pods", "-A")
    """

    def __init__(self, binary: Path, kubeconfig: Path, cache: Path) -> None:
        self.binary = binary
        self.kubeconfig = kubeconfig
        self.cache = cache

    def __call__(self, *arguments: str, input: str | None = None, check: bool = True, timeout: float = 120) -> str:
        """Returns stdout; raises KubectlError on failure unless `check` is false (then stdout and stderr together)."""
        command = [str(self.binary), f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.cache}", *arguments]
        try:
            done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise KubectlError(f"kubectl {' '.join(arguments)}: no answer within {timeout:.0f} s") from error
        if done.returncode != 0:
            if check:
                raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
            return done.stdout + done.stderr
        return done.stdout

    def json(self, *arguments: str) -> Any:
        """The parsed answer of a command that understands `-o json`."""
        return json.loads(self(*arguments, "-o", "json"))

    def apply(self, *objects: Mapping[str, Any], namespace: str | None = None) -> None:
        """Server-side apply of plain objects, in the order given."""
        where: Sequence[str] = ("-n", namespace) if namespace else ()
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        flags = ("--server-side", "--force-conflicts", "--field-manager=finetune-test")
        self("apply", *flags, *where, "-f", "-", input=json.dumps(listed))
