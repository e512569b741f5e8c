"""Every process of the program is killed, stopped and worn out while packets flow; the tunnel stays.

The peer is a real 1.11.0, which must not notice: no handshake, nothing altered, no counter used twice.
How long each silence was is printed; what is asserted leaves room for a busy machine.
"""

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from nebula_mp.wire.header import MessageType
from tests.e2e.conftest import BESIDE_THE_NATIVE, MakePair
from tests.support.datagrams import Flows
from tests.support.netns import wait_until
from tests.support.newcomer import Newcomer
from tests.support.nodes import DEVICE, Node, Pair, Process, Variant, log_has
from tests.support.traffic import Endpoint, PingTrain, check_tcp, ping
from tests.support.transfers import BothWays
from tests.support.wiretap import Report, Wiretap

pytestmark = pytest.mark.e2e

BASIC = Variant("v1-25519")
PEER = "1.11.0"
KILLS = int(os.environ.get("NEBULA_MP_TEST_KILLS", "30"))
PACED = 4_000_000
PINGS = 50
PINGS_LOST_MAX = 1
DEATHS_TO_BE_GIVEN_UP = 5
SETTLED_S = 2
CONTROL_KILLS = 4  # the fifth within ten seconds is answered with a pause
_PATIENT = {"listen": {"read_buffer": 8 << 20, "write_buffer": 8 << 20}}
_BACK_WITHIN_S = 20.0
_GONE_WITHIN_S = 5.0
_SERVED_WITHIN_S = 5.0
_SERVED_MS = 500  # what it takes on a machine with nothing else to do


def _ends(pair: Pair, source: Node) -> tuple[Endpoint, Endpoint]:
    there = pair.other(source)
    return Endpoint(source.site, source.host.address(4)), Endpoint(there.site, there.host.address(4))


def _pair(make_pair: MakePair, *, workers: int, drain: str = "auto") -> Pair:
    """Ours and the peer, with a tunnel between them."""
    pair = make_pair(PEER, BASIC)
    pair.a.workers, pair.a.drain = workers, drain
    pair.a.extra = _PATIENT
    pair.introduce(*pair.nodes)
    pair.start()
    ping(*_ends(pair, pair.a))
    ping(*_ends(pair, pair.b))
    return pair


def _children(node: Node) -> list[str]:
    return sorted(node.processes())


def _kill(node: Node, name: str) -> Process:
    """Kill -9 the process that does this work now."""
    victim = node.processes()[name]
    _signal(victim, signal.SIGKILL)
    return victim


def _signal(process: Process, number: signal.Signals) -> None:
    assert process.pid is not None, process
    os.kill(process.pid, number)


@pytest.mark.parametrize(
    ("workers", "drain", "kills", "pace_bytes_s"),
    [
        pytest.param(2, "auto", KILLS, PACED, id="two-workers"),
        pytest.param(1, "writer", KILLS // 3, PACED, id="one-worker-drained-by-its-writer"),
        pytest.param(2, "writer", KILLS // 3, PACED, id="two-workers-drained-by-their-writers"),
        pytest.param(4, "reader", KILLS // 3, PACED, id="four-workers-drained-by-their-readers"),
        pytest.param(1, "auto", KILLS // 3, math.inf, id="one-worker-under-full-load"),
        pytest.param(2, "writer", KILLS // 3, math.inf, id="two-workers-under-full-load"),
    ],
)
@pytest.mark.parametrize("kernel", ["", *BESIDE_THE_NATIVE], indirect=True)
@pytest.mark.usefixtures("kernel")
def test_transfers_survive_the_kill_of_one_process_after_the_other(
    make_pair: MakePair, workers: int, drain: str, kills: int, pace_bytes_s: float
) -> None:
    pair = _pair(make_pair, workers=workers, drain=drain)
    names = _children(pair.a)
    killed: Counter[str] = Counter()
    absent_ms: list[str] = []

    ends = _ends(pair, pair.a)
    with Wiretap(pair.wire) as tap, BothWays(*ends, pace_bytes_s=pace_bytes_s) as transfers:
        began = time.monotonic()
        for number in range(kills):
            _sleep_until(began + number)
            victim = _kill(pair.a, names[number % len(names)])
            killed[victim.name] += 1
            at = time.monotonic()
            pair.a.replaced(victim, within_s=_BACK_WITHIN_S)
            absent_ms.append(f"{victim.name} {1000 * (time.monotonic() - at):.0f}")
            transfers.wait_for_more(within_s=_BACK_WITHIN_S)
        moved_in_all = transfers.finish(within_s=60)
        lost = _lost_of(PINGS, _ends(pair, pair.a))
        report = tap.finish()

    print(f"\n{kills} kills: {moved_in_all}; ms until a successor was seen: {', '.join(absent_ms)}")
    print(f"{lost} of {PINGS} pings lost afterwards; {_summary(report)}")
    assert lost <= PINGS_LOST_MAX
    _assert_the_peer_noticed_nothing(pair, report)
    wait_until(lambda: _deaths_in_log(pair.a) == killed, f"the log names {killed}", within_s=_BACK_WITHIN_S)
    assert "Traceback" not in pair.a.log


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _lost_of(pings: int, ends: tuple[Endpoint, Endpoint]) -> int:
    with PingTrain(*ends, interval_s=0.02) as train:
        wait_until(lambda: len(train.sent_at) >= pings, "enough pings are sent", within_s=_BACK_WITHIN_S)
        train.stop()
    return sum(number < pings for number in train.lost)


def _summary(report: Report) -> str:
    kinds = {source: dict(counts) for source, counts in report.datagrams.items()}
    return f"on the wire: {kinds}, sent twice {dict(report.resent)}, not seen {report.missed}"


def _assert_the_peer_noticed_nothing(pair: Pair, report: Report) -> None:
    ours = str(pair.a.site.addresses[4])
    assert report.sealed[ours] > 100, "the wiretap saw nothing"
    assert not report.clashes, "a counter was used for two contents"
    for node in pair.nodes:
        for kind in (MessageType.HANDSHAKE, MessageType.RECV_ERROR, MessageType.CLOSE_TUNNEL):
            assert report.count(node.site, kind) == 0, f"{node.label} sent {kind.name}: {_summary(report)}"


def _deaths_in_log(node: Node) -> Counter[str]:
    """How often the log says that each process ended."""
    kinds = ("worker ended", "control ended", "services ended")
    return Counter(line["role"] for kind in kinds for line in node.log_lines(kind))


def test_a_kill_of_control_loses_no_packet_and_a_new_peer_is_served_soon(make_pair: MakePair) -> None:
    pair = _pair(make_pair, workers=2)
    newcomer = Newcomer(pair, "host-c", ["10.42.0.3/24"])
    served_ms = []

    with Flows(*_ends(pair, pair.a), count=4, interval_s=0.01) as flows:
        wait_until(lambda: flows.arrived > 400, "the flows are known", within_s=_BACK_WITHIN_S)
        for _ in range(CONTROL_KILLS):
            victim = _kill(pair.a, "control")
            served_ms.append(1000 * newcomer.shake_hands(pair.a, within_s=_SERVED_WITHIN_S))
            pair.a.replaced(victim, within_s=_BACK_WITHIN_S)
    newcomer.close()

    print(
        f"\nhandshakes served after (ms): {', '.join(f'{each:.0f}' for each in served_ms)} (aim: {_SERVED_MS})"
    )
    print(f"{flows.sent} datagrams sent, {flows.arrived} arrived")
    assert {sequence.label: sequence.lost for sequence in flows.sequences if sequence.lost} == {}
    assert not any(sequence.twice for sequence in flows.sequences)
    assert len(pair.a.log_lines("control ended")) == CONTROL_KILLS
    ping(*_ends(pair, pair.b))


@pytest.mark.parametrize("name", ["control", "services", "reader/0", "reader/1", "writer/0", "writer/1"])
def test_a_process_that_hangs_is_found_and_replaced(make_pair: MakePair, name: str) -> None:
    pair = _pair(make_pair, workers=2)
    # For a new process the supervisor has more patience: it may have much to take over.
    wait_until(
        lambda: _uptime_s(pair.a, name) >= SETTLED_S, "it has run for a while", within_s=_BACK_WITHIN_S
    )
    victim = pair.a.processes()[name]

    with PingTrain(*_ends(pair, pair.a)) as outward, PingTrain(*_ends(pair, pair.b)) as inward:
        for train in (outward, inward):
            train.wait_for_answer(since=train.sent_at[0], within_s=_BACK_WITHIN_S)
        began = time.monotonic()
        _signal(victim, signal.SIGSTOP)
        pair.a.replaced(victim, within_s=_BACK_WITHIN_S)
        back = time.monotonic()
        for train in (outward, inward):
            train.wait_for_answer(since=back, within_s=_BACK_WITHIN_S)

    silences = [train.longest_silence_s(since=began) for train in (outward, inward)]
    told = ", ".join(f"{silence:.2f} s" for silence in silences)
    print(f"\n{name} stopped: a successor after {back - began:.2f} s; longest silences {told}")
    wait_until(lambda: pair.a.log_lines("worker stuck"), "the log says so", within_s=_BACK_WITHIN_S)
    assert {line["role"] for line in pair.a.log_lines("worker stuck")} == {name}
    if name in {"control", "services"}:
        assert (outward.lost, inward.lost) == ([], []), "it carries no packet of an established flow"
    assert _ended(victim.pid)
    check_tcp(*_ends(pair, pair.a))


def _uptime_s(node: Node, name: str) -> int:
    return node.processes()[name].uptime_s or 0


def test_with_the_supervisor_everything_goes_and_a_new_start_works(make_pair: MakePair) -> None:
    pair = _pair(make_pair, workers=2)
    pids = [process.pid for process in pair.a.processes().values()]

    began = time.monotonic()
    pair.a.kill()
    wait_until(
        lambda: all(map(_ended, pids)), "every process has ended", within_s=_GONE_WITHIN_S, every_s=0.001
    )
    gone = time.monotonic()
    wait_until(lambda: not pair.a.site.has_device(DEVICE), "the device is gone", within_s=_GONE_WITHIN_S)

    print(f"\nall processes gone {1000 * (gone - began):.0f} ms after the supervisor was killed,")
    print(f"and the device was seen to be gone after {1000 * (time.monotonic() - began):.0f} ms")
    assert pair.a.site.space.pids() == []
    assert "10.42.0." not in pair.a.site.ip("route", "show", "table", "all")
    pair.a.start()
    ping(*_ends(pair, pair.a))
    assert pair.a.stop().code == 0


def _ended(pid: int | None) -> bool:
    """Whether that process executes no more; its parent may not have waited for it yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in {"Z", "X"}


@pytest.mark.parametrize("role", ["reader", "writer"])
def test_a_worker_that_keeps_dying_is_given_up_and_its_share_goes_on(make_pair: MakePair, role: str) -> None:
    pair = _pair(make_pair, workers=2)
    name = f"{role}/{_owner(pair.a)}"

    _wear_out(pair.a, name)
    log_has(pair.a, 'msg="worker keeps failing"', within_s=_BACK_WITHIN_S)
    ping(*_ends(pair, pair.a), within_s=_BACK_WITHIN_S)
    ping(*_ends(pair, pair.b), within_s=_BACK_WITHIN_S)

    (said,) = pair.a.log_lines("worker keeps failing")
    assert said["level"] == "ERROR"
    assert said["worker"] == str(_owner(pair.a))
    assert pair.a.processes()[name].state == "given up"
    check_tcp(*_ends(pair, pair.a))
    check_tcp(*_ends(pair, pair.b))
    with _newcomer(pair) as newcomer:
        newcomer.shake_hands(pair.a, within_s=_SERVED_WITHIN_S)


@contextmanager
def _newcomer(pair: Pair) -> Iterator[Newcomer]:
    newcomer = Newcomer(pair, "host-c", ["10.42.0.3/24"])
    try:
        yield newcomer
    finally:
        newcomer.close()


def _owner(node: Node) -> int:
    """The worker whose reader the tunnel's datagrams come to."""
    (host,) = node.call("status")["hosts"]
    index: int = host["local_index"]
    return index % 2


def _wear_out(node: Node, name: str) -> None:
    """Kill it as often, and as soon after each start, as makes the supervisor lose patience."""
    began = time.monotonic()
    for death in range(DEATHS_TO_BE_GIVEN_UP):
        victim = _kill(node, name)
        if death < DEATHS_TO_BE_GIVEN_UP - 1:
            node.replaced(victim, within_s=_BACK_WITHIN_S)
    assert time.monotonic() - began < 10, "too slow on this machine to be five deaths in ten seconds"


@pytest.mark.parametrize("name", ["reader/0", "writer/0"])
def test_the_only_worker_comes_back_after_a_pause_however_often_it_dies(
    make_pair: MakePair, name: str
) -> None:
    pair = _pair(make_pair, workers=1)

    _wear_out(pair.a, name)
    worn_out = time.monotonic()
    log_has(pair.a, 'msg="worker keeps failing"', within_s=_BACK_WITHIN_S)
    waited = ping(*_ends(pair, pair.b), within_s=_BACK_WITHIN_S)

    print(f"\n{name}: the first ping came through {waited:.2f} s after the fifth death")
    assert time.monotonic() - worn_out < 2 * _BACK_WITHIN_S
    check_tcp(*_ends(pair, pair.a))


def test_tries_of_the_supervisor_to_revive_everything_at_once_succeed(make_pair: MakePair) -> None:
    pair = _pair(make_pair, workers=2)

    with Wiretap(pair.wire) as tap, BothWays(*_ends(pair, pair.a)) as transfers:
        for _ in range(3):
            victims = list(pair.a.processes().values())
            _kill_together(victims)
            for victim in victims:
                pair.a.replaced(victim, within_s=_BACK_WITHIN_S)
            transfers.wait_for_more(within_s=_BACK_WITHIN_S)
        print(f"\nall children killed at once, three times: {transfers.finish(within_s=60)}")
        report = tap.finish()

    _assert_the_peer_noticed_nothing(pair, report)


def _kill_together(victims: Sequence[Process]) -> None:
    for victim in victims:
        _signal(victim, signal.SIGKILL)
