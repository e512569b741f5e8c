"""What a child is given: `descriptors` finds all that is open in it, and nothing that only looks like it."""

import ast
import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from nebula_mp.config.model import DrainMode, LoggingConfig, Offloads
from nebula_mp.datapath.api import CONTROL, ReaderMemory, RingFds, UpcallLimits
from nebula_mp.shm import Region
from nebula_mp.shm_table import WORKERS_MAX
from nebula_mp.workers.parts import (
    ControlParts,
    Parts,
    ReaderParts,
    Role,
    ServicesParts,
    TableFds,
    WriterParts,
    descriptors,
    open_lock,
    seal_lock,
    stranger_lock,
    upcall_lock,
)
from tests.workers.control_rig import Rig, checked, config

KINDS: dict[Role, type[Parts]] = {
    Role.CONTROL: ControlParts,
    Role.SERVICES: ServicesParts,
    Role.READER: ReaderParts,
    Role.WRITER: WriterParts,
}


class Maker:
    """Makes parts from their annotations as they are written: a `Fd` is a descriptor, an `int` is a number.

    No two numbers are the same, and those that are descriptors are noted.
    """

    def __init__(self) -> None:
        self.made: set[int] = set()
        self._last = 100

    def number(self) -> int:
        self._last += 1
        return self._last

    def descriptor(self) -> int:
        made = self.number()
        self.made.add(made)
        return made

    def parts(self, kind: type) -> Any:
        written = annotations(kind)
        values = {field.name: self.value(kind, field.name, written[field.name]) for field in fields(kind)}
        return kind(**values)

    def value(self, kind: type, name: str, annotation: str) -> object:
        # The data path does not know the word: all its numbers are descriptors but the worker's own.
        if kind is ReaderMemory and name != "worker":
            annotation = annotation.replace("int", "Fd").replace("dict[Fd,", "dict[int,")
        match annotation:
            case "Fd":
                return self.descriptor()
            case "tuple[Fd, ...]":
                return (self.descriptor(), self.descriptor())
            case "RingFds":
                return self.ring()
            case "tuple[RingFds, ...]":
                return (self.ring(), self.ring())
            case "dict[int, Fd]":
                return {self.number(): self.descriptor()}
            case "dict[int, RingFds]":
                return {self.number(): self.ring()}
            case "tuple[tuple[str, Fd], ...]":
                return (("reader/0", self.descriptor()), ("writer/0", self.descriptor()))
            case "TableFds":
                return self.parts(TableFds)
            case "ReaderMemory":
                return self.parts(ReaderMemory)
            case "Checked":
                return checked(self.descriptor(), config())
            case "int":
                return self.number()
            case "tuple[int, ...]":
                return (self.number(), self.number())
            case _:
                return OTHERS[annotation]  # a new kind of field has to be thought about here

    def ring(self) -> RingFds:
        return RingFds(self.descriptor(), self.descriptor())


OTHERS: dict[str, object] = {
    "Role": Role.READER,
    "str": "nebula1",
    "bool": True,
    "LoggingConfig": LoggingConfig(),
    "DrainMode": DrainMode.AUTO,
    "Offloads": Offloads(),
    "UpcallLimits": UpcallLimits(),
    "tuple[IPNetwork, ...]": (ip_network("10.42.0.0/24"),),
}


def annotations(kind: type) -> dict[str, str]:
    """Annotations of a class and those above it, as they stand in the source."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(each)).body
        assert isinstance(definition, ast.ClassDef)
        found |= {
            line.target.id: ast.unparse(line.annotation)
            for line in definition.body
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        }
    return found


@pytest.mark.parametrize("role", Role)
def test_every_descriptor_of_a_role_is_found_once_and_no_other_number(role: Role) -> None:
    maker = Maker()
    parts = maker.parts(KINDS[role])

    found = list(descriptors(parts))

    assert len(maker.made) > 5
    assert sorted(found) == sorted(maker.made)


def test_what_is_not_there_is_no_descriptor() -> None:
    parts = Maker().parts(ReaderParts)

    without = replace(parts, schedstat=-1)

    assert set(descriptors(parts)) - set(descriptors(without)) == {parts.schedstat}
    assert -1 not in set(descriptors(without))


# ---- as the supervisor makes them ----


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as undo:
        yield Rig(undo)


@pytest.mark.parametrize("role", Role)
def test_what_a_role_is_given_is_open(rig: Rig, role: Role) -> None:
    given = [each for each in descriptors(rig._parts(role)) if each >= 0]

    assert all(os.fstat(each) for each in given)


def given(rig: Rig, role: Role, number: int = 0) -> set[int]:
    return set(descriptors(rig._parts(role, number)))


def test_only_control_is_given_the_private_key(rig: Rig) -> None:
    assert [role for role in Role if rig.key in given(rig, role)] == [Role.CONTROL]


def may_read(rig: Rig, role: Role, region: Region) -> bool:
    return not {region.descriptor, region.read_only}.isdisjoint(given(rig, role))


def may_write(rig: Rig, role: Role, region: Region) -> bool:
    return region.descriptor in given(rig, role)


def test_tunnel_keys_are_read_by_readers_and_control_and_written_by_control_alone(rig: Rig) -> None:
    keys = rig.memory.tables.keys

    assert {role for role in Role if may_read(rig, role, keys)} == {Role.CONTROL, Role.READER}
    assert {role for role in Role if may_write(rig, role, keys)} == {Role.CONTROL}


def test_services_have_nothing_of_the_tables_and_nothing_of_the_rings(rig: Rig) -> None:
    names = {Path(f"/proc/self/fd/{each}").readlink().name for each in given(rig, Role.SERVICES) if each >= 0}

    shared = {name for name in names if name.startswith("memfd:nebula-mp:")}
    assert shared == {"memfd:nebula-mp:stats services (deleted)"}


def test_no_process_may_write_the_page_of_another(rig: Rig) -> None:
    pages = rig.memory._pages
    processes = [
        ("control", Role.CONTROL, 0),
        ("services", Role.SERVICES, 0),
        *((f"{role}/{number}", role, number) for role in (Role.READER, Role.WRITER) for number in (0, 1)),
    ]

    for name, role, number in processes:
        writable = {other for other, page in pages.items() if page.descriptor in given(rig, role, number)}
        assert writable == {name}


# ---- names and locks ----


def test_a_process_is_called_by_its_role_and_a_worker_by_its_number_too(rig: Rig) -> None:
    names = []
    for role in Role:
        parts = rig._parts(role, 1)
        assert isinstance(parts, Parts)
        names.append(parts.name)

    assert names == ["control", "services", "reader/1", "writer/1"]


def test_no_two_rings_have_a_lock_in_common() -> None:
    workers = range(WORKERS_MAX)
    locks = [lock(worker) for lock in (seal_lock, open_lock, upcall_lock) for worker in workers]
    locks += [stranger_lock(reader, owner) for reader in (*workers, CONTROL) for owner in workers]

    assert len(set(locks)) == len(locks)
