"""tools/iperf_harness: statistics, table, JSON, chart and progress, from recorded results."""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tools.iperf_harness import chart, cli, table
from tools.iperf_harness.cases import Sample
from tools.iperf_harness.progress import Progress, duration
from tools.iperf_harness.results import Results, Stat
from tools.iperf_harness.systems import UsageError


def sample(number: int, case: str, system: str, **figures: float) -> Sample:
    return Sample(round=number, case=case, system=system, figures=figures)


def recorded(*extra: Sample) -> Results:
    """Three rounds of which the second was disturbed for both systems, as neighbours do it."""
    speeds = {"nebula-1.11.0": (1.0, 0.4, 1.2), "nebula-mp": (4.0, 1.6, 4.2)}
    samples = [
        sample(at + 1, "tcp", system, gbit_per_s=speed, cpu_s_per_gb=2.0, pss_mb=30.0 + at, stolen_percent=at)
        for system, column in speeds.items()
        for at, speed in enumerate(column)
    ]
    return Results(
        machine={"CPU": "2 of Test"},
        settings={
            "topology": "direct",
            "rounds": "3",
            "cipher": "chachapoly",
            "overlay": "ipv6",
            "underlay": "ipv6",
        },
        versions={"nebula-mp": "0.1"},
        systems=("nebula-mp", "nebula-1.11.0"),
        cases=("tcp", "ping"),
        baseline="nebula-1.11.0",
        samples=[*samples, *extra],
    )


def test_a_figure_is_the_median_of_the_rounds_and_a_ratio_is_made_within_each() -> None:
    results = recorded()

    assert results.stat("tcp", "nebula-mp", "gbit_per_s") == Stat(4.0, 1.6, 4.2, 3)
    ratio = results.ratio("tcp", "nebula-mp", "gbit_per_s")
    assert ratio is not None
    assert dataclasses.astuple(ratio) == pytest.approx((4.0, 3.5, 4.0, 3))  # not 4.0 / 0.4
    assert results.ratio("tcp", "nebula-1.11.0", "gbit_per_s") is None
    assert results.stat("ping", "nebula-mp", "rtt_us") is None


def test_a_round_that_one_side_lacks_has_no_ratio() -> None:
    results = recorded(sample(4, "tcp", "nebula-mp", gbit_per_s=9.0))

    ratio = results.ratio("tcp", "nebula-mp", "gbit_per_s")

    assert ratio is not None
    assert ratio.count == 3


@pytest.mark.parametrize(
    ("stat", "text"),
    [
        pytest.param(None, "", id="none"),
        pytest.param(Stat(1.01, 0.9, 1.1, 3), "x 1.01 ~", id="on both sides of 1"),
        pytest.param(Stat(1.2, 1.1, 1.3, 3), "x 1.20", id="on one side"),
        pytest.param(Stat(1.0, 1.0, 1.0, 1), "x 1.00", id="a single round"),
        pytest.param(Stat(123.4, 120.0, 130.0, 3), "x 123", id="large"),
    ],
)
def test_a_ratio_says_when_the_rounds_do_not_agree(stat: Stat | None, text: str) -> None:
    assert table.ratio_text(stat) == text


def test_the_table_shows_medians_ranges_and_ratios() -> None:
    lines = [" ".join(line.split()) for line in table.render(recorded()).splitlines()]

    assert "Gbit/s range CPU-s/GB range retransmits machine-s/GB" in lines
    assert "nebula-mp 4.00 1.60..4.20 x 4.00 2.00 2.00..2.00 x 1.00 ~ - -" in lines
    assert "nebula-1.11.0 * 1.00 0.40..1.20 2.00 2.00..2.00 - -" in lines
    assert "nebula-mp 31.0 30.0..32.0" in lines
    assert "the host gave 1.0 % of the processors to others, up to 2.0 %" in lines


def test_figures_stand_below_each_other() -> None:
    lines = table.render(recorded()).splitlines()
    at = lines.index("TCP, one stream")

    ends = {
        line.index(text) + len(text)
        for line, text in zip(lines[at + 1 : at + 4], ("Gbit/s", "4.00", "1.00"), strict=True)
    }

    assert len(ends) == 1


def test_what_failed_or_was_dropped_is_named_under_the_table() -> None:
    lost = dataclasses.replace(sample(1, "ping", "nebula-mp", rtt_us=70.0), problems=("2 of 500 pings lost",))
    broken = Sample(round=2, case="ping", system="nebula-mp", error="node a ended with -9")

    text = table.render(recorded(lost, broken))

    assert "round 1, ping, nebula-mp: 2 of 500 pings lost" in text
    assert "round 2, ping, nebula-mp: node a ended with -9" in text
    assert "nothing was dropped" not in text
    assert "nothing was dropped" in table.render(recorded())


def test_results_survive_json_and_bring_a_summary() -> None:
    results = recorded(
        Sample(round=1, case="ping", system="nebula-mp", error="no reply", notes={"congestion": "cubic"})
    )

    text = results.to_json()

    assert Results.from_json(text) == results
    summary = {(row["case"], row["system"], row["figure"]): row for row in json.loads(text)["summary"]}
    assert summary["tcp", "nebula-mp", "gbit_per_s"]["ratio"]["median"] == 4.0
    assert summary["tcp", "nebula-1.11.0", "gbit_per_s"]["ratio"] is None


def test_results_of_before_the_ip_versions_could_be_chosen_are_those_of_ipv4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = json.loads(recorded().to_json())
    old["settings"] = {"topology": "direct", "cipher": "aes"}
    source = tmp_path / "old.json"
    source.write_text(json.dumps(old))

    code = cli.main(["--from", str(source)])

    assert code == 0
    assert "topology direct, cipher aes, overlay ipv4, underlay ipv4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"schema": 99}, "schema 99", id="another schema"),
        pytest.param({"cases": ["sctp"]}, "case 'sctp'", id="a case of another version"),
        pytest.param({"samples": [{}]}, "no results", id="a sample that is none"),
    ],
)
def test_results_of_something_else_are_refused(change: dict[str, Any], said: str) -> None:
    text = json.dumps({**json.loads(recorded().to_json()), **change})

    with pytest.raises(UsageError, match=said):
        Results.from_json(text)


def test_recorded_results_are_shown_again_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    source, picture = tmp_path / "run.json", tmp_path / "run.svg"
    source.write_text(recorded().to_json())

    code = cli.main(["--from", str(source), "--svg", str(picture)])

    assert code == 0
    assert capsys.readouterr().out == table.render(recorded())
    assert picture.read_text() == chart.render(recorded())


def test_the_chart_is_well_formed_and_its_longest_bar_is_the_greatest_median() -> None:
    results = dataclasses.replace(recorded(), machine={"CPU": "<R&D>"})

    root = ET.fromstring(chart.render(results))

    shapes = "{http://www.w3.org/2000/svg}"
    bars = [rect for rect in root.iter(f"{shapes}rect") if rect.get("class") is None]
    widths = [float(bar.get("width", 0)) for bar in bars[::2]]
    texts = [text.text or "" for text in root.iter(f"{shapes}text")]
    assert len(bars) == 4  # two systems, result and cost, of the one case that was measured
    assert widths[0] == pytest.approx(4 * widths[1], abs=0.2)
    assert "4.00  x 4.00" in texts
    assert "<R&D>" in texts
    style = root.findtext(f"{shapes}style") or ""
    assert "prefers-color-scheme: dark" in style


def test_the_bar_tells_how_much_is_left_and_disappears_at_the_end() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now, terminal = [0.0], Terminal()
    progress = Progress(terminal, 8, clock=lambda: now[0])

    for step in range(5):
        now[0] = 30.0 * step
        progress.begin(f"step {step}")
    progress.close()

    assert "[############............] 4/8 step 4, 2 m 00 s left" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_without_a_terminal_there_is_a_line_for_each_round() -> None:
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, 8, clock=lambda: now[0])

    progress.begin("step")
    now[0] = 12.0
    progress.round_done("round 1/1")
    progress.close()

    assert stream.getvalue() == "round 1/1 after 12 s\n"
    assert duration(59.6) == "1 m 00 s"
