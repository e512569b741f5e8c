"""A view of shared memory that calls out before each load and store, for tests of what may happen between.

Data flow: test -> [support.watched] in the place of a memoryview -> code under test
Stands for another process that runs just then, or for a kill -9 if the call raises.
"""

from collections.abc import Callable
from typing import Any, cast


class KilledError(BaseException):
    """The process under test ends here; what it had stored stays."""


class Watched:
    """Looks like the memoryview `view`; `load` and `store` are called before each access.

    A slice is loaded and stored in pieces of 8 bytes, with a call before each, as memcpy may do it.
    """

    def __init__(self, view: memoryview, *, load: Callable[[], None], store: Callable[[], None]) -> None:
        self._view = view
        self._load = load
        self._store = store

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, at: Any) -> Any:
        if not isinstance(at, slice):
            self._load()
            return self._view[at]
        view = self._view[at].cast("B")
        copy = bytearray()
        for begin in range(0, len(view), 8):
            self._load()
            copy += view[begin : begin + 8]
        return memoryview(copy).cast(self._view.format)  # type: ignore[call-overload]

    def __setitem__(self, at: Any, value: Any) -> None:
        if not isinstance(at, slice):
            self._store()
            self._view[at] = value
            return
        view = self._view[at].cast("B")
        for begin in range(0, len(view), 8):
            self._store()
            view[begin : begin + 8] = value[begin : begin + 8]


def watch(target: object, names: str, *, load: Callable[[], None], store: Callable[[], None]) -> None:
    """Put a Watched in the place of the attributes of `target` that `names` lists."""
    for name in names.split():
        view = cast("memoryview", getattr(target, name))
        setattr(target, name, Watched(view, load=load, store=store))


class Countdown:
    """Raises KilledError, or does `then` once, on call number `after` (from 0)."""

    def __init__(self, after: int, then: Callable[[], None] | None = None) -> None:
        self.calls = 0
        self._after = after
        self._then = then

    @property
    def reached(self) -> bool:
        """Whether there were that many calls."""
        return self.calls > self._after

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self._after + 1:
            if self._then is None:
                raise KilledError
            self._then()


def nothing() -> None:
    """Neither watch loads nor stores."""
