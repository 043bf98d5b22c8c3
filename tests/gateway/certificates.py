"""An authority of our own for tests: certificates for hosts and clients, written as PEM files.

They have the extensions that RFC 5280 demands, which Python's own TLS insists on from 3.13 on (ssl.VERIFY_X509_STRICT).
"""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest

x509 = pytest.importorskip("cryptography.x509")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

LIFE = datetime.timedelta(days=2)
USES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
        "crl_sign", "encipher_only", "decipher_only")  # fmt: skip


class Authority:
    """Signs certificates; `certificate` is its own PEM file."""

    def __init__(self, folder: Path, name: str = "authority"):
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.certificate = self._write(f"{name}.pem", self._signed(self._subject, self.key, is_authority=True))

    def sign(self, name: str, *hosts: str) -> tuple[str, str]:
        """(certificate, key) as paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.IPAddress(ipaddress.ip_address(h)) if h[0].isdigit() else x509.DNSName(h) for h in hosts or (name,)]
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        path = self.folder / f"{self.name}-{name}-key.pem"
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        made = self._signed(subject, key, x509.SubjectAlternativeName(names))
        return self._write(f"{self.name}-{name}.pem", made), str(path)

    def _signed(self, subject, key, *extensions, is_authority: bool = False):
        now = datetime.datetime.now(datetime.UTC)
        build = x509.CertificateBuilder().subject_name(subject).issuer_name(self._subject).public_key(key.public_key())
        build = build.serial_number(x509.random_serial_number()).not_valid_before(now - LIFE).not_valid_after(now + LIFE)
        uses = ("key_cert_sign", "crl_sign") if is_authority else ("digital_signature",)
        build = build.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        build = build.add_extension(x509.KeyUsage(**{use: use in uses for use in USES}), critical=True)
        for extension in (
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
            *extensions,
        ):
            build = build.add_extension(extension, critical=False)
        return build.sign(self.key, hashes.SHA256())

    def _write(self, name: str, certificate) -> str:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)
