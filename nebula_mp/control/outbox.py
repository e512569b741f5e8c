"""Collects the actions of one call into the controller, and counts what happened.

Data flow: control.* -> [control.outbox] -> Controller's return value -> the shell
"""

from collections import Counter

from nebula_mp.config.model import LogLevel
from nebula_mp.control.actions import Action, HandOver, LogEvent, SendDatagram, WriteTun
from nebula_mp.newtypes import Instant, Seconds, TunnelIndex, UdpAddr

_LIMITED_REASONS_MAX = 64


class Outbox:
    """Actions in the order they are to be performed; `drain` hands them over and starts anew."""

    __slots__ = ("_actions", "_limited", "stats")

    def __init__(self) -> None:
        self.stats: Counter[str] = Counter()
        self._actions: list[Action] = []
        # reason -> when its line was last written, and how many were swallowed since
        self._limited: dict[str, tuple[Seconds, int]] = {}

    def drain(self) -> list[Action]:
        """Give the collected actions away."""
        actions = self._actions
        self._actions = []
        return actions

    def datagram(self, data: bytes, to: UdpAddr) -> None:
        """Send `data` to the underlay address `to`."""
        self._actions.append(SendDatagram(data, to))

    def tun(self, packet: bytes, queue: int) -> None:
        """Deliver an IP packet to the local stack through this queue of the device."""
        self._actions.append(WriteTun(packet, queue))

    def hand_over(self, local_index: TunnelIndex, datagram: bytes, source: UdpAddr) -> None:
        """Have a datagram of a tunnel that the data path knows opened there."""
        self._actions.append(HandOver(local_index, datagram, source))

    def log(self, level: LogLevel, message: str, **fields: object) -> None:
        """Write a record."""
        self._actions.append(LogEvent(level, message, fields))

    def drop(
        self,
        reason: str,
        source: UdpAddr | None,
        now: Instant,
        why: object = None,
        level: LogLevel = LogLevel.DEBUG,
    ) -> None:
        """Count a datagram under exactly one reason; one line per reason and second, with an example.

        Anybody can cause these lines: their number is bounded whatever comes in.
        """
        self.stats[f"drop.{reason}"] += 1
        written, swallowed = self._limited.get(reason, (Seconds(float("-inf")), 0))
        if now.mono - written < 1:
            self._limited[reason] = (written, swallowed + 1)
            return
        if len(self._limited) >= _LIMITED_REASONS_MAX and reason not in self._limited:
            return
        self._limited[reason] = (now.mono, 0)
        fields: dict[str, object] = {"reason": reason, "count": swallowed + 1}
        if source is not None:
            fields["from"] = source
        if why is not None:
            fields["error"] = str(why)
        self._actions.append(LogEvent(level, "Dropping packets", fields))
