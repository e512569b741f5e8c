"""What is measured: each case is traffic through one bench, and the figures that describe it.

Data flow: runner -> [iperf_harness.cases] -> traffic -> [iperf_harness.cases] -> Sample -> results
Everything here is the same for every system. Costs are those of both nodes' processes, not of the generators.
Source: the README of this package.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nebula_mp.errors import SystemCallError
from tools.iperf_harness import proctree, traffic
from tools.iperf_harness.bench import Bench
from tools.iperf_harness.traffic import Figures

PACED_BITS_PER_S = 10_000_000
"""In packets of 1200 bytes these are a thousand packets a second: nothing has a reason to lose one."""

WAITING_PERCENT = 5.0
"""Of one processor: what the systems that are not measured may take together and not be a disturbance."""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a sample, and how it is shown. `scale` is what the shown unit is worth."""

    figure: str
    title: str
    digits: int
    scale: float = 1.0
    more_is_better: bool = False


GBIT = Column("gbit_per_s", "Gbit/s", 2, more_is_better=True)
KPPS = Column("packets_per_s", "kpackets/s", 1, 1e3, more_is_better=True)
RTT = Column("rtt_us", "RTT us", 0)
RATE = Column("connections_per_s", "conn/s", 0, more_is_better=True)
CPU_GB = Column("cpu_s_per_gb", "CPU-s/GB", 2)
CPU_MP = Column("cpu_s_per_mpackets", "CPU-s/Mpackets", 2)
CPU_CONNECTION = Column("cpu_us_per_connection", "CPU us/conn", 0)
PSS = Column("pss_mb", "PSS MB", 1)
_BOX_GB = Column("machine_s_per_gb", "machine-s/GB", 2)
_BOX_MP = Column("machine_s_per_mpackets", "machine-s/Mpackets", 2)
_LOSS = Column("loss_percent", "lost %", 2)
_RETRANSMITS = Column("retransmits", "retransmits", 0)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of traffic. `result` and `cost` have ratios in the table; `more` are shown beside them."""

    name: str
    title: str
    result: Column
    cost: Column
    more: tuple[Column, ...]
    send: Callable[[Bench, float], "Sent"]

    @property
    def columns(self) -> tuple[Column, ...]:
        """Every figure that is shown."""
        return self.result, self.cost, *self.more


@dataclass(slots=True)
class Sent:
    """What came of the traffic. `problems` name what should not have been dropped and was."""

    figures: Figures
    problems: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement. `error` says why there are no figures."""

    round: int
    case: str
    system: str
    figures: Figures = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    error: str = ""


def measure(case: Case, bench: Bench, waiting: Sequence[Bench], *, round_: int, seconds: float) -> Sample:
    """Send the case's traffic and count what it cost; whatever goes wrong becomes the sample's `error`.

    `waiting` are the others that run meanwhile: what they do is nobody's cost, but it has to be little.
    """
    own = bench.roots
    roots = [*own, *(root for other in waiting for root in other.roots)]
    try:
        bench.check_running()
        began, before, machine = time.monotonic(), proctree.trees(roots), proctree.machine()
        sent = case.send(bench, seconds)
        after, used = proctree.trees(roots), proctree.machine().since(machine)
        took_s = time.monotonic() - began
        bench.check_running()
    except SystemCallError as error:
        return Sample(round=round_, case=case.name, system=bench.system.label, error=_explained(error, bench))
    figures = dict(sent.figures)
    spent = [new.cpu_s - old.cpu_s for old, new in zip(before, after, strict=True)]
    if own:
        figures["cpu_s"] = sum(spent[: len(own)])
        figures["pss_mb"] = proctree.pss_bytes(own) / 1e6
    figures["waiting_percent"] = 100 * sum(spent[len(own) :]) / took_s
    figures["machine_s"] = used.busy_s
    figures["stolen_percent"] = 100 * used.stolen_s / used.all_s if used.all_s else 0.0
    figures |= costs(figures)
    problems = [*sent.problems]
    if gone := sum(len(before[at].members - after[at].members) for at in range(len(own))):
        problems.append(f"{gone} processes of the nodes ended")
    if figures["waiting_percent"] > WAITING_PERCENT:
        problems.append(f"systems that wait took {figures['waiting_percent']:.1f} % of a processor")
    return Sample(
        round=round_,
        case=case.name,
        system=bench.system.label,
        figures=figures,
        problems=tuple(problems),
        notes=sent.notes,
    )


def costs(figures: Figures) -> Figures:
    """Seconds of processors per unit of what was moved: of the nodes, and of the whole machine."""
    units = (("gigabytes", "per_gb", 1.0), ("packets", "per_mpackets", 1e6))
    found: Figures = {}
    for amount, suffix, unit in units:
        if figures.get(amount):
            found |= {
                f"{kind}_s_{suffix}": figures[f"{kind}_s"] * unit / figures[amount]
                for kind in ("cpu", "machine")
                if f"{kind}_s" in figures
            }
    if figures.get("connections") and "cpu_s" in figures:
        found["cpu_us_per_connection"] = figures["cpu_s"] * 1e6 / figures["connections"]
    return found


def _explained(error: SystemCallError, bench: Bench) -> str:
    """A node that ended is the better explanation of what the generator complains about."""
    try:
        bench.check_running()
    except SystemCallError as ended:
        return str(ended)
    return str(error)


def _tcp(*options: str) -> Callable[[Bench, float], Sent]:
    def send(bench: Bench, seconds: float) -> Sent:
        chosen = ("--congestion", bench.congestion) if bench.congestion else ()
        report = traffic.iperf(bench.client, bench.server, bench.target, *options, *chosen, seconds=seconds)
        return Sent(traffic.tcp_figures(report), notes={"congestion": traffic.congestion_control(report)})

    return send


def _udp(length: int) -> Callable[[Bench, float], Sent]:
    def send(bench: Bench, seconds: float) -> Sent:
        return Sent(traffic.udp_figures(_udp_report(bench, length, 0, seconds), length))

    return send


def _udp_paced(length: int) -> Callable[[Bench, float], Sent]:
    def send(bench: Bench, seconds: float) -> Sent:
        figures = traffic.udp_figures(_udp_report(bench, length, PACED_BITS_PER_S, seconds), length)
        lost = round(figures["sent"] - figures["packets"])
        return Sent(figures, [f"{lost} of {figures['sent']:.0f} packets lost"] if lost > 0 else [])

    return send


def _udp_report(bench: Bench, length: int, bits_per_s: int, seconds: float) -> dict[str, Any]:
    window = str(traffic.udp_buffer_bytes())
    options = ("--udp", "--length", str(length), "--bitrate", str(bits_per_s), "--window", window)
    return traffic.iperf(bench.client, bench.server, bench.target, *options, seconds=seconds)


def _ping(bench: Bench, seconds: float) -> Sent:
    count = round(seconds / traffic.PING_INTERVAL_S)
    figures = traffic.ping_train(bench.client, bench.target, count=count)
    lost = figures.pop("lost")
    return Sent(figures, [f"{lost:.0f} of {count} pings lost"] if lost else [])


def _connect(at_once: int) -> Callable[[Bench, float], Sent]:
    def send(bench: Bench, seconds: float) -> Sent:
        figures = traffic.connect(bench.client, bench.server, bench.target, at_once=at_once, seconds=seconds)
        failed = figures.pop("failures")
        return Sent(figures, [f"{failed:.0f} connections failed"] if failed else [])

    return send


def _all() -> Iterator[Case]:
    for name, title, options in (
        ("tcp", "TCP, one stream", ()),
        ("tcp-reverse", "TCP, one stream back", ("--reverse",)),
        ("tcp-4", "TCP, 4 streams", ("--parallel", "4")),
        ("tcp-both", "TCP, both ways at once", ("--bidir",)),
    ):
        yield Case(name, title, GBIT, CPU_GB, (_RETRANSMITS, _BOX_GB), _tcp(*options))
    for length in (64, 1200):
        title = f"UDP, {length} bytes, as fast as it goes"
        yield Case(f"udp-{length}", title, KPPS, CPU_MP, (_LOSS, _BOX_MP), _udp(length))
    yield Case("udp-paced", "UDP, 10 Mbit/s: nothing may be lost", KPPS, CPU_MP, (_LOSS,), _udp_paced(1200))
    yield Case("ping", "ping every 2 ms", RTT, CPU_MP, (Column("rtt_p99_us", "p99 us", 0),), _ping)
    for at_once in (1, 8):
        title = f"new TCP connections, {at_once} at once"
        latencies = (Column("p50_us", "p50 us", 0), Column("p99_us", "p99 us", 0))
        yield Case(f"connect-{at_once}", title, RATE, CPU_CONNECTION, latencies, _connect(at_once))


CASES = {case.name: case for case in _all()}
