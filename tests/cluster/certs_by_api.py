"""Client certificates from a cluster whose authority we do not hold: by CertificateSigningRequest, as people do it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.cluster.kubectl import Kubectl

SIGNER = "kubernetes.io/kube-apiserver-client"
WAIT_SECONDS = 20.0


def kubeconfig_by_request(kubectl: Kubectl, folder: Path, user: str, groups: Sequence[str]) -> Path:
    """Writes a kubeconfig whose certificate the cluster signed for the user and groups, and returns its path."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    subject = x509.Name([*names, x509.NameAttribute(NameOID.COMMON_NAME, user)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    name = "test-" + user.replace(":", "-")
    kubectl("delete", "csr", name, "--ignore-not-found")
    spec = {
        "request": base64.b64encode(request.public_bytes(serialization.Encoding.PEM)).decode(),
        "signerName": SIGNER,
        "usages": ["client auth"],
    }
    kind = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
    kubectl("create", "-f", "-", input=json.dumps({**kind, "metadata": {"name": name}, "spec": spec}))
    kubectl("certificate", "approve", name)
    deadline = time.monotonic() + WAIT_SECONDS
    while not (signed := kubectl("get", "csr", name, "-o", "jsonpath={.status.certificate}")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"certificate request {name} was not signed within {WAIT_SECONDS:.0f} s")
        time.sleep(0.2)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(encoding, form, serialization.NoEncryption())
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    data = {"client-certificate-data": signed, "client-key-data": base64.b64encode(secret).decode()}
    config["users"] = [{"name": config["contexts"][0]["context"]["user"], "user": data}]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))
    return path
