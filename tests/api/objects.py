"""The objects that tests apply: a complete small job, and the pools of the platform team."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from finetune_api.job import API_VERSION

Object = dict[str, Any]

GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


def job(name: str, namespace: str, **spec: Any) -> Object:
    """The smallest complete FineTuneJob; `spec` adds or replaces members of the spec, None removes one."""
    body: Object = {
        "model": {"uri": "hf://tiiuae/falcon-7b", "revision": "main"},
        "dataset": {"sources": [{"uri": "s3://team-a/faq/train.jsonl"}]},
        "tuning": {"type": "QLoRA"},
        "output": {"uri": f"s3://team-a/models/{name}"},
        "credentials": {"secretName": "team-a-s3"},
    }
    body.update(deepcopy(spec))
    body = {key: value for key, value in body.items() if value is not None}
    return {
        "apiVersion": API_VERSION,
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": body,
    }


def pool(name: str, accelerator: str, memory_gib: int, price: float, *, gpus_per_node: int = 8, **spec: Any) -> Object:
    """A GPUPool whose nodes carry the label and the taint that a platform team would give them."""
    body: Object = {
        "accelerator": accelerator,
        "gpuMemoryGiB": memory_gib,
        "resourceName": "nvidia.com/gpu",
        "gpusPerNode": gpus_per_node,
        "maxNodes": 16,
        "provisioning": "Static",
        "startTimeoutSeconds": 60,
        "perGPU": {"cpu": 4, "memoryGiB": 16, "ephemeralStorageGiB": 20},
        "sharedMemoryGiB": 8,
        "terminationGracePeriodSeconds": 5,
        "nodeSelector": {"gpu-pool": name},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "spot": False,
        "hourlyPriceUSD": price,
        "peakTflops": 100,
    }
    body.update(spec)
    return {"apiVersion": API_VERSION, "kind": "GPUPool", "metadata": {"name": name}, "spec": body}


def plan(pool_name: str = "l4") -> Object:
    """A status.plan that the schema takes."""
    return {
        "specDigest": "sha256:0",
        "pool": pool_name,
        "poolReason": "set by the job",
        "nodes": 1,
        "gpusPerNode": 1,
        "microBatchSize": 8,
        "gradientAccumulation": 2,
        "zeroStage": 0,
        "totalSteps": 100,
        "settings": [],
        "memory": {"totalGiB": 10.5, "weightsGiB": 4, "trainableGiB": 1, "activationsGiB": 4, "reserveGiB": 1.5},
        "runDigest": "sha256:1",
        "trainerImage": "trainer:1",
    }
