from __future__ import annotations

import datetime
import hashlib
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from cdp.server.errors import StateDirectoryInvalid
from cdp.server.tls import Authority, ensure_certificate, open_authority, server_context

NOW = datetime.datetime.now(datetime.UTC)
LIFE = datetime.timedelta(days=90)
NAMES = ("backup.example.com", "10.0.0.2", "::1", "localhost", "127.0.0.1")


def shake_hands(context: ssl.SSLContext, authority: Authority, name: str) -> str | None:
    """A real handshake over a socket pair; the protocol's version."""
    server_side, client_side = socket.socketpair()
    client = ssl.create_default_context(cadata=authority.pem)
    with server_side, client_side:

        def serve() -> None:
            try:
                with context.wrap_socket(server_side, server_side=True) as tls:
                    tls.recv(1)
            except OSError:
                return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with client.wrap_socket(client_side, server_hostname=name) as tls:
                version = tls.version()
                tls.send(b"x")
        finally:
            client_side.close()
            thread.join(10)
    return version


def test_the_authority_is_made_once_and_kept(tmp_path: Path) -> None:
    first = open_authority(tmp_path / "tls", NOW)
    again = open_authority(tmp_path / "tls", NOW)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint == hashlib.sha256(ssl.PEM_cert_to_DER_cert(first.pem)).hexdigest()
    for name in ("ca.key", "ca.pem"):
        assert stat.S_IMODE((tmp_path / "tls" / name).stat().st_mode) == 0o600


def test_a_key_without_a_certificate_is_a_first_start_that_was_cut_short(tmp_path: Path) -> None:
    open_authority(tmp_path, NOW)
    (tmp_path / "ca.pem").unlink()
    assert open_authority(tmp_path, NOW).pem


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_damaged_authority_is_never_replaced(tmp_path: Path, content: bytes) -> None:
    open_authority(tmp_path, NOW)
    (tmp_path / "ca.pem").write_bytes(content)
    with pytest.raises(StateDirectoryInvalid) as caught:
        open_authority(tmp_path, NOW)
    assert "backup" in caught.value.remedy
    assert (tmp_path / "ca.pem").read_bytes() == content


def test_a_foreign_key_is_noticed(tmp_path: Path) -> None:
    open_authority(tmp_path / "one", NOW)
    open_authority(tmp_path / "two", NOW)
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "two" / "ca.key").read_bytes())
    with pytest.raises(StateDirectoryInvalid):
        open_authority(tmp_path / "one", NOW)


def test_clients_that_pin_the_authority_accept_every_name(tmp_path: Path) -> None:
    authority = open_authority(tmp_path, NOW)
    path, made = ensure_certificate(authority, NAMES, LIFE, NOW)
    assert made
    context = server_context(path)
    for name in NAMES:
        assert shake_hands(context, authority, name) == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, authority, "elsewhere.example.com")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, open_authority(tmp_path / "other", NOW), "localhost")


def test_the_certificate_is_renewed_in_its_last_third_or_for_other_names(tmp_path: Path) -> None:
    authority = open_authority(tmp_path, NOW)
    path, _ = ensure_certificate(authority, NAMES, LIFE, NOW)

    def serial() -> int:
        return x509.load_pem_x509_certificate(path.read_bytes()).serial_number

    first = serial()
    assert ensure_certificate(authority, NAMES, LIFE, NOW + LIFE / 2) == (path, False)
    assert serial() == first
    assert ensure_certificate(authority, NAMES, LIFE, NOW + LIFE * 0.8) == (path, True)
    assert serial() != first
    assert ensure_certificate(authority, (*NAMES, "new.example.com"), LIFE, NOW) == (path, True)
    path.write_bytes(path.read_bytes()[:100])
    assert ensure_certificate(authority, NAMES, LIFE, NOW) == (path, True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
