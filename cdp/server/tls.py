"""The server's own certificate authority, made at the first start, and its certificate.

    <directory>/tls/ca.key      0600  never leaves this host
    <directory>/tls/ca.pem            what peers pin; its SHA-256 fingerprint is part of every join token
    <directory>/tls/server.pem  0600  key and certificate in one file, so that they can only change together

Each file is written whole or not at all (temporary name, fsync, rename). The CA is written key first: a key without a
certificate is replaced at the next start, because nobody can have pinned it.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cdp.server.errors import StateDirectoryInvalid

CA_DAYS = 20 * 365
BACKDATE = datetime.timedelta(days=1)
"""Peers' clocks may be behind: certificates are valid from a day ago."""


@dataclass(frozen=True, slots=True)
class Authority:
    """``fingerprint``: SHA-256 of the CA certificate's DER form, 64 lower-case hexadecimal digits."""

    directory: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()


def open_authority(directory: Path, now: datetime.datetime) -> Authority:
    """The CA in ``directory``, made if there is none. Raises ``StateDirectoryInvalid`` if it is damaged."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key_path, pem_path = directory / "ca.key", directory / "ca.pem"
    if not pem_path.exists():
        return _make_authority(directory, now)
    try:
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
        certificate = x509.load_pem_x509_certificate(pem_path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(directory, str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise _damaged(directory, "ca.key and ca.pem do not belong together")
    return Authority(directory, certificate, key)


def ensure_certificate(
    authority: Authority, names: tuple[str, ...], lifetime: datetime.timedelta, now: datetime.datetime
) -> tuple[Path, bool]:
    """``server.pem`` for exactly ``names``, issued anew if it is missing, for other names, or nearly over. Also tells
    whether it was."""
    path = authority.directory / "server.pem"
    if path.exists() and _serves(path, authority, names, now):
        return path, False
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(names[0], authority.certificate.subject, key.public_key(), now, lifetime)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    write_private(path, _key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM))
    return path, True


def server_context(path: Path) -> ssl.SSLContext:
    """For listening: TLS 1.2 at least. ``load_cert_chain`` on it renews the certificate of new connections."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(path)
    return context


def write_private(path: Path, content: bytes) -> None:
    """Write a 0600 file whole or not at all, durably."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _make_authority(directory: Path, now: datetime.datetime) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"cdp server CA {os.urandom(4).hex()}")])
    certificate = (
        _builder(name, name, key.public_key(), now, datetime.timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    write_private(directory / "ca.key", _key_pem(key))
    write_private(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    return Authority(directory, certificate, key)


def _builder(
    subject: str | x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    if isinstance(subject, str):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _serves(path: Path, authority: Authority, names: tuple[str, ...], now: datetime.datetime) -> bool:
    """Is the certificate ours, for exactly these names, with more than a third of its life left?"""
    try:
        raw = path.read_bytes()
        certificate = x509.load_pem_x509_certificate(raw)
        serialization.load_pem_private_key(raw, None)
        certificate.verify_directly_issued_by(authority.certificate)
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    fresh = certificate.not_valid_after_utc - now > life / 3
    return fresh and list(held) == [_general_name(name) for name in names]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _damaged(directory: Path, why: str) -> StateDirectoryInvalid:
    return StateDirectoryInvalid(
        f"The certificate authority in {directory} is damaged: {why}.",
        remedy="Restore ca.key and ca.pem from a backup. A new CA means that every agent and standby must join again.",
        directory=str(directory),
    )
