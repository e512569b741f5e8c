"""What a machine with many cores could do, from what one node does alone.

    python -m tests.bench.alone --json alone.json
    python -m tests.bench.prediction alone.json --workers 4 16

Prints two tables in Markdown: the costs, and packets/s and Gbit/s for so many workers that drain their own rings.
docs/performance.md has the formulas, and what they leave out: `--extra-us` is for that.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

READER, WRITER = "reader", "writer"
_BYTES: Final = {
    "64": 64.0,
    "512": 512.0,
    "1300": 1300.0,
    "tcp": 1300.0,
    "imix": (7 * 64 + 4 * 576 + 1300) / 12,
}

Costs = Mapping[tuple[str, str, str, str], Sequence[float]]
"""Kernel, role, shape and drain mode: microseconds of CPU a packet, of the reader and perhaps of the writer."""


def rate(out_us: float, in_us: float, *, out_share: float, workers: int = 1, extra_us: float = 0.0) -> float:
    """Packets/s of so many workers, each of which has a core for both directions, equally loaded."""
    cost_us = out_share * out_us + (1 - out_share) * in_us + extra_us
    return workers * 1e6 / cost_us


def costs_of(found: Mapping[str, Any]) -> Costs:
    """Of a file that `tests.bench.alone` wrote."""
    return {
        (case["kernel"], case["role"], case["shape"], case["drain"]): list(case["cpu_us_per_packet"].values())
        for case in found["cases"]
    }


def _kernels_and_shapes(costs: Costs) -> Iterator[tuple[str, str]]:
    yield from dict.fromkeys((kernel, shape) for kernel, _, shape, _ in costs)


def _figure(packets_per_s: float, shape: str) -> str:
    return f"{packets_per_s / 1e6:.2f} M, {packets_per_s * _BYTES[shape] * 8 / 1e9:.1f} Gbit/s"


def cost_table(costs: Costs) -> Iterator[str]:
    """What one packet costs, and what follows for one reader, and for one reader with its writer."""
    yield "| kernel | role | packets | reader alone, µs | a core does | reader + writer, µs | two cores do |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: |"
    for kernel, shape in _kernels_and_shapes(costs):
        for role in ("tx", "rx", "relay"):
            alone = costs.get((kernel, role, shape, READER))
            pair = costs.get((kernel, role, shape, WRITER))
            if alone is None and pair is None:
                continue
            cells = [kernel, role, shape]
            cells += ["", ""] if alone is None else [f"{alone[0]:.2f}", _figure(1e6 / alone[0], shape)]
            if pair is None:
                cells += ["", ""]
            else:
                cells += [" + ".join(f"{each:.2f}" for each in pair), _figure(1e6 / max(pair), shape)]
            yield f"| {' | '.join(cells)} |"


def prediction_table(costs: Costs, workers: Sequence[int], extra_us: float) -> Iterator[str]:
    """For workers that drain their own rings, half of the packets going each way."""
    yield f"| kernel | packets | {' | '.join(f'{each} workers' for each in workers)} |"
    yield f"| --- | --- |{' ---: |' * len(workers)}"
    for kernel, shape in _kernels_and_shapes(costs):
        out, into = (costs.get((kernel, role, shape, READER)) for role in ("tx", "rx"))
        if out is None or into is None:
            continue
        rates = (rate(out[0], into[0], out_share=0.5, workers=each, extra_us=extra_us) for each in workers)
        yield f"| {kernel} | {shape} | {' | '.join(_figure(each, shape) for each in rates)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("found", type=Path, help="written by tests.bench.alone")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--extra-us", type=float, default=0.0, help="what the driver costs for each packet")
    chosen = parser.parse_args()
    costs = costs_of(json.loads(chosen.found.read_text()))
    print(*cost_table(costs), "", *prediction_table(costs, chosen.workers, chosen.extra_us), sep="\n")


if __name__ == "__main__":
    main()
