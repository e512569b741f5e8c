"""Many UDP datagrams with one system call, either way: UDP_SEGMENT and UDP_GRO.

Data flow: tests/e2e -> [support.udp_batches] -> sockets inside the sites;  support.lossy -> [..] -> the wire
Source: udp(7), Linux Documentation/networking/segmentation-offloads.rst, include/uapi/linux/udp.h.
"""

import socket
import struct
from collections.abc import Iterator, Sequence

_UDP_SEGMENT = 103
_UDP_GRO = 104
_SEGMENT = struct.Struct("=H")
_SIZE = struct.Struct("=i")
_SEGMENTS_MAX = 63  # 64 before Linux 6.9, and some kernels count the header
_BYTES_MAX = 65_000
_ANCILLARY_BYTES = 64


def can_send_segmented() -> bool:
    """Whether this kernel has UDP_SEGMENT (Linux 4.18)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)
        except OSError:
            return False
    return True


def send_segmented(end: socket.socket, content: bytes, size: int) -> None:
    """Send `content` to whom `end` is connected to, in datagrams of `size` bytes, the last perhaps shorter.

    With one call: at most 63 datagrams and 65,000 bytes. Raises OSError.
    """
    end.sendmsg([content], [(socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(size))])


def receive_batches(end: socket.socket) -> None:
    """Let the kernel join datagrams for `receive`, if it can (Linux 5.0)."""
    try:
        end.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
    except OSError:
        return


def receive(end: socket.socket, memory: memoryview) -> list[memoryview]:
    """The datagrams of one call, which stay in `memory` (64 KiB) until the next. Raises OSError if none waits."""
    length, ancillary, _, _ = end.recvmsg_into([memory], _ANCILLARY_BYTES)
    size = next(
        (
            _SIZE.unpack(data)[0]
            for level, kind, data in ancillary
            if (level, kind) == (socket.IPPROTO_UDP, _UDP_GRO)
        ),
        length,
    )
    return [memory[at : min(at + size, length)] for at in range(0, length, size)] if size else [memory[:0]]


def send_in_batches(end: socket.socket, datagrams: Sequence[memoryview]) -> None:
    """Send them to whom `end` is connected to, in order, with few calls. Raises OSError."""
    for size, run in _runs(datagrams):
        if size:
            end.sendmsg(run, [(socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(size))])
        else:
            end.send(run[0])


def _runs(datagrams: Sequence[memoryview]) -> Iterator[tuple[int, Sequence[memoryview]]]:
    """Parts that are of one size, but for a last one that is shorter; with that size, or 0 for a single one."""
    start = 0
    while start < len(datagrams):
        size = len(datagrams[start])
        last = min(len(datagrams), start + (min(_SEGMENTS_MAX, _BYTES_MAX // size) if size else 1))
        end = start + 1
        while end < last and len(datagrams[end - 1]) == size and 0 < len(datagrams[end]) <= size:
            end += 1
        yield (size if end - start > 1 else 0), datagrams[start:end]
        start = end
