"""Runbooks of the place where a run is to start: image, node, room, policy."""

from __future__ import annotations

from finetune_api.runbooks.page import (
    DESCRIBE,
    DESCRIBE_PODS,
    EVENTS,
    FAILURE,
    JOBS,
    LOG,
    NODE,
    PODS,
    POOL,
    POOLS,
    Runbook,
)

RUNBOOKS = {
    "ImagePullFailed": Runbook(
        symptom="The pods stay Pending with ErrImagePull or ImagePullBackOff until the pool's start timeout.",
        look=(
            DESCRIBE_PODS,
            EVENTS,
            "kubectl get pods -l finetune.dev/job=NAME -o jsonpath='{.items[*].spec.containers[*].image}'",
        ),
        causes=(
            "A tag or digest that the registry does not have, or not for the node's architecture.",
            "A registry that asks for credentials: the chart's image pull secrets are copied by name, so each tenant's "
            "namespace needs the secret.",
            "A node without access to the registry, or a registry that limits pulls.",
        ),
        act=(
            "Correct the chart's image values; jobs planned before keep the image that they were planned with.",
            "Create the pull secret in the namespace, or open the way to the registry.",
        ),
        again="Yes, where the registry was the cause. It uses up a retry each time the start timeout passes.",
    ),
    "ContainerCannotRun": Runbook(
        symptom="The container was created and its program never ran; the message quotes the container runtime.",
        look=(FAILURE, DESCRIBE_PODS, "kubectl get nodes -L kubernetes.io/arch", NODE),
        causes=(
            "An image for another processor architecture than the node's (exec format error).",
            "An image without the program that is to run: not our image, or a wrong tag.",
            "A runtime that cannot make containers: a full disk, a broken configuration.",
        ),
        act=(
            "Compare the node's architecture with the image's; give the pool a nodeSelector for one architecture.",
            "Correct the chart's image values, or have the node repaired.",
        ),
        again="Sometimes: it is tried at most twice more, on other nodes.",
    ),
    "Unschedulable": Runbook(
        symptom="A pod of the gang found no node within the pool's startTimeoutSeconds; the message quotes the scheduler.",
        look=(PODS, DESCRIBE_PODS, POOLS, POOL, "kubectl get nodes --show-labels"),
        causes=(
            "All GPUs of the pool are taken, or the autoscaler cannot get more machines.",
            "A taint, a label or a resource of the nodes that the GPUPool does not describe.",
            "Nodes with room that the job avoids, because they were lost or broken; the next attempt may use them again.",
        ),
        act=(
            "Wait: the job tries again by itself.",
            "Compare the scheduler's words with the pool's nodeSelector, tolerations and perGPU amounts.",
            "To run elsewhere, clone the job with another `resources.pool` or none.",
        ),
        again="Yes, and it costs nothing: the job waits for room without using up a retry.",
    ),
    "AdmissionDenied": Runbook(
        symptom="The API server or an admission policy refused the Job or its pods; the message quotes it.",
        look=(DESCRIBE, JOBS, EVENTS, "kubectl get validatingadmissionpolicies"),
        causes=(
            "A policy on images, labels, GPUs or owners.",
            "Pod Security that is stricter than `restricted`, which our pods meet.",
            "A LimitRange that the pods exceed.",
        ),
        act=(
            "Show the message to the platform team: either the policy or the pool has to change.",
            "Then clone the job, or edit it if it was never planned.",
        ),
        again="No. The policy refuses every attempt until it is changed.",
    ),
    "AcceleratorMismatch": Runbook(
        symptom="The pod is on its node, and cannot use the GPU there: none, too few, another kind, or a wrong driver.",
        look=(FAILURE, PODS, NODE, POOL, LOG),
        causes=(
            "A driver that is older than the image's CUDA needs, or was updated without a reboot.",
            "A GPU that fell off the bus (Xid errors in the node's kernel log), or an unhealthy device plugin.",
            "A pool whose nodeSelector matches nodes with another kind of GPU than it says.",
        ),
        act=(
            "Platform team: cordon the node that the message names, then repair or replace it.",
            "Compare the pool's accelerator, gpuMemoryGiB and nodeSelector with the node's labels.",
        ),
        again="Often: it is tried at most twice more, on other nodes.",
    ),
    "NameTaken": Runbook(
        symptom="An object exists that has the name of a Job, ConfigMap or Service of this FineTuneJob and another owner.",
        look=(DESCRIBE, "kubectl get jobs,configmaps,services"),
        causes=(
            "Objects restored from a backup without their owner, or copied by hand.",
            "A name that somebody chose on purpose.",
        ),
        act=("Delete or rename the object that the message names.",),
        again="Yes, by itself: the job goes on as soon as the name is free, and uses up no retry.",
    ),
}
