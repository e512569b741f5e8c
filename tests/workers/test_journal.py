import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.newtypes import CertVersion, Cipher, Curve, TunnelIndex, UdpAddr
from nebula_mp.shm import Layout, Mapping, Region
from nebula_mp.shm_table import JOURNAL, JOURNAL_ROW, ROWS_AT, ROWS_MAX
from nebula_mp.wire.header import HEADER_BYTES
from nebula_mp.workers.journal import RECORD_BYTES_MAX, Journal, Record, SavedCertificate
from tests.support.pki import Pki
from tests.support.sessions import at, digest, shake
from tests.support.watched import Countdown, KilledError, nothing, watch

ROWS = 4
LAYOUT: Layout = JOURNAL
HERE, THERE, LOCAL = at("192.0.2.7"), at("2001:db8::7", 65_535), at("fe80::1%3")


def region_of(rows: int) -> Region:
    return Region.create(LAYOUT, ROWS_AT + rows * JOURNAL_ROW.size, (rows,), reserve=False)


@pytest.fixture
def region() -> Iterator[Region]:
    region = region_of(ROWS)
    yield region
    region.close()


def journal_of(region: Region) -> Journal:
    return Journal(Mapping(region.descriptor, LAYOUT, writable=True))


def record_of(number: int = 1, filling: int = 100) -> Record:
    """Make one that can be told from those of other numbers, in every part of it."""
    fill = bytes([number]) * filling
    return Record(
        order=number,
        local_index=TunnelIndex(number << 16 | 3),
        remote_index=TunnelIndex(number),
        cipher=Cipher.AES if number % 2 else Cipher.CHACHAPOLY,
        is_initiator=bool(number % 2),
        peer_time_ns=number,
        peer=SavedCertificate(CertVersion.V2, fill, fill[:32]),
        own=SavedCertificate(CertVersion.V1, fill[1:], fill[:32]),
        stage1=fill[2:],
        stage2=fill[3:],
    )


ONE, TWO = record_of(1), record_of(2)

u64, index = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1).map(TunnelIndex)
certificates = st.builds(SavedCertificate, st.sampled_from(CertVersion), st.binary(), st.binary())
records = st.builds(
    Record,
    order=u64,
    local_index=index,
    remote_index=index,
    cipher=st.sampled_from(Cipher),
    is_initiator=st.booleans(),
    peer_time_ns=u64,
    peer=certificates,
    own=certificates,
    stage1=st.binary(),
    stage2=st.binary(),
)
remotes = st.builds(UdpAddr, st.ip_addresses(), st.integers(0, 65_535))

# Records.


@given(records)
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    assert Record.parse(record.encode()) == record


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


@given(
    st.binary() | trees.map(msgpack.packb) | st.lists(scalars, min_size=10, max_size=10).map(msgpack.packb)
)
def test_whatever_else_the_bytes_are_they_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Record.parse(data)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        pytest.param(3, "des", id="an unknown cipher"),
        pytest.param(6, (3, b"", b""), id="an unknown version of a certificate"),
        pytest.param(6, (2, b""), id="a certificate without its key"),
        pytest.param(4, 1, id="a number in the place of a truth"),
        pytest.param(9, "", id="text in the place of bytes"),
    ],
)
def test_a_record_with_one_wrong_part_is_refused(place: int, value: object) -> None:
    parts: list[object] = list(msgpack.unpackb(ONE.encode()))  # type: ignore[call-overload]  # it is a list
    assert Record.parse(msgpack.packb(parts)) == ONE
    parts[place] = value

    with pytest.raises(ValueError):
        Record.parse(msgpack.packb(parts))


@pytest.mark.parametrize("curve", Curve)
@pytest.mark.parametrize("version", CertVersion)
@pytest.mark.parametrize("we_start", [True, False])
def test_a_session_is_noted_with_both_certificates_and_without_its_keys(
    curve: Curve, version: CertVersion, we_start: bool
) -> None:
    pki = Pki(seed=7, curve=curve)
    us, peer = (
        pki.identity(name, address, groups=("a", "b"), unsafe=("172.16.0.0/12",), versions=(version,))
        for name, address in (("us", "10.42.0.1/16"), ("peer", "10.42.0.2/16"))
    )
    session, other = shake(peer, 0x0102_0003, us=us, pool=pki.pool(), we_start=we_start)

    record = Record.of(session, 5)
    data = record.encode()

    back = Record.parse(data)
    certificate, own = back.peer.parse(curve), back.own.parse(curve)
    assert (certificate, own) == (peer.certificates[version], us.certificates[version])
    assert certificate.fingerprint == session.peer.certificate.fingerprint
    assert (back.order, back.local_index, back.remote_index) == (5, session.local_index, session.remote_index)
    assert (back.cipher, back.is_initiator, back.peer_time_ns) == (
        Cipher.AES,
        we_start,
        session.peer_time_ns,
    )
    assert (back.stage1, back.stage2) == (session.stage1, session.stage2)
    assert back.stage1 == other.stage1
    for key in (session.keys.send, session.keys.receive):
        assert not any(bytes(key[at : at + 8]) in data for at in range(0, 32, 8))
    assert digest(session)[:3] == (back.local_index, back.remote_index, session.peer)
    assert len(data) < 2500


def test_the_largest_handshake_that_datagrams_can_carry_fits_a_slot(region: Region) -> None:
    datagram = 9001  # the largest that is read
    full = replace(
        record_of(200, datagram),
        local_index=TunnelIndex(2**32 - 1),
        remote_index=TunnelIndex(2**32 - 1),
        order=2**64 - 1,
        peer_time_ns=2**64 - 1,
        stage1=bytes(datagram - HEADER_BYTES),
        stage2=bytes(datagram),
    )

    assert journal_of(region).save(3, 2**64 - 1, full, THERE)
    assert journal_of(region).load(3, 2**64 - 1) == (full, THERE)


# Slots.


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["save", "move", "drop"]),
            st.integers(0, ROWS - 1),
            st.integers(1, 3),  # generation
            records,
            remotes,
        ),
        max_size=30,
    )
)
def test_slots_hold_what_a_dictionary_would(walk: list[tuple[str, int, int, Record, UdpAddr]]) -> None:
    region = region_of(ROWS)
    journal = journal_of(region)
    model: dict[int, tuple[int, Record, UdpAddr]] = {}

    for call, row, generation, record, remote in walk:
        match call:
            case "save":
                assert journal.save(row, generation, record, remote)
                model[row] = generation, record, remote
            case "move":
                journal.move(row, generation, remote)
                if row in model and model[row][0] == generation:
                    model[row] = generation, model[row][1], remote
            case "drop":
                journal.drop(row)
                model.pop(row, None)
        for reader in (journal, journal_of(region)):
            for each in range(ROWS):
                held = model.get(each)
                for wanted in (1, 2, 3):
                    expected = held[1:] if held is not None and held[0] == wanted else None
                    assert reader.load(each, wanted) == expected
    region.close()


def test_a_record_that_is_too_long_is_refused_and_takes_the_former_one_with_it(region: Region) -> None:
    journal = journal_of(region)
    overhead = len(replace(ONE, stage2=bytes(40_000)).encode()) - 40_000
    longest = replace(ONE, stage2=bytes(RECORD_BYTES_MAX - overhead))
    assert len(longest.encode()) == RECORD_BYTES_MAX == 40_864

    assert journal.save(ROWS - 1, 1, longest, HERE)
    assert journal.load(ROWS - 1, 1) == (longest, HERE)
    assert not journal.save(ROWS - 1, 1, replace(longest, stage2=longest.stage2 + b"!"), HERE)

    assert journal.load(ROWS - 1, 1) is None


def test_an_address_of_one_link_keeps_its_scope_if_that_is_a_number(region: Region) -> None:
    journal = journal_of(region)

    journal.save(1, 1, ONE, LOCAL)
    noted = journal.load(1, 1)
    journal.move(1, 1, at("fe80::1%eth0"))
    named = journal.load(1, 1)

    assert noted == (ONE, LOCAL)
    assert named == (ONE, at("fe80::1"))


def test_no_slot_with_a_flipped_bit_is_taken_for_another_record(region: Region) -> None:
    dice = Random(5)
    memory = Mapping(region.descriptor, LAYOUT, writable=True)
    journal = journal_of(region)
    journal.save(2, 7, ONE, HERE)
    begin = ROWS_AT + 2 * JOURNAL_ROW.size
    record = JOURNAL_ROW.fields["record"].offset
    words = range(24 * 8)  # generation, length, checksum
    bits = [*words, *(8 * record + dice.randrange(8 * len(ONE.encode())) for _ in range(500))]

    for bit in bits:
        memory.data[begin + bit // 8] ^= 1 << bit % 8
        assert journal.load(2, 7) is None, bit
        memory.data[begin + bit // 8] ^= 1 << bit % 8
    assert journal.load(2, 7) == (ONE, HERE)


def test_a_remote_of_no_family_is_no_good_record(region: Region) -> None:
    memory = Mapping(region.descriptor, LAYOUT, writable=True)
    journal = journal_of(region)
    journal.save(2, 7, ONE, HERE)
    family = ROWS_AT + 2 * JOURNAL_ROW.size + JOURNAL_ROW.fields["remote_0"].offset + 22
    assert memory.data[family] == 4

    memory.data[family] = 5

    assert journal.load(2, 7) is None


CHANGES: dict[str, Callable[[Journal], object]] = {
    "save": lambda journal: journal.save(2, 8, TWO, THERE),
    "move": lambda journal: journal.move(2, 7, THERE),
    "drop": lambda journal: journal.drop(2),
}
# What a successor may find, by the generation of the row.
ALLOWED = {
    "save": ({7: (ONE, HERE)}, {}, {8: (TWO, THERE)}),
    "move": ({7: (ONE, HERE)}, {7: (ONE, THERE)}),
    "drop": ({7: (ONE, HERE)}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_any_store_control_leaves_the_old_record_the_new_one_or_none(change: str) -> None:
    killed, stores, found = True, 0, []
    while killed:
        region = region_of(ROWS)
        journal = journal_of(region)
        journal.save(2, 6, TWO, LOCAL)
        journal.save(2, 7, ONE, LOCAL)
        journal.move(2, 7, HERE)
        death = Countdown(stores)
        watch(journal, "_data _words", load=nothing, store=death)
        try:
            CHANGES[change](journal)
            killed = False
        except KilledError:
            stores += 1
        successor = journal_of(region)
        left = {each: noted for each in (6, 7, 8) if (noted := successor.load(2, each)) is not None}
        assert left in ALLOWED[change]
        found.append(left)
        region.close()

    assert found[0] == ALLOWED[change][0]
    assert found[-1] == ALLOWED[change][-1]
    assert stores >= {"save": 20, "move": 4, "drop": 1}[change]


def test_only_slots_that_are_used_cost_memory() -> None:
    region = region_of(ROWS_MAX)
    journal = journal_of(region)
    before = os.fstat(region.descriptor).st_blocks * 512

    for row in (0, 1000, ROWS_MAX - 1):
        assert journal.save(row, 1, record_of(1, 300), HERE)
        journal.move(row, 1, THERE)
        assert journal.load(row, 1) == (record_of(1, 300), THERE)
    used = os.fstat(region.descriptor).st_blocks * 512 - before

    # A page each; where the kernel gives shared memory in huge pages, one of those. All slots are 2.5 GiB.
    assert used <= 3 * 2**21
    region.close()
