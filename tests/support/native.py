"""The kernels that tests run on: each test of the data path on both, unless it looks into one of them.

Data flow: pytest -> `kernel`, a fixture -> [support.native] `current` -> tests.datapath.sites
A module whose tests are run on both says `pytestmark = pytest.mark.usefixtures("kernel")`. What is marked
`native` is left out where that kernel is not built: see tests/conftest.py.
"""

import functools
from collections.abc import Iterator

import pytest

from nebula_mp.datapath.api import Kernel
from nebula_mp.datapath.python import PythonKernel

PYTHON, RUST = "python", "rust"

_current = PYTHON

python_only = pytest.mark.parametrize("kernel", [PYTHON], indirect=True)
"""For a test that looks into the Python kernel, among others that are run on both."""

native_only = pytest.mark.parametrize("kernel", [pytest.param(RUST, marks=pytest.mark.native)], indirect=True)
"""For a test that looks into the native one."""


@functools.cache
def named(name: str) -> Kernel:
    """Give the kernel of this name."""
    if name == PYTHON:
        return PythonKernel()
    from nebula_mp.datapath.accelerated import NativeKernel  # noqa: PLC0415 - not everywhere

    return NativeKernel()


def current() -> Kernel:
    """The kernel that the running test is for."""
    return named(_current)


def is_native() -> bool:
    """Whether that is the native one."""
    return _current == RUST


@pytest.fixture(scope="module", params=[PYTHON, pytest.param(RUST, marks=pytest.mark.native)])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Let `current` be each of them in turn."""
    global _current  # noqa: PLW0603 - one test runs at a time
    _current = request.param
    yield current()
    _current = PYTHON


python_only = pytest.mark.parametrize("kernel", [PYTHON], indirect=True)
"""For a test that looks into the Python kernel, among others that are run on both."""

native_only = pytest.mark.parametrize("kernel", [pytest.param(RUST, marks=pytest.mark.native)], indirect=True)
"""For a test that looks into the native one."""
