"""The rules of tests/conftest.py, each tried on a small session of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


def run_session(
    folder: Path, source: str, *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_it.py").write_text(source)
    kept = {name: value for name, value in os.environ.items() if name not in {"CI", "NEBULA_MP_NO_SKIP"}}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


SKIPPED = (
    "import pytest\ndef test_good(): pass\n@pytest.mark.skip(reason='no peers')\ndef test_skipped(): pass\n"
)
SKIPPED_WHOLE = "import pytest\npytest.skip('no root', allow_module_level=True)\n"
XFAILED = "import pytest\ndef test_good(): pass\n@pytest.mark.xfail\ndef test_xfailed(): assert False\n"


@pytest.mark.parametrize("variable", ["CI", "NEBULA_MP_NO_SKIP"])
@pytest.mark.parametrize("processes", [[], ["-n", "1"]], ids=["alone", "under xdist"])
def test_a_skipped_test_fails_the_session_where_skipping_is_forbidden(
    tmp_path: Path, variable: str, processes: list[str]
) -> None:
    done = run_session(tmp_path, SKIPPED, *processes, **{variable: "1"})

    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "test_it.py::test_skipped: Skipped: no peers" in done.stdout


@pytest.mark.parametrize("source", [SKIPPED_WHOLE, XFAILED], ids=["a whole module", "an expected failure"])
def test_other_ways_to_leave_a_test_out_fail_the_session_too(tmp_path: Path, source: str) -> None:
    done = run_session(tmp_path, source + "\n", CI="true")

    assert done.returncode != 0
    assert "skipped, which counts as failed here" in done.stdout


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_elsewhere_a_test_may_be_skipped(tmp_path: Path, value: str) -> None:
    done = run_session(tmp_path, SKIPPED, CI=value)

    assert done.returncode == 0
    assert "1 passed, 1 skipped" in done.stdout


def test_unit_tests_come_before_simulations_and_these_before_namespaces(tmp_path: Path) -> None:
    for folder in ("tests/e2e", "tests/sim", "tests/wire"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"test_{folder[6:]}.py").write_text("def test_it(): pass\n")

    done = run_session(tmp_path, "def test_it(): pass\n", "--collect-only", "-q")

    found = [line.split("::")[0] for line in done.stdout.splitlines() if "::" in line]
    assert found == [
        "test_it.py",
        "tests/wire/test_wire.py",
        "tests/sim/test_sim.py",
        "tests/e2e/test_e2e.py",
    ]


def test_without_root_a_test_that_needs_it_is_left_out_with_the_reason(tmp_path: Path) -> None:
    source = (
        "import os\nos.geteuid = lambda: 1000\nimport pytest\n@pytest.mark.e2e\ndef test_it(): assert False\n"
    )

    done = run_session(tmp_path, source, "-rs")

    assert "1 skipped" in done.stdout
    assert "network namespaces need root" in done.stdout


NATIVE = "import pytest\ndef test_any(): pass\n@pytest.mark.native\ndef test_native(): pass\n"
UNBUILT = "import sys\nsys.modules['nebula_mp._accel'] = None\n"


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A folder whose sessions find no accelerator, and a Rust that could build it."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = native\n")
    (tmp_path / "unbuilt.py").write_text(UNBUILT)
    put_rust(tmp_path, "1.95.0")
    return tmp_path


def put_rust(folder: Path, version: str) -> None:
    for name in ("cargo", "rustc"):
        (folder / name).write_text(f"#!/bin/sh\necho '{name} {version} (of a test)'\n")
        (folder / name).chmod(0o755)


def test_where_the_native_kernel_is_not_built_its_tests_are_left_out_and_a_line_says_so(
    unbuilt: Path,
) -> None:
    done = run_session(unbuilt, NATIVE, "-p", "unbuilt", PATH=str(unbuilt))

    assert done.returncode == 0
    assert "the native kernel is not built" in done.stdout
    assert "1 passed, 1 deselected" in done.stdout


def test_in_ci_that_is_a_failure_where_it_could_have_been_built(unbuilt: Path) -> None:
    done = run_session(unbuilt, NATIVE, "-p", "unbuilt", PATH=str(unbuilt), CI="true")

    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "counts as failed where there is a Rust to build it" in done.stdout


def test_in_ci_without_cargo_it_is_none(unbuilt: Path) -> None:
    (unbuilt / "cargo").unlink()

    done = run_session(unbuilt, NATIVE, "-p", "unbuilt", PATH=str(unbuilt), CI="true")

    assert done.returncode == 0


def test_in_ci_with_a_rust_that_is_too_old_it_is_none(unbuilt: Path) -> None:
    put_rust(unbuilt, "1.84.1")

    done = run_session(unbuilt, NATIVE, "-p", "unbuilt", PATH=str(unbuilt), CI="true")

    assert done.returncode == 0
