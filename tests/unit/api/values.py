"""Plain values that tests of the API, the planner and the operator start from."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from finetune_api.job import FineTuneJobSpec, Storage
from finetune_api.planner import Planned, Pool, build_references, make_plan, spec_digest
from finetune_api.planner.preflight import further_inputs
from finetune_api.pool import GPUPoolSpec
from finetune_api.runfile import InputKind, RunJob
from finetune_api.status import DataFacts, ModelFacts, Preflight

JOB = RunJob(name="faq", namespace="team-a", uid="0b5d2c1e-9a7f-4c2a-8d55-000000000001")
TRAINER_IMAGE = "registry.example.com/finetune/trainer@sha256:" + "0" * 64

_SPEC: dict[str, Any] = {
    "model": {"uri": "hf://tiiuae/falcon-7b", "revision": "main"},
    "dataset": {"sources": [{"uri": "s3://team-a/faq/train.jsonl"}]},
    "tuning": {"type": "QLoRA"},
    "output": {"uri": "s3://team-a/models/faq"},
    "credentials": {"secretName": "team-a-s3"},
}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of base with changes merged in, member by member; None removes a member."""
    out = deepcopy(base)
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = deepcopy(value)
    return out


def spec_json(**changes: Any) -> dict[str, Any]:
    """The smallest complete spec as a person writes it, with changes merged in."""
    return merge(_SPEC, changes)


def spec(**changes: Any) -> FineTuneJobSpec:
    """The smallest complete spec, with changes merged in."""
    return FineTuneJobSpec.from_json(spec_json(**changes))


TEACHER = {"uri": "hf://owner/teacher"}
REWARDS = {"rewards": [{"function": "ExactMatch"}]}
# A spec of each objective, by what differs from the smallest one.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "Supervised": {},
    "Evaluation": {"objective": {"type": "Evaluation"}, "tuning": None},
    "Pretrain": {"objective": {"type": "Pretrain"}, "tuning": {"type": "Full"}},
    "Distillation": {"objective": {"type": "Distillation", "distillation": {"teacher": TEACHER}}},
    "Reward": {"objective": {"type": "Reward"}},
    "DPO": {"objective": {"type": "DPO"}},
    "ORPO": {"objective": {"type": "ORPO"}},
    "KTO": {"objective": {"type": "KTO"}},
    "PPO": {"objective": {"type": "PPO", "ppo": REWARDS}},
    "GRPO": {"objective": {"type": "GRPO", "grpo": REWARDS}},
}


def model_facts(parameters: int = 7_217_189_760, **changes: Any) -> ModelFacts:
    """What preflight says of falcon-7b; another number of parameters keeps its shape."""
    values: dict[str, Any] = {
        "model_type": "falcon",
        "architecture": "FalconForCausalLM",
        "parameters": parameters,
        "weight_bytes": 2 * parameters,
        "hidden_size": 4544,
        "layers": 32,
        "vocabulary_size": 65024,
        "max_positions": 2048,
        "digest": "sha256:model",
    }
    return ModelFacts(**{**values, **changes})


def small_model(**changes: Any) -> ModelFacts:
    """What preflight says of a decoder of 135 million parameters."""
    return model_facts(
        134_515_008,
        **{
            "model_type": "llama",
            "architecture": "LlamaForCausalLM",
            "hidden_size": 576,
            "layers": 30,
            "vocabulary_size": 49152,
            **changes,
        },
    )


def mixture(job: FineTuneJobSpec) -> dict[str, Any]:
    """What a model must have so that the job fits it: experts, where the job sets something about them."""
    given = job.to_json()
    tuning, hp = given.get("tuning", {}), given.get("hyperparameters", {})
    asks = "preset" in tuning.get("full", {}) or tuning.get("lora", {}).get("experts") or "routerLossWeight" in hp
    return {"experts": 8} if asks else {}


def data_facts(rows: int = 1000, **changes: Any) -> DataFacts:
    """What preflight says of a question/answer dataset whose longest record has 200 tokens."""
    values: dict[str, Any] = {
        "rows": rows,
        "format": "QuestionAnswer",
        "tokens": 100 * rows,
        "longest_tokens": 200,
        "p95_tokens": 150,
        "bytes": 400 * rows,
        "digest": "sha256:data",
    }
    return DataFacts(**{**values, **changes})


def preflight(job: FineTuneJobSpec, model: ModelFacts | None = None, data: DataFacts | None = None) -> Preflight:
    """A preflight that found nothing in the way; further models have a digest and a gibibyte of weights each."""
    further = [
        item.field for item in further_inputs(job, build_references(job, local=True)) if item.kind != InputKind.DATA
    ]
    return Preflight(
        ok=True,
        spec_digest=spec_digest(job),
        model=model or model_facts(),
        data=data or data_facts(),
        digests={path: f"sha256:{path}" for path in further},
        further_weight_bytes={path: 2**30 for path in further if not path.startswith("model.")},
    )


def pool(name: str, memory_gib: float, price: float, **changes: Any) -> Pool:
    """A pool of nodes with eight GPUs each."""
    values: dict[str, Any] = {
        "accelerator": name,
        "gpuMemoryGiB": memory_gib,
        "resourceName": "nvidia.com/gpu",
        "gpusPerNode": 8,
        "maxNodes": 4,
        "provisioning": "Autoscaled",
        "startTimeoutSeconds": 900,
        "perGPU": {"cpu": 8, "memoryGiB": 48, "ephemeralStorageGiB": 200},
        "sharedMemoryGiB": 8,
        "terminationGracePeriodSeconds": 120,
        "nodeSelector": {"pool": name},
        "spot": False,
        "hourlyPriceUSD": price,
        "peakTflops": 100,
    }
    return Pool(name, GPUPoolSpec.from_json({**values, **changes}))


def cpu_pool(memory_gib: float = 8) -> Pool:
    """A pool without GPUs, two processes per node."""
    return pool(
        "cpu",
        memory_gib,
        0.0,
        resourceName=None,
        gpusPerNode=2,
        peakTflops=0,
        provisioning="Static",
        perGPU={"cpu": 1, "memoryGiB": 4, "ephemeralStorageGiB": 4},
    )


L4 = pool("l4", 24, 0.8)
A40 = pool("a40", 48, 1.3)
A100_40 = pool("a100-40", 40, 2.9)
A100_80 = pool("a100-80", 80, 4.1)
GPU_POOLS = (A100_80, L4, A100_40, A40)


def plan(
    job: FineTuneJobSpec,
    *pools: Pool,
    model: ModelFacts | None = None,
    data: DataFacts | None = None,
    defaults: Storage | None = None,
) -> Planned:
    """The plan of a job on the given pools (the four GPU pools when none is given)."""
    return make_plan(
        job, JOB, preflight(job, model, data), build_references(job, defaults), pools or GPU_POOLS, TRAINER_IMAGE
    )
