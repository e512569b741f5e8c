"""tools/iperf_harness: what it refuses, how it counts, what it reports, and that a real run leaves nothing."""

import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Self, cast

import pytest
import yaml

from nebula_mp.demo.credentials import write_credentials
from nebula_mp.demo.netns import run
from nebula_mp.errors import SystemCallError
from tools.iperf_harness import bench, cases, cli, proctree, runner, table, traffic
from tools.iperf_harness.cases import CASES, GBIT, Case, Sample, Sent, costs, measure
from tools.iperf_harness.progress import Progress
from tools.iperf_harness.results import Results, pick_baseline
from tools.iperf_harness.runner import Plan, execute, rotated
from tools.iperf_harness.systems import (
    IPV4,
    IPV6,
    System,
    Tunnel,
    UsageError,
    Values,
    check_overlay,
    parse_systems,
)

CLONE = Path(__file__).resolve().parents[2]


def systems(*names: str, workers: int = 1, **others: dict[str, str]) -> list[System]:
    defaults: dict[str, dict[str, str]] = {"ours": {}, "commands": {}, "templates": {}}
    return parse_systems(names, workers=workers, **{**defaults, **others})


def values(folder: Path, name: str = "a") -> Values:
    return Values(
        name=name,
        folder=folder,
        overlay="10.42.0.1",
        peer_overlay="10.42.0.2",
        underlay="192.0.2.1",
        peer_underlay="192.0.2.2",
        port=4242,
        device="bench0",
        workers=1,
    )


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--systems", "nebula-mpp"], "no system 'nebula-mpp'", id="unknown system"),
        pytest.param(["--systems", ","], "no system to measure", id="no system"),
        pytest.param(["--systems", "none,none"], "named twice", id="the same system twice"),
        pytest.param(["--systems", "none:a=b"], "nothing to set", id="an option of no tunnel"),
        pytest.param(["--systems", "nebula-mp:drain"], "KEY=VALUE", id="an option without a value"),
        pytest.param(["--cases", "tcp,sctp"], "no case 'sctp'", id="unknown case"),
        pytest.param(["--cases", ""], "no case to measure", id="no case"),
        pytest.param(["--topology", "ring"], "ring", id="unknown topology"),
        pytest.param(["--cipher", "rot13"], "rot13", id="unknown cipher"),
        pytest.param(["--overlay", "ipx"], "ipx", id="unknown overlay"),
        pytest.param(["--underlay", "ipx"], "ipx", id="unknown underlay"),
        pytest.param(
            ["--systems", "nebula-mp,nebula-1.6.1", "--overlay", "ipv6"],
            "nebula-1.6.1 has no IPv6 overlay",
            id="an overlay before its time",
        ),
        pytest.param(
            ["--systems", "nebula-1.9.3:routines=2", "--overlay", "ipv6"],
            "nebula-1.9.3:routines=2 has no IPv6 overlay",
            id="an overlay just before its time",
        ),
        pytest.param(["--rounds", "0"], "1..1000", id="no round"),
        pytest.param(["--seconds", "-1"], "1..3600", id="negative time"),
        pytest.param(["--workers", "many"], "1..64", id="workers by word"),
        pytest.param(["--baseline", "nebula-1.6.1"], "not measured", id="a baseline that is not measured"),
        pytest.param(["--command", "own"], "LABEL=", id="a command without a label"),
        pytest.param(["--command", "none=true"], "taken", id="a label that is taken"),
        pytest.param(["--command", "own='"], "cannot be read", id="a command with an open quote"),
        pytest.param(
            ["--template", "own=/does/not/exist"], "No such file", id="a template that is not there"
        ),
        pytest.param(["--json", "/does/not/exist/x"], "No such file", id="results that cannot be written"),
        pytest.param(["--from", "/does/not/exist"], "No such file", id="results that are not there"),
        pytest.param(["--from", "/dev/null"], "no results", id="results that are none"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)

    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err


def test_without_root_it_exits_with_4_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    code = cli.main(["--systems", "none"])

    output = capsys.readouterr()
    assert (code, output.out) == (4, "")
    assert re.search("needs? root.*sudo", output.err)


@pytest.mark.parametrize("command", sorted(traffic.PACKAGES))
def test_a_missing_program_is_named_with_its_package_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == command else f"/usr/bin/{name}")

    code = cli.main(["--systems", "none"])

    output = capsys.readouterr()
    assert (code, output.out) == (1, "")
    assert traffic.PACKAGES[command] in output.err


# How systems are configured.


def test_every_nebula_is_given_the_same_settings(tmp_path: Path) -> None:
    ours, release = (
        yaml.safe_load(system.config_text(values(tmp_path)))
        for system in systems("nebula-mp", "nebula-1.11.0")
    )

    assert release.pop("routines") == ours["mp"].pop("workers") == 1
    assert ours == release
    assert (ours["tun"]["mtu"], ours["cipher"], ours["logging"]["level"]) == (1300, "aes", "warn")
    assert ours["listen"]["read_buffer"] == ours["listen"]["write_buffer"] == 8 << 20


def test_releases_with_certificates_of_version_2_have_an_ipv6_overlay_and_all_have_ipv4() -> None:
    old, new = systems("nebula-1.6.1", "nebula-1.9.3"), systems("none", "nebula-mp", "nebula-1.11.0")

    check_overlay([*old, *new], IPV4)
    check_overlay([*new, *systems(commands={"own": "nebula"})], IPV6)

    with pytest.raises(UsageError, match=r"nebula-1\.6\.1"):
        check_overlay([*new, *old], IPV6)


def test_cipher_and_ip_versions_reach_the_configuration_of_every_nebula(tmp_path: Path) -> None:
    inside_and_outside = dataclasses.replace(
        values(tmp_path),
        overlay="fd42::1",
        peer_overlay="fd42::2",
        underlay="2001:db8:1::1",
        peer_underlay="2001:db8:1::2",
        cipher="chachapoly",
    )
    found = systems("nebula-mp", "nebula-1.11.0", commands={"own": "prog -config $config"})

    for system in found:
        config = yaml.safe_load(system.config_text(inside_and_outside))
        assert config["cipher"] == "chachapoly"
        assert config["listen"]["host"] == "::"
        assert config["static_host_map"] == {"fd42::2": ["[2001:db8:1::2]:4242"]}

    config = yaml.safe_load(found[-1].config_text(values(tmp_path)))
    assert config["listen"]["host"] == "0.0.0.0"
    assert config["static_host_map"] == {"10.42.0.2": ["192.0.2.2:4242"]}


@pytest.mark.parametrize("topology", bench.TOPOLOGIES)
def test_the_cases_send_to_the_overlay_and_without_a_tunnel_over_a_wire_of_its_ip_version(
    topology: str,
) -> None:
    tunnel = Tunnel(overlay="ipv6", underlay="ipv4")
    none, own = (
        bench.Bench(system, topology, 1, tunnel=tunnel, lab=cast("Any", None))
        for system in systems("none", "nebula-mp")
    )

    assert own.target == "fd42::2"
    assert ip_address(none.target) in ip_network("2001:db8::/32")


def test_options_become_keys_of_the_configuration(tmp_path: Path) -> None:
    found = systems(
        "nebula-mp:drain=writer:tun.tx_queue=1000",
        "nebula-1.9.3:routines=3",
        workers=2,
        ours={"kernel": "python"},
    )

    ours, release = (yaml.safe_load(system.config_text(values(tmp_path))) for system in found)
    assert {key: ours["mp"][key] for key in ("kernel", "workers", "drain")} == {
        "kernel": "python",
        "workers": 2,
        "drain": "writer",
    }
    assert ours["tun"] == {"dev": "bench0", "mtu": 1300, "tx_queue": 1000}
    assert release["routines"] == 3


def test_each_offload_of_ours_can_be_switched_off(tmp_path: Path) -> None:
    found = systems("nebula-mp:offload.tso=false:offload.udp_gro=false", "nebula-mp:mp.offload.uso=false")

    two, one = (yaml.safe_load(system.config_text(values(tmp_path)))["mp"] for system in found)

    assert two["offload"] == {"tso": False, "udp_gro": False}
    assert one["offload"] == {"uso": False}
    assert two["workers"] == one["workers"] == 1


def test_an_option_of_one_system_counts_more_than_that_of_all(tmp_path: Path) -> None:
    (system,) = systems("nebula-mp:workers=4:drain=reader", workers=2, ours={"drain": "writer"})

    mp = yaml.safe_load(system.config_text(values(tmp_path)))["mp"]

    assert (mp["workers"], mp["drain"]) == (4, "reader")


def test_the_configuration_of_nebula_mp_passes_the_strict_check_and_an_unknown_key_does_not(
    tmp_path: Path,
) -> None:
    write_credentials(tmp_path, {"a": "10.42.0.1/24"})
    codes = []

    for system in systems("nebula-mp", "nebula-mp:offload.tso=false", "nebula-mp:mp.warp=9"):
        own = values(tmp_path)
        own.config.write_text(system.config_text(own))
        codes.append(subprocess.run(system.check_argv(own), capture_output=True, check=False).returncode)

    assert codes == [0, 0, 1]


def test_a_command_and_its_template_are_filled_in_for_each_node(tmp_path: Path) -> None:
    (system,) = systems(
        commands={"own": "prog '-c $config' $$HOME"},
        templates={"own": "$name at $underlay to $peer_overlay by $peer_endpoint in $cipher"},
    )

    assert system.argv(values(tmp_path)) == ["prog", f"-c {tmp_path}/a.yml", "$HOME"]
    assert system.config_text(values(tmp_path)) == ("a at 192.0.2.1 to 10.42.0.2 by 192.0.2.2:4242 in aes")


@pytest.mark.parametrize("text", ["$colour", "$ alone"])
def test_a_placeholder_that_does_not_exist_is_a_usage_error(tmp_path: Path, text: str) -> None:
    (system,) = systems(commands={"own": "prog"}, templates={"own": text})

    with pytest.raises(UsageError, match="template of own"):
        system.config_text(values(tmp_path))


def test_the_baseline_is_the_last_real_release_unless_another_is_asked_for() -> None:
    labels = ["none", "nebula-1.6.1", "nebula-1.11.0:routines=2", "nebula-mp"]

    assert pick_baseline(labels, None) == "nebula-1.11.0:routines=2"
    assert pick_baseline(labels, "none") == "none"
    assert pick_baseline(["none", "nebula-mp"], None) == "nebula-mp"
    assert pick_baseline(["none"], None) == "none"


# How is counted.


@contextmanager
def running(*argv: str) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(argv) as process:
        try:
            yield process
        finally:
            process.kill()


FAMILY = """
import os, sys, time

def burn():
    while time.process_time() < 0.4:
        pass

read, write = os.pipe()
if os.fork() == 0:  # a child that lives on
    if os.fork() == 0:  # and its own child, which ends and is waited for
        burn()
        os._exit(0)
    os.wait()
    burn()
    os.write(write, b"x")
    sys.stdin.read()
    os._exit(0)
if (gone := os.fork()) == 0:
    burn()
    os._exit(0)
os.waitpid(gone, 0)
os.read(read, 1)
print("done", flush=True)
sys.stdin.read()
"""


def test_the_time_of_a_tree_holds_children_that_live_and_those_that_ended() -> None:
    argv = [sys.executable, "-IS", "-c", FAMILY]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as family:
        assert family.stdout is not None
        assert family.stdout.readline() == b"done\n"

        (tree,), memory = proctree.trees([family.pid]), proctree.pss_bytes([family.pid])

        family.communicate()
    assert len(tree.members) == 2
    assert tree.cpu_s >= 3 * 0.4 - 0.1  # each process is rounded down to a tick
    assert memory > 1 << 20
    assert proctree.trees([family.pid]) == [proctree.Tree(frozenset(), 0.0)]


def test_the_time_of_a_tree_leaves_its_neighbours_out() -> None:
    with running("sleep", "1000") as neighbour, running("sleep", "1000") as root:
        trees = proctree.trees([root.pid, os.getpid()])
        members, both = ({pid for pid, _ in tree.members} for tree in trees)

    assert members == {root.pid}
    assert {os.getpid(), root.pid, neighbour.pid} <= both


def test_the_time_of_the_machine_grows_by_what_a_process_burns() -> None:
    before, began = proctree.machine(), time.process_time()
    while time.process_time() - began < 0.5:
        pass

    used = proctree.machine().since(before)

    assert used.busy_s + used.stolen_s >= 0.4
    assert used.all_s >= used.busy_s + used.stolen_s - 0.1  # the kernel may take back time of waiting


def test_costs_are_per_gigabyte_per_million_packets_and_per_connection() -> None:
    assert costs({"gigabytes": 2.0, "cpu_s": 3.0, "machine_s": 8.0}) == {
        "cpu_s_per_gb": 1.5,
        "machine_s_per_gb": 4.0,
    }
    assert costs({"packets": 500_000.0, "cpu_s": 3.0, "machine_s": 8.0}) == {
        "cpu_s_per_mpackets": 6.0,
        "machine_s_per_mpackets": 16.0,
    }
    assert costs({"connections": 1000.0, "cpu_s": 0.5, "machine_s": 1.0}) == {"cpu_us_per_connection": 500.0}
    assert costs({"gigabytes": 2.0, "machine_s": 8.0}) == {"machine_s_per_gb": 4.0}  # no node, no cost


class FakeNodes:
    """Stands for a bench whose nodes are processes of the test."""

    def __init__(self, label: str, *processes: "subprocess.Popen[bytes]") -> None:
        self.system = System(label=label)
        self.roots = [process.pid for process in processes]

    def check_running(self) -> None:
        pass


BURNER = "import time\nwhile time.process_time() < 1000: pass"


def test_a_sample_has_the_cost_of_its_own_nodes_and_names_those_that_disturb_it_or_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cases, "WAITING_PERCENT", 0.001)  # whatever else this machine does meanwhile
    with running(sys.executable, "-IS", "-c", BURNER) as burner, running("sleep", "1000") as sleeper:
        busy, idle = FakeNodes("busy", burner), FakeNodes("idle", sleeper)

        def send(one: Any, _seconds: float) -> Sent:
            until = proctree.trees([burner.pid])[0].cpu_s + 0.5
            while proctree.trees([burner.pid])[0].cpu_s < until:
                time.sleep(0.02)
            if one is idle:
                sleeper.kill()
                sleeper.wait()
            return Sent({"gigabytes": 1.0})

        case: Any = dataclasses.replace(CASES["tcp"], send=send)
        pair = (busy, idle), (idle, busy)
        first, second = (
            measure(case, cast("Any", own), [cast("Any", other)], round_=1, seconds=1) for own, other in pair
        )

    assert first.figures["cpu_s_per_gb"] >= 0.5
    assert first.problems == ()
    assert second.figures["cpu_s"] <= 0.1
    assert second.problems[0] == "1 processes of the nodes ended"
    assert re.fullmatch(r"systems that wait took [\d.]+ % of a processor", second.problems[1])


# The order of a run.


class FakeBench:
    """A bench of which one system cannot be started; notes what happens to it."""

    log: list[str] = []

    def __init__(
        self, system: System, _topology: str, _workers: int, _congestion: str | None, tunnel: Tunnel
    ) -> None:
        assert tunnel.cipher == "chachapoly"
        self.system = system

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        if self.system.label == "broken":
            raise SystemCallError("it does not start")
        self.log.append(f"+{self.system.label}")

    def close(self) -> None:
        self.log.append(f"-{self.system.label}")


def test_cases_go_over_all_systems_in_turn_and_one_that_does_not_start_stops_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fake_measure(
        case: Case, one: FakeBench, waiting: list[FakeBench], *, round_: int, seconds: float
    ) -> Sample:
        assert [other.system.label for other in waiting] == [{"x": "y", "y": "x"}[one.system.label]]
        FakeBench.log.append(f"{case.name} {one.system.label}")
        return Sample(round=round_, case=case.name, system=one.system.label, figures={"s": seconds})

    monkeypatch.setattr(FakeBench, "log", [])
    monkeypatch.setattr(runner, "Bench", FakeBench)
    monkeypatch.setattr(runner, "_SETTLE_S", 0.0)
    monkeypatch.setattr(runner, "measure", fake_measure)
    labels = ("x", "y", "broken")
    plan = Plan(
        systems=[System(label=label) for label in labels],
        cases=[CASES["tcp"], CASES["ping"]],
        topology="direct",
        rounds=2,
        seconds=1.0,
        workers=1,
        tunnel=Tunnel(cipher="chachapoly"),
    )
    samples: list[Sample] = []

    execute(plan, Progress(io.StringIO(), plan.steps), samples.append)

    measured = [line for line in FakeBench.log if " " in line]
    assert measured[:4] == ["tcp x", "tcp y", "ping x", "ping y"]
    assert measured[4:] == ["tcp y", "tcp x", "ping y", "ping x"]
    assert all(FakeBench.log.count(f"-{label}") >= 2 for label in labels)  # closed in each round
    assert len(samples) == 2 * 3 * 2 == plan.steps - 2 * 3
    assert {one.error for one in samples if one.system == "broken"} == {"it does not start"}
    assert not any(one.error for one in samples if one.system != "broken")


def test_the_first_in_turn_changes_from_round_to_round() -> None:
    plan = [System(label=label) for label in "abc"]

    assert ["".join(one.label for one in rotated(plan, by)) for by in range(4)] == [
        "abc",
        "bca",
        "cab",
        "abc",
    ]


# From here on with real namespaces.


def leftovers(pid: int) -> list[str]:
    spaces = Path("/run/netns").glob(f"{bench.PREFIX}-{pid}-*")
    folders = Path(tempfile.gettempdir()).glob(f"iperf-harness-{pid}-*")
    mark = f"iperf-harness-{pid}-".encode()
    processes = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark in read(path)]
    return [str(path) for path in (*spaces, *folders, *processes)]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has just ended


def start_harness(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tools.iperf_harness", *arguments],
        cwd=CLONE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.e2e
@pytest.mark.parametrize("topology", bench.TOPOLOGIES)
def test_a_real_run_measures_both_systems_in_every_case_and_leaves_nothing(
    tmp_path: Path, topology: str
) -> None:
    out = tmp_path / "run.json"
    options = ["--systems=none,nebula-mp", "--cases=tcp,ping,connect-1", "--rounds=1", "--seconds=1"]

    # Every kernel has Reno, and no machine has it as its own choice.
    options += ["--congestion=reno", f"--topology={topology}", f"--json={out}"]
    with start_harness(*options) as process:
        stdout, stderr = process.communicate(timeout=180)

    assert out.exists(), stderr
    results = Results.from_json(out.read_text())
    assert [one.error for one in results.samples] == [""] * 6, stderr
    assert table.render(results) == stdout
    assert results.settings["TCP"] == "reno"
    for case in CASES["tcp"], CASES["ping"], CASES["connect-1"]:
        for system in results.systems:
            assert results.stat(case.name, system, case.result.figure) is not None
        assert results.stat(case.name, "none", case.cost.figure) is None
        assert results.stat(case.name, "nebula-mp", case.cost.figure) is not None
    speed, memory = results.stat("tcp", "nebula-mp", GBIT.figure), results.memory("nebula-mp")
    assert speed is not None
    assert memory is not None
    assert min(speed.median, memory.median) > 0
    assert leftovers(process.pid) == []


@pytest.mark.e2e
@pytest.mark.parametrize("topology", bench.TOPOLOGIES)
def test_a_real_run_over_ipv6_inside_and_outside_answers_every_kind_of_traffic_and_says_what_it_was(
    tmp_path: Path, topology: str
) -> None:
    out = tmp_path / "run.json"
    options = ["--systems=none,nebula-mp", "--cases=tcp,udp-1200,ping,connect-1", "--rounds=1", "--seconds=1"]
    options += ["--cipher=chachapoly", "--overlay=ipv6", "--underlay=ipv6"]
    options += ["--command=told=sh -c 'echo $overlay $peer_endpoint $cipher; exit 7'"]

    with start_harness(*options, f"--topology={topology}", f"--json={out}") as process:
        stdout, stderr = process.communicate(timeout=180)

    assert out.exists(), stderr
    results = Results.from_json(out.read_text())
    assert [one.error for one in results.samples if one.system != "told"] == [""] * 8, stderr
    told = next(one.error for one in results.samples if one.system == "told")
    assert re.search(r"fd42::[12] \[2001:db8:[12]::[12]\]:4242 chachapoly$", told, re.MULTILINE)
    assert "cipher chachapoly, overlay ipv6, underlay ipv6" in stdout
    chosen = {name: results.settings[name] for name in ("cipher", "overlay", "underlay")}
    assert chosen == {"cipher": "chachapoly", "overlay": "ipv6", "underlay": "ipv6"}
    assert leftovers(process.pid) == []


@pytest.mark.e2e
def test_a_signal_in_the_middle_cleans_up_shows_what_there_is_and_exits_with_1(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    with start_harness(
        "--systems=none", "--cases=ping", "--rounds=9", "--seconds=1", f"--json={out}"
    ) as process:
        assert process.stderr is not None
        while "round 1/9 after" not in (line := process.stderr.readline()):
            assert line

        process.send_signal(signal.SIGINT)

        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.endswith("interrupted; cleaned up\n")
    assert "note: interrupted" in stdout
    assert Results.from_json(out.read_text()).samples[0].round == 1
    assert leftovers(process.pid) == []


@pytest.mark.e2e
def test_a_system_that_cannot_run_is_explained_by_its_last_words_and_the_others_are_measured(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run.json"
    options = ["--systems=none", "--cases=ping", "--rounds=1", "--seconds=1", f"--json={out}"]

    with start_harness(*options, "--command", "bad=sh -c 'echo no such tunnel; exit 7'") as process:
        stdout, _ = process.communicate(timeout=120)

    assert process.returncode == 1
    samples = {one.system: one for one in Results.from_json(out.read_text()).samples}
    assert samples["none"].error == ""
    assert re.search(r"node [ab] ended with 7", samples["bad"].error)
    assert re.search(r"[ab]: no such tunnel", stdout)


@pytest.mark.e2e
def test_what_a_killed_run_left_is_swept_by_the_next(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    name = f"{bench.PREFIX}-{dead.pid}-0-a"
    run(["ip", "netns", "add", name])

    bench.sweep_stale()

    assert not Path("/run/netns", name).exists()
