"""`nebula-mp workers`: what each process of a running gateway is doing.

Data flow: argv -> [cli.workers] -> cli.client -> stdout
The gateway is asked twice, half a second apart: the use of CPUs is what lies between.
"""

import argparse
import json
import time  # noqa: TID251 - sleeps between two questions and reads no clock
from collections.abc import Mapping, Sequence
from typing import Any

from nebula_mp import cli, clock
from nebula_mp.cli import client
from nebula_mp.cli.status import table

SCHEMA = 1
_BETWEEN_S = 0.5
_HEADING = ("ROLE", "PID", "CORE", "CPU", "RING", "IN", "OUT", "RESTARTS", "STATE")
_UNKNOWN = "-"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `workers` to the commands."""
    parser = subparsers.add_parser(
        "workers",
        help=cli.COMMANDS["workers"],
        description=cli.COMMANDS["workers"],
        epilog="CORE: the CPU it ran on last. CPU: how much of one it used in the last half second."
        " RING: areas that wait to be written, of 32. IN, OUT: packets since the start of the gateway.",
        allow_abbrev=False,
    )
    client.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show them; the exit code."""
    with client.connect(arguments) as gateway:
        began = clock.monotonic()
        before = gateway.call("workers")["processes"]
        time.sleep(_BETWEEN_S)
        after = gateway.call("workers")
        processes = with_cpu_use(before, after["processes"], clock.monotonic() - began)
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "kernel": after["kernel"], "processes": processes}))
    else:
        print("\n".join((*table([_HEADING, *map(_row, processes)]), f"kernel {after['kernel']}")))
    return 0


def with_cpu_use(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], span_s: float
) -> list[dict[str, Any]]:
    """Give `after` with `cpu_percent` of one CPU in between; None for a process that is not the same."""
    used: dict[int | None, float | None] = {process["pid"]: process["cpu_s"] for process in before}

    def percent(process: Mapping[str, Any]) -> float | None:
        pid: int | None = process["pid"]
        earlier, later = used.get(pid), process["cpu_s"]
        if pid is None or earlier is None or later is None:
            return None
        return float(round(100 * max(0.0, later - earlier) / span_s, 1))

    return [{**process, "cpu_percent": percent(process)} for process in after]


def _row(process: Mapping[str, Any]) -> tuple[str, ...]:
    worker, use, fill = process["worker"], process["cpu_percent"], process["ring_fill"]
    return (
        process["role"] if worker is None else f"{process['role']}/{worker}",
        _shown(process["pid"]),
        _shown(process["core"]),
        _UNKNOWN if use is None else f"{use:.0f}%",
        _shown(fill),
        str(process["packets_in"]),
        str(process["packets_out"]),
        str(process["restarts"]),
        process["state"],
    )


def _shown(value: int | None) -> str:
    return _UNKNOWN if value is None else str(value)
