"""tools/lib.sh finds a Rust for the native kernel; commands of the machine are stand-ins."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parents[2]
_COREUTILS = "basename cut dirname find grep head id mktemp rm sed sha256sum sort tail uname"


class Machine:
    """What is found on it is what the test puts there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.commands = home / "commands"
        self.commands.mkdir()
        for name in _COREUTILS.split():
            (self.commands / name).symlink_to(f"/usr/bin/{name}")

    def add(self, name: str, script: str, folder: Path | None = None) -> None:
        folder = folder or self.commands
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def add_rust(self, version: str, folder: Path | None = None) -> None:
        self.add("cargo", "echo cargo 1", folder)
        self.add("rustc", f"echo 'rustc {version} (of a test)'", folder)

    def add_packages(self, offered: Mapping[str, str]) -> None:
        """Let apt offer these, by name."""
        cases = "\n".join(
            f'"policy {name}") printf "{name}:\\n  Candidate: {version}\\n" ;;'
            for name, version in offered.items()
        )
        names = "\\n".join(offered)
        self.add("apt-cache", f'case "$*" in\n{cases}\npkgnames*) printf "{names}\\n" ;;\nesac')

    def run(self, script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a script that has sourced lib.sh, with `set -eu` as all tools have it."""
        return subprocess.run(
            ["/bin/sh", "-euc", f". {CLONE}/tools/lib.sh; {script}", str(CLONE / "tools/test")],
            env={"PATH": str(self.commands), "HOME": str(self.home), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("version", "is_enough"),
    [
        ("1.85", True),
        ("1.85.0", True),
        ("1.85.0+dfsg3-1", True),
        ("1.95.0", True),
        ("1.100.0", True),
        ("2.0", True),
        ("1.84.1", False),
        ("1.63.0+dfsg1-2", False),
        ("1.9.0", False),
        ("", False),
    ],
)
def test_a_version_is_enough_from_the_one_in_cargo_toml_on(
    version: str, is_enough: bool, machine: Machine
) -> None:
    assert machine.run(f'is_rust "{version}" || exit 7').returncode == (0 if is_enough else 7)


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        pytest.param({}, "", id="not Debian"),
        pytest.param({"rustc": "(none)"}, "", id="not even old ones"),
        pytest.param({"rustc": "1.85.0+dfsg3-1"}, "cargo rustc rustfmt rust-clippy", id="Debian 13"),
        pytest.param({"rustc": "1.63.0+dfsg1-2"}, "", id="old ones"),
        pytest.param(
            {"rustc": "1.63.0+dfsg1-2", "rustc-web": "1.96.0+dfsg1-1~deb12u2"},
            "cargo-web rustc-web rustfmt-web rust-web-clippy",
            id="Debian 12",
        ),
        pytest.param({"rustc": "1.63.0+dfsg1-2", "rustc-web": "1.78.0"}, "", id="old Debian 12"),
        pytest.param(
            {"rustc": "1.75.0", "rustc-1.80": "1.80.1", "rustc-1.89": "1.89.0", "rustc-1.100": "1.100.0"},
            "cargo-1.100 rustc-1.100 rustfmt-1.100 rust-1.100-clippy",
            id="numbered: the newest",
        ),
        pytest.param({"rustc": "1.75.0", "rustc-1.80": "1.80.1"}, "", id="numbered: all too old"),
    ],
)
def test_the_distributions_packages_are_taken_where_they_are_new_enough(
    offered: Mapping[str, str], taken: str, machine: Machine
) -> None:
    machine.add_packages(offered)

    done = machine.run("rust_packages")

    assert (done.returncode, done.stdout.strip()) == (0, taken)


def test_a_rust_that_is_new_enough_is_used_and_nothing_is_installed(machine: Machine) -> None:
    machine.add_rust("1.95.0")
    machine.add("cc", "")
    machine.add("apt-get", "echo must not be called; exit 1")

    done = machine.run('need_rust; echo "why: $no_rust"')

    assert (done.stdout, done.stderr) == ("why: \n", "")


def test_a_rust_is_found_where_no_path_leads(machine: Machine) -> None:
    machine.add_rust("1.63.0")
    machine.add_rust("1.90.0", machine.home / ".cargo/bin")

    assert machine.run("has_rust && rust_found").stdout == "1.90.0\n"


def test_a_command_without_a_toolchain_behind_it_is_no_rust(machine: Machine) -> None:
    machine.add_rust("1.95.0")
    machine.add("cargo", "echo error: no default toolchain >&2; exit 1")

    assert machine.run("has_rust || echo none").stdout == "none\n"


def test_what_is_too_old_is_replaced_by_the_distributions(machine: Machine) -> None:
    machine.add_rust("1.63.0")
    machine.add("cc", "")
    machine.add_packages({"rustc": "1.85.0"})
    installing = machine.home / "installed"
    machine.add(
        "apt-get",
        f'case "$*" in *install*) echo "$*" >{installing}; printf "#!/bin/sh\\necho rustc 1.85.0" >'
        f"{machine.commands}/rustc ;; esac",
    )

    done = machine.run('need_rust; echo "why: $no_rust"')

    assert done.stdout == "why: \n"
    assert installing.read_text().endswith("--no-remove install -y cargo rustc rustfmt rust-clippy\n")


@pytest.mark.parametrize(
    ("offered", "apt", "why"),
    [
        (
            {"rustc": "1.63.0"},
            "",
            "it needs Rust {}, and here is none; the distribution has none that is new enough",
        ),
        (
            {"rustc": "1.85.0"},
            "exit 1",
            "it needs Rust {}, and here is none; the distribution's could not be installed",
        ),
    ],
)
def test_without_any_rust_the_reason_is_given_and_nothing_ends(
    offered: Mapping[str, str], apt: str, why: str, machine: Machine
) -> None:
    machine.add_packages(offered)
    machine.add("apt-get", apt)

    done = machine.run('need_rust; echo "$no_rust"')

    assert done.returncode == 0
    assert done.stdout.strip() == why.format("1.85")


def test_without_a_compiler_there_is_none(machine: Machine) -> None:
    machine.add_rust("1.95.0")

    done = machine.run('need_rust; echo "$no_rust"')

    assert (done.returncode, done.stdout) == (0, "it needs a C compiler\n")


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("false", 0), ("0", 0), ("true", 1), ("1", 1)])
def test_a_kernel_that_could_be_built_and_was_not_is_told_and_fails_in_ci(
    ci: str, code: int, machine: Machine
) -> None:
    machine.add_rust("1.95.0")
    log = machine.home / "pip.log"
    log.write_text(
        "running build_rust\n  error: no matching package named `libc` found\n"
        "  build_rust: optional Rust extension nebula_mp._accel failed\n  `cargo metadata` failed with code 101\n"
    )

    done = machine.run(f"venv={machine.home}; no_rust=; say_kernel {log}", CI=ci)

    assert done.returncode == code
    assert "error: no matching package named `libc` found" in done.stderr
    assert ("going on with the kernel in Python" in done.stderr) == (code == 0)


def test_where_no_kernel_can_be_built_ci_goes_on_too(machine: Machine) -> None:
    done = machine.run(f"venv={machine.home}; no_rust='of the weather'; say_kernel /dev/null", CI="true")

    assert done.returncode == 0
    assert done.stderr == "going on with the kernel in Python. There is no native one: of the weather\n"


def test_an_edit_of_the_rust_sources_is_noticed(machine: Machine) -> None:
    rust = machine.home / "rust"
    (rust / "target").mkdir(parents=True)
    (rust / "lib.rs").write_text("fn main() {}")
    (rust / "Cargo.toml").write_text('rust-version = "1.85"')
    script = f"top={machine.home}; rust_sources"

    before = machine.run(script).stdout
    (rust / "target/built.rs").write_text("not a source")
    same = machine.run(script).stdout
    (rust / "lib.rs").write_text("fn main() { }")
    after = machine.run(script).stdout

    assert before == same != after
