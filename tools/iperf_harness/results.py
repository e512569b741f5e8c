"""All samples of a run with what they were taken under, as JSON and back, and the statistics of them.

Data flow: runner -> Sample -> [iperf_harness.results] -> JSON file; -> table, chart
Ratios are made round by round and only then summed up: what disturbs a whole round disturbs both sides of it.
Source: the README of this package.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.iperf_harness.cases import CASES, PSS, Case, Sample
from tools.iperf_harness.systems import DEFAULT_TUNNEL, NONE, UsageError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Stat:
    """Median, least and greatest of the rounds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Stat | None":
        """None without a value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], len(found)) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that is reported. `machine` and `settings` are shown as they are, in their order."""

    machine: dict[str, str]
    settings: dict[str, str]
    versions: dict[str, str]  # system: what it says of itself
    systems: tuple[str, ...]
    cases: tuple[str, ...]
    baseline: str
    samples: list[Sample] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def stat(self, case: str, system: str, figure: str) -> Stat | None:
        """A figure over the rounds; None where it was never measured."""
        return Stat.of(self._by_round(case, system, figure).values())

    def ratio(self, case: str, system: str, figure: str) -> Stat | None:
        """The figure over that of the baseline in the same round; None for the baseline itself."""
        if system == self.baseline:
            return None
        own, base = (self._by_round(case, each, figure) for each in (system, self.baseline))
        return Stat.of(own[number] / base[number] for number in own.keys() & base.keys() if base[number])

    def memory(self, system: str) -> Stat | None:
        """PSS of both nodes in megabytes, over all cases and rounds."""
        return Stat.of(
            s.figures["pss_mb"] for s in self.samples if s.system == system and "pss_mb" in s.figures
        )

    def stolen_percent(self) -> Stat | None:
        """Share of the processors' time that the host gave to other guests."""
        found = (sample.figures.get("stolen_percent") for sample in self.samples)
        return Stat.of(value for value in found if value is not None)

    def used_cases(self) -> list[Case]:
        """The cases in the order of the report."""
        return [CASES[name] for name in self.cases]

    def rounds(self) -> int:
        """How many rounds any sample is of."""
        return len({sample.round for sample in self.samples})

    def troubles(self) -> list[str]:
        """One line for each sample that failed or dropped what it should not have."""
        lines = []
        for sample in self.samples:
            place = f"round {sample.round}, {sample.case}, {sample.system}"
            lines += [f"{place}: {text}" for text in (sample.error, *sample.problems) if text]
        return lines

    def to_json(self) -> str:
        """The whole, with a summary for whoever does not want to compute it again."""
        data = {"schema": SCHEMA, **asdict(self), "summary": list(self._summary())}
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Read `to_json` back; UsageError if it is none or of another schema."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise UsageError(f"schema {data['schema']} of the results, but this program reads {SCHEMA}")
            samples = [_sample(each) for each in data["samples"]]
            return cls(
                **{name: data[name] for name in ("machine", "versions", "baseline", "warnings")},
                # Those of before these could be chosen do not say them.
                settings=data["settings"]
                | {n: v for n, v in DEFAULT_TUNNEL.facts().items() if n not in data["settings"]},
                systems=tuple(data["systems"]),
                cases=tuple(_known_case(name) for name in data["cases"]),
                samples=samples,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"no results of this harness: {error!r}") from error

    def _by_round(self, case: str, system: str, figure: str) -> dict[int, float]:
        return {
            sample.round: sample.figures[figure]
            for sample in self.samples
            if (sample.case, sample.system) == (case, system) and figure in sample.figures
        }

    def _summary(self) -> Iterable[dict[str, Any]]:
        for case in self.used_cases():
            for system in self.systems:
                for column in (*case.columns, PSS):
                    if stat := self.stat(case.name, system, column.figure):
                        ratio = self.ratio(case.name, system, column.figure)
                        row = {"case": case.name, "system": system, "figure": column.figure, **asdict(stat)}
                        yield row | {"ratio": asdict(ratio) if ratio else None}


def pick_baseline(systems: Sequence[str], wanted: str | None) -> str:
    """What ratios refer to: as asked, else the last real release named, else the first; UsageError."""
    if wanted is not None:
        if wanted not in systems:
            raise UsageError(f"baseline {wanted!r} is not measured; there are {', '.join(systems)}")
        return wanted
    releases = [
        label for label in systems if label.startswith("nebula-") and not label.startswith("nebula-mp")
    ]
    tunnels = [label for label in systems if label != NONE]
    return [*releases[-1:], *tunnels, *systems][0]


def _sample(data: dict[str, Any]) -> Sample:
    return Sample(**{**data, "problems": tuple(data["problems"])})


def _known_case(name: str) -> str:
    if name not in CASES:
        raise UsageError(f"case {name!r} of the results is unknown here")
    return name
