"""A run that fails says how to repeat it and shows what happened."""

import re
from dataclasses import replace
from ipaddress import ip_address

import pytest

from nebula_mp.newtypes import UdpAddr
from tests.sim.chaos import Chaos
from tests.sim.diagram import COLUMN, describe, draw
from tests.sim.network import CALM, Fate, Message, Note
from tests.sim.world import World, pairs_of
from tests.support import packets

A, B = UdpAddr(ip_address("192.0.2.1"), 1), UdpAddr(ip_address("192.0.2.2"), 2)
STAGE1 = bytes.fromhex("10000000000000000000000000000001") + bytes(100)
TEST = bytes.fromhex("140000000000abcd0000000000000007") + bytes(16)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        pytest.param(STAGE1, "handshake 1 00000000 (116 B)", id="stage 1"),
        pytest.param(TEST, "test 0000abcd #7", id="test request"),
        pytest.param(b"\x14\x01" + TEST[2:], "test reply 0000abcd #7", id="test reply"),
        pytest.param(b"\x11" + TEST[1:], "message 0000abcd #7", id="inner packet"),
        pytest.param(b"\x12" + TEST[1:16], "recv_error 0000abcd #7", id="recv_error"),
        pytest.param(b"\x00", "punch", id="punch"),
        pytest.param(b"\xff" * 20, "20 bytes of nonsense", id="no nebula packet"),
    ],
)
def test_a_datagram_is_described_by_its_header(data: bytes, text: str) -> None:
    assert describe(data) == text


def test_the_diagram_draws_each_message_as_an_arrow_with_its_fate() -> None:
    trace: list[Message | Note] = [
        Note(0.5, "a", "starts"),
        Message(1.0, A, B, "a", STAGE1, Fate.DELIVERED, arrived=1.025, receiver="b"),
        Message(1.5, B, A, "b", TEST, Fate.LOST),
        Message(1.6, B, A, "c", TEST, Fate.LOST),
        Message(2.0, A, B, "a", TEST, Fate.DUPLICATE, arrived=2.001, receiver="b"),
        Note(2.5, "c", "is of no interest"),
    ]

    lines = draw(trace, ["a", "b"], {A: "a", B: "b"}).splitlines()

    assert len(lines) == 5
    assert lines[0].split() == ["a", "b"]
    assert lines[1] == "   0.5000 * a: starts"
    assert re.fullmatch(r" +1\.0000 +\|-+ handshake 1 00000000 \(116 B\) -+>\|  \+25 ms", lines[2])
    assert re.fullmatch(r" +1\.5000 +\|x-+ test 0000abcd #7 -+\|  lost", lines[3])
    assert re.fullmatch(r" +2\.0000 +\|-+ test 0000abcd #7 -+>\|  duplicate, \+1 ms", lines[4])
    assert {line.index("|") for line in lines[2:]} == {10 + COLUMN // 2}
    assert {line.rindex("|") for line in lines[2:]} == {10 + COLUMN // 2 + COLUMN}


def test_only_the_last_lines_are_drawn() -> None:
    trace: list[Message | Note] = [
        Message(float(number), A, B, "a", TEST, Fate.DELIVERED, arrived=number + 0.5, receiver="b")
        for number in range(100)
    ]

    lines = draw(trace, ["a", "b"], {A: "a", B: "b"}, lines=3).splitlines()

    assert [line.split()[0] for line in lines[1:]] == ["97.0000", "98.0000", "99.0000"]


def test_a_third_host_has_its_column_and_arrows_pass_behind_the_second() -> None:
    trace = [Message(1.0, A, B, "a", TEST, Fate.DELIVERED, arrived=1.1, receiver="c")]

    lines = draw(trace, ["a", "b", "c"], {A: "a", B: "c"}).splitlines()

    assert lines[1].index("|") == 10 + COLUMN // 2
    assert lines[1].rindex(">|") == 10 + COLUMN // 2 + 2 * COLUMN - 1


def test_a_packet_that_does_not_arrive_fails_the_run_with_seed_and_diagram() -> None:
    world = World(4711, weather=replace(CALM, loss=1.0))
    a, b = world.hosts

    with pytest.raises(AssertionError) as failure:
        world.check_delivery([(a, b)], within=1)

    text = str(failure.value)
    assert text.startswith(
        "a packet from host-1 to host-2 did not arrive within 1 s\nseed 4711, after 1.0000 simulated seconds"
    )
    assert "handshake 1" in text
    assert "x|  lost" in text


def test_a_packet_that_arrives_twice_altered_or_elsewhere_fails_the_run() -> None:
    world = World(1, 3)
    a, b, c = world.hosts
    letter = world.send(a, b)
    world.run(1)

    for host, packet, text in (
        (b, letter.packet, "twice"),
        (c, letter.packet, "for host-2"),
        (b, packets.echo(a.address, b.address, 1, 1), "nobody sent"),
    ):
        with pytest.raises(AssertionError, match=text):
            world._arrive(host, packet)


def test_hosts_that_disagree_fail_the_run() -> None:
    world = World(1)
    a, b = world.hosts
    world.send(a, b)
    world.run(1)
    world.check_agreement([(a, b)])
    world.check_one_tunnel([(a, b)], within=0)

    world.move(b, world.fresh_addr(), noticed=False)
    with pytest.raises(AssertionError, match=f"host-1 sends to .*, but host-2 is at {b.at}"):
        world.check_agreement([(a, b)])

    world.crash(b)
    world.start(b)
    with pytest.raises(AssertionError, match="host-1 sends through a tunnel that host-2 does not have"):
        world.check_agreement([(a, b)])
    with pytest.raises(AssertionError, match="host-2 has no tunnel"):
        world.check_agreement([(b, a)])
    with pytest.raises(AssertionError, match="use different tunnels"):
        world.check_one_tunnel([(a, b)], within=1)


def test_a_table_that_holds_more_than_it_should_fails_the_run() -> None:
    world = World(1)
    a, b = world.hosts
    world.send(a, b)
    world.run(1)
    world.check_tables()
    assert a.controller is not None

    a.controller._core.hostmap.indexes.try_allocate()

    with pytest.raises(AssertionError, match="host-1: 2 indexes are in use, of 1 tunnels"):
        world.check_tables()


def test_a_seed_replays_its_run_exactly() -> None:
    traces = []
    for _ in range(2):
        world = World(3, 8)
        for a, b in pairs_of(world, 2):
            world.talk(a, b, every=0.5, until=20)
        Chaos(world, until=15, every_s=0.5)
        world.run(20)
        traces.append(list(world.network.trace))

    assert len(traces[0]) > 1000
    assert traces[0] == traces[1]
