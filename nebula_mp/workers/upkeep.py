"""What the supervisor keeps an eye on: stuck children, the underlay, readers' buffers, foreign queues.

Data flow: stats pages, netlink, sockets, /sys -> [workers.upkeep] -> log; SIGABRT -> stuck children
           the underlay has changed -> supervisor -> control
Looks and tells, and ends who is stuck; who comes after them is the supervisor's affair.
Source: docs/architecture.md, "What happens when something fails".
"""

import signal
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

from nebula_mp import clock
from nebula_mp.config.model import LogLevel
from nebula_mp.newtypes import Seconds
from nebula_mp.workers import logs
from nebula_mp.workers.events import Call, Events
from nebula_mp.workers.host import Host
from nebula_mp.workers.memory import Memory
from nebula_mp.workers.spawn import Child
from nebula_mp.workers.watch import Watch

_KILL_AFTER: Final = Seconds(0.1)  # SIGABRT, so that it says where it was
_SETTLE: Final = Seconds(0.1)  # an address move is two messages, a link coming up is many
_BUFFERS_EVERY: Final = Seconds(1)
_QUEUES_EVERY: Final = Seconds(10)
_MINUTE: Final = Seconds(60)


class Upkeep:
    """`handle_netlink` when the host's watcher is readable, `look` every `watch.INTERVAL`."""

    def __init__(self, host: Host, memory: Memory, events: Events, underlay_changed: Call) -> None:
        """`underlay_changed` is called when it has settled."""
        self._host = host
        self._memory = memory
        self._events = events
        self._underlay_changed = underlay_changed
        self._watch = Watch()
        self._is_settling = False
        self._limit = logs.RateLimit(_MINUTE)
        self._drops = 0
        self._buffers_at = self._queues_at = clock.monotonic()

    def handle_netlink(self) -> None:
        """Read the news, and wait until no more of them come."""
        changes = self._host.watcher.poll_changed()
        if not changes:
            return
        logs.write(LogLevel.INFO, "underlay changed", {"changes": changes})
        if not self._is_settling:
            self._is_settling = True
            self._events.after(_SETTLE, self._on_settled)

    def _on_settled(self) -> None:
        self._is_settling = False
        self._underlay_changed()

    def handle_start(self, child: Child, passes: int) -> None:
        """Note how many passes there were before it was started."""
        self._watch.handle_start(child.start, passes)

    def look(self, running: Iterable[Child]) -> None:
        """Look at those who are running, and at what else is due."""
        now = clock.monotonic()
        self._look_at_children({child.start: child for child in running}, now)
        if now - self._buffers_at >= _BUFFERS_EVERY:
            self._buffers_at = now
            self._look_at_buffers()
        if now - self._queues_at >= _QUEUES_EVERY:
            self._queues_at = now
            queues = self._host.foreign_queues()
            if queues > 0:
                message = "another process has queues of the tun device"
                self._limit.write(LogLevel.WARN, message, message, {"queues": queues})

    def _look_at_children(self, running: Mapping[int, Child], now: Seconds) -> None:
        passes = {start: self._memory.passes(child.name) for start, child in running.items()}
        for start in self._watch.look(now, passes):
            child = running[start]
            logs.write(LogLevel.WARN, "worker stuck", {"role": child.name, "pid": child.pid})
            child.signal(signal.SIGABRT)
            self._events.after(_KILL_AFTER, partial(child.signal, signal.SIGKILL))

    def _look_at_buffers(self) -> None:
        steering = self._host.steering
        if not steering.is_steered:
            return  # the one socket is control's as well, which looks after its own
        drops = sum(steering.reader(number).kernel_drops() for number in range(steering.readers))
        if drops > self._drops:
            new, self._drops = drops - self._drops, drops
            message = "udp receive buffer overflowed"
            self._limit.write(LogLevel.WARN, message, message, {"drops": drops, "new": new})
