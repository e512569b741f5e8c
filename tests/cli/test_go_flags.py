import argparse
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cli.go_flags import GoFlagParser, parse_duration, parse_uint


def parser() -> GoFlagParser:
    made = GoFlagParser(prog="prog", description="about")
    made.add_flag("name", help="a text")
    made.add_flag("out-key", default="ca.key", help="a path")
    made.add_flag("count", parse_uint, default=7, help="a number")
    made.add_flag("duration", parse_duration, default="1h", help="a span")
    made.add_switch("json", help="a switch")
    return made


@pytest.mark.parametrize("argv", [["-name", "x"], ["--name", "x"], ["-name=x"], ["--name=x"]], ids=" ".join)
def test_one_or_two_dashes_and_blank_or_equals_are_all_the_same(argv: list[str]) -> None:
    assert parser().parse_args(argv).name == "x"


@pytest.mark.parametrize("value", ["-", "--", "-x", "--name", "-5s", "a=b", "=", "", " ", "-h"])
@pytest.mark.parametrize("dashes", ["-", "--"])
def test_whatever_follows_a_flag_is_its_value(dashes: str, value: str) -> None:
    assert parser().parse_args([f"{dashes}out-key", value, "-name=y"]).out_key == value
    assert parser().parse_args([f"{dashes}out-key={value}", "-name=y"]).out_key == value


def test_flags_left_out_have_their_defaults_as_values_of_their_kind() -> None:
    values = vars(parser().parse_args([]))

    assert values == {"name": "", "out_key": "ca.key", "count": 7, "duration": 3600 * 10**9, "json": False}


def test_the_last_of_several_counts() -> None:
    assert parser().parse_args(["-name", "x", "--name=y"]).name == "y"


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["-json"], True),
        (["--json"], True),
        (["-json=true"], True),
        (["-json=1"], True),
        (["-json=false"], False),
        (["-json=F"], False),
        (["-json", "-json=0"], False),
        (["-json", "-name", "x"], True),
    ],
)
def test_switches_go_without_a_value_or_take_one_after_equals(argv: list[str], value: bool) -> None:
    assert parser().parse_args(argv).json is value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param(["-nam", "x"], "flag provided but not defined: -nam", id="abbreviation"),
        pytest.param(["-x=y"], "flag provided but not defined: -x", id="unknown"),
        pytest.param(["-name"], "flag needs an argument: -name", id="no value"),
        pytest.param(["x"], "unexpected argument 'x'", id="no flag"),
        pytest.param(["-json", "true"], "unexpected argument 'true'", id="value of a switch without equals"),
        pytest.param(["--", "-name"], "unexpected argument '--'", id="end of flags"),
        pytest.param(["-"], "unexpected argument '-'", id="lone dash"),
        pytest.param(["---name", "x"], "flag provided but not defined: --name", id="three dashes"),
        pytest.param(["-json=maybe"], '"maybe" is neither true nor false', id="no truth"),
        pytest.param(["-count", "x"], '"x" is not a number', id="no number"),
        pytest.param(["-count", "-1"], '"-1" is not a number', id="negative"),
        pytest.param(["-duration", "1d"], '"1d" is not a duration', id="no duration"),
    ],
)
def test_mistakes_are_said_on_stderr_with_exit_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)

    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("argv", [["-h"], ["-help"], ["--help"], ["-name", "x", "-h"]], ids=" ".join)
def test_help_is_on_stdout_with_exit_code_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(argv)

    assert caught.value.code == 0
    assert "a path (default ca.key)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0),
        ("-0", 0),
        ("8760h", 8760 * 3600 * 10**9),
        ("1h30m", 5400 * 10**9),
        ("1.5h", 5400 * 10**9),
        (".5s", 5 * 10**8),
        ("1.s", 10**9),
        ("1m1s1ms1us1ns", 61_001_001_001),
        ("1\N{MICRO SIGN}s", 1000),
        ("1\N{GREEK SMALL LETTER MU}s", 1000),
        ("+2s", 2 * 10**9),
        ("-2s", -2 * 10**9),
        ("2540400h", 2540400 * 3600 * 10**9),
        ("0.3333333333333333333h", 1_199_999_999_999),
    ],
)
def test_durations_are_those_of_go(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize(
    "text", ["", "1", "h", ".s", "1 h", "1h ", "1d", "1h-1m", "--1h", "1e3s", "1H", "2562048h"]
)
def test_what_is_no_duration_in_go_is_none_here(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_duration(text)


@given(st.text(max_size=10) | st.text("0123456789.-+hmsnu", max_size=10))
def test_any_text_is_a_duration_or_an_argument_error(text: str) -> None:
    with suppress(argparse.ArgumentTypeError):
        assert isinstance(parse_duration(text), int)
