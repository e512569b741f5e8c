"""The table of processes that `workers` prints, and what it is computed from."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nebula_mp import clock
from nebula_mp.cli import main, workers
from nebula_mp.cli.workers import with_cpu_use
from nebula_mp.newtypes import Seconds
from nebula_mp.workers.local_api import LENGTH, SCHEMA, decode, encode


def process(role: str, **changes: Any) -> dict[str, Any]:
    return {
        "role": role,
        "worker": None,
        "pid": 100,
        "core": 1,
        "cpu_s": 1.0,
        "state": "running",
        "restarts": 0,
        "uptime_s": 5,
        "packets_in": 0,
        "packets_out": 0,
        "ring_fill": None,
        **changes,
    }


BEFORE = [
    process("control", pid=101),
    process("reader", worker=0, pid=102, cpu_s=10.0, ring_fill=0),
    process("writer", worker=0, pid=103, ring_fill=0),
    process("reader", worker=1, pid=None, core=None, cpu_s=None, state="given up", ring_fill=0),
]
AFTER = [
    process("control", pid=101, cpu_s=1.02),
    process("reader", worker=0, pid=102, cpu_s=10.45, core=0, ring_fill=3, packets_in=12345, packets_out=12),
    process("writer", worker=0, pid=104, cpu_s=0.1, restarts=1, packets_out=678, ring_fill=3),
    process("reader", worker=1, pid=None, core=None, cpu_s=None, state="given up", restarts=5, ring_fill=0),
]


@contextmanager
def answering(path: Path, *results: Mapping[str, object]) -> Iterator[list[str]]:
    """A gateway that gives these results to one client, one after the other; which commands it was given."""
    commands: list[str] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for result in results:
                (length,) = LENGTH.unpack(connection.recv(LENGTH.size, socket.MSG_WAITALL))
                commands.append(decode(connection.recv(length, socket.MSG_WAITALL))["command"])
                connection.sendall(encode({"schema": SCHEMA, "ok": True, "result": result}))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.settimeout(20)
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield commands
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock as if nothing took time but the pause, which does not."""
    now = [1000.0]

    def sleep(span: float) -> None:
        now[0] += span

    monkeypatch.setattr(clock, "monotonic", lambda: Seconds(now[0]))
    monkeypatch.setattr(workers.time, "sleep", sleep)  # type: ignore[attr-defined]  # a module it imports


@pytest.mark.usefixtures("half_a_second")
def test_each_process_is_a_line_with_what_it_is_where_it_runs_and_what_it_carried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(
        tmp_path / "x.sock", {"processes": BEFORE}, {"processes": AFTER, "kernel": "rust"}
    ) as commands:
        assert main(["workers", "--run-dir", str(tmp_path)]) == 0

    assert commands == ["workers", "workers"]
    assert capsys.readouterr().out == (
        "ROLE      PID  CORE  CPU  RING  IN     OUT  RESTARTS  STATE\n"
        "control   101  1     4%   -     0      0    0         running\n"
        "reader/0  102  0     90%  3     12345  12   0         running\n"
        "writer/0  104  1     -    3     0      678  1         running\n"
        "reader/1  -    -     -    0     0      0    5         given up\n"
        "kernel rust\n"
    )


@pytest.mark.usefixtures("half_a_second")
def test_json_has_everything_and_a_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(tmp_path / "x.sock", {"processes": BEFORE}, {"processes": AFTER, "kernel": "rust"}):
        assert main(["workers", "--run-dir", str(tmp_path), "--json"]) == 0

    answer = json.loads(capsys.readouterr().out)
    assert (answer["schema"], answer["kernel"]) == (1, "rust")
    assert [each.pop("cpu_percent") for each in answer["processes"]] == [4.0, 90.0, None, None]
    assert answer["processes"] == AFTER


@pytest.mark.parametrize(
    ("before", "after", "percent"),
    [
        pytest.param([process("a", cpu_s=1.0)], process("a", cpu_s=2.0), 50.0, id="half a CPU"),
        pytest.param([process("a", cpu_s=1.0)], process("a", cpu_s=1.0), 0.0, id="idle"),
        pytest.param([process("a", cpu_s=1.0)], process("a", pid=7, cpu_s=2.0), None, id="a successor"),
        pytest.param([], process("a", cpu_s=2.0), None, id="new"),
        pytest.param([process("a", cpu_s=None)], process("a", cpu_s=2.0), None, id="not known before"),
        pytest.param([process("a", cpu_s=1.0)], process("a", cpu_s=None), None, id="not known after"),
        pytest.param(
            [process("a", pid=None, cpu_s=None)], process("a", pid=None, cpu_s=None), None, id="nobody"
        ),
    ],
)
def test_the_use_of_a_cpu_is_known_only_of_a_process_that_was_there_both_times(
    before: list[dict[str, Any]], after: dict[str, Any], percent: float | None
) -> None:
    (found,) = with_cpu_use(before, [after], span_s=2.0)

    assert found == {**after, "cpu_percent": percent}
