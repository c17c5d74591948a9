"""Names, labels and paths that more than one program relies on."""

from __future__ import annotations

from finetune_api.job import GROUP

# Labels on every child. Jobs and Pods are watched by MANAGED_BY.
MANAGED_BY = {"app.kubernetes.io/managed-by": "finetune-operator"}
LABEL_JOB = f"{GROUP}/job"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_ROLE = f"{GROUP}/role"
LABEL_POOL = f"{GROUP}/pool"
ROLE_PREFLIGHT = "preflight"
ROLE_TRAINER = "trainer"

# Field managers of the two writers of status.
MANAGER_OPERATOR = "finetune-operator"
MANAGER_PROGRESS = "finetune-progress"

# Inside the pods.
RUN_FILE_PATH = "/etc/finetune/run.json"
PREFLIGHT_FILE_PATH = "/etc/finetune/preflight.json"
SCRATCH_PATH = "/scratch"
CLAIMS_PATH = "/claims"  # a pvc://NAME/... claim is mounted at /claims/NAME
CA_PATH = "/etc/finetune-ca"  # a CA ConfigMap is mounted at /etc/finetune-ca/NAME
TERMINATION_LOG = "/dev/termination-log"
PROGRESS_PORT = 8470
MASTER_PORT = 29400

# Environment of the pods.
ENV_ATTEMPT = "FINETUNE_ATTEMPT"
ENV_NODE_RANK = "JOB_COMPLETION_INDEX"
ENV_MASTER = "FINETUNE_MASTER"

TRAINER_CONTAINER = "trainer"
PREFLIGHT_CONTAINER = "preflight"

SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")


def uid5(uid: str) -> str:
    """The part of a job's UID that its children's names carry."""
    return uid.replace("-", "")[:5]


def attempt_name(job: str, uid: str, attempt: int) -> str:
    """Name of an attempt's Job, Service and ConfigMap: at most 47 + 1 + 5 + 1 + 4 characters."""
    return f"{job}-{uid5(uid)}-{attempt}"


def preflight_name(job: str, uid: str, generation: int) -> str:
    """Name of the preflight Job and ConfigMap of one generation of the spec."""
    return f"{job}-{uid5(uid)}-p{generation}"


def plan_name(job: str, uid: str) -> str:
    """Name of the ConfigMap that holds the planned run file."""
    return f"{job}-{uid5(uid)}-plan"


def credential_env(profile: str, key: str) -> str:
    """The environment variable in which a pod finds one key of a credentials profile."""
    return f"FINETUNE_CRED_{profile.upper().replace('-', '_')}_{key}"
