"""Names for the numbers and byte strings that could be mixed up; imports nothing of ours.

Data flow: every other module -> [newtypes]
"""

from collections.abc import Callable
from enum import IntEnum, StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
)
from typing import NamedTuple, NewType

Buffer = bytes | bytearray | memoryview
"""Anything whose bytes can be read; borrowed for the length of the call."""

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
IPInterface = IPv4Interface | IPv6Interface
"""An address together with its network, as a certificate states it (host bits kept)."""

TunnelIndex = NewType("TunnelIndex", int)
"""u32 that a receiver chose for a tunnel; the sender writes it into each header. Never 0."""

RelayIndex = NewType("RelayIndex", int)
"""u32 that a receiver chose for a path through a relay, for the headers of relay frames. Never 0."""

Counter = NewType("Counter", int)
"""u64 in the header, the AEAD nonce; never used twice under one key."""

Seconds = NewType("Seconds", float)
"""A point or a span on the monotonic clock."""

Fingerprint = NewType("Fingerprint", str)
"""Lower-case hex SHA-256 of a certificate, 64 characters."""

Entropy = Callable[[int], bytes]
"""`entropy(n)` gives n unpredictable bytes; the simulator passes a seeded one."""


class UdpAddr(NamedTuple):
    """An underlay address: where a datagram came from or goes to. Never IPv4-mapped IPv6."""

    ip: IPAddress
    port: int

    def __str__(self) -> str:
        """`192.0.2.1:4242` or `[2001:db8::1]:4242`."""
        return f"{self.ip}:{self.port}" if self.ip.version == 4 else f"[{self.ip}]:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "UdpAddr":
        """Read what `str` gave. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon or (":" in host) != (host[:1] == "[" and host[-1:] == "]"):
            raise ValueError(f"{text!r} is no address and port")
        return cls(ip_address(host.strip("[]")), int(port))


class Instant(NamedTuple):
    """Both clocks read at one moment: timers use the first, certificates and handshakes the second."""

    mono: Seconds  # monotonic, never goes backwards, counts suspend
    wall_ns: int  # unix time in nanoseconds; may jump

    @property
    def wall_s(self) -> int:
        """Unix time in whole seconds, as certificates state it."""
        return self.wall_ns // 1_000_000_000


class CertVersion(IntEnum):
    """The two certificate encodings: protobuf and DER."""

    V1 = 1
    V2 = 2


class Curve(IntEnum):
    """The curve of a network's keys; the values are those of the wire."""

    CURVE25519 = 0
    P256 = 1


class Cipher(StrEnum):
    """The AEAD of a network, by its name in the `cipher` key; it is not negotiated."""

    AES = "aes"
    CHACHAPOLY = "chachapoly"
