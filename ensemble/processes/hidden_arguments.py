"""Starts a program with arguments that no other user can read: /proc/PID/cmdline shows a placeholder instead.

The real argument stands in the program's environment, which Linux shows to its owner alone. Before the program's first
instruction its parent makes the argument's pointer point there. Linux on 64-bit little-endian machines only.
"""

from __future__ import annotations

import ctypes
import signal
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from deepseek_triton.ensemble.processes.stat import stat_fields

PTRACE_CONT, PTRACE_DETACH, PTRACE_GETSIGINFO = 7, 17, 0x4202
HELD, ENDED = "t", ("Z", "X")  # states of a process, as Linux writes them
POLL_S = 0.001
_POINTER = 8
_START_STACK = 25  # the place of `startstack` among `stat_fields`: the address of argc
_SIGNAL_INFORMATION = 128  # bytes of a siginfo_t, whose first 4 are the signal's number
_MAX_ARGUMENT = 131_072  # Linux's own limit


class HiddenArgumentsError(OSError):
    """The program couldn't be held at its start; one line."""


def reveal(pid: int, variables: Mapping[str, str]) -> None:
    """Wait until child `pid`, which lets itself be traced, is at its exec; then replace its arguments and let it go.

    Call it from the thread that started the child.

    Args:
        variables: placeholder → name of the environment variable that holds the real argument.

    Raises:
        HiddenArgumentsError: the child has ended, or doesn't let itself be held.
    """
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    # It is asked how the child is, rather than waited for: gevent takes what waitpid would tell.
    while (state := _state(pid)) not in ENDED:
        if state == HELD:
            information = ctypes.create_string_buffer(_SIGNAL_INFORMATION)
            ptrace(PTRACE_GETSIGINFO, pid, None, ctypes.addressof(information))
            (number,) = struct.unpack_from("<i", information)
            if number == signal.SIGTRAP:
                break
            ptrace(PTRACE_CONT, pid, None, number)
        time.sleep(POLL_S)
    else:
        raise HiddenArgumentsError("the program ended before its start")
    try:
        _replace(pid, variables)
    finally:
        ptrace(PTRACE_DETACH, pid, None, None)


def _state(pid: int) -> str:
    """The letter that Linux has for it; that of an ended process also where somebody has taken its exit status."""
    try:
        return stat_fields(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return ENDED[0]


def _replace(pid: int, variables: Mapping[str, str]) -> None:
    stack = int(stat_fields(pid)[_START_STACK])
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        (count,) = _read(memory, stack, 1)
        arguments = _read(memory, stack + _POINTER, count)
        places: dict[str, int] = {}
        address = stack + _POINTER * (count + 2)  # after the null pointer that ends argv
        while (pointer := _read(memory, address, 1)[0]) != 0:
            name, _, _ = _text(memory, pointer).partition("=")
            places[name] = pointer + len(name.encode()) + 1
            address += _POINTER
        for index, pointer in enumerate(arguments):
            variable = variables.get(_text(memory, pointer))
            if variable is not None:
                memory.seek(stack + _POINTER * (index + 1))
                memory.write(struct.pack("<Q", places[variable]))


def _read(memory: BinaryIO, address: int, count: int) -> tuple[int, ...]:
    memory.seek(address)
    return struct.unpack(f"<{count}Q", memory.read(_POINTER * count))


def _text(memory: BinaryIO, address: int) -> str:
    found = b""
    while b"\0" not in found and len(found) < _MAX_ARGUMENT:
        memory.seek(address + len(found))
        size = 4096 - (address + len(found)) % 4096  # to the end of the page: the next may not exist
        found += memory.read(size)
    return found.partition(b"\0")[0].decode(errors="surrogateescape")
