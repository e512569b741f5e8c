"""Counters in shared memory: one page for each process, written by it alone, read by anyone.

Data flow: reader, writer, control -> [shm_stats] -> services: local API, metrics; supervisor: stuck workers
Knows which counters exist and where each one stands; knows nothing of what makes them grow.
Source: docs/architecture.md, "Shared memory"; the names are Nebula's where it has the metric, else `mp.`.

    region `stats`, one page: its process maps it writable, everybody else read-only
    +0     header           supervisor    parameters: number of counters, digest of their names
    +64    u64 counter[]    its process   in the order of NAMES; counters only grow

A counter is stored with one move instruction, so a reader sees it before or after, never between. It belongs
to one process at a time, so adding needs no lock. A successor goes on with the page of its predecessor, which
died between two stores at worst: sums over all pages never fall and never count a packet twice.
"""

import hashlib
from collections.abc import Iterable

from nebula_mp.shm import HEADER_WORDS, PAGE_BYTES, U64_MAX, Layout, Mapping, Region

LAYOUT = Layout("stats", b"nmp:coun", 1)

DROPS = (
    # Datagrams from the underlay, in the order in which they are checked.
    "short",
    "version",
    "type",
    "looped",
    "early",  # before the answer to a handshake of ours: too many, or there was none
    "unknown_index",
    "truncated",
    "replay",
    "old",
    "auth",
    "relay_index",
    "inner_ip",
    "source_addr",
    "firewall.incoming.local_address",
    "firewall.incoming.remote_address",
    "firewall.incoming.no_rule",
    "oversize",
    # Packets from the TUN device.
    "tun.inner_ip",
    "tun.broadcast",
    "tun.multicast",
    "tun.own_address",
    "tun.no_route",
    "firewall.outgoing.local_address",
    "firewall.outgoing.remote_address",
    "firewall.outgoing.no_rule",
    "exhausted",
)
"""Why a packet went no further. Each dropped packet is counted under exactly one."""

NAMES = (
    # One per pass of the loop: stands still while a process is stuck.
    "mp.passes",
    # Microseconds of a core, stored about every 20 ms and before each sleep.
    "mp.cpu.us",
    # What came in and went out; superpackets count as the packets they hold, with all their headers.
    "mp.tun.rx.packets",
    "mp.tun.rx.bytes",
    "mp.tun.tx.packets",
    "mp.tun.tx.bytes",
    "mp.udp.rx.packets",
    "mp.udp.rx.bytes",
    "mp.udp.tx.packets",
    "mp.udp.tx.bytes",
    # Rings.
    "mp.ring.full.seal",
    "mp.ring.full.open",
    "mp.ring.full.upcall",
    "mp.ring.full.stranger",
    "mp.ring.resumed",  # packets that a killed consumer had begun to write: perhaps lost
    "mp.lease.refused",
    "mp.drain.switches",
    "mp.upcalls",
    "mp.upcalls.limited",
    "mp.flows.admitted",  # by readers themselves
    "mp.flows.evicted",
    "mp.strangers",
    "mp.relay.forwarded",  # relay frames, from one peer to another
    "mp.counter.span",
    "mp.counter.busy",
    # What system calls refused.
    "mp.tun.again",
    "mp.tun.split",
    "mp.tun.drop.nobufs",
    "mp.tun.drop.refused",
    "mp.tun.drop.again",
    "mp.tun.drop.lost",
    "mp.tun.drop.offload",
    "mp.udp.gso_off",
    "mp.udp.drop.unreachable",
    "mp.udp.drop.toobig",
    "mp.udp.drop.eperm",
    "mp.udp.drop.other",
    "udp.tx.dropped",
    "mp.rx.icmp",
    *(f"drop.{reason}" for reason in DROPS),
)

SLOTS = {name: slot for slot, name in enumerate(NAMES)}
"""Where each counter stands. Look names up when a module is imported, so that a wrong one shows at once."""

assert all(
    SLOTS[name.removesuffix("packets") + "bytes"] == slot + 1
    for name, slot in SLOTS.items()
    if name.endswith(".packets")
)

DIGEST = int.from_bytes(hashlib.sha256("\n".join(NAMES).encode()).digest()[:8], "little")
"""What a page says of the names it was made for."""


def create_page(name: str) -> Region:
    """Make a page of zeros for the process called `name`; before the fork. Raises SystemCallError."""
    assert HEADER_WORDS + len(NAMES) <= PAGE_BYTES // 8
    return Region.create(LAYOUT, PAGE_BYTES, (len(NAMES), DIGEST), name=name)


class StatsPage:
    """A process's counters: `add` in the process itself, `snapshot` in any."""

    __slots__ = ("_words",)

    def __init__(self, descriptor: int, *, writable: bool, name: str = "") -> None:
        """Attach to the page behind `descriptor`; a successor goes on with what is there.

        Raises RingError when the page was made for other names.
        """
        mapping = Mapping(descriptor, LAYOUT, writable=writable, name=name)
        made_for, ours = mapping.parameters[:2], (len(NAMES), DIGEST)
        if made_for != ours or mapping.size_bytes != PAGE_BYTES:
            raise mapping.contradiction("set of names", made_for, f"{ours}")
        self._words = mapping.words[HEADER_WORDS : HEADER_WORDS + len(NAMES)]

    def add(self, slot: int, amount: int = 1) -> None:
        """Count `amount`, 0 and up, at `SLOTS[name]`. Only in the process whose page it is."""
        # Masked: a predecessor that went mad may have left any value.
        self._words[slot] = (self._words[slot] + amount) & U64_MAX

    def add_traffic(self, slot: int, packets: int, size_bytes: int) -> None:
        """Count at `SLOTS["*.packets"]` and at the slot of the bytes, which is the next one.

        As two calls of `add`, in two thirds of the time.
        """
        words = self._words
        words[slot] = words[slot] + packets & U64_MAX
        words[slot + 1] = words[slot + 1] + size_bytes & U64_MAX

    def snapshot(self) -> dict[str, int]:
        """All counters by name, each as of the moment it was read."""
        return dict(zip(NAMES, self._words.tolist(), strict=True))


def totals(pages: Iterable[StatsPage]) -> dict[str, int]:
    """Sum of each counter over all processes."""
    columns = zip(*(page.snapshot().values() for page in pages), strict=True)
    sums = [sum(column) for column in columns] or [0] * len(NAMES)
    return dict(zip(NAMES, sums, strict=True))
