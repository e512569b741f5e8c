"""The command `nebula-mp`: the tree of commands, and what the end of each means.

Data flow: argv -> [cli] -> one module per command -> exit code
A module is imported only for a command that is named, so that help, version and mistakes are answered at
once. Without a command, Nebula's own flags work as they do there: `nebula-mp -config FILE [-test]`.
Exit codes: 0 good, 1 failed, 2 usage, 3 not running, 4 needs root or a capability, 5 was running and lost
something it cannot live without.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from nebula_mp import __version__
from nebula_mp.errors import ConfigError, InstanceError, NebulaError, SystemCallError

COMMANDS = {
    "start": "run a gateway in the foreground; systemd and you use the same",
    "stop": "stop a running gateway",
    "reload": "make a running gateway read its configuration, certificate and keys again",
    "status": "show a running gateway and its tunnels",
    "workers": "show the processes of a running gateway: where they run and what they carry",
    "config": "check configuration files",
    "cert": "make CAs, keys and certificates, print and verify them; same flags as nebula-cert",
    "demo": "two nodes in network namespaces: handshake, ping and throughput, then cleaned up",
    "version": "show the version and what it runs on",
}
"""Each has a module of its name here with `add_parser(subparsers)`, which sets `run(arguments) -> int`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code. Every error is one message on stderr, never a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = build_parser(words)
        arguments = parser.parse_args(words)
        run: Callable[[argparse.Namespace], int] = arguments.run
        code = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return 1
    except NebulaError as error:
        _complain(error)
        return exit_code(error)
    except Exception as error:
        if os.environ.get("NEBULA_MP_TRACEBACK"):
            raise
        _complain(f"unexpected {type(error).__name__}: {error} (NEBULA_MP_TRACEBACK=1 shows where)")
        return 1
    return code


def exit_code(error: NebulaError) -> int:
    """Give what the process should end with after `error`."""
    return error.exit_code if isinstance(error, SystemCallError | InstanceError) else 1


def _complain(error: object) -> None:
    # Problems in a configuration begin with file:line:column, as editors and people like them.
    if isinstance(error, ConfigError):
        print(*(f"warning: {warning}" for warning in error.warnings), error, sep="\n", file=sys.stderr)
    else:
        print(f"nebula-mp: {error}", file=sys.stderr)


def build_parser(named: Container[str] | None = None) -> argparse.ArgumentParser:
    """Give the parser. Commands not in `named` are listed but have no options; None: all are complete."""
    parser = argparse.ArgumentParser(
        prog="nebula-mp",
        description="A Nebula overlay network gateway. Nebula's own flags work without a command.",
        epilog="nebula-mp COMMAND --help explains one command.",
        allow_abbrev=False,
        add_help=False,
    )
    add_nebula_flags(parser)
    parser.set_defaults(run=lambda arguments: _run_like_nebula(parser, arguments))
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        if named is None or name in named:
            importlib.import_module(f"nebula_mp.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def add_nebula_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the original's daemon, with one dash or two.

    Without defaults, so that those of a sub-command leave alone what was given before it.
    """
    parser.add_argument(
        "-c", "-config", "--config", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="configuration: a YAML file, or a directory of them",
    )  # fmt: skip
    parser.add_argument(
        "-test", "--test", action="store_true", default=argparse.SUPPRESS,
        help="check configuration, certificate and keys, touch nothing, and exit",
    )  # fmt: skip
    parser.add_argument(
        "-version", "--version", action="version", version=f"Version: {__version__}", help="show the version"
    )
    parser.add_argument("-h", "-help", "--help", action="help", help="show this text")


def _run_like_nebula(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if "config" not in arguments:
        parser.error("give a command, or -config FILE to start a gateway; nebula-mp --help lists them all")
    from nebula_mp.cli import start  # noqa: PLC0415 - only for those who start a gateway

    return start.run(arguments)
