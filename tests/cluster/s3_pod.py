"""The S3 server as a pod of a test cluster: one Deployment, one Service, one Secret with the root keys.

Data and users live in an emptyDir: they survive a restart of the container and go with the pod.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.cluster import images
from tests.cluster.choice import Cluster
from tests.cluster.kubectl import KubectlError
from tests.cluster.s3 import HEALTH_PATH, REGION, S3Accounts, S3Error

NAME = "s3"
PORT = 7070
USER_ID = 65532
# Sends a signal to the server, whose container shares its processes with the pod's other containers.
_SIGNAL = 'for name in /proc/[0-9]*; do [ "$(cat $name/comm)" = versitygw ] && kill -{} ${{name#/proc/}}; done; true'


class S3Pod(S3Accounts):
    """A running S3 server in the namespace; `internal_endpoint` is for pods, `endpoint` for this machine."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.internal_endpoint = f"http://{NAME}.{namespace}.svc:{PORT}"
        self._cluster = cluster

    def start(self) -> S3Pod:
        """Builds and loads the image where needed, applies the objects and returns once the server answers."""
        self._take_over_keys()
        tag = images.build_s3()
        self._cluster.load_image(tag)
        self._cluster.kubectl.apply(*objects(self.namespace, tag, self.access_key, self.secret_key))
        self._cluster.kubectl("rollout", "status", "-n", self.namespace, f"deployment/{NAME}", "--timeout=120s")
        return self

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The server does not answer while the block runs; it goes on with all its data afterwards.

        Requests in flight hang; once the readiness probe has failed (3 s), new connections are refused.
        """
        self._signal("STOP")
        try:
            yield
        finally:
            self._signal("CONT")
            self._cluster.kubectl("wait", "-n", self.namespace, f"deployment/{NAME}", "--for=condition=Available")

    def _signal(self, name: str) -> None:
        shell = ["sh", "-c", _SIGNAL.format(name)]
        self._cluster.kubectl("exec", "-n", self.namespace, f"deployment/{NAME}", "--", *shell)

    def _take_over_keys(self) -> None:
        """A server that an earlier process started keeps its root keys: it would not read new ones."""
        found = self._cluster.kubectl("get", "secret", NAME, "-n", self.namespace, "--ignore-not-found", "-o", "json")
        if found.strip():
            data = {key: base64.b64decode(value).decode() for key, value in json.loads(found)["data"].items()}
            self.access_key, self.secret_key = data["ROOT_ACCESS_KEY_ID"], data["ROOT_SECRET_ACCESS_KEY"]

    def secret(self, name: str, access_key: str) -> dict[str, Any]:
        """A Secret with the user's AWS keys under the names that FineTuneJob credentials use."""
        keys = {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": self.users[access_key]}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": keys}

    def admin(self, *arguments: str) -> str:
        """Runs one `versitygw admin` command inside the pod; raises S3Error when it fails."""
        login = ["--access", self.access_key, "--secret", self.secret_key, "--region", REGION]
        command = ["versitygw", "admin", *login, "--endpoint-url", f"http://127.0.0.1:{PORT}", *arguments]
        try:
            return self._cluster.kubectl("exec", "-n", self.namespace, f"deployment/{NAME}", "--", *command)
        except KubectlError as error:
            # The command line holds the root keys, which must not end up in a test report.
            raise S3Error(f"versitygw admin {arguments[0]} failed in {self.namespace}: {_last_line(error)}") from None


@contextmanager
def s3_pod(cluster: Cluster, namespace: str) -> Iterator[S3Pod]:
    """The S3 server in an existing namespace, reachable from this machine at `endpoint` while the block runs.

    The pod stays when the block ends; it goes with its namespace.
    """
    pod = S3Pod(cluster, namespace).start()
    with cluster.port_forward(namespace, f"service/{NAME}", PORT) as local:
        pod.endpoint = f"http://127.0.0.1:{local}"
        yield pod


def objects(namespace: str, image: str, access_key: str, secret_key: str) -> list[Mapping[str, Any]]:
    """The Kubernetes objects of the server; the pod passes Pod Security `restricted`."""
    meta = {"name": NAME, "namespace": namespace, "labels": {"app": NAME}}
    keys = {"ROOT_ACCESS_KEY_ID": access_key, "ROOT_SECRET_ACCESS_KEY": secret_key}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": keys}
    arguments = [f"--port=0.0.0.0:{PORT}", f"--region={REGION}", f"--health={HEALTH_PATH}", "--keep-alive"]
    arguments += ["--iam-cache-disable", "--iam-dir=/data/iam", "posix", "/data/buckets"]
    volume = {"name": "data", "mountPath": "/data"}
    limits = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": True}
    shared = {"image": image, "imagePullPolicy": "IfNotPresent", "securityContext": limits, "volumeMounts": [volume]}
    folders = {**shared, "name": "folders", "command": ["mkdir", "-p", "/data/iam", "/data/buckets"]}
    server = {
        **shared,
        "name": NAME,
        "args": arguments,
        "envFrom": [{"secretRef": {"name": NAME}}],
        "ports": [{"containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": HEALTH_PATH, "port": PORT}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
    }
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 2,
        # The first process of a container can neither be stopped nor killed from inside.
        "shareProcessNamespace": True,
        "securityContext": {
            **{"runAsNonRoot": True, "runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [folders],
        "containers": [server],
        "volumes": [{"name": "data", "emptyDir": {}}],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            # Two servers must never share the folder, and a rolling update of an emptyDir would lose it anyway.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": {"app": NAME}},
            "template": {"metadata": {"labels": {"app": NAME}}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {"selector": {"app": NAME}, "ports": [{"port": PORT, "targetPort": PORT}]},
    }
    return [secret, service, deployment]


def _last_line(error: KubectlError) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and "--secret" not in line]
    return lines[-1] if lines else "no reason given"
