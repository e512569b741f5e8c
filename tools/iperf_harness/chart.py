"""Results as one SVG picture that is readable on white and on black.

Data flow: results -> [iperf_harness.chart] -> SVG file
A group of bars for each case, the result to the left and its cost to the right, each with a line from the
least to the greatest round. No script and no font of its own: a browser or a code host shows it as it is.
Source: SVG 1.1; prefers-color-scheme of CSS.
"""

from collections.abc import Iterator
from xml.sax.saxutils import escape

from tools.iperf_harness.cases import Case, Column
from tools.iperf_harness.results import Results, Stat
from tools.iperf_harness.table import ratio_text, shown

_WIDTH = 960
_LABEL_X = 16
_ROW = 20
_BAR = 12
_HEAD = 80
_GROUP_GAP = 46
_LABEL_MAX = 32
_PANELS = ((250, 170), (610, 170))  # where the bars of result and cost begin, and how long the longest is
_COLOURS = ("#4c78a8", "#f58518", "#3fa66b", "#b279a2", "#c9a227", "#d6616b", "#3aa3b3", "#8c8c8c")

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.page { fill: #ffffff } .title { font-size: 17px; font-weight: 600 } .case { font-weight: 600 }
.unit, .note { fill: #59636e; font-size: 12px } .whisker { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117 } .unit, .note { fill: #9198a1 } .whisker { stroke: #e6edf3 }
}
"""


def render(results: Results) -> str:
    """The picture as a whole document."""
    body: list[str] = []
    top = _HEAD
    for case in results.used_cases():
        body += _group(results, case, top)
        top += _GROUP_GAP + _ROW * len(results.systems)
    title = "Tunnels between two namespaces: what they move, and what it costs"
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    legend = f"medians, with a line from least to greatest; x: to {results.baseline}, round by round"
    machine = ", ".join(results.machine.values())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top + 24}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="page" width="{_WIDTH}" height="{top + 24}"/>',
            _text(_LABEL_X, 26, title, "title"),
            _text(_LABEL_X, 46, settings, "note"),
            _text(_LABEL_X, 64, legend, "note"),
            *body,
            _text(_LABEL_X, top + 8, machine, "note"),
            "</svg>\n",
        ]
    )


def _group(results: Results, case: Case, top: int) -> Iterator[str]:
    yield _text(_LABEL_X, top + 16, case.title, "case")
    for column, (left, _) in zip((case.result, case.cost), _PANELS, strict=True):
        better = "more is better" if column.more_is_better else "less is better"
        # Below the title, which may be longer than the room before the bars.
        yield _text(left, top + 32, f"{column.title}, {better}", "unit")
    for at, system in enumerate(results.systems):
        y = top + 38 + at * _ROW
        yield _text(
            _LABEL_X, y + _BAR, system if len(system) <= _LABEL_MAX else f"{system[: _LABEL_MAX - 1]}…"
        )
        for column, (left, length) in zip((case.result, case.cost), _PANELS, strict=True):
            yield from _bar(results, case, column, at, (left, y, length))


def _bar(results: Results, case: Case, column: Column, at: int, place: tuple[int, int, int]) -> Iterator[str]:
    left, y, length = place
    system, colour = results.systems[at], _COLOURS[at % len(_COLOURS)]
    stat = results.stat(case.name, system, column.figure)
    ratio = ratio_text(results.ratio(case.name, system, column.figure))
    end = left
    if stat is not None:
        scale = length / _greatest(results, case, column)
        width = stat.median * scale
        yield f'<rect x="{left}" y="{y + 2}" width="{width:.1f}" height="{_BAR}" rx="2" fill="{colour}"/>'
        yield from _whisker(stat, left, y + 2 + _BAR / 2, scale)
        end = left + round(max(stat.high, stat.median) * scale)
    yield _text(end + 6, y + _BAR, f"{shown(stat, column)}  {ratio}".rstrip())


def _whisker(stat: Stat, left: int, y: float, scale: float) -> Iterator[str]:
    if stat.count > 1:
        low, high = left + stat.low * scale, left + stat.high * scale
        yield f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'


def _greatest(results: Results, case: Case, column: Column) -> float:
    stats = (results.stat(case.name, system, column.figure) for system in results.systems)
    return max((stat.high for stat in stats if stat), default=0.0) or 1.0


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{style}>{escape(text)}</text>'
