"""The operator as a process of its own, with short intervals."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.cluster.local import LocalCluster
from tests.cluster.processes import Component

REPO = Path(__file__).parents[2]
NAME = "operator"
TRAINER_IMAGE = "trainer.test/image:1"
PREFLIGHT_IMAGE = "preflight.test/image:1"
_SETTINGS = {
    "TRAINER_IMAGE": TRAINER_IMAGE,
    "PREFLIGHT_IMAGE": PREFLIGHT_IMAGE,
    "HTTP_HOST": "127.0.0.1",
    "HTTP_PORT": "0",
    "RETRY_BASE_SECONDS": "1",
    "RETRY_MAX_SECONDS": "1",
    "POLL_SECONDS": "1",
    "NODE_LOST_SECONDS": "2",
    "PROGRESS_INTERVAL_SECONDS": "1",
    "POOLS_RESYNC_SECONDS": "30",
    "IDENTITY": "test",  # the same in each life: a restart need not wait until the Lease of a killed one runs out
}


class OperatorProcess:
    """Starts, kills and restarts one operator; `settings` override the short intervals."""

    def __init__(self, cluster: LocalCluster, kubeconfig: Path) -> None:
        self._cluster = cluster
        self._kubeconfig = kubeconfig

    @property
    def pid(self) -> int | None:
        """The process, or None where it has ended."""
        return self._cluster.table.pid(NAME)

    @property
    def log(self) -> str:
        """The whole log of all its lives."""
        path = self._cluster.table.log_path(NAME)
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, **settings: str) -> None:
        """Runs from now on; does not wait until it leads."""
        env = {f"FINETUNE_OPERATOR_{name}": value for name, value in {**_SETTINGS, **settings}.items()}
        env |= {
            "KUBECONFIG": str(self._kubeconfig),
            "PYTHONPATH": f"{REPO / 'api'}:{REPO / 'operator'}",
            "PYTHONUNBUFFERED": "1",
        }
        argv = [sys.executable, "-m", "finetune_operator"]
        self._cluster.table.start(Component(NAME, argv, env, dies_with_parent=True))

    def kill(self) -> None:
        """SIGKILL: no time to finish anything."""
        self._cluster.table.stop(NAME, grace_seconds=0)

    def stop(self) -> None:
        """SIGTERM, as a rollout does."""
        self._cluster.table.stop(NAME)

    def port(self, seconds: float = 20) -> int:
        """Where the newest life serves /healthz and /metrics."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            events = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
            ports = [event["port"] for event in events if event.get("event") == "listening"]
            if ports:
                return int(ports[-1])
            time.sleep(0.1)
        raise TimeoutError(f"the operator did not say where it listens; its log:\n{self.log[-2000:]}")
