"""What gets installed, and that setup.cfg, the constraints and the imports tell the same story."""

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nebula_mp

CLONE = Path(__file__).resolve().parents[1]
PACKAGE = CLONE / "nebula_mp"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes beside them. Nothing in it was built, but for some junk."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, copy)
    no_results = shutil.ignore_patterns("__pycache__", "_accel*.so", "target")
    for name in ("nebula_mp", "rust"):
        shutil.copytree(CLONE / name, copy / name, ignore=no_results)
    for target in ("rust/target", "rust/fuzz/target"):
        (copy / target).mkdir(parents=True)
        (copy / target / "junk.rs").touch()
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is made where there is no cargo."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), PATH=str(tmp_path_factory.mktemp("empty")))


def build_wheel(source: Path, target: Path, **environment: str) -> Path:
    # What an earlier build left would go into this one.
    assert not list(source.glob("build"))
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    done = subprocess.run(
        [*argv, "--wheel-dir", str(target), str(source)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    shutil.rmtree(source / "build", ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("*.whl"))


# What an editable installation adds finds in the clone what the wheel has not.
_WITHOUT_THE_CLONE = """
import runpy, sys
sys.meta_path[:] = [each for each in sys.meta_path if "__editable__" not in str(each)]
runpy.run_module("nebula_mp", run_name="__main__")
"""


def run_installed(wheel: Path, target: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run the program out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return subprocess.run(
        [sys.executable, "-P", "-c", _WITHOUT_THE_CLONE, *words],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_wheel_holds_every_module_its_types_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    sources = {str(path.relative_to(CLONE)) for path in PACKAGE.rglob("*.py")}
    assert sources <= names
    assert {"nebula_mp/py.typed", "nebula_mp/wire/nebula.proto", "nebula_mp/wire/nebula_pb2.pyi"} <= names
    assert "nebula_mp/_accel.pyi" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nebula_mp"}


def test_without_cargo_there_is_a_wheel_all_the_same_which_says_that_it_has_no_native_kernel(
    wheel: Path, tmp_path: Path
) -> None:
    done = run_installed(wheel, tmp_path, "version")

    assert not list((tmp_path / "nebula_mp").glob("_accel*.so"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"nebula-mp {nebula_mp.__version__} (kernel python, ")
    assert "accelerator not used: nebula_mp._accel is not installed" in done.stdout


def test_whoever_asks_for_the_native_kernel_where_there_is_none_gets_no_start(
    wheel: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yml"
    config.write_text("pki: {ca: ca.crt, cert: host.crt, key: host.key}\n")

    done = run_installed(wheel, tmp_path, "start", "--kernel", "rust", "-test", "-c", str(config))

    assert done.returncode == 1
    assert (
        "the native kernel was asked for and cannot be used: nebula_mp._accel is not installed" in done.stderr
    )


if os.environ.get("NEBULA_MP_TEST_PACKAGE"):  # `nox -s package`: takes up to a minute

    def test_with_cargo_the_wheel_has_a_native_kernel_for_every_later_python(
        source: Path, tmp_path: Path
    ) -> None:
        made = build_wheel(source, tmp_path, CARGO_TARGET_DIR=str(CLONE / "rust/target"))

        done = run_installed(made, tmp_path, "version")

        assert [path.name for path in (tmp_path / "nebula_mp").glob("_accel*.so")] == ["_accel.abi3.so"]
        assert "-cp311-abi3-linux_" in made.name
        assert done.stdout.startswith(f"nebula-mp {nebula_mp.__version__} (kernel rust, ")


def test_the_source_package_has_the_native_kernel_and_nothing_that_was_built(
    source: Path, tmp_path: Path
) -> None:
    script = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"

    subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, timeout=60, check=True)

    (package,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(package) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"rust/Cargo.lock", "rust/Cargo.toml", "rust/accel/Cargo.toml", "rust/core/src/lib.rs"} <= names
    assert not [name for name in names if "target" in name.split("/") or name.endswith(".so")]


@pytest.mark.parametrize("script", ["nebula-mp", "nebula-mp-cert"])
def test_each_console_script_starts(script: str) -> None:
    entry = next(iter(importlib.metadata.entry_points(group="console_scripts", name=script)))
    source = f"import sys; from {entry.module} import {entry.attr}; sys.argv = ['{script}', '--help']; sys.exit({entry.attr}())"

    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert script in done.stdout


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CLONE / "setup.cfg")
    return parser


def requirements(section: str, key: str) -> list[Requirement]:
    return [Requirement(line) for line in setup_cfg()[section][key].split("\n") if line]


def pins() -> list[Requirement]:
    lines = (
        line.split("#")[0].strip() for line in (CLONE / "tools/constraints.txt").read_text().splitlines()
    )
    return [Requirement(line) for line in lines if line]


def test_every_pin_is_exact_and_every_dependency_is_pinned_within_its_range() -> None:
    pinned = {
        canonicalize_name(pin.name): pin for pin in pins() if pin.marker is None or pin.marker.evaluate()
    }

    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins())
    for needed in [
        *requirements("options", "install_requires"),
        *requirements("options.extras_require", "dev"),
    ]:
        version = str(pinned[canonicalize_name(needed.name)].specifier).removeprefix("==")
        assert needed.specifier.contains(version), f"{needed} against the pin {version}"


def test_no_dependency_has_an_upper_cap() -> None:
    for needed in requirements("options", "install_requires"):
        assert [part.operator for part in needed.specifier] == [">="], str(needed)


def imported_modules() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield "google.protobuf" if node.module.startswith("google") else node.module.split(".")[0]


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    distributions = {**importlib.metadata.packages_distributions(), "google.protobuf": ["protobuf"]}
    third_party = {name for name in imported_modules() if name not in {*sys.stdlib_module_names, "nebula_mp"}}
    imported = {canonicalize_name(distributions[name][0]) for name in third_party}

    declared = {canonicalize_name(needed.name) for needed in requirements("options", "install_requires")}

    assert imported == declared


SCRIPTS = ["tools/demo", "tools/test", "tools/check-rust", "tools/get-peers", ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_tool_may_be_run_and_is_plain_shell(script: str) -> None:
    path = CLONE / script

    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\n")
    for part in (path, CLONE / "tools/lib.sh"):
        subprocess.run(["/bin/sh", "-n", str(part)], check=True, timeout=10)


def test_ci_forbids_skipping_and_runs_the_tests_and_nothing_more() -> None:
    lines = [
        line for line in (CLONE / ".ci/run").read_text().splitlines() if line and not line.startswith("#")
    ]

    assert lines == ["export CI=true", 'exec "$(dirname -- "$0")/../tools/test"']
