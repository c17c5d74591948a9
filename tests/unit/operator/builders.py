"""Plain values that decide and render are tried on."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import naming
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import Pool, build_references, spec_digest
from finetune_api.planner.preflight import further_inputs
from finetune_api.pool import GPUPoolSpec
from finetune_api.runfile import InputKind
from finetune_api.status import DataFacts, FineTuneJobStatus, ModelFacts, Preflight
from finetune_operator.config import Config
from finetune_operator.snapshot import ChildJob, JobView, PodView, Snapshot

START = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
UID = "0a1b2c3d-4e5f-6789-abcd-ef0123456789"
CONFIG = Config(
    trainer_image="registry.test/trainer:1",
    preflight_image="registry.test/preflight:1",
    identity="test",
    retry_base_seconds=2,
    retry_max_seconds=8,
)


def later(seconds: float) -> datetime:
    """START plus that many seconds."""
    return START + timedelta(seconds=seconds)


def a_spec(**fields: Any) -> FineTuneJobSpec:
    """A complete spec; `fields` are JSON members that replace its own."""
    return FineTuneJobSpec.from_json(
        {
            "model": {"uri": "hf://tiiuae/falcon-7b"},
            "dataset": {"sources": [{"uri": "s3://team-a/faq/train.jsonl"}]},
            "tuning": {"type": "QLoRA"},
            "output": {"uri": "s3://team-a/models/faq"},
            "credentials": {"secretName": "team-a-s3"},
            **fields,
        }
    )


def a_pool(name: str = "a100", **fields: Any) -> Pool:
    """A pool of two nodes with eight GPUs."""
    return Pool(
        name,
        GPUPoolSpec.from_json(
            {
                "accelerator": "a100-40",
                "gpuMemoryGiB": 40,
                "resourceName": "nvidia.com/gpu",
                "gpusPerNode": 8,
                "maxNodes": 2,
                "provisioning": "Static",
                "startTimeoutSeconds": 600,
                "perGPU": {"cpu": 6, "memoryGiB": 40, "ephemeralStorageGiB": 100},
                "sharedMemoryGiB": 8,
                "terminationGracePeriodSeconds": 120,
                "nodeSelector": {"pool": name},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "spot": False,
                "hourlyPriceUSD": 2.0,
                "peakTflops": 312,
                **fields,
            }
        ),
    )


def model_facts(**fields: Any) -> ModelFacts:
    """A model of seven billion parameters."""
    return ModelFacts(
        **{
            "model_type": "falcon",
            "architecture": "FalconForCausalLM",
            "parameters": 7_000_000_000,
            "weight_bytes": 14_000_000_000,
            "hidden_size": 4544,
            "layers": 32,
            "vocabulary_size": 65024,
            "max_positions": 2048,
            "digest": "sha256:model",
            **fields,
        }
    )


def data_facts(**fields: Any) -> DataFacts:
    """A thousand records."""
    return DataFacts(
        **{
            "rows": 1000,
            "format": "PromptCompletion",
            "format_reason": "seen in the first record",
            "tokens": 200_000,
            "longest_tokens": 600,
            "p95_tokens": 400,
            "bytes": 800_000,
            "digest": "sha256:data",
            **fields,
        }
    )


def passed(spec: FineTuneJobSpec) -> Preflight:
    """What preflight says of a good job."""
    further = [item.field for item in further_inputs(spec, build_references(spec)) if item.kind != InputKind.DATA]
    return Preflight(
        ok=True,
        spec_digest=spec_digest(spec),
        model=model_facts(),
        data=data_facts(),
        digests={path: f"sha256:{path}" for path in further},
    )


def a_job(spec: FineTuneJobSpec | None = None, *, status: FineTuneJobStatus | None = None, **fields: Any) -> JobView:
    """The FineTuneJob team-a/faq."""
    return JobView(
        **{
            "name": "faq",
            "namespace": "team-a",
            "uid": UID,
            "generation": 1,
            "resource_version": "1",
            "deleting": False,
            "spec": spec or a_spec(),
            "status": status or FineTuneJobStatus(),
            **fields,
        }
    )


def a_snapshot(job: JobView, **fields: Any) -> Snapshot:
    """What is seen of the job at START, with one pool."""
    return Snapshot(**{"now": START, "job": job, "pools": (a_pool(),), **fields})


def an_attempt(number: int = 1, **fields: Any) -> ChildJob:
    """A batch Job of attempt `number`."""
    return ChildJob(
        **{
            "name": naming.attempt_name("faq", UID, number),
            "uid": f"attempt-{number}",
            "role": naming.ROLE_TRAINER,
            "number": number,
            "created": START,
            **fields,
        }
    )


def a_pod(job_uid: str = "attempt-1", index: int = 0, **fields: Any) -> PodView:
    """A running trainer pod on node-<index>."""
    return PodView(
        **{
            "name": f"faq-0a1b2-1-{index}-xxxxx",
            "uid": f"{job_uid}-pod-{index}",
            "job_uid": job_uid,
            "role": naming.ROLE_TRAINER,
            "index": index,
            "phase": "Running",
            "created": START,
            "node": f"node-{index}",
            **fields,
        }
    )


def ended(pod: PodView, exit_code: int, left: str = "", **fields: Any) -> PodView:
    """The pod after its container ended."""
    return replace(
        pod,
        **{
            "phase": "Succeeded" if exit_code == 0 else "Failed",
            "ended": True,
            "exit_code": exit_code,
            "exit_time": later(60),
            "termination_message": left,
            **fields,
        },
    )
