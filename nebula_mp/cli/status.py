"""`nebula-mp status`: one screen of truth about a running gateway.

Data flow: argv -> [cli.status] -> cli.client -> stdout
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nebula_mp import cli
from nebula_mp.cli import client

SCHEMA = 1
_DAY_S, _HOUR_S, _MINUTE_S = 86400, 3600, 60


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `status` to the commands."""
    parser = subparsers.add_parser(
        "status", help=cli.COMMANDS["status"], description=cli.COMMANDS["status"], allow_abbrev=False
    )
    client.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show it; the exit code."""
    with client.connect(arguments) as gateway:
        state = gateway.call("status")
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, **state}))
    else:
        print(render(state))
    return 0


def render(state: Mapping[str, Any]) -> str:
    """Give the screen for the answer of the control socket's `status`."""
    certificate = state["certificate"]
    head = "  ".join(
        (
            state["device"],
            f"up {span(state['uptime_s'])}",
            " ".join(state["networks"]),
            f"cert {certificate['name']} {_expiry(certificate['expires_in_s'])}",
            f"kernel {state['kernel']}",
            *_workers(state.get("workers")),
        )
    )
    tunnels = [host for host in state["hosts"] if host["primary"]]
    rows = [
        (
            host["name"],
            " ".join(host["addresses"]),
            f"direct {host['remote']}",
            str(host["sent"]),
            str(host["received"]),
        )
        for host in tunnels
    ]
    if not rows:
        return _printable(f"{head}\nno tunnels: the first packet for a host makes one")
    lines = table([("HOST", "ADDRESS", "PATH", "SENT", "RECEIVED"), *rows])
    return "\n".join(map(_printable, (head, *lines)))


def _workers(count: Mapping[str, int] | None) -> Iterable[str]:
    """Say how many run of how many; nothing if the supervisor was too busy to say."""
    return [f"workers {count['running']}/{count['configured']}"] if count else []


def table(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Give lines whose columns are as wide as they need to be; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _expiry(left_s: int) -> str:
    return f"expires in {span(left_s)}" if left_s >= 0 else f"EXPIRED {span(-left_s)} ago"


def span(seconds: int) -> str:
    """`3d 4h`, `2h 5m`, `7m 1s`, `9s`: the two largest units."""
    days, rest = divmod(seconds, _DAY_S)
    hours, rest = divmod(rest, _HOUR_S)
    minutes, rest = divmod(rest, _MINUTE_S)
    parts = [f"{amount}{unit}" for amount, unit in zip((days, hours, minutes, rest), "dhms", strict=True)]
    first = next((place for place, amount in enumerate((days, hours, minutes)) if amount), 3)
    return " ".join(parts[first : first + 2])


def _printable(text: str) -> str:
    """A name comes from a peer's certificate and must not drive the terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)
