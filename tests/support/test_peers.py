"""A test that needs a released program which is missing says which; one that needs none runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import peers
from tests.support.peers import CLONE, OURS, VERSIONS


@pytest.fixture
def only_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of releases that has 1.6.1, and of 1.9.3 only what makes certificates."""
    for version, name in (("1.6.1", "nebula"), ("1.6.1", "nebula-cert"), ("1.9.3", "nebula-cert")):
        program = tmp_path / version / "usr/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("NEBULA_PEERS", str(tmp_path))
    monkeypatch.setattr(peers, "STAND_IN", "")
    return tmp_path


def test_a_missing_release_is_named_to_whoever_needs_it(only_the_oldest: Path) -> None:
    lost = only_the_oldest / "1.9.3/usr/bin/nebula"

    assert peers.why_not(OURS, "1.9.3") == f"{lost} missing: tools/test fetches it, or set NEBULA_PEERS"
    assert str(only_the_oldest / "1.11.0/usr/bin/nebula-cert") in peers.why_not("1.11.0")


@pytest.mark.usefixtures("only_the_oldest")
def test_a_missing_release_is_no_reason_for_who_does_not_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peers.why_not(OURS), peers.why_not(OURS, "1.6.1")) == ("", "")

    monkeypatch.setattr(peers, "STAND_IN", "1.11.0")
    assert "1.11.0" in peers.why_not(OURS, "1.6.1"), "here a release plays our part"


@pytest.mark.e2e
def test_without_any_release_tunnels_between_ours_are_tested_all_the_same(tmp_path: Path) -> None:
    test = "tests/e2e/test_life_of_a_tunnel.py::test_an_orderly_end_tells_the_peer_and_leaves_nothing_behind"
    kept = {name: value for name, value in os.environ.items() if name not in {"CI", "NEBULA_MP_NO_SKIP"}}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", test, "-k", "term"],
        cwd=CLONE,
        env=kept | {"NEBULA_PEERS": str(tmp_path), "NEBULA_MP_E2E_STAND_IN": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout
    assert f"1 passed, {len(VERSIONS)} skipped" in done.stdout
    for version in VERSIONS:
        assert f"{tmp_path}/{version}/usr/bin/nebula, " in done.stdout
