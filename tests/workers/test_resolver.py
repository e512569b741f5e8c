"""Names in `static_host_map`: looked up again and again, and never forgotten for a failure."""

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address

import pytest

from nebula_mp.config.model import HostPort, LogLevel, StaticMapConfig
from nebula_mp.newtypes import IPAddress, Seconds, UdpAddr
from nebula_mp.workers import resolver as module
from nebula_mp.workers.loop import run
from nebula_mp.workers.resolver import Remotes, Resolver

PEER = ip_address("10.42.0.2")
FAST = StaticMapConfig(cadence=Seconds(0.01), lookup_timeout=Seconds(5))
Answer = Sequence[str] | Exception


def host_map(*entries: str) -> Mapping[IPAddress, Sequence[HostPort]]:
    split = (entry.rsplit(":", 1) for entry in entries)
    return {PEER: [HostPort(host=host, port=int(port)) for host, port in split]}


def udp(*addresses: str) -> tuple[UdpAddr, ...]:
    return tuple(UdpAddr(ip_address(text), 4242) for text in addresses)


class Names:
    """Stands in for the resolver of the system: each look-up takes the next answer, the last one stays."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.families: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def getaddrinfo(self, name: str, port: None, *, family: int, type: int) -> list[object]:  # noqa: A002
        self.families.append(family)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.gate.wait(5)
        if isinstance(answer, Exception):
            raise answer
        return [(family, type, 17, "", (text, 0)) for text in answer]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LogLevel, str, Mapping[str, object]]]:
    lines: list[tuple[LogLevel, str, Mapping[str, object]]] = []
    monkeypatch.setattr(
        module, "write", lambda level, message, fields: lines.append((level, message, fields))
    )
    return lines


def watch(
    names: Names,
    monkeypatch: pytest.MonkeyPatch,
    until: Callable[[list[Remotes]], bool],
    *,
    config: StaticMapConfig = FAST,
    entries: Sequence[str] = ("name.example:4242",),
    known: Mapping[str, tuple[IPAddress, ...]] | None = None,
) -> list[Sequence[UdpAddr]]:
    """Run a resolver until the reports satisfy `until`; what it reported for PEER, each time."""
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    reports: list[Remotes] = []

    async def main() -> int:
        resolver = Resolver(host_map(*entries), config, reports.append, known or {})
        resolver.start()
        async with asyncio.timeout(5):
            while not until(reports):  # noqa: ASYNC110 - it looks at more than one event
                await asyncio.sleep(0.005)
        resolver.close()
        return 0

    assert run(main) == 0
    return [report[PEER] for report in reports]


def test_literals_are_known_at_once_in_the_order_of_the_config_and_only_once() -> None:
    entries = host_map("192.0.2.9:1", "[2001:db8::1]:2", "2001:db8::2:3", "192.0.2.1:4", "192.0.2.9:1")
    resolver = Resolver(entries, StaticMapConfig(), lambda _: None)

    assert [str(address) for address in resolver.remotes()[PEER]] == [
        "192.0.2.9:1", "[2001:db8::1]:2", "[2001:db8::2]:3", "192.0.2.1:4",
    ]  # fmt: skip


def test_a_map_of_literals_is_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(["192.0.2.1"])
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)

    async def main() -> int:
        resolver = Resolver(host_map("192.0.2.9:1"), FAST, lambda _: None)
        resolver.start()
        await asyncio.sleep(0.05)
        resolver.close()
        return 0

    run(main)

    assert names.families == []


def test_a_name_is_reported_when_it_resolves_and_again_only_when_the_answer_changes(
    monkeypatch: pytest.MonkeyPatch, said: list[tuple[LogLevel, str, Mapping[str, object]]]
) -> None:
    names = Names(
        ["192.0.2.1"], ["192.0.2.1"], ["192.0.2.2", "192.0.2.1"], ["192.0.2.1", "192.0.2.2"], ["192.0.2.3"]
    )

    reports = watch(names, monkeypatch, lambda reports: len(reports) == 3)

    assert reports == [udp("192.0.2.1"), udp("192.0.2.2", "192.0.2.1"), udp("192.0.2.3")]
    assert [message for _, message, _ in said] == ["DNS results changed for host list"] * 3


def test_a_failure_keeps_the_last_addresses_and_is_said(
    monkeypatch: pytest.MonkeyPatch, said: list[tuple[LogLevel, str, Mapping[str, object]]]
) -> None:
    names = Names(["192.0.2.1"], socket.gaierror(-3, "try again"), ["192.0.2.2"])

    reports = watch(names, monkeypatch, lambda reports: len(reports) == 2)

    assert reports == [udp("192.0.2.1"), udp("192.0.2.2")]
    level, message, fields = said[1]
    assert (level, message) == (LogLevel.ERROR, "DNS resolution failed for static_map host")
    assert fields["hostname"] == "name.example"
    assert fields["kept"] == (ip_address("192.0.2.1"),)


def test_literals_stand_beside_what_a_name_gave(monkeypatch: pytest.MonkeyPatch, said: object) -> None:
    reports = watch(
        Names(["192.0.2.1", "192.0.2.7"]),
        monkeypatch,
        lambda reports: len(reports) == 1,
        entries=("192.0.2.7:4242", "name.example:4242"),
    )

    assert reports == [udp("192.0.2.7", "192.0.2.1")]


@pytest.mark.parametrize(
    ("network", "family"),
    [("ip4", socket.AF_INET), ("ip6", socket.AF_INET6), ("ip", socket.AF_UNSPEC)],
)
def test_the_family_asked_for_is_that_of_the_config(
    network: str, family: int, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    names = Names(["192.0.2.1"])
    config = StaticMapConfig(network=network, cadence=Seconds(5))  # type: ignore[arg-type]

    watch(names, monkeypatch, bool, config=config)

    assert names.families == [family]


def test_a_late_answer_is_a_failure_first_and_still_counts_when_it_comes(
    monkeypatch: pytest.MonkeyPatch, said: list[tuple[LogLevel, str, Mapping[str, object]]]
) -> None:
    names = Names(["192.0.2.1"])
    names.gate.clear()

    def until(reports: list[Remotes]) -> bool:
        if said:
            names.gate.set()
        return bool(reports)

    config = StaticMapConfig(cadence=Seconds(5), lookup_timeout=Seconds(0.02))
    reports = watch(names, monkeypatch, until, config=config)

    assert reports == [udp("192.0.2.1")]
    assert said[0][2]["error"] == "no answer within 0.02 s"


def test_one_look_up_per_name_is_under_way_however_slow_it_is(
    monkeypatch: pytest.MonkeyPatch, said: list[tuple[LogLevel, str, Mapping[str, object]]]
) -> None:
    names = Names(["192.0.2.1"])
    names.gate.clear()
    waited = 0

    def until(_: object) -> bool:
        nonlocal waited
        waited += 1
        return waited > 20

    watch(
        names,
        monkeypatch,
        until,
        config=StaticMapConfig(cadence=Seconds(0.001), lookup_timeout=Seconds(0.001)),
    )
    names.gate.set()

    assert len(names.families) == 1


def test_what_was_known_before_a_reload_is_known_after_it() -> None:
    known = {"name.example": (ip_address("192.0.2.1"),)}

    resolver = Resolver(host_map("name.example:4242"), StaticMapConfig(), lambda _: None, known)

    assert resolver.remotes()[PEER] == udp("192.0.2.1")
    assert resolver.found == known
