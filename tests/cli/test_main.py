"""The tree of commands, and how each kind of end looks from outside."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from nebula_mp import __version__, cli
from nebula_mp.cli import build_parser, main, version
from nebula_mp.config.model import KernelChoice
from nebula_mp.datapath import kernels
from nebula_mp.errors import CertError, ConfigError, InstanceError, NebulaError, SystemCallError


def subcommands(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Name -> help of the commands of a parser."""
    (action,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return {choice.dest: str(choice.help) for choice in action._choices_actions}


def test_every_command_is_listed_with_the_words_its_module_uses() -> None:
    assert subcommands(build_parser(named=())) == cli.COMMANDS
    assert subcommands(build_parser()) == cli.COMMANDS


@pytest.mark.parametrize("command", cli.COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, flag])

    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: nebula-mp {command} ")


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_nebulas_own_flags_work_with_one_dash_or_two(dashes: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["start"]):
        with pytest.raises(SystemExit) as versioned:
            main([*command, f"{dashes}version"])
        assert (versioned.value.code, capsys.readouterr().out) == (0, f"Version: {__version__}\n")
        with pytest.raises(SystemExit) as helped:
            main([*command, f"{dashes}help"])
        assert helped.value.code == 0
        assert "-config FILE" in capsys.readouterr().out
        assert main([*command, f"{dashes}config", "/nonexistent.yml", f"{dashes}test"]) == 1
        assert "/nonexistent.yml" in capsys.readouterr().err
        assert main([*command, f"{dashes}config=/nonexistent.yml", f"{dashes}test"]) == 1
        assert "/nonexistent.yml" in capsys.readouterr().err


def test_a_configuration_may_be_named_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-config", "/nonexistent.yml", "start", "-test"]) == 1
    assert "/nonexistent.yml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["-nope"], ["explode"], ["-config"], ["-test"], ["status", "--nope"], ["version", "x"]]
)
def test_a_mistake_in_the_command_line_is_exit_code_2_with_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)

    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("usage: nebula-mp")


def failing_with(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(_: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a.yml:1:2: x: bad", "a.yml:3:4: y: bad"), 1, "a.yml:1:2: x: bad\na.yml:3:4: y: bad\n"),
        (CertError("expired"), 1, "nebula-mp: expired\n"),
        (SystemCallError("no tun"), 1, "nebula-mp: no tun\n"),
        (SystemCallError("no right", exit_code=4), 4, "nebula-mp: no right\n"),
        (InstanceError("none is running", exit_code=3), 3, "nebula-mp: none is running\n"),
        (SystemCallError("lost", exit_code=5), 5, "nebula-mp: lost\n"),
        (NebulaError("other"), 1, "nebula-mp: other\n"),
        (KeyboardInterrupt(), 1, "nebula-mp: interrupted\n"),
        (
            ZeroDivisionError("a fault"), 1,
            "nebula-mp: unexpected ZeroDivisionError: a fault (NEBULA_MP_TRACEBACK=1 shows where)\n",
        ),
    ],
)  # fmt: skip
def test_each_kind_of_failure_is_one_message_with_its_exit_code(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(version, "run", failing_with(error))

    assert main(["version"]) == code
    assert capsys.readouterr() == ("", text)


def test_a_traceback_is_there_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "run", failing_with(ZeroDivisionError()))
    monkeypatch.setenv("NEBULA_MP_TRACEBACK", "1")

    with pytest.raises(ZeroDivisionError):
        main(["version"])


def test_a_reader_that_goes_away_is_no_failure() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)

    ended = subprocess.run(
        [sys.executable, "-m", "nebula_mp", "version"],
        stdout=write_end,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(write_end)

    assert (ended.returncode, ended.stderr) == (0, b"")


HEAVY = ("asyncio", "uvloop", "pyroute2", "cryptography", "yaml", "msgpack", "psutil", "rich")


@pytest.mark.parametrize("words", [["version"], ["--help"], ["-nope"], ["explode"]])
def test_nothing_heavy_is_loaded_to_answer_a_simple_question(words: list[str]) -> None:
    script = (
        "import sys\nfrom nebula_mp.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )

    assert ended.stderr.splitlines()[-1] == "[]"


def test_version_names_the_kernel_and_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    line, *more = capsys.readouterr().out.splitlines()

    kernel = kernels.choose(KernelChoice.AUTO)
    assert line.startswith(f"nebula-mp {__version__} (kernel {kernel.name}, python 3.")
    assert more == ([] if kernel.reason is None else [f"accelerator not used: {kernel.reason}"])
    for library in ("cryptography", "protobuf", "uvloop", "pyroute2", "python-pytun"):
        assert f"{library} " in line
    assert "missing" not in line


def test_version_as_json_has_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == 0

    answer = json.loads(capsys.readouterr().out)
    kernel = kernels.choose(KernelChoice.AUTO)
    assert (answer["schema"], answer["version"], answer["kernel"]) == (1, __version__, kernel.name)
    assert answer["accelerator_not_used"] == kernel.reason
