"""How Nebula reads a scalar: what YAML makes of its spelling, and what Go then makes of that.

Data flow: spelling of a scalar -> [config.values] -> number, truth value, duration
Nebula turns every scalar into a string first and parses that string for the type it wants; where the string
does not parse it takes the default without a word. Here that raises ValueError.
One spelling is read otherwise: a plain date stays text, where Go would make a point in time of it.
Source: slackhq/nebula config/config.go; go.yaml.in/yaml/v3 (plain scalars); Go's strconv, time.ParseDuration.
tests/config/test_values.py holds spellings and what Nebula 1.11.0 printed for them.
"""

import re
from decimal import Decimal

_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_TRUES = frozenset(("true", "True", "TRUE"))
_FALSES = frozenset(("false", "False", "FALSE"))
_INFINITIES = {
    f"{sign}.{word}": f"{sign or '+'}Inf" for sign in ("", "+", "-") for word in ("inf", "Inf", "INF")
}
_NANS = frozenset((".nan", ".NaN", ".NAN"))
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|([1-9][0-9]*|0))")
_ODD_SIGN = re.compile(r"0([bo])([-+]?[0-9]+)")
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_DIGITS_MAX = 400  # a longer number is no setting, and Python refuses to convert very long ones
_INT64_MAX = 2**63 - 1
_UINT64_MAX = 2**64 - 1

_BOOLS = {
    **dict.fromkeys(("1", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "f", "false", "n", "no"), False),
}

_UNITS_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,  # U+00B5 micro sign
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_DURATION_PART = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")


def go_text(spelling: str) -> str | None:
    """Give the string Go prints for a plain (unquoted) YAML scalar; None when it means null.

    `010` is 8, `1_000` is 1000, `1e3` is 1000, `1000000.0` is 1e+06; `yes` and `1:30` stay what they are.
    """
    if spelling in _NULLS:
        return None
    if spelling in _TRUES:
        return "true"
    if spelling in _FALSES:
        return "false"
    if spelling in _INFINITIES:
        return _INFINITIES[spelling]
    if spelling in _NANS:
        return "NaN"
    if spelling[0] not in "+-.0123456789" or len(spelling) > _DIGITS_MAX:
        return spelling
    number = spelling if spelling[0] == "." else spelling.replace("_", "")
    integer = _go_integer(number)
    if integer is not None:
        return str(integer)
    if _FLOAT.fullmatch(number) and abs(float(number)) != float("inf"):
        return _go_float(float(number))
    return spelling


def _go_integer(number: str) -> int | None:
    """Base by prefix as in strconv.ParseInt(s, 0, 64), then ParseUint, then yaml's own two prefixes."""
    if match := _INTEGER.fullmatch(number):
        sign, *digits = match.groups()
        base, text = next((b, d) for b, d in zip((16, 2, 8, 10), digits, strict=True) if d)
        value = -int(text, base) if sign == "-" else int(text, base)
        if -_INT64_MAX - 1 <= value <= _INT64_MAX or (not sign and value <= _UINT64_MAX):
            return value
    elif match := _ODD_SIGN.fullmatch(number):
        try:
            return int(match[2], 2 if match[1] == "b" else 8)
        except ValueError:
            return None
    return None


def _go_float(number: float) -> str:
    """Print as `%v` does: the shortest digits, with an exponent below 1e-4 and from 1e6."""
    sign, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    assert isinstance(exponent, int)  # infinities and NaN never come here
    text = "".join(map(str, digits))
    point = len(text) + exponent  # position of the decimal point, counted from the first digit
    prefix = "-" if sign else ""
    if number == 0:
        return f"{prefix}0"
    if not -4 <= point - 1 < 6:
        mantissa = f"{text[0]}.{text[1:]}" if len(text) > 1 else text
        return f"{prefix}{mantissa}e{'-' if point < 1 else '+'}{abs(point - 1):02d}"
    if point <= 0:
        return f"{prefix}0.{'0' * -point}{text}"
    if point >= len(text):
        return f"{prefix}{text}{'0' * (point - len(text))}"
    return f"{prefix}{text[:point]}.{text[point:]}"


def parse_bool(text: str) -> bool:
    """1/t/true/y/yes and their opposites, in any case; ValueError otherwise (`on` and `off` too)."""
    try:
        return _BOOLS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def parse_int(text: str) -> int:
    """Decimal digits with an optional sign, nothing around them; ValueError otherwise."""
    if not _DECIMAL.fullmatch(text) or len(text) > _DIGITS_MAX:
        raise ValueError(text)
    return int(text)


def parse_duration(text: str) -> int:
    """Nanoseconds of a Go duration: `1h2m3s4ms`, `1.5s`, `-2m`, `0`. ValueError if Go would refuse it."""
    sign, body = (text[0], text[1:]) if text[:1] in {"+", "-"} else ("+", text)
    if body == "0":
        return 0
    total = 0
    at = 0
    while match := _DURATION_PART.match(body, at):
        whole, fraction, unit = match[1], match[2] or "", match[3]
        if not whole + fraction or len(whole) > _DIGITS_MAX:
            raise ValueError(text)
        fraction = fraction[:18]  # nothing behind it is a whole nanosecond, even of an hour
        total += int(whole or "0") * _UNITS_NS[unit]
        total += int(fraction or "0") * _UNITS_NS[unit] // 10 ** len(fraction)
        at = match.end()
    if at == 0 or at != len(body) or total > _INT64_MAX:
        raise ValueError(text)
    return -total if sign == "-" else total


def format_duration(nanoseconds: int) -> str:
    """Print as Go does: `1h2m3.004s`, `250ms`, `1.5µs`, `0s`."""
    if nanoseconds == 0:
        return "0s"
    sign, rest = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    for unit, limit in (("ns", 1_000), ("µs", 1_000_000), ("ms", 1_000_000_000)):
        if rest < limit:
            return f"{sign}{_with_fraction(rest, _UNITS_NS[unit])}{unit}"
    minutes, below = divmod(rest, _UNITS_NS["m"])
    hours, minutes = divmod(minutes, 60)
    seconds = f"{_with_fraction(below, _UNITS_NS['s'])}s"
    if hours:
        return f"{sign}{hours}h{minutes}m{seconds}"
    return f"{sign}{minutes}m{seconds}" if minutes else f"{sign}{seconds}"


def _with_fraction(value: int, unit: int) -> str:
    whole, below = divmod(value, unit)
    return f"{whole}.{str(below).zfill(len(str(unit)) - 1).rstrip('0')}" if below else str(whole)
