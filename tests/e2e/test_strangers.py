"""Somebody who has seen the wire sends us handshakes; the tunnel that is there does not notice.

A stage 1 proves nothing: its certificate travels in clear. The three kinds are those an onlooker can send:
the certificate copied under a fresh key, the whole message again, and noise. Each is sent 10,000 times,
half under the peer's address and half under the stranger's own.
"""

import random
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pytest

from nebula_mp.newtypes import UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, Header, MessageType
from tests.e2e.conftest import MakePair
from tests.support import strangers
from tests.support.netns import Datagram, Wire, wait_until
from tests.support.nodes import Node, Pair, Variant
from tests.support.traffic import Endpoint, PingTrain, check_tcp, ping

pytestmark = pytest.mark.e2e

MESSAGES = 10_000
_PER_SECOND = 1_000
_BURST = 10
_STRANGER_PORT = 5555
_SEED = 5
# The kernel drops what does not fit while a busy machine runs other programs; that is no stranger's doing.
_PATIENT = {"listen": {"read_buffer": 8 << 20, "write_buffer": 8 << 20}}
_WINDOW_BYTES = 16384  # so that a lost ping was lost to the flood, not to a full queue of our own traffic

Forge = Callable[[bytes, random.Random], bytes]


def _replayed(stage1: bytes, _: random.Random) -> bytes:
    return stage1


@pytest.mark.parametrize(
    ("peer", "forge"),
    [
        pytest.param("1.11.0", strangers.copied, id="1.11.0-copied"),
        pytest.param("1.11.0", _replayed, id="1.11.0-replayed"),
        pytest.param("1.11.0", strangers.random, id="1.11.0-random"),
        pytest.param("1.6.1", strangers.copied, id="1.6.1-copied"),
    ],
)
def test_ten_thousand_handshakes_of_a_stranger_leave_a_live_tunnel_undisturbed(
    make_pair: MakePair, peer: str, forge: Forge
) -> None:
    pair = make_pair(peer, Variant("v1-25519"))
    for node in pair.nodes:
        node.extra = _PATIENT
    pair.introduce(pair.b)
    pair.start()
    outward, inward = _ends(pair, pair.a), _ends(pair, pair.b)
    with pair.wire.record() as recorder:
        ping(*inward)
        wait_until(lambda: _indexes(pair, pair.a, recorder.datagrams), "an answer on the wire", within_s=2)
    stage1 = recorder.datagrams[0]
    before = _indexes(pair, pair.a, recorder.datagrams)

    transfers = 0
    with PingTrain(*outward) as going, PingTrain(*inward) as coming, pair.wire.record() as recorder:
        with _Flood(pair.wire, stage1, forge) as flood:
            while flood.is_alive():
                check_tcp(*(outward if transfers % 2 else inward), window_bytes=_WINDOW_BYTES)
                transfers += 1
        ended = time.monotonic()
        going.wait_for_answer(since=ended, within_s=1)
        coming.wait_for_answer(since=ended, within_s=1)

    assert flood.sent == MESSAGES
    assert (going.lost, coming.lost) == ([], []), f"pings lost while {transfers} transfers went well"
    assert _indexes(pair, pair.a, recorder.datagrams) == before, "we send in another tunnel than before"
    assert _indexes(pair, pair.b, recorder.datagrams) == _indexes(pair, pair.b, recorder.datagrams[:1000])


def _ends(pair: Pair, source: Node) -> tuple[Endpoint, Endpoint]:
    destination = pair.other(source)
    return Endpoint(source.site, source.host.address(4)), Endpoint(
        destination.site, destination.host.address(4)
    )


def _indexes(pair: Pair, sender: Node, datagrams: list[Datagram]) -> set[int]:
    """Remote indexes of the data the sender sent to its peer; data to anybody else fails the test."""
    found: set[int] = set()
    for datagram in datagrams[:]:
        if datagram.source.ip in sender.site.addresses.values() and len(datagram.payload) >= HEADER_BYTES:
            header = Header.parse(datagram.payload)
            if header.type is MessageType.MESSAGE:
                assert datagram.destination.ip in pair.other(sender).site.addresses.values()
                found.add(header.remote_index)
    return found


class _Flood(threading.Thread):
    """Sends the forged messages at a bounded rate, in bursts of ten, until all are sent or the block is left."""

    def __init__(self, wire: Wire, stage1: Datagram, forge: Forge) -> None:
        super().__init__(name="flood", daemon=True)
        self._forger = wire.forger()
        self._stage1 = stage1
        self._forge = forge
        self._own = UdpAddr(wire.a.gateway(4), _STRANGER_PORT)
        self._dice = random.Random(_SEED)
        self._ending = threading.Event()
        self.sent = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self.join()
        self._forger.close()

    def run(self) -> None:
        due = time.monotonic()
        while self.sent < MESSAGES and not self._ending.wait(max(0.0, due - time.monotonic())):
            for _ in range(_BURST):
                source = self._own if self.sent % 2 else self._stage1.source
                message = self._forge(self._stage1.payload, self._dice)
                self._forger.send(message, source, self._stage1.destination)
                self.sent += 1
            due += _BURST / _PER_SECOND
