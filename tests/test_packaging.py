"""What gets installed, and that setup.cfg, the constraints and the imports tell the same story."""

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources: building writes beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, source)
    shutil.copytree(PACKAGE, source / "nebula_mp", ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    done = subprocess.run(
        [*argv, "--wheel-dir", str(target), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("*.whl"))


def test_the_wheel_holds_every_module_its_types_and_its_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    sources = {str(path.relative_to(CLONE)) for path in PACKAGE.rglob("*.py")}
    assert sources <= names
    assert {"nebula_mp/py.typed", "nebula_mp/wire/nebula.proto", "nebula_mp/wire/nebula_pb2.pyi"} <= names
    assert any(name.endswith("/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nebula_mp"}


def test_an_installed_wheel_tells_its_version(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)

    done = subprocess.run(
        [sys.executable, "-P", "-m", "nebula_mp", "version"],
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert nebula_mp.__version__ in done.stdout


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


SCRIPTS = ["tools/demo", "tools/test", "tools/get-peers", ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_tool_may_be_run_and_is_plain_shell(script: str) -> None:
    path = CLONE / script

    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\n")
    for part in (path, CLONE / "tools/lib.sh"):
        subprocess.run(["/bin/sh", "-n", str(part)], check=True, timeout=10)


def test_ci_runs_the_tests_and_nothing_more() -> None:
    lines = [
        line for line in (CLONE / ".ci/run").read_text().splitlines() if line and not line.startswith("#")
    ]

    assert lines == ['exec "$(dirname -- "$0")/../tools/test"']
