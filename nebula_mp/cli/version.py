"""`nebula-mp version`: the version, what it runs on, and which kernel `mp.kernel: auto` means here.

Data flow: argv, datapath.kernels -> [cli.version] -> stdout
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
    # No other command without a configuration needs it.
    from nebula_mp.config.model import KernelChoice  # noqa: PLC0415
    from nebula_mp.datapath import kernels  # noqa: PLC0415

    kernel = kernels.choose(KernelChoice.AUTO)
    parts = {
        "kernel": kernel.name,
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
    }
    if arguments.json:
        print(
            json.dumps(
                {"schema": SCHEMA, "version": __version__, **parts, "accelerator_not_used": kernel.reason}
            )
        )
    else:
        print(
            f"nebula-mp {__version__} ({', '.join(f'{name} {version}' for name, version in parts.items())})"
        )
        if kernel.reason is not None:
            print(f"accelerator not used: {kernel.reason}")
    return 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
