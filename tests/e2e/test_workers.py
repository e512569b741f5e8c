"""The same tunnels with one worker, with two and with four, whoever drains their rings.

Here each combination meets release 1.11.0; the older releases and our own program meet one combination for
each number of workers, all nine between the three of them. `nox -s e2e_modes` runs every end-to-end test
with each of the nine.
"""

import json
import signal
import subprocess
from collections.abc import Iterator
from functools import partial

import pytest

from nebula_mp.wire.header import Header, MessageType
from tests.e2e.conftest import MakePair
from tests.support.datagrams import Flows
from tests.support.netns import Recorder, wait_until
from tests.support.nodes import DEVICE, Node, Pair, Variant, log_has
from tests.support.peers import OURS, our_command
from tests.support.traffic import (
    Endpoint,
    PingTrain,
    check_large_pings,
    check_tcp,
    check_udp_echo,
    collect,
    ping,
)

pytestmark = pytest.mark.e2e

BASIC = Variant("v1-25519")
WORKERS = (1, 2, 4)
DRAINS = ("auto", "writer", "reader")
_LARGE_PINGS = (4000,)
_FAILED, _USAGE = 1, 2
_WITHIN_S = 10.0


def _ends(pair: Pair, source: Node) -> tuple[Endpoint, Endpoint]:
    there = pair.other(source)
    return Endpoint(source.site, source.host.address(4)), Endpoint(there.site, there.host.address(4))


def _cases() -> Iterator[object]:
    combinations = [("1.11.0", workers, drain) for workers in WORKERS for drain in DRAINS]
    for shift, peer in enumerate(("1.6.1", "1.9.3", OURS)):
        drains = DRAINS[shift:] + DRAINS[:shift]
        combinations += [(peer, *each) for each in zip(WORKERS, drains, strict=True)]
    for peer, workers, drain in combinations:
        for starter in ("ours", "theirs"):
            yield pytest.param(
                peer, workers, drain, starter, id=f"{peer}-{workers}-workers-{drain}-{starter}-starts"
            )


@pytest.mark.parametrize(("peer", "workers", "drain", "starter"), list(_cases()))
def test_any_number_of_workers_exchanges_all_kinds_of_traffic(
    make_pair: MakePair, peer: str, workers: int, drain: str, starter: str
) -> None:
    pair = make_pair(peer, BASIC)
    for node in pair.nodes:
        node.workers, node.drain = workers, drain
    initiator = pair.a if starter == "ours" else pair.b
    pair.introduce(initiator)
    pair.start()
    outward, inward = _ends(pair, initiator), _ends(pair, pair.other(initiator))

    with pair.wire.record() as recorder:
        ping(*outward)

    collect(
        [
            partial(_assert_started_by, recorder, initiator),
            partial(check_udp_echo, *outward),
            partial(check_udp_echo, *inward),
            partial(check_large_pings, *outward, _LARGE_PINGS),
            partial(check_large_pings, *inward, _LARGE_PINGS),
            partial(check_tcp, *outward),
            partial(_assert_has, pair.a, workers),
        ],
        "exchange of traffic",
    )


def _assert_started_by(recorder: Recorder, initiator: Node) -> None:
    first = recorder.datagrams[0]
    header = Header.parse(first.payload)
    assert first.source.ip in initiator.site.addresses.values()
    assert (header.type, header.remote_index, header.counter) == (MessageType.HANDSHAKE, 0, 1)


def _assert_has(node: Node, workers: int) -> None:
    numbers = range(workers)
    pairs = {f"{role}/{number}" for role in ("reader", "writer") for number in numbers}
    assert set(node.processes()) == {"control", "services", *pairs}


def test_flows_are_spread_over_the_readers(make_pair: MakePair) -> None:
    pair = make_pair("1.11.0", BASIC)
    pair.a.workers = 4
    pair.introduce(pair.a)
    pair.start()
    ping(*_ends(pair, pair.a))
    before = pair.a.processes()

    # Only outward: what comes back teaches the kernel to give the whole flow to the tunnel's owner.
    with Flows(*_ends(pair, pair.a), count=32, both_ways=False) as flows:
        wait_until(lambda: flows.arrived > 32 * 20, "20 datagrams of each flow", within_s=_WITHIN_S)

    after = pair.a.processes()
    taken = {
        name: row.packets_in - before[name].packets_in for name, row in after.items() if row.role == "reader"
    }
    assert len(taken) == 4
    assert sum(amount > 0 for amount in taken.values()) > 1, taken
    assert sum(taken.values()) >= flows.sent, taken
    assert [sequence.lost for sequence in flows.sequences] == [[]] * 32


def test_stop_reload_and_status_work_with_several_workers(make_pair: MakePair) -> None:
    pair = make_pair("1.11.0", BASIC)
    pair.a.workers = 4
    pair.introduce(pair.a)
    pair.start()
    ping(*_ends(pair, pair.a))
    before = pair.a.processes()

    with PingTrain(*_ends(pair, pair.a)) as outward, PingTrain(*_ends(pair, pair.b)) as inward:
        assert _command(pair.a, "reload").returncode == 0
        pair.a.send_signal(signal.SIGHUP)
        wait_until(
            lambda: len(pair.a.log_lines("config reloaded")) >= 2, "the second reload", within_s=_WITHIN_S
        )
    status = json.loads(_command(pair.a, "status", "--json").stdout)
    stopped = _command(pair.a, "stop")

    assert (outward.lost, inward.lost) == ([], [])
    assert [host["name"] for host in status["hosts"] if host["primary"]] == [pair.b.host.name]
    assert status["hosts"][0]["sent"] >= len(outward.sent_at)
    assert status["hosts"][0]["received"] >= len(inward.sent_at)
    assert (stopped.returncode, pair.a.wait_for_end(within_s=_WITHIN_S).code) == (0, 0), stopped
    log_has(pair.b, "Close tunnel received")
    assert not pair.a.site.has_device(DEVICE)
    assert pair.a.site.space.pids() == []
    assert len(before) >= 10


def test_the_command_workers_shows_every_process(make_pair: MakePair) -> None:
    pair = make_pair("1.11.0", BASIC)
    pair.a.workers = 2
    pair.introduce(pair.a)
    pair.start()
    ping(*_ends(pair, pair.a))

    rows = json.loads(_command(pair.a, "workers", "--json").stdout)["processes"]
    table = _command(pair.a, "workers").stdout.splitlines()
    processes = pair.a.processes()

    running = set(pair.a.site.space.pids())
    assert {row["pid"] for row in rows} == {process.pid for process in processes.values()}
    assert {row["pid"] for row in rows} | {pair.a.pid} == running
    assert len(table) == len(rows) + 2
    assert table[-1] in {"kernel python", "kernel rust"}
    for process in processes.values():
        assert process.restarts == 0
        assert process.state == "running"
        assert process.cpu_s is not None
        assert process.cpu_s >= 0
        assert process.uptime_s is not None
        assert 0 <= process.uptime_s < 60
        line = next(line for line in table if f" {process.pid} " in f" {line} ")
        assert process.role in line


@pytest.mark.parametrize("drain", DRAINS)
def test_what_the_command_line_says_about_workers_beats_the_file(make_pair: MakePair, drain: str) -> None:
    node = make_pair(OURS, BASIC).a
    node.workers, node.drain = 1, "auto"
    node.flags = ["--workers", "3", "--drain", drain]
    node.start()

    _assert_has(node, 3)


def test_workers_may_be_left_to_the_program(make_pair: MakePair) -> None:
    node = make_pair(OURS, BASIC).a
    node.workers = 3
    node.flags = ["--workers", "auto"]
    node.start()

    names = set(node.processes())
    assert "reader/0" in names
    assert "reader/3" not in names, "one pair for every two processors"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(["--workers", "0"], ["--workers", "0"], id="no-workers"),
        pytest.param(["--workers", "-1"], ["--workers", "-1"], id="less-than-none"),
        pytest.param(["--workers", "65"], ["--workers", "65", "64"], id="too-many"),
        pytest.param(["--workers", "many"], ["--workers", "many", "auto"], id="a-word"),
        pytest.param(
            ["--drain", "both"], ["--drain", "both", "auto", "writer", "reader"], id="unknown-drain"
        ),
    ],
)
def test_flags_with_impossible_values_are_refused_by_name(
    make_pair: MakePair, flags: list[str], words: list[str]
) -> None:
    node = make_pair(OURS, BASIC).a
    node.flags = flags
    node.launch()

    ended = node.wait_for_end(within_s=_WITHIN_S)

    assert ended.code in {_FAILED, _USAGE}
    assert all(word in node.log for word in words), node.log
    assert "Traceback" not in node.log
    assert not node.site.has_device(DEVICE)


@pytest.mark.parametrize(
    ("key", "value"),
    [("workers", 0), ("workers", 65), ("workers", "many"), ("drain", "both"), ("drain", 1)],
)
def test_impossible_values_in_the_file_are_refused_with_line_and_key(
    make_pair: MakePair, key: str, value: object
) -> None:
    node = make_pair(OURS, BASIC).a
    node.extra = {"mp": {key: value}}
    node.launch()

    ended = node.wait_for_end(within_s=_WITHIN_S)

    assert ended.code == _FAILED
    said = next(line for line in node.log.splitlines() if f"mp.{key}" in line)
    assert "config.yml:" in said
    assert str(value) in said
    assert not node.site.has_device(DEVICE)


def _command(node: Node, *argv: str) -> "subprocess.CompletedProcess[str]":
    command = our_command(*argv, "-c", str(node.config_path))
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
