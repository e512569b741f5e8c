"""`nebula-mp stop`: ask a gateway to stop, and wait until it is gone.

Data flow: argv -> [cli.stop] -> cli.client -> exit code
"""

import argparse

from nebula_mp import cli
from nebula_mp.cli import client
from nebula_mp.errors import InstanceError

_WAIT_S = 10


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `stop` to the commands."""
    parser = subparsers.add_parser(
        "stop", help=cli.COMMANDS["stop"], description=cli.COMMANDS["stop"], allow_abbrev=False
    )
    client.add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Stop it; the exit code."""
    with client.connect(arguments) as gateway:
        gateway.call("stop")
        if not gateway.try_wait_gone(_WAIT_S):
            raise InstanceError(
                f"{gateway.name}: pid {gateway.pid} is still there after {_WAIT_S} s: kill {gateway.pid}"
            )
        client.say(f"{gateway.name}: stopped (pid {gateway.pid})")
    return 0
