import os
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from nebula_mp import shm_table
from nebula_mp.control import hostmap
from nebula_mp.crypto.replay import state_bytes
from nebula_mp.errors import RingError, SystemCallError
from nebula_mp.newtypes import Cipher, RelayIndex, TunnelIndex, UdpAddr
from nebula_mp.shm import LockFile
from nebula_mp.shm_counters import (
    ReceiveWindows,
    SendCounters,
    Traffic,
)
from nebula_mp.shm_flows import FlowTable, flow_hash, pack_key
from nebula_mp.shm_peers import PeerTable, PeerView
from nebula_mp.shm_relays import RelayKind, RelayRow, RelayTable
from nebula_mp.shm_table import (
    FLOWS,
    JOURNAL,
    KEYS,
    PEERS,
    RELAYS,
    SEEN,
    SEND,
    SPAN,
    TRAFFIC,
    TUNNELS,
    WINDOWS,
    PeerRef,
    Row,
    Tables,
)
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import COUNTER_LIMIT, STAGE_2_COUNTER
from nebula_mp.wire.ip import TCP, FlowKey
from tests.support.tables import (
    RECEIVE_KEY,
    SEND_KEY,
    control_counters,
    fields,
    read_only,
    seeds,
    small,
    tunnel_table,
    writable,
)

# (offset, size) of every field. A kernel in another language has the same numbers; change both, and the
# version of the layout.
OFFSETS: dict[str, dict[str, tuple[int, int]]] = {
    "TUNNEL_ROW": {
        "sequence": (0, 8),
        "local_index": (8, 4),
        "remote_index": (12, 4),
        "generation": (16, 8),
        "peer": (24, 8),
        "ipv4": (32, 4),
        "port": (36, 2),
        "family": (38, 1),
        "spare_a": (39, 1),
        "ipv6": (40, 16),
        "state": (56, 1),
        "cipher": (57, 1),
        "owner": (58, 2),
        "source_count": (60, 1),
        "source_families": (61, 1),
        "spare_b": (62, 2),
        "sources": (64, 48),
        "relay": (112, 4),
        "spare_c": (116, 12),
    },
    "KEY_ROW": {"send": (0, 32), "receive": (32, 32)},
    "PEER_ROW": {"tunnel": (0, 8)},
    "RELAY_ROW": {
        "sequence": (0, 8),
        "local_index": (8, 4),
        "carrier": (12, 4),
        "kind": (16, 4),
        "next_tunnel": (20, 4),
        "next_index": (24, 4),
        "spare": (28, 4),
    },
    "SEND_ROW": {"counter": (0, 8), "generation": (8, 8), "sealers": (16, 8), "spare": (24, 40)},
    "WINDOW_ROW": {"generation": (0, 8), "spare": (8, 48), "current": (56, 8), "bits": (64, 2048)},
    "SPAN_ROW": {"generation": (0, 8), "first": (8, 8), "until": (16, 8), "spare": (24, 8)},
    "TRAFFIC_ROW": {
        "generation": (0, 8),
        "packets_in": (8, 8),
        "bytes_in": (16, 8),
        "last_in_ms": (24, 8),
        "packets_out": (32, 8),
        "bytes_out": (40, 8),
        "last_out_ms": (48, 8),
        "spare": (56, 8),
    },
    "JOURNAL_ROW": {
        "generation": (0, 8),
        "length": (8, 8),
        "checksum": (16, 8),
        "moves": (24, 8),
        "remote_0": (32, 24),
        "remote_1": (56, 24),
        "spare": (80, 16),
        "record": (96, 40_864),
    },
    "BUCKET": {"lock": (0, 8), "tags": (8, 28), "spare": (36, 28), "rows": (64, 448)},
    "FLOW_ROW": {
        "sequence": (0, 4),
        "rules_generation": (4, 4),
        "local": (8, 16),
        "remote": (24, 16),
        "local_port": (40, 2),
        "remote_port": (42, 2),
        "protocol": (44, 1),
        "kind": (45, 1),
        "spare": (46, 2),
        "peer": (48, 8),
        "timeout_ms": (56, 4),
        "verdicts": (60, 4),
    },
    "SEEN_ROW": {"seen_ms": (0, 8)},
}
SIZES = {
    "TUNNEL_ROW": 128,
    "KEY_ROW": 64,
    "PEER_ROW": 8,
    "RELAY_ROW": 32,
    "SEND_ROW": 64,
    "WINDOW_ROW": 2112,
    "SPAN_ROW": 32,
    "TRAFFIC_ROW": 64,
    "JOURNAL_ROW": 40_960,
    "BUCKET": 512,
    "FLOW_ROW": 64,
    "SEEN_ROW": 8,
}
PAGE = 4096


@pytest.fixture
def tables() -> Iterator[Tables]:
    tables = small()
    yield tables
    tables.close()


def row_bytes(tables: Tables, region: str, row: int, size: int) -> bytes:
    """Row of a region, found without the code under test."""
    memory = getattr(tables, region)
    if isinstance(memory, tuple):
        memory = memory[-1]  # control's
    layout = {"tunnels": TUNNELS, "keys": KEYS, "peers": PEERS, "flows": FLOWS, "seen": SEEN, "send": SEND}
    layout["relays"] = RELAYS
    layout["windows"] = WINDOWS
    return bytes(read_only(memory, layout[region]).data[PAGE + row * size : PAGE + (row + 1) * size])


def test_every_field_of_every_row_is_where_it_was_frozen() -> None:
    rows = {name: row for name, row in vars(shm_table).items() if isinstance(row, Row)}

    assert {
        name: {field: tuple(place) for field, place in row.fields.items()} for name, row in rows.items()
    } == OFFSETS
    assert {name: row.size for name, row in rows.items()} == SIZES
    assert (shm_table.RULES_GENERATION, shm_table.SEEDS, shm_table.LIVE, shm_table.TOUCHED) == (8, 9, 8, 9)


def test_the_layouts_have_names_of_their_own_and_a_version() -> None:
    layouts = [TUNNELS, KEYS, PEERS, RELAYS, FLOWS, SEEN, SEND, WINDOWS, SPAN, TRAFFIC, JOURNAL]

    assert [layout.magic for layout in layouts] == [
        b"nmp:tunl",
        b"nmp:keys",
        b"nmp:peer",
        b"nmp:rela",
        b"nmp:flow",
        b"nmp:seen",
        b"nmp:send",
        b"nmp:wind",
        b"nmp:span",
        b"nmp:traf",
        b"nmp:jrnl",
    ]
    assert {layout.name: layout.version for layout in layouts if layout.version != 1} == {
        "tunnels": 2,  # had no relay
        "flows": 3,  # had no pairs, and no bits
    }


def test_no_field_that_two_processes_share_crosses_a_cache_line() -> None:
    for name, fields_of_row in OFFSETS.items():
        for field, (offset, size) in fields_of_row.items():
            if size <= 8 and SIZES[name] % 64 == 0:
                assert offset // 64 == (offset + size - 1) // 64, (name, field)
                assert offset % size == 0, (name, field)


def test_a_window_row_holds_exactly_the_state_of_a_replay_window() -> None:
    assert state_bytes() == 8 + 2048


def test_an_opened_tunnel_lies_in_memory_byte_by_byte_as_the_layout_says(tables: Tables) -> None:
    sources = frozenset({bytes([10, 0, 0, 2]), ip_address("fd00::2").packed})
    stated = fields(3, underlay="192.0.2.7", port=4242, sources=sources)

    tunnel_table(tables).open(stated, SEND_KEY, RECEIVE_KEY)

    assert row_bytes(tables, "tunnels", 3, 128) == (
        struct.pack("<QIIQQ", 2, 0xBEEF_0003, 0xCAFE_0001, 1, 7 << 32 | 3)
        + bytes([192, 0, 2, 7, 0x92, 0x10, 4, 0])
        + bytes(16)
        + struct.pack("<BBHBBH", 2, 1, 1, 2, 0b10, 0)
        + bytes([10, 0, 0, 2]).ljust(16, b"\0")
        + ip_address("fd00::2").packed
        + bytes(16)
        + bytes(16)
    )
    assert row_bytes(tables, "keys", 3, 64) == SEND_KEY + RECEIVE_KEY
    assert row_bytes(tables, "send", 3, 64) == struct.pack("<QQQ40x", 2, 1, 0)


def test_an_ipv6_underlay_and_unknown_sources_lie_where_the_layout_says(tables: Tables) -> None:
    stated = fields(1, state=TunnelState.CANDIDATE, cipher=Cipher.CHACHAPOLY, underlay="2001:db8::9")
    table = tunnel_table(tables)

    table.open(stated, SEND_KEY, RECEIVE_KEY)
    table.update(
        type(stated)(
            stated.local_index,
            stated.remote_index,
            stated.state,
            stated.cipher,
            stated.owner,
            stated.peer,
            UdpAddr(ip_address("2001:db8::9"), 4243),
            None,
            RelayIndex(0xDEAD_0002),
        )
    )

    assert row_bytes(tables, "tunnels", 1, 128)[32:64] == (
        bytes([0, 0, 0, 0, 0x93, 0x10, 6, 0])
        + ip_address("2001:db8::9").packed
        + struct.pack("<BBHBBH", 1, 2, 1, 255, 0, 0)
    )
    assert row_bytes(tables, "tunnels", 1, 128)[112:] == struct.pack("<I12x", 0xDEAD_0002)


def test_a_path_through_a_relay_lies_where_the_layout_says(tables: Tables) -> None:
    table = RelayTable(writable(tables.relays, RELAYS))
    path = RelayRow(
        RelayIndex(0xDEAD_0002),
        TunnelIndex(0xBEEF_0003),
        RelayKind.FORWARDING,
        TunnelIndex(0xCAFE_0005),
        RelayIndex(0x1234_5678),
    )

    table.set(path)

    stored = (2, 0xDEAD_0002, 0xBEEF_0003, 2, 0xCAFE_0005, 0x1234_5678)
    assert row_bytes(tables, "relays", 2, 32) == struct.pack("<QIIIII4x", *stored)
    table.clear(path.local_index)
    assert row_bytes(tables, "relays", 2, 32) == struct.pack("<Q24x", 4)


def test_a_flow_lies_in_memory_byte_by_byte_as_the_layout_says(tables: Tables) -> None:
    table = FlowTable(writable(tables.flows[-1], FLOWS), writable(tables.seen[-1], SEEN))
    key = FlowKey(bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 22, 50_000, TCP, fragment=True)

    table.set_rules_generation(5)
    table.allow(key, PeerRef(7 << 32 | 3), 720_000, 123_456)
    table.refuse(key._replace(local_port=23), PeerRef(9 << 32 | 4), 123_457, inbound=True)

    flows = read_only(tables.flows[-1], FLOWS)
    assert flows.words[8] == 5
    words = tuple(struct.unpack("<6Q", seeds(48)))
    assert tuple(flows.words[9:15]) == words
    for port, peer, timeout, verdicts, seen in (
        (22, 7 << 32 | 3, 720_000, 0b0101, 123_456),
        (23, 9 << 32 | 4, 1000, 0b1000, 123_457),
    ):
        packed = (
            bytes([10, 0, 0, 1])
            + bytes(12)
            + bytes([10, 0, 0, 2])
            + bytes(12)
            + struct.pack("<HHBBH", port, 50_000, 6, 1, 0)
        )
        assert pack_key(key._replace(local_port=port)) == packed
        hashed = flow_hash(words, packed)
        bucket = hashed >> 40 & 63
        line = row_bytes(tables, "flows", bucket, 512)
        tags = struct.unpack_from("<7I", line, 8)
        number = tags.index(hashed & 0xFFFF_FFFF | 1)
        row = line[64 + 64 * number : 128 + 64 * number]
        assert row == struct.pack("<II", 2, 5) + packed + struct.pack("<QII", peer, timeout, verdicts)
        assert row_bytes(tables, "seen", bucket * 7 + number, 8) == struct.pack("<Q", seen)


def test_counters_windows_traffic_and_peers_lie_where_the_layout_says(tables: Tables) -> None:
    own = writable(tables.spans[1], SPAN)
    spans = [read_only(tables.spans[0], SPAN), own]
    counters = SendCounters(writable(tables.send, SEND), tables.locks, spans, 1, lambda _: 0)
    counters.open(2, 6)
    counters.reserve(2, 6, 50, 4)
    window = ReceiveWindows(writable(tables.windows, WINDOWS)).get(2, 6)
    assert window is not None
    window.update(9)
    traffic = writable(tables.traffic[2], TRAFFIC)
    Traffic(traffic).sent(2, 6, 3, 1000, 77)
    Traffic(traffic).received(2, 6, 4, 2000, 78)
    peers = PeerTable(writable(tables.peers, PEERS))
    peer = peers.add()
    assert peer is not None
    peers.set(peer, fields(3).local_index)

    assert row_bytes(tables, "send", 2, 64) == struct.pack("<QQQ40x", 52, 6, 0b10)
    counters.open(3, 1)
    counters.reserve(3, 1, 1, 4)
    counters.open(3, 2)
    assert row_bytes(tables, "send", 3, 64) == struct.pack("<QQQ40x", 2, 2, 0)
    assert bytes(own.data[72:80]) == struct.pack("<Q", 4)
    assert bytes(own.data[PAGE + 64 : PAGE + 96]) == struct.pack("<QQQ8x", 6, 3, 5)
    assert row_bytes(tables, "windows", 2, 2112) == (
        struct.pack("<Q48xQ", 6, 9) + bytes([0b111, 0b10]) + bytes(2046)
    )
    assert bytes(traffic.data[PAGE + 128 : PAGE + 192]) == struct.pack(
        "<QQQQQQQ8x", 6, 4, 2000, 78, 3, 1000, 77
    )
    assert row_bytes(tables, "peers", 0, 8) == struct.pack("<Q", 1 << 32 | 0xBEEF_0003)


def test_the_limits_of_counters_are_those_of_control() -> None:
    tables = small()
    control_counters(tables).open(3, 1)

    assert COUNTER_LIMIT == 2**64 - 1 - 2**40
    assert control_counters(tables).last(3, 1) == STAGE_2_COUNTER == 2
    # Control never imports shared memory, so this number stands in both.
    assert shm_table.ROWS_MAX == hostmap.ROWS
    tables.close()


def test_tables_of_full_size_take_no_memory_before_they_are_used() -> None:
    tables = Tables.create(4, seeds)
    try:
        used = {region.layout.name: blocks(region.descriptor) for region in tables.regions()}
        sizes = [region.size_bytes for region in tables.regions() if region is not tables.journal]
    finally:
        tables.close()

    assert max(used.values()) <= 4096
    assert sum(sizes) < 400 << 20  # the journal is large, but control alone maps it


def blocks(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * 512


def descriptors() -> set[str]:
    return {each.name for each in Path("/proc/self/fd").iterdir()}


def test_closed_tables_leave_no_descriptor() -> None:
    before = descriptors()

    small(3).close()

    assert descriptors() == before


def test_tables_that_could_not_all_be_made_leave_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> LockFile:
        raise SystemCallError("no more descriptors")

    monkeypatch.setattr(LockFile, "create", refuse)
    before = descriptors()

    with pytest.raises(SystemCallError):
        small()

    assert descriptors() == before


def test_a_reader_cannot_store_into_what_control_publishes(tables: Tables) -> None:
    for region, layout in ((tables.tunnels, TUNNELS), (tables.keys, KEYS), (tables.flows[-1], FLOWS)):
        mapping = read_only(region, layout)
        with pytest.raises(TypeError, match="read-only"):
            mapping.words[600] = 1


def test_a_number_of_rows_that_does_not_fit_the_region_is_a_contradiction(tables: Tables) -> None:
    tables.peers.store_word(4, 9)

    with pytest.raises(RingError, match="number of rows is 9"):
        PeerView(read_only(tables.peers, PEERS))


def test_regions_of_different_numbers_of_rows_are_not_used_together(tables: Tables) -> None:
    other = small(rows=4)
    try:
        with pytest.raises(RingError, match=r"tunnel keys.*number of rows is 4, expected 8"):
            type(tunnel_table(tables))(
                writable(tables.tunnels, TUNNELS), writable(other.keys, KEYS), control_counters(tables)
            )
        with pytest.raises(RingError, match=r"span.*number of rows is 4, expected 8"):
            SendCounters(
                writable(tables.send, SEND),
                tables.locks,
                [read_only(other.spans[0], SPAN)],
                None,
                lambda _: 0,
            )
    finally:
        other.close()


def test_workers_are_live_until_they_are_given_up(tables: Tables) -> None:
    tables.set_live(1, live=False)

    assert [read_only(span, SPAN).words[8] for span in tables.spans] == [1, 0]
