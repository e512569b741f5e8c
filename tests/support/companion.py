"""A module of the tests as a process of its own in a namespace; it is spoken with line by line."""

import select
import subprocess
import sys
from types import TracebackType
from typing import Self

from nebula_mp.demo.netns import Namespace
from tests.support.peers import CLONE


class Companion:
    """From its making, when it has said that it is ready; a context manager that ends it in any case."""

    def __init__(self, space: Namespace, module: str, *arguments: str, answers_within_s: float) -> None:
        self._answers_within_s = answers_within_s
        self._name = module.rpartition(".")[2]
        argv = space.command("env", f"PYTHONPATH={CLONE}", sys.executable, "-m", module, *arguments)
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert self._line() == "ready\n"
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _say(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words.encode() + b"\n")
        self._process.stdin.flush()

    def _hang_up(self) -> None:
        """Close its stdin: it is to say what it has found, and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _line(self) -> str:
        output = self._process.stdout
        assert output is not None
        assert select.select([output], [], [], self._answers_within_s)[0], f"the {self._name} says nothing"
        return output.readline().decode()

    def _end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        self._process.wait()
