"""The services process: control socket, name look-ups, writing of the log. It has no key and sees no packet.

Data flow: cli.client -> run_dir/<device>.sock -> [workers.services] <-> control: status | supervisor: others
           every process -> the log's pipe -> [workers.services] -> stdout
           getaddrinfo -> [workers.services] -> control: where the hosts of static_host_map are
What is asked it passes on, and passes the answers back; it knows what none of them means. Nothing here waits
for control or the supervisor, and both go on without it: lines of the log then wait in their pipe.
Source: docs/architecture.md, "Processes"; the messages are those of workers.control and the supervisor.
"""

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nebula_mp import clock
from nebula_mp.config.model import Config, LogLevel
from nebula_mp.errors import InstanceError
from nebula_mp.newtypes import IPAddress, Seconds
from nebula_mp.shm_stats import SLOTS, StatsPage
from nebula_mp.workers import checked, logs
from nebula_mp.workers.channel import Channel, Message
from nebula_mp.workers.local_api import LocalApi
from nebula_mp.workers.loop import end_on_error, run
from nebula_mp.workers.parts import ServicesParts
from nebula_mp.workers.resolver import Remotes, Resolver
from nebula_mp.workers.spawn import CRASHED

STATUS_WAIT_S = 2.0
_COMMAND_WAIT_S = 60.0  # longer than any client waits
_BEAT_S = 0.5
_LAST_LINES_S = 0.2  # for a stdout that is stuck when everything else has ended
_READ_BYTES = 64 * 1024
_PASSES = SLOTS["mp.passes"]
_START_TIME = 22  # of the fields in /proc/<pid>/stat, which proc(5) counts from 1

Answer = Mapping[str, Any]


def main(parts: ServicesParts) -> int:
    """Serve until the supervisor says stop; the exit code."""
    log = logs.Logs(parts.logging, parts.log)
    return run(lambda: Services(parts, log).run())


def preload() -> None:
    """Load now what a name look-up would load later, when this process may no longer read our files."""
    "name.example".encode("idna")


class Services:
    """`run` serves inside an event loop and returns the exit code."""

    def __init__(self, parts: ServicesParts, log: logs.Logs) -> None:
        self._parts = parts
        self._log = log
        self._page = StatsPage(parts.stats, writable=True)
        self._lines = LogPump(parts.log_source, parts.output)
        self._supervisor = Channel(parts.supervisor, "the supervisor")
        self._control = Channel(parts.control, "control")
        self._api = LocalApi(
            {
                "status": self._status,
                "reload": lambda: self._command("reload"),
                "stop": lambda: self._command("stop"),
                "workers": lambda: self._command("workers"),
            },
            parts.uids,
        )
        # No two starts have a number in common: an answer to a predecessor's question finds nobody.
        self._ids = itertools.count(parts.start << 32)
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._asked_control: set[int] = set()
        self._remotes_due = False
        self._exit_code = 0

    # ---- life ----

    async def run(self) -> int:
        """Serve; the exit code."""
        self._loop = asyncio.get_running_loop()
        end_on_error(self._loop, "services", lambda: self._stop(CRASHED))
        self._stopped = asyncio.Event()
        self._begun = _start_of(os.getppid())
        self._resolver = self._new_resolver(self._parts.checked.config, {})
        self._loop.add_reader(self._parts.log_source, self._on_lines)
        self._loop.add_reader(self._supervisor.fileno(), self._on_supervisor)
        self._loop.add_reader(self._control.fileno(), self._on_control)
        self._api.start(socket.socket(fileno=self._parts.listener))
        self._report(self._resolver.remotes())
        self._resolver.start()
        self._beat()
        self._supervisor.send("ready")
        await self._stopped.wait()
        await self._end()
        return self._exit_code

    async def _end(self) -> None:
        """Write what is left of the log, and hang up on the clients: they take that for the end."""
        self._resolver.close()
        self._loop.remove_reader(self._parts.log_source)
        until = clock.monotonic() + _LAST_LINES_S
        while self._lines.pump(clock.monotonic()) or self._lines.output.waiting:
            self._page.add(_PASSES)
            if self._lines.output.waiting and clock.monotonic() >= until:
                break
            await asyncio.sleep(0 if not self._lines.output.waiting else 0.01)
        self._api.close()
        await asyncio.sleep(0)  # the connections are closed by the loop

    def _stop(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._stopped.set()

    def _beat(self) -> None:
        """Show the supervisor that we are not stuck, and do again what there was no room for."""
        self._page.add(_PASSES)
        now = clock.monotonic()
        self._log.output.flush(now)
        self._say_lost(self._lines.output.flush(now))
        if self._remotes_due:
            self._report(self._resolver.remotes())
        self._loop.call_later(_BEAT_S, self._beat)

    # ---- the log ----

    def _on_lines(self) -> None:
        self._page.add(_PASSES)
        self._lines.pump(clock.monotonic())
        self._say_lost(self._lines.lost)
        self._lines.lost = 0

    def _say_lost(self, count: int) -> None:
        if count:
            logs.write(LogLevel.WARN, "log lines lost", {"count": count})

    # ---- names ----

    def _new_resolver(self, config: Config, known: Mapping[str, tuple[IPAddress, ...]]) -> Resolver:
        return Resolver(config.static_host_map, config.static_map, self._report, known)

    def _report(self, remotes: Remotes) -> None:
        body = {
            "remotes": {
                str(overlay): [str(address) for address in addresses]
                for overlay, addresses in remotes.items()
            }
        }
        self._remotes_due = not self._control.send("resolved", body)

    # ---- questions and answers ----

    async def _status(self) -> Answer:
        workers = self._loop.create_task(self._count_workers())
        try:
            status = {**await self._ask_control("status"), **await workers}
        finally:
            workers.cancel()
        stats = status.get("stats")
        if isinstance(stats, dict):
            status["stats"] = {**stats, "mp.log.lost": stats.get("mp.log.lost", 0) + self._lines.output.lost}
        return {
            **status,
            "pid": os.getppid(),
            "device": self._parts.device,
            "uptime_s": int(clock.monotonic() - self._begun),
        }

    async def _count_workers(self) -> Answer:
        """How many workers there are and how many of them run; nothing if the supervisor does not say."""
        try:
            answer = await self._command("workers", STATUS_WAIT_S)
        except InstanceError:
            return {}
        running: dict[int, bool] = {}
        for process in answer["processes"]:
            if process["worker"] is not None:
                both = running.get(process["worker"], True)
                running[process["worker"]] = both and process["state"] == "running"
        return {"workers": {"running": sum(running.values()), "configured": len(running)}}

    async def _ask_control(self, kind: str) -> Answer:
        number = next(self._ids)
        self._asked_control.add(number)
        try:
            refused = f"control does not answer within {STATUS_WAIT_S:g} s: it is being restarted; try again"
            return await self._ask(
                lambda: self._control.send(kind, {"id": number}), number, STATUS_WAIT_S, refused
            )
        finally:
            self._asked_control.discard(number)

    async def _command(self, name: str, wait_s: float = _COMMAND_WAIT_S) -> Answer:
        number = next(self._ids)
        refused = f"the supervisor does not answer within {wait_s:g} s"
        body = {"id": number, "name": name}
        return await self._ask(lambda: self._supervisor.send("command", body), number, wait_s, refused)

    async def _ask(self, send: Callable[[], bool], number: int, wait_s: float, refused: str) -> Answer:
        """Send a question and wait for the answer that has its number. Raises InstanceError."""
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._asked[number] = answer
        try:
            if not send():
                raise InstanceError(refused)
            async with asyncio.timeout(wait_s):
                return await answer
        except TimeoutError:
            raise InstanceError(refused) from None
        finally:
            del self._asked[number]

    def _on_answer(self, body: Mapping[str, Any]) -> None:
        answer = self._asked.get(body["id"])
        if answer is None or answer.done():
            return  # whoever asked waits no longer
        if body["error"] is not None:
            answer.set_exception(InstanceError(str(body["error"])))
        else:
            answer.set_result(body["result"] or {})

    # ---- what the others say ----

    def _on_control(self) -> None:
        self._page.add(_PASSES)
        for message in self._control.receive():
            if message.kind == "answer":
                self._on_answer(message.body)
            elif message.kind == "resolve":
                self._on_new_control()
            message.close()

    def _on_new_control(self) -> None:
        """It knows nothing yet, and what its predecessor was asked it was not."""
        self._report(self._resolver.remotes())
        for number in self._asked_control:
            self._control.send("status", {"id": number})

    def _on_supervisor(self) -> None:
        self._page.add(_PASSES)
        for message in self._supervisor.receive():
            if message.kind == "answer":
                self._on_answer(message.body)
            elif message.kind == "reload":
                self._on_reload(message)
            elif message.kind == "stop":
                self._stop(0)
            message.close()

    def _on_reload(self, message: Message) -> None:
        config = checked.decode(message.body["checked"]).config
        self._log.configure(config.logging)
        old, self._resolver = self._resolver, self._new_resolver(config, self._resolver.found)
        old.close()
        self._report(self._resolver.remotes())
        self._resolver.start()


class LogPump:
    """Lines of all processes, from their pipe to where the log goes; owns neither."""

    def __init__(self, source: int, output: int) -> None:
        self._source = source
        self._begun = b""  # of a line
        self.output = logs.Output(output)
        self.lost = 0  # lines, told by the output since somebody set this to 0

    def pump(self, now: Seconds) -> bool:
        """Move what waits, 64 KiB at most; False if nothing did. Never waits."""
        try:
            data = os.read(self._source, _READ_BYTES)
        except BlockingIOError:
            data = b""
        *lines, self._begun = (self._begun + data).split(b"\n")
        if len(self._begun) > self.output.line_bytes_max:  # nobody of ours writes that much in one line
            lines.append(self._begun)
            self._begun = b""
        for line in lines:
            self.lost += self.output.write(line + b"\n", now)
        if not data:
            self.lost += self.output.flush(now)
        return bool(data)


def _start_of(pid: int) -> Seconds:
    """When a process was started, on the clock of clock.monotonic; now, if the kernel does not tell us."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        ticks = int(fields[_START_TIME - 3])
    except OSError:
        return clock.monotonic()
    return Seconds(ticks / os.sysconf("SC_CLK_TCK"))


preload()
