"""System calls of the native kernel, watched and refused by tests as those of the Python kernel are.

Data flow: tests -> HOOKS -> [support.native_calls] <- nebula_mp._accel, in place of the C library
A shared library finds a function of another one through a slot of its own (ELF: global offset table), which is
found here in its file and filled anew in its memory. So what is tested is the module as it is built for use.
Source: ELF-64 object file format; System V ABI, AMD64 supplement, "Relocation"; elf(5).
"""

import ctypes
import errno
import mmap
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.support.forked import Child
from tests.support.watched import KilledError

Hook = Callable[..., int | None]
"""Is given what the call was given, in Python's spelling; None: make the call.

OSError is the call's error. KilledError ends the process, which is then one that the test has forked: no
exception gets through the native kernel.
"""

HOOKS: Final[dict[str, Hook]] = {}
"""By the call's name; set them with `hook`. Without one the call is made."""

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 5, 6, 7, 8, 23
_GLOB_DAT, _JUMP_SLOT = 6, 7
_SYMBOL_BYTES, _RELA_BYTES = 24, 24
_libc = ctypes.CDLL(None, use_errno=True)
_keep: list[object] = []
_built: Final[dict[int, int]] = {}
"""What stood in each slot that was filled."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class Message(ctypes.Structure):
    """`struct msghdr`."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint),
        ("parts", ctypes.POINTER(_Iovec)),
        ("part_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )

    @property
    def room_bytes(self) -> int:
        """What it has room for."""
        return int(self.parts[0].len)

    def fill(self, data: bytes, source: tuple[str, int], *, step: int | None, is_cut: bool) -> int:
        """Receive this; `step` as a UDP_GRO message states it."""
        size = min(len(data), self.room_bytes)
        ctypes.memmove(self.parts[0].base, data, size)
        name = struct.pack("=H", socket.AF_INET) + struct.pack(
            "!H4s8x", source[1], socket.inet_aton(source[0])
        )
        ctypes.memmove(self.name, name, len(name))
        self.name_bytes = len(name)
        control = b"" if step is None else struct.pack("=Qiii4x", 20, socket.SOL_UDP, 104, step)
        assert len(control) <= self.control_bytes
        ctypes.memmove(self.control, control, len(control))
        self.control_bytes: int = len(control)
        self.flags = socket.MSG_TRUNC if is_cut or size < len(data) else 0
        return size


def _bytes(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def _target(address: int) -> tuple[Any, ...]:
    """A socket address as Python spells it."""
    (family,) = struct.unpack("=H", _bytes(address, 2))
    if family == socket.AF_INET:
        port, ip = struct.unpack("!2xH4s", _bytes(address, 8))
        return socket.inet_ntoa(ip), port
    port, flow, ip6 = struct.unpack("!2xHI16s", _bytes(address, 24))
    (scope,) = struct.unpack("=I", _bytes(address + 24, 4))
    return socket.inet_ntop(socket.AF_INET6, ip6), port, flow, scope


def _memory(address: int, size: int) -> memoryview:
    """The bytes themselves, for as long as the call lasts."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B").toreadonly()


def _read(descriptor: int, _data: int, _size: int) -> tuple[Any, ...]:
    return (descriptor,)


def _write(descriptor: int, data: int, size: int) -> tuple[Any, ...]:
    return descriptor, _memory(data, size)


def _readv(descriptor: int, _parts: int, _count: int) -> tuple[Any, ...]:
    return (descriptor,)


def _sendto(descriptor: int, data: int, size: int, _flags: int, target: int, _: int) -> tuple[Any, ...]:
    return descriptor, _memory(data, size), _target(target)


def _sendmsg(descriptor: int, message: int, _flags: int) -> tuple[Any, ...]:
    found = Message.from_address(message)
    level, kind, step = struct.unpack("=8xiiH", _bytes(found.control, 18))
    assert (level, kind) == (socket.SOL_UDP, 103)
    data = _memory(found.parts[0].base, found.parts[0].len)
    return descriptor, data, step, _target(found.name)


def _recvmsg(descriptor: int, message: int, _flags: int) -> tuple[Any, ...]:
    return descriptor, Message.from_address(message)


def _poll(sources: int, _count: int, limit_ms: int) -> tuple[Any, ...]:
    descriptor, events = struct.unpack("=ih", _bytes(sources, 6))
    return descriptor, events, limit_ms


class _Call(NamedTuple):
    arguments: tuple[Any, ...]  # their types
    spell: Callable[..., tuple[Any, ...]]


_int, _address, _size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
_CALLS: Final[Mapping[str, _Call]] = {
    "read": _Call((_int, _address, _size), _read),
    "write": _Call((_int, _address, _size), _write),
    "readv": _Call((_int, _address, _int), _readv),
    "sendto": _Call((_int, _address, _size, _int, _address, ctypes.c_uint), _sendto),
    "sendmsg": _Call((_int, _address, _int), _sendmsg),
    "recvmsg": _Call((_int, _address, _int), _recvmsg),
    "poll": _Call((_address, ctypes.c_ulong, _int), _poll),
}


def hook(monkeypatch: pytest.MonkeyPatch, **hooks: Hook) -> None:
    """Let these be asked before each call of their names, until that is undone. The accelerator is there."""
    _install()
    for name, each in hooks.items():
        monkeypatch.setitem(HOOKS, name, each)


def undo() -> None:
    """Have the calls made as they are built, in this process: without hooks they only take far longer."""
    for slot, address in _built.items():
        _fill(slot, address)


def dies(run: Callable[[], object]) -> None:
    """Run this in a process of its own, which is killed in one of its calls."""
    child = Child(run)
    _, status = os.waitpid(child.pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def _install() -> None:
    if _keep:
        return
    from nebula_mp import _accel  # noqa: PLC0415 - not everywhere

    path = Path(_accel.__file__)
    slots = dict(_slots(path.read_bytes()))
    base = _base_address(path)
    for name, call in _CALLS.items():
        if name in slots:  # else it never makes it
            slot = base + slots[name]
            _built[slot] = ctypes.c_uint64.from_address(slot).value
            _fill(slot, _callback(name, call))


def _callback(name: str, call: _Call) -> int:
    # For `poll` an int, but the register is as wide.
    kind = ctypes.CFUNCTYPE(ctypes.c_ssize_t, *call.arguments, use_errno=True)
    real = kind((name, _libc))

    def called(*arguments: Any) -> int:
        hook = HOOKS.get(name)
        if hook is not None:
            try:
                result = hook(*call.spell(*arguments))
            except KilledError:
                os.kill(os.getpid(), signal.SIGKILL)
            except OSError as error:
                ctypes.set_errno(error.errno or errno.EPROTO)
                return -1
            if result is not None:
                return result
        found: int = real(*arguments)
        return found if found < 1 << 31 or name != "poll" else -1

    made = kind(called)
    _keep.extend((real, made))
    return ctypes.cast(made, ctypes.c_void_p).value or 0


def _fill(slot: int, address: int) -> None:
    """Let the slot have this address; the linker has made its page read-only."""
    page = slot & ~(mmap.PAGESIZE - 1)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), protection):
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.c_uint64.from_address(slot).value = address


def _base_address(path: Path) -> int:
    """Where the loaded file begins."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)) and line.split()[2] == "00000000":
            return int(line.partition("-")[0], 16)
    raise AssertionError(f"{path} is not loaded")


def _slots(file: bytes) -> Iterator[tuple[str, int]]:
    """Name of each function of others, and where its address will be, from the beginning of the memory."""
    at, count = struct.unpack_from("<Q", file, 32)[0], struct.unpack_from("<H", file, 56)[0]
    headers = [struct.unpack_from("<IIQQQQ", file, at + 56 * each) for each in range(count)]

    def offset(address: int) -> int:
        """Where in the file something of the memory is."""
        for kind, _, begin, memory, _, size in headers:
            if kind == _PT_LOAD and memory <= address < memory + size:
                return int(address - memory + begin)
        raise AssertionError(f"{address:#x} is not in the file")

    (dynamic,) = (header for header in headers if header[0] == _PT_DYNAMIC)
    tags = dict(struct.iter_unpack("<qQ", file[dynamic[2] : dynamic[2] + dynamic[5] // 16 * 16]))
    symbols, names = offset(tags[_DT_SYMTAB]), offset(tags[_DT_STRTAB])
    tables = [(tags[_DT_RELA], tags[_DT_RELASZ])]
    if _DT_JMPREL in tags:
        tables.append((tags[_DT_JMPREL], tags[_DT_PLTRELSZ]))
    for table, size in tables:
        for entry in range(offset(table), offset(table) + size, _RELA_BYTES):
            slot, info = struct.unpack_from("<QQ", file, entry)
            if info & 0xFFFF_FFFF in (_GLOB_DAT, _JUMP_SLOT):
                name = names + struct.unpack_from("<I", file, symbols + _SYMBOL_BYTES * (info >> 32))[0]
                yield file[name : file.index(b"\0", name)].decode(), slot
