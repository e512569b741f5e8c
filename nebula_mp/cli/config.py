"""`nebula-mp config validate`: everything that is wrong with a configuration, and nothing started.

Data flow: argv -> [cli.config] -> config.load, workers.pki -> stdout, exit code
The findings are what was asked for, so they go to stdout. Knows no key and no certificate.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nebula_mp import cli, clock
from nebula_mp.errors import ConfigError

JSON_SCHEMA = 1
"""Version of the object that --json prints; members are only ever added."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found: no problems means that `start` would accept the configuration."""

    problems: Sequence[str]
    warnings: Sequence[str]
    sources: Sequence[Path]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare `config` and its commands."""
    summary = cli.COMMANDS["config"]
    parser = subparsers.add_parser("config", help=summary, description=summary, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    about = "list every problem of a configuration and of its certificates; starts nothing"
    validate = commands.add_parser("validate", help=about, description=about, allow_abbrev=False)
    validate.add_argument(
        "-c",
        "-config",
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="a file, or a directory whose .yml and .yaml files are merged",
    )
    validate.add_argument("--strict", action="store_true", help="an unknown key is a problem, not a warning")
    validate.add_argument("--json", action="store_true", help="print one JSON object")
    validate.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; 0 if the configuration can be used, otherwise 1."""
    verdict = check(arguments.config, strict=arguments.strict)
    if arguments.json:
        print(json.dumps(_as_json(verdict)))
    else:
        print("\n".join(_lines(repr(str(arguments.config))[1:-1], verdict)))
    return 1 if verdict.problems else 0


def check(path: Path, *, strict: bool) -> Verdict:
    """Load the configuration and then the certificates and keys that it names."""
    # Imported here, so that `nebula-mp --help` need not wait for YAML and cryptography.
    from nebula_mp.config.load import load_config  # noqa: PLC0415
    from nebula_mp.workers.pki import load_pki  # noqa: PLC0415

    try:
        loaded = load_config(path, strict=strict)
    except ConfigError as error:
        return Verdict(error.problems, error.warnings, ())
    try:
        _, pki = load_pki(loaded, clock.wall_s())
    except ConfigError as error:
        return Verdict(error.problems, error.warnings, loaded.sources)
    return Verdict((), (*loaded.warnings, *pki.warnings), loaded.sources)


def _lines(path: str, verdict: Verdict) -> list[str]:
    lines = [*verdict.problems, *(f"warning: {warning}" for warning in verdict.warnings)]
    count = len(verdict.problems)
    if count:
        lines.append(
            f"{count} problem{'s' if count > 1 else ''}. "
            f"Next: correct and repeat nebula-mp config validate -c {path}"
        )
    else:
        lines.append(f"{path}: the configuration and its certificates are good")
    return lines


def _as_json(verdict: Verdict) -> dict[str, object]:
    return {
        "schema": JSON_SCHEMA,
        "valid": not verdict.problems,
        "problems": list(verdict.problems),
        "warnings": list(verdict.warnings),
        "sources": [str(source) for source in verdict.sources],
    }
