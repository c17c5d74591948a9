"""Certificates are kept while they fit and made anew when they do not."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from tests.cluster.certs import Authority


def test_a_second_start_keeps_every_certificate(tmp_path: Path) -> None:
    first = Authority(tmp_path).server("api", ["127.0.0.1", "localhost"]).certificate.read_bytes()
    assert Authority(tmp_path).server("api", ["127.0.0.1", "localhost"]).certificate.read_bytes() == first


def test_a_new_address_gets_a_new_certificate_of_the_same_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    first = authority.server("api", ["127.0.0.1"]).certificate.read_bytes()
    second = authority.server("api", ["127.0.0.1", "10.0.0.1"]).certificate.read_bytes()
    assert second != first
    issuer = x509.load_pem_x509_certificate(authority.pair.certificate.read_bytes())
    x509.load_pem_x509_certificate(second).verify_directly_issued_by(issuer)


def test_a_damaged_authority_takes_its_certificates_with_it(tmp_path: Path) -> None:
    old = Authority(tmp_path)
    signed = old.client("admin", "root", ["system:masters"]).certificate.read_bytes()
    old.pair.key.write_text("half a key")
    new = Authority(tmp_path)
    again = new.client("admin", "root", ["system:masters"]).certificate.read_bytes()
    assert again != signed
    issuer = x509.load_pem_x509_certificate(new.pair.certificate.read_bytes())
    x509.load_pem_x509_certificate(again).verify_directly_issued_by(issuer)


def test_private_keys_are_readable_by_the_owner_only(tmp_path: Path) -> None:
    pair = Authority(tmp_path).client("admin", "root")
    assert pair.key.stat().st_mode & 0o077 == 0
