"""Somebody records a tunnel's datagrams on the wire and sends them again, from many ports: nothing comes of it.

The kernel spreads datagrams over sockets by their ports; ours must reach the one window of their tunnel.
"""

import itertools
import socket
import time
from functools import partial
from typing import Self

import pytest

from nebula_mp.newtypes import UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, Header, MessageType
from tests.e2e.conftest import MakePair
from tests.support.datagrams import Flows
from tests.support.netns import Datagram, Site, entered, wait_until
from tests.support.nodes import DEVICE, PORT, Node, Pair, Variant
from tests.support.peers import OURS
from tests.support.traffic import Endpoint, check_tcp, ping

pytestmark = pytest.mark.e2e

RECORDED = 1_000
COPIES = 100_000
SOURCE_PORTS = 64
LOG_LINES_MAX = 100
_BATCH = 2_000  # fits the socket's buffer: what the kernel drops proves nothing about us
_PATIENT = {"listen": {"read_buffer": 16 << 20, "write_buffer": 16 << 20}}
_COUNTED_WITHIN_S = 30.0
_ETH_P_ALL = 0x0003
_PACKET_HOST = 0
_REFUSALS = ("drop.replay", "drop.old")


@pytest.mark.parametrize("peer", ["1.11.0", OURS])
def test_of_a_hundred_thousand_replays_from_64_ports_none_is_delivered(
    make_pair: MakePair, peer: str
) -> None:
    pair = make_pair(peer, Variant("v1-25519"))
    for node in pair.nodes:
        node.workers = 4
        node.extra = _PATIENT
    pair.introduce(pair.b)
    pair.start()
    ping(*_ends(pair, pair.b))
    recorded = _record_a_tunnel(pair)
    before, said_before = pair.a.call("status"), len(pair.a.log.splitlines())

    with _Delivered(pair.a.site) as delivered, pair.wire.record() as recorder:
        _replay(pair, recorded, before["stats"])
        unexpected = delivered.count()
    after = pair.a.call("status")

    assert unexpected == 0
    changed = {name: amount for name in after["stats"] if (amount := _grown(before, after, name))}
    assert sum(changed.get(name, 0) for name in _REFUSALS) + _kernel_drops(changed) == COPIES, changed
    other_drops = {name for name in changed if name.startswith("drop.")} - set(_REFUSALS)
    assert not other_drops, changed
    assert [host["remote"] for host in after["hosts"]] == [host["remote"] for host in before["hosts"]]
    assert {sent.destination for sent in recorder.sent_by(pair.a.site)} <= {_at(pair.b)}
    assert len(pair.a.log.splitlines()) - said_before < LOG_LINES_MAX
    ping(*_ends(pair, pair.a))
    check_tcp(*_ends(pair, pair.b))


def _ends(pair: Pair, source: Node) -> tuple[Endpoint, Endpoint]:
    there = pair.other(source)
    return Endpoint(source.site, source.host.address(4)), Endpoint(there.site, there.host.address(4))


def _at(node: Node) -> UdpAddr:
    return UdpAddr(node.site.addresses[4], PORT)


def _record_a_tunnel(pair: Pair) -> list[Datagram]:
    """What the peer sealed for us and we have opened: a little of it old, most within the window."""
    with (
        pair.wire.record() as recorder,
        Flows(*_ends(pair, pair.b), count=8, burst=5, both_ways=False) as flows,
    ):
        wait_until(lambda: flows.arrived > RECORDED, "enough datagrams", within_s=20)
        flows.stop()
    sealed = [sent for sent in recorder.sent_by(pair.b.site) if _is_data(sent)]
    assert len(sealed) >= RECORDED
    assert flows.arrived == flows.sent
    return sealed


def _is_data(datagram: Datagram) -> bool:
    payload = datagram.payload
    return len(payload) > HEADER_BYTES and Header.parse(payload).type is MessageType.MESSAGE


def _replay(pair: Pair, recorded: list[Datagram], before: dict[str, int]) -> None:
    """Send `COPIES` from `SOURCE_PORTS` ports, half of them the peer's address, in batches that are counted."""
    addresses = (pair.b.site.addresses[4], pair.wire.a.gateway(4))
    sources = [UdpAddr(addresses[number % 2], 20_000 + number) for number in range(SOURCE_PORTS - 1)]
    sources.append(_at(pair.b))
    forger = pair.wire.forger()
    copies = zip(itertools.cycle(recorded), itertools.cycle(sources), strict=False)
    for sent in range(_BATCH, COPIES + 1, _BATCH):
        for datagram, source in itertools.islice(copies, _BATCH):
            forger.send(datagram.payload, source, _at(pair.a))
        counted = partial(_has_refused, pair.a, sent, before)
        wait_until(counted, f"{sent} replays are counted", within_s=_COUNTED_WITHIN_S)
    forger.close()


def _has_refused(node: Node, amount: int, before: dict[str, int]) -> bool:
    grown = {name: now - before.get(name, 0) for name, now in node.stats().items()}
    return sum(grown.get(name, 0) for name in _REFUSALS) + _kernel_drops(grown) >= amount


def _kernel_drops(stats: dict[str, int]) -> int:
    return sum(
        amount for name, amount in stats.items() if name.startswith("udp.") and name.endswith(".drops")
    )


def _grown(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]], name: str) -> int:
    return after["stats"][name] - before["stats"].get(name, 0)


class _Delivered:
    """Counts the packets that come out of the overlay device; a context manager."""

    def __init__(self, site: Site) -> None:
        with entered(site.space):
            self._capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._capture.setblocking(False)
        self._capture.bind((DEVICE, _ETH_P_ALL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.close()

    def count(self) -> int:
        """Packets since the start, for as long as there are any."""
        found = 0
        time.sleep(0.2)  # what waits in a ring arrives within milliseconds
        while True:
            try:
                _, address = self._capture.recvfrom(2048)
            except BlockingIOError:
                return found
            found += address[2] == _PACKET_HOST
