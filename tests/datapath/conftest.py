"""Sites for a test, closed after it."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest

from nebula_mp.config.model import NO_OFFLOADS, Offloads
from nebula_mp.datapath.api import Kernel, UpcallLimits
from tests.datapath.sites import UNLIMITED, Site, connect
from tests.support.native import kernel

__all__ = ["kernel"]


class MakeSite(Protocol):
    def __call__(
        self,
        *,
        workers: int = 1,
        areas: int = 8,
        area_bytes: int = 72 * 1024,
        entries_max: int = 128,
        limits: UpcallLimits = UNLIMITED,
        upcall_areas: int = 8,
        offloads: Offloads = NO_OFFLOADS,
        kernel: Kernel | None = None,
    ) -> Site: ...


@pytest.fixture
def make_site() -> Iterator[MakeSite]:
    """Make sites with `Site`'s arguments."""
    with ExitStack() as closing:

        def make(
            *,
            workers: int = 1,
            areas: int = 8,
            area_bytes: int = 72 * 1024,
            entries_max: int = 128,
            limits: UpcallLimits = UNLIMITED,
            upcall_areas: int = 8,
            offloads: Offloads = NO_OFFLOADS,
            kernel: Kernel | None = None,
        ) -> Site:
            made = Site(
                workers=workers,
                areas=areas,
                area_bytes=area_bytes,
                entries_max=entries_max,
                limits=limits,
                upcall_areas=upcall_areas,
                offloads=offloads,
                kernel=kernel,
            )
            closing.callback(made.close)
            return made

        yield make


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    """One worker, and a tunnel to the socket `site.far`."""
    made = make_site()
    connect(made)
    return made
