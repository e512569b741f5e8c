"""A process that verifies every packet a device hands to the local stack, by arithmetic of its own.

Data flow: overlay device -> packet socket -> [support.inspector] -> one JSON line -> Inspected -> tests/e2e
A packet must be complete, unless it is a superpacket whose checksums are left to the kernel: then the header in
front of it must say so in full, and its checksum field hold the sum of the pseudo header. Takes nothing from
the program's code.
Source: RFC 1071, RFC 791, RFC 8200, RFC 9293, RFC 768; Virtual I/O Device 1.3 section 5.1.6.

A sum of 16-bit words with carries added back is the number that all the bytes are, modulo 65,535: where a
checksum is right, it and what it covers are 0.
"""

import json
import select
import struct
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from tests.support.companion import Companion
from tests.support.netns import Site
from tests.support.packet_tap import Frame, PacketTap

_BUFFER_BYTES = 512 << 20
_END_WITHIN_S = 120.0
_SHOWN = 5
_ICMP, _TCP, _UDP, _ICMPV6 = 1, 6, 17, 58
_CHECKSUM_AT = {_TCP: 16, _UDP: 6}
_TYPES = {_TCP: {4: 1, 6: 4}, _UDP: {4: 5, 6: 5}}  # of a superpacket, by protocol and IP version
_MODULUS = 0xFFFF


@dataclass
class Inspected:
    """How many packets were verified, by kind; superpackets as the packets they stand for."""

    packets: Counter[str] = field(default_factory=Counter)  # by protocol, "tcp4" and the like
    superpackets: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # the first few: why, and its first bytes
    wrong_count: int = 0
    missed: int = 0  # not seen, as there was no room

    @property
    def verified(self) -> int:
        """In all."""
        return sum(self.packets.values())


class Verdicts:
    """`handle` takes what the device handed over. No sockets."""

    def __init__(self) -> None:
        self.found = Inspected()

    def handle(self, frame: Frame) -> None:
        """Verify one packet."""
        try:
            self._verify(frame)
        except (_WrongError, struct.error, IndexError) as error:
            self.found.wrong_count += 1
            if len(self.found.wrong) < _SHOWN:
                self.found.wrong.append(
                    f"{error or type(error).__name__}: {frame[1:]} {frame.packet[:80].hex()}"
                )

    def _verify(self, frame: Frame) -> None:
        packet = frame.packet
        version = packet[0] >> 4
        if version == 4:
            start, protocol = _verify_ipv4(packet)
            addresses = packet[12:20]
        else:
            _require(version == 6, "IP version")
            start, protocol = 40, packet[6]
            _require(int.from_bytes(packet[4:6]) == len(packet) - 40, "length of IPv6")
            addresses = packet[8:40]
        content = packet[start:]
        pseudo = _sum(addresses) + protocol + len(content)
        name = f"{_NAMES.get(protocol, 'other')}{version}"
        if frame.is_unfinished:
            at, kind = _CHECKSUM_AT[protocol], _TYPES[protocol][version]
            _require((frame.checksum_start, frame.checksum_offset) == (start, at), "place of the checksum")
            _require(
                int.from_bytes(content[at : at + 2]) % _MODULUS == pseudo % _MODULUS,
                "sum of the pseudo header",
            )
            _require(frame.gso_type == kind, "type of superpacket")
        elif protocol in _VERIFIERS:
            _VERIFIERS[protocol](content, pseudo)
        header = (content[12] >> 4) * 4 if protocol == _TCP else 8
        if protocol == _UDP:
            _require(int.from_bytes(content[4:6]) == len(content), "length of UDP")
        count = 1
        if frame.gso_size:
            _require(frame.is_unfinished, "a superpacket with a checksum")
            count = -(-(len(content) - header) // frame.gso_size)
            self.found.superpackets[name] += 1
        self.found.packets[name] += count


class _WrongError(Exception):
    """Something in a packet is not as it must be."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _WrongError(what)


def _sum(data: bytes) -> int:
    return int.from_bytes(data if len(data) % 2 == 0 else data + b"\0") % _MODULUS


def _verify_ipv4(packet: bytes) -> tuple[int, int]:
    header_bytes = (packet[0] & 15) * 4
    _require(_sum(packet[:header_bytes]) == 0, "checksum of IPv4")
    _require(int.from_bytes(packet[2:4]) == len(packet), "length of IPv4")
    is_fragment = int.from_bytes(packet[6:8]) & 0x3FFF
    return header_bytes, 0 if is_fragment else packet[9]


def _with_pseudo(content: bytes, pseudo: int) -> None:
    _require((_sum(content) + pseudo) % _MODULUS == 0, "checksum")


def _udp(content: bytes, pseudo: int) -> None:
    _require(content[6:8] != b"\0\0", "no checksum")
    _with_pseudo(content, pseudo)


def _alone(content: bytes, _pseudo: int) -> None:
    _require(_sum(content) == 0, "checksum")


_NAMES = {_TCP: "tcp", _UDP: "udp", _ICMP: "icmp", _ICMPV6: "icmp"}
_VERIFIERS: Mapping[int, Callable[[bytes, int], None]] = {
    _TCP: _with_pseudo,
    _UDP: _udp,
    _ICMP: _alone,
    _ICMPV6: _with_pseudo,
}


class Inspector(Companion):
    """Looks at all packets of a device from its making to `finish`."""

    def __init__(self, site: Site, device: str) -> None:
        super().__init__(site.space, __name__, device, answers_within_s=_END_WITHIN_S)

    def finish(self) -> Inspected:
        """What was found in all that came until now."""
        self._hang_up()
        fields = json.loads(self._line())
        packets, superpackets = Counter(fields.pop("packets")), Counter(fields.pop("superpackets"))
        return Inspected(packets, superpackets, **fields)


def _inspect_until_closed(device: str, stdin: BinaryIO) -> Inspected:
    verdicts = Verdicts()
    with PacketTap(buffer_bytes=_BUFFER_BYTES, device=device) as tap:
        print("ready", flush=True)
        ending = False
        while not ending:
            ready, _, _ = select.select([tap.fileno(), stdin.fileno()], [], [])
            ending = stdin.fileno() in ready
            for frame in tap.frames():
                verdicts.handle(frame)
        verdicts.found.missed = tap.missed()
    return verdicts.found


if __name__ == "__main__":
    print(json.dumps(vars(_inspect_until_closed(sys.argv[1], sys.stdin.buffer))), flush=True)
