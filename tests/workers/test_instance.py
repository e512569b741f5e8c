"""One gateway per name, and what a dead one leaves."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nebula_mp.config.model import Config, ListenConfig, PkiConfig, TunConfig
from nebula_mp.errors import InstanceError, SystemCallError
from nebula_mp.workers.instance import Instance, instance_name

PKI = PkiConfig(ca="", cert="", key="")


@pytest.mark.parametrize(
    ("device", "port", "name"),
    [("nebula1", 4242, "nebula1"), (None, 4242, "4242"), (None, 0, None), ("nebula1", 0, "nebula1")],
)
def test_an_instance_is_found_by_its_device_or_else_its_port(
    device: str | None, port: int, name: str | None
) -> None:
    config = Config(pki=PKI, tun=TunConfig(dev=device), listen=ListenConfig(port=port))

    assert instance_name(config) == name


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Instance]:
    instance = Instance.claim(str(tmp_path / "run"), "nebula1")
    yield instance
    instance.release()


def test_a_second_one_of_the_name_is_refused_with_the_pid_of_the_first(held: Instance) -> None:
    with pytest.raises(InstanceError) as caught:
        Instance.claim(str(held.socket_path.parent), "nebula1")

    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"nebula1: is running already as pid {os.getpid()}: ")


def test_another_name_in_the_same_directory_is_free(held: Instance) -> None:
    Instance.claim(str(held.socket_path.parent), "nebula2").release()


def test_the_control_socket_is_for_its_owner_only_and_accepts(held: Instance) -> None:
    with held.listen(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(held.socket_path))

        assert stat.S_IMODE(held.socket_path.stat().st_mode) == 0o600


def test_nothing_is_left_after_release(held: Instance) -> None:
    held.listen().close()

    held.release()
    held.release()

    assert list(held.socket_path.parent.iterdir()) == []


HOLD = """
import signal, sys
from nebula_mp.workers.instance import Instance
instance = Instance.claim(sys.argv[1], "nebula1")
listener = instance.listen()
print("ready", flush=True)
signal.pause()
"""


def test_what_a_killed_one_left_is_taken_over(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(InstanceError, match=f"pid {other.pid}"):
            Instance.claim(str(tmp_path), "nebula1")
        other.send_signal(signal.SIGKILL)
        other.wait()
    left = {path.name for path in tmp_path.iterdir()}

    instance = Instance.claim(str(tmp_path), "nebula1")
    with instance.listen():
        assert left == {"nebula1.lock", "nebula1.sock"}
        assert (tmp_path / "nebula1.lock").read_text() == f"{os.getpid()}\n"
    instance.release()


def test_a_file_that_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "nebula1.sock").write_text("precious")

    with pytest.raises(SystemCallError, match="not a socket: remove it"):
        Instance.claim(str(tmp_path), "nebula1")

    assert (tmp_path / "nebula1.sock").read_text() == "precious"
    assert not (tmp_path / "nebula1.lock").exists()


def test_a_run_directory_that_cannot_be_used_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(SystemCallError, match=r"mp\.run_dir .*file.*set mp\.run_dir"):
        Instance.claim(str(tmp_path / "file"), "nebula1")
    with pytest.raises(SystemCallError, match="107 bytes"):
        Instance.claim(str(tmp_path / ("x" * 120)), "nebula1")


def test_want_of_rights_is_exit_code_4_with_three_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)

    with pytest.raises(SystemCallError, match=r"run as root.*RuntimeDirectory.*mp\.run_dir") as caught:
        Instance.claim(str(tmp_path), "nebula1")
    assert caught.value.exit_code == 4
