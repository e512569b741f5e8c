"""The control socket, spoken to by the client of the commands and by others who mean it less well."""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import msgpack
import pytest

from nebula_mp.cli.client import Client
from nebula_mp.errors import CertError, InstanceError, SystemCallError
from nebula_mp.workers import local_api
from nebula_mp.workers.instance import Instance
from nebula_mp.workers.local_api import LENGTH, SCHEMA, LocalApi, decode, encode
from nebula_mp.workers.loop import run
from nebula_mp.workers.threads import in_thread
from tests.support.processes import forked

T = TypeVar("T")


async def _status() -> Mapping[str, object]:
    return {"device": "nebula1", "hosts": [], "big": 1 << 63}


async def _reload() -> Mapping[str, object]:
    raise CertError("pki.cert: expired")


async def _broken() -> Mapping[str, object]:
    raise ZeroDivisionError


async def _slow() -> Mapping[str, object]:
    await asyncio.sleep(30)
    return {}


COMMANDS = {"status": _status, "reload": _reload, "broken": _broken, "slow": _slow}


def serving(
    directory: Path, talk: Callable[[Path], T], uids: Collection[int] = (os.geteuid(),)
) -> tuple[T, list[BaseException]]:
    """Run `talk(socket path)` beside a gateway's control socket; its result, and what the loop was told."""
    result: list[T] = []
    errors: list[BaseException] = []

    async def main() -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
        instance = Instance.claim(str(directory), "nebula1")
        api = LocalApi(COMMANDS, uids)
        api.start(instance.listen())
        try:
            result.append(await in_thread(lambda: talk(instance.socket_path)))
        finally:
            api.close()
            instance.release()
            await asyncio.sleep(0.01)
        return 0

    run(main)
    return result[0], errors


def test_a_command_is_answered_with_its_result(tmp_path: Path) -> None:
    def talk(path: Path) -> object:
        with Client(path) as client:
            return [client.call("status"), client.call("status"), client.pid, client.name]

    answer, errors = serving(tmp_path, talk)

    status = {"device": "nebula1", "hosts": [], "big": 1 << 63}
    assert answer == [status, status, os.getpid(), "nebula1"]
    assert errors == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("reload", "nebula1: reload failed: pki.cert: expired"),
        ("explode", "unknown command; known are broken, reload, slow, status"),
    ],
)
def test_a_refusal_comes_back_in_the_gateways_own_words(command: str, words: str, tmp_path: Path) -> None:
    def talk(path: Path) -> str:
        with Client(path) as client, pytest.raises(InstanceError) as caught:
            client.call(command)
        assert caught.value.exit_code == 1
        return str(caught.value)

    assert words in serving(tmp_path, talk)[0]


def test_a_fault_of_ours_hangs_up_and_is_not_swallowed(tmp_path: Path) -> None:
    def talk(path: Path) -> str:
        with Client(path) as client, pytest.raises(InstanceError) as caught:
            client.call("broken")
        return str(caught.value)

    message, errors = serving(tmp_path, talk)

    assert "hung up" in message
    assert [type(error) for error in errors] == [ZeroDivisionError]


def test_a_gateway_that_does_not_answer_is_named_with_its_pid(tmp_path: Path) -> None:
    def talk(path: Path) -> str:
        with Client(path, timeout_s=0.05) as client, pytest.raises(InstanceError) as caught:
            client.call("slow")
        return str(caught.value)

    assert f"no answer within 0.05 s (pid {os.getpid()})" in serving(tmp_path, talk)[0]


def exchange(path: Path, sent: bytes) -> bytes:
    """Send raw bytes and read until the gateway hangs up or is silent for a while."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
        raw.settimeout(0.5)
        raw.connect(str(path))
        raw.sendall(sent)
        received = b""
        with contextlib.suppress(TimeoutError):
            while piece := raw.recv(65536):
                received += piece
        return received


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        pytest.param(encode({"schema": 2, "command": "status"}), "different versions", id="schema"),
        pytest.param(encode({"command": "status"}), "different versions", id="no schema"),
        pytest.param(encode({"schema": SCHEMA, "command": ["status"]}), "unknown command", id="no name"),
        pytest.param(LENGTH.pack(3) + b"\xc1\xc1\xc1", "not msgpack", id="not msgpack"),
        pytest.param(LENGTH.pack(0), "not msgpack", id="empty"),
        pytest.param(LENGTH.pack(1) + b"\x01", "not a message of schema", id="no map"),
        pytest.param(LENGTH.pack(local_api.REQUEST_BYTES_MAX + 1), "longer than", id="too long"),
    ],
)
def test_nonsense_is_refused_and_the_gateway_lives_on(sent: bytes, error: str, tmp_path: Path) -> None:
    def talk(path: Path) -> tuple[bytes, object]:
        answer = exchange(path, sent)
        with Client(path) as client:
            return answer, client.call("status")["device"]

    (answer, device), errors = serving(tmp_path, talk)

    (length,) = LENGTH.unpack(answer[: LENGTH.size])
    body = decode(answer[LENGTH.size : LENGTH.size + length])
    assert body["ok"] is False
    assert error in body["error"]
    assert (device, errors) == ("nebula1", [])


def test_half_a_request_and_a_client_that_goes_away_cost_nothing(tmp_path: Path) -> None:
    def talk(path: Path) -> object:
        for sent in (b"", b"\0", LENGTH.pack(100) + b"x", encode({"schema": 1, "command": "status"})):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
                raw.connect(str(path))
                raw.sendall(sent)
        with Client(path) as client:
            return client.call("status")["device"]

    assert serving(tmp_path, talk) == ("nebula1", [])


def test_a_silent_client_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_api, "_IDLE_S", 0.05)

    def talk(path: Path) -> bytes:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.settimeout(5)
            raw.connect(str(path))
            return raw.recv(10)

    assert serving(tmp_path, talk) == (b"", [])


def test_only_so_many_clients_are_served_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_api, "_CLIENTS_MAX", 1)

    def talk(path: Path) -> object:
        with Client(path) as first:
            first.call("status")
            with Client(path) as second, pytest.raises(InstanceError, match="hung up"):
                second.call("status")
            return first.call("status")["device"]

    assert serving(tmp_path, talk)[0] == "nebula1"


@pytest.mark.parametrize(
    ("uids", "is_served"),
    [
        pytest.param((), False, id="nobody"),
        pytest.param((os.geteuid() + 1,), False, id="another user only"),
        pytest.param((os.geteuid() + 1, os.geteuid()), True, id="us too"),
    ],
)
def test_only_listed_users_are_served(uids: Collection[int], is_served: bool, tmp_path: Path) -> None:
    def talk(path: Path) -> str:
        with Client(path) as client:
            try:
                return str(client.call("status")["device"])
            except InstanceError as error:
                return str(error)

    answer, errors = serving(tmp_path, talk, uids)

    assert answer == "nebula1" if is_served else "hung up" in answer
    assert errors == []


def test_a_process_that_took_the_socket_over_is_not_mistaken_for_the_one_that_opened_it(
    tmp_path: Path,
) -> None:
    instance = Instance.claim(str(tmp_path), "nebula1")
    listener = instance.listen()

    async def main() -> int:
        LocalApi(COMMANDS, (os.geteuid(),)).start(listener)
        await asyncio.sleep(600)
        return 0

    with forked(lambda: run(main)) as child, Client(instance.socket_path) as client:
        answer = client.call("status")
        found = client.pid

    assert answer["device"] == "nebula1"
    assert found == os.getpid() != child.pid
    listener.close()
    instance.release()


def test_without_descriptors_to_spare_it_waits_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_api, "_PAUSE_S", 0.05)
    refusals = [OSError(errno.EMFILE, "too many"), ConnectionAbortedError(), BlockingIOError()]
    accept = socket.socket.accept
    accepted: list[object] = []

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            accepted.append(None)
            if refusals:
                raise refusals.pop(0)
            return accept(self)

    def talk(path: Path) -> object:
        with Client(path) as client:
            return client.call("status")["device"]

    listen = Instance.listen
    monkeypatch.setattr(Instance, "listen", lambda self: Listener(fileno=listen(self).detach()))

    assert serving(tmp_path, talk) == ("nebula1", [])
    assert len(accepted) == 4


def test_nobody_listening_is_exit_code_3_and_no_right_is_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InstanceError) as absent:
        Client(tmp_path / "nebula1.sock")
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(tmp_path / "stale.sock"))
    stale.close()
    with pytest.raises(InstanceError) as dead:
        Client(tmp_path / "stale.sock")

    class Refusing(socket.socket):
        def connect(self, *_: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(SystemCallError, match="run as root") as refused:
        Client(tmp_path / "nebula1.sock")

    assert (absent.value.exit_code, dead.value.exit_code, refused.value.exit_code) == (3, 3, 4)
    assert "nebula-mp start" in str(absent.value)


def test_an_answer_that_claims_to_be_endless_is_not_waited_for(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "x.sock"))
    listener.listen()
    with listener, Client(tmp_path / "x.sock", timeout_s=5) as client:
        server, _ = listener.accept()
        with server:
            server.sendall(LENGTH.pack(local_api.ANSWER_BYTES_MAX + 1))
            with pytest.raises(InstanceError, match="too long"):
                client.call("status")


def test_msgpack_frames_survive_a_round_trip() -> None:
    message = {"schema": SCHEMA, "text": "ü", "list": [1, 2.5, None, True], "map": {"a": b"\0"}}

    framed = encode(message)

    assert LENGTH.unpack(framed[:4]) == (len(framed) - 4,)
    assert decode(framed[4:]) == message
    assert msgpack.unpackb(framed[4:]) == message
