"""From kubectl apply to Succeeded with a tiny model, minus training, beside the floor: two container starts and `import torch`.

Prints medians over a few runs; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import yaml

from hack.stand import RESTRICTED, Stand, stand, upload_folder
from tests.train.models import tiny_model

NAMESPACE = "bench"


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="make bench-overhead")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with stand() as running:
        running.tenant(NAMESPACE)
        client = running.s3_client(NAMESPACE)
        upload_folder(client, tiny_model("llama"), NAMESPACE, "models/tiny")
        records = [{"question": f"What is {n} plus one?", "answer": f"It is {n + 1}."} for n in range(40)]
        client.put_object(
            Bucket=NAMESPACE,
            Key="data/train.jsonl",
            Body="".join(json.dumps(record) + "\n" for record in records).encode(),
        )
        floors = [floor(running) for _ in range(arguments.runs)]
        totals, trainings = zip(
            *(job(running, client, f"bench-{time.time():.0f}") for _ in range(arguments.runs)), strict=True
        )
    overheads = [total - training for total, training in zip(totals, trainings, strict=True)]
    for name, values in (
        ("apply to Succeeded", totals),
        ("training", trainings),
        ("overhead", overheads),
        ("floor", floors),
    ):
        print(f"{name:<20} median {statistics.median(values):6.1f} s   all {[round(v, 1) for v in values]}")
    print(f"overhead / floor     {statistics.median(overheads) / statistics.median(floors):.2f}")
    return 0


def job(running: Stand, client: Any, name: str) -> tuple[float, float]:
    """Seconds from apply to Succeeded, and the seconds of training in them."""
    spec = {
        "model": {"uri": f"s3://{NAMESPACE}/models/tiny"},
        "dataset": {"sources": [{"uri": f"s3://{NAMESPACE}/data/train.jsonl"}]},
        "tuning": {"type": "LoRA"},
        "hyperparameters": {"maxSteps": 4, "globalBatchSize": 4},
        "output": {"uri": f"s3://{NAMESPACE}/out/{name}"},
        "credentials": {"secretName": f"{NAMESPACE}-s3"},
    }
    document = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    start = time.monotonic()
    running.cluster.kubectl("apply", "-n", NAMESPACE, "-f", "-", input=yaml.safe_dump(document))
    running.wait(NAMESPACE, name, "Succeeded", 300)
    total = time.monotonic() - start
    report = json.loads(client.get_object(Bucket=NAMESPACE, Key=f"out/{name}/report.json")["Body"].read())
    return total, float(report["training"]["seconds"])


def floor(running: Stand) -> float:
    """Seconds from apply to the end of a pod of the preflight image and then one of the trainer image that imports torch."""
    start = time.monotonic()
    for image, code in ((running.images.preflight, "pass"), (running.images.trainer, "import torch")):
        name = f"floor-{time.time_ns() // 10**6}"
        running.cluster.kubectl.apply(pod(name, image, code), namespace=NAMESPACE)
        running.cluster.kubectl(
            "wait", "-n", NAMESPACE, f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s"
        )
    return time.monotonic() - start


def pod(name: str, image: str, code: str) -> dict[str, Any]:
    """A pod that runs one line of Python."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": RESTRICTED},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "floor",
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["python", "-c", code],
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                        "readOnlyRootFilesystem": True,
                    },
                }
            ],
        },
    }


if __name__ == "__main__":
    raise SystemExit(main())
