"""`nebula-mp start`: run a gateway in the foreground.

Data flow: argv -> [cli.start] -> workers.checked: config.load, in a child -> supervisor -> exit code
Errors before the gateway is up go to stderr, as text; from then on there is the log on stdout.
This process becomes the supervisor, so it never reads the configuration itself: a private key may stand in
it. While the child does, what a gateway consists of is imported, module by module, until there is a refusal.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

from nebula_mp import cli, clock
from nebula_mp.config.load import LoadedConfig, load_config
from nebula_mp.config.model import WORKERS_MAX, DrainMode, KernelChoice, MpConfig
from nebula_mp.datapath import kernels
from nebula_mp.workers.checked import Check, Checked
from nebula_mp.workers.pki import load_pki

_USAGE = 2
_AUTO = "auto"
_PARTS = (
    "nebula_mp.workers.loop",
    "nebula_mp.netlink",
    "nebula_mp.control.controller",
    "nebula_mp.supervisor",
    *(f"nebula_mp.workers.{role}" for role in ("reader", "writer", "services", "control")),
)
"""The modules that take longest to import, about 50 ms each, and last those that import the rest."""


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
    parser.add_argument(
        "--workers", metavar=f"N|{_AUTO}", type=_workers, default=argparse.SUPPRESS,
        help=f"pairs of reader and writer processes, 1 to {WORKERS_MAX}; beats mp.workers of the file."
        f" {_AUTO}: `routines` of the file if that is set, else one for every two CPUs",
    )  # fmt: skip
    parser.add_argument(
        "--drain", choices=[mode.value for mode in DrainMode], default=argparse.SUPPRESS,
        help="who makes the system calls for sealed and opened packets; beats mp.drain of the file",
    )  # fmt: skip
    parser.add_argument(
        "--kernel", choices=[choice.value for choice in KernelChoice], default=argparse.SUPPRESS,
        help="what works on packets: the native kernel, the one in Python, or the native one where it can be"
        " used; beats mp.kernel of the file",
    )  # fmt: skip
    parser.set_defaults(run=run)


def _workers(text: str) -> int | None:
    if text == _AUTO:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= WORKERS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {_AUTO} nor a number from 1 to {WORKERS_MAX}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Run, or with `-test` only check; the exit code."""
    if "config" not in arguments:
        print("nebula-mp start: -c FILE is required: the configuration to start with", file=sys.stderr)
        return _USAGE
    load = _loader(arguments.config, partial(_with_options, arguments))
    if getattr(arguments, "test", False):
        return _check(arguments.config, load())
    _ensure_standard_descriptors()
    try:
        return _serve(load, _kernel_on(arguments))
    except KeyboardInterrupt:
        print("nebula-mp: asked to stop before it was up; what was done is undone", file=sys.stderr)
        return 0


def _serve(load: Callable[[], LoadedConfig], kernel: KernelChoice | None) -> int:
    with _EarlySignals():
        checked = _prepare(load, kernel)
        # Imported by `_prepare` already; up here it would be loaded for every help text.
        from nebula_mp import supervisor  # noqa: PLC0415
        from nebula_mp.workers import logs  # noqa: PLC0415

        log = logs.Logs(checked.config.logging)
        try:
            return supervisor.serve(checked, load, log)
        finally:
            log.close()


def _kernel_on(arguments: argparse.Namespace) -> KernelChoice | None:
    """Which kernel the command line asks for, if any."""
    return KernelChoice(arguments.kernel) if "kernel" in arguments else None


def _prepare(load: Callable[[], LoadedConfig], kernel: KernelChoice | None) -> Checked:
    """Import what a gateway consists of while the configuration is checked. Raises what is wrong there.

    `kernel` is what the command line asks for.
    """
    check = Check.begin(load)
    loads: list[Callable[[], object]] = [partial(importlib.import_module, name) for name in _PARTS]
    loads.append(partial(kernels.preload, kernel))
    try:
        for load_part in loads:
            if check.refused():
                break
            load_part()
        return check.finish()
    finally:
        check.close()


def _loader(path: Path, adjust: Callable[[MpConfig], MpConfig]) -> Callable[[], LoadedConfig]:
    """Give what reads the configuration, now and at each reload, as the command line would have it."""

    def load() -> LoadedConfig:
        loaded = load_config(path)
        return replace(loaded, config=replace(loaded.config, mp=adjust(loaded.config.mp)))

    return load


def _with_options(arguments: argparse.Namespace, mp: MpConfig) -> MpConfig:
    """Give `mp` with what the command line says instead. Nebula's own flags come without ours."""
    if getattr(arguments, "run_dir", None) is not None:
        mp = replace(mp, run_dir=arguments.run_dir)
    if "workers" in arguments:
        mp = replace(mp, workers=arguments.workers)
    if "drain" in arguments:
        mp = replace(mp, drain=DrainMode(arguments.drain))
    if (kernel := _kernel_on(arguments)) is not None:
        mp = replace(mp, kernel=kernel)
    return mp


def _check(path: Path, loaded: LoadedConfig) -> int:
    """Check what can be checked without touching the host. Raises NebulaError."""
    kernels.choose(kernels.wanted(loaded.config.mp, os.environ))
    _, own = load_pki(loaded, clock.wall_s())
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
