"""Runbooks of interruptions, of their bound, and of ends that the table cannot explain."""

from __future__ import annotations

from finetune_api.runbooks.page import (
    ATTEMPTS,
    DESCRIBE_PODS,
    EVENTS,
    FAILURE,
    GUARDS,
    JOBS,
    LOG,
    NODE,
    PODS,
    PROGRESS,
    Runbook,
)

_FREE = "Yes, always and by itself, without using up a retry."

RUNBOOKS = {
    "Stopped": Runbook(
        symptom="An attempt ended with exit code 100 after it had saved a checkpoint; another one follows.",
        look=(ATTEMPTS, LOG, EVENTS),
        causes=(
            "The kubelet sent SIGTERM: a drain, a spot notice, a node that shuts down.",
            "Somebody deleted the pod.",
            "Another pod of the gang was stopped, and all stop at the same step.",
        ),
        act=("Nothing: the next attempt goes on from the checkpoint.", "Look at the nodes if it happens all the time."),
        again=_FREE,
    ),
    "RolledBack": Runbook(
        symptom="A warning tells that the run went back to an earlier checkpoint, or goes on with half the micro batch.",
        look=(GUARDS, PROGRESS, LOG),
        causes=(
            "The training loss rose suddenly, or crept up and stayed high: broken records, or a learning rate that is too high.",
            "The GPU ran out of memory at the planned micro batch, for instance at an unusually long batch.",
        ),
        act=(
            "Nothing for one or two of them: the learning rate is lower only until the spot is passed, and the "
            "effective batch stays the same.",
            "For more, lower `hyperparameters.learningRate`, or look for broken records around the step that is named.",
            "For memory, set a smaller `hyperparameters.microBatchSize` in the next job.",
        ),
        again=_FREE + " At most 5 times for the loss and 6 times for memory; the run file itself never changes.",
    ),
    "Evicted": Runbook(
        symptom="A pod of the attempt got the condition DisruptionTarget; the message quotes why.",
        look=(ATTEMPTS, EVENTS, DESCRIBE_PODS, NODE),
        causes=(
            "A drain for maintenance, a spot notice, or the autoscaler that removes a node.",
            "A pod of higher priority took the place (preemption).",
            "The node itself ran short of memory or disk.",
        ),
        act=(
            "Nothing: the next attempt goes on from the newest checkpoint.",
            "If it happens often: the next job with `priorityClassName`, `resources.spot: false`, or saves more often. "
            "A planned run keeps what it has.",
        ),
        again=_FREE,
    ),
    "NodeLost": Runbook(
        symptom="A node stopped answering while a pod of the attempt was on it; the message names it.",
        look=("kubectl get nodes", NODE, PODS),
        causes=(
            "The machine died, was reclaimed by the cloud, or lost its network.",
            "The kubelet stopped, or had no memory left.",
        ),
        act=(
            "Nothing for the job: the next attempt starts elsewhere. What the cut-off pod still writes is ignored.",
            "Platform team: repair or delete the node. Its pod stays Terminating until then, and harms nothing.",
        ),
        again=_FREE + " It avoids that node, until an attempt finds no room elsewhere.",
    ),
    "AttemptDeleted": Runbook(
        symptom="The batch Job of the attempt, or all its pods, are gone although the operator had not asked for it.",
        look=(JOBS, ATTEMPTS, EVENTS),
        causes=(
            "Somebody, or a clean-up job, deleted it.",
            "A backup tool or GitOps controller pruned what is not in its source.",
        ),
        act=(
            "Nothing: the next attempt goes on from the newest checkpoint.",
            "To stop a job use `suspend` or `cancel`; exempt the label `app.kubernetes.io/managed-by=finetune-operator` "
            "from clean-up tools.",
        ),
        again=_FREE,
    ),
    "NoProgress": Runbook(
        symptom="The job failed after five interruptions in a row, none of which found a new checkpoint.",
        look=(ATTEMPTS, EVENTS, LOG),
        causes=(
            "Spot nodes that live shorter than the time between two checkpoints.",
            "Saves that fail or take longer than the pods live: the log tells of each.",
            "A higher priority that preempts this job again and again.",
        ),
        act=(
            "Save more often: `checkpoint.everyMinutes` or `checkpoint.everySteps`.",
            "Use `resources.spot: false`, or a priority class.",
            "Then clone the job with the same `output.uri` and `output.onExisting: Resume`.",
        ),
        again="No. Going on like this would use GPU hours without getting anywhere.",
    ),
    "Internal": Runbook(
        symptom="The trainer or the operator met a state that it does not expect; the message ends with a traceback.",
        look=(FAILURE, LOG, DESCRIBE_PODS),
        causes=(
            "A defect of this release.",
            "A library that met data or a device of a kind it does not know.",
            "A worker that was ended by a signal from outside, or by a crash of the driver.",
        ),
        act=(
            "Read the last lines of the message: often they name the input that nobody expected.",
            "Report it with the message, `status.plan.settings` and the logs of all ranks, which are kept below "
            "`output.uri` in logs/attempt-N.",
        ),
        again="Sometimes: it is tried at most twice more, for crashes that do not depend on the data.",
    ),
    "Unknown": Runbook(
        symptom="A pod ended with an exit code or a reason that no other class knows, and left no message.",
        look=(FAILURE, LOG, DESCRIBE_PODS, EVENTS),
        causes=(
            "The process was killed from outside (exit codes 137 and 143 without a reason).",
            "Its pods were deleted before anybody could read how they ended.",
            "A runtime or a policy that ends containers in a way of its own.",
        ),
        act=(
            "Look at the pod's events and at the log's last lines.",
            "Look at the node, if the same one is named twice. Report it with what you found.",
        ),
        again="Sometimes: it is tried at most twice more.",
    ),
}
