"""Shared tables of a few rows, and the mappings each process would have of them.

Data flow: tests -> [support.tables] -> nebula_mp.shm_table
"""

from ipaddress import ip_address

from nebula_mp.newtypes import Cipher, RelayIndex, TunnelIndex, UdpAddr
from nebula_mp.shm import Layout, Mapping, Region
from nebula_mp.shm_counters import SendCounters
from nebula_mp.shm_table import KEYS, SEND, SPAN, TUNNELS, PeerRef, Tables
from nebula_mp.shm_tunnels import TunnelFields, TunnelState, TunnelTable

ROWS = 8
SEND_KEY = bytes(range(1, 33))
RECEIVE_KEY = bytes(range(101, 133))


def seeds(count: int) -> bytes:
    """Entropy that is always the same."""
    return bytes((37 * each + 11) & 255 for each in range(count))


def small(workers: int = 2, *, rows: int = ROWS, buckets: int = 64) -> Tables:
    """Make tables that a test can look through."""
    return Tables.create(workers, seeds, rows=rows, buckets=buckets)


def writable(region: Region, layout: Layout) -> Mapping:
    """Map as the process does that may write."""
    return Mapping(region.descriptor, layout, writable=True)


def read_only(region: Region, layout: Layout) -> Mapping:
    """Map as all others do."""
    return Mapping(region.read_only, layout, writable=False)


def control_counters(tables: Tables) -> SendCounters:
    """Counters as control has them; nothing any worker sealed was sent."""
    spans = [read_only(span, SPAN) for span in tables.spans]
    return SendCounters(writable(tables.send, SEND), tables.locks, spans, None, lambda _: 0)


def tunnel_table(tables: Tables) -> TunnelTable:
    """Control's side of the tunnels, as it is after a start and after a crash."""
    return TunnelTable(
        writable(tables.tunnels, TUNNELS), writable(tables.keys, KEYS), control_counters(tables)
    )


def fields(
    row: int = 3,
    *,
    high: int = 0xBEEF,
    remote_index: int = 0xCAFE_0001,
    state: TunnelState = TunnelState.PROVEN,
    cipher: Cipher = Cipher.AES,
    owner: int = 1,
    underlay: str | None = "192.0.2.7",
    port: int = 4242,
    sources: frozenset[bytes] | None = frozenset({bytes([10, 0, 0, 2])}),
    relay: RelayIndex | None = None,
) -> TunnelFields:
    """State a tunnel in `row`."""
    return TunnelFields(
        TunnelIndex(high << 16 | row),
        TunnelIndex(remote_index),
        state,
        cipher,
        owner,
        PeerRef(7 << 32 | row),
        None if underlay is None else UdpAddr(ip_address(underlay), port),
        sources,
        relay,
    )
