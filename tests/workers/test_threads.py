"""Blocking work beside the loop."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from nebula_mp.workers.loop import run
from nebula_mp.workers.threads import in_thread


def test_the_result_comes_back_and_the_loop_goes_on_meanwhile() -> None:
    gate = threading.Event()

    async def main() -> int:
        asyncio.get_running_loop().call_later(0.01, gate.set)  # only a running loop opens the gate
        return 42 if await in_thread(lambda: gate.wait(5)) else 1

    assert run(main) == 42


def test_what_it_raises_is_raised_where_it_is_awaited() -> None:
    async def main() -> int:
        await in_thread(lambda: int("no number"))
        return 0

    with pytest.raises(ValueError, match="no number"):
        run(main)


HANG = """
import asyncio, time
from nebula_mp.workers.loop import run
from nebula_mp.workers.threads import in_thread

async def main():
    task = asyncio.ensure_future(in_thread(lambda: time.sleep(60)))
    await asyncio.sleep(0.05)
    return 7

raise SystemExit(run(main))
"""


def test_work_that_hangs_does_not_hold_up_the_end_of_the_program() -> None:
    began = time.monotonic()

    ended = subprocess.run([sys.executable, "-c", HANG], timeout=30, check=False, capture_output=True)

    assert (ended.returncode, ended.stderr) == (7, b"")
    assert time.monotonic() - began < 20
