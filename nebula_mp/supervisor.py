"""The process that starts, watches, restarts and stops all others, and owns what they share.

Data flow: Checked -> [supervisor] -> workers.host, workers.memory -> workers.spawn -> control, services,
           readers, writers; their deaths, messages and counters, signals, netlink -> [supervisor]
Knows who must be running, and the order in which things begin and end. Never maps a table, parses a packet or
sees a key; after the start it has the rights of `privileges.reduce_supervisor` and no others.
Source: docs/architecture.md, "Processes" and "What happens when something fails".

Everything happens on one thread, in callbacks of one loop (workers.events): a fork copies this process as it
is. What a child had in common with the others outlives it, so a successor goes on where it died:

| died             | first                                     | then                                        |
|------------------|-------------------------------------------|---------------------------------------------|
| reader, writer   | its leases are cleared, all bells rung    | forked again at once (workers.restarts)     |
| the same, code 4 | the other half is ended, rings emptied,   | both again; at the second time within 10 s  |
|                  | control told to attach to them            | rings between readers, too, and all readers |
| the same, code 3 | if the device is gone: all are ended, it  | all again                                   |
|                  | is opened anew, control told              |                                             |
| control          | what it said last is taken, a reload that | again; it rebuilds its tunnels from memory  |
|                  | it was to take over is undone             |                                             |
| services         | what waits for it is thrown away          | again; log lines wait in their pipe         |
| the supervisor   | the kernel kills all children             | whoever started it starts it anew           |
"""

import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

import setproctitle

import nebula_mp
from nebula_mp import clock, privileges
from nebula_mp.config.model import LogLevel
from nebula_mp.datapath import kernels
from nebula_mp.errors import NebulaError, SystemCallError
from nebula_mp.newtypes import Seconds
from nebula_mp.workers import logs
from nebula_mp.workers.channel import Channel, ChannelError, Message, discard
from nebula_mp.workers.checked import Checked, Load, encode
from nebula_mp.workers.events import Events, Signals
from nebula_mp.workers.host import Host
from nebula_mp.workers.memory import Memory
from nebula_mp.workers.notify import READY, STOPPING, notify
from nebula_mp.workers.parts import Role
from nebula_mp.workers.reloading import Reloading
from nebula_mp.workers.report import Slot, describe
from nebula_mp.workers.restarts import Again, GiveUp, Lost, Restarts
from nebula_mp.workers.roles import real_mains
from nebula_mp.workers.spawn import (
    DESCRIPTOR_LOST,
    FINISH,
    RING_CONTRADICTION,
    SIGNALS,
    Child,
    Ended,
    Main,
    spawn,
)
from nebula_mp.workers.upkeep import Upkeep
from nebula_mp.workers.watch import INTERVAL

EXIT_LOST: Final = 5
POISON: Final = "NEBULA_MP_POISON"
"""In the environment of a test: `1` has released areas of rings overwritten."""

_START_WITHIN: Final = Seconds(30)
_START_LOOK: Final = Seconds(0.005)
_GOODBYE_WITHIN: Final = Seconds(0.5)
_FINISH_WITHIN: Final = Seconds(0.3)
_END_WITHIN: Final = Seconds(0.1)
_FORK_RETRY: Final = Seconds(1)
_TUN_REOPENS_MAX: Final = 3  # per minute
_TUN_RETRY: Final = Seconds(0.2)
_MINUTE: Final = Seconds(60)
_RINGS_AGAIN: Final = Seconds(10)
_RINGS_SETTLE: Final = Seconds(1)


def serve(checked: Checked, load: Load, log: logs.Logs, *, mains: Mapping[Role, Main] | None = None) -> int:
    """Start a gateway and run it until it is asked to stop; the exit code.

    `checked` and its key belong to the gateway from here on. `load` reads the configuration again for a
    reload. `log` writes to stdout and is closed here: once there is a services process, it alone does that.
    `mains` are the roles; tests bring their own. To be called on the main thread, while there is no other.
    Raises NebulaError when it cannot start; what was done on the way is undone then.
    """
    with ExitStack() as undo:
        undo.callback(log.close)
        warnings = checked.warnings
        account = None
        user = checked.config.mp.user
        if os.geteuid() == 0:
            account = privileges.find_account(user)
        elif user is not None:
            warnings = (*warnings, "mp.user: has no effect, since this was not started as root")
        for warning in warnings:
            logs.write(LogLevel.WARN, warning)
        kernel = kernels.choose(kernels.wanted(checked.config.mp, os.environ))
        kernels.get(kernel.name)  # loaded here, so that no child has to
        host, refusals = Host.open(checked, undo)
        memory = Memory(host.workers, kernel=kernel.name, poison=os.environ.get(POISON) == "1")
        undo.callback(memory.close)
        for warning in (*refusals, *privileges.reduce_supervisor()):
            logs.write(LogLevel.WARN, warning)
        setproctitle.setproctitle(f"nebula-mp: supervisor {host.device}")
        signals = undo.enter_context(Signals(SIGNALS))
        log.close()
        piped = logs.Logs(checked.config.logging, memory.log_sink)
        undo.callback(memory.write_out_log)
        undo.callback(piped.close)
        supervisor = Supervisor(
            host,
            memory,
            checked,
            load,
            kernel=kernel,
            log=piped,
            mains=mains or real_mains(),
            account=account,
            signals=signals,
        )
        return supervisor.run()


class Supervisor:
    """`run` once: it starts all, keeps them running until something ends it, and ends all."""

    def __init__(
        self,
        host: Host,
        memory: Memory,
        checked: Checked,
        load: Load,
        *,
        kernel: kernels.Chosen,
        log: logs.Logs,
        mains: Mapping[Role, Main],
        account: privileges.Account | None,
        signals: Signals,
    ) -> None:
        self._host = host
        self._memory = memory
        self._kernel = kernel
        self._log = log
        self._mains = mains
        self._account = account
        self._signals = signals
        self._events = Events(clock.monotonic)
        self._restarts = Restarts()
        self._reloading = Reloading(host, self._events, load, self, checked)
        self._services = Slot(Role.SERVICES, 0, "services")
        self._control = Slot(Role.CONTROL, 0, "control")
        every = range(host.workers)
        self._writers = [Slot(Role.WRITER, each, f"writer/{each}") for each in every]
        self._readers = [Slot(Role.READER, each, f"reader/{each}") for each in every]
        self._slots = [self._services, self._control, *self._writers, *self._readers]
        self._to_control = Channel(memory.to_control, "control")
        self._to_services = Channel(memory.to_services, "services")
        self._upkeep = Upkeep(host, memory, self._events, self._on_underlay_changed)
        self._starts = 0
        self._ready: set[Role] = set()
        self._failure: str | None = None  # of the start
        self._is_up = False
        self._stopping = False
        self._control_stopped = False
        self._exit_code = 0
        self._tun_reopened: list[Seconds] = []
        self._rings_emptied: dict[int, Seconds] = {}

    # ---- life ----

    def run(self) -> int:
        """Start, run and end; the exit code. Raises NebulaError when it could not start, with all ended."""
        try:
            self._begin()
            self._events.run_until(lambda: self._stopping)
        except Exception as error:
            if not self._is_up and isinstance(error, NebulaError):
                raise
            # In order all the same: the service manager starts a gateway in a known state.
            logs.LOGGER.exception("unexpected error, shutting down")
            self._exit_code = EXIT_LOST
        finally:
            try:
                self._end()
            except Exception:  # noqa: BLE001 - said, and the way out goes on
                logs.LOGGER.exception("unexpected error while shutting down")
                self._exit_code = EXIT_LOST
        return self._exit_code

    def _begin(self) -> None:
        for descriptor, ready in (
            (self._signals.fileno(), self._on_signals),
            (self._memory.to_control, self._on_control),
            (self._memory.to_services, self._on_services),
            (self._host.watcher.fileno(), self._upkeep.handle_netlink),
        ):
            self._events.watch(descriptor, ready)
        for slot in self._slots:
            self._start(slot)
        self._on_start_tick()
        self._events.run_until(
            lambda: self._stopping or self._failure is not None or not self._late(), _START_WITHIN
        )
        if self._failure is not None:
            raise SystemCallError(self._failure)
        if self._stopping:
            return
        if late := self._late():
            raise SystemCallError(f"{late}: not ready after {_START_WITHIN:g} s: the log may say why")
        self._announce()
        self._events.after(INTERVAL, self._on_tick)

    def _late(self) -> str:
        """Who is not ready yet: control and services say so, a worker is with its first pass."""
        return ", ".join(
            slot.name
            for slot in self._slots
            if not (self._memory.passes(slot.name) if slot.is_worker else slot.role in self._ready)
        )

    def _on_start_tick(self) -> None:
        """Wake the loop: a first pass wakes nobody."""
        if not self._is_up:
            self._events.after(_START_LOOK, self._on_start_tick)

    def _announce(self) -> None:
        host, running = self._host, self._reloading.running
        self._is_up = True
        logs.write(LogLevel.INFO, "listening", {"addr": host.udp})
        logs.write(
            LogLevel.INFO,
            "Nebula interface is active",
            {
                "interface": host.device,
                "networks": running.networks,
                "build": nebula_mp.__version__,
                "udpAddr": host.udp,
                "kernel": self._kernel.name,
                "workers": host.workers,
                "drain": running.config.mp.drain,
            },
        )
        if self._kernel.reason is not None:
            level = LogLevel.WARN if self._kernel.is_fault else LogLevel.INFO
            logs.write(level, "accelerator not used", {"reason": self._kernel.reason})
        host.say_offloads()
        notify(READY, f"STATUS=device {host.device}, listening on {host.udp}")

    def _stop(self, exit_code: int = 0) -> None:
        if not self._stopping:
            self._stopping = True
            self._exit_code = exit_code

    def _end(self) -> None:
        """End all children: in order if they are up, at once if not; services last, with the log."""
        self._stopping = True
        try:
            if self._is_up:
                notify(STOPPING)
                self._end_in_order()
            self._end_now(self._control, *self._readers, *self._writers)
            self._reloading.close()
            if self._is_up:
                logs.write(LogLevel.INFO, "Goodbye")
            # The device goes before the client of `stop` hears that it is done.
            self._host.close_device()
            self._host.steering.close()
            if self._services.child is not None and self._to_services.send("stop"):
                self._events.run_until(lambda: self._services.child is None, _FINISH_WITHIN)
        finally:
            self._end_now(*self._slots)
            self._events.close()

    def _end_in_order(self) -> None:
        """Say goodbye to the peers; then first those who fill the rings end, and last those who drain."""
        if self._control.child is not None and self._to_control.send("stop"):
            self._events.run_until(
                lambda: self._control_stopped or self._control.child is None, _GOODBYE_WITHIN
            )
        for workers in (self._readers, self._writers):
            for slot in workers:
                if slot.child is not None:
                    slot.child.signal(FINISH)
            self._events.run_until(partial(_all_ended, workers), _FINISH_WITHIN)
            self._end_now(*workers)
        self._events.run_until(lambda: self._control.child is None, _END_WITHIN)

    def _end_at_once(self) -> None:
        """At the second signal: the kernel takes device and routes away."""
        for slot in self._slots:
            if slot.child is not None:
                slot.child.signal(signal.SIGKILL)
        self._host.instance.release()
        os._exit(0)

    # ---- processes ----

    def _start(self, slot: Slot) -> None:
        """Fork whoever belongs there, unless it runs or may not."""
        slot.starts_at = None
        if self._stopping or slot.given_up or slot.child is not None:
            return
        if slot.is_worker and not self._host.has_device:
            return  # all are started when it is there again
        self._starts += 1
        parts = self._memory.parts(slot.role, slot.number, self._starts, self._host, self._reloading.running)
        now = clock.monotonic()
        passes = self._memory.passes(slot.name)
        try:
            child = spawn(
                parts,
                self._mains[slot.role],
                account=self._account,
                cpu=self._cpu(slot),
                log=self._log,
                now=now,
            )
        except SystemCallError as error:
            if not self._is_up:
                raise
            logs.write(LogLevel.ERROR, "no new process", {"role": slot.name, "error": error})
            self._start_after(slot, _FORK_RETRY)
            return
        slot.child = child
        self._restarts.started(slot.name, now)
        self._upkeep.handle_start(child, passes)
        self._events.watch(child.fileno(), partial(self._on_end, slot, child))
        logs.write(LogLevel.INFO, "worker started", {"role": slot.name, "pid": child.pid})

    def _start_after(self, slot: Slot, pause: Seconds) -> None:
        if not pause:
            self._start(slot)
            return
        due = slot.starts_at = Seconds(clock.monotonic() + pause)
        self._events.after(pause, lambda: self._start(slot) if slot.starts_at == due else None)

    def _cpu(self, slot: Slot) -> int | None:
        """Reader and writer of a pair on different CPUs, where there are enough to choose from."""
        cpus = self._host.cpus
        if not slot.is_worker or len(cpus) <= 2:
            return None
        return cpus[(2 * slot.number + (slot.role is Role.WRITER)) % len(cpus)]

    def _on_end(self, slot: Slot, child: Child) -> None:
        if slot.child is not child:
            return
        ended_at = clock.monotonic()
        ended = self._bury(slot, child)
        if self._stopping:
            return
        if not self._is_up:
            how = " ".join(f"{key} {value}" for key, value in ended.fields().items())
            self._failure = f"{slot.name} ended ({how}) while the gateway was starting: the log may say why"
            return
        if slot.is_worker and ended.code == DESCRIPTOR_LOST and self._is_device_lost():
            return
        self._replace(slot, child, ended, ended_at)

    def _bury(self, slot: Slot, child: Child) -> Ended:
        """Wait for a process that is dead or dying, and put in order what it leaves behind."""
        ended = child.reap()
        self._events.unwatch(child.fileno())
        child.close()
        slot.child = None
        if slot is self._control:
            self._on_control()  # what it said last; if it was anything but sense, that ends here
            discard(self._memory.to_control)
            self._to_control = Channel(self._memory.to_control, "control")
            self._reloading.handle_control_ended()
        elif slot is self._services:
            discard(self._memory.to_services)
            self._to_services = Channel(self._memory.to_services, "services")
        self._memory.clear_dead(slot.role, slot.number, child.pid, child.start)
        return ended

    def _end_now(self, *slots: Slot) -> None:
        """End processes that nobody will miss; they are no deaths to `_restarts`."""
        for slot in slots:
            if slot.child is not None:
                slot.child.signal(signal.SIGKILL)
        for slot in slots:
            if slot.child is not None:
                self._bury(slot, slot.child)

    def _replace(self, slot: Slot, child: Child, ended: Ended, ended_at: Seconds) -> None:
        """Start a successor at once or later, give the worker up, or end everything."""
        slot.restarts += 1
        others = any(not other.given_up for other in self._readers if other.number != slot.number)
        decision = self._restarts.ended(
            slot.name,
            ended_at,
            can_be_spared=slot.is_worker and others,
            is_vital=slot is not self._services,
        )
        successors = [slot]
        if slot.is_worker and ended.code == RING_CONTRADICTION:
            successors = self._empty_rings(slot.number)
        pause = decision.pause if isinstance(decision, Again) else Seconds(0)
        if isinstance(decision, Again):
            for each in successors:
                self._start_after(each, pause)
        silence_ms = round((clock.monotonic() - ended_at + pause) * 1000, 1)
        fields = {"role": slot.name, "pid": child.pid, **ended.fields()}
        fields |= {"silenceMs": silence_ms, "restarts": slot.restarts}
        if slot is self._control:
            fields |= {"tunnelsKept": self._memory.tunnels()}
        kind = "worker" if slot.is_worker else slot.name
        logs.write(LogLevel.WARN, f"{kind} ended", fields)
        match decision:
            case GiveUp():
                for each in successors:
                    if each.number != slot.number:
                        self._start(each)
                self._give_up(slot.number)
            case Lost():
                logs.write(LogLevel.ERROR, "data path lost", {"role": slot.name})
                self._stop(EXIT_LOST)
            case Again(keeps_failing=True):
                fields = {"worker": slot.number} if slot.is_worker else {}
                logs.write(LogLevel.ERROR, f"{kind} keeps failing", {**fields, "role": slot.name})

    def _give_up(self, worker: int) -> None:
        """Let another worker have its share, for as long as this program runs."""
        self._end_now(self._readers[worker], self._writers[worker])
        self._readers[worker].given_up = self._writers[worker].given_up = True
        self._memory.tables.set_live(worker, live=False)
        owners = self._host.steering.owners
        to = min((slot.number for slot in self._readers if not slot.given_up), key=owners.count)
        new = [to if owner == worker else owner for owner in owners]
        self.tell_control("owners", {"owners": new})
        faults = self._host.hand_over(worker, to)
        logs.write(LogLevel.ERROR, "worker keeps failing", {"worker": worker, "takenOverBy": to})
        for fault in faults:
            logs.write(LogLevel.WARN, "share not handed over", {"worker": worker, "error": fault})

    def _empty_rings(self, worker: int) -> list[Slot]:
        """Empty the rings of a worker in which something contradicts itself. Gives who is to be started."""
        ended = [self._readers[worker], self._writers[worker]]
        self._end_now(*ended)
        self._memory.empty_rings(worker)
        now = clock.monotonic()
        if now - self._rings_emptied.get(worker, -_MINUTE) < _RINGS_AGAIN:
            # Then it was none of these: what is left are those that other readers fill for it.
            ended = [*self._readers, self._writers[worker]]
            self._end_now(*ended)
            self._memory.empty_stranger_rings()
        self._rings_emptied[worker] = now
        self.tell_control("upcalls", {"worker": worker})
        return ended

    def _on_bad_ring(self, worker: object) -> None:
        """Handle a contradiction that control found in a ring of upcalls."""
        if not isinstance(worker, int) or not 0 <= worker < self._host.workers:
            return
        if clock.monotonic() - self._rings_emptied.get(worker, -_MINUTE) < _RINGS_SETTLE:
            # It met the ring that was emptied before it knew, and its message crossed ours.
            self.tell_control("upcalls", {"worker": worker})
            return
        logs.write(LogLevel.WARN, "rings emptied", {"worker": worker})
        for slot in self._empty_rings(worker):
            self._start(slot)

    # ---- time ----

    def _on_tick(self) -> None:
        if self._stopping:
            return
        self._events.after(INTERVAL, self._on_tick)
        if self._host.has_device:
            self._is_device_lost()
        self._upkeep.look([slot.child for slot in self._slots if slot.child is not None])

    # ---- the device went away ----

    def _is_device_lost(self) -> bool:
        """Whether it is; then everything is under way to have it back."""
        if not self._host.has_device:
            return True
        error = self._host.device_error()
        if error is None:
            return False
        logs.write(LogLevel.ERROR, "tun device lost", {"dev": self._host.device, "error": error})
        self._end_now(*self._readers, *self._writers)
        self._host.close_device()
        self._reopen_device()
        return True

    def _reopen_device(self) -> None:
        """Open the device again, three times a minute at most; after that the gateway ends."""
        if self._stopping:
            return
        now = clock.monotonic()
        self._tun_reopened = [at for at in self._tun_reopened if now - at < _MINUTE]
        if len(self._tun_reopened) >= _TUN_REOPENS_MAX:
            fields = {"dev": self._host.device}
            logs.write(LogLevel.ERROR, "tun device lost for good, shutting down", fields)
            self._stop(EXIT_LOST)
            return
        self._tun_reopened.append(now)
        try:
            self._host.reopen_device()
        except SystemCallError as error:
            logs.write(LogLevel.WARN, "tun device not opened again", {"error": error})
            self._events.after(_TUN_RETRY, self._reopen_device)
            return
        logs.write(LogLevel.INFO, "tun device opened again", {"dev": self._host.device})
        self.tell_control("tuns", {}, *self._host.tuns)
        for slot in (*self._writers, *self._readers):
            self._start(slot)

    # ---- signals and messages ----

    def _on_underlay_changed(self) -> None:
        self.tell_control("underlay", {})

    def _on_signals(self) -> None:
        for number in self._signals.take():
            if number is not signal.SIGHUP:
                if self._stopping:
                    self._end_at_once()
                logs.write(LogLevel.INFO, "Caught signal, shutting down", {"signal": number.name})
                self._stop()
            elif self._is_up and not self._stopping:
                logs.write(LogLevel.INFO, "Caught HUP, reloading config")
                self._reloading.request(None)

    def _on_control(self) -> None:
        for message in self._receive(self._to_control, self._control):
            match message.kind:
                case "ready":
                    self._ready.add(Role.CONTROL)
                case "reloaded":
                    self._reloading.handle_reloaded(message.body)
                case "bad_ring" if not self._stopping:
                    self._on_bad_ring(message.body.get("worker"))
                case "stopped":
                    self._control_stopped = True

    def _on_services(self) -> None:
        for message in self._receive(self._to_services, self._services):
            match message.kind:
                case "ready":
                    self._ready.add(Role.SERVICES)
                case "command" if not self._stopping:
                    self._on_command(message.body.get("id"), message.body.get("name"))

    def _receive(self, channel: Channel, slot: Slot) -> list[Message]:
        try:
            messages = channel.receive()
        except ChannelError as error:
            logs.write(LogLevel.ERROR, "message not understood", {"role": slot.name, "error": error})
            discard(channel.fileno())
            if slot.child is not None:
                slot.child.signal(signal.SIGKILL)
            return []
        for message in messages:
            message.close()  # nobody sends us any
        return messages

    def _on_command(self, number: Any, name: object) -> None:
        if not isinstance(number, int):
            return
        match name:
            case "reload":
                self._reloading.request(number)
            case "stop":
                logs.write(LogLevel.INFO, "Asked to stop, shutting down")
                self.answer(number, {"pid": os.getpid(), "device": self._host.device}, None)
                self._stop()
            case "workers":
                processes = describe(self._slots, self._memory, clock.monotonic())
                self.answer(number, {"processes": processes, "kernel": self._kernel.name}, None)
            case _:
                self.answer(number, None, f"unknown command {name!r}")

    # ---- for workers.reloading ----

    def tell_control(self, kind: str, body: Mapping[str, object], *descriptors: int) -> bool:
        """As `reloading.Hands`. One that does not listen is ended: its successor knows how things are."""
        child = self._control.child
        if child is None:
            return False
        if self._to_control.send(kind, body, descriptors=descriptors):
            return True
        logs.write(LogLevel.WARN, "control does not listen", {"pid": child.pid, "message": kind})
        child.signal(signal.SIGKILL)
        return False

    def committed(self, checked: Checked, *, has_new_networks: bool) -> None:
        """As `reloading.Hands`."""
        self._log.configure(checked.config.logging)
        self._to_services.send("reload", {"checked": encode(checked)})
        if has_new_networks:  # readers know them; a new one is there within milliseconds
            self._end_now(*self._readers)
            for slot in self._readers:
                self._start(slot)

    def answer(self, request: int, result: Mapping[str, object] | None, error: str | None) -> None:
        """As `reloading.Hands`."""
        self._to_services.send("answer", {"id": request, "result": result, "error": error})


def _all_ended(slots: list[Slot]) -> bool:
    return all(slot.child is None for slot in slots)
