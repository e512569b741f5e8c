"""`nebula-mp start`: run a gateway in the foreground.

Data flow: argv -> [cli.start] -> config.load -> workers.control -> exit code
Errors before the gateway is up go to stderr, as text; from then on there is the log on stdout.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from nebula_mp import cli, clock
from nebula_mp.config.load import LoadedConfig, load_config
from nebula_mp.workers.pki import load_pki

_USAGE = 2


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `start` to the commands."""
    parser = subparsers.add_parser(
        "start", help=cli.COMMANDS["start"], description=cli.COMMANDS["start"], allow_abbrev=False,
        add_help=False,
    )  # fmt: skip
    cli.add_nebula_flags(parser)
    parser.add_argument(
        "--run-dir", metavar="DIR", help="where the control socket is made; beats mp.run_dir of the file"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run, or with `-test` only check; the exit code."""
    if "config" not in arguments:
        print("nebula-mp start: -c FILE is required: the configuration to start with", file=sys.stderr)
        return _USAGE
    load = _loader(arguments.config, getattr(arguments, "run_dir", None))
    if getattr(arguments, "test", False):
        return _check(arguments.config, load())
    _ensure_standard_descriptors()
    try:
        return _serve(load)
    except KeyboardInterrupt:
        print("nebula-mp: asked to stop before it was up; what was done is undone", file=sys.stderr)
        return 0


def _serve(load: Callable[[], LoadedConfig]) -> int:
    with _EarlySignals():
        loaded = load()
        # Late, so that a wrong configuration is refused before the devices' libraries are loaded.
        from nebula_mp.workers import control, logs  # noqa: PLC0415

        log = logs.Logs(loaded.config.logging)
        try:
            return control.serve(loaded, load, log)
        finally:
            log.close()


def _loader(path: Path, run_dir: str | None) -> Callable[[], LoadedConfig]:
    def load() -> LoadedConfig:
        loaded = load_config(path)
        if run_dir is None:
            return loaded
        mp = replace(loaded.config.mp, run_dir=run_dir)
        return replace(loaded, config=replace(loaded.config, mp=mp))

    return load


def _check(path: Path, loaded: LoadedConfig) -> int:
    """Check what can be checked without touching the host. Raises NebulaError."""
    own = load_pki(loaded.config.pki, clock.wall_s())
    for warning in (*loaded.warnings, *own.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    newest = own.identity.newest
    print(f"{path}: good; this is {newest.name!r}, {', '.join(map(str, newest.networks))}")
    return 0


def _ensure_standard_descriptors() -> None:
    """Open what is closed of 0, 1, 2: else a device would get the number that the log is written to."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one


class _EarlySignals:
    """Until the event loop takes signals over: an end that undoes what was done, and no reload."""

    def __enter__(self) -> None:
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._interrupt),
            signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        }

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG004 - as signal.signal wants it
        raise KeyboardInterrupt
