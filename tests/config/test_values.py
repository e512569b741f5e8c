"""What Nebula makes of a spelling, and Go's durations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.config.values import format_duration, go_text, parse_bool, parse_duration, parse_int

# Left a plain scalar, right what nebula 1.11.0 printed for it: `logging.level: X` quotes X in its error.
# That program lowers the letters first, so NaN and the infinities are checked without case.
SPELLINGS = {
    "010": "8",
    "+010": "8",
    "-010": "-8",
    "00": "0",
    "08": "8",
    "0o10": "8",
    "0O7": "7",
    "0o1_0": "8",
    "0o78": "0o78",
    "0o-1": "-1",
    "-0o10": "-8",
    "-0o-1": "-0o-1",
    "0o": "0o",
    "0b11": "3",
    "0B11": "3",
    "-0b11": "-3",
    "0b-1": "-1",
    "0b12": "0b12",
    "0b": "0b",
    "0x1F": "31",
    "0X1F": "31",
    "+0x10": "16",
    "-0x10": "-16",
    "0x_1": "1",
    "0x_": "0x_",
    "0x1p4": "0x1p4",
    "0x8000000000000000": "9223372036854775808",
    "1_000": "1000",
    "1__0": "10",
    "1_": "1",
    "_1": "_1",
    "0_1": "1",
    "0777_1": "4089",
    "+12": "12",
    "9223372036854775808": "9223372036854775808",
    "+9223372036854775807": "9223372036854775807",
    "18446744073709551615": "18446744073709551615",
    "18446744073709551616": "1.8446744073709552e+19",
    "-9223372036854775809": "-9.223372036854776e+18",
    "1300.0": "1300",
    "123456.0": "123456",
    "1234567.0": "1.234567e+06",
    "100000.0": "100000",
    "1000000.0": "1e+06",
    "0.00001": "1e-05",
    "12e-3": "0.012",
    ".5": "0.5",
    "+.5": "0.5",
    "-.5": "-0.5",
    "-0.0": "-0",
    "1.": "1",
    "1.e3": "1000",
    "1e3": "1000",
    "1e5": "100000",
    "1e20": "1e+20",
    "1e3_0": "1e+30",
    "5e-324": "5e-324",
    "1e400": "1e400",
    ".": ".",
    "1:30": "1:30",
    "1:30:00": "1:30:00",
    "true": "true",
    "True": "true",
    "y": "y",
    "yes": "yes",
    "off": "off",
    "=": "=",
    "<<": "<<",
}


@pytest.mark.parametrize(("spelling", "text"), SPELLINGS.items(), ids=SPELLINGS)
def test_a_plain_scalar_reads_as_nebula_reads_it(spelling: str, text: str) -> None:
    assert go_text(spelling) == text


@pytest.mark.parametrize(
    ("spelling", "text"), [(".inf", "+inf"), ("+.inf", "+inf"), ("-.inf", "-inf"), (".nan", "nan")]
)
def test_what_is_no_number_has_a_name(spelling: str, text: str) -> None:
    named = go_text(spelling)

    assert named is not None
    assert named.lower() == text


@pytest.mark.parametrize("spelling", ["", "~", "null", "Null", "NULL"])
def test_null_is_not_set(spelling: str) -> None:
    assert go_text(spelling) is None


@given(st.text())
def test_any_spelling_has_a_reading(spelling: str) -> None:
    go_text(spelling)


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_decimal_integer_is_itself(number: int) -> None:
    assert go_text(str(number)) == str(number)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_keeps_its_value_through_go_s_notation(number: float) -> None:
    text = go_text(repr(number))

    assert text is not None
    assert float(text) == number


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "tRuE", "y", "Y", "yes", "YES"])
def test_words_for_true(text: str) -> None:
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "n", "N", "no", "No"])
def test_words_for_false(text: str) -> None:
    assert parse_bool(text) is False


@pytest.mark.parametrize("text", ["on", "off", "", "2", "truee", " true", "si"])
def test_other_words_are_neither(text: str) -> None:
    with pytest.raises(ValueError, match="^" + text):
        parse_bool(text)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("+12", 12), ("-3", -3), ("010", 10)])
def test_integers_are_decimal(text: str, number: int) -> None:
    assert parse_int(text) == number


@pytest.mark.parametrize("text", ["", " 1", "1 ", "1_000", "0x10", "1.0", "1e3", "٣", "--1", "9" * 401])
def test_other_integers_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_int(text)


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("-0", 0),
        ("+5s", 5 * SECOND),
        ("-2m", -120 * SECOND),
        ("1h2m3s4ms", 3723 * SECOND + 4_000_000),
        ("1.5h", 5400 * SECOND),
        (".5s", SECOND // 2),
        ("1.s", SECOND),
        ("1us1µs1μs1ns", 3001),
        ("3s1h", 3603 * SECOND),
        ("1s1s", 2 * SECOND),
        ("0.9999999999999999999999s", SECOND - 1),
        ("9223372036854775807ns", 2**63 - 1),
    ],
)
def test_go_durations_are_understood(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    "text",
    ["", "s", ".s", "+", "1", "30", "1 s", " 1s", "1s ", "1S", "1d", "1sec", "--1s", "1..5s", "1e3s", "1m2",
     "9223372036854775808ns", "2562048h", "9" * 401 + "s", "１s"],  # noqa: RUF001 - a wide digit on purpose
)  # fmt: skip
def test_what_go_refuses_as_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1_100, "1.1µs"),
        (2_200_000, "2.2ms"),
        (3_300_000_000, "3.3s"),
        (245 * SECOND, "4m5s"),
        (245 * SECOND + 1_000_000, "4m5.001s"),
        (18_367 * SECOND + 1_000_000, "5h6m7.001s"),
        (480_000_000_001, "8m0.000000001s"),
        (2**63 - 1, "2562047h47m16.854775807s"),
        (-1_500_000_000, "-1.5s"),
    ],
)
def test_durations_print_as_go_prints_them(nanoseconds: int, text: str) -> None:
    assert format_duration(nanoseconds) == text


@given(st.integers(-(2**63 - 1), 2**63 - 1))
def test_a_printed_duration_reads_back(nanoseconds: int) -> None:
    assert parse_duration(format_duration(nanoseconds)) == nanoseconds


@given(st.text(alphabet="0123456789.hmsnuµ+- "))
def test_any_text_is_a_duration_within_64_bits_or_a_value_error(text: str) -> None:
    try:
        value = parse_duration(text)
    except ValueError:
        return
    assert abs(value) < 2**63
