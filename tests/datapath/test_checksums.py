"""Sums of many packets at once, against those of adding the words of one packet after the other."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.datapath.checksums import (
    U16,
    U32,
    Rows,
    are_right,
    checksum_fields,
    checksums,
    plain_sum,
    pseudo_sum,
    row_sums,
    udp_checksum_fields,
)
from nebula_mp.wire.ip import internet_checksum
from tests.support import packets


@given(
    st.binary(min_size=1, max_size=600),
    st.integers(0, 7),
    st.integers(0, 9),
    st.integers(0, 70),
    st.integers(0, 12),
)
def test_checksums_of_rows_are_those_of_adding_the_words(
    data: bytes, offset: int, gap: int, width: int, height: int
) -> None:
    memory = (data * (1000 // len(data) + 2))[: offset + height * (width + gap) + 8]
    rows = Rows(memory, offset, width + gap, height)

    found = checksums(rows, width)

    starts = [offset + number * (width + gap) for number in range(height)]
    assert [int(each) for each in found] == [internet_checksum(memory[at : at + width]) for at in starts]
    assert [int(each) for each in found] == [packets.checksum(memory[at : at + width]) for at in starts]


@pytest.mark.parametrize("value", [b"\x00", b"\xff"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 1248, 65_535])
def test_the_two_zeros_are_told_apart_and_nothing_overflows(value: bytes, width: int) -> None:
    found = checksums(Rows(value * width, 0, width, 1), width)

    assert int(found[0]) == packets.checksum(value * width)


@given(st.binary(max_size=90))
def test_a_plain_sum_is_congruent_to_that_of_the_row(data: bytes) -> None:
    rows = Rows(data, 0, len(data), 1)

    assert plain_sum(data) == int(row_sums(rows, 0, len(data))[0]) % 0xFFFF


@given(st.sampled_from([4, 16]), st.binary(min_size=32, max_size=32), st.binary(max_size=100))
def test_a_pseudo_header_is_that_of_the_rfc(width: int, both: bytes, data: bytes) -> None:
    addresses = both[: 2 * width]
    pseudo = addresses + (17).to_bytes(4, "big") + len(data).to_bytes(4, "big")

    found = (-pseudo_sum(addresses, 17, len(data)) - plain_sum(data)) % 0xFFFF

    # 0 and 65535 are one number here; `packets.checksum` gives 0 when the sum is not 0.
    assert found == packets.checksum(pseudo + data)


def test_fields_and_what_is_right() -> None:
    sums = np.array([0xFFFF, 2 * 0xFFFF, 1, 0x1234, (1 << 54) + 5], np.int64)

    fields = checksum_fields(sums)

    assert list(fields[:4]) == [0, 0, 0xFFFE, 0xFFFF - 0x1234]
    assert list(udp_checksum_fields(sums)[:4]) == [0xFFFF, 0xFFFF, 0xFFFE, 0xFFFF - 0x1234]
    assert list(are_right(sums)) == [True, True, False, False, False]
    assert are_right(sums + fields).all()
    assert are_right(sums + udp_checksum_fields(sums)).all()


def test_rows_show_the_memory_itself() -> None:
    memory = bytearray(range(32))
    rows = Rows(memory, 2, 10, 3)

    assert rows.block(1, 2).tolist() == [[3, 4], [13, 14], [23, 24]]
    assert rows.numbers(0, U16).tolist() == [0x0203, 0x0C0D, 0x1617]
    assert rows.top(1).numbers(4, U32).tolist() == [0x06070809]
    rows.fields(0, U16)[...] = 0x0102
    rows.block(8, 1)[...] = 0xEE
    assert memory[2:4] == memory[12:14] == memory[22:24] == b"\x01\x02"
    assert memory[10] == memory[20] == memory[30] == 0xEE


@pytest.mark.parametrize(
    ("rows", "column", "width"),
    [
        pytest.param(Rows(bytes(100), 0, 50, 3), 0, 1, id="one row too many"),
        pytest.param(Rows(bytes(100), 0, 50, 2), 48, 3, id="last row too long"),
        pytest.param(Rows(bytes(100), 90, 10, 1), 10, 1, id="behind the end"),
        pytest.param(Rows(bytes(100), -4, 10, 1), 0, 4, id="before the beginning"),
        pytest.param(Rows(bytes(100), 0, -10, 2), 0, 4, id="backwards"),
    ],
)
def test_rows_outside_the_memory_are_refused(rows: Rows, column: int, width: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        rows.block(column, width)
    with pytest.raises((ValueError, TypeError)):
        row_sums(rows, column, width)


BEFORE_THE_FORK = """
import os, sys
import nebula_mp.cli, nebula_mp.supervisor
from nebula_mp.workers.roles import real_mains
real_mains()
import nebula_mp.datapath.checksums
print("numpy" in sys.modules, len(os.listdir("/proc/self/task")))
"""
LIBRARIES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@pytest.mark.parametrize("asked", [None, "4"])
def test_all_that_is_loaded_before_a_fork_leaves_one_thread_whatever_the_environment_says(
    asked: str | None,
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LIBRARIES}
    if asked is not None:
        environment |= dict.fromkeys(LIBRARIES, asked)

    done = subprocess.run(
        [sys.executable, "-c", BEFORE_THE_FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environment,
    )

    assert done.stdout == "True 1\n"
