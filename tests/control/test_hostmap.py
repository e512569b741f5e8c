"""Indexes, and which tunnel is primary."""

from ipaddress import ip_address
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.control.hostmap import CANDIDATES, CANDIDATES_PER_HOST, HostMap, IndexAllocator, Tunnel
from nebula_mp.control.liveness import Traffic
from nebula_mp.crypto.aead import Aead
from nebula_mp.firewall.rules import PeerNetworks
from nebula_mp.handshake.machine import Completed, SessionKeys
from nebula_mp.newtypes import Cipher, Seconds, TunnelIndex, UdpAddr
from tests.support.pki import ANY_TIME, Pki
from tests.support.plane import LocalPlane

PEERS = [
    Pki.shared()
    .pool()
    .verify(
        Pki.shared().identity(f"peer-{number}", f"10.42.9.{number}/16", f"fd00::{number}/64").newest, ANY_TIME
    )
    for number in range(1, 4)
]
ONE, TWO, THREE = range(3)


def make(
    hostmap: HostMap, peer: int = ONE, *, proven: bool = True, stage1: bytes = b"", port: int = 1
) -> Tunnel:
    index = hostmap.indexes.try_allocate()
    assert index is not None
    certificate = PEERS[peer].certificate
    session = Completed(
        local_index=index,
        remote_index=TunnelIndex(7),
        peer=PEERS[peer],
        own_certificate=certificate,
        peer_time_ns=1,
        is_initiator=not stage1,
        send=Aead(Cipher.AES, bytes(32)),
        receive=Aead(Cipher.AES, bytes(32)),
        keys=SessionKeys(bytearray(32), bytearray(32)),
        stage1=stage1,
        stage2=b"",
    )
    return Tunnel(
        session,
        PeerNetworks.of(certificate, ()),
        UdpAddr(ip_address("192.0.2.1"), port),
        Traffic(Seconds(0)),
        proven=proven,
    )


def hostmap() -> HostMap:
    return HostMap(Random(1).randbytes, LocalPlane(lambda: Seconds(0)))


@given(st.lists(st.booleans(), max_size=200))
def test_indexes_are_unique_never_zero_and_their_rows_stay_dense(steps: list[bool]) -> None:
    allocator = IndexAllocator(Random(3).randbytes, rows=16)
    held: set[TunnelIndex] = set()

    for take in steps:
        if take:
            lowest = min(set(range(17)) - {index & 0xFFFF for index in held})
            index = allocator.try_allocate()
            if lowest == 16:
                assert index is None
            else:
                assert index is not None
                assert index >> 16 != 0
                assert index & 0xFFFF == lowest
                held.add(index)
        elif held:
            allocator.release(held.pop())


def test_a_new_tunnel_is_primary_for_every_address_of_its_peer() -> None:
    hosts = hostmap()
    old, new = make(hosts), make(hosts)
    hosts.add(old)
    hosts.add(new)

    assert [hosts.primary(address) for address in new.addresses] == [new, new]
    assert hosts.tunnels(new.addresses[0]) == (new, old)
    assert not hosts.is_primary(old)


def test_when_the_primary_goes_the_next_one_takes_over_and_at_last_nothing_is_left() -> None:
    hosts = hostmap()
    old, new = make(hosts), make(hosts, stage1=b"question")
    hosts.add(old)
    hosts.add(new)

    hosts.remove(new)
    assert hosts.primary(old.addresses[1]) is old
    hosts.remove(old)

    assert hosts.primary(old.addresses[0]) is None
    assert hosts.by_index(old.local_index) is None
    assert hosts.by_remote_index(7) == ()
    assert hosts.by_stage1(b"question") is None
    assert len(hosts) == 0
    assert hosts.indexes.try_allocate() is not None


def test_make_primary_moves_all_addresses() -> None:
    hosts = hostmap()
    old, new = make(hosts), make(hosts)
    hosts.add(old)
    hosts.add(new)

    hosts.make_primary(old)

    assert [hosts.primary(address) for address in old.addresses] == [old, old]
    assert hosts.tunnels(old.addresses[0]) == (old, new)


def test_the_sixth_tunnel_of_a_peer_removes_the_oldest_everywhere() -> None:
    hosts = hostmap()
    tunnels = [make(hosts) for _ in range(6)]

    removed = [hosts.add(tunnel) for tunnel in tunnels]

    assert removed == [[], [], [], [], [], [tunnels[0]]]
    assert hosts.by_index(tunnels[0].local_index) is None
    assert len(hosts.tunnels(tunnels[0].addresses[1])) == 5


def test_a_candidate_is_found_by_index_but_carries_nothing_until_it_is_proven() -> None:
    hosts = hostmap()
    candidate = make(hosts, proven=False, stage1=b"question")
    hosts.add_candidate(candidate)

    before = hosts.primary(candidate.addresses[0])
    found = hosts.by_index(candidate.local_index), hosts.by_stage1(b"question")
    hosts.prove(candidate)

    assert before is None
    assert found == (candidate, candidate)
    assert hosts.primary(candidate.addresses[0]) is candidate
    assert hosts.candidates() == ()


def test_a_host_has_at_most_five_candidates_and_the_oldest_goes_first() -> None:
    hosts = hostmap()
    candidates = [
        make(hosts, proven=False, stage1=bytes([n]), port=n + 1) for n in range(CANDIDATES_PER_HOST + 1)
    ]

    evicted = [hosts.add_candidate(candidate) for candidate in candidates]

    assert evicted[-1] == [candidates[0]]
    assert sum(map(len, evicted)) == 1
    assert hosts.candidates() == tuple(candidates[1:])


def test_all_candidates_together_are_limited_too() -> None:
    hosts = hostmap()
    crowd = [make(hosts, TWO, proven=False, stage1=b"%d" % n) for n in range(CANDIDATES)]
    for candidate in crowd:
        # one per host and source address: pretend that each is another host
        candidate.addresses = (ip_address(int(candidate.addresses[0]) + candidate.local_index),)
        assert hosts.add_candidate(candidate) == []

    assert hosts.add_candidate(make(hosts, THREE, proven=False, stage1=b"last")) == [crowd[0]]
    assert len(hosts.candidates()) == CANDIDATES


def test_the_data_path_is_told_of_every_tunnel_and_of_the_one_to_send_through() -> None:
    hosts = hostmap()
    plane = hosts._plane
    assert isinstance(plane, LocalPlane)
    first, second = make(hosts), make(hosts)
    peer = first.addresses[0]

    hosts.add(first)
    hosts.add(second)
    both = dict(plane.routes), set(plane.tunnels)
    hosts.remove(second)
    one = dict(plane.routes), set(plane.tunnels)
    hosts.remove(first)

    assert both == ({peer: second.local_index}, {first.local_index, second.local_index})
    assert one == ({peer: first.local_index}, {first.local_index})
    assert (plane.routes, plane.tunnels) == ({}, {})


def test_a_candidate_is_open_but_nothing_is_sent_through_it() -> None:
    hosts = hostmap()
    plane = hosts._plane
    assert isinstance(plane, LocalPlane)
    candidate = make(hosts, proven=False, stage1=b"one")

    hosts.add_candidate(candidate)
    before = dict(plane.routes), set(plane.tunnels)
    hosts.prove(candidate)

    assert before == ({}, {candidate.local_index})
    assert plane.routes == {candidate.addresses[0]: candidate.local_index}


def test_an_adopted_tunnel_is_not_opened_again_and_keeps_its_index() -> None:
    old = hostmap()
    tunnel = make(old)
    old.add(tunnel)
    hosts = HostMap(Random(2).randbytes, old._plane)

    hosts.adopt(tunnel)
    others = [hosts.indexes.try_allocate() for _ in range(5)]

    assert hosts.primary(tunnel.addresses[0]) is hosts.by_index(tunnel.local_index) is tunnel
    assert [index & 0xFFFF for index in others if index] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shares", [1, 2, 3, 4, 7])
def test_an_index_falls_into_the_share_it_is_asked_for_while_that_has_rows(shares: int) -> None:
    allocator = IndexAllocator(Random(5).randbytes, rows=64, shares=shares)
    wanted = [number % shares for number in range(64 // shares * shares // 2)]

    indexes = [allocator.try_allocate(share) for share in wanted]

    assert [index % shares for index in indexes if index is not None] == wanted
    assert len({index & 0xFFFF for index in indexes if index is not None}) == len(wanted)


def test_another_share_lends_a_row_when_the_one_wanted_has_none_left() -> None:
    allocator = IndexAllocator(Random(5).randbytes, rows=8, shares=4)

    indexes = [allocator.try_allocate(1) for _ in range(9)]

    assert sorted(index & 0xFFFF for index in indexes[:8] if index is not None) == list(range(8))
    assert indexes[8] is None
