"""`nebula-mp version`: the version, and what it runs on.

Data flow: argv -> [cli.version] -> stdout
"""

import argparse
import json
import platform
from importlib import metadata

from nebula_mp import __version__, cli

SCHEMA = 1
_LIBRARIES = ("cryptography", "protobuf", "uvloop", "pyroute2", "python-pytun")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `version` to the commands."""
    parser = subparsers.add_parser(
        "version", help=cli.COMMANDS["version"], description=cli.COMMANDS["version"], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show it; the exit code."""
    parts = {
        "kernel": "python",
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
    }
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "version": __version__, **parts}))
    else:
        print(
            f"nebula-mp {__version__} ({', '.join(f'{name} {version}' for name, version in parts.items())})"
        )
    return 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
