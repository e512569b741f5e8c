"""The screen of `status`, and which gateway the commands mean."""

import argparse
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nebula_mp.cli import client, main
from nebula_mp.cli.status import render, span
from nebula_mp.errors import InstanceError


def state(**changes: Any) -> dict[str, Any]:
    host = {
        "name": "db-2",
        "addresses": ["10.42.0.9", "fd00::9"],
        "remote": "203.0.113.9:4242",
        "primary": True,
        "sent": 12,
        "received": 3456,
    }
    return {
        "device": "nebula1",
        "uptime_s": 3 * 86_400 + 4 * 3600 + 59,
        "networks": ["10.42.0.7/24"],
        "certificate": {"name": "web-7", "expires_in_s": 41 * 86_400},
        "kernel": "python",
        "hosts": [host, {**host, "primary": False, "remote": "192.0.2.1:1"}],
        **changes,
    }


def test_one_screen_shows_the_gateway_and_each_peers_tunnel_in_use() -> None:
    assert render(state()) == (
        "nebula1  up 3d 4h  10.42.0.7/24  cert web-7 expires in 41d 0h  kernel python\n"
        "HOST  ADDRESS            PATH                     SENT  RECEIVED\n"
        "db-2  10.42.0.9 fd00::9  direct 203.0.113.9:4242  12    3456"
    )


def test_the_workers_that_run_are_counted_against_those_there_should_be() -> None:
    head = render(state(workers={"running": 3, "configured": 4})).splitlines()[0]

    assert head.endswith("kernel python  workers 3/4")


def test_without_tunnels_it_says_how_one_is_made() -> None:
    assert render(state(hosts=[])).splitlines()[1] == "no tunnels: the first packet for a host makes one"


def test_an_expired_certificate_cannot_be_overlooked() -> None:
    expired = {"name": "web-7", "expires_in_s": -7200}

    assert "cert web-7 EXPIRED 2h 0m ago" in render(state(certificate=expired))


def test_a_peers_name_cannot_drive_the_terminal() -> None:
    hosts = [{**state()["hosts"][0], "name": "\x1b]0;owned\x07"}]

    assert "\x1b" not in render(state(hosts=hosts))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59, "59s"),
        (60, "1m 0s"),
        (3599, "59m 59s"),
        (3600, "1h 0m"),
        (90_061, "1d 1h"),
        (864_000, "10d 0h"),
    ],
)
def test_spans_have_two_units(seconds: int, text: str) -> None:
    assert span(seconds) == text


# ---- which gateway ----


def arguments(**keys: object) -> argparse.Namespace:
    return argparse.Namespace(**{"run_dir": None, "device": None, **keys})


@pytest.fixture
def listening(tmp_path: Path) -> Any:
    with ExitStack() as undo:

        def listen(name: str) -> None:
            listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(tmp_path / f"{name}.sock"))
            listener.listen()

        yield listen


def test_the_only_one_needs_no_name_and_what_a_killed_one_left_does_not_count(
    listening: Any, tmp_path: Path
) -> None:
    listening("nebula1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "dead.sock"))

    with client.connect(arguments(run_dir=str(tmp_path))) as found:
        assert found.name == "nebula1"


def test_of_several_one_must_be_named(listening: Any, tmp_path: Path) -> None:
    listening("nebula1")
    listening("nebula2")

    with pytest.raises(InstanceError, match=r"nebula1, nebula2: choose one with --device") as caught:
        client.connect(arguments(run_dir=str(tmp_path)))
    with client.connect(arguments(run_dir=str(tmp_path), device="nebula2")) as found:
        assert found.name == "nebula2"
    assert caught.value.exit_code == 2


def test_a_configuration_selects_by_its_run_directory_and_device(listening: Any, tmp_path: Path) -> None:
    listening("nebula1")
    listening("4242")
    config = tmp_path / "config.yml"
    pki = "pki: {ca: a, cert: b, key: c}\n"

    config.write_text(f"{pki}tun: {{dev: nebula1}}\nmp: {{run_dir: {tmp_path}}}\n")
    with client.connect(arguments(config=config)) as by_device:
        assert by_device.name == "nebula1"
    config.write_text(f"{pki}listen: {{port: 4242}}\nmp: {{run_dir: {tmp_path}}}\n")
    with client.connect(arguments(config=config)) as by_port:
        assert by_port.name == "4242"


@pytest.mark.parametrize("command", ["stop", "reload", "status", "workers"])
def test_nothing_running_is_exit_code_3_with_the_next_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--run-dir", str(tmp_path)]) == 3

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"nebula-mp: no gateway is running (looked in {tmp_path}): start one with `nebula-mp start -c FILE`\n"
    )
