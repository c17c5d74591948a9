"""How an attempt is reached: by its own gang, and by the operator on the progress port."""

from __future__ import annotations

from finetune_api import naming
from finetune_operator.render.metadata import Manifest

OPERATOR_LABELS = {"app.kubernetes.io/name": "finetune-operator"}


def service(metadata: Manifest, selector: dict[str, str]) -> Manifest:
    """A headless Service that gives each pod a name before it is ready: rendezvous happens before readiness."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": selector,
            "ports": [
                {"name": "rendezvous", "port": naming.MASTER_PORT, "protocol": "TCP"},
                {"name": "progress", "port": naming.PROGRESS_PORT, "protocol": "TCP"},
            ],
        },
    }


def network_policy(metadata: Manifest, selector: dict[str, str], operator_namespace: str) -> Manifest:
    """Only the gang reaches its pods, and the operator their progress port. What pods reach is not limited here."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {
            "podSelector": {"matchLabels": selector},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": selector}}]},
                {
                    "from": [
                        {
                            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": operator_namespace}},
                            "podSelector": {"matchLabels": OPERATOR_LABELS},
                        }
                    ],
                    "ports": [{"port": naming.PROGRESS_PORT, "protocol": "TCP"}],
                },
            ],
        },
    }
