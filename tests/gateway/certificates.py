"""An authority of our own for tests: certificates for hosts and clients, written as PEM files."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest

x509 = pytest.importorskip("cryptography.x509")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

LIFE = datetime.timedelta(days=2)


class Authority:
    """Signs certificates; `certificate` is its own PEM file."""

    def __init__(self, folder: Path, name: str = "authority"):
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = self._build(self._subject, self.key).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.certificate = self._write(f"{name}.pem", made.sign(self.key, hashes.SHA256()))

    def sign(self, name: str, *hosts: str) -> tuple[str, str]:
        """(certificate, key) as paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.IPAddress(ipaddress.ip_address(h)) if h[0].isdigit() else x509.DNSName(h) for h in hosts or (name,)]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = self._build(subject, key).add_extension(x509.SubjectAlternativeName(names), critical=False)
        path = self.folder / f"{self.name}-{name}-key.pem"
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return self._write(f"{self.name}-{name}.pem", made.sign(self.key, hashes.SHA256())), str(path)

    def _build(self, subject, key):
        now = datetime.datetime.now(datetime.UTC)
        build = x509.CertificateBuilder().subject_name(subject).issuer_name(self._subject).public_key(key.public_key())
        return build.serial_number(x509.random_serial_number()).not_valid_before(now - LIFE).not_valid_after(now + LIFE)

    def _write(self, name: str, certificate) -> str:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)
