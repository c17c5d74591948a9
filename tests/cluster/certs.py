"""Certificates of one cluster: one authority, one certificate per server and per client.

Needs the `cryptography` package of the project's virtual environment.
"""

from __future__ import annotations

import base64
import datetime
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 365
RENEW_BEFORE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its private key, both PEM."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority in a folder; made on first use, made anew when it is broken or about to expire."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pair = self._paths("ca")
        if not _usable(self.pair):
            folder.mkdir(parents=True, exist_ok=True)
            # Everything that the old authority signed is worthless with a new one.
            for old in folder.glob("*.*"):
                old.unlink()
            self._write_authority()
        self._key = serialization.load_pem_private_key(self.pair.key.read_bytes(), password=None)
        self._certificate = x509.load_pem_x509_certificate(self.pair.certificate.read_bytes())

    def server(self, name: str, hosts: Sequence[str]) -> Pair:
        """A server certificate for exactly these DNS names and IP addresses; kept while they stay the same."""
        return self._issue(name, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), hosts)

    def client(self, name: str, user: str, groups: Sequence[str] = ()) -> Pair:
        """A client certificate: Kubernetes reads the user from CN and the groups from O."""
        parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        return self._issue(name, x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, user)]), ())

    def signing_key(self, name: str) -> Pair:
        """A bare key pair, for service account tokens; the 'certificate' is the public key."""
        pair = self._paths(name)
        if not (pair.key.exists() and pair.certificate.exists()):
            key = ec.generate_private_key(ec.SECP256R1())
            _write_private(pair.key, _pem(key))
            form = serialization.PublicFormat.SubjectPublicKeyInfo
            pair.certificate.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
        return pair

    def _paths(self, name: str) -> Pair:
        return Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")

    def _write_authority(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-test-cluster")])
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        certificate = (
            _builder(name, name, key)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        _write_private(self.pair.key, _pem(key))
        self.pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _issue(self, name: str, subject: x509.Name, hosts: Sequence[str]) -> Pair:
        pair = self._paths(name)
        if _usable(pair, subject, hosts):
            return pair
        key = ec.generate_private_key(ec.SECP256R1())
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])
        builder = (
            _builder(subject, self._certificate.subject, key)
            # Python 3.13 refuses a server whose certificate does not name its authority's key.
            .add_extension(_key_of(self._certificate), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(_general_names(hosts)), critical=False)
        assert isinstance(self._key, ec.EllipticCurvePrivateKey)
        certificate = builder.sign(self._key, hashes.SHA256())
        _write_private(pair.key, _pem(key))
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return pair


def write_kubeconfig(path: Path, server: str, authority: Authority, client: Pair) -> Path:
    """Writes a kubeconfig with everything embedded, so that it can be copied; returns its path."""

    def data(file: Path) -> str:
        return base64.b64encode(file.read_bytes()).decode()

    name = "finetune-test"
    cluster = {"server": server, "certificate-authority-data": data(authority.pair.certificate)}
    user = {"client-certificate-data": data(client.certificate), "client-key-data": data(client.key)}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    # JSON is YAML, and needs no YAML library.
    _write_private(path, json.dumps(content, indent=1).encode())
    return path


def _key_of(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of containers and hosts differ by moments.
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _usable(pair: Pair, subject: x509.Name | None = None, hosts: Sequence[str] = ()) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
        serialization.load_pem_private_key(pair.key.read_bytes(), password=None)
    except (OSError, ValueError):
        return False
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc - now < RENEW_BEFORE or (subject is not None and certificate.subject != subject):
        return False
    if not hosts:
        return True
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return list(names) == _general_names(hosts)


def _general_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write_private(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    # Another process may read the old file at this moment.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.touch(mode=0o600)
    partial.write_bytes(content)
    partial.replace(path)
