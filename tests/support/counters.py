"""What the kernel of a site counted: packets it verified, and those it found wrong.

Data flow: /proc/net of a namespace -> [support.counters] -> tests/e2e
The kernel verifies the checksum of every packet that comes in without a promise of its sender's (on a virtual
wire or by a TUN device with offloads the sender may promise to be trusted). Knows nothing of Nebula.
Source: Linux Documentation/networking/snmp_counter.rst, RFC 4293, RFC 4022, RFC 4113.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.netns import Site, entered

_FILES = ("snmp", "netstat", "snmp6")
_WRONG = (
    *("IpInHdrErrors", "IpExtInCsumErrors", "IpInTruncatedPkts", "IpExtInTruncatedPkts"),
    *("IcmpInErrors", "IcmpInCsumErrors", "TcpInErrs", "TcpInCsumErrors", "UdpInErrors", "UdpInCsumErrors"),
    *("Ip6InHdrErrors", "Ip6InTruncatedPkts", "Icmp6InErrors", "Icmp6InCsumErrors"),
    *("Udp6InErrors", "Udp6InCsumErrors"),
)
_HARMLESS = {
    "UdpInErrors": "UdpRcvbufErrors",
    "Udp6InErrors": "Udp6RcvbufErrors",
    "TcpInErrs": "TcpExtTCPSYNChallenge",
}
"""What counts as an error too, but says nothing about a content: no room in a socket, a SYN that came late."""


@dataclass(frozen=True)
class KernelCounters:
    """All of a site's, by the names that `nstat` uses, at one moment."""

    values: Mapping[str, int]

    @classmethod
    def of(cls, site: Site) -> "KernelCounters":
        """Read them."""
        with entered(site.space):
            snmp, netstat, snmp6 = (Path("/proc/thread-self/net", name).read_text() for name in _FILES)
        return cls(_tables(snmp) | _tables(netstat) | _lines(snmp6))

    def since(self, before: "KernelCounters") -> "KernelCounters":
        """By how much each has grown."""
        grown = {name: value - before.values.get(name, 0) for name, value in self.values.items()}
        return KernelCounters(grown)

    @property
    def tcp_segments(self) -> int:
        """Of either IP version; each was verified, and the wrong ones are among them."""
        return self.values["TcpInSegs"]

    @property
    def no_room(self) -> int:
        """UDP datagrams dropped since a socket's buffer was full."""
        return self.values["UdpRcvbufErrors"] + self.values["Udp6RcvbufErrors"]

    def wrong(self) -> dict[str, int]:
        """What was received with a wrong checksum, length or header, by the name of the counter; empty if none."""
        found = {
            name: self.values.get(name, 0) - self.values.get(_HARMLESS.get(name, ""), 0) for name in _WRONG
        }
        return {name: amount for name, amount in found.items() if amount > 0}


def _tables(text: str) -> dict[str, int]:
    """Pairs of lines, `Tcp: NAME...` above `Tcp: VALUE...`."""
    found: dict[str, int] = {}
    lines = text.splitlines()
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        group, *rest = names.split()
        found |= {
            group.rstrip(":") + name: int(value) for name, value in zip(rest, values.split()[1:], strict=True)
        }
    return found


def _lines(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}
