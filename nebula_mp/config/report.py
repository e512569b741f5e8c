"""Places in configuration files, and everything found wrong at them.

Data flow: config.yaml_source, config.load -> [config.report] -> ConfigError, warnings
Collects instead of raising, so that an operator sees every problem at once. Knows no key and no YAML.
Secrets: file contents enter a message only through `shown`, which withholds whatever may be key material.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nebula_mp.errors import ConfigError

SHOWN_CHARACTERS = 80
_KEY_MATERIAL = re.compile(r"-----|PRIVATE KEY|[A-Za-z0-9+/]{24,}")
_HEX = re.compile(r"[0-9A-Fa-f]+")


class Place(NamedTuple):
    """A character of a file; line and column count from 1. Line 0 means the file as a whole.

    Orders by file as it was loaded.
    """

    file_number: int
    line: int
    column: int
    file: Path

    def __str__(self) -> str:
        """`config.yml:3:9`, or `config.yml`."""
        file = path_shown(self.file)
        return file if self.line == 0 else f"{file}:{self.line}:{self.column}"


class Finding(NamedTuple):
    """One thing to tell the operator. `key` is dotted, empty when it is about the file itself."""

    place: Place
    key: str
    text: str

    def __str__(self) -> str:
        """`config.yml:3:9: listen.port: found ...`."""
        return f"{self.place}: {self.key}: {self.text}" if self.key else f"{self.place}: {self.text}"


@dataclass(slots=True)
class Report:
    """Problems and warnings, in any order; given back in the order of the files, without repetitions."""

    _problems: list[Finding] = field(default_factory=list)
    _warnings: list[Finding] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)

    def problem(self, place: Place, key: str, text: str) -> None:
        """Record something that forbids the use of the configuration."""
        self._problems.append(Finding(place, key, text))

    def warning(self, place: Place, key: str, text: str) -> None:
        """Record something the operator should know."""
        self._warnings.append(Finding(place, key, text))

    def note(self, text: str) -> None:
        """Record a warning about several places at once; notes come after the other warnings."""
        self._notes.append(text)

    def raise_problems(self) -> None:
        """Raise ConfigError with all problems, if there are any."""
        if self._problems:
            raise ConfigError(*_lines(self._problems), warnings=self.warnings())

    def warnings(self) -> tuple[str, ...]:
        """One line for each."""
        return (*_lines(self._warnings), *self._notes)


def _lines(findings: list[Finding]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(finding) for finding in sorted(findings)))


def path_shown(path: Path) -> str:
    """Give the name of a file, escaped if a terminal could not print it."""
    text = str(path)
    return text if text.isprintable() else repr(text)[1:-1]


def shown(text: str) -> str:
    """`text` in double quotes, safe for a terminal and a log: short, printable, never a key.

    Fingerprints are hexadecimal and stay readable; long runs of base64 do not.
    """
    if any(_HEX.fullmatch(run) is None for run in _KEY_MATERIAL.findall(text)):
        return "<not shown, it may be a key>"
    if "\n" in text:
        return f"<a text of {text.count(chr(10)) + 1} lines>"
    if len(text) > SHOWN_CHARACTERS:
        text = text[: SHOWN_CHARACTERS - 3] + "..."
    return json.dumps(text, ensure_ascii=not text.isprintable())
