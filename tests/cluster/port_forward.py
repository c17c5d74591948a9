"""A way from the test into the cluster that works alike on kind and on host processes: kubectl port-forward."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster.kubectl import Kubectl
from tests.cluster.processes import Component, ProcessTable, free_port


@contextmanager
def port_forward(kubectl: Kubectl, table: ProcessTable, namespace: str, target: str, port: int) -> Iterator[int]:
    """A loopback port that leads to `pod/NAME` or `service/NAME` while the block runs; ends with the test process."""
    local = free_port()
    name = re.sub(r"[^a-z0-9-]", "-", f"forward-{namespace}-{target}-{local}")
    command = [str(kubectl.binary), f"--kubeconfig={kubectl.kubeconfig}", "port-forward", "-n", namespace, target]
    table.start(Component(name, [*command, f"{local}:{port}", "--address=127.0.0.1"], dies_with_parent=True))
    try:
        table.wait_ready(name, lambda: "Forwarding from" in table.log_tail(name), 30)
        yield local
    finally:
        table.stop(name, 2)
