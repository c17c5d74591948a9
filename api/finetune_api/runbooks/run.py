"""Runbooks of failures of the run itself: memory, disk, numbers, workers, storage, checkpoints, speed."""

from __future__ import annotations

from finetune_api.runbooks.page import (
    ATTEMPTS,
    CLONE,
    DESCRIBE,
    DESCRIBE_PODS,
    FAILURE,
    GUARDS,
    LOG,
    MEMORY,
    NODE,
    NOT_BY_ITSELF,
    PODS,
    POOL,
    PROGRESS,
    SETTINGS,
    Runbook,
)

_WITHIN_BUDGET = "Often: it is tried again, as often as `spec.retry.maxFailures` allows, from the newest checkpoint."

RUNBOOKS = {
    "OutOfGpuMemory": Runbook(
        symptom="The GPU's memory was full even with the smallest micro batch that the run could go down to, or before "
        "the first batch.",
        look=(FAILURE, MEMORY, GUARDS, SETTINGS, LOG),
        causes=(
            "Sequences longer than the ones preflight saw, so that one record alone does not fit.",
            "Full weights where an adapter would do, or a ZeRO stage that keeps too much on each GPU.",
            "Another process on the same GPU: `nvidia-smi` on the node shows it.",
        ),
        act=(
            "Lower `hyperparameters.maxSequenceLength`, set `hyperparameters.gradientCheckpointing: true`, or choose "
            "LoRA or QLoRA.",
            "Choose a pool with more memory per GPU, or more GPUs with `hyperparameters.zeroStage: 3`.",
            CLONE,
        ),
        again="Rarely: it is tried once more, in case something else held the GPU's memory.",
    ),
    "OutOfHostMemory": Runbook(
        symptom="The kernel killed the container, or a process in it, at the pod's memory limit (OOMKilled).",
        look=(FAILURE, DESCRIBE_PODS, POOL),
        causes=(
            "A model that is loaded by every process of the pod at once, or offloaded to host memory by ZeRO.",
            "Data that is held in memory as a whole, or a shared-memory volume that fills up: it counts too.",
            "A pool that offers less memory per GPU than its GPUs have.",
        ),
        act=(
            "Ask the platform team to raise perGPU.memoryGiB of the pool.",
            "Choose a smaller model, fewer records or no offload.",
            CLONE,
        ),
        again="Rarely: it is tried once more, because memory use at the edge differs between attempts.",
    ),
    "DiskFull": Runbook(
        symptom="The scratch volume reached its limit, or the node ran out of disk and evicted the pod.",
        look=(FAILURE, DESCRIBE_PODS, POOL),
        causes=(
            "Model, prepared data and two local checkpoints together are larger than the pool's scratch space.",
            "Uploads that are slower than saves, so that local checkpoints wait for their turn.",
            "Other pods that filled the node's disk.",
        ),
        act=(
            "Ask the platform team to raise perGPU.ephemeralStorageGiB of the pool.",
            "Save less often, or tune an adapter: its checkpoints are small.",
            CLONE,
        ),
        again="Rarely: it is tried once more, in case other pods had filled the node's disk.",
    ),
    "NonFiniteLoss": Runbook(
        symptom="The loss became NaN or infinite at the step that the message names; nothing was saved after it. Where "
        "`guards.lossSpike` is `Rollback`, the run has gone back five times before.",
        look=(FAILURE, GUARDS, PROGRESS, SETTINGS, LOG),
        causes=(
            "A learning rate that is too high, or no warm-up.",
            "FP16 on a model that was trained in BF16: its activations overflow.",
            "Records that give a loss over no token at all, or labels outside the vocabulary.",
        ),
        act=(
            "Lower `hyperparameters.learningRate`, raise `hyperparameters.warmupRatio`, or set "
            "`hyperparameters.precision: BF16`.",
            "Look at the records of the step before it.",
            CLONE,
        ),
        again="No. Resuming is exact, so that the same step meets the same numbers again.",
    ),
    "Hang": Runbook(
        symptom="No worker made a step for a minute, or for the time of five steps where that is longer; while "
        "loading, publishing and before the second step, for half an hour.",
        look=(FAILURE, LOG, PODS, NODE),
        causes=(
            "One rank waits for data (a stuck read or tokenizer) and the others wait for it in a collective.",
            "A network or GPU link that is broken without an error.",
            "Storage that does not answer and does not fail either.",
        ),
        act=(
            "Read the stacks of all ranks in report.md, which is kept below `output.uri` in logs/attempt-N beside the end "
            "of each rank's log: the rank whose stack differs from the others' is the cause.",
            "If the same node is in every hang, have the platform team look at its GPUs and network.",
            "A hang at the same step each time points to the data of that step.",
        ),
        again=_WITHIN_BUDGET,
    ),
    "CollectiveFailed": Runbook(
        symptom="A worker lost contact with the others, and none of them reported another cause.",
        look=(FAILURE, LOG, PODS, NODE),
        causes=(
            "A pod, node or network link that went away; its own end may be told a moment later.",
            "A NetworkPolicy or service mesh between the pods of the gang.",
            "An NCCL timeout while one rank was much slower than the others.",
        ),
        act=(
            "Look at the first error in the logs of all ranks, which are kept below `output.uri` in logs/attempt-N: the "
            "others follow from it.",
            "Check that nothing but the operator's own NetworkPolicy stands between the pods.",
            "Ask the platform team about the nodes if it repeats on the same ones.",
        ),
        again=_WITHIN_BUDGET,
    ),
    "StorageUnavailable": Runbook(
        symptom="Reads or writes of the storage failed for minutes, also after many tries.",
        look=(FAILURE, LOG, "kubectl get networkpolicies"),
        causes=(
            "The storage is down, or throttles this account for long.",
            "DNS, a proxy or a NetworkPolicy keeps the pods from the endpoint.",
            "A certificate that the pods do not trust: see `storage.caConfigMapName`.",
            "A clock that is minutes off on the node or the storage: `RequestTimeTooSkewed` in the message.",
        ),
        act=(
            "Check the endpoint from a pod of the same namespace.",
            "If it was an outage: nothing, the next attempt goes on from the newest checkpoint.",
        ),
        again=_WITHIN_BUDGET,
    ),
    "CheckpointInvalid": Runbook(
        symptom="There are checkpoints below `output.uri`, and none of them can be taken up.",
        look=(FAILURE, LOG, ATTEMPTS),
        causes=(
            "Files were removed, changed or copied by hand: sizes and hashes no longer match.",
            "The storage lost or cut objects.",
            "A checkpoint of another run or another number of processes, which the message then says.",
        ),
        act=(
            "Restore the objects from the bucket's versions or backup, if there are any.",
            "Else start again with a new `output.uri`.",
        ),
        again="No. Starting again over existing results could destroy what is left of them.",
    ),
    "ObjectNotFound": Runbook(
        symptom="An object that was there when the run began is missing now.",
        look=(FAILURE, LOG),
        causes=(
            "A lifecycle rule or a person removed files below `output.uri`, or an input.",
            "Another bucket or endpoint after a change of the secret.",
        ),
        act=("Put the object back, or correct the URI.", "Exempt the output's prefix from lifecycle rules.", CLONE),
        again=NOT_BY_ITSELF,
    ),
    "UnsafeFile": Runbook(
        symptom="A file was refused because loading it could run code; the message names it.",
        look=(FAILURE, LOG),
        causes=(
            "A model or adapter whose weights are there as pickle only (pytorch_model.bin, *.pt, *.ckpt).",
            "A checkpoint folder into which somebody put a file.",
        ),
        act=(
            "Convert the weights to safetensors once, on a machine where you trust them, and point the field there.",
            "If you did not put the file there, find out who did, before anything else.",
        ),
        again=NOT_BY_ITSELF,
    ),
    "LossSpike": Runbook(
        symptom="The loss rose again after every return to an earlier checkpoint, with ever lower learning rates.",
        look=(FAILURE, GUARDS, PROGRESS, SETTINGS),
        causes=(
            "A learning rate far too high for the batch size.",
            "A stretch of broken or very different records in the data.",
            "A preference or reinforcement objective that drifts away from its reference model.",
        ),
        act=(
            "Lower `hyperparameters.learningRate`, raise `hyperparameters.warmupRatio` or "
            "`hyperparameters.globalBatchSize`, or set `hyperparameters.maxGradNorm`.",
            "Look at the records around the steps that `status.guards` names.",
            CLONE,
        ),
        again="No. The guards have tried five times already, from earlier checkpoints and with lower rates.",
    ),
    "SlowerThanPlanned": Runbook(
        symptom="A warning while the job trains: it would miss its deadline, or is less than half as fast as before.",
        look=(DESCRIBE, PROGRESS, ATTEMPTS, NODE),
        causes=(
            "A deadline that was never long enough.",
            "A node with a throttled or shared GPU, a slow disk or a slow network.",
            "A micro batch that was halved, or many interruptions: `status.goodput` shows the time they took.",
        ),
        act=(
            "Raise `deadlineSeconds` while the job runs: this field is not frozen.",
            "Ask the platform team to cordon the node, and then delete the attempt's Job: the next attempt goes on "
            "elsewhere from the newest checkpoint, and uses up no retry.",
        ),
        again="It is no failure: the attempt goes on. The warning ends when the run is fast enough again.",
    ),
}
