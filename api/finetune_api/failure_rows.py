"""The rows of the failure table, and what a row holds. Everybody else reads them through `failures`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import partial


class Fault(StrEnum):
    """Who has to act."""

    USER = "User"
    PLATFORM = "Platform"
    INTERRUPTION = "Interruption"
    UNKNOWN = "Unknown"


NEVER = 0
ANY = 100  # as often as spec.retry.maxFailures allows, which is at most this


@dataclass(frozen=True)
class FailureClass:
    """One row of the table.

    name: CamelCase; also the condition reason, event reason, metric label and runbook anchor.
    exit_code: what a worker, the agent or preflight exits with; None where no process of ours ends with it.
    retries: how many attempts of one job that end like this are repeated; spec.retry.maxFailures may allow fewer.
    hint: what to do, in one or two sentences for the person who owns the job.
    waits_for_room: the run has not failed, it finds no place: it is tried again without using up a retry.
    avoids_node: later attempts avoid the node it happened on, until one of them finds no room elsewhere.
    keeps_artifact: the run was finished and its artifact is published.
    ends: whether an attempt ends with it; else it is only a warning.
    """

    name: str
    exit_code: int | None
    summary: str
    hint: str
    fault: Fault
    retries: int
    waits_for_room: bool = False
    avoids_node: bool = False
    keeps_artifact: bool = False
    ends: bool = True

    @property
    def retriable(self) -> bool:
        """Whether another attempt may help without a change by a person."""
        return self.retries > 0

    @property
    def counted(self) -> bool:
        """Whether an attempt that ends like this is a failure; interruptions and waiting for room are none."""
        return self.ends and self.fault != Fault.INTERRUPTION and not self.waits_for_room

    @property
    def runbook(self) -> str:
        """The anchor of this class in docs/failures.md."""
        return f"docs/failures.md#{self.name.lower()}"


_user = partial(FailureClass, fault=Fault.USER, retries=NEVER)
_platform = partial(FailureClass, fault=Fault.PLATFORM)
_interruption = partial(FailureClass, fault=Fault.INTERRUPTION, retries=ANY)
_unknown = partial(FailureClass, fault=Fault.UNKNOWN, retries=2)

# The user's input. Exit codes 64 to 79: never retried.
_INPUT = (
    _user(
        "InvalidSpec",
        64,
        "A field of the job is wrong.",
        "Correct the field that the message names and apply the job again.",
    ),
    _user(
        "UnsupportedField",
        None,
        "A field asks for something this release cannot do.",
        "Remove the field or choose one of the values that the message lists.",
    ),
    _user(
        "DataInvalid",
        65,
        "The dataset has broken or unusable records.",
        "Correct the rows that the message lists and apply the job again.",
    ),
    _user(
        "DataNotFound",
        66,
        "A dataset file does not exist.",
        "Check the URI of the source; upload the file or correct the URI.",
    ),
    _user(
        "ModelNotFound",
        67,
        "The base model does not exist at the given place.",
        "Check model.uri and model.revision.",
    ),
    _user(
        "ModelUnsupported",
        68,
        "The base model cannot be tuned by this release.",
        "Choose a model of a supported architecture with safetensors weights.",
    ),
    _user(
        "CredentialsRejected",
        69,
        "The storage or hub refused the credentials.",
        "Check the keys in the secret that credentials.secretName names, and their permissions.",
    ),
    _user(
        "BucketNotFound",
        70,
        "The bucket does not exist.",
        "Create the bucket or correct the URI and storage.endpoint.",
    ),
    _user(
        "OutputInUse",
        71,
        "Another job owns the output URI.",
        "Choose another output.uri, or set output.onExisting: Resume to continue the same run.",
    ),
    _user(
        "RequirementNotMet",
        72,
        "The tuned model misses a bound of evaluation.require.",
        "The artifact is kept and status.artifacts says where. Look at the report, change data or settings, or the bound.",
        keeps_artifact=True,
    ),
    _user(
        "ReferenceNotFound",
        None,
        "A secret, key, config map, service account or claim that the job names is missing.",
        "Create it in the job's namespace or correct the reference.",
    ),
    _user(
        "QuotaExceeded",
        None,
        "The namespace's quota refuses the pods.",
        "Ask for quota, or choose a smaller resources.gpus.",
        retries=ANY,
        waits_for_room=True,
    ),
    _user(
        "NoPoolFits",
        None,
        "No GPU pool can hold the run.",
        "Choose a smaller model, QLoRA, a shorter maxSequenceLength, or ask for a larger pool.",
    ),
    _user(
        "DeadlineExceeded",
        None,
        "The run took longer than deadlineSeconds.",
        "Raise deadlineSeconds; the last checkpoint is kept.",
    ),
    _user(
        "Cancelled",
        None,
        "The job was cancelled by its owner.",
        "Clone the job to run it again; the last checkpoint is kept.",
    ),
)

# The run itself. Exit codes 80 to 91.
_RUN = (
    _platform(
        "OutOfGpuMemory",
        80,
        "The GPU ran out of memory.",
        "Lower hyperparameters.microBatchSize or maxSequenceLength, or choose a larger pool.",
        retries=1,
    ),
    _platform(
        "OutOfHostMemory",
        81,
        "The pod ran out of host memory.",
        "Ask the platform team for more memory per GPU in the pool, or use a smaller dataset.",
        retries=1,
    ),
    _platform(
        "DiskFull",
        82,
        "The pod's scratch disk is full.",
        "Ask the platform team for more ephemeralStorageGiB per GPU in the pool.",
        retries=1,
    ),
    _user(
        "NonFiniteLoss",
        83,
        "The loss became NaN or infinite.",
        "Lower hyperparameters.learningRate or use precision BF16.",
    ),
    _platform(
        "Hang",
        84,
        "A worker made no step for too long.",
        "The stacks of all workers are in the log; the next attempt goes on from the last checkpoint.",
        retries=ANY,
    ),
    _platform(
        "CollectiveFailed",
        85,
        "Workers lost contact with one another.",
        "The next attempt goes on from the last checkpoint; look at the network if it repeats.",
        retries=ANY,
    ),
    _platform(
        "StorageUnavailable",
        86,
        "The storage did not answer.",
        "Check that the endpoint can be reached from the cluster; the next attempt goes on.",
        retries=ANY,
    ),
    _platform(
        "CheckpointInvalid",
        87,
        "No stored checkpoint passes its check.",
        "Do not edit the checkpoints folder; start again with a new output.uri.",
        retries=NEVER,
    ),
    _user(
        "ObjectNotFound",
        88,
        "A stored object that the run needs is missing.",
        "Check the URI; do not remove files below output.uri while the job runs.",
    ),
    _user(
        "UnsafeFile",
        89,
        "A file that could run code was refused.",
        "Use safetensors weights; pickle files are never loaded.",
    ),
    _user(
        "LossSpike",
        91,
        "The loss rose and stayed high, also after several returns to earlier checkpoints.",
        "Lower hyperparameters.learningRate, raise warmupRatio or globalBatchSize, or look for broken records.",
    ),
    _platform(
        "SlowerThanPlanned",
        None,
        "The run is too slow for its deadline, or less than half as fast as an earlier attempt.",
        "Raise deadlineSeconds if the deadline is near, or ask the platform team to look at the node.",
        retries=NEVER,
        ends=False,
    ),
)

# The place where it runs.
_PLACE = (
    _platform(
        "ImagePullFailed",
        None,
        "The trainer image cannot be pulled.",
        "Check the chart's image values and the nodes' access to the registry.",
        retries=ANY,
    ),
    _platform(
        "ContainerCannotRun",
        None,
        "The node cannot start the container.",
        "Ask the platform team to look at the node and image; the message quotes what the node said.",
        retries=2,
        avoids_node=True,
    ),
    _platform(
        "Unschedulable",
        None,
        "No node had room within the pool's start timeout.",
        "Wait, choose another pool, or ask for a larger pool.",
        retries=ANY,
        waits_for_room=True,
    ),
    _platform(
        "AdmissionDenied",
        None,
        "The cluster's admission policy refused the pods.",
        "The message quotes the policy; ask the platform team.",
        retries=NEVER,
    ),
    _platform(
        "AcceleratorMismatch",
        90,
        "The node's accelerator or driver is not usable.",
        "Ask the platform team to look at the node that the message names.",
        retries=2,
        avoids_node=True,
    ),
    _platform(
        "NameTaken",
        None,
        "An object that is not ours has the name of a child of the job.",
        "Delete or rename the object that the message names; the job goes on by itself.",
        retries=ANY,
        waits_for_room=True,
    ),
)

# Interruptions: never count against the retry budget.
_INTERRUPTIONS = (
    _interruption(
        "Stopped",
        100,
        "The run stopped when asked, after a checkpoint.",
        "Nothing to do: the next attempt goes on from the checkpoint.",
    ),
    _interruption(
        "RolledBack",
        102,
        "A guard asks for another start with changed settings.",
        "Nothing to do: the next attempt goes on from the checkpoint and with the settings that the message names.",
    ),
    _interruption(
        "Evicted",
        None,
        "The pod was evicted, preempted or drained.",
        "Nothing to do: the next attempt goes on from the newest checkpoint.",
    ),
    _interruption(
        "NodeLost",
        None,
        "The node stopped answering.",
        "Nothing to do: the next attempt avoids that node.",
        avoids_node=True,
    ),
    _interruption(
        "AttemptDeleted",
        None,
        "Somebody deleted the attempt's Job, or its pods by force.",
        "Nothing to do: the next attempt goes on from the newest checkpoint.",
    ),
)

_REST = (
    _platform(
        "NoProgress",
        None,
        "Five interruptions in a row without a new checkpoint.",
        "Save more often (checkpoint.everyMinutes) or use a pool without spot nodes.",
        retries=NEVER,
    ),
    _unknown(
        "Internal",
        101,
        "An error in the trainer itself.",
        "The message holds the end of the traceback; please report it.",
    ),
    _unknown(
        "Unknown",
        None,
        "The pod ended in a way the table does not know.",
        "Look at the pod's log; the message holds exit code and reason.",
    ),
)

ROWS = (*_INPUT, *_RUN, *_PLACE, *_INTERRUPTIONS, *_REST)
