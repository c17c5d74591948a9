"""A stand to run on: a cluster with the chart installed and an S3 server; for the demo, e2e tests and benchmarks."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3

from hack.build_images import Built, build
from tests.cluster import tools
from tests.cluster.choice import Cluster, Wanted, choose
from tests.cluster.s3_pod import S3Pod, s3_pod

ROOT = Path(__file__).resolve().parents[1]
OPERATOR_NAMESPACE = "finetune-system"
S3_NAMESPACE = "s3"
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}


@dataclass(frozen=True)
class Stand:
    """A running cluster with the operator and an S3 server."""

    cluster: Cluster
    s3: S3Pod
    images: Built

    def tenant(self, namespace: str) -> None:
        """A namespace with a bucket of its own and the secret `<namespace>-s3`; idempotent."""
        kubectl = self.cluster.kubectl
        kubectl.apply(_namespace(namespace))
        secret = f"{namespace}-s3"
        found = kubectl("get", "secret", secret, "-n", namespace, "--ignore-not-found", "-o", "json")
        if found.strip():  # made by an earlier process against the same server
            self.s3.users[namespace] = base64.b64decode(json.loads(found)["data"]["AWS_SECRET_ACCESS_KEY"]).decode()
            return
        self.s3.add_user(namespace)
        self.s3.create_bucket(namespace, owner=namespace)
        kubectl.apply(self.s3.secret(secret, namespace), namespace=namespace)

    def s3_client(self, user: str | None = None) -> Any:
        """A boto3 client that reaches the server from this machine."""
        return boto3.client("s3", **self.s3.client_options(user))

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        """The FineTuneJob as it is now."""
        return dict(self.cluster.kubectl.json("get", "ftj", name, "-n", namespace))

    def wait(self, namespace: str, name: str, condition: str, seconds: float) -> None:
        """`kubectl wait --for=condition=…`, as a person would; raises KubectlError when the time is up."""
        self.cluster.kubectl(
            "wait",
            "-n",
            namespace,
            f"ftj/{name}",
            f"--for=condition={condition}",
            f"--timeout={seconds:.0f}s",
            timeout=seconds + 30,
        )


@contextmanager
def stand(wanted: Wanted = "auto", *, cluster: Cluster | None = None) -> Iterator[Stand]:
    """Start what is missing and yield the stand; the cluster stays up when the block ends."""
    found = cluster or choose(wanted)
    found.up()
    images = build("cpu")
    for tag in (images.operator, images.preflight, images.trainer):
        found.load_image(tag)
    found.kubectl.apply(_namespace(S3_NAMESPACE))
    with s3_pod(found, S3_NAMESPACE) as s3:
        install_chart(found, images, s3.internal_endpoint)
        yield Stand(found, s3, images)


def install_chart(cluster: Cluster, images: Built, s3_endpoint: str) -> None:
    """`helm upgrade --install` with the images of this tree and a CPU pool; returns once the operator is up."""
    helm = tools.ensure(["helm"])["helm"]
    cluster.kubectl.apply(_namespace(OPERATOR_NAMESPACE))
    # Helm installs the definitions and never upgrades them; a cluster that is up already may hold older ones.
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
    values = {
        "images": {"operator": images.operator, "preflight": images.preflight, "trainer": images.trainer},
        "pools": {name: None for name in ("l4", "a40", "a100-40", "a100-80")},
        "cpuPool": {"enabled": True, "cpu": 0.5},
        "storage": {"endpoint": s3_endpoint, "region": "us-east-1", "pathStyle": True},
        # Two cores hold everything in the test cluster.
        "operator": {"resources": {"requests": {"cpu": "50m", "memory": "128Mi"}}},
    }
    subprocess.run(
        [
            str(helm),
            "upgrade",
            "--install",
            "finetune",
            str(ROOT / "charts" / "finetune-operator"),
            "--kubeconfig",
            str(cluster.kubeconfig),
            "--namespace",
            OPERATOR_NAMESPACE,
            "--values",
            "-",
            "--wait",
            "--timeout",
            "180s",
        ],
        input=json.dumps(values),
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def upload_folder(client: Any, folder: Path, bucket: str, prefix: str) -> int:
    """Copy the files of folder below prefix where they differ in size; returns how many bytes went up."""
    sent = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        key = f"{prefix}/{path.relative_to(folder).as_posix()}"
        if _size(client, bucket, key) != path.stat().st_size:
            client.upload_file(str(path), bucket, key)
            sent += path.stat().st_size
    return sent


def _size(client: Any, bucket: str, key: str) -> int | None:
    found = client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    return next((item["Size"] for item in found if item["Key"] == key), None)


def _namespace(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}


def seconds_since(start: float) -> str:
    """Elapsed time for people: `12 s` or `3 min 5 s`."""
    whole = round(time.monotonic() - start)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
