import os
import re
import signal
from collections.abc import Iterator

import pytest

from nebula_mp import shm_stats
from nebula_mp.errors import RingError
from nebula_mp.firewall.rules import Verdict
from nebula_mp.ioctl_tun import WriteFault
from nebula_mp.shm import HEADER_BYTES, PAGE_BYTES, U64_MAX, Region
from nebula_mp.shm_stats import DROPS, NAMES, SLOTS, StatsPage, create_page, totals
from nebula_mp.udp_socket import SendFault
from tests.support.processes import Keep, forked


@pytest.fixture
def keep() -> Iterator[Keep]:
    with Keep() as keeper:
        yield keeper


def pages(region: Region) -> tuple[StatsPage, StatsPage]:
    """The owner's view and everybody else's."""
    return StatsPage(region.descriptor, writable=True), StatsPage(region.read_only, writable=False)


def test_every_name_has_a_slot_of_its_own_and_all_fit_in_the_page() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert [SLOTS[name] for name in NAMES] == list(range(len(NAMES)))
    assert HEADER_BYTES + 8 * len(NAMES) <= PAGE_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_lower_case_words_with_dots(name: str) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+", name)


@pytest.mark.parametrize(
    "name",
    [
        *(fault.value for fault in (*WriteFault, *SendFault)),
        *(f"drop.{reason}" for reason in DROPS),
        *(
            f"drop.firewall.{direction}.{verdict.value}"
            for direction in ("incoming", "outgoing")
            for verdict in Verdict
            if verdict is not Verdict.ALLOW
        ),
    ],
)
def test_every_reason_to_drop_has_a_counter(name: str) -> None:
    assert name in SLOTS


def test_what_the_owner_adds_everybody_reads_by_name(keep: Keep) -> None:
    owner, other = pages(keep(create_page("reader/0")))

    owner.add(SLOTS["drop.replay"])
    owner.add(SLOTS["drop.replay"], 2)
    owner.add(SLOTS["mp.tun.rx.bytes"], 2**63)
    owner.add(SLOTS["mp.passes"], 0)

    expected = dict.fromkeys(NAMES, 0) | {"drop.replay": 3, "mp.tun.rx.bytes": 2**63}
    assert other.snapshot() == expected
    assert owner.snapshot() == expected


def test_nobody_but_the_owner_can_add(keep: Keep) -> None:
    _, other = pages(keep(create_page("reader/0")))

    with pytest.raises(TypeError, match="read-only"):
        other.add(SLOTS["drop.replay"])


def test_the_first_and_the_last_slot_touch_neither_the_header_nor_the_rest_of_the_page(keep: Keep) -> None:
    region = keep(create_page("reader/0"))
    owner, _ = pages(region)
    header = os.pread(region.descriptor, HEADER_BYTES, 0)

    owner.add(0, U64_MAX)
    owner.add(len(NAMES) - 1, U64_MAX)

    assert os.pread(region.descriptor, HEADER_BYTES, 0) == header
    rest = os.pread(region.descriptor, PAGE_BYTES, HEADER_BYTES + 8 * len(NAMES))
    assert rest == bytes(PAGE_BYTES - HEADER_BYTES - 8 * len(NAMES))
    with pytest.raises(IndexError):
        owner.add(len(NAMES))


def test_a_counter_that_a_mad_predecessor_left_at_its_end_wraps_and_does_not_kill_the_successor(
    keep: Keep,
) -> None:
    owner, other = pages(keep(create_page("reader/0")))
    owner.add(SLOTS["mp.passes"], U64_MAX)

    owner.add(SLOTS["mp.passes"], 3)

    assert other.snapshot()["mp.passes"] == 2


def test_sums_run_over_all_processes(keep: Keep) -> None:
    regions = [keep(create_page(f"reader/{number}")) for number in range(3)]
    for number, region in enumerate(regions):
        pages(region)[0].add(SLOTS["mp.tun.rx.packets"], 10**number)
    pages(regions[0])[0].add(SLOTS["drop.auth"], 5)

    sums = totals([pages(region)[1] for region in regions])

    assert sums == dict.fromkeys(NAMES, 0) | {"mp.tun.rx.packets": 111, "drop.auth": 5}


def test_the_sum_over_no_process_is_zero() -> None:
    assert totals([]) == dict.fromkeys(NAMES, 0)


def test_a_successor_goes_on_where_a_killed_process_stopped(keep: Keep) -> None:
    region = keep(create_page("reader/0"))
    slot = SLOTS["mp.passes"]

    def count_for_ever() -> None:
        page = StatsPage(region.descriptor, writable=True)
        while True:
            page.add(slot)

    _, other = pages(region)
    seen = 0
    for _ in range(5):
        with forked(count_for_ever) as child:
            start = seen
            while seen < start + 1000:
                now = other.snapshot()["mp.passes"]
                assert now >= seen
                seen = now
            assert child.kill() == -signal.SIGKILL
        after_death = other.snapshot()["mp.passes"]
        assert after_death >= seen
        seen = after_death
    assert other.snapshot() == dict.fromkeys(NAMES, 0) | {"mp.passes": seen}


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param((len(NAMES) + 1, shm_stats.DIGEST), id="one more name"),
        pytest.param((len(NAMES), shm_stats.DIGEST ^ 1), id="other names"),
    ],
)
def test_a_page_made_for_other_names_is_refused(keep: Keep, parameters: tuple[int, int]) -> None:
    region = keep(Region.create(shm_stats.LAYOUT, PAGE_BYTES, parameters))

    with pytest.raises(RingError, match="shared memory 'stats reader/0': set of names is"):
        StatsPage(region.read_only, writable=False, name="reader/0")


def test_a_page_of_another_size_is_refused(keep: Keep) -> None:
    region = Region.create(shm_stats.LAYOUT, 2 * PAGE_BYTES, (len(NAMES), shm_stats.DIGEST))

    with pytest.raises(RingError, match="set of names"):
        StatsPage(region.read_only, writable=False)
