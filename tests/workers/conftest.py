"""Rigs for a test, closed after it."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import pytest

from tests.datapath.sites import connect
from tests.support.native import kernel
from tests.workers.rig import Rig

__all__ = ["kernel"]


class MakeRig(Protocol):
    def __call__(self, **how: Any) -> Rig: ...


@pytest.fixture
def make_rig() -> Iterator[MakeRig]:
    """Make rigs with `Rig`'s arguments, a tunnel to `site.far` and its first flow."""
    with ExitStack() as closing:

        def make(**how: Any) -> Rig:
            made = closing.enter_context(Rig(**how))
            connect(made.site)
            made.allow()
            return made

        yield make
