"""Nothing unauthenticated changes anything: copies, forgeries, noise, recv_error; and the reasons of drops."""

import copy
import dataclasses
from dataclasses import replace
from ipaddress import ip_address
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nebula_mp.config.model import (
    Config,
    ListenConfig,
    RecvErrorPolicy,
    TimersConfig,
)
from nebula_mp.control.actions import SendDatagram
from nebula_mp.newtypes import CertVersion, Counter, Instant, Seconds, TunnelIndex, UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, Header, MessageType
from tests.control.pair import CONFIG, STRANGER, Datagram, Node, Wire, kinds, sealed, udp, with_config
from tests.control.state import state_of
from tests.support import strangers

# ---- nothing unauthenticated changes anything ----


def connected(config: Config = CONFIG) -> tuple[Wire, Node, Node, list[Datagram]]:
    """Two nodes with a live tunnel that b started, and everything that was on the wire."""
    wire = Wire(config=config)
    a, b = wire.nodes
    wire.send(b, a)
    seen = wire.settle()
    for _ in range(3):
        wire.send(a, b)
        wire.send(b, a)
        seen += wire.settle()
    return wire, a, b, seen


def test_no_copied_forged_or_random_datagram_changes_the_state() -> None:
    wire, a, b, seen = connected()
    to_a = [datagram.data for datagram in seen if datagram.to == a.at]
    index = a.controller.hosts()[0].local_index
    before = state_of(a.controller)

    attempts = list(to_a)  # replays
    for data in to_a:
        for at in range(0, len(data), 7):
            attempts.append(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
            attempts.append(data[:at])
    attempts += [
        sealed(kind, index, counter) for kind in MessageType for counter in (0, 1, 2, 5, 99, 2**64 - 1)
    ]
    for source in (b.at, STRANGER):
        for data in attempts:
            a.plane.receive(a.controller, data, source, wire.now)

    assert state_of(a.controller) == before
    assert a.controller.hosts()[0].remote == b.at


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(list(MessageType)), st.integers(0, 2**64 - 1))
def test_random_bytes_change_nothing(noise: bytes, kind: MessageType, counter: int) -> None:
    wire, a, b, _ = CONNECTED
    index = a.controller.hosts()[0].local_index
    before = state_of(a.controller)

    for data in (noise, Header(kind, 0, index, Counter(counter)).encode() + noise):
        a.plane.receive(a.controller, data, b.at, wire.now)

    assert state_of(a.controller) == before


CONNECTED = connected()


def stage_1_copies(wire: Wire, victim: Node, count: int) -> list[bytes]:
    """Stage 1 messages that carry `victim`'s genuine certificate, each with a fresh ephemeral key and time."""
    from nebula_mp.handshake.machine import Initiator  # noqa: PLC0415

    dice = Random(5)
    return [
        Initiator(
            victim.identity,
            CONFIG.cipher,
            CertVersion.V1 if CertVersion.V1 in victim.identity.certificates else CertVersion.V2,
            dice.randbytes,
            local_index=TunnelIndex(dice.randrange(1, 2**32)),
            time_ns=wire.now.wall_ns + (number + 1) * 1_000_000,
        ).stage1
        for number in range(count)
    ]


def test_ten_thousand_copied_replayed_and_random_stage_1_leave_a_live_tunnel_undisturbed() -> None:
    """All copies differ, and so does all noise; the replayed message is one, again and again.

    In every pause the candidates that the copies left behind end by themselves. The tunnel's own check, which
    renews what it knows of its traffic, comes after it all: whatever changes before then is the stranger's doing.
    """
    calm = TimersConfig(connection_alive_interval=Seconds(3600))
    wire, a, b, seen = connected(with_config(timers=calm))
    replayed = next(datagram.data for datagram in seen if Header.parse(datagram.data).counter == 1)
    dice = Random(6)
    before = state_of(a.controller)
    copies, noises, largest = set(), set(), 0

    for _ in range(50):
        for _ in range(200):
            copy_, noise = strangers.copied(replayed, dice), strangers.random(replayed, dice)
            copies.add(copy_)
            noises.add(noise)
            source = dice.choice((STRANGER, b.at))
            for data in (copy_, replayed, noise):
                a.plane.receive(a.controller, data, source, wire.now)
            largest = max(largest, len(a.controller._core.hostmap.candidates()))
            wire.set_time(wire.now.mono + 0.01)
            a.controller.handle_timeout(wire.now)
        assert state_of(a.controller) == before
        assert len(a.controller._core.hostmap.candidates()) == 5
        wire.set_time(wire.now.mono + 6)
        a.controller.handle_timeout(wire.now)
        assert a.controller._core.hostmap.candidates() == ()
        assert state_of(a.controller) == before

    assert (len(copies), len(noises), largest) == (10_000, 10_000, 5)
    assert a.controller.hosts()[0].remote == b.at
    packet = wire.send(a, b, b"undisturbed")
    wire.settle()
    assert b.delivered[-1] == packet


def test_a_copied_stage_1_from_the_right_address_does_not_move_traffic_either() -> None:
    wire, a, b, _ = connected()
    [copied] = stage_1_copies(wire, b, 1)

    actions = a.plane.receive(a.controller, copied, b.at, wire.now)
    packet = wire.send(a, b)
    [datagram] = wire.queue

    assert sum(isinstance(action, SendDatagram) for action in actions) == 2  # the answer and a test
    tunnel = b.controller._core.hostmap.by_index(Header.parse(datagram.data).remote_index)
    assert tunnel is not None
    assert tunnel.proven
    wire.settle()
    assert b.delivered[-1] == packet


def test_candidates_from_one_address_do_not_push_out_those_from_elsewhere() -> None:
    wire, a, b, _ = connected()
    honest, *others = stage_1_copies(wire, b, 40)
    a.plane.receive(a.controller, honest, b.at, wire.now)

    for data in others:
        a.plane.receive(a.controller, data, STRANGER, wire.now)

    candidates = a.controller._core.hostmap.candidates()
    assert [candidate.remote for candidate in candidates] == [b.at] + 4 * [STRANGER]


def test_what_overtakes_the_stage_2_is_not_answered_with_recv_error() -> None:
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    wire.deliver_one()
    stage2, test = wire.queue
    wire.queue.clear()

    wire.inject(a, test.data, b.at)
    after_the_test = len(wire.queue)
    wire.inject(a, stage2.data, b.at)
    wire.settle()

    assert after_the_test == 0
    assert not a.controller.stats["drop.early"]
    assert a.plane.passed(a.controller._core.hostmap.tunnels(b.address)[0]).received == 1
    assert len(b.delivered) == 1


def test_an_old_stage_1_is_not_answered_and_costs_one_test_a_second() -> None:
    wire, a, b, _ = connected()
    wire.now = Instant(wire.now.mono, wire.now.wall_ns - 10**12)
    old = stage_1_copies(wire, b, 50)

    sent = [action for data in old for action in a.plane.receive(a.controller, data, STRANGER, wire.now)]

    datagrams = [action for action in sent if isinstance(action, SendDatagram)]
    assert [Header.parse(action.data).type for action in datagrams] == [MessageType.TEST]
    assert datagrams[0].to == b.at
    assert a.controller._core.hostmap.candidates() == ()


def test_a_stage_2_with_an_untrusted_certificate_does_not_end_our_handshake() -> None:
    """Whoever sees our stage 1 can answer it with a key of his own; the genuine answer must still count."""
    wire = Wire()
    a, b = wire.nodes
    wire.send(a, b)
    stage1 = wire.queue[0]
    forger = Wire()
    mallory = forger.join(2, identity=wire.pki.other_ca().identity("host-2", "10.42.0.2/16"))
    mallory.controller._core.pool = wire.pki.pool()
    forger.inject(mallory, stage1.data, a.at)
    forged = forger.queue[0]

    wire.inject(a, forged.data, b.at)
    wire.settle()

    assert a.controller.stats["drop.handshake_cert"] == 1
    assert len(b.delivered) == 1


# ---- recv_error ----


def test_a_recv_error_from_the_peers_address_starts_one_handshake_and_keeps_the_tunnel() -> None:
    wire, a, b, _ = connected()
    index = a.controller.hosts()[0].remote_index
    error = Header(MessageType.RECV_ERROR, 0, index, Counter(0)).encode()

    for _ in range(100):
        wire.inject(a, error, b.at)

    assert kinds(list(wire.queue)) == ["test", "handshake_1"]
    assert len(a.controller.hosts()) == 1


@pytest.mark.parametrize(
    ("policy", "source", "reacts"),
    [
        pytest.param(RecvErrorPolicy.ALWAYS, "peer", True, id="always, from the peer"),
        pytest.param(RecvErrorPolicy.ALWAYS, "stranger", False, id="always, from a stranger"),
        pytest.param(RecvErrorPolicy.NEVER, "peer", False, id="never"),
        pytest.param(RecvErrorPolicy.PRIVATE, "peer", False, id="private, from a public address"),
    ],
)
def test_recv_error_is_believed_only_from_the_peers_address_and_as_configured(
    policy: RecvErrorPolicy, source: str, reacts: bool
) -> None:
    wire = Wire(config=with_config(listen=ListenConfig(accept_recv_error=policy)))
    a, b = wire.nodes
    wire.connect(a, b)
    index = a.controller.hosts()[0].remote_index

    wire.inject(
        a, sealed(MessageType.RECV_ERROR, index)[:HEADER_BYTES], b.at if source == "peer" else STRANGER
    )

    assert bool(wire.queue) is reacts


def test_at_most_a_hundred_recv_errors_are_sent_a_second_and_none_is_larger_than_its_cause() -> None:
    wire = Wire()
    a, _ = wire.nodes

    for number in range(1000):
        wire.inject(a, sealed(MessageType.MESSAGE, 0x10000 + number)[: 16 + number % 20], STRANGER)
    first_second = len(wire.queue)
    wire.set_time(wire.now.mono + 1)
    wire.inject(a, sealed(MessageType.MESSAGE, 7), STRANGER)

    assert first_second == 100
    assert len(wire.queue) == 101
    assert {len(datagram.data) for datagram in wire.queue} == {16}
    assert Header.parse(wire.queue[-1].data).remote_index == 7


def test_recv_error_is_not_sent_if_the_operator_says_never() -> None:
    wire = Wire(config=with_config(listen=ListenConfig(send_recv_error=RecvErrorPolicy.NEVER)))
    a, _ = wire.nodes

    wire.inject(a, sealed(MessageType.MESSAGE, 7), STRANGER)

    assert not wire.queue


# ---- reasons ----


@pytest.mark.parametrize(
    ("data", "source", "counter"),
    [
        pytest.param(b"", STRANGER, "messages.rx.punchy", id="empty punch"),
        pytest.param(b"\x01", STRANGER, "messages.rx.punchy", id="one-byte punch"),
        pytest.param(bytes(15), STRANGER, "drop.short", id="short"),
        pytest.param(b"\x21" + bytes(31), STRANGER, "drop.version", id="version 2"),
        pytest.param(b"\x17" + bytes(31), STRANGER, "drop.type", id="type 7"),
        pytest.param(b"\x11\x09" + bytes(30), STRANGER, "drop.type", id="subtype 9"),
        pytest.param(
            sealed(MessageType.TEST, 1), UdpAddr(ip_address("10.42.9.9"), 1), "drop.looped", id="looped"
        ),
        pytest.param(sealed(MessageType.TEST, 1), STRANGER, "drop.unknown_index", id="unknown index"),
        pytest.param(b"\x11\x01" + bytes(30), STRANGER, "drop.relay_index", id="relay frame"),
        pytest.param(
            sealed(MessageType.HANDSHAKE, 9, 1), STRANGER, "drop.handshake_header", id="stage 1 with an index"
        ),
        pytest.param(
            sealed(MessageType.HANDSHAKE, 9, 2), STRANGER, "drop.handshake_unknown", id="stage 2 for nobody"
        ),
        pytest.param(sealed(MessageType.HANDSHAKE, 0, 1), STRANGER, "drop.handshake", id="stage 1 of zeros"),
    ],
)
def test_each_bad_datagram_counts_under_exactly_one_reason(
    data: bytes, source: UdpAddr, counter: str
) -> None:
    wire = Wire()
    a, _ = wire.nodes
    before = copy.copy(a.controller.stats)

    a.plane.receive(a.controller, data, source, wire.now)

    a.controller.stats.subtract(before)
    changed = {name: count for name, count in a.controller.stats.items() if count}
    changed.pop("messages.tx.recv_error", None)
    assert changed == {counter: 1}


@pytest.mark.parametrize("cut", [0, 1, 15])
def test_a_sealed_datagram_without_room_for_a_tag_is_truncated(cut: int) -> None:
    wire, a, b, _ = connected()
    index = a.controller.hosts()[0].local_index

    a.plane.receive(a.controller, sealed(MessageType.MESSAGE, index)[: HEADER_BYTES + cut], b.at, wire.now)

    assert a.controller.stats["drop.truncated"] == 1


def test_replayed_and_forged_datagrams_are_told_apart() -> None:
    wire, a, b, seen = connected()
    last = [datagram.data for datagram in seen if datagram.to == a.at][-1]

    a.plane.receive(a.controller, last, b.at, wire.now)
    a.plane.receive(
        a.controller, sealed(MessageType.MESSAGE, a.controller.hosts()[0].local_index, 999), b.at, wire.now
    )

    assert a.controller.stats["drop.replay"] == 1
    assert a.controller.stats["drop.auth"] == 1


def test_an_exhausted_tunnel_sends_nothing_and_goes_at_its_next_check() -> None:
    wire, a, b, _ = connected()
    tunnel = a.controller._core.hostmap.primary(b.address)
    assert tunnel is not None
    a.plane.tunnels[tunnel.local_index].counter = Counter(2**64 - 1 - 2**40)

    wire.send(a, b)
    sent = len(wire.queue)
    wire.advance(5)

    assert sent == 0
    assert a.controller.stats["messages.tx.exhausted"] >= 1
    assert a.controller.hosts() == []


def test_a_tunnel_near_its_counter_threshold_is_replaced() -> None:
    wire, a, b, _ = connected()
    tunnel = a.controller._core.hostmap.primary(b.address)
    assert tunnel is not None
    a.plane.tunnels[tunnel.local_index].counter = Counter(2**34)

    for _ in range(8):
        wire.send(a, b)
        wire.send(b, a)
        wire.advance(1)

    assert a.controller._core.hostmap.primary(b.address) is not tunnel
    assert "message counter threshold" in [event.fields.get("reason") for event in a.logs]


def test_the_state_used_above_sees_every_field_that_matters() -> None:
    """Guard against a comparison that compares nothing."""
    wire, a, b, _ = connected()
    before = state_of(a.controller)
    tunnel = a.controller._core.hostmap.primary(b.address)
    assert tunnel is not None

    changes = 0
    for change in (
        lambda: a.plane.tunnels[tunnel.local_index].window.update(5000),
        lambda: setattr(tunnel, "remote", STRANGER),
        lambda: setattr(tunnel.traffic, "saw_in", not tunnel.traffic.saw_in),
        lambda: setattr(tunnel, "roamed_from", STRANGER),
        lambda: a.controller._core.remotes.block(b.address, STRANGER),
        lambda: a.controller.handle_tun_packet(udp(a.address, ip_address("10.42.7.7")), wire.now),
        lambda: setattr(tunnel, "session", dataclasses.replace(tunnel.session, peer_time_ns=1)),
    ):
        change()
        after = state_of(a.controller)
        changes += after != before
        before = after
    assert changes == 7
    assert replace(CONFIG) == CONFIG
