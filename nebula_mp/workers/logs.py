"""Log lines as Nebula writes them, text or JSON, to a stdout that may be stuck, full or gone.

Data flow: control.actions.LogEvent, logging calls -> [workers.logs] -> the log's pipe | stdout
           the log's pipe -> workers.services -> [workers.logs.Output] -> stdout
A write never blocks: it happens only when poll(2) promises room, in pieces a pipe takes whole. What
cannot be written waits in a bounded memory; what falls out of that is counted. The pipe that our processes
share is told by its being non-blocking: lines on it are never longer than such a piece, so that they do not
mix.
Source: Go's log/slog text and JSON handlers, which Nebula 1.11 uses; poll(2), pipe(7).
"""

import json
import logging
import os
import select
import stat
import traceback
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from nebula_mp import clock
from nebula_mp.config.model import LoggingConfig, LogLevel
from nebula_mp.control.actions import LogEvent
from nebula_mp.newtypes import Seconds

LOGGER = logging.getLogger("nebula_mp")
TRACE = 5
_NAMES = {TRACE: "DEBUG-4", logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN"}
LEVELS = {
    LogLevel.TRACE: TRACE,
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARN: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}
_PIECE_BYTES = 4096  # PIPE_BUF on Linux: a pipe that polls as writable takes this much without blocking
_LINE_BYTES_MAX = 64 * 1024
_BACKLOG_LINES = 1000
_RETRY = Seconds(10)
_CUT = "..."
_SHORT = 100  # characters: a text that is not cut any more


def log(event: LogEvent) -> None:
    """Write one record of the controller."""
    write(event.level, event.message, event.fields)


def write(level: LogLevel, message: str, fields: Mapping[str, object] | None = None) -> None:
    """Write one record; `fields` follow the message in their order."""
    LOGGER.log(LEVELS[level], "%s", message, extra={"fields": fields or {}})


class Output:
    """Lines to a descriptor that it never waits for; owns no descriptor.

    `write` returns at once. After an error (a full disk, a closed pipe) it tries again every 10 s.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.line_bytes_max = _PIECE_BYTES if _is_shared(descriptor) else _LINE_BYTES_MAX
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._backlog: deque[bytes] = deque()
        self._retry_at: Seconds | None = None
        self.lost = 0  # lines dropped since the start
        self._reported = 0

    def write(self, line: bytes, now: Seconds) -> int:
        """Write a line and what waited before it, as far as there is room.

        Returns how many lines were lost, once, when writing works again; otherwise 0.
        """
        if len(self._backlog) >= _BACKLOG_LINES:
            # The first line may be written in part already, so the second one goes.
            del self._backlog[1]
            self.lost += 1
        if len(line) > self.line_bytes_max:
            line = line[: self.line_bytes_max - 1] + b"\n"
        self._backlog.append(line)
        return self.flush(now)

    def flush(self, now: Seconds) -> int:
        """Write what waits, as far as there is room. Returns what `write` does."""
        if self._retry_at is not None and now < self._retry_at:
            return 0
        if not self._flush(now):
            return 0
        lost, self._reported = self.lost - self._reported, self.lost
        return lost

    @property
    def waiting(self) -> int:
        """How many lines could not be written yet."""
        return len(self._backlog)

    def _flush(self, now: Seconds) -> bool:
        """Write as much as there is room for; True when nothing waits any more."""
        self._retry_at = None
        while self._backlog:
            line = self._backlog[0]
            try:
                # POLLNVAL, POLLERR and POLLHUP are for write() to explain, which then does not block.
                if not self._poll.poll(0):
                    return False
                written = os.write(self._descriptor, line[:_PIECE_BYTES])
            except BlockingIOError:
                return False
            except OSError:
                self._retry_at = Seconds(now + _RETRY)
                return False
            if written < len(line):
                self._backlog[0] = line[written:]
            else:
                self._backlog.popleft()
        return True


def _is_shared(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode) and not os.get_blocking(descriptor)
    except OSError:  # closed: writing to it says so
        return False


class LogHandler(logging.Handler):
    """Formats records and gives them to an Output. Never raises into the program that logs."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output
        self._json = False
        self._timestamps = True

    def configure(self, config: LoggingConfig) -> None:
        """Use another format from the next record on."""
        self._json = config.format == "json"
        self._timestamps = not config.disable_timestamp

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; see Output."""
        try:
            lost = self.output.write(self._line(record), Seconds(record.created))
            if lost:
                notice = logging.LogRecord(record.name, logging.WARNING, "", 0, "log lines lost", None, None)
                notice.fields = {"count": lost}
                self.output.write(self._line(notice), Seconds(record.created))
        except Exception:  # noqa: BLE001 - a record that cannot be printed must not stop the gateway
            self.output.lost += 1

    def _line(self, record: logging.LogRecord) -> bytes:
        fields = dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = "".join(traceback.format_exception_only(record.exc_info[1])).strip()
            fields["stack"] = "".join(traceback.format_exception(*record.exc_info)).strip()
        level = _NAMES.get(record.levelno, "ERROR")
        when = datetime.fromtimestamp(record.created, UTC).astimezone() if self._timestamps else None
        encode = json_line if self._json else text_line
        while True:
            line = encode(when, level, record.getMessage(), fields).encode("utf-8", "replace") + b"\n"
            if not _try_shorten(fields, len(line) - self.output.line_bytes_max):
                return line


def _try_shorten(fields: dict[str, object], excess: int) -> bool:
    """Cut up to so many bytes off the front of the longest text; False if there is no need or no hope."""
    texts = {key: value for key, value in fields.items() if isinstance(value, str)}
    longest = max(texts, key=lambda key: len(texts[key]), default="")
    text = texts.get(longest, "")
    if excess <= 0 or len(text) <= _SHORT:
        return False
    # Never more than half at once: the next longest may have to give as well.
    fields[longest] = _CUT + text[min(excess + len(_CUT), len(text) // 2) :]  # the end of a stack says most
    return True


class Logs:
    """The installed logging: `configure` at a reload, `close` at the end."""

    def __init__(self, config: LoggingConfig, descriptor: int = 1) -> None:
        self.output = Output(descriptor)
        self._handler = LogHandler(self.output)
        # asyncio reports what goes wrong in callbacks; other libraries have nothing to say here.
        self._loggers = (LOGGER, logging.getLogger("asyncio"))
        for logger in self._loggers:
            logger.propagate = False
            logger.addHandler(self._handler)
        self.configure(config)

    def configure(self, config: LoggingConfig) -> None:
        """Use another level and format from the next record on."""
        self._handler.configure(config)
        LOGGER.setLevel(LEVELS[config.level])

    def close(self) -> None:
        """Take the handler out again."""
        for logger in self._loggers:
            logger.removeHandler(self._handler)
            logger.propagate = True


def text_line(when: datetime | None, level: str, message: str, fields: Mapping[str, object]) -> str:
    """`time=... level=INFO msg="..." key=value`, without the newline."""
    parts = [f"time={_rfc3339(when, 'milliseconds')}"] if when else []
    parts += (f"level={level}", f"msg={_quoted(message)}")
    parts += (f"{_quoted(key)}={_quoted(_text(value))}" for key, value in fields.items())
    return " ".join(parts)


def json_line(when: datetime | None, level: str, message: str, fields: Mapping[str, object]) -> str:
    """One JSON object, without the newline."""
    record: dict[str, object] = {"time": _rfc3339(when, "microseconds")} if when else {}
    record |= {"level": level, "msg": message}
    for key, value in fields.items():
        record.setdefault(key, _plain(value))
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def _rfc3339(when: datetime, precision: str) -> str:
    text = when.isoformat(timespec=precision)
    return text[:-6] + "Z" if text.endswith("+00:00") else text


def _quoted(text: str) -> str:
    """Quote where slog does: blanks, quotes, `=`, what cannot be printed, and the empty string."""
    if text and text.isprintable() and not any(sign in text for sign in ' "='):
        return text
    return json.dumps(text, ensure_ascii=False)


def _text(value: object) -> str:
    """Print a value as Go prints it in a text record."""
    match value:
        case None:
            return "<nil>"
        case bool():
            return "true" if value else "false"
        case timedelta():
            return go_duration(value)
        case bytes():
            return value.hex()
        case str():
            return str(value)
        case Mapping():
            return f"map[{' '.join(f'{key}:{_text(value[key])}' for key in sorted(value, key=str))}]"
        case list() | tuple() | set() | frozenset() if not hasattr(value, "_fields"):
            return f"[{' '.join(map(_text, _in_order(value)))}]"
        case _:
            return str(value)


def _plain(value: object) -> object:
    """Reduce a value to what JSON has."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if value == value and abs(value) != float("inf") else str(value)  # noqa: PLR0124 - NaN
        case timedelta():
            return value // timedelta(microseconds=1) * 1000
        case bytes():
            return value.hex()
        case str():
            return str(value)
        case Mapping():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case list() | tuple() | set() | frozenset() if not hasattr(value, "_fields"):
            return [_plain(entry) for entry in _in_order(value)]
        case _:
            return str(value)


def _in_order(values: Iterable[object]) -> Iterable[object]:
    return sorted(values, key=str) if isinstance(values, set | frozenset) else values


def go_duration(span: timedelta) -> str:
    """`1h2m3.5s`, `250ms`, `12µs`, `0s`: a span as Go prints it."""
    microseconds = abs(span) // timedelta(microseconds=1)
    sign = "-" if span < timedelta(0) else ""
    if microseconds == 0:
        return "0s"
    if microseconds < 1000:
        return f"{sign}{microseconds}µs"
    if microseconds < 1_000_000:
        return f"{sign}{_trimmed(microseconds, 1000)}ms"
    minutes, rest = divmod(microseconds, 60_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    text += f"{minutes}m" if hours or minutes else ""
    return f"{sign}{text}{_trimmed(rest, 1_000_000)}s"


def _trimmed(amount: int, unit: int) -> str:
    return f"{amount / unit:.6f}".rstrip("0").rstrip(".")


class RateLimit:
    """At most one line per key and interval; says how many were swallowed in between."""

    def __init__(self, interval: Seconds, keys_max: int = 1024) -> None:
        self._interval = interval
        self._keys_max = keys_max
        self._written: dict[object, tuple[Seconds, int]] = {}

    def write(self, level: LogLevel, message: str, key: object, fields: Mapping[str, object]) -> None:
        """Write a record, if one of this key may pass, and how many times it would have been written."""
        count = self.try_pass(key, clock.monotonic())
        if count is not None:
            write(level, message, {**fields, "count": count})

    def try_pass(self, key: object, now: Seconds) -> int | None:
        """None: be silent. Otherwise how many times it was to be said since the last line, 1 or more."""
        known = self._written.get(key)
        if known is None:
            if len(self._written) >= self._keys_max:
                self._written.clear()
            self._written[key] = (now, 0)
            return 1
        at, swallowed = known
        if now - at < self._interval:
            self._written[key] = (at, swallowed + 1)
            return None
        self._written[key] = (now, 0)
        return swallowed + 1
