"""The smallest NBD client that can read: enough to time a first block and to compare what was served."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Self

_HELLO = b"NBDMAGIC" + b"IHAVEOPT"
_FIXED_NEWSTYLE = 1
_NO_ZEROES = 2
_OPT_EXPORT_NAME = 1
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698


class NbdClient:
    def __init__(self, path: Path, export: str, timeout_s: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        self._socket.connect(str(path))
        assert self._receive(16) == _HELLO
        flags = struct.unpack(">H", self._receive(2))[0]
        assert flags & _FIXED_NEWSTYLE
        name = export.encode()
        self._socket.sendall(struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", _OPT_EXPORT_NAME, len(name)) + name)
        self.size_bytes, _ = struct.unpack(">QH", self._receive(10))
        if not flags & _NO_ZEROES:
            self._receive(124)

    def read(self, offset: int, length: int) -> bytes:
        """Raises ``OSError`` with the server's number."""
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, 0, offset, offset, length))
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        assert (magic, cookie) == (_REPLY_MAGIC, offset)
        if error:
            raise OSError(error, "refused by the NBD server")
        return self._receive(length)

    def _receive(self, length: int) -> bytes:
        out = bytearray()
        while len(out) < length:
            piece = self._socket.recv(min(length - len(out), 1 << 20))
            if not piece:
                raise ConnectionError("the NBD server has closed the connection")
            out += piece
        return bytes(out)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
