"""Runs what may block beside the event loop, in a thread that never holds up the end of the program.

Data flow: a coroutine -> [workers.threads] -> blocking call -> the coroutine again
The threads of asyncio's executor and of libuv are waited for at exit: a name server that does not answer
held it up for 38 s. Nothing waits for a daemon thread.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Await `work()`, run in a thread of its own; what it raises is raised here.

    Cancelling stops the waiting only. The caller sees to it that few are under way at a time.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("T", result))

    def body() -> None:
        result, caught = None, None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            caught = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, caught)

    threading.Thread(target=body, daemon=True).start()
    return await future
