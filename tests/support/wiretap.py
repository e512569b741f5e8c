"""A process that watches the wire between the sites for as long as a test lasts, and reports in numbers.

Data flow: router's devices -> packet socket -> [support.wiretap] -> one JSON line -> Report -> tests/e2e
`netns.Recorder` keeps every datagram in the test's own process; this one keeps up with tens of thousands a
second because it keeps only a hash of each, of the latest one to two million. Knows the Nebula header and
nothing behind it.
Source: packet(7), RFC 768, RFC 791, RFC 8200, docs/wire-format.md.
"""

import json
import select
import socket
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from nebula_mp.wire.header import HEADER_BYTES, MessageType
from tests.support.companion import Companion
from tests.support.netns import Site, Wire
from tests.support.packet_tap import PacketTap, udp_payload_at

_BUFFER_BYTES = 128 << 20
_HEADER = struct.Struct("!BBHIQ")
_CLEAR = (MessageType.HANDSHAKE, MessageType.RECV_ERROR)  # their counters say nothing about a key
_CONTENTS_MAX = 1_000_000  # then they become the ones before, and those are forgotten
_END_WITHIN_S = 30.0


@dataclass(frozen=True)
class Report:
    """What was on the wire, by the address that sent it."""

    datagrams: Mapping[str, Mapping[str, int]]  # source address -> name of the message type -> how many
    sealed: Mapping[str, int]  # source address -> different (remote index, counter)
    resent: Mapping[str, int]  # source address -> the same bytes again
    clashes: Mapping[str, list[list[int]]]  # source address -> (remote index, counter) with two contents
    missed: int  # datagrams the kernel had no room to show us

    def count(self, site: Site, kind: MessageType) -> int:
        """How many datagrams of that type left the site."""
        found = (self.datagrams.get(str(address), {}) for address in site.addresses.values())
        return sum(each.get(kind.name, 0) for each in found)


class Watch:
    """What has been seen; no sockets. `handle` takes IP packets."""

    def __init__(self) -> None:
        self._datagrams: dict[bytes, Counter[int]] = {}
        self._contents: dict[tuple[bytes, int, int], int] = {}
        self._contents_before: dict[tuple[bytes, int, int], int] = {}
        self._sealed: Counter[bytes] = Counter()
        self._resent: Counter[bytes] = Counter()
        self._clashes: set[tuple[bytes, int, int]] = set()

    def handle(self, packet: bytes) -> None:
        """Take note of one IP packet; what is no UDP datagram with a Nebula header is passed over."""
        start = udp_payload_at(packet)
        if not start or len(packet) < start + HEADER_BYTES:
            return
        source = packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]
        first, _, _, index, counter = _HEADER.unpack_from(packet, start)
        kind = first & 15
        self._datagrams.setdefault(source, Counter())[kind] += 1
        if kind in _CLEAR:
            return
        key, content = (source, index, counter), hash(packet[start:])
        before = self._contents.get(key, self._contents_before.get(key))
        if before is None:
            self._contents[key] = content
            self._sealed[source] += 1
            if len(self._contents) > _CONTENTS_MAX:
                self._contents, self._contents_before = {}, self._contents
        elif before == content:
            self._resent[source] += 1
        else:
            self._clashes.add(key)

    def fields(self, missed: int) -> dict[str, Any]:
        """Those of a Report."""
        return {
            "datagrams": {
                _text(source): {_name(kind): amount for kind, amount in counts.items()}
                for source, counts in self._datagrams.items()
            },
            "sealed": {_text(source): amount for source, amount in self._sealed.items()},
            "resent": {_text(source): amount for source, amount in self._resent.items()},
            "clashes": {
                _text(source): sorted(
                    [index, counter] for who, index, counter in self._clashes if who == source
                )
                for source in {who for who, _, _ in self._clashes}
            },
            "missed": missed,
        }


def _name(kind: int) -> str:
    try:
        return MessageType(kind).name
    except ValueError:
        return f"type {kind}"


def _text(source: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(source) == 4 else socket.AF_INET6, source)


class Wiretap(Companion):
    """Watches from its making to `finish`."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire.router, __name__, answers_within_s=_END_WITHIN_S)

    def finish(self) -> Report:
        """Watch no more; what was seen."""
        self._hang_up()
        return Report(**json.loads(self._line()))


def _watch_until_closed(stdin: BinaryIO) -> dict[str, Any]:
    """Watch all devices of this namespace until the other end closes our stdin."""
    watch = Watch()
    with PacketTap(buffer_bytes=_BUFFER_BYTES) as tap:
        print("ready", flush=True)
        ending = False
        while not ending:
            ready, _, _ = select.select([tap.fileno(), stdin.fileno()], [], [])
            ending = stdin.fileno() in ready
            for frame in tap.frames():
                for packet in frame.datagrams():
                    watch.handle(packet)
        return watch.fields(tap.missed())


if __name__ == "__main__":
    print(json.dumps(_watch_until_closed(sys.stdin.buffer)), flush=True)
