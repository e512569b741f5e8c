"""What a peer sends on a new tunnel before we have read its answer: kept, bounded, handed over or dropped."""

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.control import early
from nebula_mp.control.actions import Action, HandOver
from nebula_mp.control.early import BYTES_ALL, BYTES_EACH, DATAGRAMS_EACH, OVERHEAD_BYTES, EarlyDatagrams
from nebula_mp.newtypes import Counter, TunnelIndex, UdpAddr
from nebula_mp.wire.header import HEADER_BYTES, MESSAGE_IP, Header, MessageType
from tests.control.pair import STRANGER, Node, Wire, sealed, udp


@dataclass
class Story:
    """Node a has asked node b, whose answer is on its way."""

    wire: Wire
    a: Node
    b: Node
    stage2: bytes

    @property
    def index(self) -> TunnelIndex:
        """The local index of a's handshake."""
        return Header.parse(self.stage2).remote_index

    def said(self, payload: bytes) -> tuple[bytes, bytes]:
        """A packet of b's, and the datagram with which a released peer sends it right behind its answer."""
        (tunnel,) = self.b.controller._core.hostmap.by_remote_index(self.index)
        packet = udp(self.b.address, self.a.address, payload)
        return packet, self.b.plane.seal(tunnel, MessageType.MESSAGE, MESSAGE_IP, packet)

    def come(self, *datagrams: bytes, source: UdpAddr | None = None) -> None:
        """Let datagrams arrive at a."""
        for datagram in datagrams:
            self.wire.inject(self.a, datagram, source or self.b.at)

    def answer(self) -> list[Action]:
        """What a does with b's answer; it is not performed yet."""
        return self.a.controller.handle_datagram(self.stage2, self.b.at, self.wire.now)


def asked(a: Node, b: Node, wire: Wire) -> Story:
    wire.send(a, b)
    wire.deliver_one()
    stage2, _test = wire.queue
    wire.queue.clear()
    return Story(wire, a, b, stage2.data)


@pytest.fixture
def story() -> Story:
    wire = Wire(3)
    return asked(wire.nodes[0], wire.nodes[1], wire)


def handed(actions: list[Action]) -> list[HandOver]:
    return [action for action in actions if isinstance(action, HandOver)]


def test_what_comes_before_the_answer_is_delivered_in_order_once_the_tunnel_is_known(story: Story) -> None:
    said = [story.said(b"%d" % number) for number in range(5)]

    story.come(*(datagram for _, datagram in said))
    before = list(story.a.delivered)
    actions = story.answer()
    published = story.index in story.a.plane.tunnels
    story.wire.perform(story.a, actions)

    assert before == []
    assert published
    assert actions[:5] == [HandOver(story.index, datagram, story.b.at) for _, datagram in said]
    assert story.a.delivered == [packet for packet, _ in said]
    assert not story.a.controller.stats["drop.early"]
    assert not story.a.controller.stats["messages.tx.recv_error"]


def test_what_is_still_on_its_way_to_us_when_the_answer_is_read_is_handed_over_too(story: Story) -> None:
    packet, datagram = story.said(b"late")
    story.wire.perform(story.a, story.answer())

    actions = story.a.controller.handle_datagram(datagram, story.b.at, story.wire.now)
    story.wire.perform(story.a, actions)

    assert actions == [HandOver(story.index, datagram, story.b.at)]
    assert story.a.delivered == [packet]


def test_a_copy_of_what_is_kept_is_delivered_once(story: Story) -> None:
    packet, datagram = story.said(b"once")

    story.come(datagram, datagram)
    story.come(datagram, source=STRANGER)
    story.wire.perform(story.a, story.answer())

    assert story.a.delivered == [packet]
    assert story.a.controller.stats["drop.replay"] == 2


def test_what_anybody_sends_to_a_waiting_index_cannot_push_out_what_was_there(story: Story) -> None:
    said = [story.said(b"%d" % number) for number in range(3)]
    junk = sealed(MessageType.MESSAGE, story.index)

    story.come(*(datagram for _, datagram in said))
    story.come(*[junk] * 2 * DATAGRAMS_EACH, source=STRANGER)
    story.wire.perform(story.a, story.answer())

    assert story.a.delivered == [packet for packet, _ in said]
    stats = story.a.controller.stats
    assert stats["drop.early"] == 3 + DATAGRAMS_EACH
    assert stats["drop.auth"] == DATAGRAMS_EACH - 3
    assert not stats["messages.tx.recv_error"]


def test_a_handshake_that_is_given_up_takes_along_what_came_for_it(story: Story) -> None:
    story.come(*(story.said(b"%d" % number)[1] for number in range(4)))

    story.wire.advance(60, keep=lambda _: False)
    actions = story.answer()

    assert story.a.controller.stats["handshake_manager.timed_out"] >= 1
    assert story.a.controller.stats["drop.early"] == 4
    assert len(story.a.controller._handshakes._early) == 0
    assert not handed(actions)


def test_what_another_host_sent_behind_its_answer_is_dropped(story: Story) -> None:
    """The handshake goes on, and what comes of it gets nothing of what was kept."""
    wire = story.wire
    a, b, c = wire.nodes
    wire.perform(a, a.controller.handle_resolved({c.address: [b.at]}, wire.now))
    mistaken = asked(a, c, wire)
    mistaken.come(sealed(MessageType.MESSAGE, mistaken.index), sealed(MessageType.TEST, mistaken.index))

    actions = mistaken.answer()

    assert a.controller.stats["drop.early"] == 2
    assert not handed(actions)
    assert len(a.controller._handshakes._early) == 0


def test_the_end_of_the_program_drops_what_was_kept(story: Story) -> None:
    story.come(story.said(b"never")[1])

    actions = story.a.controller.handle_stop(story.wire.now)

    assert story.a.controller.stats["drop.early"] == 1
    assert not handed(actions)


def test_what_is_kept_for_one_handshake_is_not_handed_to_the_tunnel_of_another(story: Story) -> None:
    wire, a, c = story.wire, story.a, story.wire.nodes[2]
    other = asked(a, c, wire)
    story.come(story.said(b"from b")[1])
    packet, datagram = other.said(b"from c")
    other.come(datagram)
    # Whatever the source says, the index decides, and the key.
    crossed = replace(Header.parse(datagram), remote_index=story.index, counter=Counter(99))
    other.come(crossed.encode() + datagram[HEADER_BYTES:])

    wire.perform(a, other.answer())
    after_c = list(a.delivered)
    wire.perform(a, story.answer())

    assert after_c == [packet]
    assert len(a.delivered) == 2
    assert a.controller.stats["drop.auth"] == 1


def test_a_candidate_proves_itself_by_what_the_data_path_did_not_know_yet(story: Story) -> None:
    """As responders we publish before we answer; should it come to us all the same, it is not ours to open."""
    (tunnel,) = story.b.controller._core.hostmap.by_remote_index(story.index)
    assert not tunnel.proven
    datagram = sealed(MessageType.MESSAGE, tunnel.local_index)

    actions = story.b.controller.handle_datagram(datagram, story.a.at, story.wire.now)

    assert actions == [HandOver(tunnel.local_index, datagram, story.a.at)]


# ---- bounds ----

Sent = tuple[int, int]  # index, bytes
SENT: st.SearchStrategy[list[Sent]] = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from([0, 32, 1440, 9001])), max_size=60
)


@given(SENT, st.integers(0, 3))
def test_the_first_are_kept_in_order_and_never_more_than_the_limits_allow(
    sent: list[Sent], gone: int
) -> None:
    limits = {"DATAGRAMS_EACH": 4, "BYTES_EACH": 12_000, "BYTES_ALL": 24_000}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(early, name, value)
        kept = EarlyDatagrams()
        model: dict[int, list[bytes]] = defaultdict(list)
        for number, (index, size) in enumerate(sent):
            datagram = number.to_bytes(2, "big") + bytes(size)
            costs = {each: sum(len(one) + OVERHEAD_BYTES for one in of) for each, of in model.items()}
            cost = len(datagram) + OVERHEAD_BYTES
            fits = (
                len(model[index]) < 4
                and costs.get(index, 0) + cost <= 12_000
                and sum(costs.values()) + cost <= 24_000
            )
            assert kept.try_keep(TunnelIndex(index), datagram, STRANGER) is fits
            if fits:
                model[index].append(datagram)
            if number == 30:
                assert kept.take(TunnelIndex(gone)) == [(one, STRANGER) for one in model.pop(gone, [])]
        assert len(kept) == sum(map(len, model.values()))
        for index, datagrams in model.items():
            assert kept.take(TunnelIndex(index)) == [(one, STRANGER) for one in datagrams]
        assert (len(kept), kept._size_bytes) == (0, 0)


def test_what_is_kept_is_a_few_megabytes_whatever_is_sent() -> None:
    kept = EarlyDatagrams()
    largest = bytes(9001)

    taken = sum(
        kept.try_keep(TunnelIndex(index), largest, STRANGER) for index in range(4096) for _ in range(60)
    )

    assert BYTES_ALL - BYTES_EACH < taken * (9001 + OVERHEAD_BYTES) <= BYTES_ALL
