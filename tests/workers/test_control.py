"""The running gateway: two of them on loopback, each with a socket pair for a TUN device.

Everything is real except the device: uvloop, sockets, control socket, signals, controller.
"""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from nebula_mp import clock, netlink
from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.cli.client import Client
from nebula_mp.config.load import LoadedConfig
from nebula_mp.config.model import (
    Config,
    FirewallConfig,
    FirewallRule,
    HostPort,
    ListenConfig,
    LoggingConfig,
    LogLevel,
    MpConfig,
    PkiConfig,
    TunConfig,
)
from nebula_mp.control.actions import SendDatagram, WriteTun
from nebula_mp.control.controller import Controller
from nebula_mp.errors import ConfigError, InstanceError, SystemCallError
from nebula_mp.ioctl_tun import TunDevice, TunLostError
from nebula_mp.newtypes import CertVersion, Instant, UdpAddr
from nebula_mp.udp_socket import SendFault, UdpSocket
from nebula_mp.workers import control
from nebula_mp.workers.control import EXIT_LOST, Gateway, Parts
from nebula_mp.workers.instance import Instance
from nebula_mp.workers.logs import Logs
from nebula_mp.workers.loop import run
from nebula_mp.workers.pki import load_pki
from nebula_mp.workers.threads import in_thread
from tests.support import packets
from tests.support.pki import ANY_TIME, Pki

ANY = FirewallConfig(inbound=(FirewallRule(),), outbound=(FirewallRule(),))
OVERLAY = {"a": ip_address("10.42.0.1"), "b": ip_address("10.42.0.2")}


@pytest.fixture(autouse=True)
def _certificates_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "wall_s", lambda: ANY_TIME)
    monkeypatch.setattr(clock, "now", lambda: Instant(clock.monotonic(), ANY_TIME * 10**9))


@dataclass
class Node:
    """A gateway under test, and what the test holds of it."""

    name: str
    gateway: Gateway
    parts: Parts
    stack: socket.socket  # the local stack's end of the device
    log_path: Path
    files: Path
    loaded: list[LoadedConfig]  # the last one is what a reload reads

    @property
    def log(self) -> list[str]:
        return self.log_path.read_text().splitlines()

    def events(self, message: str) -> list[dict[str, object]]:
        """The log records with this message."""
        return [record for line in self.log if (record := json.loads(line))["msg"] == message]

    async def call(self, command: str) -> dict[str, Any]:
        """Send a command to the control socket, as the commands of the CLI do."""

        def talk() -> dict[str, Any]:
            with Client(self.parts.instance.socket_path) as client:
                return client.call(command)

        return await in_thread(talk)

    async def receive(self, within_s: float = 5) -> bytes:
        """The next packet that the gateway hands to the local stack."""
        async with asyncio.timeout(within_s):
            return await asyncio.get_running_loop().sock_recv(self.stack, 65535)


class Site:
    """Makes gateways in a directory, closes what they opened, and runs them."""

    def __init__(self, directory: Path, undo: ExitStack) -> None:
        self._directory = directory
        self._undo = undo
        self._pki = Pki.shared()

    def write_pki(self, name: str, **keys: object) -> Path:
        """Write certificate, key and CA of a host; the directory."""
        files = self._directory / name
        files.mkdir(exist_ok=True)
        identity = self._pki.identity(name, f"{OVERLAY[name]}/24", **keys)  # type: ignore[arg-type]
        (files / "ca.crt").write_text(encode_pem(self._pki.ca))
        (files / "host.crt").write_text(encode_pem(identity.certificates[CertVersion.V2]))
        (files / "host.key").write_text(encode_private_key(identity.private_key))
        (files / "host.key").chmod(0o600)
        return files

    def node(self, name: str, **keys: object) -> Node:
        files = self.write_pki(name)
        config = Config(
            pki=PkiConfig(
                ca=str(files / "ca.crt"), cert=str(files / "host.crt"), key=str(files / "host.key")
            ),
            tun=TunConfig(dev=f"test-{name}"),
            listen=ListenConfig(host="127.0.0.1"),
            firewall=ANY,
            logging=LoggingConfig(level=LogLevel.DEBUG, format="json"),
            mp=MpConfig(run_dir=str(self._directory / "run")),
        )
        config = replace(config, **keys)  # type: ignore[arg-type]
        loaded = [LoadedConfig(config, (), (files / "config.yml",))]
        pki = load_pki(config.pki, ANY_TIME)
        instance = Instance.claim(config.mp.run_dir, f"test-{name}")
        self._undo.callback(instance.release)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self._undo.callback(theirs.close)
        tun = TunDevice(ours.detach(), f"test-{name}")
        self._undo.callback(tun.close)
        udp = UdpSocket.open(config.listen)
        self._undo.callback(udp.close)
        watcher = netlink.AddressWatcher(0)
        self._undo.callback(watcher.close)
        listener = instance.listen()
        self._undo.callback(listener.close)
        parts = Parts(
            config=config,
            sources=(str(files / "config.yml"),),
            pki=pki,
            instance=instance,
            listener=listener,
            tun=tun,
            udp=udp,
            watcher=watcher,
            controller=Controller(config, pki.identity, pki.pool, clock.entropy, clock.now()),
        )
        log_path = files / "log"
        descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._undo.callback(os.close, descriptor)
        log = Logs(config.logging, descriptor)
        self._undo.callback(log.close)
        gateway = Gateway(parts, lambda: loaded[-1], log)
        return Node(name, gateway, parts, theirs, log_path, files, loaded)

    def pair(self) -> tuple[Node, Node]:
        """Two nodes of which a knows where b is. Both write to both logs, being one process."""
        b = self.node("b")
        a = self.node(
            "a", static_host_map={OVERLAY["b"]: (HostPort(host="127.0.0.1", port=b.parts.udp.local.port),)}
        )
        return a, b


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as undo:
        yield Site(tmp_path, undo)


def play(story: Callable[[], Awaitable[None]], *nodes: Node) -> list[int]:
    """Run the gateways while `story` goes on, stop them, and give their exit codes."""

    async def main() -> int:
        tasks = [asyncio.ensure_future(node.gateway.run()) for node in nodes]
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(20):
                await story()
        finally:
            for node in nodes:
                node.gateway._stop()
            codes.extend(await asyncio.gather(*tasks))
        return 0

    codes: list[int] = []
    run(main)
    return codes


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - many kinds of events
            await asyncio.sleep(0.01)


def packet(source: str, destination: str, payload: bytes) -> bytes:
    here, there = OVERLAY[source], OVERLAY[destination]
    return packets.ip(here, there, 17, packets.udp(here, there, 1000, 2000, payload))


# ---- packets ----


def test_packets_pass_from_one_local_stack_to_the_other_and_back(site: Site) -> None:
    a, b = site.pair()
    there, back = packet("a", "b", b"there"), packet("b", "a", b"back")
    received = []

    async def story() -> None:
        a.stack.send(there)
        received.append(await b.receive())
        b.stack.send(back)
        received.append(await a.receive())

    assert play(story, a, b) == [0, 0]
    assert received == [there, back]


def test_more_packets_than_one_batch_pass_in_order(site: Site) -> None:
    a, b = site.pair()
    sent = [packet("a", "b", number.to_bytes(2, "big")) for number in range(200)]
    received = []

    async def story() -> None:
        a.stack.send(sent[0])
        received.append(await b.receive())
        for each in sent[1:]:
            await asyncio.get_running_loop().sock_sendall(a.stack, each)
        received.extend([await b.receive() for _ in sent[1:]])

    play(story, a, b)

    assert received == sent


def test_a_goodbye_reaches_the_peer(site: Site) -> None:
    a, b = site.pair()

    async def story() -> None:
        a.stack.send(packet("a", "b", b"x"))
        await b.receive()
        assert len((await b.call("status"))["hosts"]) == 1
        await a.call("stop")
        await until(lambda: b.gateway._controller.hosts() == [])

    assert play(story, a, b) == [0, 0]
    assert b.events("Goodbye")


def test_an_unanswered_handshake_is_sent_again_by_the_timer(site: Site) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        port = silent.getsockname()[1]
        a = site.node("a", static_host_map={OVERLAY["b"]: (HostPort(host="127.0.0.1", port=port),)})
        attempts = []

        async def story() -> None:
            a.stack.send(packet("a", "b", b"x"))
            loop = asyncio.get_running_loop()
            attempts.extend([await loop.sock_recv(silent, 9000) for _ in range(3)])

        play(story, a)

    assert len(set(attempts)) == 1
    assert len(attempts) == 3


def test_faults_of_sending_are_counted_each_and_written_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = site.node("a")
    monkeypatch.setattr(a.parts.udp, "send", lambda *_: SendFault.UNREACHABLE)
    to = UdpAddr(ip_address("192.0.2.1"), 1)

    async def story() -> None:
        for _ in range(5):
            a.gateway._perform([SendDatagram(b"x", to)])
        stats = (await a.call("status"))["stats"]
        assert stats["mp.udp.drop.unreachable"] == 5

    assert play(story, a) == [0]
    assert [event["count"] for event in a.events("peer address unreachable")] == [1]


def test_a_stack_that_takes_nothing_costs_packets_and_nothing_else(site: Site) -> None:
    a = site.node("a")

    async def story() -> None:
        while not a.gateway._stats["mp.tun.drop.again"]:
            a.gateway._perform([WriteTun(bytes(60_000))])

    assert play(story, a) == [0]


# ---- ends ----


def test_our_own_fault_is_logged_with_its_place_and_ends_with_5_after_the_goodbye(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = site.pair()

    async def story() -> None:
        a.stack.send(packet("a", "b", b"x"))
        await b.receive()

        def fail(*_: object) -> None:
            raise ZeroDivisionError("a fault")

        monkeypatch.setattr(a.gateway._controller, "handle_tun_packet", fail)
        a.stack.send(packet("a", "b", b"x"))
        await until(lambda: b.gateway._controller.hosts() == [])

    # One loop has one handler for what goes wrong; that of a, which started last.
    assert play(story, b, a) == [0, EXIT_LOST]
    (event,) = b.events("unexpected error, shutting down")
    assert event["error"] == "ZeroDivisionError: a fault"
    assert "_on_tun" in str(event["stack"])


def test_a_fault_in_the_goodbye_still_closes_everything(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    a = site.node("a")

    async def story() -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(a.gateway._controller, "handle_stop", fail)

    assert play(story, a) == [EXIT_LOST]
    assert (a.parts.tun.fileno(), a.parts.udp.fileno()) == (-1, -1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order(number: signal.Signals, site: Site) -> None:
    a = site.node("a")

    async def story() -> None:
        await until(lambda: a.events("Nebula interface is active"))
        os.kill(os.getpid(), number)
        await until(lambda: a.gateway._stopping)

    assert play(story, a) == [0]
    assert a.events("Caught signal, shutting down")[0]["signal"] == number.name


def test_the_second_signal_ends_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    a = site.node("a")
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)

    async def story() -> None:
        a.gateway._on_stop_signal(signal.SIGTERM)
        a.gateway._on_stop_signal(signal.SIGTERM)

    play(story, a)

    assert ended == [0]
    assert not a.parts.instance.socket_path.exists()


def test_the_service_manager_hears_of_start_reload_and_stop(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        a = site.node("a")

        async def story() -> None:
            await a.call("reload")

        play(story, a)
        heard = [manager.recv(1000).decode().partition("\n")[0] for _ in range(4)]

    assert heard == ["READY=1", "RELOADING=1", "READY=1", "STOPPING=1"]


# ---- status ----


def test_status_tells_who_we_are_and_whom_we_talk_to(site: Site) -> None:
    a, b = site.pair()
    answers = []

    async def story() -> None:
        a.stack.send(packet("a", "b", b"x"))
        await b.receive()
        answers.append(await a.call("status"))

    play(story, a, b)

    (status,) = answers
    (host,) = status.pop("hosts")
    assert status["device"] == "test-a"
    assert status["pid"] == os.getpid()
    assert status["networks"] == ["10.42.0.1/24"]
    assert status["listen"].startswith("127.0.0.1:")
    assert status["certificate"]["name"] == "a"
    assert (host["name"], host["addresses"], host["primary"]) == ("b", ["10.42.0.2"], True)
    assert host["remote"].startswith("127.0.0.1:")


# ---- reload ----


def test_a_renewed_certificate_is_taken_over_and_tunnels_stay(site: Site) -> None:
    a, b = site.pair()

    async def story() -> None:
        a.stack.send(packet("a", "b", b"x"))
        await b.receive()
        site.write_pki("a", groups=("new",), key_of=a.parts.pki.identity)
        await a.call("reload")
        status = await a.call("status")
        assert status["certificate"]["groups"] == ["new"]
        assert len(status["hosts"]) == 1

    assert play(story, a, b) == [0, 0]


def test_hangup_reloads_too(site: Site) -> None:
    a = site.node("a")

    async def story() -> None:
        await until(lambda: a.events("Nebula interface is active"))
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: a.events("config reloaded"))

    assert play(story, a) == [0]


def spoil_key(node: Node) -> None:
    (node.files / "host.key").write_text("not a key")


def spoil_networks(node: Node) -> None:
    identity = Pki.shared().identity("a", "10.42.0.99/24", key_of=node.parts.pki.identity)
    (node.files / "host.crt").write_text(encode_pem(identity.certificates[CertVersion.V2]))


def spoil_mark(node: Node) -> None:
    def refuse(config: ListenConfig) -> tuple[str, ...]:
        if config.so_mark:
            raise SystemCallError("listen.so_mark 7: refused (EPERM)", exit_code=4)
        return ()

    node.parts.udp.configure = refuse  # type: ignore[method-assign]
    config = replace(node.loaded[-1].config, listen=ListenConfig(host="127.0.0.1", so_mark=7))
    node.loaded.append(replace(node.loaded[-1], config=config))


def spoil_mtu(node: Node) -> None:
    config = replace(node.loaded[-1].config, tun=TunConfig(dev="test-a", mtu=1400))  # there is no such device
    node.loaded.append(replace(node.loaded[-1], config=config))


@pytest.mark.parametrize("spoil", [spoil_key, spoil_networks, spoil_mark, spoil_mtu])
def test_a_reload_that_fails_changes_nothing_and_says_why(spoil: Callable[[Node], None], site: Site) -> None:
    a, b = site.pair()
    config, pki = a.gateway._config, a.parts.pki

    async def story() -> None:
        a.stack.send(packet("a", "b", b"x"))
        await b.receive()
        spoil(a)
        with pytest.raises(InstanceError, match="reload failed"):
            await a.call("reload")
        assert a.gateway._config is config
        assert a.parts.pki is pki
        again = packet("a", "b", b"still there")
        a.stack.send(again)
        assert await b.receive() == again
        assert (await a.call("status"))["stats"]["mp.reload.failed"] == 1

    assert play(story, a, b) == [0, 0]
    assert len(b.events("reload failed, nothing was changed")) == 1


def test_a_broken_configuration_file_is_reported_and_the_old_one_stays(site: Site) -> None:
    a = site.node("a")

    def broken() -> LoadedConfig:
        raise ConfigError("config.yml:3:3: listen.prot: unknown key")

    a.gateway._load = broken

    async def story() -> None:
        with pytest.raises(InstanceError, match=r"config\.yml:3:3: listen\.prot"):
            await a.call("reload")

    assert play(story, a) == [0]


def test_changes_that_need_a_restart_are_named(site: Site) -> None:
    a = site.node("a")
    changed = replace(a.loaded[0].config, listen=ListenConfig(host="127.0.0.1", port=1))
    a.loaded.append(LoadedConfig(changed, ("unknown key x",), a.loaded[0].sources))
    answers = []

    async def story() -> None:
        answers.append(await a.call("reload"))

    play(story, a)

    assert answers[0]["warnings"] == ["unknown key x", "changed, but needs a restart: listen.port"]
    assert a.gateway._config.listen.port == 0


def test_a_new_static_host_map_is_used_at_once(site: Site) -> None:
    b = site.node("b")
    a = site.node("a")
    entry = (HostPort(host="127.0.0.1", port=b.parts.udp.local.port),)
    changed = replace(a.loaded[0].config, static_host_map={OVERLAY["b"]: entry})

    async def story() -> None:
        a.loaded.append(replace(a.loaded[0], config=changed))
        await a.call("reload")
        a.stack.send(packet("a", "b", b"x"))
        assert await b.receive() == packet("a", "b", b"x")

    assert play(story, a, b) == [0, 0]


# ---- the device and the underlay ----


def test_a_lost_device_is_opened_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = site.pair()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    opened: list[TunConfig] = []

    def open_again(config: TunConfig) -> tuple[TunDevice, tuple[str, ...]]:
        opened.append(config)
        device = TunDevice(ours.detach(), "lo")  # a device that has an index
        return device, ()

    monkeypatch.setattr(TunDevice, "open", open_again)
    monkeypatch.setattr(netlink, "configure", lambda *_: None)

    async def story() -> None:
        a.stack.send(packet("a", "b", b"x"))
        await b.receive()
        monkeypatch.setattr(a.parts.tun, "write", _lose)
        a.gateway._perform([WriteTun(b"x")])
        await until(lambda: a.gateway._tun_open)
        again = packet("a", "b", b"after")
        theirs.send(again)
        assert await b.receive() == again
        a.gateway._tun.close()

    assert play(story, a, b) == [0, 0]
    theirs.close()
    assert [config.dev for config in opened] == ["test-a"]
    assert a.gateway._stats["mp.tun.reopen"] == 1
    assert len(b.events("tun device lost")) == 1


def _lose(_: bytes) -> None:
    raise TunLostError("test-a")


def test_a_device_that_cannot_be_opened_again_ends_the_gateway_with_5(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = site.node("a")

    def refuse(_: TunConfig) -> None:
        raise SystemCallError("tun 'test-a': the name is taken")

    monkeypatch.setattr(TunDevice, "open", refuse)
    monkeypatch.setattr(control, "_TUN_RETRY_S", 0.01)

    async def story() -> None:
        monkeypatch.setattr(a.parts.tun, "write", _lose)
        a.gateway._perform([WriteTun(b"x"), WriteTun(b"x")])
        await until(lambda: a.gateway._stopping)

    assert play(story, a) == [EXIT_LOST]
    assert a.gateway._stats["mp.tun.reopen"] == 3
    assert a.gateway._stats["mp.tun.drop.lost"] == 2
    assert len(a.events("tun device lost for good, shutting down")) == 1


def test_changes_of_the_underlay_reach_the_controller_once_they_settle(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = site.node("a")
    calls: list[Instant] = []
    news = [("+192.0.2.1",), ("-192.0.2.9",), ()]

    def handle(now: Instant) -> list[object]:
        calls.append(now)
        return []

    async def story() -> None:
        monkeypatch.setattr(a.parts.watcher, "poll_changed", lambda: news.pop(0))
        monkeypatch.setattr(a.gateway._controller, "handle_underlay_change", handle)
        for _ in range(3):
            a.gateway._on_netlink()
        await until(lambda: calls)
        await asyncio.sleep(0.15)

    play(story, a)

    assert len(calls) == 1
    assert [event["changes"] for event in a.events("underlay changed")] == [["+192.0.2.1"], ["-192.0.2.9"]]


def test_a_wall_clock_that_was_set_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    a = site.node("a")

    async def story() -> None:
        later = Instant(clock.monotonic(), (ANY_TIME + 3600) * 10**9)
        a.gateway._keep_house(later)

    play(story, a)

    assert [event["seconds"] for event in a.events("clock jumped")] == [pytest.approx(3600, abs=5)]
    assert a.gateway._stats["mp.clock.jumps"] == 1
