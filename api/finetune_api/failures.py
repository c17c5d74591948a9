"""The failure table: the one place that says what can go wrong and what follows.

The trainer's exit codes, the Job's podFailurePolicy, the operator's decisions, condition and event
reasons, metric labels and the runbook in docs/failures.md are all read from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """Who has to act."""

    USER = "User"
    PLATFORM = "Platform"
    INTERRUPTION = "Interruption"
    UNKNOWN = "Unknown"


@dataclass(frozen=True)
class FailureClass:
    """One row of the table.

    name: CamelCase; also the condition reason, event reason, metric label and runbook anchor.
    exit_code: what a worker, the agent or preflight exits with; None where no process of ours ends with it.
    retriable: whether another attempt may help without a change by a person.
    hint: what to do, in one or two sentences for the person who owns the job.
    """

    name: str
    exit_code: int | None
    fault: Fault
    retriable: bool
    summary: str
    hint: str

    @property
    def runbook(self) -> str:
        """The anchor of this class in docs/failures.md."""
        return f"docs/failures.md#{self.name.lower()}"


_ROWS = (
    # The user's input. Exit codes 64 to 79: never retried.
    FailureClass(
        "InvalidSpec",
        64,
        Fault.USER,
        False,
        "A field of the job is wrong.",
        "Correct the field that the message names and apply the job again.",
    ),
    FailureClass(
        "UnsupportedField",
        None,
        Fault.USER,
        False,
        "A field asks for something this release cannot do.",
        "Remove the field or choose one of the values that the message lists.",
    ),
    FailureClass(
        "DataInvalid",
        65,
        Fault.USER,
        False,
        "The dataset has broken or unusable records.",
        "Correct the rows that the message lists and apply the job again.",
    ),
    FailureClass(
        "DataNotFound",
        66,
        Fault.USER,
        False,
        "A dataset file does not exist.",
        "Check the URI of the source; upload the file or correct the URI.",
    ),
    FailureClass(
        "ModelNotFound",
        67,
        Fault.USER,
        False,
        "The base model does not exist at the given place.",
        "Check model.uri and model.revision.",
    ),
    FailureClass(
        "ModelUnsupported",
        68,
        Fault.USER,
        False,
        "The base model cannot be tuned by this release.",
        "Choose a model of a supported architecture with safetensors weights.",
    ),
    FailureClass(
        "CredentialsRejected",
        69,
        Fault.USER,
        False,
        "The storage or hub refused the credentials.",
        "Check the keys in the secret that credentials.secretName names, and their permissions.",
    ),
    FailureClass(
        "BucketNotFound",
        70,
        Fault.USER,
        False,
        "The bucket does not exist.",
        "Create the bucket or correct the URI and storage.endpoint.",
    ),
    FailureClass(
        "OutputInUse",
        71,
        Fault.USER,
        False,
        "Another job owns the output URI.",
        "Choose another output.uri, or set output.onExisting: Resume to continue the same run.",
    ),
    FailureClass(
        "RequirementNotMet",
        72,
        Fault.USER,
        False,
        "The tuned model misses a bound of evaluation.require.",
        "The artifact is kept and status.artifacts says where. Look at the report, change data or settings, or the bound.",
    ),
    FailureClass(
        "SecretNotFound",
        None,
        Fault.USER,
        False,
        "A referenced secret, key or service account is missing.",
        "Create it in the job's namespace or correct the reference.",
    ),
    FailureClass(
        "QuotaExceeded",
        None,
        Fault.USER,
        True,
        "The namespace's quota or policy refuses the pods.",
        "Ask for quota, or choose a smaller resources.gpus.",
    ),
    FailureClass(
        "NoPoolFits",
        None,
        Fault.USER,
        False,
        "No GPU pool can hold the run.",
        "Choose a smaller model, QLoRA, a shorter maxSequenceLength, or ask for a larger pool.",
    ),
    FailureClass(
        "DeadlineExceeded",
        None,
        Fault.USER,
        False,
        "The run took longer than deadlineSeconds.",
        "Raise deadlineSeconds; the last checkpoint is kept.",
    ),
    FailureClass(
        "Cancelled",
        None,
        Fault.USER,
        False,
        "The job was cancelled by its owner.",
        "Clone the job to run it again; the last checkpoint is kept.",
    ),
    # The run itself. Exit codes 80 to 89.
    FailureClass(
        "OutOfGpuMemory",
        80,
        Fault.PLATFORM,
        True,
        "The GPU ran out of memory.",
        "Lower hyperparameters.microBatchSize or maxSequenceLength, or choose a larger pool.",
    ),
    FailureClass(
        "OutOfHostMemory",
        81,
        Fault.PLATFORM,
        True,
        "The pod ran out of host memory.",
        "Ask the platform team for more memory per GPU in the pool, or use a smaller dataset.",
    ),
    FailureClass(
        "DiskFull",
        82,
        Fault.PLATFORM,
        True,
        "The pod's scratch disk is full.",
        "Ask the platform team for more ephemeralStorageGiB per GPU in the pool.",
    ),
    FailureClass(
        "NonFiniteLoss",
        83,
        Fault.USER,
        True,
        "The loss became NaN or infinite.",
        "Lower hyperparameters.learningRate or use precision BF16.",
    ),
    FailureClass(
        "Hang",
        84,
        Fault.PLATFORM,
        True,
        "A worker made no step for too long.",
        "The stacks of all workers are in the log; the next attempt goes on from the last checkpoint.",
    ),
    FailureClass(
        "CollectiveFailed",
        85,
        Fault.PLATFORM,
        True,
        "Workers lost contact with one another.",
        "The next attempt goes on from the last checkpoint; look at the network if it repeats.",
    ),
    FailureClass(
        "StorageUnavailable",
        86,
        Fault.PLATFORM,
        True,
        "The storage did not answer.",
        "Check that the endpoint can be reached from the cluster; the next attempt goes on.",
    ),
    FailureClass(
        "CheckpointInvalid",
        87,
        Fault.PLATFORM,
        False,
        "No stored checkpoint passes its check.",
        "Do not edit the checkpoints folder; start again with a new output.uri.",
    ),
    FailureClass(
        "ObjectNotFound",
        88,
        Fault.USER,
        False,
        "A stored object that the run needs is missing.",
        "Check the URI; do not remove files below output.uri while the job runs.",
    ),
    FailureClass(
        "UnsafeFile",
        89,
        Fault.USER,
        False,
        "A file that could run code was refused.",
        "Use safetensors weights; pickle files are never loaded.",
    ),
    FailureClass(
        "LossSpike",
        91,
        Fault.USER,
        False,
        "The loss rose and stayed high, also after several returns to earlier checkpoints.",
        "Lower hyperparameters.learningRate, raise warmupRatio or globalBatchSize, or look for broken records.",
    ),
    # The place where it runs.
    FailureClass(
        "ImagePullFailed",
        None,
        Fault.PLATFORM,
        True,
        "The trainer image cannot be pulled.",
        "Check the chart's image values and the nodes' access to the registry.",
    ),
    FailureClass(
        "Unschedulable",
        None,
        Fault.PLATFORM,
        True,
        "No node had room within the pool's start timeout.",
        "Wait, choose another pool, or ask for a larger pool.",
    ),
    FailureClass(
        "AdmissionDenied",
        None,
        Fault.PLATFORM,
        False,
        "The cluster's admission policy refused the pods.",
        "The message quotes the policy; ask the platform team.",
    ),
    FailureClass(
        "AcceleratorMismatch",
        90,
        Fault.PLATFORM,
        True,
        "The node's accelerator or driver is not usable.",
        "Ask the platform team to look at the node that the message names.",
    ),
    FailureClass(
        "NameTaken",
        None,
        Fault.PLATFORM,
        True,
        "An object that is not ours has the name of a child of the job.",
        "Delete or rename the object that the message names; the job goes on by itself.",
    ),
    # Interruptions: never count against the retry budget.
    FailureClass(
        "Stopped",
        100,
        Fault.INTERRUPTION,
        True,
        "The run stopped when asked, after a checkpoint.",
        "Nothing to do: the next attempt goes on from the checkpoint.",
    ),
    FailureClass(
        "RolledBack",
        102,
        Fault.INTERRUPTION,
        True,
        "A guard asks for another start with changed settings.",
        "Nothing to do: the next attempt goes on from the checkpoint and with the settings that the message names.",
    ),
    FailureClass(
        "Evicted",
        None,
        Fault.INTERRUPTION,
        True,
        "The pod was evicted, preempted or drained.",
        "Nothing to do: the next attempt goes on from the newest checkpoint.",
    ),
    FailureClass(
        "NodeLost",
        None,
        Fault.INTERRUPTION,
        True,
        "The node stopped answering.",
        "Nothing to do: the next attempt avoids that node.",
    ),
    FailureClass(
        "AttemptDeleted",
        None,
        Fault.INTERRUPTION,
        True,
        "Somebody deleted the attempt's Job.",
        "Nothing to do: the next attempt goes on from the newest checkpoint.",
    ),
    FailureClass(
        "NoProgress",
        None,
        Fault.PLATFORM,
        False,
        "Five interruptions in a row without a new checkpoint.",
        "Save more often (checkpoint.everyMinutes) or use a pool without spot nodes.",
    ),
    # The rest.
    FailureClass(
        "Internal",
        101,
        Fault.UNKNOWN,
        True,
        "An error in the trainer itself.",
        "The message holds the end of the traceback; please report it.",
    ),
    FailureClass(
        "Unknown",
        None,
        Fault.UNKNOWN,
        True,
        "The pod ended in a way the table does not know.",
        "Look at the pod's log; the message holds exit code and reason.",
    ),
)

TABLE: dict[str, FailureClass] = {row.name: row for row in _ROWS}
_BY_EXIT_CODE = {row.exit_code: row for row in _ROWS if row.exit_code is not None}

MAX_INTERRUPTIONS_WITHOUT_CHECKPOINT = 5


def by_exit_code(code: int) -> FailureClass:
    """The class of a container's exit code; `OutOfHostMemory` is told by the kubelet's reason, not by 137."""
    return _BY_EXIT_CODE.get(code, TABLE["Unknown"])


def exit_codes() -> tuple[int, ...]:
    """All exit codes of the table in ascending order, for the Job's podFailurePolicy."""
    return tuple(sorted(_BY_EXIT_CODE))


class FinetuneError(Exception):
    """Base of every error that maps to a row of the table.

    Subclasses or callers set `failure_class` to the row's name; `field` is the spec path to change.
    The message says what happened, where, and what to do.
    """

    failure_class = "Internal"

    def __init__(self, message: str, *, failure_class: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        if failure_class is not None:
            self.failure_class = failure_class
        self.field = field

    @property
    def row(self) -> FailureClass:
        """This error's row of the failure table."""
        return TABLE[self.failure_class]
