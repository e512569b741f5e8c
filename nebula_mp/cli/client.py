"""Finds a running gateway and talks to it over its control socket.

Data flow: cli.stop, cli.reload, cli.status -> [cli.client] -> <run_dir>/<name>.sock -> workers.local_api
"""

import argparse
import os
import select
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from nebula_mp.config.load import load_config
from nebula_mp.config.model import MpConfig
from nebula_mp.errors import InstanceError, SystemCallError
from nebula_mp.workers.instance import instance_name, socket_path
from nebula_mp.workers.local_api import ANSWER_BYTES_MAX, LENGTH, SCHEMA, decode, encode, peer_credentials

NOT_RUNNING = 3
_USAGE = 2
_NEEDS_ROOT = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that select a gateway."""
    parser.add_argument(
        "-c", "-config", "--config", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="the configuration the gateway was started with",
    )  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="its tun device, if several are running")
    parser.add_argument(
        "--run-dir", metavar="DIR", help=f"where its control socket is (default {MpConfig().run_dir})"
    )


class Client:
    """A connection to one gateway: `call` as often as needed, inside `with`."""

    def __init__(self, path: Path, *, timeout_s: float = 10) -> None:
        """Connect. Raises InstanceError (exit 3) if nobody listens, SystemCallError (4) without the right."""
        self.name = path.stem
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except PermissionError:
            self._socket.close()
            raise SystemCallError(
                f"{path}: no right to connect: run as root, or as the user the gateway runs as",
                exit_code=_NEEDS_ROOT,
            ) from None
        except OSError as error:
            self._socket.close()
            raise InstanceError(
                f"no gateway is running at {path} ({error.strerror or error}): start one with"
                " `nebula-mp start -c FILE`",
                exit_code=NOT_RUNNING,
            ) from None
        self.pid, _ = peer_credentials(self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, command: str) -> dict[str, Any]:
        """Send one command and give its result. Raises InstanceError with the gateway's own words."""
        try:
            self._socket.sendall(encode({"schema": SCHEMA, "command": command}))
            (length,) = LENGTH.unpack(self._receive(LENGTH.size))
            if length > ANSWER_BYTES_MAX:
                raise InstanceError(f"{self.name}: an answer of {length} bytes is too long")
            answer = decode(self._receive(length))
        except ValueError as error:
            raise InstanceError(f"{self.name}: {error}") from None
        except TimeoutError:
            raise InstanceError(
                f"{self.name}: no answer within {self._socket.gettimeout():g} s (pid {self.pid}):"
                " look at its log"
            ) from None
        except ConnectionError:
            raise self._hung_up() from None
        except OSError as error:
            raise InstanceError(f"{self.name}: {error.strerror or error}") from None
        if not answer.get("ok"):
            raise InstanceError(f"{self.name}: {command} failed: {answer.get('error')}")
        result = answer.get("result")
        return result if isinstance(result, dict) else {}

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._socket.recv(count - len(data))
            if not piece:
                raise self._hung_up()
            data += piece
        return data

    def _hung_up(self) -> InstanceError:
        return InstanceError(f"{self.name}: the gateway hung up (pid {self.pid}): look at its log")

    def try_wait_gone(self, timeout_s: float) -> bool:
        """Wait until the process at the other end is gone; False if it is not within `timeout_s`."""
        # After `stop` the gateway hangs up as its last act; the process ends right after.
        self._socket.settimeout(timeout_s)
        try:
            while self._socket.recv(4096):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        with suppress(OSError):
            descriptor = os.pidfd_open(self.pid)
            try:
                return bool(select.select([descriptor], [], [], timeout_s)[0])
            finally:
                os.close(descriptor)
        return True


def connect(arguments: argparse.Namespace, *, timeout_s: float = 10) -> Client:
    """Connect to the gateway the options select. Raises NebulaError."""
    run_dir, name = arguments.run_dir, arguments.device
    if "config" in arguments:
        config = load_config(arguments.config).config
        run_dir, name = run_dir or config.mp.run_dir, name or instance_name(config)
    run_dir = run_dir or MpConfig().run_dir
    if name is not None:
        return Client(socket_path(run_dir, name), timeout_s=timeout_s)
    return _the_only_one(run_dir, timeout_s)


def _the_only_one(run_dir: str, timeout_s: float) -> Client:
    clients: list[Client] = []
    try:
        paths = sorted(Path(run_dir).glob("*.sock"))
    except OSError:
        paths = []
    for path in paths:
        with suppress(InstanceError):  # what a killed gateway left behind
            clients.append(Client(path, timeout_s=timeout_s))
    if len(clients) == 1:
        return clients[0]
    for client in clients:
        client.__exit__()
    if not clients:
        raise InstanceError(
            f"no gateway is running (looked in {run_dir}): start one with `nebula-mp start -c FILE`",
            exit_code=NOT_RUNNING,
        )
    names = ", ".join(client.name for client in clients)
    raise InstanceError(f"several are running: {names}: choose one with --device NAME", exit_code=_USAGE)


def say(text: str) -> None:
    """Tell the operator something that is not data."""
    print(text, file=sys.stderr)
