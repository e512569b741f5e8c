"""`nebula-mp reload`: make a gateway take over a changed configuration, all of it or nothing.

Data flow: argv -> [cli.reload] -> cli.client -> exit code
"""

import argparse

from nebula_mp import cli
from nebula_mp.cli import client

_WAIT_S = 30


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `reload` to the commands."""
    parser = subparsers.add_parser(
        "reload", help=cli.COMMANDS["reload"], description=cli.COMMANDS["reload"], allow_abbrev=False
    )
    client.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reload; the exit code is 1, and the old state stays, when anything in the new one is wrong."""
    with client.connect(arguments, timeout_s=_WAIT_S) as gateway:
        result = gateway.call("reload")
        for warning in result.get("warnings", ()):
            client.say(f"warning: {warning}")
        client.say(f"{gateway.name}: reloaded")
    return 0
