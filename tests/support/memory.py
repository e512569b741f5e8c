"""Where in the memory of running processes a secret stands.

Data flow: /proc/<pid>/maps, /proc/<pid>/mem -> [support.memory] -> tests/e2e
Needs root. The processes are not stopped: scan them while they have nothing to do. Of shared memory, most of
which was never written, only the written parts are read: reading the rest would make it use memory.
Source: proc_pid_mem(5), proc_pid_maps(5), proc_pid_map_files(5), lseek(2).
"""

import errno
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from nebula_mp.privileges import MemoryMapping, inspect_process

_PIECE_BYTES = 16 << 20
_PAGE_BYTES = 4096
_KERNELS_OWN = ("[vvar", "[vsyscall]")


class Find(NamedTuple):
    """One occurrence of a secret."""

    what: str
    address: int
    where: str  # the mapping, as in /proc


class Scan(NamedTuple):
    """What was found, how much memory was looked at, and which mappings the kernel did not show."""

    finds: list[Find]
    scanned_bytes: int
    unread: list[str]


def scan(pid: int, secrets: Mapping[str, bytes]) -> Scan:
    """Look for each of `secrets` in every readable mapping of the process."""
    assert all(len(secret) >= 16 for secret in secrets.values()), "found by chance"
    finds: set[Find] = set()
    scanned, unread = 0, []
    overlap = max(map(len, secrets.values())) - 1
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for mapping in inspect_process(pid).mappings:
            if "r" not in mapping.permissions or mapping.path.startswith(_KERNELS_OWN):
                continue
            where = f"{mapping.permissions} {mapping.path}"
            try:
                for begin, end in _written(pid, mapping):
                    for start, piece in _pieces(memory, begin, end, overlap):
                        scanned += len(piece)
                        for what, secret in secrets.items():
                            finds.update(Find(what, start + at, where) for at in _occurrences(piece, secret))
            except OSError:
                unread.append(where)
    return Scan(sorted(finds, key=lambda find: find.address), scanned, unread)


def _written(pid: int, mapping: MemoryMapping) -> Iterator[tuple[int, int]]:
    """The parts of a mapping that hold anything, as addresses: of a memfd those that were ever written."""
    if not mapping.path.startswith("/memfd:"):
        yield mapping.start, mapping.end
        return
    path = Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        assert -size % _PAGE_BYTES + size == mapping.end - mapping.start, (
            "mapped from its beginning to its end"
        )
        end = 0
        while end < size:
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but a hole is left
                    raise
                return
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            yield mapping.start + begin, mapping.start + end


def _pieces(memory: FileIO, begin: int, end: int, overlap: int) -> Iterator[tuple[int, bytes]]:
    """What is there in pieces that overlap, so that no secret is cut in two. Raises OSError."""
    while begin < end:
        memory.seek(begin)
        piece = memory.read(min(_PIECE_BYTES, end - begin))
        if not piece:
            raise OSError
        yield begin, piece
        reached = begin + len(piece)
        begin = end if reached == end else reached - overlap


def _occurrences(piece: bytes, secret: bytes) -> Iterator[int]:
    at = piece.find(secret)
    while at >= 0:
        yield at
        at = piece.find(secret, at + 1)
