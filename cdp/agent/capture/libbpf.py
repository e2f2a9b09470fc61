"""ctypes binding of libbpf.so.1: only what capture needs. Every call raises ``BpfFailed`` with errno's name."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

from cdp.agent.capture.errors import BpfFailed, KernelUnsupported

PROG_RAW_TRACEPOINT = 17
MAP_ARRAY = 2
MAP_RINGBUF = 27
HELPER_LOOP = 181
HELPER_RINGBUF_RESERVE = 131
HELPER_NS_PID = 120
F_MMAPABLE = 1 << 10
F_INNER_MAP = 1 << 12
_BTF_KIND_TYPEDEF = 8
_PROGRAM_INFO_BYTES = 232
_RECURSION_MISSES_AT = 208
_MAP_INFO_BYTES = 32
_MAP_ENTRIES_AT = 16
_LOG_LINES_MAX = 8
_LOG_LINE_BYTES = 1 << 20
_LOG_KEPT = 1500


class _MapCreateOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    )


class _TestRunOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


class _BtfType(ctypes.Structure):
    _fields_ = (("name_off", ctypes.c_uint32), ("info", ctypes.c_uint32), ("type", ctypes.c_uint32))


_POINTERS = (
    "bpf_object__open_file",
    "bpf_object__find_map_by_name",
    "bpf_object__find_program_by_name",
    "bpf_map__initial_value",
    "bpf_program__attach_raw_tracepoint",
    "btf__load_vmlinux_btf",
)
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_log: list[str] = []
"""What libbpf said last; part of the next error."""


def _keep(level: int, form: bytes, arguments: int) -> int:
    if level == 0:
        line = ctypes.create_string_buffer(_LOG_LINE_BYTES)
        _libc.vsnprintf(line, _LOG_LINE_BYTES, form, ctypes.c_void_p(arguments))
        # Of a verifier log the end tells what is wrong.
        _log.append(line.value.decode(errors="replace").rstrip()[-_LOG_KEPT:])
        del _log[:-_LOG_LINES_MAX]
    return 0


_print = _PRINT(_keep)  # kept: libbpf calls it for as long as the process lives
_libc = ctypes.CDLL(None, use_errno=True)
_loaded: ctypes.CDLL | None = None


def _lib() -> ctypes.CDLL:
    global _loaded  # noqa: PLW0603 - a shared library is loaded once per process
    if _loaded is None:
        try:
            lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise KernelUnsupported(
                f"libbpf.so.1 cannot be loaded: {error}.", remedy="Install the package libbpf1."
            ) from error
        for name in _POINTERS:
            getattr(lib, name).restype = ctypes.c_void_p
        lib.btf__type_by_id.restype = ctypes.POINTER(_BtfType)
        lib.libbpf_set_print(_print)
        _loaded = lib
    return _loaded


def _fail(what: str, code: int) -> BpfFailed:
    said = " / ".join(_log[-4:])
    _log.clear()
    return BpfFailed(
        f"{what} failed: {errno.errorcode.get(abs(code), code)}{f' ({said})' if said else ''}.",
        remedy="See docs/kernels.md for the kernels that capture supports.",
        errno=abs(code),
    )


def _call(what: str, function: str, *arguments: Any) -> int:
    result = int(getattr(_lib(), function)(*arguments))
    if result < 0:
        raise _fail(what, result)
    return result


def _pointer(what: str, function: str, *arguments: Any) -> ctypes.c_void_p:
    result = getattr(_lib(), function)(*arguments)
    if not result:
        raise _fail(what, ctypes.get_errno())
    return ctypes.c_void_p(result)


# --- pinned objects, maps, programs: everything is a file descriptor --------------------------------------------------
def get(path: Path) -> int:
    """A new descriptor of the pinned object."""
    return _call(f"Opening {path}", "bpf_obj_get", os.fsencode(path))


def pin(fd: int, path: Path) -> None:
    _call(f"Pinning {path}", "bpf_obj_pin", fd, os.fsencode(path))


def create_array(name: str, value_bytes: int, entries: int, flags: int) -> int:
    options = _MapCreateOpts(sz=ctypes.sizeof(_MapCreateOpts), map_flags=flags)
    return _call(
        f"Creating map {name}",
        "bpf_map_create",
        MAP_ARRAY,
        name.encode(),
        4,
        value_bytes,
        entries,
        ctypes.byref(options),
    )


def update(fd: int, key: bytes, value: bytes) -> None:
    _call("Updating a map", "bpf_map_update_elem", fd, key, value, ctypes.c_uint64(0))


def lookup(fd: int, key: bytes, value_bytes: int) -> bytes:
    value = ctypes.create_string_buffer(value_bytes)
    _call("Reading a map", "bpf_map_lookup_elem", fd, key, value)
    return value.raw


def keys(fd: int, key_bytes: int) -> list[bytes]:
    found: list[bytes] = []
    following = ctypes.create_string_buffer(key_bytes)
    while _lib().bpf_map_get_next_key(fd, found[-1] if found else None, following) == 0:
        found.append(following.raw)
    return found


def run(fd: int, *arguments: int) -> int:
    """Run a raw tracepoint program once with these u64 arguments; its return value."""
    context = (ctypes.c_uint64 * len(arguments))(*arguments)
    options = _TestRunOpts(
        sz=ctypes.sizeof(_TestRunOpts),
        ctx_in=ctypes.cast(context, ctypes.c_void_p),
        ctx_size_in=ctypes.sizeof(context),
    )
    _call("Running a program", "bpf_prog_test_run_opts", fd, ctypes.byref(options))
    return int(options.retval)


def recursion_misses(fd: int) -> int:
    """How often the kernel skipped the program because it was already running on that CPU. 0 where not counted."""
    info = ctypes.create_string_buffer(_PROGRAM_INFO_BYTES)
    size = ctypes.c_uint32(_PROGRAM_INFO_BYTES)
    _call("Reading program information", "bpf_obj_get_info_by_fd", fd, info, ctypes.byref(size))
    return int.from_bytes(info.raw[_RECURSION_MISSES_AT : _RECURSION_MISSES_AT + 8], "little")


def map_entries(fd: int) -> int:
    """``max_entries``: for a ring its bytes."""
    info = ctypes.create_string_buffer(_MAP_INFO_BYTES)
    size = ctypes.c_uint32(_MAP_INFO_BYTES)
    _call("Reading map information", "bpf_obj_get_info_by_fd", fd, info, ctypes.byref(size))
    return int.from_bytes(info.raw[_MAP_ENTRIES_AT : _MAP_ENTRIES_AT + 4], "little")


# --- probes -----------------------------------------------------------------------------------------------------------
def has_map_type(kind: int) -> bool:
    return int(_lib().libbpf_probe_bpf_map_type(kind, None)) == 1


def has_helper(helper: int) -> bool:
    return int(_lib().libbpf_probe_bpf_helper(PROG_RAW_TRACEPOINT, helper, None)) == 1


def tracepoint_arguments(name: str) -> int | None:
    """How many arguments the tracepoint passes, from the kernel's BTF; None if the kernel has no such tracepoint."""
    btf = _pointer("Loading the kernel's BTF", "btf__load_vmlinux_btf")
    try:
        lib = _lib()
        number = int(lib.btf__find_by_name_kind(btf, f"btf_trace_{name}".encode(), _BTF_KIND_TYPEDEF))
        if number < 0:
            return None
        pointer = lib.btf__type_by_id(btf, lib.btf__type_by_id(btf, number).contents.type).contents
        function = lib.btf__type_by_id(btf, pointer.type).contents
        return int(function.info & 0xFFFF) - 1  # the first is the tracepoint's private data
    finally:
        _lib().btf__free(btf)


# --- objects ----------------------------------------------------------------------------------------------------------
class Object:
    """A compiled object: open, configure, ``load``, take descriptors, ``close``. Descriptors end with it."""

    def __init__(self, path: Path) -> None:
        self._object = _pointer(f"Opening {path}", "bpf_object__open_file", os.fsencode(path), None)
        self._links: list[ctypes.c_void_p] = []

    def set_entries(self, name: str, entries: int) -> None:
        _call(f"Sizing map {name}", "bpf_map__set_max_entries", self._map(name), entries)

    def set_constants(self, value: bytes) -> None:
        """The object's one read-only structure."""
        size = ctypes.c_size_t()
        address = _pointer("Finding .rodata", "bpf_map__initial_value", self._map(".rodata"), ctypes.byref(size))
        if size.value < len(value):
            raise _fail("Setting .rodata", errno.E2BIG)
        ctypes.memmove(address, value, len(value))

    def load(self) -> None:
        _call("Loading the capture program", "bpf_object__load", self._object)

    def map_fd(self, name: str) -> int:
        return _call(f"Finding map {name}", "bpf_map__fd", self._map(name))

    def program_fd(self, name: str) -> int:
        return _call(f"Finding program {name}", "bpf_program__fd", self._program(name))

    def attach(self, program: str, tracepoint: str) -> int:
        """Attach; the link's descriptor, valid until ``close`` or ``detach``."""
        link = _pointer(
            f"Attaching to {tracepoint}",
            "bpf_program__attach_raw_tracepoint",
            self._program(program),
            tracepoint.encode(),
        )
        self._links.append(link)
        return _call("Finding a link", "bpf_link__fd", link)

    def detach(self) -> None:
        """Drop this process's hold on every link; those that are pinned stay."""
        while self._links:
            _lib().bpf_link__destroy(self._links.pop())

    def close(self) -> None:
        self.detach()
        _lib().bpf_object__close(self._object)

    def _map(self, name: str) -> ctypes.c_void_p:
        return _pointer(f"Finding map {name}", "bpf_object__find_map_by_name", self._object, name.encode())

    def _program(self, name: str) -> ctypes.c_void_p:
        return _pointer(f"Finding program {name}", "bpf_object__find_program_by_name", self._object, name.encode())
