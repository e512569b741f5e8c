"""`start`: what is checked, in which order things are opened, and that a failure undoes them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nebula_mp import clock, netlink
from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.cli import main, start
from nebula_mp.config.load import LoadedConfig, load_config
from nebula_mp.config.model import DrainMode, KernelChoice, ListenConfig
from nebula_mp.errors import InstanceError, NebulaError, SystemCallError
from nebula_mp.newtypes import CertVersion
from nebula_mp.workers.checked import Check
from nebula_mp.workers.host import Host
from nebula_mp.workers.instance import Instance
from tests.support.pki import ANY_TIME, Pki
from tests.support.private_net import devices, private_network
from tests.support.processes import eventually

NAME = "nmptest0"


def write_files(directory: Path) -> Path:
    """Good files of one host; the path of its configuration."""
    pki = Pki.shared()
    identity = pki.identity("host", "10.42.0.1/24", "fd00:42::1/64")
    (directory / "ca.crt").write_text(encode_pem(pki.ca))
    (directory / "host.crt").write_text(encode_pem(identity.certificates[CertVersion.V2]))
    (directory / "host.key").write_text(encode_private_key(identity.private_key))
    (directory / "host.key").chmod(0o600)
    config = directory / "config.yml"
    config.write_text(
        f"pki: {{ca: {directory}/ca.crt, cert: {directory}/host.crt, key: {directory}/host.key}}\n"
        f"tun: {{dev: {NAME}}}\nlisten: {{host: 0.0.0.0, port: 4242}}\n"
        f"mp: {{run_dir: {directory}/run}}\n"
        "firewall: {outbound: [{port: any, proto: any, host: any}]}\n"
    )
    return config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clock, "wall_s", lambda: ANY_TIME)
    return write_files(tmp_path)


# ---- checking only ----


@pytest.mark.parametrize("words", [["start", "-c"], ["-config"]])
def test_a_test_run_says_who_this_is_and_touches_nothing(
    words: list[str], config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, str(config), "-test"]) == 0

    assert capsys.readouterr() == (f"{config}: good; this is 'host', 10.42.0.1/24, fd00:42::1/64\n", "")
    assert not (config.parent / "run").exists()


def test_warnings_of_a_test_run_go_to_stderr(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "host.key").chmod(0o644)

    assert main(["start", "-c", str(config), "-test"]) == 0

    assert capsys.readouterr().err.startswith(f"warning: pki.key {config.parent}/host.key: every user")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yml", "pki: [", "config.yml"),
        ("config.yml", "listen: {port: 42424x}", r"config\.yml:1:16: listen\.port: .*42424x"),
        ("host.key", "nonsense", r"config\.yml:1:\d+: pki\.key: .*host\.key: no PEM"),
        ("host.crt", "nonsense", r"config\.yml:1:\d+: pki\.cert: .*host\.crt: no PEM"),
        ("ca.crt", "nonsense", r"config\.yml:1:\d+: pki\.ca: .*ca\.crt: no PEM"),
    ],
)
def test_a_test_run_finds_what_start_would_and_ends_with_1(
    name: str, content: str, words: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / name).write_text(content)

    assert main(["start", "-c", str(config), "-test"]) == 1

    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(words, captured.err)


def test_without_a_configuration_it_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start"]) == 2
    assert "-c FILE is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ([], {}),
        (["--run-dir", "/elsewhere"], {"run_dir": "/elsewhere"}),
        (["--workers", "2"], {"workers": 2}),
        (["--workers", "64"], {"workers": 64}),
        (["--workers", "auto"], {"workers": None}),
        (["--drain", "reader"], {"drain": DrainMode.READER}),
        (["--kernel", "rust"], {"kernel": KernelChoice.RUST}),
        (["--kernel=auto"], {"kernel": KernelChoice.AUTO}),
        (["--workers=3", "--drain=auto"], {"workers": 3, "drain": DrainMode.AUTO}),
    ],
)
@pytest.mark.parametrize("command", [["start"], []])
def test_an_option_beats_the_key_of_the_file(
    command: list[str],
    words: list[str],
    changes: Mapping[str, Any],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = config.read_text().replace(
        "mp: {", "mp: {workers: 7, drain: writer, kernel: python, user: nebula, "
    )
    config.write_text(text)
    loads: list[Callable[[], LoadedConfig]] = []

    def instead(load: Callable[[], LoadedConfig], kernel: KernelChoice | None) -> int:
        assert kernel is changes.get("kernel")
        loads.append(load)
        return 0

    monkeypatch.setattr(start, "_serve", instead)
    if words and not command:
        with pytest.raises(SystemExit):  # these are no flags of the original
            main(["-config", str(config), *words])
        return

    assert main([*command, "-config", str(config), *words]) == 0

    in_file = load_config(config).config.mp
    assert (in_file.workers, in_file.drain, in_file.user) == (7, DrainMode.WRITER, "nebula")
    assert in_file.kernel is KernelChoice.PYTHON
    assert [load().config.mp for load in loads] == [replace(in_file, **changes)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "0"], "'0' is neither auto nor a number from 1 to 64"),
        (["--workers", "65"], "'65' is neither auto nor a number from 1 to 64"),
        (["--workers", "many"], "'many' is neither auto nor a number from 1 to 64"),
        (["--workers", "-1"], "--workers"),
        (["--drain", "both"], "invalid choice: 'both'"),
        (["--kernel", "go"], "invalid choice: 'go'"),
    ],
)
def test_an_option_with_a_wrong_value_is_a_usage_error(
    words: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["start", "-c", str(config), *words])

    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_process_that_forks_all_others_has_one_thread_when_everything_is_imported() -> None:
    script = (
        "import importlib, os\nfrom nebula_mp.cli import start\n"
        "for name in start._PARTS: importlib.import_module(name)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )

    assert ended.stdout == "1\n"


def test_a_refusal_is_not_kept_waiting_for_what_a_gateway_would_need(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text("cipher: des\n")
    refused = Check.refused

    def wait_for_it(check: Check) -> bool:
        assert eventually(lambda: refused(check))
        return True

    monkeypatch.setattr(Check, "refused", wait_for_it)
    monkeypatch.setattr(start, "_PARTS", ("nebula_mp.not_there",))

    assert main(["start", "-c", str(config)]) == 1
    assert "cipher: found" in capsys.readouterr().err


CLOSED = """
import os
from nebula_mp.cli.start import _ensure_standard_descriptors
os.close(0), os.close(1)
_ensure_standard_descriptors()
fd = os.open("/", os.O_RDONLY)
os.write(2, f"{fd} {os.readlink('/proc/self/fd/1')}".encode())
"""


def test_closed_standard_descriptors_are_never_given_to_a_device() -> None:
    ended = subprocess.run([sys.executable, "-c", CLOSED], stderr=subprocess.PIPE, timeout=60, check=True)

    number, path = ended.stderr.decode().split()
    assert int(number) > 2
    assert path == "/dev/null"


# ---- opening and undoing, with real devices ----


@pytest.fixture
def network() -> Iterator[None]:
    with private_network():
        yield


def prepare(loaded: LoadedConfig, undo: ExitStack) -> Host:
    """Check a configuration, and open what belongs to it."""
    checked = Check.begin(lambda: loaded).finish()
    undo.callback(os.close, checked.key)
    host, _ = Host.open(checked, undo)
    return host


def try_prepare(loaded: LoadedConfig) -> NebulaError:
    """Prepare a gateway that cannot start; the error, after everything was undone."""
    with pytest.raises(NebulaError) as caught, ExitStack() as undo:
        prepare(loaded, undo)
    return caught.value


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_a_prepared_gateway_has_device_addresses_socket_and_lock_and_undoing_takes_all_away(
    config: Path,
) -> None:
    with ExitStack() as undo:
        host = prepare(load_config(config), undo)
        while_open = devices()
        port = host.udp.port
        files = sorted(path.name for path in (config.parent / "run").iterdir())

    assert NAME in while_open
    assert port == 4242
    assert files == [f"{NAME}.lock", f"{NAME}.sock"]
    assert devices() == {"lo"}
    assert list((config.parent / "run").iterdir()) == []


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_a_taken_port_leaves_no_device_and_no_lock(config: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", 4242))
        error = try_prepare(load_config(config))

    assert "udp 0.0.0.0:4242: the port is taken by" in str(error)
    assert f"(pid {os.getpid()})" in str(error)
    assert devices() == {"lo"}
    assert list((config.parent / "run").iterdir()) == []


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_refused_addresses_leave_no_device_and_no_lock(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SystemCallError("tun: address refused")

    monkeypatch.setattr(netlink, "configure", refuse)

    assert str(try_prepare(load_config(config))) == "tun: address refused"
    assert devices() == {"lo"}
    assert list((config.parent / "run").iterdir()) == []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("0.0.0.0", 4242))


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_an_instance_that_runs_already_is_found_before_any_device_is_made(config: Path) -> None:
    held = Instance.claim(f"{config.parent}/run", NAME)

    error = try_prepare(load_config(config))

    assert isinstance(error, InstanceError)
    assert f"{NAME}: is running already as pid {os.getpid()}" in str(error)
    assert devices() == {"lo"}
    held.release()


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_with_neither_device_nor_port_named_the_instance_is_called_like_the_device(config: Path) -> None:
    loaded = load_config(config)
    free = replace(
        loaded.config, tun=replace(loaded.config.tun, dev=None), listen=ListenConfig(host="0.0.0.0", port=0)
    )

    with ExitStack() as undo:
        host = prepare(replace(loaded, config=free), undo)
        named = (host.device, host.instance.name)

    assert named == ("tun0", "tun0")


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_a_wrong_certificate_is_found_before_anything_is_touched(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "wall_s", lambda: ANY_TIME + 10 * 365 * 86_400)

    assert "expired" in str(try_prepare(load_config(config)))
    assert not (config.parent / "run").exists()


# ---- the whole program ----

# The certificates of tests.support.pki are valid around a fixed moment, so the program gets that clock.
PROGRAM = f"""
import sys
from nebula_mp import clock
from nebula_mp.newtypes import Instant
clock.wall_s = lambda: {ANY_TIME}
clock.now = lambda: Instant(clock.monotonic(), {ANY_TIME} * 10**9)
from nebula_mp.cli import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def program(config: Path) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """A gateway that is up, and the lines it has logged on the way."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "start", "-c", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "Nebula interface is active" in line:
                break
        yield process, lines
        process.kill()


@pytest.fixture
def gateway(network: None, config: Path) -> Iterator["subprocess.Popen[str]"]:
    with program(config) as (process, _):
        yield process


def command(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nebula_mp", *words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.e2e
def test_a_gateway_is_seen_reloaded_and_stopped_by_its_commands(
    gateway: "subprocess.Popen[str]", config: Path
) -> None:
    run_dir = f"{config.parent}/run"
    shown = command("status", "-c", str(config))
    as_json = command("status", "--run-dir", run_dir, "--json")
    reloaded = command("reload", "--run-dir", run_dir, "--device", NAME)
    (config.parent / "host.key").write_text("nonsense")
    not_reloaded = command("reload", "-c", str(config))
    stopped = command("stop", "-c", str(config))
    again = command("stop", "-c", str(config))

    assert shown.returncode == 0
    assert re.match(
        rf"{NAME}  up \d+s  10\.42\.0\.1/24 fd00:42::1/64  cert host expires in \S+ \S+  kernel (?:python|rust)"
        r"  workers (\d+)/\1\n"
        r"no tunnels: ",
        shown.stdout,
    )
    assert json.loads(as_json.stdout)["schema"] == 1
    assert json.loads(as_json.stdout)["pid"] == gateway.pid
    assert (reloaded.returncode, reloaded.stderr) == (0, f"{NAME}: reloaded\n")
    assert not_reloaded.returncode == 1
    assert f"reload failed: {config}:1:" in not_reloaded.stderr
    assert f": pki.key: {config.parent}/host.key: no PEM block found" in not_reloaded.stderr
    assert (stopped.returncode, stopped.stderr) == (0, f"{NAME}: stopped (pid {gateway.pid})\n")
    assert gateway.wait(10) == 0
    assert again.returncode == 3
    assert "nebula-mp start" in again.stderr
    assert devices() == {"lo"}


@pytest.mark.e2e
@pytest.mark.usefixtures("network")
def test_a_start_names_all_keys_without_effect_in_one_warning_and_obeys_nebulas_switches_for_offloads(
    config: Path,
) -> None:
    before = (
        config.read_text()
        .replace("tun: {", "tun: {use_offloads: false, pin_threads: false, ")
        .replace("listen: {", "listen: {udp_offloads: false, batch: 128, ")
    )
    config.write_text(
        f"{before}logging: {{format: json}}\nlighthouse:\n  hosts: [10.42.0.9]\npunchy: {{punch: true}}\n"
        "relay: {use_relays: true}\nstats: {type: none, listen: x}\n"
    )

    with program(config) as (process, lines):
        process.terminate()
        assert process.stdout is not None
        lines.extend(process.stdout)
        code = process.wait(10)

    records = [json.loads(line) for line in lines]
    said = [(record["level"], record["msg"]) for record in records]
    assert code == 0
    warning = (
        f"known to Nebula but without effect here yet: tun.pin_threads ({config}:2), listen.batch ({config}:3),"
        f" lighthouse.hosts ({config}:8), punchy.punch ({config}:9)"
    )
    assert [entry for entry in said if "without effect" in entry[1]] == [("WARN", warning)]
    for key in ("lighthouse.hosts", "punchy.punch", "pin_threads", "listen.batch"):
        assert sum(key in text for _, text in said) == 1
    for key in ("use_offloads", "udp_offloads", "use_relays", "stats"):
        assert not any(key in text for _, text in said)
    (offloads,) = (record for record in records if record["msg"] == "offloads")
    granted = {name: offloads[name] for name in ("tso", "uso", "udpSegment", "udpGro")}
    assert granted == {"tso": False, "uso": False, "udpSegment": False, "udpGro": False}


@pytest.mark.e2e
def test_the_processes_of_a_gateway_are_listed(gateway: "subprocess.Popen[str]", config: Path) -> None:
    shown = command("workers", "-c", str(config))
    as_json = command("workers", "-c", str(config), "--json")

    heading, *lines, kernel = (line.split() for line in shown.stdout.splitlines())
    assert (shown.returncode, as_json.returncode) == (0, 0)
    assert kernel == ["kernel", json.loads(as_json.stdout)["kernel"]]
    assert heading == ["ROLE", "PID", "CORE", "CPU", "RING", "IN", "OUT", "RESTARTS", "STATE"]
    assert {"control", "services", "reader/0", "writer/0"} <= {line[0] for line in lines}
    assert all(line[-1] == "running" for line in lines)
    assert all(0 <= int(line[3].removesuffix("%")) <= 200 for line in lines)
    processes = json.loads(as_json.stdout)["processes"]
    children = Path(f"/proc/{gateway.pid}/task/{gateway.pid}/children").read_text().split()
    assert {str(process["pid"]) for process in processes} == set(children)


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_within_two_seconds_and_nothing_is_left(
    number: signal.Signals, gateway: "subprocess.Popen[str]", config: Path
) -> None:
    began = time.monotonic()
    gateway.send_signal(number)
    code = gateway.wait(10)
    took = time.monotonic() - began

    assert code == 0
    assert took < 2.0
    assert devices() == {"lo"}
    assert list((config.parent / "run").iterdir()) == []
    assert gateway.stderr is not None
    assert gateway.stderr.read() == ""


def test_asked_to_stop_before_it_is_up_it_ends_with_0(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(_: Path) -> LoadedConfig:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
        raise AssertionError("the signal was to come first")

    monkeypatch.setattr(start, "load_config", slow)
    before = signal.getsignal(signal.SIGTERM)

    assert main(["start", "-c", str(config)]) == 0
    assert "asked to stop before it was up" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.e2e
def test_a_second_start_names_the_first_and_leaves_it_alone(
    gateway: "subprocess.Popen[str]", config: Path
) -> None:
    second = subprocess.run(
        [sys.executable, "-c", PROGRAM, "start", "-c", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert second.returncode == 1
    assert second.stderr.startswith(f"nebula-mp: {NAME}: is running already as pid {gateway.pid}: ")
    assert command("status", "-c", str(config)).returncode == 0


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


@pytest.mark.e2e
def test_after_a_kill_the_next_start_takes_over(gateway: "subprocess.Popen[str]", config: Path) -> None:
    gateway.kill()
    gateway.wait(10)
    left = sorted(path.name for path in (config.parent / "run").iterdir())
    children_are_gone = eventually(lambda: NAME not in devices() and is_free(4242))

    with ExitStack() as undo:
        prepare(load_config(config), undo)
        found = devices()

    assert left == [f"{NAME}.lock", f"{NAME}.sock"]
    assert children_are_gone
    assert NAME in found


@pytest.mark.e2e
def test_the_process_can_be_told_apart_in_ps(gateway: "subprocess.Popen[str]") -> None:
    title = Path(f"/proc/{gateway.pid}/cmdline").read_bytes()

    assert title.rstrip(b"\0").decode() == f"nebula-mp: supervisor {NAME}"
