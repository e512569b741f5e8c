"""Results as text for a terminal or a commit message.

Data flow: results -> [iperf_harness.table] -> stdout
Knows no files. Every figure is a median of the rounds; the range beside it is least to greatest.
"""

from collections.abc import Iterator, Sequence

from tools.iperf_harness.cases import PSS, Case, Column
from tools.iperf_harness.results import Results, Stat

_NOTHING = "-"
_TROUBLES_MAX = 20


def render(results: Results) -> str:
    """The whole report; ends with a line break."""
    lines = [*_head(results)]
    for case in results.used_cases():
        lines += ["", case.title, *_aligned(_rows(results, case))]
    if any(results.memory(system) for system in results.systems):
        lines += ["", "Memory of both nodes, all cases", *_aligned(_memory_rows(results))]
    lines += ["", *_foot(results)]
    return "".join(f"{line}\n" for line in lines)


def shown(stat: Stat | None, column: Column) -> str:
    """The median in the column's unit."""
    return _NOTHING if stat is None else f"{stat.median / column.scale:,.{column.digits}f}"


def spread(stat: Stat | None, column: Column) -> str:
    """Least to greatest; empty for a single value, which has none."""
    if stat is None or stat.count < 2:
        return ""
    low, high = (f"{value / column.scale:,.{column.digits}f}" for value in (stat.low, stat.high))
    return f"{low}..{high}"


def ratio_text(stat: Stat | None) -> str:
    """The median ratio; `~` when the rounds do not agree on which side of 1 it is."""
    if stat is None:
        return ""
    text = f"x {stat.median:.2f}" if stat.median < 100 else f"x {stat.median:.0f}"
    return f"{text} ~" if stat.count > 1 and stat.low <= 1 <= stat.high else text


def _head(results: Results) -> Iterator[str]:
    for facts in (results.machine, results.settings):
        yield ", ".join(f"{name} {value}" for name, value in facts.items())
    for system, version in results.versions.items():
        yield f"{system}: {version}"
    for warning in results.warnings:
        yield f"note: {warning}"


def _rows(results: Results, case: Case) -> Iterator[list[str]]:
    more = [column.title for column in case.more]
    span = "range" if results.rounds() > 1 else ""
    yield ["", case.result.title, span, "", case.cost.title, span, "", *more]
    for system in results.systems:
        row = [_label(results, system)]
        for column in (case.result, case.cost):
            stat = results.stat(case.name, system, column.figure)
            ratio = results.ratio(case.name, system, column.figure)
            row += [shown(stat, column), spread(stat, column), ratio_text(ratio)]
        row += [shown(results.stat(case.name, system, column.figure), column) for column in case.more]
        yield row


def _memory_rows(results: Results) -> Iterator[list[str]]:
    yield ["", PSS.title, "range"]
    for system in results.systems:
        stat = results.memory(system)
        yield [_label(results, system), shown(stat, PSS), spread(stat, PSS)]


def _label(results: Results, system: str) -> str:
    return f"{system} *" if system == results.baseline and len(results.systems) > 1 else system


def _aligned(rows: Iterator[list[str]]) -> list[str]:
    """The first column to the left, figures to the right; an empty column takes no room."""
    table = list(rows)
    widths = [max(len(row[at]) for row in table) for at in range(len(table[0]))]
    return [_line(row, widths) for row in table]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True) if width]
    return f"  {row[0]:<{widths[0]}}  {'  '.join(cells)}".rstrip()


def _foot(results: Results) -> Iterator[str]:
    if len(results.systems) > 1:
        yield f"* ratios (x) are to {results.baseline}, round by round; ~: no difference beyond the spread"
    if results.rounds() < 2:
        yield "one round has no spread: take the figures for a hint"
    if (stolen := results.stolen_percent()) and stolen.high >= 1:
        yield f"the host gave {stolen.median:.1f} % of the processors to others, up to {stolen.high:.1f} %"
    troubles = results.troubles()
    if not troubles:
        yield "nothing was dropped where nothing should be, and nothing failed"
        return
    yield f"failed, or dropped where nothing should be, in {len(troubles)} of {len(results.samples)}:"
    yield from (f"  {line}" for line in troubles[:_TROUBLES_MAX])
    if len(troubles) > _TROUBLES_MAX:
        yield f"  and {len(troubles) - _TROUBLES_MAX} more, all in the JSON"
