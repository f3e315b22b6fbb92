"""Every address that a process and its children name to the kernel, whichever library does it: by seccomp's notices.

Samples of /proc miss a datagram, and hooks in Python miss what native code does; a filter (seccomp_unotify(2), Linux
5.5) has the kernel stop each call that could reach anybody until it was looked at. The filter is on one thread of this
process, and what that thread starts inherits it.
"""

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import platform
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest

Result = TypeVar("Result")

# By machine: seccomp itself, how the kernel calls the architecture, and the calls that are looked at.
_MACHINES = {
    "x86_64": (317, 0xC000003E, {42: "connect", 44: "sendto", 46: "sendmsg", 50: "listen", 307: "sendmmsg"}),
    "aarch64": (277, 0xC00000B7, {203: "connect", 206: "sendto", 211: "sendmsg", 201: "listen", 269: "sendmmsg"}),
}
_RING = 425
"""io_uring_setup on every machine: what goes through a ring is not seen, so the ring itself is reported."""
_SET_MODE_FILTER, _NEW_LISTENER, _NO_NEW_PRIVILEGES = 1, 8, 38
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_NOTIFY, _ALLOW, _KILL = 0x7FC00000, 0x7FFF0000, 0x80000000
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_NOTICE, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_MESSAGE = 64
"""Bytes of an entry that sendmmsg(2) takes."""

needs_notices = pytest.mark.skipif(
    not hasattr(os, "pidfd_open") or platform.machine() not in _MACHINES, reason="needs Linux on x86-64 or aarch64"
)


class Named(NamedTuple):
    """Somebody that a process wanted to reach; with ``listen`` nobody, but it wanted to be reached."""

    call: str
    host: str
    port: int


def watched(seen: set[Named], start: Callable[[], Result]) -> Result:
    """Call ``start``; what that starts, and all its children, add to ``seen`` whom they name as long as they run."""
    outcome: list[Result] = []
    listener: list[int] = []
    ready = threading.Event()

    def begin() -> None:
        try:
            listener.append(_filtered())
        finally:
            ready.set()
        outcome.append(start())

    beginner = threading.Thread(target=begin, daemon=True)
    beginner.start()
    ready.wait()
    assert listener, "this kernel does not take the filter"
    threading.Thread(target=_look, args=(listener[0], seen), daemon=True).start()
    beginner.join()
    (result,) = outcome
    return result


def _filtered() -> int:
    """Put this thread under the filter; what its notices are read from."""
    seccomp, architecture, calls = _MACHINES[platform.machine()]
    numbers = [*calls, _RING]

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    # Of the call's description: the architecture is at offset 4, the number at 0.
    program = [step(_LOAD, 4), step(_EQUAL, architecture, 1, 0), step(_RETURN, _KILL), step(_LOAD, 0)]
    program += [step(_EQUAL, number, len(numbers) - at, 0) for at, number in enumerate(numbers)]
    program += [step(_RETURN, _ALLOW), step(_RETURN, _NOTIFY)]
    code = ctypes.create_string_buffer(b"".join(program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    number: int = libc.syscall(seccomp, _SET_MODE_FILTER, _NEW_LISTENER, described)
    if number < 0:
        raise OSError(ctypes.get_errno(), "SECCOMP_SET_MODE_FILTER")
    return number


def _look(listener: int, seen: set[Named]) -> None:
    """Look at calls and let each go on, until nobody is left under the filter."""
    _, _, calls = _MACHINES[platform.machine()]
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    try:
        while not poll.poll()[0][1] & select.POLLHUP:
            notice = bytearray(_NOTICE.size)
            # Who was stopped may have been killed meanwhile.
            with contextlib.suppress(OSError):
                fcntl.ioctl(listener, _RECEIVE, notice)
                token, process, _, number, _, _, *arguments = _NOTICE.unpack(notice)
                call = calls.get(number, "io_uring_setup")
                seen.update(Named(call, *one) for one in _named(process, call, arguments))
                fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(token, 0, 0, _CONTINUE)))
    finally:
        os.close(listener)


def _named(process: int, call: str, arguments: list[int]) -> list[tuple[str, int]]:
    """Whom a call names."""
    with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:

        def read(at: int, size: int) -> bytes:
            memory.seek(at)
            return memory.read(size)

        match call:
            case "listen":
                return [("anybody", 0)]
            case "connect":
                places = [(arguments[1], arguments[2])]
            case "sendto":
                places = [(arguments[4], arguments[5])]
            case "sendmsg":
                places = [struct.unpack("=QI", read(arguments[1], 12))]
            case "sendmmsg":
                every = range(arguments[1], arguments[1] + arguments[2] * _MESSAGE, _MESSAGE)
                places = [struct.unpack("=QI", read(at, 12)) for at in every]
            case _:
                return [("what goes through it is not seen", 0)]
        found = [_address(read(at, size & 0xFFFF)) for at, size in places if at]
    return [one for one in found if one is not None]


def _address(data: bytes) -> tuple[str, int] | None:
    """A socket's address; None where it is none (connect(2) takes the peer away so)."""
    (family,) = struct.unpack_from("=H", data)
    match family:
        case socket.AF_UNSPEC:
            return None
        case socket.AF_INET:
            return str(ipaddress.IPv4Address(data[4:8])), int.from_bytes(data[2:4], "big")
        case socket.AF_INET6:
            return str(ipaddress.IPv6Address(data[8:24])), int.from_bytes(data[2:4], "big")
        case socket.AF_UNIX:
            return data[2:].partition(b"\0")[0].decode(errors="replace") or "an abstract name", 0
    return f"family {family}", 0
