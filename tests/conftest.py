"""What holds for every test: quick ones first, how long hypothesis searches, no skipping in CI, both kernels."""

import importlib.util
import os
import re
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import nebula_mp
from nebula_mp.demo.netns import require_root_and_iproute
from nebula_mp.errors import SystemCallError

# A slow machine is no failure: no deadlines. The same examples each time, so that a red run repeats;
# `nox -s fuzz_long` is the one that looks for new ones.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "long", deadline=None, max_examples=20_000, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order: unit tests, simulated networks, network namespaces; so a small mistake shows in seconds."""
    if not is_native_built():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("native")])
        items[:] = [item for item in items if not item.get_closest_marker("native")]
    items.sort(key=_rank)
    try:
        require_root_and_iproute()
    except SystemCallError as error:
        for item in items:
            if _rank(item) == _E2E:
                item.add_marker(pytest.mark.skip(reason=str(error)))


_UNIT, _SIM, _E2E = range(3)


def _rank(item: pytest.Item) -> int:
    if item.get_closest_marker("e2e") or item.nodeid.startswith("tests/e2e/"):
        return _E2E
    return _SIM if item.nodeid.startswith("tests/sim/") else _UNIT


class SkippingFails:
    """Makes a session fail in which a test was skipped, and says which and why."""

    def __init__(self) -> None:
        self._skipped: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def _note(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self._skipped.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._skipped:
            terminalreporter.section("skipped, which counts as failed here", red=True)
            for line in self._skipped:
                terminalreporter.line(line)


class NativeMissing:
    """Says that the native kernel was not tested; where it has to be, that makes a session fail."""

    def __init__(self, *, fails: bool) -> None:
        self._fails = fails

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._fails and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("the native kernel is not built", red=self._fails, yellow=not self._fails)
        why = ", which counts as failed where there is a Rust to build it" if self._fails else ""
        terminalreporter.line(f"its tests were left out{why}")


def is_native_built() -> bool:
    """Whether there is an accelerator to test."""
    return importlib.util.find_spec("nebula_mp._accel") is not None


def could_build_native() -> bool:
    """Whether a Rust is there that is new enough for it, as tools/lib.sh would find too."""
    wanted = tomllib.loads((Path(nebula_mp.__file__).parents[1] / "rust/Cargo.toml").read_text())
    try:
        subprocess.run(
            ["cargo", "--version"], capture_output=True, timeout=60, check=True
        )  # or only its name
        said = subprocess.run(["rustc", "--version"], capture_output=True, timeout=60, check=True, text=True)
    except (OSError, subprocess.SubprocessError):
        return False
    found = re.match(r"rustc (\d+)\.(\d+)", said.stdout)
    needed = wanted["workspace"]["package"]["rust-version"].split(".")
    return found is not None and [*map(int, found.groups())] >= [*map(int, needed[:2])]


def may_skip(environment: Sequence[str] = ("CI", "NEBULA_MP_NO_SKIP")) -> bool:
    """Whether this run is one in which a test that lacks what it needs may be skipped."""
    return not any(os.environ.get(name, "0").lower() not in {"", "0", "false"} for name in environment)


def pytest_configure(config: pytest.Config) -> None:
    is_xdist_worker = hasattr(config, "workerinput")  # its reports reach the controlling process
    if is_xdist_worker:
        return
    if not may_skip():
        config.pluginmanager.register(SkippingFails(), "skipping-fails")
    if not is_native_built():
        fails = not may_skip() and could_build_native()
        config.pluginmanager.register(NativeMissing(fails=fails), "native-missing")
