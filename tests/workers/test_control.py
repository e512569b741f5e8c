"""The control process, with the test in the places of supervisor, services, readers and a peer."""

import asyncio
import contextlib
import gc
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

import nebula_mp
from nebula_mp import clock
from nebula_mp.cert.identity import Identity
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.config.model import (
    FirewallConfig,
    FirewallRule,
    HandshakesConfig,
    HostPort,
    Offloads,
    TimersConfig,
)
from nebula_mp.control.actions import SendDatagram
from nebula_mp.datapath.api import UPCALL_AREAS, UpcallReason, encode_plain_record
from nebula_mp.datapath.virtio import HEADER_BYTES
from nebula_mp.errors import SystemCallError
from nebula_mp.ioctl_tun import TunDevice, WriteFault
from nebula_mp.newtypes import CertVersion, Counter, Curve, Instant, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import LockFile
from nebula_mp.shm_flows import REFUSED
from nebula_mp.shm_ring import Bell
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.udp_socket import UDP_SEGMENT, SendFault, UdpSocket
from nebula_mp.wire.header import HANDSHAKE_IX, MESSAGE_IP, TEST_REPLY, TEST_REQUEST, Header, MessageType
from nebula_mp.wire.ip import parse_flow
from nebula_mp.workers import control
from nebula_mp.workers.channel import Channel
from nebula_mp.workers.checked import Checked
from nebula_mp.workers.control import Control
from nebula_mp.workers.parts import Role, upcall_lock
from tests.support.forked import shared_words
from tests.support.pki import ANY_TIME, Pki
from tests.support.processes import eventually, forked
from tests.support.rings import patch
from tests.workers.control_rig import (
    LIMIT_S,
    OUR_IDENTITY,
    THEM,
    US,
    WORKERS,
    Hand,
    Rig,
    address_of,
    checked,
    collect,
    config,
    inbound,
    key_memory,
    loopback,
    now_ms,
    outbound,
    until,
)

MESSAGE, TEST, HANDSHAKE = MessageType.MESSAGE, MessageType.TEST, MessageType.HANDSHAKE
_DAY_S = 86_400

MakeRig = Callable[..., Rig]


class Wall:
    """The wall clock of the test; `shift_s` sets it."""

    shift_s = 0

    def __init__(self) -> None:
        self._start = clock.monotonic()

    def now(self) -> Instant:
        mono = clock.monotonic()
        return Instant(mono, round((ANY_TIME + self.shift_s + mono - self._start) * 1e9))


@pytest.fixture(autouse=True)
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    """Every certificate is valid."""
    made = Wall()
    monkeypatch.setattr(clock, "now", made.now)
    monkeypatch.setattr(clock, "wall_s", lambda: made.now().wall_s)
    return made


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    with ExitStack() as undo:
        yield lambda **how: Rig(undo, **how)


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig()


# ---- start ----


def test_ready_is_said_when_everything_is_attached(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def watch(kind: type, name: str, event: Callable[..., str]) -> None:
        original = getattr(kind, name)

        def watched(self: object, *arguments: Any) -> object:
            result = original(self, *arguments)
            events.append(event(*arguments))
            return result

        monkeypatch.setattr(kind, name, watched)

    watch(Control, "_attach", lambda worker: f"attached {worker}")
    watch(Control, "_listen", lambda: "listens")
    watch(Channel, "send", lambda kind: kind)

    async def story() -> None:
        pass

    rig.play(story)

    assert events == ["attached 0", "attached 1", "listens", "resolve", "ready"]


def test_upcalls_and_handshakes_that_waited_before_the_start_are_taken_in_order(rig: Rig) -> None:
    sent = [outbound(number.to_bytes(2, "big").ljust(1200)) for number in range(90)]  # eight areas
    rig.hands[1].ask(*sent)
    Bell(rig.hands[1].memory.control_bell).empty()  # as by a predecessor that died before it looked
    rig.peer.learn(US, rig.at)
    rig.peer.send(inbound())

    async def story() -> None:
        await until(lambda: len(rig.peer.delivered) == len(sent))
        await until(lambda: MESSAGE in [header.type for header in rig.peer.headers])

    rig.play(story)

    assert rig.peer.delivered == sent


def test_two_control_processes_never_read_the_same_upcalls(rig: Rig) -> None:
    locked = shared_words(1)

    def hold() -> None:
        assert LockFile(rig.parts().ring_locks).lock(upcall_lock(1)).try_take()
        locked[0] = 1
        eventually(lambda: False, 10 * LIMIT_S)

    async def story() -> None:
        raise AssertionError("it started")

    with forked(hold):
        assert eventually(lambda: locked[0] == 1, LIMIT_S)
        with pytest.raises(SystemCallError, match="upcall ring 1: another process reads it"):
            rig.play(story)


def test_the_process_tells_the_supervisor_that_it_is_alive_while_nothing_happens(rig: Rig) -> None:
    async def story() -> None:
        before = rig.memory.passes("control")
        await until(lambda: rig.memory.passes("control") >= before + 3)

    rig.play(story)


# ---- packets ----


@pytest.mark.parametrize("reason", [UpcallReason.NEW_FLOW_OUT, UpcallReason.NO_TUNNEL])
def test_a_packet_for_a_host_without_a_tunnel_starts_a_handshake_and_goes_out_when_it_is_up(
    rig: Rig, reason: UpcallReason
) -> None:
    packet = outbound()

    async def story() -> None:
        rig.hands[0].ask(packet, reason=reason)
        await until(lambda: rig.peer.delivered)

    rig.play(story)

    assert rig.peer.delivered == [packet]
    assert [header.type for header in rig.peer.headers] == [HANDSHAKE, MESSAGE]


def test_an_unanswered_handshake_is_sent_again_by_the_timer(make_rig: MakeRig) -> None:
    with loopback() as silent:
        entry = (HostPort(host="127.0.0.1", port=address_of(silent).port),)
        rig = make_rig(static_host_map=MappingProxyType({THEM: entry}), handshakes=HandshakesConfig())
        attempts: list[bytes] = []

        async def story() -> None:
            rig.hands[0].ask(outbound())
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(LIMIT_S):
                attempts.extend([await loop.sock_recv(silent, 9000) for _ in range(3)])

        rig.play(story)

    assert len(set(attempts)) == 1


def test_readers_find_a_tunnel_with_keys_that_work_both_ways_and_the_peers_row_leads_to_it(rig: Rig) -> None:
    back, there = inbound(), outbound(b"sealed by a reader", port=1)

    async def story() -> None:
        row = await rig.connect()
        assert row.state is TunnelState.PROVEN
        assert row.underlay == rig.peer.at
        for hand in rig.hands:
            assert hand.peers.tunnel(row.peer) == row.local_index
        rig.peer.send(back)
        owner = rig.hands[row.owner]
        assert await collect(back, lambda: [owner.open(each)[2] for each, _ in owner.udp.receive(9)]) == [
            back
        ]
        rig.hands[1 - row.owner].send(there)
        await until(lambda: there in rig.peer.delivered)

    rig.play(story)


def test_a_flow_is_allowed_only_after_its_packet_was_sent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    packet = outbound()
    at_sending: list[int | None] = []
    send = UdpSocket.send

    def watched(self: UdpSocket, datagram: bytes, to: UdpAddr) -> SendFault | None:
        fault = send(self, datagram, to)
        if Header.parse(datagram).type is MESSAGE:
            at_sending.append(rig.hands[0].goes_to(packet))
        return fault

    monkeypatch.setattr(UdpSocket, "send", watched)

    async def story() -> None:
        rig.hands[0].ask(packet)
        await until(lambda: rig.hands[0].goes_to(packet))
        assert rig.hands[0].goes_to(packet) == rig.tunnel().peer

    rig.play(story)

    assert at_sending == [None]


def test_an_inbound_flow_is_allowed_only_after_its_packet_was_written_to_its_owners_queue(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    packet = inbound()
    at_writing: list[bool | None] = []
    write = TunDevice.write

    def watched(self: TunDevice, written: bytes) -> WriteFault | None:
        fault = write(self, written)
        at_writing.append(rig.owner().comes_from(packet, rig.tunnel()))
        return fault

    monkeypatch.setattr(TunDevice, "write", watched)

    async def story() -> None:
        row = await rig.connect()
        rig.peer.send(packet)
        await until(lambda: rig.take() or rig.owner().comes_from(packet, row))
        assert rig.stack(row.owner) == [packet]
        assert rig.stack(1 - row.owner) == []
        rig.peer.send(packet)
        assert await collect(packet, rig.take) == [packet]
        assert rig.stack(0) + rig.stack(1) == []

    rig.play(story)

    assert at_writing == [None]


def test_the_controller_hears_of_flows_that_had_to_make_room(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    displaced = (parse_flow(outbound(), inbound=False), Seconds(7))
    heard: list[object] = []

    async def story() -> None:
        monkeypatch.setattr(rig.control._plane, "settle", lambda _: [displaced])
        monkeypatch.setattr(rig.control._controller, "handle_displaced", heard.extend)
        rig.hands[0].ask(outbound())
        await until(lambda: heard)

    rig.play(story)

    assert set(heard) == {displaced}


def test_refusals_are_in_the_flow_table_for_their_direction_only(make_rig: MakeRig) -> None:
    rig = make_rig(firewall=FirewallConfig())
    there, back = outbound(port=1), inbound(port=2)

    async def story() -> None:
        began = now_ms()
        rig.hands[0].ask(there)
        await until(lambda: rig.hands[0].goes_to(there, began) == REFUSED)
        row = rig.tunnel()
        assert rig.owner().comes_from(inbound(port=1), row, began) is None
        rig.hands[0].hand_up(UpcallReason.NEW_FLOW_IN, row.local_index, back, rig.peer.at)
        await until(lambda: rig.owner().comes_from(back, row, began) is False)
        assert rig.owner().goes_to(outbound(port=2), began) is None
        stats = (await rig.status())["stats"]
        assert stats["drop.firewall.outgoing.no_rule"] == 1
        assert stats["drop.firewall.incoming.no_rule"] == 1

    rig.play(story)

    assert rig.peer.delivered == []
    assert rig.stack(0) + rig.stack(1) == []


def test_a_request_for_a_sign_of_life_gets_a_reply(rig: Rig) -> None:
    async def story() -> None:
        await rig.connect()
        before = rig.peer.count(TEST, TEST_REPLY)
        rig.peer.ask(rig.at)
        await until(lambda: rig.take() or rig.peer.count(TEST, TEST_REPLY) > before)

    rig.play(story)


def test_the_first_message_on_a_candidate_proves_it(rig: Rig) -> None:
    packet = inbound()
    rig.peer.learn(US, rig.at)

    async def story() -> None:
        rig.peer.send(packet)
        await until(lambda: rig.peer.plane.tunnels)
        row = rig.tunnel()
        assert row.state is TunnelState.CANDIDATE
        assert rig.hands[0].peers.tunnel(row.peer) is None
        await until(lambda: rig.take() or rig.tunnel().state is TunnelState.PROVEN)
        assert rig.hands[0].peers.tunnel(row.peer) == row.local_index
        assert rig.stack(row.owner) == [packet]
        assert [host["initiator"] for host in (await rig.status())["hosts"]] == [False]

    rig.play(story)


def test_where_the_kernel_does_not_steer_handshakes_come_through_the_reader(rig: Rig) -> None:
    rig.reads_udp = False
    rig.peer.learn(US, rig.at)

    async def story() -> None:
        rig.peer.send(inbound())
        for _ in range(3):
            await rig.status()  # so control has had every chance to take it
        ((stage1, source),) = rig.steering.control.receive(9)
        rig.hands[0].raw(UpcallReason.DATAGRAM, stage1, source)
        await until(lambda: rig.take() or rig.stack(0) + rig.stack(1) == [inbound()])

    rig.play(story)


def test_datagrams_that_the_kernel_has_joined_are_taken_one_by_one(make_rig: MakeRig) -> None:
    rig = make_rig(offloads=Offloads(tso=False, uso=False))
    junk = Header(MessageType.HANDSHAKE, HANDSHAKE_IX, TunnelIndex(0), Counter(1)).encode() + bytes(84)
    together = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", len(junk)))

    async def story() -> None:
        rig.peer.socket.sendmsg([junk * 3], [together], 0, (str(rig.at.ip), rig.at.port))
        async with asyncio.timeout(LIMIT_S):
            while await rig.stat("mp.udp.rx.packets") < 3:
                pass
        assert await rig.stat("mp.udp.rx.packets") == 3
        assert await rig.stat("mp.udp.rx.bytes") == 300

    rig.play(story)


def test_a_packet_is_written_with_a_header_where_the_device_has_one(make_rig: MakeRig) -> None:
    rig = make_rig(offloads=Offloads(udp_gro=False))

    async def story() -> None:
        row = await rig.connect()
        for port in (5000, 5001):
            packet, stack = inbound(port=port), rig.stacks[row.owner]
            rig.peer.send(packet)
            frame = bytes(HEADER_BYTES) + packet
            got = await collect(frame, partial(taken_and_written, rig, stack))
            assert got == [frame]
            await make_device_anew(rig)

    rig.play(story)


async def make_device_anew(rig: Rig) -> None:
    """As the supervisor does when it was lost."""
    old = rig.control._tuns
    queues, rig.stacks = rig.new_queues()
    rig.tell("tuns", {}, *(queue.fileno() for queue in queues))
    await until(lambda: rig.control._tuns is not old)


def taken_and_written(rig: Rig, stack: socket.socket) -> list[bytes]:
    """What readers and control gave the local stack."""
    return rig.take() + rig.stack(stack)


def test_a_peer_that_seems_to_have_moved_is_asked_there(rig: Rig) -> None:
    async def story() -> None:
        row = await rig.connect()
        with loopback() as elsewhere:
            rig.owner().moved(row.local_index, address_of(elsewhere))
            async with asyncio.timeout(LIMIT_S):
                question = await asyncio.get_running_loop().sock_recv(elsewhere, 9000)
        header = Header.parse(question)
        assert (header.type, header.subtype) == (TEST, TEST_REQUEST)
        assert header.remote_index == row.remote_index

    rig.play(story)


def test_who_uses_an_index_that_is_not_known_is_told(rig: Rig) -> None:
    async def story() -> None:
        unknown = Header(MESSAGE, 0, TunnelIndex(0x1234_5678), Counter(9)).encode() + bytes(16)
        with loopback() as stranger:
            rig.hands[0].raw(UpcallReason.UNKNOWN_INDEX, unknown, address_of(stranger))
            async with asyncio.timeout(LIMIT_S):
                hint = Header.parse(await asyncio.get_running_loop().sock_recv(stranger, 9000))
        assert (hint.type, hint.remote_index) == (MessageType.RECV_ERROR, 0x1234_5678)

    rig.play(story)


def test_counters_of_control_and_of_readers_never_collide(rig: Rig) -> None:
    taken = shared_words(1_000_000)  # the first word: stop; the second: how many
    enough = 200

    async def story() -> None:
        row = await rig.connect()

        def seal() -> None:
            counters = rig.hands[0].counters()
            while not taken[0] and taken[1] + 2 < len(taken):
                counter = counters.reserve(row.local_index & 0xFFFF, row.generation, 1)
                if isinstance(counter, int):
                    taken[2 + taken[1]] = counter
                    taken[1] += 1

        with forked(seal) as child:
            await until(lambda: taken[1])
            port = 1
            while rig.peer.count(MESSAGE) < enough:
                port += 1
                rig.hands[1].ask(outbound(port=port))
                await asyncio.sleep(0.001)
                assert port < 65_000
            taken[0] = 1
            assert child.wait() == 0

    rig.play(story)

    ours = [header.counter for header in rig.peer.headers if header.type is MESSAGE]
    theirs = taken[2 : 2 + taken[1]].tolist()
    assert len(set(ours)) == len(ours) >= enough
    assert len(set(theirs)) == len(theirs)
    assert set(ours).isdisjoint(theirs)
    assert min(theirs) < max(ours)


# ---- what comes before its tunnel is known ----


class Hasty:
    """The peer, which sends on a new tunnel before we have read its answer, as a released one does."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.index = TunnelIndex(0)
        """The local index of the handshake that it was asked in."""
        self._stage2 = b""

    async def hear(self) -> None:
        """Be asked, and keep the answer back."""
        rig = self._rig
        rig.peer.answers = False
        rig.hands[0].ask(outbound(b"first", port=1))
        await until(lambda: rig.peer.handshakes)
        stage1 = next(data for data in rig.peer.received if Header.parse(data).type is HANDSHAKE)
        answer = rig.peer.controller.handle_datagram(stage1, rig.at, clock.now())
        self._stage2 = next(action.data for action in answer if isinstance(action, SendDatagram))
        self.index = Header.parse(self._stage2).remote_index
        rig.peer.answers = True

    def seal(self, packet: bytes) -> bytes:
        """A datagram on the tunnel that it has already."""
        (tunnel,) = self._rig.peer.controller._core.hostmap.by_remote_index(self.index)
        return self._rig.peer.plane.seal(tunnel, MESSAGE, MESSAGE_IP, packet)

    async def answer(self) -> Hand:
        """Say at last what it was asked for; gives the reader that owns the tunnel."""
        self._rig.peer.socket.sendto(self._stage2, (str(self._rig.at.ip), self._rig.at.port))
        await until(lambda: self._rig.hands[0].tunnels.get(self.index))
        return self._rig.hands[self._rig.hands[0].row(self.index).owner]


@pytest.mark.parametrize("reader", range(WORKERS))
def test_what_came_before_the_answer_is_opened_by_the_owner_in_order(rig: Rig, reader: int) -> None:
    """It comes up from whichever reader got it."""

    async def story() -> None:
        hasty = Hasty(rig)
        await hasty.hear()
        early = [hasty.seal(inbound(b"%d" % number, port=7)) for number in range(70)]
        rig.hands[reader].raw(UpcallReason.UNKNOWN_INDEX, early[0], rig.peer.at, *early[1:])
        kept = rig.control._controller._handshakes._early
        await until(lambda: len(kept) == 70)
        assert not any(hand.handed() for hand in rig.hands)

        owner = await hasty.answer()
        await until(lambda: rig.memory._reader_bells[owner.number].wait(0))
        found = owner.handed()

        assert found == [(datagram, rig.peer.at) for datagram in early]
        assert [owner.open(datagram)[2] for datagram, _ in found] == [
            inbound(b"%d" % number, port=7) for number in range(70)
        ]
        assert [hand.handed() for hand in rig.hands] == [[], []]
        assert await rig.stat("mp.strangers") == 70
        assert await rig.stat("drop.early") == 0

    rig.play(story)


def test_what_comes_up_or_to_controls_own_socket_after_the_answer_goes_to_the_owner_too(rig: Rig) -> None:
    async def story() -> None:
        hasty = Hasty(rig)
        await hasty.hear()
        one, two = (hasty.seal(inbound(note, port=7)) for note in (b"one", b"two"))
        owner = await hasty.answer()

        rig.hands[1 - owner.number].raw(UpcallReason.UNKNOWN_INDEX, one, rig.peer.at)
        found = await collect((one, rig.peer.at), owner.handed)
        rig.control._perform(rig.control._controller.handle_datagram(two, rig.peer.at, clock.now()))
        rig.control._settle()

        assert found == [(one, rig.peer.at)]
        assert owner.handed() == [(two, rig.peer.at)]

    rig.play(story)


def test_what_came_early_goes_to_whoever_owns_the_tunnel_by_then(rig: Rig) -> None:
    async def story() -> None:
        hasty = Hasty(rig)
        await hasty.hear()
        early = hasty.seal(inbound(b"early", port=7))
        rig.hands[0].raw(UpcallReason.UNKNOWN_INDEX, early, rig.peer.at)
        await until(lambda: len(rig.control._controller._handshakes._early))
        heir = 1 - rig.control._plane.owner(hasty.index)
        rig.tell("owners", {"owners": [heir] * WORKERS})
        await until(lambda: rig.control._plane.owner(hasty.index) == heir)

        owner = await hasty.answer()

        assert owner.number == heir
        assert await collect((early, rig.peer.at), owner.handed) == [(early, rig.peer.at)]

    rig.play(story)


def test_a_ring_to_a_reader_that_contradicts_itself_is_reported_and_attached_to_when_it_is_empty(
    rig: Rig,
) -> None:
    async def story() -> None:
        hasty = Hasty(rig)
        await hasty.hear()
        one, two, three = (hasty.seal(inbound(note, port=7)) for note in (b"one", b"two", b"three"))
        owner = await hasty.answer()
        worker = owner.number
        patch(rig.memory._handover[worker], "tail", 99)

        owner.raw(UpcallReason.UNKNOWN_INDEX, one, rig.peer.at)
        assert await rig.wait_for("bad_ring") == {"worker": worker}
        rig.memory.empty_rings(worker)
        owner.attach()
        rig.hands[1 - worker].raw(UpcallReason.UNKNOWN_INDEX, two, rig.peer.at)
        await until(lambda: rig.control._page.snapshot()["mp.ring.full.stranger"] == 2)
        rig.tell("upcalls", {"worker": worker})
        owner.raw(UpcallReason.UNKNOWN_INDEX, three, rig.peer.at)

        assert await collect((three, rig.peer.at), owner.handed) == [(three, rig.peer.at)]
        (record,) = rig.records("ring contradiction")
        assert (record["ring"], record["field"]) == (f"stranger/control/{worker}", "tail")

    rig.play(story)


# ---- a ring that contradicts itself ----


def spoil_head(rig: Rig) -> None:
    patch(rig.memory._upcall[1], "head", UPCALL_AREAS + 1)
    rig.hands[0].upcalls._bell.ring()


def publish(rig: Rig, reason: int, record: bytes) -> None:
    """Have reader 1 hand up what no reader does."""
    producer = rig.hands[1].producer
    assert producer.try_begin()
    assert producer.try_add(record, segment=reason)
    producer.publish()
    rig.hands[1].upcalls._bell.ring()


def spoil_reason(rig: Rig) -> None:
    publish(rig, 99, encode_plain_record(1))


def spoil_source(rig: Rig) -> None:
    publish(rig, UpcallReason.DATAGRAM, encode_plain_record(1))


def spoil_type(rig: Rig) -> None:
    record = bytearray(encode_plain_record(1))
    record[14], record[16] = 4, 77  # an address of IPv4, and a message of no type
    publish(rig, UpcallReason.MESSAGE, bytes(record))


SPOILS = {"head": spoil_head, "reason": spoil_reason, "source": spoil_source, "type": spoil_type}


@pytest.mark.parametrize("field", SPOILS)
def test_a_ring_that_contradicts_itself_is_reported_and_the_other_goes_on(rig: Rig, field: str) -> None:
    async def story() -> None:
        SPOILS[field](rig)
        assert await rig.wait_for("bad_ring") == {"worker": 1}
        rig.hands[0].ask(outbound(b"of the other"))
        await until(lambda: outbound(b"of the other") in rig.peer.delivered)
        assert rig.kinds() == ["resolve"]
        rig.memory.empty_rings(1)
        rig.hands[1].attach()
        rig.hands[1].ask(outbound(b"waits"))
        rig.tell("upcalls", {"worker": 1})
        await until(lambda: outbound(b"waits") in rig.peer.delivered)
        rig.hands[1].ask(outbound(b"of the emptied one", port=2))
        await until(lambda: outbound(b"of the emptied one", port=2) in rig.peer.delivered)

    rig.play(story)

    (record,) = rig.records("ring contradiction")
    assert (record["level"], record["ring"], record["field"]) == ("ERROR", "upcall/1", field)


def test_a_ring_that_contradicts_itself_before_the_start_is_reported_too(rig: Rig) -> None:
    spoil_head(rig)

    async def story() -> None:
        assert await rig.wait_for("bad_ring") == {"worker": 1}
        rig.hands[0].ask(outbound())
        await until(lambda: rig.peer.delivered)

    rig.play(story)


def test_a_ring_that_was_emptied_behind_its_back_is_no_crash(rig: Rig) -> None:
    async def story() -> None:
        rig.memory.empty_rings(0)
        rig.hands[0].attach()
        rig.hands[0].ask(outbound())
        await rig.wait_for("bad_ring")
        rig.tell("upcalls", {"worker": 0})
        await until(lambda: rig.peer.delivered)

    rig.play(story)


# ---- successors ----


def known(host: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in host.items() if name not in ("sent", "received")}


def test_a_successor_goes_on_without_a_handshake(rig: Rig) -> None:
    hosts: list[list[dict[str, Any]]] = []

    async def first() -> None:
        await rig.connect()
        await rig.pass_both_ways(b"one", port=5000)
        hosts.append((await rig.status())["hosts"])

    async def second() -> None:
        hosts.append((await rig.status())["hosts"])
        await rig.pass_both_ways(b"two", port=5000)
        await rig.pass_both_ways(b"three", port=6000)

    assert rig.play(first) is None
    shaken = rig.peer.handshakes
    rig.hands[1].ask(outbound(b"while nobody was there", port=7000))
    assert rig.play(second) is None

    assert outbound(b"while nobody was there", port=7000) in rig.peer.delivered
    assert rig.peer.handshakes == shaken
    before, after = hosts
    assert len(before) == 1
    assert list(map(known, after)) == list(map(known, before))
    assert after[0]["sent"] >= before[0]["sent"]
    assert [record["tunnels"] for record in rig.records("control goes on")] == [1]


def test_the_successor_of_a_process_that_was_killed_goes_on(rig: Rig) -> None:
    parts = rig.parts()

    async def first() -> None:
        await rig.wait_for("ready")
        await rig.pass_both_ways(b"one", port=5000)

    async def second() -> None:
        await rig.pass_both_ways(b"two", port=6000)

    with forked(lambda: control.main(parts)) as child:
        rig.wait(first)
        child.kill()
    rig.memory.clear_dead(Role.CONTROL, 0, child.pid, parts.start)
    shaken = rig.peer.handshakes
    rig.play(second)

    assert rig.peer.handshakes == shaken


def test_what_a_predecessor_counted_is_not_forgotten(rig: Rig) -> None:
    junk = Header(MESSAGE, 0, TunnelIndex(5), Counter(9)).encode() + bytes(16)

    async def first() -> None:
        rig.hands[0].raw(UpcallReason.UNKNOWN_INDEX, junk, rig.peer.at)
        await until(lambda: rig.memory.counters("control")["drop.unknown_index"] == 1)

    async def second() -> None:
        assert await rig.stat("drop.unknown_index") == 1
        rig.hands[0].raw(UpcallReason.UNKNOWN_INDEX, junk, rig.peer.at)
        await until(lambda: rig.memory.counters("control")["drop.unknown_index"] == 2)
        assert await rig.stat("drop.unknown_index") == 2

    rig.play(first)
    rig.play(second)


# ---- reload ----


def test_a_renewed_certificate_is_taken_over_and_shown_to_the_peer(make_rig: MakeRig) -> None:
    rig = make_rig(timers=TimersConfig(connection_alive_interval=Seconds(0.2)))
    renewed = Pki.shared().identity("us", f"{US}/24", groups=("new",), key_of=OUR_IDENTITY)

    async def story() -> None:
        await rig.connect()
        new = replace(rig.config, tun=replace(rig.config.tun, mtu=1400))
        answer = await rig.reload(checked(-1, new, renewed), rig.key)
        assert (answer["error"], answer["warnings"]) == (None, [])
        status = await rig.status()
        assert (status["certificate"]["groups"], status["mtu_bytes"]) == (["new"], 1400)

        def is_shown() -> bool:
            rig.peer.send(inbound())  # the tunnel is looked after while it is in use
            rig.take()
            return ("new",) in [host.groups for host in rig.peer.controller.hosts()]

        await until(is_shown)

    rig.play(story)


def test_new_rules_are_asked_about_every_flow_again(rig: Rig) -> None:
    packet = outbound(port=1)
    strict = replace(rig.config, firewall=FirewallConfig(inbound=(FirewallRule(),)))

    async def story() -> None:
        await rig.connect()
        await until(lambda: rig.hands[0].goes_to(packet))
        assert (await rig.reload(checked(-1, strict), rig.key))["error"] is None
        assert rig.hands[0].goes_to(packet) is None
        asked = now_ms()
        rig.hands[0].ask(packet)
        await until(lambda: rig.hands[0].goes_to(packet, asked) == REFUSED)

    rig.play(story)


def test_the_log_is_written_as_a_reload_says(rig: Rig) -> None:
    quiet = replace(rig.config, logging=replace(rig.config.logging, format="text"))

    async def story() -> None:
        await rig.reload(checked(-1, quiet), rig.key)
        rig.log()  # so that what comes now can be told from what came before
        rig.tell("stop")
        await rig.ended()

    rig.play(story)

    with pytest.raises(ValueError, match="Expecting value"):
        rig.log()


def open_descriptors() -> int:
    gc.collect()  # what earlier tests mapped
    return len(list(Path("/proc/self/fd").iterdir()))


Refused = Callable[[Rig], Awaitable[dict[str, Any]]]


async def other_network(rig: Rig) -> dict[str, Any]:
    identity = Pki.shared().identity("us", "10.42.0.99/24", key_of=OUR_IDENTITY)
    return await rig.reload(checked(-1, rig.config, identity), rig.key)


async def other_curve(rig: Rig) -> dict[str, Any]:
    pki = Pki(seed=9, curve=Curve.P256)
    identity = pki.identity("us", f"{US}/24")
    return await reload_with(rig, checked(-1, rig.config, identity, pki), identity)


async def another_key(rig: Rig) -> dict[str, Any]:
    return await reload_with(rig, checked(-1, rig.config), Pki.shared().identity("else", f"{US}/24"))


async def reload_with(rig: Rig, new: Checked, identity: Identity) -> dict[str, Any]:
    key = key_memory(encode_private_key(identity.private_key))
    try:
        return await rig.reload(new, key)
    finally:
        os.close(key)


async def empty_key(rig: Rig) -> dict[str, Any]:
    key = key_memory("")
    try:
        return await rig.reload(checked(-1, rig.config), key)
    finally:
        os.close(key)


async def no_key(rig: Rig) -> dict[str, Any]:
    return await rig.reload(checked(-1, rig.config))


async def no_configuration(rig: Rig) -> dict[str, Any]:
    rig.tell("reload", {"id": 3, "checked": b"junk"}, rig.key)
    return await rig.wait_for("reloaded")


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (other_network, "restart to change addresses"),
        (other_curve, "restart to change the curve"),
        (another_key, "is not a pair with"),
        (empty_key, "pki.key k"),
        (no_key, "the private key did not come"),
        (no_configuration, "cannot be read"),
    ],
)
def test_a_reload_that_is_refused_says_why_and_changes_nothing(
    rig: Rig, refused: Refused, reason: str
) -> None:
    async def story() -> None:
        await rig.connect()
        before, open_before = await rig.status(), open_descriptors()
        answer = await refused(rig)
        assert reason in answer["error"]
        assert answer["warnings"] == []
        after = await rig.status()
        assert open_descriptors() == open_before
        del before["certificate"]["expires_in_s"], after["certificate"]["expires_in_s"]
        for name in ("certificate", "networks", "hosts", "sources"):
            assert after[name] == before[name]
        shaken = rig.peer.handshakes
        await rig.pass_both_ways(b"still here", port=9)
        assert rig.peer.handshakes == shaken

    rig.play(story)


# ---- what else the supervisor and services say ----


def test_tunnels_of_a_worker_that_was_given_up_go_to_the_other(rig: Rig) -> None:
    packet = inbound(b"to the other", port=77)

    async def story() -> None:
        row = await rig.connect()
        other = 1 - row.owner
        rig.steering.steer([other] * WORKERS)
        rig.tell("owners", {"owners": [other] * WORKERS})
        await until(lambda: rig.tunnel().owner == other)
        rig.peer.send(packet)
        assert await collect(packet, lambda: rig.take() + rig.stack(other)) == [packet]
        assert rig.tunnel().generation == row.generation

    rig.play(story)


def test_a_device_that_was_made_anew_is_used_from_then_on(rig: Rig) -> None:
    async def story() -> None:
        row = await rig.connect()
        old = rig.control._tuns
        queues, stacks = rig.new_queues()
        rig.tell("tuns", {}, *(queue.fileno() for queue in queues))
        await until(lambda: rig.control._tuns is not old)
        assert [tun.fileno() for tun in old] == [-1] * WORKERS
        rig.peer.send(inbound())
        stack = stacks[row.owner]
        assert await collect(inbound(), lambda: rig.take() + rig.stack(stack)) == [inbound()]

    rig.play(story)


def test_peers_hear_from_us_when_our_underlay_changed(rig: Rig) -> None:
    async def story() -> None:
        await rig.connect()
        assert rig.peer.count(TEST, TEST_REQUEST) == 0
        rig.tell("underlay")
        await until(lambda: rig.peer.count(TEST, TEST_REQUEST))

    rig.play(story)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_services_are_asked_where_hosts_are_and_believed(make_rig: MakeRig, host: str) -> None:
    rig = make_rig(host=host, static_host_map=MappingProxyType({}))

    async def story() -> None:
        await rig.wait_for("resolve")
        rig.hands[0].ask(outbound())
        await until(rig.control._controller.next_timeout)
        assert rig.peer.received == []
        rig.say("resolved", {"remotes": {str(THEM): [str(rig.peer.at)]}})
        await until(lambda: rig.peer.delivered)
        assert [host["remote"] for host in (await rig.status())["hosts"]] == [str(rig.peer.at)]

    rig.play(story)


def test_until_services_speak_the_literals_of_the_static_host_map_are_used(make_rig: MakeRig) -> None:
    rig = make_rig()
    entries = (HostPort(host="name.example", port=1), *rig.config.static_host_map[THEM])
    rig.checked = checked(rig.key, config(static_host_map=MappingProxyType({THEM: entries})))

    async def story() -> None:
        rig.hands[0].ask(outbound())
        await until(lambda: rig.peer.delivered)

    rig.play(story)


def test_status_tells_who_we_are_whom_we_talk_to_and_what_all_processes_counted(rig: Rig) -> None:
    certificate = OUR_IDENTITY.certificates[CertVersion.V2]
    rig.hands[0].page.add(SLOTS["mp.udp.tx.packets"], 5)
    rig.hands[1].page.add(SLOTS["mp.udp.tx.packets"], 7)
    writer = StatsPage(rig.memory._pages["writer/1"].descriptor, writable=True)
    writer.add(SLOTS["mp.udp.tx.packets"], 100)
    answers = []

    async def story() -> None:
        row = await rig.connect()
        answers.append(await rig.status())
        (host,) = answers[0]["hosts"]
        assert (host["local_index"], host["remote_index"]) == (row.local_index, row.remote_index)

    rig.play(story)

    (status,) = answers
    (host,) = status["hosts"]
    assert {
        name: status[name]
        for name in ("version", "device", "listen", "kernel", "mtu_bytes", "sources", "offloads")
    } == {
        "version": nebula_mp.__version__,
        "device": "nebula1",
        "listen": str(rig.at),
        "kernel": "python",
        "mtu_bytes": 1300,
        "sources": ["/etc/nebula/config.yml"],
        "offloads": {
            "tso": False,
            "uso": False,
            "udp_segment": False,
            "udp_gro": False,
            "multiqueue": False,
        },
    }
    assert status["networks"] == [f"{US}/24"]
    assert {**status["certificate"], "expires_in_s": 0} == {
        "name": "us",
        "groups": [],
        "fingerprint": certificate.fingerprint,
        "not_after": certificate.not_after,
        "expires_in_s": 0,
    }
    assert status["certificate"]["expires_in_s"] == pytest.approx(
        certificate.not_after - ANY_TIME, abs=LIMIT_S
    )
    assert {name: value for name, value in host.items() if name not in ("local_index", "remote_index")} == {
        "name": "them",
        "addresses": [str(THEM)],
        "groups": [],
        "fingerprint": rig.peer.controller._core.identity.newest.fingerprint,
        "remote": str(rig.peer.at),
        "primary": True,
        "initiator": True,
        "sent": 4,  # the handshake has the first two counters; a packet, and the reply to a question
        "received": 1,
    }
    # Control received the other half of the handshake by itself; the question came to a reader.
    assert status["stats"]["mp.udp.tx.packets"] == 5 + 7 + 100 + len(rig.peer.received)
    assert status["stats"]["mp.udp.rx.packets"] == 1
    assert status["stats"]["handshake_manager.initiated"] == 1


# ---- ends ----


def test_a_stop_says_goodbye_to_peers_and_ends_with_0(rig: Rig) -> None:
    async def story() -> None:
        row = await rig.connect()
        rig.tell("stop")
        await rig.wait_for("stopped")
        assert await rig.ended() == 0
        await until(lambda: rig.peer.controller.hosts() == [])
        assert rig.hands[0].tunnels.get(row.local_index) is None

    assert rig.play(story) == 0
    assert rig.peer.headers[-1].type is MessageType.CLOSE_TUNNEL


def test_the_process_of_its_own_serves_and_stops(rig: Rig) -> None:
    codes = shared_words(1)
    parts = rig.parts()

    def main() -> None:
        codes[0] = 100 + control.main(parts)

    async def story() -> None:
        await rig.wait_for("ready")
        await rig.pass_both_ways(b"x", port=1)
        rig.tell("stop")
        await rig.wait_for("stopped")

    with forked(main) as child:
        rig.wait(story)
        assert child.wait() == 0

    assert codes[0] == 100


def test_our_own_fault_is_logged_with_its_place_and_ends_with_1(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError("a fault")

        monkeypatch.setattr(rig.control._controller, "handle_tun_packet", fail)
        rig.hands[0].ask(outbound())
        await rig.ended()

    assert rig.play(story) == 1
    (record,) = rig.records("unexpected error in control")
    assert (record["level"], record["error"]) == ("ERROR", "ZeroDivisionError: a fault")
    assert "_on_bell" in record["stack"]


def test_what_the_loop_complains_about_is_no_reason_to_end(rig: Rig) -> None:
    async def story() -> None:
        asyncio.get_running_loop().call_exception_handler({"message": "a complaint"})
        assert (await rig.status())["device"] == "nebula1"

    rig.play(story)

    assert [record["error"] for record in rig.records("event loop")] == ["a complaint"]


@pytest.mark.parametrize(
    ("who", "kind", "body"),
    [
        ("supervisor", "no message", {}),
        ("supervisor", "dance", {}),
        ("supervisor", "reload", {}),
        ("supervisor", "owners", {"owners": "none"}),
        ("supervisor", "owners", {"owners": []}),
        ("supervisor", "upcalls", {}),
        ("supervisor", "upcalls", {"worker": 99}),
        ("services", "no message", {}),
        ("services", "status", {}),
        ("services", "resolved", {}),
        ("services", "resolved", {"remotes": {"nowhere": []}}),
        ("services", "resolved", {"remotes": {"10.42.0.2": ["192.0.2.1"]}}),
    ],
)
def test_a_message_that_says_nothing_sensible_ends_the_process_and_is_logged(
    rig: Rig, who: str, kind: str, body: dict[str, object]
) -> None:
    channel = rig._channels[who]

    async def story() -> None:
        if kind == "no message":
            os.write(channel.fileno(), b"\xc1 is no msgpack")
        else:
            assert channel.send(kind, body)
        await rig.ended()

    assert rig.play(story) == 1
    assert [record["level"] for record in rig.records("unexpected error in control")] == ["ERROR"]


def test_a_message_of_services_that_is_not_known_changes_nothing(rig: Rig) -> None:
    async def story() -> None:
        rig.say("dance")
        assert (await rig.status())["device"] == "nebula1"

    rig.play(story)


# ---- faults ----


@pytest.mark.parametrize(
    ("fault", "message", "level"),
    [
        (SendFault.UNREACHABLE, "peer address unreachable", "INFO"),
        (SendFault.TOO_BIG, "path mtu", "INFO"),
        (SendFault.REFUSED_LOCALLY, "a local firewall refuses our datagrams", "WARN"),
        (SendFault.OTHER, "datagram not sent", "WARN"),
        (SendFault.DROPPED, None, None),
    ],
)
def test_faults_of_sending_are_counted_each_and_written_once_a_minute(
    make_rig: MakeRig,
    fault: SendFault,
    message: str | None,
    level: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = make_rig(handshakes=HandshakesConfig())

    async def story() -> None:
        monkeypatch.setattr(rig.control._udp, "send", lambda *_: fault)
        rig.hands[0].ask(outbound())  # stage 1 again and again
        await until(lambda: rig.memory.counters("control")[fault] >= 3)
        assert await rig.stat("mp.udp.tx.packets") == 0

    rig.play(story)

    faults = [record for record in rig.log() if record.get("udpAddr") == str(rig.peer.at)]
    written = [(record["msg"], record["level"], record["count"]) for record in faults if "count" in record]
    assert written == ([] if message is None else [(message, level, 1)])


def test_a_packet_that_the_device_refuses_is_counted_and_written_once_a_minute(rig: Rig) -> None:
    for queue in rig.queues:
        queue.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes of it what it can

    async def story() -> None:
        row = await rig.connect()
        for port in range(1, 4):
            too_long = inbound(bytes(8000), port=port)
            rig.owner().hand_up(UpcallReason.NEW_FLOW_IN, row.local_index, too_long, rig.peer.at)
        await until(lambda: rig.memory.counters("control")[WriteFault.REFUSED] == 3)

    rig.play(story)

    (record,) = rig.records("packet for the tun device dropped")
    assert (record["level"], record["reason"], record["count"]) == ("WARN", "mp.tun.drop.refused", 1)


def test_a_local_stack_that_takes_nothing_costs_packets_and_nothing_else(rig: Rig) -> None:
    async def story() -> None:
        row = await rig.connect()
        queue = rig.queues[row.owner]
        with contextlib.suppress(BlockingIOError):
            while True:
                queue.send(bytes(1000))
        rig.owner().hand_up(UpcallReason.NEW_FLOW_IN, row.local_index, inbound(bytes(1000)), rig.peer.at)
        await until(lambda: rig.memory.counters("control")[WriteFault.FULL] == 1)
        assert await rig.stat("mp.tun.again") >= 1
        assert len(set(rig.stack(row.owner))) == 1
        await rig.pass_both_ways(b"again", port=3)

    rig.play(story)

    assert rig.records("packet for the tun device dropped") == []


def test_a_wall_clock_that_was_set_is_told(rig: Rig, wall: Wall) -> None:
    async def story() -> None:
        wall.shift_s = 3600
        await until(lambda: rig.records("clock jumped"))
        assert await rig.stat("mp.clock.jumps") == 1

    rig.play(story)

    (record,) = rig.records("clock jumped")
    assert record["seconds"] == pytest.approx(3600, abs=LIMIT_S)


def test_the_end_of_our_own_certificate_is_announced_once(rig: Rig, wall: Wall) -> None:
    async def story() -> None:
        await until(lambda: rig.memory.passes("control") > 1)
        assert rig.records("own certificate expires soon") == []
        wall.shift_s = OUR_IDENTITY.newest.not_after - ANY_TIME - 5 * _DAY_S
        await until(lambda: rig.records("own certificate expires soon"))

    rig.play(story)

    (record,) = rig.records("own certificate expires soon")
    assert (record["certName"], record["daysLeft"]) == ("us", 4)


def test_after_a_reload_the_end_of_the_new_certificate_is_announced(rig: Rig, wall: Wall) -> None:
    renewed = Pki.shared().identity("us-again", f"{US}/24", key_of=OUR_IDENTITY)

    async def story() -> None:
        await rig.reload(checked(-1, rig.config, renewed), rig.key)
        wall.shift_s = renewed.newest.not_after - ANY_TIME - 5 * _DAY_S
        await until(lambda: rig.records("own certificate expires soon"))

    rig.play(story)

    (record,) = rig.records("own certificate expires soon")
    assert record["certName"] == "us-again"


def test_datagrams_that_the_kernel_dropped_are_told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(rig.control._udp, "kernel_drops", lambda: 7)
        await until(lambda: rig.records("udp receive buffer overflowed"))
        assert await rig.stat("udp.0.drops") == 7

    rig.play(story)

    (record,) = rig.records("udp receive buffer overflowed")
    assert (record["drops"], record["new"]) == (7, 7)
