"""`nebula-mp demo`: two nodes on this machine, measured, and everything removed again.

Data flow: argv -> [cli.demo] -> demo.story -> [cli.demo] -> stdout, exit code
Knows what to print and that the way out always leads through `Story.close`; knows no step by itself.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import NoReturn

from nebula_mp import cli
from nebula_mp.demo.story import STEPS, Kept, Step, Story, check_host

SCHEMA = 1
_SECONDS_MAX = 3600
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo` to the commands."""
    parser = subparsers.add_parser(
        "demo", help=cli.COMMANDS["demo"], description=cli.COMMANDS["demo"], allow_abbrev=False
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=5, metavar="S", help="how long iperf3 takes each way (default 5)"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="leave the nodes running, and print how to look inside and how to remove them",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the steps on stderr")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit code."""
    steps_to = sys.stderr if arguments.json else sys.stdout
    check_host()
    try:
        with _signals_interrupt():
            return _play(arguments, Story(lambda step: print(_line(step), file=steps_to, flush=True)))
    except KeyboardInterrupt:
        print("nebula-mp: interrupted; cleaned up", file=sys.stderr)
        return 1


def _play(arguments: argparse.Namespace, story: Story) -> int:
    kept: Kept | None = None
    try:
        result = story.play(seconds=arguments.seconds)
        if arguments.keep:
            kept = story.keep()
    finally:
        for number in _SIGNALS:  # a second Ctrl-C must not leave half of it behind
            signal.signal(number, signal.SIG_IGN)
        story.close()
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, **asdict(result), "kept": asdict(kept) if kept else None}))
    elif kept:
        print("  left running. Look inside:", *kept.enter, sep="\n    sudo ")
        print("  Remove it:", *kept.remove, sep="\n    sudo ")
    else:
        print("  cleaned up. Next: nebula-mp cert ca --help")
    return 0


def _line(step: Step) -> str:
    took = "" if step.took_s is None else _duration(step.took_s)
    return f"  {step.number}/{STEPS} {step.title:<14} {step.text:<46} {took}".rstrip()


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _seconds(text: str) -> int:
    value = int(text)  # argparse turns ValueError into a usage error
    if not 1 <= value <= _SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"expected 1..{_SECONDS_MAX}, found {value}")
    return value


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let the signals that end a program raise KeyboardInterrupt, so that `finally` runs for each of them."""
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
