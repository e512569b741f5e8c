"""Command lines in the style of Go programs, on top of argparse.

Data flow: argv -> [cli.go_flags] -> argparse -> cli.cert
`-name x`, `--name x`, `-name=x` and `--name=x` are one and the same; a value may start with a dash;
`-json=false` switches a flag off. Knows nothing of what the flags mean.
Source: https://pkg.go.dev/flag, "Command line flag syntax"; https://pkg.go.dev/time#ParseDuration.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})

_NS = {
    "ns": 1,
    "us": 10**3,
    "\u00b5s": 10**3,  # micro sign
    "\u03bcs": 10**3,  # Greek letter mu
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_DURATION = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([a-z\u00b5\u03bc]+)")
_INT64_MAX = 2**63 - 1


class GoFlagParser(argparse.ArgumentParser):
    """An argument parser whose flags are declared with `add_flag` and `add_switch`. Takes no positionals.

    argparse knows the flags for help and completion; which argument is a flag and which its value is
    decided here, because argparse takes values that start with a dash for flags.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=False)
        self._flags: dict[
            str, tuple[Callable[[str], Any], bool]
        ] = {}  # kind; whether it goes without a value
        self.add_argument("-h", "-help", "--help", action="help", help="show this text")

    def add_flag(
        self,
        name: str,
        kind: Callable[[str], Any] = str,
        *,
        default: Any = "",
        help: str,  # noqa: A002 - as in argparse
    ) -> None:
        """Declare a flag with a value. `kind` raises ArgumentTypeError for a bad one."""
        self._flags[name] = kind, False
        shown = f" (default {default})" if default not in ("", 0) else ""
        self.add_argument(
            f"-{name}",
            f"--{name}",
            type=kind,
            default=default,
            metavar=kind.__name__.removeprefix("parse_"),
            help=help + shown,
        )

    def add_switch(self, name: str, *, help: str) -> None:  # noqa: A002 - as in argparse
        """Declare a flag that is on when it is there."""
        self._flags[name] = parse_bool, True
        self.add_argument(f"-{name}", f"--{name}", action="store_true", help=help)

    # argparse calls this for sub-commands too, which makes it the one place to take arguments over.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Give the namespace and no rest; mistakes and help end the program as in argparse."""
        given = list(self._split(args or ()))
        namespace, _ = super().parse_known_args([], namespace)
        for name, value in given:
            kind, _ = self._flags[name]
            try:
                setattr(namespace, name.replace("-", "_"), kind(value))
            except argparse.ArgumentTypeError as error:
                self.error(f"argument -{name}: {error}")
        return namespace, []

    def _split(self, args: Sequence[str]) -> Iterator[tuple[str, str]]:
        rest = iter(args)
        for token in rest:
            if not token.startswith("-") or token in {"-", "--"}:
                self.error(f"unexpected argument {token!r}; every argument here is a flag")
            name, equals, value = token.removeprefix("-").removeprefix("-").partition("=")
            if name in {"h", "help"}:
                self.print_help()
                self.exit()
            if name not in self._flags:
                self.error(f"flag provided but not defined: -{name}")
            _, is_switch = self._flags[name]
            if not equals:
                following = "true" if is_switch else next(rest, None)
                if following is None:
                    self.error(f"flag needs an argument: -{name}")
                value = following
            yield name, value


def parse_bool(text: str) -> bool:
    """`true`, `false` and the short forms that Go takes."""
    if text not in _TRUE | _FALSE:
        raise argparse.ArgumentTypeError(f'"{text}" is neither true nor false')
    return text in _TRUE


def parse_uint(text: str) -> int:
    """Decimal digits."""
    if not re.fullmatch(r"[0-9]+", text):
        raise argparse.ArgumentTypeError(f'"{text}" is not a number')
    return int(text)


def parse_duration(text: str) -> int:
    """`1h30m`, `1.5h`, `300ms`, `-2s` or `0`, as nanoseconds."""
    sign = -1 if text.startswith("-") else 1
    unsigned = text[1:] if text[:1] in {"-", "+"} else text
    if unsigned == "0":
        return 0
    parts = list(_DURATION.finditer(unsigned))
    covered = "".join(part.group() for part in parts)
    if not parts or covered != unsigned or any(part[2] not in _NS for part in parts):
        raise argparse.ArgumentTypeError(f'"{text}" is not a duration; write 8760h, 90m or 30s')
    total = int(sum(Fraction(part[1]) * _NS[part[2]] for part in parts))
    if total > _INT64_MAX:
        raise argparse.ArgumentTypeError(f'"{text}" is too long; the longest duration is 292 years')
    return sign * total
