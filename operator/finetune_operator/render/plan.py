"""The ConfigMap that keeps the planned run file for all attempts."""

from __future__ import annotations

from finetune_api import naming
from finetune_api.digest import canonical_json
from finetune_api.runfile import RunFile
from finetune_operator.render.metadata import Manifest, owned_by_job
from finetune_operator.snapshot import JobView

RUN_FILE_KEY = "run.json"


def plan_config_map(job: JobView, run: RunFile) -> Manifest:
    """The run file, immutable, owned by the FineTuneJob."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": naming.plan_name(job.name, job.uid),
            "namespace": job.namespace,
            "labels": {**naming.MANAGED_BY, naming.LABEL_JOB: job.name, naming.LABEL_JOB_UID: job.uid},
            "ownerReferences": owned_by_job(job),
        },
        "immutable": True,
        "data": {RUN_FILE_KEY: canonical_json(run.to_json())},
    }
