"""What the service manager is told."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nebula_mp import clock
from nebula_mp.workers.notify import READY, notify, notify_reloading


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.bind(str(tmp_path / "notify"))
        opened.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield opened


def test_a_state_is_one_datagram_with_a_line_each(manager: socket.socket) -> None:
    notify(READY, "STATUS=good")

    assert manager.recv(1000) == b"READY=1\nSTATUS=good"


def test_a_reload_carries_the_time_the_manager_compares_with(manager: socket.socket) -> None:
    before = clock.service_manager_us()

    notify_reloading()

    kind, _, stamp = manager.recv(1000).decode().partition("\n")
    assert kind == "RELOADING=1"
    assert before <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= clock.service_manager_us()


def test_an_abstract_socket_works_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
        opened.bind("")  # the kernel chooses an abstract name
        name = opened.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name[1:].decode()}")
        opened.settimeout(5)

        notify(READY)

        assert opened.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", ["", "relative", "/nonexistent/socket", "vsock:2:1234"])
def test_without_a_manager_nothing_happens(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path)

    notify(READY)
