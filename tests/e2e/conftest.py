"""What every end-to-end test needs: the right to make namespaces, and pairs of nodes.

Data flow: pytest -> [e2e.conftest] -> tests/e2e, support.netns, support.nodes
Without root all are skipped with the reason, without a released program those that run it (in CI either fails).
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from nebula_mp.datapath.kernels import ENVIRONMENT as KERNEL_VARIABLE
from nebula_mp.demo.netns import require_root_and_iproute
from nebula_mp.errors import SystemCallError
from tests.support.netns import Wire, sweep_stale
from tests.support.nodes import Pair, Variant
from tests.support.peers import OURS, STAND_IN, why_not

MakePair = Callable[..., Pair]

BESIDE_THE_NATIVE = (
    ("python",)
    if importlib.util.find_spec("nebula_mp._accel") and not os.environ.get(KERNEL_VARIABLE)
    else ()
)
"""Kernels on which chosen tests are run beside the one that a start takes by itself: `kernel` has the name."""

_live: list[Pair] = []


def pytest_report_header() -> str | None:
    return f"e2e: nebula {STAND_IN} stands in for our own program" if STAND_IN else None


@pytest.fixture(scope="session", autouse=True)
def ground() -> None:
    """Root and iproute2, or a reason why not."""
    try:
        require_root_and_iproute()
    except SystemCallError as error:
        pytest.skip(str(error))
    sweep_stale()


@contextlib.contextmanager
def pairs(home: Path) -> Iterator[MakePair]:
    """A maker of pairs; all it made is stopped and removed at the end, whatever happened.

    It skips a test that asks for a release, as a node or to make certificates, which is not there.
    """
    with contextlib.ExitStack() as stack:
        count = 0

        def make(
            peer: str, variant: Variant, *, first: str = OURS, a_is_higher: bool = False, start: bool = False
        ) -> Pair:
            nonlocal count
            if reason := why_not(first, peer, *filter(None, [variant.maker])):
                pytest.skip(reason)
            count += 1
            place = home / f"pair{count}"
            place.mkdir()
            wire = stack.enter_context(Wire())
            pair = Pair(wire, place, (first, peer), variant, a_is_higher=a_is_higher)
            _live.append(pair)
            stack.callback(_live.remove, pair)
            stack.callback(pair.stop)
            if start:
                pair.start()
            return pair

        yield make


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our nodes of this test have the kernel of this name; "": the one that a start takes by itself."""
    if request.param:
        monkeypatch.setenv(KERNEL_VARIABLE, request.param)


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[MakePair]:
    """`make_pair(peer, variant)`: two nodes on a wire of their own, ours and `peer`, not started yet."""
    with pairs(tmp_path) as make:
        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what its nodes said."""
    report = yield
    if report.failed:
        report.sections.extend(("nodes", pair.report()) for pair in _live)
    return report
