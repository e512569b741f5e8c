"""Log lines: their shape, and a stdout that is stuck, full or gone."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta, timezone
from ipaddress import ip_address
from typing import Literal

import pytest

from nebula_mp.config.model import LoggingConfig, LogLevel
from nebula_mp.control.actions import LogEvent
from nebula_mp.newtypes import Seconds, UdpAddr
from nebula_mp.workers import logs
from nebula_mp.workers.logs import Logs, Output, RateLimit, go_duration, json_line, text_line

WHEN = datetime(2026, 11, 22, 21, 5, 3, 123456, tzinfo=UTC)
BERLIN = WHEN.astimezone(timezone(timedelta(hours=1)))

# One record in every shape a field can have. The lines are what Go's slog handlers print for the same
# record; times have microseconds here where Go has nanoseconds.
FIELDS: Mapping[str, object] = {
    "vpnAddrs": (ip_address("10.42.0.1"), ip_address("fd00::1")),
    "udpAddr": UdpAddr(ip_address("2001:db8::1"), 4242),
    "handshake": {"style": "ix_psk0", "stage": 1},
    "certName": 'a "quoted" name',
    "durationNs": 1_250_000,
    "took": timedelta(milliseconds=1.5),
    "ok": True,
    "nothing": None,
    "empty": "",
    "severity": LogLevel.WARN,
}


def test_a_text_line_looks_as_the_original_prints_it() -> None:
    assert text_line(WHEN, "INFO", "Handshake message sent", FIELDS) == (
        'time=2026-11-22T21:05:03.123Z level=INFO msg="Handshake message sent"'
        ' vpnAddrs="[10.42.0.1 fd00::1]" udpAddr=[2001:db8::1]:4242'
        ' handshake="map[stage:1 style:ix_psk0]" certName="a \\"quoted\\" name" durationNs=1250000'
        ' took=1.5ms ok=true nothing=<nil> empty="" severity=warn'
    )


def test_a_json_line_holds_the_same_record_with_its_types() -> None:
    line = json_line(WHEN, "INFO", "Handshake message sent", FIELDS)

    assert line.startswith('{"time":"2026-11-22T21:05:03.123456Z","level":"INFO","msg":"Handshake')
    assert json.loads(line) == {
        "time": "2026-11-22T21:05:03.123456Z",
        "msg": "Handshake message sent",
        "vpnAddrs": ["10.42.0.1", "fd00::1"],
        "udpAddr": "[2001:db8::1]:4242",
        "handshake": {"style": "ix_psk0", "stage": 1},
        "certName": 'a "quoted" name',
        "durationNs": 1_250_000,
        "took": 1_500_000,
        "ok": True,
        "nothing": None,
        "empty": "",
        "level": "INFO",
        "severity": "warn",
    }


def test_the_zone_is_stated_and_the_time_can_be_left_out() -> None:
    assert text_line(BERLIN, "WARN", "x", {}) == "time=2026-11-22T22:05:03.123+01:00 level=WARN msg=x"
    assert text_line(None, "WARN", "x", {}) == "level=WARN msg=x"
    assert json_line(None, "WARN", "x", {}) == '{"level":"WARN","msg":"x"}'


@pytest.mark.parametrize("evil", ["a\nlevel=ERROR msg=forged", "a\x1b[2J", "a\x00b", "a\u2028b"])
def test_a_name_from_a_peer_cannot_make_a_line_of_its_own_or_drive_a_terminal(evil: str) -> None:
    for line in (text_line(WHEN, "INFO", "x", {"certName": evil}), json_line(WHEN, "INFO", "x", {"a": evil})):
        assert "\n" not in line
        assert "\x1b" not in line
        assert "\x00" not in line


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (timedelta(0), "0s"),
        (timedelta(microseconds=7), "7µs"),
        (timedelta(milliseconds=250), "250ms"),
        (timedelta(microseconds=1500), "1.5ms"),
        (timedelta(seconds=1), "1s"),
        (timedelta(seconds=90), "1m30s"),
        (timedelta(hours=1), "1h0m0s"),
        (timedelta(hours=25, seconds=1.5), "25h0m1.5s"),
        (timedelta(milliseconds=-2), "-2ms"),
    ],
)
def test_durations_are_written_as_go_writes_them(span: timedelta, text: str) -> None:
    assert go_duration(span) == text


# ---- levels and formats that change while running ----


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def read(end: int) -> str:
    """All that is waiting in a pipe."""
    data = b""
    while True:
        try:
            piece = os.read(end, 65536)
        except BlockingIOError:
            return data.decode()
        if not piece:
            return data.decode()
        data += piece


@pytest.mark.parametrize(
    ("level", "printed"),
    [
        (LogLevel.TRACE, ["DEBUG-4", "DEBUG", "INFO", "WARN", "ERROR"]),
        (LogLevel.DEBUG, ["DEBUG", "INFO", "WARN", "ERROR"]),
        (LogLevel.INFO, ["INFO", "WARN", "ERROR"]),
        (LogLevel.WARN, ["WARN", "ERROR"]),
        (LogLevel.ERROR, ["ERROR"]),
    ],
)
def test_the_level_decides_what_is_written(
    level: LogLevel, printed: list[str], pipe: tuple[int, int]
) -> None:
    log = Logs(LoggingConfig(level=level, disable_timestamp=True), pipe[1])
    for each in LogLevel:
        logs.log(LogEvent(each, "x"))
    log.close()

    assert read(pipe[0]).splitlines() == [f"level={name} msg=x" for name in printed]


def test_level_and_format_switch_while_running(pipe: tuple[int, int]) -> None:
    log = Logs(LoggingConfig(disable_timestamp=True), pipe[1])
    logs.write(LogLevel.DEBUG, "unseen")
    logs.write(LogLevel.INFO, "text")
    log.configure(LoggingConfig(level=LogLevel.DEBUG, format="json", disable_timestamp=True))
    logs.write(LogLevel.DEBUG, "json", {"n": 1})
    log.close()

    assert read(pipe[0]).splitlines() == ["level=INFO msg=text", '{"level":"DEBUG","msg":"json","n":1}']


def test_an_exception_is_one_line_with_its_stack(pipe: tuple[int, int]) -> None:
    log = Logs(LoggingConfig(format="json"), pipe[1])
    try:
        int("what\nhappened")
    except ValueError:
        logs.LOGGER.exception("unexpected error")
    log.close()

    (line,) = read(pipe[0]).splitlines()
    assert json.loads(line)["error"].startswith("ValueError: invalid literal")
    assert "test_an_exception_is_one_line" in json.loads(line)["stack"]


def test_what_asyncio_has_to_say_goes_to_the_same_log(pipe: tuple[int, int]) -> None:
    log = Logs(LoggingConfig(disable_timestamp=True), pipe[1])
    logging.getLogger("asyncio").warning("slow %s", "callback")
    log.close()

    assert read(pipe[0]) == 'level=WARN msg="slow callback"\n'


def test_a_record_that_cannot_be_printed_is_counted_and_raises_nothing(pipe: tuple[int, int]) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("no")

    log = Logs(LoggingConfig(), pipe[1])
    logs.write(LogLevel.INFO, "x", {"field": Unprintable()})
    log.close()

    assert log.output.lost == 1
    assert read(pipe[0]) == ""


# ---- an output that cannot be written to ----


def test_a_stuck_pipe_never_blocks_and_gives_the_newest_lines_when_it_moves_again(
    pipe: tuple[int, int],
) -> None:
    output = Output(pipe[1])
    lines = [b"%05d" % number + b"x" * 100 + b"\n" for number in range(3000)]
    for line in lines:
        output.write(line, Seconds(0))
    written, reported = read(pipe[0]), []
    for line in (b"one\n", b"two\n", b"three\n"):
        reported.append(output.write(line, Seconds(0)))
        written += read(pipe[0])

    got = written.encode().splitlines(keepends=True)
    assert output.lost > 1000
    assert len(got) + output.lost == 3003
    assert got[-4:] == [lines[-1], b"one\n", b"two\n", b"three\n"]
    assert set(got) <= {*lines, *got[-3:]}, "no line is torn"
    assert sorted(reported) == [0, 0, output.lost], "told once"


def test_a_line_longer_than_a_pipe_takes_is_finished_later_in_order(pipe: tuple[int, int]) -> None:
    output = Output(pipe[1])
    long = b"a" * 60_000 + b"\n"
    for _ in range(3):
        output.write(long, Seconds(0))
    text = read(pipe[0])
    output.write(b"end\n", Seconds(0))
    text += read(pipe[0])
    output.write(b"", Seconds(0))
    text += read(pipe[0])

    assert text == (long * 3 + b"end\n").decode()


def test_lost_lines_are_told_when_writing_works_again(pipe: tuple[int, int]) -> None:
    log = Logs(LoggingConfig(disable_timestamp=True), pipe[1])
    for _ in range(3000):
        logs.write(LogLevel.INFO, "x" * 100)
    text = ""
    for _ in range(3):
        text += read(pipe[0])
        logs.write(LogLevel.INFO, "again")
    text += read(pipe[0])
    log.close()

    assert f'level=WARN msg="log lines lost" count={log.output.lost}\n' in text


def test_a_closed_pipe_is_tolerated_and_tried_again_only_after_ten_seconds(pipe: tuple[int, int]) -> None:
    output = Output(pipe[1])
    os.close(pipe[0])
    output.write(b"into the void\n", Seconds(100))
    read_end, write_end = os.pipe()
    os.dup2(write_end, pipe[1])  # as when a full disk has room again
    output.write(b"too early\n", Seconds(109))
    os.set_blocking(read_end, False)
    early = read(read_end)
    output.write(b"now\n", Seconds(110))
    late = read(read_end)
    os.close(read_end)
    os.close(write_end)

    assert early == ""
    assert late == "into the void\ntoo early\nnow\n"


def test_a_full_disk_keeps_the_last_thousand_lines() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    output = Output(full)
    for number in range(1500):
        output.write(b"%d\n" % number, Seconds(0))
    os.close(full)

    assert output.lost == 500
    assert list(output._backlog)[-1] == b"1499\n"


def test_what_waits_can_be_written_without_a_new_line(pipe: tuple[int, int]) -> None:
    output = Output(pipe[1])
    for _ in range(3000):
        output.write(b"x" * 99 + b"\n", Seconds(0))
    text, reported = "", []
    while output.waiting:
        text += read(pipe[0])
        reported.append(output.flush(Seconds(0)))
    text += read(pipe[0])

    assert len(text) == 100 * (3000 - output.lost)
    assert sum(reported) == output.lost > 0


# ---- the pipe that our processes share ----


@pytest.fixture
def shared(pipe: tuple[int, int]) -> tuple[int, int]:
    os.set_blocking(pipe[1], False)
    return pipe


def test_a_full_shared_pipe_loses_whole_lines_and_counts_them(shared: tuple[int, int]) -> None:
    log = Logs(LoggingConfig(disable_timestamp=True), shared[1])
    for number in range(5000):
        logs.write(LogLevel.INFO, "x" * 100, {"number": number})
    text = read(shared[0])
    for _ in range(5):
        logs.write(LogLevel.INFO, "again")
        text += read(shared[0])
    log.close()

    lines = text.splitlines()
    assert log.output.lost > 1000
    kept = [line for line in lines if line.startswith("level=INFO msg=" + "x" * 100 + " number=")]
    assert len(kept) == 5000 - log.output.lost
    assert set(lines) - set(kept) == {
        "level=INFO msg=again",
        f'level=WARN msg="log lines lost" count={log.output.lost}',
    }


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_long_record_on_a_shared_pipe_is_one_piece_and_keeps_the_end_of_its_stack(
    style: Literal["text", "json"], shared: tuple[int, int]
) -> None:
    log = Logs(LoggingConfig(format=style), shared[1])
    stack = "".join(f'line {number} "quoted"\n' for number in range(2000)) + "ZeroDivisionError"
    logs.write(LogLevel.ERROR, "unexpected", {"error": "e" * 5000, "stack": stack, "number": 7})
    log.close()

    line = read(shared[0])
    assert len(line.encode()) <= 4096
    assert line.count("\n") == 1
    assert "ZeroDivisionError" in line
    if style == "json":
        assert json.loads(line)["number"] == 7
        assert json.loads(line)["stack"].startswith("...")


def test_a_message_that_is_too_long_by_itself_is_cut(shared: tuple[int, int]) -> None:
    log = Logs(LoggingConfig(disable_timestamp=True), shared[1])
    logs.write(LogLevel.INFO, "x" * 5000, {"a": "b"})
    log.close()

    line = read(shared[0])
    assert line.startswith("level=INFO msg=xxx")
    assert (len(line), line[-1]) == (4096, "\n")


# ---- rate limit ----


def test_one_line_per_key_and_interval_with_the_number_swallowed() -> None:
    limit = RateLimit(Seconds(60))

    said = [limit.try_pass("a", Seconds(at)) for at in (0, 1, 59, 60, 61, 200)]
    other = limit.try_pass("b", Seconds(1))

    assert said == [1, None, None, 3, None, 2]
    assert other == 1


def test_keys_chosen_by_strangers_do_not_fill_the_memory() -> None:
    limit = RateLimit(Seconds(60), keys_max=10)

    for key in range(1000):
        limit.try_pass(key, Seconds(0))

    assert len(limit._written) <= 10
