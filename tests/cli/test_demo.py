"""`nebula-mp demo`: what it checks first, what it says, and that it always leaves the machine as it was."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nebula_mp import cli
from nebula_mp.cert import codec
from nebula_mp.demo import measure, story
from nebula_mp.demo.credentials import write_credentials
from nebula_mp.demo.netns import Lab, Namespace
from nebula_mp.demo.site import config_text
from nebula_mp.errors import SystemCallError

PING_OUTPUT = """\
PING 10.42.0.2 (10.42.0.2) 56(84) bytes of data.
64 bytes from 10.42.0.2: icmp_seq=1 ttl=64 time=0.412 ms
64 bytes from 10.42.0.2: icmp_seq=2 ttl=64 time=12 ms
64 bytes from 10.42.0.2: icmp_seq=2 ttl=64 time=13 ms (DUP!)

--- 10.42.0.2 ping statistics ---
3 packets transmitted, 2 received, +1 duplicates, 33.3333% packet loss, time 20ms
rtt min/avg/max/mdev = 0.412/8.470/13.000/5.703 ms
"""


def test_the_times_of_ping_are_read_without_duplicates() -> None:
    pings = measure.Pings(3, measure.parse_ping(PING_OUTPUT))

    assert pings.times_ms == (0.412, 12.0)
    assert pings.median_ms == pytest.approx(6.206)
    assert pings.loss_percent == pytest.approx(33.33, abs=0.01)


def test_the_throughput_of_iperf3_is_what_the_receiver_got() -> None:
    ends = {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 1.5e9}}

    assert measure.parse_iperf(json.dumps({"end": ends})) == 1.5e9


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param('{"end": {}, "error": "unable to connect"}', id="an error"),
        pytest.param('{"end": {"sum_received": {"bits_per_second": 0}}}', id="no bytes"),
    ],
)
def test_an_iperf3_without_a_result_is_an_error(text: str) -> None:
    with pytest.raises(SystemCallError, match="iperf3"):
        measure.parse_iperf(text)


def test_the_keys_of_the_nodes_are_readable_by_their_owner_alone_and_the_key_of_the_ca_is_not_kept(
    tmp_path: Path,
) -> None:
    write_credentials(tmp_path, {"a": "10.42.0.1/24", "b": "10.42.0.2/24"})

    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes) == {"ca.crt", "a.crt", "a.key", "b.crt", "b.key"}
    assert modes["a.key"] == modes["b.key"] == 0o600


@pytest.mark.parametrize(("address", "version"), [("10.42.0.1/24", 1), ("fd42::1/64", 2)])
def test_certificates_are_of_version_1_unless_an_address_needs_version_2(
    tmp_path: Path, address: str, version: int
) -> None:
    write_credentials(tmp_path, {"a": address})

    found = [
        certificate.version
        for name in ("ca.crt", "a.crt")
        for _, certificate in codec.parse_pem((tmp_path / name).read_text(), name)
    ]
    assert found == [version, version]


def test_the_configuration_of_a_node_passes_our_own_check(tmp_path: Path) -> None:
    write_credentials(tmp_path, {"a": "10.42.0.1/24"})
    config = tmp_path / "a.yml"
    config.write_text(config_text(tmp_path, "a", {"10.42.0.2": "192.0.2.2"}))

    argv = [sys.executable, "-m", "nebula_mp", "config", "validate", "--strict", "-c", str(config)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seconds", ["0", "-1", "3601", "soon"])
def test_a_duration_that_makes_no_sense_is_a_usage_error(seconds: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["demo", f"--seconds={seconds}"])

    assert exit_info.value.code == 2


def test_without_root_it_exits_with_4_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    code = cli.main(["demo"])

    output = capsys.readouterr()
    assert (code, output.out) == (4, "")
    assert re.search("needs? root.*sudo", output.err)


@pytest.mark.parametrize(
    ("command", "package"), [("iperf3", "iperf3"), ("ping", "iputils-ping"), ("ip", "iproute2")]
)
def test_a_missing_program_is_named_with_its_package_before_anything_is_touched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, package: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == command else f"/usr/bin/{name}")

    code = cli.main(["demo"])

    output = capsys.readouterr()
    assert (code, output.out) == (1, "")
    assert package in output.err


# From here on with real namespaces.


def leftovers(demonstration: "subprocess.Popen[str]") -> list[str]:
    """The namespaces and folders of one demonstration that are there; no process outlives its namespace unseen."""
    pid = demonstration.pid
    spaces = Path("/run/netns").glob(f"nmp-{pid}-*")
    folders = Path(tempfile.gettempdir()).glob(f"nebula-mp-demo-{pid}-*")
    processes = Path("/proc").glob("[0-9]*/cmdline")
    marks = f"nebula-mp-demo-{pid}-".encode()
    return [str(path) for path in (*spaces, *folders, *(path for path in processes if marks in read(path)))]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it has just ended


@contextmanager
def running_demo(*options: str) -> Iterator["subprocess.Popen[str]"]:
    """A demonstration, which must have left nothing at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nebula_mp", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=20)
    assert leftovers(process) == []


SAMPLE = [
    r'1/6 certificates   CA "demo", nodes a and b +[\d.]+ m?s',
    r"2/6 namespaces     nmp-\d+-\w+-a <-veth-> nmp-\d+-\w+-b",
    r"3/6 start          2 nodes, kernel (?:python|rust) +[\d.]+ m?s",
    r"4/6 handshake      a -> b direct 192\.0\.2\.2:4242 +[\d.]+ m?s",
    r"5/6 ping           20/20, median \d+ us",
    r"6/6 throughput     a -> b [\d.]+, b -> a [\d.]+ Gbit/s; busiest process: [ab] at \d+ %",
    r"cleaned up\. Next: .+",
]


@pytest.mark.e2e
def test_it_shows_handshake_ping_and_throughput_in_six_steps() -> None:
    with running_demo("--seconds", "1") as process:
        stdout, stderr = process.communicate(timeout=60)

    assert (process.returncode, stderr) == (0, "")
    lines = [line.strip() for line in stdout.splitlines()]
    assert len(lines) == len(SAMPLE)
    for line, pattern in zip(lines, SAMPLE, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.e2e
def test_json_is_one_object_on_stdout_and_the_steps_go_to_stderr() -> None:
    with running_demo("--seconds", "1", "--json") as process:
        stdout, stderr = process.communicate(timeout=60)

    result = json.loads(stdout)
    assert process.returncode == 0, stderr
    assert (result["schema"], result["pings_received"], result["kept"]) == (1, story.PINGS, None)
    assert min(result["a_to_b_bits_per_second"], result["b_to_a_bits_per_second"]) > 0
    assert len(stderr.splitlines()) == story.STEPS


@pytest.mark.e2e
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
@pytest.mark.parametrize("step", ["2/6", "5/6"])
def test_a_signal_at_any_step_cleans_up_and_exits_with_1(number: signal.Signals, step: str) -> None:
    with running_demo("--seconds", "30") as process:
        assert process.stdout is not None
        while step not in (line := process.stdout.readline()):
            assert line

        process.send_signal(number)

        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (1, "nebula-mp: interrupted; cleaned up\n")


@pytest.mark.e2e
def test_a_node_that_ends_is_explained_by_its_own_last_words() -> None:
    with running_demo("--seconds", "30") as process:
        assert process.stdout is not None
        while "<-veth->" not in (line := process.stdout.readline()):
            assert line
        space = Namespace(line.split()[-1])
        deadline = time.monotonic() + 10
        while not (pids := space.pids()) and time.monotonic() < deadline:
            time.sleep(0.005)

        os.kill(pids[0], signal.SIGKILL)

        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.startswith("nebula-mp: node b ended with -9\n  b: ")


@pytest.mark.e2e
def test_keep_leaves_two_nodes_that_answer_and_prints_the_commands_that_remove_them() -> None:
    with running_demo("--seconds", "1", "--keep", "--json") as process:
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        kept = json.loads(stdout)["kept"]
        try:
            argv = [*kept["enter"][0].split(), "-c", "1"]
            first = subprocess.run(argv, capture_output=True, timeout=20, check=False)
        finally:
            for command in kept["remove"]:
                subprocess.run(shlex.split(command), check=True, timeout=20)
        deadline = time.monotonic() + 5
        while leftovers(process) and time.monotonic() < deadline:
            time.sleep(0.05)  # the nodes take a moment to say good-bye

    assert first.returncode == 0, first.stdout


@pytest.mark.e2e
def test_a_lab_ends_even_processes_that_ignore_the_request_to_end() -> None:
    with Lab("nmpt") as lab:
        space = lab.namespace("a")
        stubborn = space.start(
            "sh", "-c", "trap '' TERM; sleep 60 & wait; sleep 60", stdout=subprocess.DEVNULL
        )
        while len(space.pids()) < 2:
            time.sleep(0.01)

    assert stubborn.wait(timeout=5) == -signal.SIGKILL
    assert not Path(f"/run/netns/{space.name}").exists()


@pytest.mark.e2e
def test_namespaces_can_talk_over_ipv4_and_ipv6_as_soon_as_they_are_joined() -> None:
    with Lab("nmpt") as lab:
        a, b = lab.namespace("a"), lab.namespace("b")
        lab.join(a, b, ["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"])

        times = [measure.ping(a, address, count=1).median_ms for address in ("192.0.2.2", "2001:db8::2")]

    assert max(times) < 1000  # not a matter of speed: neighbours asked too early are asked again after 1 s


@pytest.mark.e2e
def test_an_iperf3_server_that_does_not_heed_its_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = tmp_path / "iperf3"
    deaf.write_text(
        f"#!{sys.executable}\n"
        "import signal, socket, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "address, port = sys.argv[sys.argv.index('--bind') + 1], int(sys.argv[sys.argv.index('--port') + 1])\n"
        "listener = socket.create_server((address, port))\n"
        "time.sleep(600)\n"
    )
    deaf.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(measure, "_END_TIMEOUT_S", 0.1)
    with Lab("nmp-deaf") as lab:
        space = lab.namespace("a")
        with measure.iperf_server(space, "127.0.0.1"):
            pass
        left = space.run("sh", "-c", f"pgrep -f '^{sys.executable} {deaf}' || true")

    assert left.strip() == ""
