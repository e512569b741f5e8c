"""When to speak about our own certificate's end.

Data flow: Identity, wall clock -> [workers.expiry] -> log
"""

from nebula_mp.config.model import LogLevel
from nebula_mp.control.actions import LogEvent

_DAY_S = 86400
_NOTICES_DAYS = (1, 7, 30)


class ExpiryWatch:
    """Call `poll` now and then: it speaks once at 30, 7 and 1 days before the end, and once at the end."""

    def __init__(self, name: str, not_after: int) -> None:
        self._name = name
        self._not_after = not_after
        self._said_days: int | None = None  # the shortest notice given so far; 0: the end

    def poll(self, wall_s: int) -> LogEvent | None:
        """Give what is to be said at unix time `wall_s`, or None."""
        left_s = self._not_after - wall_s
        fields = {"certName": self._name, "notAfter": self._not_after}
        due = 0 if left_s < 0 else next((days for days in _NOTICES_DAYS if left_s <= days * _DAY_S), None)
        if due is None or (self._said_days is not None and due >= self._said_days):
            return None
        self._said_days = due
        if due == 0:
            return LogEvent(LogLevel.ERROR, "own certificate expired", fields)
        return LogEvent(
            LogLevel.WARN, "own certificate expires soon", {**fields, "daysLeft": left_s // _DAY_S}
        )
