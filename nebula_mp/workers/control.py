"""The control process: one TUN queue, one UDP socket and timers around control.controller.

Data flow: UDP socket | TUN | timer | signal | control socket -> [workers.control] -> Controller
           Controller's actions -> [workers.control] -> UDP socket | TUN | log
It waits, reads a batch, calls the controller and performs what that returns; what a packet means, and
what happens next, is decided there. docs/architecture.md says what happens when something fails.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from socket import socket
from typing import Any

import setproctitle

import nebula_mp
from nebula_mp import clock, netlink
from nebula_mp.config.load import LoadedConfig
from nebula_mp.config.model import Config, LogLevel
from nebula_mp.control.actions import Action, LogEvent, SendDatagram, WriteTun
from nebula_mp.control.controller import Controller, HostStatus
from nebula_mp.errors import NebulaError, SystemCallError
from nebula_mp.ioctl_tun import TunDevice, TunLostError, WriteFault, check_name, require_net_admin
from nebula_mp.newtypes import Instant, Seconds, UdpAddr
from nebula_mp.udp_socket import SendFault, UdpSocket
from nebula_mp.workers import logs
from nebula_mp.workers.expiry import ExpiryWatch
from nebula_mp.workers.instance import Instance, instance_name
from nebula_mp.workers.local_api import LocalApi
from nebula_mp.workers.loop import BATCH, Alarm, run
from nebula_mp.workers.notify import READY, STOPPING, notify, notify_reloading
from nebula_mp.workers.pki import Pki, load_pki
from nebula_mp.workers.reload import merge
from nebula_mp.workers.resolver import Remotes, Resolver
from nebula_mp.workers.threads import in_thread

EXIT_LOST = 5
_HOUSEKEEPING = Seconds(1)
_MINUTE = Seconds(60)
_UNDERLAY_SETTLE_S = 0.1  # an address move is two messages, a link coming up is many
_TUN_REOPENS_MAX = 3  # per minute
_TUN_RETRY_S = 0.2

LoadConfig = Callable[[], LoadedConfig]


@dataclass(slots=True)
class Parts:
    """What `prepare` opened, in the order it was opened; each has one owner, the gateway."""

    config: Config
    sources: tuple[str, ...]
    pki: Pki
    instance: Instance
    listener: socket
    tun: TunDevice
    udp: UdpSocket
    watcher: netlink.AddressWatcher
    controller: Controller


def serve(loaded: LoadedConfig, load: LoadConfig, log: logs.Logs) -> int:
    """Start a gateway and run it until it is asked to stop; the exit code.

    `load` reads the configuration again for a reload. Raises NebulaError when it cannot start; what was
    done on the way is undone then.
    """
    with ExitStack() as undo:
        parts = prepare(loaded, undo)
        setproctitle.setproctitle(f"nebula-mp: control {parts.tun.name}")
        return run(lambda: Gateway(parts, load, log).run())


def prepare(loaded: LoadedConfig, undo: ExitStack) -> Parts:
    """Open all that a gateway needs. On an error `undo` closes what was opened before it."""
    config = loaded.config
    pki = load_pki(config.pki, clock.wall_s())
    for warning in (*loaded.warnings, *pki.warnings):
        logs.write(LogLevel.WARN, warning)

    check_name(config.tun.dev)
    require_net_admin(config.tun.dev)
    name = instance_name(config)
    instance = _claim(config, name, undo) if name is not None else None
    tun, tun_warnings = TunDevice.open(config.tun)
    undo.callback(tun.close)
    if instance is None:
        instance = _claim(config, tun.name, undo)
    udp = UdpSocket.open(config.listen)
    undo.callback(udp.close)
    udp_warnings = udp.configure(config.listen)
    netlink.configure(tun.name, pki.identity.networks, config.tun.mtu)
    watcher = netlink.AddressWatcher(tun.index)
    undo.callback(watcher.close)
    listener = instance.listen()
    undo.callback(listener.close)
    for warning in (*tun_warnings, *udp_warnings):
        logs.write(LogLevel.WARN, warning)
    controller = Controller(config, pki.identity, pki.pool, clock.entropy, clock.now())
    return Parts(
        config=config,
        sources=tuple(map(str, loaded.sources)),
        pki=pki,
        instance=instance,
        listener=listener,
        tun=tun,
        udp=udp,
        watcher=watcher,
        controller=controller,
    )


def _claim(config: Config, name: str, undo: ExitStack) -> Instance:
    instance = Instance.claim(config.mp.run_dir, name)
    undo.callback(instance.release)
    return instance


class Gateway:
    """Runs a prepared gateway inside an event loop: `run` returns the exit code."""

    def __init__(self, parts: Parts, load: LoadConfig, log: logs.Logs) -> None:
        self._parts = parts
        self._controller = parts.controller
        self._udp = parts.udp
        self._tun = parts.tun
        self._config = parts.config
        self._load = load
        self._log = log
        self._stats: Counter[str] = Counter()
        self._limit = logs.RateLimit(_MINUTE)
        self._started = clock.monotonic()
        self._housekept = self._started
        self._jumps = clock.JumpWatch(clock.now())
        self._expiry = self._expiry_watches()
        self._kernel_drops = 0
        self._tun_lost_at: list[Seconds] = []
        self._tun_open = True
        self._stopping = False
        self._exit_code = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._reloading = asyncio.Lock()
        self._underlay_handle: asyncio.TimerHandle | None = None

    # ---- life ----

    async def run(self) -> int:
        """Serve until a signal, a command or a fault ends it; close the tunnels then."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._alarm = Alarm(self._on_alarm)
        self._resolver = self._new_resolver(self._config, {})
        self._api = LocalApi(
            {"status": self._answer_status, "reload": self._answer_reload, "stop": self._answer_stop}
        )
        self._loop.set_exception_handler(self._on_exception)
        try:
            await self._begin()
            await self._stopped.wait()
        finally:
            self._end()
        return self._exit_code

    async def _begin(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_stop_signal, number)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        await self._api.start(self._parts.listener)
        self._on_resolved(self._resolver.remotes())
        self._resolver.start()
        self._loop.add_reader(self._udp.fileno(), self._on_udp)
        self._loop.add_reader(self._tun.fileno(), self._on_tun)
        self._loop.add_reader(self._parts.watcher.fileno(), self._on_netlink)
        logs.write(LogLevel.INFO, "listening", {"addr": self._udp.local})
        logs.write(
            LogLevel.INFO,
            "Nebula interface is active",
            {
                "interface": self._tun.name,
                "networks": self._parts.pki.identity.networks,
                "build": nebula_mp.__version__,
                "udpAddr": self._udp.local,
                "kernel": "python",
            },
        )
        self._rearm()
        notify(READY, f"STATUS=device {self._tun.name}, listening on {self._udp.local}")

    def _end(self) -> None:
        """Say goodbye to the peers and let go of the loop; whoever prepared the parts closes them."""
        self._alarm.cancel()
        self._resolver.close()
        for task in self._tasks:
            task.cancel()
        if self._underlay_handle is not None:
            self._underlay_handle.cancel()
        for source in (self._udp, self._tun, self._parts.watcher):
            if source.fileno() >= 0:
                self._loop.remove_reader(source.fileno())
        try:
            self._perform(self._controller.handle_stop(clock.now()))
        except Exception:  # noqa: BLE001 - on the way out everything else must still be closed
            logs.LOGGER.exception("goodbye to the peers failed")
            self._exit_code = self._exit_code or EXIT_LOST
        logs.write(LogLevel.INFO, "Goodbye")
        # The tunnel device goes before the client of `stop` hears that it is done.
        self._tun.close()
        self._udp.close()
        self._api.close()

    def _stop(self, exit_code: int = 0) -> None:
        if not self._stopping:
            self._stopping = True
            self._exit_code = exit_code
            notify(STOPPING)
            self._stopped.set()

    def _on_stop_signal(self, number: int) -> None:
        if self._stopping:
            self._parts.instance.release()
            os._exit(0)  # the second one: at once, the kernel takes device and routes away
        logs.write(LogLevel.INFO, "Caught signal, shutting down", {"signal": signal.Signals(number).name})
        self._stop()

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:  # noqa: ARG002
        """End in order when our own code fails: the service manager starts a gateway in a known state."""
        error = context.get("exception")
        if not isinstance(error, BaseException):
            logs.write(LogLevel.WARN, "event loop", {"error": context.get("message", "")})
            return
        logs.LOGGER.error("unexpected error, shutting down", exc_info=error)
        self._stop(EXIT_LOST)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` beside the packets; what it raises ends the gateway."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_exception(self._loop, {"exception": error})

    # ---- packets and time ----

    def _on_udp(self) -> None:
        handle = self._controller.handle_datagram
        for datagram, source in self._udp.receive(BATCH):
            now = clock.now()
            self._perform(handle(datagram, source, now))
        self._rearm()

    def _on_tun(self) -> None:
        handle = self._controller.handle_tun_packet
        try:
            for packet in self._tun.read(BATCH):
                self._perform(handle(packet, clock.now()))
        except TunLostError as error:
            self._on_tun_lost(error)
        self._rearm()

    def _on_alarm(self) -> None:
        now = clock.now()
        due = self._controller.next_timeout()
        if due is not None and due <= now.mono:
            self._perform(self._controller.handle_timeout(now))
        if now.mono - self._housekept >= _HOUSEKEEPING:
            self._housekept = now.mono
            self._keep_house(now)
        self._rearm()

    def _rearm(self) -> None:
        if not self._stopping:
            self._alarm.arm(self._controller.next_timeout())

    def _perform(self, actions: Sequence[Action]) -> None:
        """Carry out what the controller decided, in its order."""
        for action in actions:
            match action:
                case SendDatagram(data, to):
                    fault = self._udp.send(data, to)
                    if fault is not None:
                        self._on_send_fault(fault, to)
                case WriteTun(packet):
                    self._write_tun(packet)
                case LogEvent():
                    logs.log(action)

    def _write_tun(self, packet: bytes) -> None:
        if not self._tun_open:
            self._stats["mp.tun.drop.lost"] += 1
            return
        try:
            fault = self._tun.write(packet)
        except TunLostError as error:
            self._stats["mp.tun.drop.lost"] += 1
            self._on_tun_lost(error)
            return
        if fault is not None:
            self._stats[fault] += 1
            if fault is not WriteFault.FULL:
                self._warn(LogLevel.WARN, "packet for the tun device dropped", fault, {"reason": fault})

    def _on_send_fault(self, fault: SendFault, to: UdpAddr) -> None:
        self._stats[fault] += 1
        match fault:
            case SendFault.UNREACHABLE:
                self._warn(LogLevel.INFO, "peer address unreachable", (fault, to), {"udpAddr": to})
            case SendFault.TOO_BIG:
                self._warn(LogLevel.INFO, "path mtu", (fault, to), {"udpAddr": to})
            case SendFault.REFUSED_LOCALLY:
                self._warn(LogLevel.WARN, "a local firewall refuses our datagrams", fault, {"udpAddr": to})
            case SendFault.OTHER:
                self._warn(LogLevel.WARN, "datagram not sent", fault, {"udpAddr": to})
            case SendFault.DROPPED:
                pass  # counted: the network is slower than we are

    def _warn(self, level: LogLevel, message: str, key: object, fields: Mapping[str, object]) -> None:
        """At most one line per minute and key, with the number of times it would have been written."""
        count = self._limit.try_pass(key, clock.monotonic())
        if count is not None:
            logs.write(level, message, {**fields, "count": count})

    def _keep_house(self, now: Instant) -> None:
        jump = self._jumps.poll(now)
        if jump is not None:
            self._stats["mp.clock.jumps"] += 1
            logs.write(LogLevel.WARN, "clock jumped", {"seconds": round(jump, 3)})
        for watch in self._expiry:
            notice = watch.poll(now.wall_s)
            if notice is not None:
                logs.log(notice)
        drops = self._udp.kernel_drops()
        if drops > self._kernel_drops:
            fields = {"drops": drops, "new": drops - self._kernel_drops}
            self._warn(LogLevel.WARN, "udp receive buffer overflowed", "udp.0.drops", fields)
            self._kernel_drops = drops

    def _expiry_watches(self) -> list[ExpiryWatch]:
        own = self._parts.pki.identity.certificates.values()
        return [ExpiryWatch(certificate.name, certificate.not_after) for certificate in own]

    # ---- the device went away ----

    def _on_tun_lost(self, error: TunLostError) -> None:
        if self._tun_open and not self._stopping:
            self._tun_open = False
            self._loop.remove_reader(self._tun.fileno())
            logs.write(LogLevel.ERROR, "tun device lost", {"dev": self._tun.name, "error": error})
            self._spawn(self._reopen_tun())

    async def _reopen_tun(self) -> None:
        """Open the device again, three times a minute at most; after that the gateway ends."""
        self._tun.close()
        while True:
            now = clock.monotonic()
            self._tun_lost_at = [at for at in self._tun_lost_at if now - at < _MINUTE]
            if len(self._tun_lost_at) >= _TUN_REOPENS_MAX:
                logs.write(LogLevel.ERROR, "tun device lost for good, shutting down", {"dev": self._tun.name})
                self._stop(EXIT_LOST)
                return
            self._tun_lost_at.append(now)
            self._stats["mp.tun.reopen"] += 1
            try:
                await self._open_tun_again()
            except SystemCallError as error:
                logs.write(LogLevel.WARN, "tun device not opened again", {"error": error})
                await asyncio.sleep(_TUN_RETRY_S)
            else:
                logs.write(LogLevel.INFO, "tun device opened again", {"dev": self._tun.name})
                return

    async def _open_tun_again(self) -> None:
        async with self._reloading:  # a reload may change what the device is opened with
            tun, _ = TunDevice.open(replace(self._config.tun, dev=self._tun.name))
            try:
                # In a thread: IPRoute does not work on the thread of a running loop.
                networks = self._parts.pki.identity.networks
                self._parts.watcher.set_own_index(tun.index)
                await in_thread(lambda: netlink.configure(tun.name, networks, self._config.tun.mtu))
            except BaseException:
                tun.close()
                raise
        self._tun = tun
        self._tun_open = True
        self._loop.add_reader(tun.fileno(), self._on_tun)

    # ---- the underlay changed ----

    def _on_netlink(self) -> None:
        changes = self._parts.watcher.poll_changed()
        if changes:
            self._stats["mp.underlay.changes"] += 1
            logs.write(LogLevel.INFO, "underlay changed", {"changes": changes})
            if self._underlay_handle is None:
                self._underlay_handle = self._loop.call_later(_UNDERLAY_SETTLE_S, self._on_underlay_settled)

    def _on_underlay_settled(self) -> None:
        self._underlay_handle = None
        self._perform(self._controller.handle_underlay_change(clock.now()))
        self._rearm()

    # ---- names ----

    def _new_resolver(self, config: Config, known: Mapping[str, Any]) -> Resolver:
        return Resolver(config.static_host_map, config.static_map, self._on_resolved, known)

    def _on_resolved(self, remotes: Remotes) -> None:
        self._perform(self._controller.handle_resolved(remotes, clock.now()))
        self._rearm()

    # ---- reload ----

    def _on_hangup(self) -> None:
        logs.write(LogLevel.INFO, "Caught HUP, reloading config")
        self._spawn(self._reload_and_log())

    async def _reload_and_log(self) -> None:
        with suppress(NebulaError):  # said where it happened
            await self._reload()

    async def _reload(self) -> tuple[str, ...]:
        """Take over a changed configuration and changed keys, or nothing. Returns warnings.

        Raises NebulaError, with everything as it was.
        """
        async with self._reloading:
            notify_reloading()
            try:
                return await self._reload_once()
            except NebulaError as error:
                self._stats["mp.reload.failed"] += 1
                logs.write(LogLevel.ERROR, "reload failed, nothing was changed", {"error": error})
                raise
            finally:
                notify(READY)

    async def _reload_once(self) -> tuple[str, ...]:
        def read() -> tuple[LoadedConfig, Pki]:
            loaded = self._load()
            return loaded, load_pki(loaded.config.pki, clock.wall_s())

        loaded, pki = await in_thread(read)
        pki.identity.check_replaces(self._parts.pki.identity)
        config, kept = merge(self._config, loaded.config)
        warnings = [*loaded.warnings, *pki.warnings]
        if kept:
            warnings.append(f"changed, but needs a restart: {', '.join(kept)}")
        with ExitStack() as undo:
            warnings += self._udp.configure(config.listen)
            undo.callback(self._udp.configure, self._config.listen)
            await self._configure_device(config, pki, undo)
            undo.pop_all()
        # From here on nothing fails and nothing waits: one switch.
        self._config, self._parts.pki, self._parts.config = config, pki, config
        self._expiry = self._expiry_watches()
        self._log.configure(config.logging)
        self._perform(self._controller.handle_reload(config, pki.identity, pki.pool, clock.now()))
        old, self._resolver = self._resolver, self._new_resolver(config, self._resolver.found)
        old.close()
        self._on_resolved(self._resolver.remotes())
        self._resolver.start()
        for warning in warnings:
            logs.write(LogLevel.WARN, warning)
        logs.write(LogLevel.INFO, "config reloaded", {"sources": loaded.sources})
        return tuple(warnings)

    async def _configure_device(self, config: Config, pki: Pki, undo: ExitStack) -> None:
        """Change addresses and MTU if they differ."""
        networks = pki.identity.networks
        old_networks, old_mtu = self._parts.pki.identity.networks, self._config.tun.mtu
        if (networks, config.tun.mtu) == (old_networks, old_mtu) or not self._tun_open:
            return
        if config.tun.mtu != old_mtu:
            self._tun.set_mtu(config.tun.mtu)
            undo.callback(self._tun.set_mtu, old_mtu)
        try:
            await in_thread(lambda: netlink.configure(self._tun.name, networks, config.tun.mtu))
        except SystemCallError:
            with suppress(SystemCallError):
                await in_thread(lambda: netlink.configure(self._tun.name, old_networks, old_mtu))
            raise

    # ---- the control socket ----

    async def _answer_stop(self) -> Mapping[str, object]:
        logs.write(LogLevel.INFO, "Asked to stop, shutting down")
        self._loop.call_soon(self._stop)
        return {"pid": os.getpid(), "device": self._tun.name}

    async def _answer_reload(self) -> Mapping[str, object]:
        return {"device": self._tun.name, "warnings": list(await self._reload())}

    async def _answer_status(self) -> Mapping[str, object]:
        parts = self._parts
        newest = parts.pki.identity.newest
        return {
            "version": nebula_mp.__version__,
            "pid": os.getpid(),
            "device": self._tun.name,
            "listen": str(self._udp.local),
            "kernel": "python",
            "mtu_bytes": self._config.tun.mtu,
            "uptime_s": int(clock.monotonic() - self._started),
            "sources": list(parts.sources),
            "networks": [str(network) for network in parts.pki.identity.networks],
            "certificate": {
                "name": newest.name,
                "groups": list(newest.groups),
                "fingerprint": newest.fingerprint,
                "not_after": newest.not_after,
                "expires_in_s": newest.not_after - clock.wall_s(),
            },
            "hosts": [_host(host) for host in self._controller.hosts()],
            "stats": self._all_stats(),
        }

    def _all_stats(self) -> dict[str, int]:
        own = {
            "mp.rx.drop.oversize": self._udp.oversize,
            "mp.rx.icmp": self._udp.icmp,
            "mp.tun.again": self._tun.again,
            "mp.log.lost": self._log.output.lost,
            "udp.0.drops": self._udp.kernel_drops(),
        }
        merged = Counter(self._controller.stats) + self._stats + Counter(own)
        return dict(sorted(merged.items()))


def _host(host: HostStatus) -> dict[str, object]:
    return {
        "name": host.name,
        "addresses": [str(address) for address in host.addresses],
        "groups": list(host.groups),
        "fingerprint": host.fingerprint,
        "remote": str(host.remote),
        "local_index": host.local_index,
        "remote_index": host.remote_index,
        "primary": host.primary,
        "initiator": host.initiator,
        "sent": host.sent,
        "received": host.received,
    }
