"""Is this tunnel still alive? The periodic check of one tunnel, as a decision without effects.

Data flow: control.hostmap.Tunnel -> [control.liveness] -> Decision -> control.controller
Knows nothing of certificates, addresses or timers.
Source: docs/wire-format.md, "Connection manager"; Nebula's connection manager.
"""

from dataclasses import dataclass
from enum import Enum, auto

from nebula_mp.config.model import TimersConfig, TunnelsConfig
from nebula_mp.control.plane import Passed
from nebula_mp.newtypes import Seconds


class Decision(Enum):
    """What to do about a tunnel at its check."""

    ALIVE = auto()  # traffic came in: check again after the alive interval
    IDLE = auto()  # primary, nothing went either way: leave it alone, check again later
    TEST = auto()  # primary, we sent and heard nothing: send a test, again until the deletion interval ends
    WAIT = auto()  # not primary and silent: delete it after the deletion interval
    INACTIVE = auto()  # idle for too long by the operator's word: say goodbye, delete
    DEAD = auto()  # the deletion interval passed in silence: delete


_TESTS = 4
"""Tests within one deletion interval: one of them may well be lost."""


@dataclass(slots=True)
class Traffic:
    """What one tunnel saw since its last check."""

    last_used: Seconds
    last_in: Seconds = Seconds(float("-inf"))  # when an authentic datagram came; the handshake's count
    saw_in: bool = False
    saw_out: bool = False
    received: int = 0  # what the data path had counted when it was last asked
    sent: int = 0
    delete_at: Seconds | None = None  # set while a deletion is pending

    def look(self, passed: Passed) -> None:
        """Take in what the data path counted since the last look."""
        if passed.received != self.received:
            self.received, self.saw_in = passed.received, True
        if passed.sent != self.sent:
            self.sent, self.saw_out = passed.sent, True
        self.last_in = max(self.last_in, passed.last_in)


def check(
    traffic: Traffic, *, primary: bool, now: Seconds, tunnels: TunnelsConfig, timers: TimersConfig
) -> tuple[Decision, Seconds]:
    """Decide, and start a new period: the flags are read and cleared. Gives when to check again, too.

    | came in | deletion pending | primary | went out | decision                              |
    |---------|------------------|---------|----------|---------------------------------------|
    | yes     | any              | any     | any      | ALIVE, no deletion pending            |
    | no      | its time came    | any     | any      | DEAD                                  |
    | no      | yes              | yes     | any      | TEST                                  |
    | no      | yes              | no      | any      | WAIT                                  |
    | no      | no               | yes     | no       | IDLE, or INACTIVE past the limit      |
    | no      | no               | yes     | yes      | TEST, deletion pending                |
    | no      | no               | no      | any      | WAIT, deletion pending                |
    """
    again = Seconds(now + timers.connection_alive_interval)
    came_in, went_out = traffic.saw_in, traffic.saw_out
    traffic.saw_in = traffic.saw_out = False
    if came_in or (went_out and traffic.delete_at is None):
        traffic.last_used = now
    if came_in:
        traffic.delete_at = None
        return Decision.ALIVE, again
    if traffic.delete_at is None:
        if primary and not went_out:
            if tunnels.drop_inactive and now - traffic.last_used >= tunnels.inactivity_timeout:
                return Decision.INACTIVE, again
            return Decision.IDLE, again
        traffic.delete_at = Seconds(now + timers.pending_deletion_interval)
    elif now >= traffic.delete_at:
        return Decision.DEAD, again
    if not primary:
        return Decision.WAIT, traffic.delete_at
    step = timers.pending_deletion_interval / _TESTS
    return Decision.TEST, min(traffic.delete_at, Seconds(now + step))
