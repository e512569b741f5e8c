"""A child that is led machine instruction by machine instruction from one of its system calls on, and killed.

Data flow: tests -> `let_be_led` in the child, [support.stepping] `kill_after` in its parent
Source: ptrace(2); the numbers of calls and the order of registers are those of Linux on x86-64.
"""

import ctypes
import os
import signal
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from tests.support.processes import Forked

WRITE, SENDTO, SENDMSG = 1, 44, 46

_TRACE_ME, _SINGLE_STEP, _GET_REGISTERS, _SYSCALL, _SET_OPTIONS = 0, 9, 12, 24, 0x4200
_SAY_SYSCALLS, _KILL_WITH_ME = 1, 0x100000
_AT_SYSCALL: Final = signal.SIGTRAP | 0x80
_REGISTERS: Final = struct.Struct("=27Q")
_RAX, _RDI, _NUMBER = 10, 14, 15
_ENTRY: Final = 2**64 - 38  # -ENOSYS: what a call's result is while it has none

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


class Call(NamedTuple):
    """A system call at its entry."""

    number: int
    first: int  # argument


def let_be_led() -> None:
    """In the child: stop until the parent leads it on."""
    _ptrace(_TRACE_ME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_after(child: Forked, steps: int, is_due: Callable[[Call], bool]) -> bool:
    """Kill it so many instructions behind its first call that `is_due`; False: it ended before.

    The first of these is the call itself.
    """
    if not _wait(child):
        return False
    _ptrace(_SET_OPTIONS, child.pid, data=_SAY_SYSCALLS | _KILL_WITH_ME)
    request, left = _SYSCALL, steps
    while left > 0 or request == _SYSCALL:
        _ptrace(request, child.pid)
        stopped_by = _wait(child)
        if not stopped_by:
            return False
        if request == _SINGLE_STEP:
            left -= 1
        elif stopped_by == _AT_SYSCALL and (call := _call(child.pid)) is not None and is_due(call):
            request = _SINGLE_STEP
    child.kill()
    return True


def _wait(child: Forked) -> int:
    """The signal that it was stopped by; 0 when it has ended."""
    _, status = os.waitpid(child.pid, 0)
    if os.WIFSTOPPED(status):
        return os.WSTOPSIG(status)
    child.status = os.waitstatus_to_exitcode(status)
    return 0


def _call(pid: int) -> Call | None:
    """The call that it is about to make; None if it comes back from one."""
    buffer = ctypes.create_string_buffer(_REGISTERS.size)
    _ptrace(_GET_REGISTERS, pid, data=ctypes.addressof(buffer))
    registers = _REGISTERS.unpack(buffer.raw)
    return Call(registers[_NUMBER], registers[_RDI]) if registers[_RAX] == _ENTRY else None


def _ptrace(request: int, pid: int, *, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")
