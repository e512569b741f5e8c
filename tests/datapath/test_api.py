"""Records of upcalls, names of counters, and that the Python kernel is a kernel."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp import shm_stats
from nebula_mp.datapath.api import (
    RECORD_BYTES,
    Arrival,
    Drop,
    Kernel,
    UpcallReason,
    encode_plain_record,
    encode_record,
    parse_record,
    take_upcalls,
)
from nebula_mp.datapath.python import PythonKernel
from nebula_mp.errors import RingError
from nebula_mp.newtypes import UdpAddr
from nebula_mp.wire.ip import internet_checksum
from tests.support import rings

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
plain_addresses = st.ip_addresses()
scoped = st.builds("fe80::{}%{}".format, st.integers(1, 9), st.integers(1, 99)).map(IPv6Address)
sources = st.builds(UdpAddr, plain_addresses | scoped, u16)


@given(st.builds(Arrival, sources, u8, u8, u64), u32, st.binary(max_size=60))
def test_what_a_record_says_is_read_back(arrival: Arrival, index: int, packet: bytes) -> None:
    record = encode_record(arrival, index)

    assert len(record) == RECORD_BYTES
    source, kind, subtype, at_ms = arrival
    assert parse_record(record + packet) == (at_ms, index, source, kind, subtype, packet)


@given(u64, st.binary(max_size=60))
def test_a_plain_record_has_no_source(at_ms: int, packet: bytes) -> None:
    assert parse_record(encode_plain_record(at_ms) + packet) == (at_ms, 0, None, 0, 0, packet)


@given(st.binary(max_size=100))
def test_any_bytes_are_a_record_or_a_contradiction(record: bytes) -> None:
    try:
        parsed = parse_record(record)
    except RingError:
        return
    assert parsed[-1] == record[RECORD_BYTES:]


def test_upcalls_are_taken_area_by_area_and_released() -> None:
    memory = rings.small_ring()
    producer, consumer = rings.produce(memory), rings.consume(memory, segments=False)
    source = UdpAddr(IPv4Address("192.0.2.1"), 4242)
    record = encode_record(Arrival(source, 1, 0, 7), 0xBEEF_0003)
    for _ in range(2):
        assert producer.try_begin()
        for reason in (UpcallReason.MESSAGE, UpcallReason.MOVED):
            assert producer.try_add(record + b"x", reason, 3)
        producer.publish()

    taken = list(take_upcalls(consumer, 1))

    assert [each.reason for each in taken] == [UpcallReason.MESSAGE, UpcallReason.MOVED]
    assert taken[0] == (UpcallReason.MESSAGE, 7, 0xBEEF_0003, source, 1, 0, b"x")
    assert producer.waiting() == 1
    assert len(list(take_upcalls(consumer, 10))) == 2
    assert producer.waiting() == 0
    memory.close()


@pytest.mark.parametrize("reason", [0, 10, 2**32 - 1])
def test_a_reason_that_no_reader_gives_is_a_contradiction(reason: int) -> None:
    memory = rings.small_ring()
    producer, consumer = rings.produce(memory), rings.consume(memory, segments=False)
    assert producer.try_begin()
    assert producer.try_add(encode_plain_record(1), reason)
    producer.publish()

    with pytest.raises(RingError, match="reason"):
        list(take_upcalls(consumer, 1))
    memory.close()


def test_every_drop_has_a_counter_of_its_own() -> None:
    assert len(set(Drop)) == len(Drop)
    assert {drop.value for drop in Drop} <= set(shm_stats.NAMES)


def test_the_python_kernel_is_one() -> None:
    kernel: Kernel = PythonKernel()

    assert kernel.name == "python"
    assert kernel.checksum(b"abc") == internet_checksum(b"abc")
