"""The command line of the harness: what is asked for, whether it can be done, and where results go.

Data flow: argv -> [iperf_harness.cli] -> runner -> results -> table on stdout, JSON and SVG files
Exit codes: 0 all well; 1 something failed, was dropped or interrupted; 2 usage; 4 without root.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from nebula_mp.demo.netns import require_root_and_iproute
from nebula_mp.errors import SystemCallError
from tools.iperf_harness import chart, facts, table
from tools.iperf_harness.bench import DIRECT, SIGNALS, TOPOLOGIES, other_harnesses, sweep_stale
from tools.iperf_harness.cases import CASES, Case, Sample
from tools.iperf_harness.progress import Progress, duration
from tools.iperf_harness.results import Results, pick_baseline
from tools.iperf_harness.runner import Plan, execute
from tools.iperf_harness.systems import (
    AES,
    BUFFER_BYTES,
    CIPHERS,
    IP_VERSIONS,
    IPV4,
    MTU_BYTES,
    System,
    Tunnel,
    UsageError,
    check_overlay,
    fetch_releases,
    known_systems,
    parse_systems,
)
from tools.iperf_harness.traffic import check_tools, udp_buffer_bytes

PROGRAM = "iperf_harness"
DEFAULT_SYSTEMS = "none,nebula-mp,nebula-1.11.0"
ROUNDS, SECONDS = 5, 4.0
QUICK_ROUNDS, QUICK_SECONDS = 1, 2.0
STEADY_SECONDS = 4.0
"""Shorter runs of iperf3 measure how a connection starts."""

_EPILOG = f"""\
systems: {", ".join(known_systems())}, each with options: NAME:KEY=VALUE:KEY=VALUE.
  KEY is a key of the configuration (tun.tx_queue=1000); kernel, workers and drain stand for mp.kernel and so
  on. A release has routines=N.
cases: {", ".join(CASES)}
a command: --command 'other=/opt/other/nebula -config $config' is given Nebula's configuration, or what
  --template other=FILE makes of it. Placeholders: $config $ca $cert $key $name $folder $overlay $peer_overlay
  $underlay $peer_underlay $peer_endpoint $port $device $mtu $cipher $workers.
"""


class _Whole:
    """An argument type: a whole number of a range."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high

    def __call__(self, text: str) -> int:
        if not text.isascii() or not text.isdigit() or not self._low <= int(text) <= self._high:
            raise argparse.ArgumentTypeError(f"expected {self._low}..{self._high}, found {text!r}")
        return int(text)


def _seconds(text: str) -> float:
    low, high = 1, 3600
    return float(_Whole(low, high)(text))


def parser() -> argparse.ArgumentParser:
    """Every option; those without a default depend on --quick."""
    made = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measure tunnels between two namespaces of this machine against each other.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add(
        "--systems",
        default=DEFAULT_SYSTEMS,
        metavar="A,B",
        help=f"what to compare (default {DEFAULT_SYSTEMS})",
    )
    add("--cases", default=",".join(CASES), metavar="A,B", help="what to send (default all)")
    add(
        "--topology",
        choices=TOPOLOGIES,
        default=DIRECT,
        help="a veth pair, or a router that cuts superpackets",
    )
    add("--rounds", type=_Whole(1, 1000), metavar="N", help=f"(default {ROUNDS})")
    add("--seconds", type=_seconds, metavar="S", help=f"length of each measurement (default {SECONDS:g})")
    add("--quick", action="store_true", help="one round of short runs: under two minutes, and only a hint")
    add("--baseline", metavar="SYSTEM", help="what ratios are to (default: the last real release)")
    add(
        "--workers",
        type=_Whole(1, 64),
        default=1,
        metavar="N",
        help="workers or routines of each (default 1)",
    )
    add("--cipher", choices=CIPHERS, default=AES, help=f"of every tunnel (default {AES})")
    add("--overlay", choices=IP_VERSIONS, default=IPV4, help=f"addresses in the tunnel (default {IPV4})")
    add("--underlay", choices=IP_VERSIONS, default=IPV4, help=f"addresses of the wire (default {IPV4})")
    add("--congestion", metavar="NAME", help="TCP's congestion control (default: the machine's)")
    add("--kernel", metavar="NAME", help="mp.kernel of every nebula-mp")
    add("--drain", metavar="MODE", help="mp.drain of every nebula-mp")
    add("--command", action="append", default=[], metavar="LABEL=COMMAND", help="one more system")
    add("--template", action="append", default=[], metavar="LABEL=FILE", help="configuration of that system")
    add("--json", type=Path, metavar="FILE", help="write every sample and what it was taken under")
    add("--svg", type=Path, metavar="FILE", help="write a chart")
    add(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="measure nothing: show what --json once wrote",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; the exit code."""
    arguments = parser().parse_args(argv)
    try:
        results = _recorded(arguments.source) if arguments.source else _measured(arguments)
        _write(arguments, results)
    except UsageError as error:
        parser().error(str(error))
    except SystemCallError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; cleaned up")
        return 1
    return 1 if results.troubles() else 0


def _recorded(source: Path) -> Results:
    try:
        return Results.from_json(source.read_text())
    except OSError as error:
        raise UsageError(f"--from {source}: {error.strerror}") from error


def _measured(arguments: argparse.Namespace) -> Results:
    plan = _plan(arguments)
    labels = [system.label for system in plan.systems]
    baseline = pick_baseline(labels, arguments.baseline)
    _check_writable(arguments.json, arguments.svg)
    require_root_and_iproute()
    check_tools()
    fetch_releases(plan.systems)
    sweep_stale()
    results = Results(
        machine=facts.machine(),
        settings=_settings(plan),
        versions=facts.versions(plan.systems),
        systems=tuple(labels),
        cases=tuple(case.name for case in plan.cases),
        baseline=baseline,
        warnings=_warnings(plan),
    )
    for warning in results.warnings:
        _say(warning)
    _say(f"rounds: {plan.rounds}, systems: {len(labels)}, this takes about {duration(plan.estimate_s)}")
    with _signals_interrupt():
        try:
            _run(plan, results)
        except KeyboardInterrupt:
            if not results.samples:
                raise
            results.warnings.append("interrupted: these are the measurements until then")
            _write(arguments, results)
            raise
    return results


def _run(plan: Plan, results: Results) -> None:
    progress = Progress(sys.stderr, plan.steps)

    def add(sample: Sample) -> None:
        results.samples.append(sample)
        if congestion := sample.notes.get("congestion"):
            results.settings["TCP"] = congestion

    try:
        execute(plan, progress, add)
    finally:
        progress.close()


def _plan(arguments: argparse.Namespace) -> Plan:
    quick = arguments.quick
    systems = _systems(arguments)
    check_overlay(systems, arguments.overlay)
    return Plan(
        systems=systems,
        cases=_cases(arguments.cases),
        topology=arguments.topology,
        rounds=arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        seconds=arguments.seconds or (QUICK_SECONDS if quick else SECONDS),
        workers=arguments.workers,
        congestion=arguments.congestion,
        tunnel=Tunnel(cipher=arguments.cipher, overlay=arguments.overlay, underlay=arguments.underlay),
    )


def _systems(arguments: argparse.Namespace) -> list[System]:
    chosen = {name: getattr(arguments, name) for name in ("kernel", "drain")}
    return parse_systems(
        _names(arguments.systems),
        workers=arguments.workers,
        ours={name: value for name, value in chosen.items() if value is not None},
        commands=_pairs("--command", arguments.command),
        templates={
            label: _template(path) for label, path in _pairs("--template", arguments.template).items()
        },
    )


def _cases(text: str) -> list[Case]:
    names = _names(text)
    if strange := [name for name in names if name not in CASES]:
        raise UsageError(f"no case {strange[0]!r}; there are {', '.join(CASES)}")
    if not names:
        raise UsageError(f"no case to measure; there are {', '.join(CASES)}")
    return [CASES[name] for name in dict.fromkeys(names)]


def _names(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name]


def _pairs(option: str, texts: Sequence[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        label, equals, value = text.partition("=")
        if not (label and equals and value):
            raise UsageError(f"{option} {text!r}: expected LABEL=...")
        if label in found or label.partition(":")[0] in known_systems():
            raise UsageError(f"{option} {text!r}: the label {label!r} is taken")
        found[label] = value
    return found


def _template(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise UsageError(f"--template {path}: {error.strerror}") from error


def _settings(plan: Plan) -> dict[str, str]:
    return {
        "topology": plan.topology,
        "rounds": str(plan.rounds),
        "seconds": f"{plan.seconds:g}",
        "MTU": str(MTU_BYTES),
        **plan.tunnel.facts(),
        "workers": str(plan.workers),
        "socket buffers": f"{BUFFER_BYTES >> 20} MB",
        "iperf3 UDP buffers": f"{udp_buffer_bytes() / (1 << 20):g} MB",
    }


def _warnings(plan: Plan) -> list[str]:
    found = facts.busy_warning(facts.busy_share())
    if others := other_harnesses():
        found.append(f"another run is going on (process {others[0]}): neither measures what it should")
    if plan.seconds < STEADY_SECONDS:
        found.append(f"runs below {STEADY_SECONDS:g} s measure how a connection starts; take them for a hint")
    return found


def _check_writable(*paths: Path | None) -> None:
    """Before ten minutes of measuring, not after."""
    for path in paths:
        if path is not None:
            try:
                path.open("a").close()
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}") from error


def _write(arguments: argparse.Namespace, results: Results) -> None:
    print(table.render(results), end="", flush=True)
    try:
        if arguments.json:
            arguments.json.write_text(results.to_json())
        if arguments.svg:
            arguments.svg.write_text(chart.render(results))
    except OSError as error:
        raise SystemCallError(f"{error.filename}: {error.strerror}") from error


def _say(text: str) -> None:
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt; a second one must not stop the way out."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
