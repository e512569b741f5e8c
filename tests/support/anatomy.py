"""What each process of the running program is, may and holds, as one row of a table.

Data flow: /proc -> privileges.inspect_process -> [support.anatomy] -> tests/e2e
Needs root. Knows how our shared memory is called; what a role may have of it is the tests' to say.
Source: proc(5), docs/architecture.md, "Shared memory".
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nebula_mp.privileges import Descriptor, ProcessFacts, capability_names, inspect_process

_MEMFD = re.compile(r"/memfd:nebula-mp:(.+) \(deleted\)")
_INODE_COLUMNS = {"udp": 9, "udp6": 9, "raw": 9, "raw6": 9, "tcp": 9, "unix": 6, "netlink": 9, "packet": 8}


@dataclass(frozen=True)
class Shared:
    """One shared region in one process: its name, and the most that descriptor or mapping allows."""

    name: str
    writable: bool


@dataclass(frozen=True)
class Anatomy:
    """One process, taken apart."""

    name: str
    facts: ProcessFacts
    kinds: Counter[str]  # of descriptors that are no shared memory
    files: tuple[str, ...]  # paths of descriptors that are none of the known kinds
    held: frozenset[Shared]  # by descriptor
    mapped: frozenset[Shared]

    @property
    def shared(self) -> frozenset[Shared]:
        """By descriptor or mapping: a descriptor can be mapped, and a mapping needs none."""
        return self.held | self.mapped

    def writable(self, prefix: str) -> list[str]:
        """Names of the regions it could write, of those whose name begins so."""
        return sorted({each.name for each in self.shared if each.writable and each.name.startswith(prefix)})

    def readable(self, prefix: str) -> list[str]:
        """Names of the regions it could read, of those whose name begins so."""
        return sorted({each.name for each in self.shared if each.name.startswith(prefix)})


def take_apart(name: str, pid: int) -> Anatomy:
    """Look at one process."""
    facts = inspect_process(pid)
    sockets = _sockets(pid)
    others = [each for each in facts.descriptors if not _MEMFD.fullmatch(each.target)]
    named = [(_kind(each, sockets), each) for each in others]
    return Anatomy(
        name=name,
        facts=facts,
        kinds=Counter(kind for kind, _ in named),
        files=tuple(each.target for kind, each in named if kind == "file"),
        held=frozenset(_shared((each.target, "w" in each.access) for each in facts.descriptors)),
        mapped=frozenset(_shared((each.path, "w" in each.permissions) for each in facts.mappings)),
    )


def _shared(found: Iterable[tuple[str, bool]]) -> Iterable[Shared]:
    for path, writable in found:
        if match := _MEMFD.fullmatch(path):
            yield Shared(match[1], writable)


def _kind(descriptor: Descriptor, sockets: dict[str, str]) -> str:
    target = descriptor.target
    if target.startswith("socket:"):
        return sockets.get(target, "socket of another kind")
    if target.startswith("anon_inode:"):
        return target.removeprefix("anon_inode:").strip("[]")
    if target.startswith("pipe:"):
        return f"pipe {descriptor.access}"
    return {"/dev/null": "null", "/dev/net/tun": "tun"}.get(target, "file")


def _sockets(pid: int) -> dict[str, str]:
    """Kind of every socket in the process's network, by what /proc/<pid>/fd shows."""
    found = {}
    for kind, column in _INODE_COLUMNS.items():
        table = Path(f"/proc/{pid}/net/{kind}")
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            found[f"socket:[{line.split()[column]}]"] = kind.removesuffix("6")
    return found


def table(processes: Sequence[Anatomy]) -> str:
    """One line for each process, and one for each region, with who may do what with it."""
    head = (
        "process",
        "uid",
        "capabilities",
        "bounding",
        "no_new_privs",
        "dumpable",
        "threads",
        "w+x",
        "descriptors",
    )
    rows = [head, *map(_row, processes)]
    names = [each.name for each in processes]
    regions = sorted({shared.name for each in processes for shared in each.shared})
    access = [("shared memory", *names)]
    access += [(region, *(_access(each, region) for each in processes)) for region in regions]
    return f"{_aligned(rows)}\n\n{_aligned(access)}"


def _row(each: Anatomy) -> tuple[str, ...]:
    facts = each.facts
    capabilities = ",".join(name.removeprefix("CAP_") for name in capability_names(facts.permitted))
    writable_code = sum(mapping.is_writable_and_executable for mapping in facts.mappings)
    descriptors = ", ".join(f"{amount} {kind}" for kind, amount in sorted(each.kinds.items()))
    shown = {None: "root", True: "yes", False: "no"}[facts.dumpable]
    return (
        each.name,
        str(facts.uids[1]),
        capabilities or "-",
        str(len(facts.bounding)),
        "yes" if facts.no_new_privs else "no",
        shown,
        str(facts.threads),
        str(writable_code),
        f"{descriptors}, {len(each.held)} shared",
    )


def _access(each: Anatomy, region: str) -> str:
    """`rw` or `r`, in capitals where it is mapped and not only held."""
    for shared, letter in ((each.mapped, str.upper), (each.held, str.lower)):
        found = [one.writable for one in shared if one.name == region]
        if found:
            return letter("rw" if any(found) else "r")
    return "-"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
