"""What a runbook holds, and the commands that several runbooks share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Runbook:
    """What to do about one class of the failure table.

    symptom: what the owner sees. look: kubectl commands, with NAME for the job, POD, NODE, POOL and SECRET for what the
    message or an earlier command names. causes: the likely ones, most frequent first. act: what to do about them, in
    order. again: whether another attempt helps.
    """

    symptom: str
    look: tuple[str, ...]
    causes: tuple[str, ...]
    act: tuple[str, ...]
    again: str


def _path(path: str) -> str:
    return f"kubectl get ftj NAME -o jsonpath='{{.status.{path}}}'"


DESCRIBE = "kubectl describe ftj NAME"
FAILURE = _path("failure")
FINDINGS = _path("preflight.findings")
ATTEMPTS = _path("attempts")
PROGRESS = _path("progress")
GUARDS = _path("guards")
MEMORY = _path("plan.memory")
SETTINGS = (
    "kubectl get ftj NAME -o "
    'jsonpath=\'{range .status.plan.settings[*]}{.name}{"\\t"}{.value}{"\\t"}{.reason}{"\\n"}{end}\''
)
PREFLIGHT_LOG = "kubectl logs -l finetune.dev/job=NAME,finetune.dev/role=preflight --tail=100"
LOG = "kubectl logs -l finetune.dev/job=NAME,finetune.dev/role=trainer --prefix --tail=200"
PODS = "kubectl get pods -l finetune.dev/job=NAME -o wide"
DESCRIBE_PODS = "kubectl describe pods -l finetune.dev/job=NAME"
JOBS = "kubectl get jobs -l finetune.dev/job=NAME"
EVENTS = "kubectl get events --sort-by=.lastTimestamp"
NODE = "kubectl describe node NODE"
POOLS = "kubectl get gpupools"
POOL = "kubectl describe gpupool POOL"
SECRET_KEYS = "kubectl describe secret SECRET"  # the keys and their sizes, never their values

MEND = (
    "A job that is `Invalid` is mended in place: change what `status.failure.field` names and `kubectl apply` the file, "
    "and preflight starts anew. Where the mend is outside the file (a key, a record, a pool), set `spec.suspend` to true "
    "and back to false instead. A planned run that failed is frozen: apply a copy of it under another name."
)
CLONE = (
    "A planned run is frozen: apply a copy of the job under another name. With the same `output.uri` and "
    "`output.onExisting: Resume` it goes on from the newest checkpoint where model, data, objective, tuning and "
    "hyperparameters are the same; a changed run needs an `output.uri` of its own. Micro batch, gradient checkpointing, "
    "and what is not about training (checkpoint, evaluation, resources, deadline) may differ."
)
NOT_BY_ITSELF = "No. Another attempt ends the same way until somebody changes what the message names."
