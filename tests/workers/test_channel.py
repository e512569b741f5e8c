"""Messages between our processes: whole, in order, with their descriptors, and never at anybody's mercy."""

import array
import fcntl
import os
import select
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.workers import channel
from nebula_mp.workers.channel import Channel, ChannelError, Message, channel_pair, discard
from tests.support.processes import eventually, forked


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    pair = channel_pair()
    yield pair
    for end in pair:
        os.close(end)


def send_raw(end: int, data: bytes, descriptors: Sequence[int] = ()) -> None:
    raw = socket.socket(fileno=os.dup(end))
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    with raw:
        raw.sendmsg([data], ancillary)


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_messages_arrive_in_order_with_their_bodies(ends: tuple[int, int]) -> None:
    sender, receiver = Channel(ends[0], "control"), Channel(ends[1], "supervisor")

    assert sender.send("ready")
    assert sender.send("reloaded", {"id": 7, "error": None, "warnings": ["ä"], "raw": b"\0\xff"})

    assert receiver.receive() == [
        Message("ready", {}),
        Message("reloaded", {"id": 7, "error": None, "warnings": ["ä"], "raw": b"\0\xff"}),
    ]
    assert receiver.receive() == []


def test_both_directions_are_independent(ends: tuple[int, int]) -> None:
    one, other = Channel(ends[0], "b"), Channel(ends[1], "a")

    one.send("ping")
    other.send("pong")

    assert [message.kind for message in other.receive()] == ["ping"]
    assert [message.kind for message in one.receive()] == ["pong"]


def test_only_so_many_messages_come_at_once(ends: tuple[int, int]) -> None:
    sender, receiver = Channel(ends[0], ""), Channel(ends[1], "")
    for number in range(5):
        sender.send("n", {"number": number})

    batches = [[message.body["number"] for message in receiver.receive(limit=2)] for _ in range(4)]

    assert batches == [[0, 1], [2, 3], [4], []]


def test_descriptors_are_duplicated_and_closed_on_exec(ends: tuple[int, int]) -> None:
    read_end, write_end = os.pipe()
    Channel(ends[0], "").send("tuns", descriptors=(read_end, write_end))
    os.close(read_end)
    os.close(write_end)

    (message,) = Channel(ends[1], "").receive()

    reader, writer = message.descriptors
    os.write(writer, b"x")
    assert os.read(reader, 2) == b"x"
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in message.descriptors)
    message.close()


@pytest.mark.parametrize("size", [channel.INLINE_BYTES_MAX - 100, channel.INLINE_BYTES_MAX + 1, 3_000_000])
def test_a_body_of_any_size_arrives_and_its_descriptors_beside_it(size: int, ends: tuple[int, int]) -> None:
    before = open_descriptors()
    null = os.open(os.devnull, os.O_RDONLY)
    body = {"blob": os.urandom(size)}

    assert Channel(ends[0], "").send("reload", body, descriptors=[null])
    os.close(null)
    (message,) = Channel(ends[1], "").receive()

    assert message.body == body
    (descriptor,) = message.descriptors
    assert os.path.samestat(os.fstat(descriptor), Path(os.devnull).stat())
    message.close()
    assert open_descriptors() == before


def test_a_large_body_cannot_change_under_the_receiver(
    ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    content = channel._content

    def watched(descriptor: int, size: object) -> bytes:
        seen.append(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS))
        with pytest.raises(OSError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(OSError):
            os.ftruncate(descriptor, 0)
        return content(descriptor, size)

    monkeypatch.setattr(channel, "_content", watched)
    Channel(ends[0], "").send("answer", {"blob": bytes(100_000)})

    (message,) = Channel(ends[1], "").receive()

    assert message.body == {"blob": bytes(100_000)}
    assert seen


def test_a_full_channel_refuses_and_takes_messages_again_when_it_was_read(ends: tuple[int, int]) -> None:
    sender, receiver = Channel(ends[0], ""), Channel(ends[1], "")
    sent = 0
    while sender.send("n", {"pad": bytes(1000)}):
        sent += 1

    received = 0
    while messages := receiver.receive():
        received += len(messages)

    assert sent == received > 10
    assert sender.send("n")


def test_a_refused_message_leaves_no_descriptor_behind(ends: tuple[int, int]) -> None:
    sender = Channel(ends[0], "")
    while sender.send("n", {"pad": bytes(1000)}):
        pass
    before = open_descriptors()

    assert not sender.send("n", {"pad": bytes(100_000)})

    assert open_descriptors() == before


def test_a_descriptor_that_is_none_is_our_own_mistake_and_raises(ends: tuple[int, int]) -> None:
    with pytest.raises(OSError):
        Channel(ends[0], "").send("tuns", descriptors=[987_654])


def test_sending_to_an_end_that_is_gone_is_refused_and_reading_from_it_says_so() -> None:
    one, other = channel_pair()
    Channel(other, "").send("last")
    os.close(other)
    here = Channel(one, "services")

    assert not here.send("status")
    assert [message.kind for message in here.receive()] == ["last"]
    for _ in range(2):
        with pytest.raises(ChannelError, match="channel to services: the other end is gone"):
            here.receive()
    os.close(one)


def unsealed(data: bytes) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    return descriptor


def pipe() -> int:
    read_end, write_end = os.pipe()
    os.close(write_end)
    return read_end


def sealed(data: bytes) -> int:
    descriptor = unsealed(data)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, channel._SEALS)
    return descriptor


def head(**fields: object) -> bytes:
    return msgpack.packb({"schema": 1, "kind": "x", **fields})


EMPTY = msgpack.packb({})


@pytest.mark.parametrize(
    ("data", "make", "words"),
    [
        pytest.param(b"\xc1", None, "not msgpack", id="not msgpack"),
        pytest.param(b"\x91" * 3000, None, "not msgpack", id="too deep"),
        pytest.param(msgpack.packb([1]), None, "not a map", id="no map"),
        pytest.param(msgpack.packb({b"schema": 1}), None, "not a map", id="keys that are no text"),
        pytest.param(head(schema=2, body=EMPTY), None, "not of schema 1", id="another schema"),
        pytest.param(head(kind=3, body=EMPTY), None, "not of schema 1", id="no kind"),
        pytest.param(head(), None, "body of a message is missing", id="no body"),
        pytest.param(head(body={}), None, "body of a message is missing", id="a body that is not packed"),
        pytest.param(head(body=msgpack.packb(1)), None, "not a map", id="a body that is no map"),
        pytest.param(head(size=1), None, "x: the body is missing", id="no descriptor"),
        pytest.param(head(size=1), lambda: unsealed(EMPTY), "not sealed", id="memory that can change"),
        pytest.param(head(size=1), pipe, "is no memory", id="a pipe, which could block"),
        pytest.param(head(size=9), lambda: sealed(EMPTY), "1 bytes instead of 9", id="another size"),
        pytest.param(head(size="1"), lambda: sealed(EMPTY), "1 bytes instead of", id="a size that is none"),
        pytest.param(head(size=1), lambda: sealed(b"\xc1"), "not msgpack", id="nonsense in memory"),
        pytest.param(bytes(65_537), None, "longer than", id="too long"),
    ],
)
def test_what_is_no_message_is_refused_after_the_ones_before_it_and_leaves_nothing_open(
    data: bytes, make: object, words: str, ends: tuple[int, int]
) -> None:
    before = open_descriptors()
    attached = [make()] if callable(make) else []
    Channel(ends[0], "").send("good")
    send_raw(ends[0], data, attached)
    for descriptor in attached:
        os.close(descriptor)
    receiver = Channel(ends[1], "control")

    first = receiver.receive()

    assert [message.kind for message in first] == ["good"]
    with pytest.raises(ChannelError, match=f"channel to control: .*{words}"):
        receiver.receive()
    assert open_descriptors() == before


def test_descriptors_without_a_message_are_refused_and_closed(ends: tuple[int, int]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    before = open_descriptors()
    send_raw(ends[0], b"\xc1", [null] * 100)

    with pytest.raises(ChannelError):
        Channel(ends[1], "").receive()

    assert open_descriptors() == before
    os.close(null)


@given(data=st.binary(min_size=1, max_size=300))
def test_any_bytes_are_a_message_or_a_channel_error(data: bytes) -> None:
    one, other = channel_pair()
    try:
        send_raw(one, data)
        try:
            messages = Channel(other, "").receive()
        except ChannelError:
            messages = []
        assert len(messages) <= 1
    finally:
        os.close(one)
        os.close(other)


def test_what_waits_for_the_dead_is_thrown_away_with_its_descriptors(ends: tuple[int, int]) -> None:
    read_end, write_end = os.pipe()
    sender = Channel(ends[0], "")
    sender.send("status", {"id": 1})
    send_raw(ends[0], b"\xc1")
    send_raw(ends[0], bytes(65_537))
    sender.send("tuns", {"pad": bytes(100_000)}, descriptors=[write_end])
    os.close(write_end)
    before = open_descriptors()

    discard(ends[1])
    sender.send("status", {"id": 2})

    assert os.read(read_end, 1) == b""  # the duplicate that was under way is closed
    assert open_descriptors() == before
    assert Channel(ends[1], "").receive() == [Message("status", {"id": 2})]
    os.close(read_end)


def test_throwing_away_ends_when_the_other_end_is_gone() -> None:
    one, other = channel_pair()
    os.close(other)

    discard(one)

    os.close(one)


def test_a_successor_goes_on_with_the_end_that_its_predecessor_had(ends: tuple[int, int]) -> None:
    here = Channel(ends[0], "child")

    def child() -> None:
        there = Channel(ends[1], "parent")
        while True:
            for message in there.receive():
                there.send("heard", {"id": message.body["id"], "pid": os.getpid()})

    def heard(number: int) -> int:
        here.send("say", {"id": number})
        assert eventually(lambda: bool(select.select([here], [], [], 0.1)[0]))
        (answer,) = here.receive()
        assert answer.body["id"] == number
        return int(answer.body["pid"])

    with forked(child) as first:
        assert heard(1) == first.pid
        first.stop()
        here.send("say", {"id": 2})
    discard(ends[1])
    discard(ends[0])
    with forked(child) as second:
        assert heard(3) == second.pid


def test_an_end_that_nobody_uses_any_more_stays_open(ends: tuple[int, int]) -> None:
    for _ in range(3):
        Channel(ends[0], "").send("again")

    assert len(Channel(ends[1], "").receive()) == 3
    os.fstat(ends[0])
