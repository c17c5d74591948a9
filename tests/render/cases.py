"""The jobs whose rendered children are kept as golden files.

`python -m tests.render` writes the files anew; a test fails where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from finetune_api.job import FineTuneJobSpec, Storage
from finetune_api.planner import Planned, Pool, build_references, make_plan
from finetune_api.runfile import RunJob
from finetune_operator.config import Config
from finetune_operator.render import (
    AttemptInput,
    attempt_children,
    attempt_job,
    plan_config_map,
    preflight_config_map,
    preflight_job,
)
from finetune_operator.snapshot import ChildJob
from tests.unit.operator.builders import START, UID, a_job, a_pool, a_spec, an_attempt, model_facts, passed

FOLDER = Path(__file__).parent / "golden"
CONFIG = Config(
    trainer_image="registry.test/finetune-trainer:1.0.0",
    preflight_image="registry.test/finetune-preflight:1.0.0",
    identity="golden",
    storage_endpoint="https://s3.test",
    storage_region="eu-1",
)
RUN_FILE = '{"see":"plan.yaml"}'  # what is in it is the planner's concern
Manifest = dict[str, Any]


def _plan(spec: FineTuneJobSpec, pool: Pool, parameters: int) -> Planned:
    found = passed(spec).model_copy(update={"model": model_facts(parameters=parameters)})
    job = RunJob(name="faq", namespace="team-a", uid=UID)
    return make_plan(spec, job, found, build_references(spec, CONFIG.storage), [pool], CONFIG.trainer_image)


def _attempt(
    spec: FineTuneJobSpec,
    pool: Pool,
    *,
    parameters: int = 7_000_000_000,
    number: int = 1,
    avoid: tuple[str, ...] = (),
    config: Config = CONFIG,
) -> list[Manifest]:
    planned = _plan(spec, pool, parameters)
    given = AttemptInput(
        job=a_job(spec),
        spec=spec,
        plan=planned.plan,
        pool=pool,
        references=build_references(spec, config.storage),
        number=number,
        run_file=RUN_FILE,
        avoid_nodes=avoid,
    )
    return [attempt_job(given, config), *attempt_children(given, an_attempt(number), config)]


def _preflight(spec: FineTuneJobSpec, config: Config = CONFIG) -> list[Manifest]:
    job, references = a_job(spec), build_references(spec, config.storage or Storage())
    made = preflight_job(job, spec, references, config)
    owner = ChildJob(name=made["metadata"]["name"], uid="preflight-uid", role="preflight", number=1, created=START)
    return [made, preflight_config_map(job, spec, references, owner)]


def _plan_file(spec: FineTuneJobSpec) -> list[Manifest]:
    return [plan_config_map(a_job(spec), _plan(spec, a_pool(), 7_000_000_000).run)]


L4 = a_pool("l4", accelerator="l4", gpuMemoryGiB=24, hourlyPriceUSD=0.7, spot=False)
A100_80 = a_pool(
    "a100-80",
    accelerator="a100-80",
    gpuMemoryGiB=80,
    extraResources=[{"name": "vpc.amazonaws.com/efa", "count": 4}],
)
CPU = a_pool(
    "cpu",
    accelerator="cpu",
    gpuMemoryGiB=16,
    resourceName=None,
    gpusPerNode=2,
    perGPU={"cpu": 0.5, "memoryGiB": 1.5, "ephemeralStorageGiB": 4},
    sharedMemoryGiB=0.25,
    nodeSelector=None,
    tolerations=None,
    terminationGracePeriodSeconds=30,
)

CASES: dict[str, Callable[[], list[Manifest]]] = {
    "preflight": lambda: _preflight(a_spec()),
    "preflight-claims-ca-and-service-account": lambda: _preflight(
        a_spec(
            model={"uri": "pvc://models/falcon-7b"},
            output={"uri": "pvc://results/faq"},
            credentials={"serviceAccountName": "team-a-trainer"},
            storage={"endpoint": "https://minio.test", "caConfigMapName": "team-a-ca"},
            priorityClassName="research",
        )
    ),
    "plan": lambda: _plan_file(a_spec()),
    "qlora-one-l4": lambda: _attempt(a_spec(resources={"gpus": 1}), L4),
    "lora-two-nodes-a100-80-with-efa": lambda: _attempt(
        a_spec(tuning={"type": "LoRA"}, resources={"nodes": 2, "gpus": 8}), A100_80
    ),
    "third-attempt-avoids-lost-nodes": lambda: _attempt(
        a_spec(), a_pool(), number=3, avoid=("gpu-node-7", "gpu-node-9")
    ),
    "cpu-two-processes-claims": lambda: _attempt(
        a_spec(
            tuning={"type": "Full"},
            model={"uri": "pvc://models/tiny"},
            output={"uri": "pvc://results/faq"},
            resources={"pool": "cpu", "gpus": 2},
        ),
        CPU,
        parameters=1_000_000,
    ),
    "mirror-pull-secrets-and-two-credentials": lambda: _attempt(
        a_spec(model={"uri": "hf://tiiuae/falcon-7b", "credentials": {"secretName": "hub"}}),
        a_pool(),
        config=Config(
            trainer_image=CONFIG.trainer_image,
            preflight_image=CONFIG.preflight_image,
            identity="golden",
            image_pull_policy="Always",
            image_pull_secrets=("registry",),
            hub_endpoint="https://hub.test",
        ),
    ),
}


def render(name: str) -> str:
    """The case's manifests as YAML documents."""

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    text: str = yaml.dump_all(CASES[name](), Dumper=Plain, sort_keys=True, width=110)
    return text


def path(name: str) -> Path:
    """Where the case's golden file is."""
    return FOLDER / f"{name}.yaml"
