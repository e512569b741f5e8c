"""The course of a reload through the processes: checked, prepared, taken over by control, or all undone.

Data flow: SIGHUP | `nebula-mp reload` -> supervisor -> [workers.reloading] -> workers.checked, in a child
           -> workers.host -> control -> [workers.reloading] -> supervisor: commit, services | undo
Nothing here waits: the supervisor hands in what happened, one at a time. Knows the order of steps; knows
nothing of what a configuration means, beyond what workers.reload keeps.
Source: docs/architecture.md, "Start, reload, stop, crash".

| step     | waits for           | failure                                            |
|----------|---------------------|----------------------------------------------------|
| checking | the child's end     | error to who asked; nothing was touched            |
| asking   | control's answer    | sockets and device as before; error to who asked   |
| commit   | nothing             | none: control has switched, the rest are only told |

One at a time. Who asks meanwhile is answered by the next one, since the files may have changed since.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

from nebula_mp.config.model import LogLevel
from nebula_mp.errors import ConfigError, NebulaError
from nebula_mp.workers import logs
from nebula_mp.workers.checked import Check, Checked, Load, encode
from nebula_mp.workers.events import Events
from nebula_mp.workers.host import Host
from nebula_mp.workers.notify import READY, notify, notify_reloading
from nebula_mp.workers.reload import merge


class Hands(Protocol):
    """What a reload needs done by the supervisor."""

    def tell_control(self, kind: str, body: Mapping[str, object], *descriptors: int) -> bool:
        """Send to control; False when there is none, or it does not listen."""

    def committed(self, checked: Checked, *, has_new_networks: bool) -> None:
        """From now on `checked` is in force, and the one before is not."""

    def answer(self, request: int, result: Mapping[str, object] | None, error: str | None) -> None:
        """Tell services what became of a command."""


class _Asking:
    """A reload that control has been asked to take over."""

    def __init__(self, number: int, checked: Checked, warnings: tuple[str, ...], undo: ExitStack) -> None:
        self.number = number
        self.checked = checked
        self.warnings = warnings
        self.undo = undo


class Reloading:
    """`request` at any time; the `handle_*` when the thing happened; `close` at the end."""

    def __init__(self, host: Host, events: Events, load: Load, hands: Hands, running: Checked) -> None:
        """`running` and its key belong to this object until another one is committed, or `close`."""
        self.running = running
        self._host = host
        self._events = events
        self._load = load
        self._hands = hands
        self._number = 0
        self._waiting: list[int | None] = []
        self._served: list[int | None] = []  # those whom the reload under way will answer
        self._check: Check | None = None
        self._asking: _Asking | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a reload has begun and not ended."""
        return self._check is not None or self._asking is not None

    def request(self, command: int | None) -> None:
        """Reload for the command of this number; None for a signal, which nobody waits for."""
        if command is not None or None not in self._waiting:
            self._waiting.append(command)
        self._begin_next()

    def _begin_next(self) -> None:
        if self.is_under_way or not self._waiting:
            return
        self._served, self._waiting = self._waiting, []
        self._number += 1
        notify_reloading()
        try:
            self._check = Check.begin(self._load, replaces=self.running)
        except NebulaError as error:
            self._failed(error)
            return
        self._events.watch(self._check.fileno(), self._handle_checked)

    def _handle_checked(self) -> None:
        """Handle the end of the child that checked."""
        check, self._check = self._check, None
        if check is None:
            return
        self._events.unwatch(check.fileno())
        try:
            self._ask(check.finish())
        except NebulaError as error:
            self._failed(error)

    def _ask(self, new: Checked) -> None:
        """Prepare everything, and have control switch. Raises NebulaError, with everything as it was."""
        with ExitStack() as undo:
            undo.callback(os.close, new.key)
            config, kept = merge(self.running.config, new.config)
            warnings = [*new.warnings]
            if kept:
                warnings.append(f"changed, but needs a restart: {', '.join(kept)}")
            warnings += self._host.prepare(config, new.networks, undo)
            checked = replace(new, config=config)
            body = {"id": self._number, "checked": encode(checked)}
            if not self._hands.tell_control("reload", body, new.key):
                raise NebulaError("control is not running at the moment: try again")
            self._asking = _Asking(self._number, checked, tuple(warnings), undo.pop_all())

    def handle_reloaded(self, body: Mapping[str, Any]) -> None:
        """Handle control's answer."""
        asking = self._asking
        if asking is None or body.get("id") != asking.number:
            return  # of one that was given up
        self._asking = None
        error = body.get("error")
        if error is not None:
            asking.undo.close()
            self._failed(NebulaError(str(error)))
            return
        asking.undo.pop_all()
        warnings = (*asking.warnings, *map(str, body.get("warnings", ())))
        self._commit(asking.checked, tuple(dict.fromkeys(warnings)))  # control judges the same certificates

    def handle_control_ended(self) -> None:
        """Handle control's death: if it was to switch, nobody knows whether it did; its successor did not."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.undo.close()
            logs.write(LogLevel.WARN, "reload abandoned", {"error": "control ended before it answered"})
            self._failed(NebulaError("reload abandoned: control ended before it answered; try again"))

    def _commit(self, checked: Checked, warnings: tuple[str, ...]) -> None:
        old, self.running = self.running, checked
        os.close(old.key)
        self._hands.committed(checked, has_new_networks=old.networks != checked.networks)
        for warning in warnings:
            logs.write(LogLevel.WARN, warning)
        logs.write(LogLevel.INFO, "config reloaded", {"sources": checked.sources})
        self._finish({"device": self._host.device, "warnings": list(warnings)}, None)

    def _failed(self, error: NebulaError) -> None:
        if isinstance(error, ConfigError):
            for warning in error.warnings:  # one of them may be the cause, such as an unknown key
                logs.write(LogLevel.WARN, warning)
        logs.write(LogLevel.ERROR, "reload failed, nothing was changed", {"error": error})
        self._finish(None, str(error))

    def _finish(self, result: Mapping[str, object] | None, error: str | None) -> None:
        notify(READY)
        served, self._served = self._served, []
        for command in served:
            if command is not None:
                self._hands.answer(command, result, error)
        self._begin_next()

    def close(self) -> None:
        """Give up what is under way, without an answer, and close the key; may be called again."""
        if self._check is not None:
            self._events.unwatch(self._check.fileno())
            self._check.close()
            self._check = None
        if self._asking is not None:
            self._asking.undo.close()
            self._asking = None
        if self.running.key >= 0:
            os.close(self.running.key)
            self.running = replace(self.running, key=-1)
