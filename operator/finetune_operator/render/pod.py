"""What preflight and trainer pods have in common: they are restricted, hold no token and read fixed secret keys."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from finetune_api import failures, naming
from finetune_api.job import FineTuneJobSpec
from finetune_api.planner import References
from finetune_operator.config import Config
from finetune_operator.render.metadata import Manifest

USER = 65532  # the user that the images declare
REQUIRED_KEYS = {"s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
RUN_FILE_FOLDER = str(PurePosixPath(naming.RUN_FILE_PATH).parent)
UNHEALTHY_NODE_SECONDS = 30  # how long pods stay on a node that stopped answering
NO_SIDECARS = {"sidecar.istio.io/inject": "false"}
NO_SIDECAR_ANNOTATIONS = {"linkerd.io/inject": "disabled"}


def job_spec(template: Manifest, container: str, *, pods: int, extra: Manifest | None = None) -> Manifest:
    """A Job that starts suspended, never repeats a pod, and keeps the evidence of an eviction.

    The policy ends the Job at the first pod that fails with a known code or is disrupted, while that pod can still be
    read.
    """
    return {
        "suspend": True,
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": container,
                        "operator": "In",
                        "values": list(failures.exit_codes()),
                    },
                },
            ]
        },
        **(extra or {}),
        "template": template,
    }


def pod_spec(spec: FineTuneJobSpec, config: Config, references: References) -> Manifest:
    """The fields that every pod of ours has, without containers and volumes."""
    found: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "tolerations": [
            {
                "key": f"node.kubernetes.io/{condition}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": UNHEALTHY_NODE_SECONDS,
            }
            for condition in ("not-ready", "unreachable")
        ],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if references.service_account is not None:
        found["serviceAccountName"] = references.service_account
    if spec.priority_class_name is not None:
        found["priorityClassName"] = spec.priority_class_name
    if config.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in config.image_pull_secrets]
    return found


def container(name: str, image: str, config: Config, command: list[str], resources: Manifest) -> Manifest:
    """A container of ours, without environment and mounts."""
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": config.image_pull_policy,
        "command": command,
        "resources": resources,
        "terminationMessagePath": naming.TERMINATION_LOG,
        # Where the program left no message of its own, the end of its log tells why it ended.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def environment(config: Config, references: References) -> list[Manifest]:
    """HOME, the hub's mirror and the keys of each credentials profile, which the kubelet reads from the secret.

    The keys that a profile's URIs need must exist; a pod whose secret lacks one does not start, and says so.
    """
    found: list[Manifest] = [{"name": "HOME", "value": "/tmp"}]  # noqa: S108  the only writable home in the pod
    if config.hub_endpoint is not None:
        found.append({"name": "HF_ENDPOINT", "value": config.hub_endpoint})
    for profile, secret in sorted(references.profiles.items()):
        schemes = references.schemes.get(profile, set())
        required = {key for scheme in schemes for key in REQUIRED_KEYS.get(scheme, ())}
        for key in naming.SECRET_KEYS:
            reference: dict[str, Any] = {"name": secret, "key": key}
            if key not in required:
                reference["optional"] = True
            found.append({"name": naming.credential_env(profile, key), "valueFrom": {"secretKeyRef": reference}})
    return found


def volumes(references: References, config_map: str) -> tuple[list[Manifest], list[Manifest]]:
    """(volumes, mounts) of the run or preflight file, the CA certificates and the claims.

    A claim is mounted for writing where the output is on it: preflight tries that too.
    """
    found: list[Manifest] = [{"name": "run", "configMap": {"name": config_map}}]
    mounts: list[Manifest] = [{"name": "run", "mountPath": RUN_FILE_FOLDER, "readOnly": True}]
    for index, name in enumerate(sorted(references.config_maps)):
        found.append({"name": f"ca-{index}", "configMap": {"name": name}})
        mounts.append({"name": f"ca-{index}", "mountPath": f"{naming.CA_PATH}/{name}", "readOnly": True})
    for index, (claim, writes) in enumerate(sorted(references.claims.items())):
        found.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim, "readOnly": not writes}})
        mounts.append({"name": f"claim-{index}", "mountPath": f"{naming.CLAIMS_PATH}/{claim}", "readOnly": not writes})
    return found, mounts
