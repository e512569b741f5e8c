"""Everything that is checked, by name: `nox -l`. tools/test runs the same in one go, without nox."""

import os
import shutil
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "imports", "tests"]
nox.options.reuse_existing_virtualenvs = True

CLONE = Path(__file__).parent
PEERS = str(CLONE / ".peers")
CARGO_TOOLS = CLONE / ".nox" / "cargo"
ANY_MODE = [f"tests/e2e/test_{name}.py" for name in ("interoperability", "life_of_a_tunnel", "strangers")]


def install(session: nox.Session) -> None:
    session.install("--constraint", "tools/constraints.txt", "--editable", ".[dev]")


def run_in_modes(session: nox.Session, *tests: str) -> None:
    install(session)
    session.run("tools/get-peers", PEERS, external=True)
    for workers in os.environ.get("NEBULA_MP_TEST_WORKERS", "1 2 4").split():
        for drain in os.environ.get("NEBULA_MP_TEST_DRAIN", "auto writer reader").split():
            mode = {"NEBULA_MP_TEST_WORKERS": workers, "NEBULA_MP_TEST_DRAIN": drain}
            session.log(f"{workers} workers, drained by {drain}")
            session.run("pytest", *tests, *session.posargs, env={"NEBULA_PEERS": PEERS, **mode})


def cargo_tool(session: nox.Session, name: str) -> None:
    """Have `cargo NAME`: the one that is here, else one of our own, built once."""
    session.env["PATH"] = f"{CARGO_TOOLS / 'bin'}:{os.environ['PATH']}"
    if shutil.which(f"cargo-{name}", path=session.env["PATH"]) is None:
        session.run("cargo", "install", "--locked", f"--root={CARGO_TOOLS}", f"cargo-{name}", external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: rules and format."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict."""
    install(session)
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """The tree is the architecture: layers and forbidden imports, from setup.cfg."""
    install(session)
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no root: unit, vectors, simulated networks."""
    install(session)
    session.run("pytest", "--numprocesses=auto", "-m", "not e2e", *session.posargs)


@nox.session(venv_backend="none")
def rust(session: nox.Session) -> None:
    """The native kernel: format, lint with either AEAD library, tests, and the corpus of the fuzzers."""
    session.run("tools/check-rust", external=True)


@nox.session(venv_backend="none")
def loom(session: nox.Session) -> None:
    """The ring and the drain lease in every order of their steps, with a crash at each; needs minutes."""
    # A folder of its own: else these flags would have everything built anew.
    env = {"RUSTFLAGS": "--cfg loom", "CARGO_TARGET_DIR": str(CLONE / "rust/target/loom")}
    words = ("cargo", "test", "--release", "--locked", "--package=nebula-mp-core", "--test=loom_*")
    session.chdir("rust")
    session.run(*words, *session.posargs, external=True, env=env)


@nox.session(venv_backend="none")
def miri(session: nox.Session) -> None:
    """What needs no system call of the native kernel, under an interpreter that knows undefined behaviour.

    Needs a nightly Rust with miri and its sources: `rustup component add --toolchain nightly miri rust-src`.
    """
    env = {"MIRIFLAGS": "-Zmiri-disable-isolation", "CARGO_TARGET_DIR": str(CLONE / "rust/target/miri")}
    words = ("cargo", "+nightly", "miri", "test", "--locked", "--package=nebula-mp-core")
    session.chdir("rust")
    session.run(*words, *session.posargs, external=True, env=env)


@nox.session(venv_backend="none")
def fuzz_rust(session: nox.Session) -> None:
    """New inputs for the parsers of the native kernel, a minute each; needs a nightly Rust.

    NEBULA_MP_TEST_FUZZ_S: how many seconds. What is found is named, and is to go into rust/fuzz/corpus.
    """
    cargo_tool(session, "fuzz")
    seconds = os.environ.get("NEBULA_MP_TEST_FUZZ_S", "60")
    session.chdir("rust")
    corpus = Path("fuzz/corpus")
    for target in session.posargs or sorted(folder.name for folder in corpus.iterdir()):
        found = Path(session.create_tmp()) / target
        found.mkdir(exist_ok=True)
        words = ("cargo", "+nightly", "fuzz", "run", target, str(found), str(corpus / target))
        session.run(*words, "--", f"-max_total_time={seconds}", external=True)


@nox.session(venv_backend="none")
def deny(session: nox.Session) -> None:
    """Licences, sources and known faults of the crates that the native kernel is made of."""
    cargo_tool(session, "deny")
    session.chdir("rust")
    session.run("cargo", "deny", "--locked", "check", "licenses", "bans", "sources", external=True)
    try:
        session.run("cargo", "deny", "fetch", "db", external=True)
    except CommandFailed:
        session.warn("the database of known faults is out of reach: nobody has looked for any")
    else:
        session.run("cargo", "deny", "--locked", "check", "--disable-fetch", "advisories", external=True)


@nox.session
def differential_long(session: nox.Session) -> None:
    """A million datagrams through both kernels, which do the same; NEBULA_MP_TEST_DATAGRAMS: how many."""
    install(session)
    env = {"NEBULA_MP_TEST_DATAGRAMS": os.environ.get("NEBULA_MP_TEST_DATAGRAMS", "1e6")}
    session.run("pytest", "tests/datapath/test_kernels_agree.py", *session.posargs, env=env)


@nox.session
def package(session: nox.Session) -> None:
    """Wheels of a fresh copy, with and without cargo: what is in them, and which kernel they say it is."""
    install(session)
    env = {"NEBULA_MP_TEST_PACKAGE": "1"}
    session.run("pytest", "tests/test_packaging.py", *session.posargs, env=env)


@nox.session
def e2e(session: nox.Session) -> None:
    """Network namespaces and real Nebula releases; as root."""
    install(session)
    session.run("tools/get-peers", PEERS, external=True)
    session.run("pytest", "-m", "e2e", *session.posargs, env={"NEBULA_PEERS": PEERS})


@nox.session
def e2e_kernels(session: nox.Session) -> None:
    """All end-to-end tests on one kernel, then on the other; NEBULA_MP_KERNEL chooses one."""
    install(session)
    session.run("tools/get-peers", PEERS, external=True)
    for kernel in os.environ.get("NEBULA_MP_KERNEL", "python rust").split():
        session.log(f"kernel {kernel}")
        env = {"NEBULA_PEERS": PEERS, "NEBULA_MP_KERNEL": kernel}
        session.run("pytest", "-m", "e2e", *session.posargs, env=env)


@nox.session
def e2e_modes(session: nox.Session) -> None:
    """1, 2, 4 workers x drain modes, with the tests that do not set them themselves.

    NEBULA_MP_TEST_WORKERS and NEBULA_MP_TEST_DRAIN choose some of the nine.
    """
    run_in_modes(session, *ANY_MODE)


@nox.session
def offload_matrix(session: nox.Session) -> None:
    """Each offload off in turn, and all of them; 1, 2, 4 workers x drain modes, chosen as in e2e_modes."""
    run_in_modes(session, "tests/e2e/test_offloads.py")


@nox.session
def lossy_long(session: nox.Session) -> None:
    """1 GB each way while datagrams are lost, repeated, reordered; NEBULA_MP_TEST_LOSSY_BYTES: how much."""
    install(session)
    session.run("tools/get-peers", PEERS, external=True)
    size = os.environ.get("NEBULA_MP_TEST_LOSSY_BYTES", "1e9")
    env = {"NEBULA_PEERS": PEERS, "NEBULA_MP_TEST_LOSSY_BYTES": size}
    session.run("pytest", "tests/e2e/test_lossy.py", "-s", *session.posargs, env=env)


@nox.session
def verify_packets(session: nox.Session) -> None:
    """10 million packets out of a tunnel, each verified; NEBULA_MP_TEST_PACKETS sets another number."""
    install(session)
    session.run("tools/get-peers", PEERS, external=True)
    env = {"NEBULA_PEERS": PEERS, "NEBULA_MP_TEST_PACKETS": os.environ.get("NEBULA_MP_TEST_PACKETS", "1e7")}
    session.run("pytest", "tests/e2e/test_verified_packets.py", "-s", *session.posargs, env=env)


@nox.session
def deaths_long(session: nox.Session) -> None:
    """600 kills, one a second, in place of 30; NEBULA_MP_TEST_KILLS sets another number."""
    install(session)
    session.run("tools/get-peers", PEERS, external=True)
    kills = os.environ.get("NEBULA_MP_TEST_KILLS", "600")
    env = {"NEBULA_PEERS": PEERS, "NEBULA_MP_TEST_KILLS": kills}
    session.run("pytest", "tests/e2e/test_deaths.py", "-s", *session.posargs, env=env)


@nox.session
def docs(session: nox.Session) -> None:
    """Links, commands and figures of the documentation; every configuration in configs/."""
    install(session)
    session.run("pytest", "tests/test_docs.py", "tests/config", *session.posargs)


@nox.session
def sim_long(session: nox.Session) -> None:
    """The simulated network with 1,000 seeds instead of 40."""
    install(session)
    seeds = os.environ.get("NEBULA_MP_SIM_SEEDS", "1000")
    session.run(
        "pytest", "--numprocesses=auto", "tests/sim", *session.posargs, env={"NEBULA_MP_SIM_SEEDS": seeds}
    )


@nox.session
def fuzz_long(session: nox.Session) -> None:
    """New random examples, 20,000 for each hypothesis property that does not set its own number."""
    install(session)
    session.run(
        "pytest", "--numprocesses=auto", "--hypothesis-profile=long", "-m", "not e2e", *session.posargs
    )
