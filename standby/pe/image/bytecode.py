"""Python sources are compiled when the image is built: the PE would do it again at every boot."""

from __future__ import annotations

import importlib.util
import marshal
import posixpath
import sys

from standby.pe.image.cpio import CpioWriter

_UNCHECKED_HASH = (1).to_bytes(4, "little")


def add_bytecode(cpio: CpioWriter, path: str, source: bytes) -> None:
    """Add the compiled form of the source at ``path``, bound to its content rather than to its time.

    A source that does not compile (a template, a test of syntax errors) gets none, as with ``compileall``.
    """
    try:
        code = compile(source, "/" + path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return
    data = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + importlib.util.source_hash(source) + marshal.dumps(code)
    directory, name = posixpath.split(path)
    tag = sys.implementation.cache_tag
    cpio.file(f"{directory}/__pycache__/{name.removesuffix('.py')}.{tag}.pyc", data)
