"""The order of a run: each round starts every system anew, and each case goes over all of them in turn.

Data flow: cli -> [iperf_harness.runner] -> bench, cases -> Sample -> cli
Two figures that are compared are thus seconds apart, whatever else the machine does meanwhile. The system
that is measured first changes from round to round.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nebula_mp.errors import SystemCallError
from tools.iperf_harness.bench import Bench
from tools.iperf_harness.cases import Case, Sample, measure
from tools.iperf_harness.progress import Progress
from tools.iperf_harness.systems import DEFAULT_TUNNEL, System, Tunnel

_SETTLE_S = 0.2
"""Between measurements, for what a generator left in queues and in the kernel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do. `seconds` is the length of each measurement."""

    systems: Sequence[System]
    cases: Sequence[Case]
    topology: str
    rounds: int
    seconds: float
    workers: int
    congestion: str | None = None
    tunnel: Tunnel = DEFAULT_TUNNEL

    @property
    def steps(self) -> int:
        """How often `Progress.begin` will be called."""
        return self.rounds * len(self.systems) * (1 + len(self.cases))

    @property
    def estimate_s(self) -> float:
        """About how long it takes."""
        per_round = len(self.systems) * (2.0 + len(self.cases) * (self.seconds + 0.8))
        return self.rounds * per_round


def execute(plan: Plan, progress: Progress, add: Callable[[Sample], None]) -> None:
    """Measure everything; each sample goes to `add` at once, so that an interruption keeps what there is."""
    for number in range(1, plan.rounds + 1):
        systems = rotated(plan.systems, number - 1)
        with contextlib.ExitStack() as stack:
            benches = []
            for system in systems:
                progress.begin(f"round {number}/{plan.rounds}, starting {system.label}")
                bench = stack.enter_context(
                    Bench(system, plan.topology, plan.workers, plan.congestion, plan.tunnel)
                )
                try:
                    bench.start()
                except SystemCallError as error:
                    for case in plan.cases:
                        progress.begin(f"{system.label} could not be started")
                        add(Sample(round=number, case=case.name, system=system.label, error=str(error)))
                    bench.close()
                else:
                    benches.append(bench)
            for case in plan.cases:
                for bench in benches:
                    progress.begin(f"round {number}/{plan.rounds}, {case.name}, {bench.system.label}")
                    time.sleep(_SETTLE_S)
                    waiting = [other for other in benches if other is not bench]
                    add(measure(case, bench, waiting, round_=number, seconds=plan.seconds))
        progress.round_done(f"round {number}/{plan.rounds}")


def rotated(systems: Sequence[System], by: int) -> list[System]:
    """The same order, begun elsewhere."""
    at = by % len(systems)
    return [*systems[at:], *systems[:at]]
