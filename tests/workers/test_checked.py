"""A configuration is checked by a process of its own, and the private key stays out of the one that asked."""

import base64
import fcntl
import os
import pickle
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import pytest

from nebula_mp import clock
from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.config.load import LoadedConfig, load_config
from nebula_mp.config.model import Config, PkiConfig
from nebula_mp.errors import CertError, ConfigError, InstanceError, NebulaError, SystemCallError
from nebula_mp.newtypes import CertVersion
from nebula_mp.workers.checked import Check, Checked, PkiSources, decode, encode, read_pki
from nebula_mp.workers.pki import load_pki
from tests.support.pki import ANY_TIME, Pki
from tests.support.processes import eventually, forked

SHARED = Pki.shared()
IDENTITY = SHARED.identity("host", "10.42.0.1/24", "fd00:42::1/64")
CA_PEM = encode_pem(SHARED.ca)
CERT_PEM = encode_pem(IDENTITY.certificates[CertVersion.V2])
KEY_PEM = encode_private_key(IDENTITY.private_key)
REST = 'static_host_map: {"10.42.0.2": ["192.0.2.2:4242", "name.example:4242"]}\nmp: {run_dir: /tmp/x}\n'


@pytest.fixture(autouse=True)
def _at_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "wall_s", lambda: ANY_TIME)


def indented(pem: str) -> str:
    return "".join(f"    {line}\n" for line in pem.splitlines())


@pytest.fixture
def by_path(tmp_path: Path) -> Path:
    for name, text in (("ca.crt", CA_PEM), ("host.crt", CERT_PEM), ("host.key", KEY_PEM)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    config = tmp_path / "config.yml"
    config.write_text(
        f"pki: {{ca: {tmp_path}/ca.crt, cert: {tmp_path}/host.crt, key: {tmp_path}/host.key}}\n{REST}"
    )
    return config


@pytest.fixture
def inline(tmp_path: Path) -> Path:
    config = tmp_path / "inline.yml"
    config.write_text(
        f"pki:\n  ca: |\n{indented(CA_PEM)}  cert: |\n{indented(CERT_PEM)}  key: |\n{indented(KEY_PEM)}{REST}"
    )
    return config


def check(load: Callable[[], LoadedConfig]) -> Checked:
    return Check.begin(load).finish()


@pytest.fixture
def checked(by_path: Path) -> Iterator[Checked]:
    found = check(lambda: load_config(by_path))
    yield found
    os.close(found.key)


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


# ---- what comes back ----


def test_paths_and_inline_text_come_back_as_text_and_the_key_only_in_its_memfd(
    by_path: Path, inline: Path
) -> None:
    for path, source in ((by_path, f"pki.key {by_path.parent}/host.key"), (inline, "pki.key (inline)")):
        found = check(lambda path=path: load_config(path))  # type: ignore[misc]  # mypy cannot infer the default

        loaded = load_config(path)
        assert found.config == replace(loaded.config, pki=PkiConfig(ca=CA_PEM, cert=CERT_PEM, key=""))
        assert found.pki_sources.key == source
        assert found.sources == (str(path),)
        assert found.warnings == ()
        assert found.networks == IDENTITY.networks
        assert found.name == "host"
        assert found.at == ANY_TIME
        assert os.pread(found.key, 4096, 0).decode() == KEY_PEM
        os.close(found.key)


def test_the_keys_memory_is_sealed_closed_on_exec_and_nobody_elses_to_open(checked: Checked) -> None:
    assert fcntl.fcntl(checked.key, fcntl.F_GET_SEALS) == 0xF
    assert fcntl.fcntl(checked.key, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    assert os.fstat(checked.key).st_mode & 0o777 == 0o400
    with pytest.raises(PermissionError):
        os.pwrite(checked.key, b"x", 0)


def test_control_makes_of_it_what_loading_in_one_process_gives(checked: Checked, by_path: Path) -> None:
    pki = read_pki(checked)

    _, direct = load_pki(load_config(by_path), ANY_TIME)
    assert pki.identity.newest == direct.identity.newest
    assert pki.identity.private_key.to_bytes() == IDENTITY.private_key.to_bytes()
    assert pki.pool.verify(IDENTITY.newest, ANY_TIME).certificate == IDENTITY.newest


def test_a_successor_of_control_can_read_it_though_the_certificate_expired_since(checked: Checked) -> None:
    late = IDENTITY.newest.not_after + 1

    assert read_pki(checked).identity.newest.name == "host"
    with pytest.raises(CertError, match="expired"):
        read_pki(checked, late)


def test_warnings_of_the_configuration_and_of_the_files_come_together(by_path: Path) -> None:
    by_path.write_text(by_path.read_text() + "nonsense: 1\n")
    (by_path.parent / "host.key").chmod(0o644)

    found = check(lambda: load_config(by_path))

    os.close(found.key)
    unknown, readable = found.warnings
    assert "nonsense: unknown key" in unknown
    assert "every user of this machine can read the private key" in readable


# ---- between our processes ----


def test_it_travels_between_processes_but_for_the_keys_descriptor(checked: Checked) -> None:
    data = encode(checked)

    assert decode(data) == replace(checked, key=-1)
    assert decode(data, key=7) == replace(checked, key=7)
    assert isinstance(decode(data).config.static_host_map, MappingProxyType)
    assert pickle.loads(pickle.dumps(checked.config)) == checked.config


def test_a_python_that_would_fetch_enumerations_by_getattr_does_not_get_to(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python 3.11.0 to 3.11.3, which is that of Debian 12.
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda self, _protocol: (getattr, (type(self), self.name)))

    assert decode(encode(checked)).config == checked.config


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"nonsense", id="nonsense"),
        pytest.param(pickle.dumps(Evil()), id="code"),
        pytest.param(pickle.dumps(7), id="another thing"),
        pytest.param(pickle.dumps(subprocess.Popen), id="another class"),
        pytest.param(b"\x80\x04cnebula_mp.workers.checked\nos.system\n.", id="a module in ours"),
        pytest.param(b"\x80\x04cnebula_mp.workers.checked\nos\n.", id="a module itself"),
        pytest.param(b"\x80\x04cnebula_mp.workers.checked\nread_pki\n.", id="a function of ours"),
        pytest.param(b"\x80\x04cipaddress\nfunctools\n.", id="what a module imported"),
    ],
)
def test_nothing_but_a_configuration_is_unpickled(data: bytes) -> None:
    with pytest.raises(ConfigError, match="checked configuration"):
        decode(data)


def test_its_text_does_not_show_the_key(checked: Checked) -> None:
    body = KEY_PEM.splitlines()[1]

    assert body not in repr(checked)
    assert body.encode() not in encode(checked)


# ---- what goes wrong over there ----


def test_all_problems_and_warnings_of_a_configuration_arrive(tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text("cipher: des\nlogging: {level: loud}\nnonsense: 1\n")
    with pytest.raises(ConfigError) as direct:
        load_config(config)

    with pytest.raises(ConfigError) as caught:
        check(lambda: load_config(config))

    assert str(caught.value) == str(direct.value)
    assert caught.value.problems == direct.value.problems
    assert caught.value.warnings == direct.value.warnings


@pytest.mark.parametrize("name", ["host.crt", "host.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, "nonsense"])
def test_a_file_that_cannot_be_used_is_told_as_if_it_were_read_here(
    name: str, content: str | None, by_path: Path
) -> None:
    (by_path.parent / name).unlink()
    if content is not None:
        (by_path.parent / name).write_text(content)
    with pytest.raises(ConfigError) as direct:
        load_pki(load_config(by_path), ANY_TIME)

    with pytest.raises(ConfigError) as caught:
        check(lambda: load_config(by_path))

    assert vars(caught.value) == vars(direct.value)
    assert str(by_path.parent / name) in str(caught.value)


def test_certificates_that_may_not_follow_those_in_force_are_refused(checked: Checked, by_path: Path) -> None:
    moved = SHARED.identity("host", "10.42.0.9/24", "fd00:42::1/64", key_of=IDENTITY)
    (by_path.parent / "host.crt").write_text(encode_pem(moved.certificates[CertVersion.V2]))

    by_path.write_text(by_path.read_text() + "nonsense: 1\n")
    with pytest.raises(ConfigError) as caught:
        Check.begin(lambda: load_config(by_path), replaces=checked).finish()

    (problem,) = caught.value.problems
    line = 1 + by_path.read_text().partition("cert:")[0].count("\n")
    assert re.match(
        rf"{re.escape(str(by_path))}:{line}:\d+: pki\.cert: {re.escape(str(by_path.parent))}/host\.crt:"
        r" networks .*10\.42\.0\.9/24.*; restart to change addresses$",
        problem,
    )
    assert [warning for warning in caught.value.warnings if "nonsense: unknown key" in warning]
    os.close(check(lambda: load_config(by_path)).key)  # to start with, they are good


def failing(error: BaseException) -> Callable[[], LoadedConfig]:
    def load() -> LoadedConfig:
        raise error

    return load


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a.yml:1:2: x: bad", "a.yml:3:4: y: bad", warnings=("w",)),
        CertError("expired"),
        SystemCallError("no right", exit_code=4),
        InstanceError("none", exit_code=3),
        NebulaError("other"),
    ],
)
def test_our_own_errors_arrive_with_all_that_the_command_line_looks_at(error: NebulaError) -> None:
    with pytest.raises(NebulaError) as caught:
        check(failing(error))

    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_a_fault_of_ours_is_told_by_its_class_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEBULA_MP_TRACEBACK", raising=False)

    with pytest.raises(NebulaError) as caught:
        check(failing(ValueError(KEY_PEM)))

    assert str(caught.value) == (
        "unexpected ValueError in the check of the configuration (NEBULA_MP_TRACEBACK=1 shows where)"
    )


def test_a_child_that_is_killed_is_an_error_and_not_a_good_configuration() -> None:
    def load() -> LoadedConfig:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    with pytest.raises(NebulaError, match="the process that checked it ended by SIGKILL"):
        check(load)


def test_somebody_who_waits_for_any_child_does_not_spoil_the_answer(by_path: Path) -> None:
    running = Check.begin(lambda: load_config(by_path))
    os.waitpid(running._pid, 0)

    found = running.finish()

    assert found.name == "host"
    os.close(found.key)


# ---- waiting ----


def test_its_descriptor_is_readable_at_the_childs_end_and_not_before(by_path: Path) -> None:
    go, start = os.pipe()

    def load() -> LoadedConfig:
        os.read(go, 1)
        return load_config(by_path)

    running = Check.begin(load)
    before = select.select([running], [], [], 0.05)[0], running.refused()
    os.write(start, b"x")
    after = select.select([running], [], [], 30)[0], running.refused()
    found = running.finish()

    assert before == ([], False)
    assert after == ([running], False)
    for descriptor in (go, start, found.key):
        os.close(descriptor)


def test_a_refusal_is_seen_without_waiting() -> None:
    running = Check.begin(failing(CertError("no")))

    assert eventually(running.refused)

    with pytest.raises(CertError):
        running.finish()


def test_a_check_given_up_leaves_neither_process_nor_descriptor() -> None:
    before = descriptors()

    def load() -> LoadedConfig:
        time.sleep(600)
        raise AssertionError

    running = Check.begin(load)
    pid = running._pid
    running.close()
    running.close()

    assert descriptors() == before
    assert running.fileno() == -1
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@pytest.mark.parametrize("load", [failing(CertError("no")), failing(ZeroDivisionError())])
def test_after_an_error_nothing_is_left_open(load: Callable[[], LoadedConfig]) -> None:
    before = descriptors()

    with pytest.raises(NebulaError):
        check(load)

    assert descriptors() == before


def test_the_child_ends_with_its_parent_and_never_runs_its_parents_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def sleep() -> LoadedConfig:
        trace.write_text(str(os.getpid()))
        time.sleep(600)
        raise AssertionError

    def parent() -> None:
        Check.begin(sleep)
        time.sleep(600)

    with forked(parent):
        assert eventually(lambda: trace.exists() and trace.read_text() != "")
        child = int(trace.read_text())
        assert Path(f"/proc/{child}").exists()
    assert eventually(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_child_that_reads_the_key_leaves_no_core_file() -> None:
    def load() -> LoadedConfig:
        raise CertError(repr(resource.getrlimit(resource.RLIMIT_CORE)))

    with pytest.raises(CertError, match=r"^\(0, 0\)$"):
        check(load)


def test_a_terminal_that_interrupts_everyone_leaves_the_decision_to_the_parent(by_path: Path) -> None:
    go, start = os.pipe()

    def load() -> LoadedConfig:
        os.read(go, 1)
        return load_config(by_path)

    running = Check.begin(load)
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(running._pid, number)
    os.write(start, b"x")

    found = running.finish()

    assert found.name == "host"
    for descriptor in (go, start, found.key):
        os.close(descriptor)


# ---- what the process that asked has in its memory ----

_PARENT = f"""
import sys
from pathlib import Path
from nebula_mp import clock
clock.wall_s = lambda: {ANY_TIME}
from nebula_mp.config.load import load_config
from nebula_mp.workers import checked
way, path = sys.argv[1], Path(sys.argv[2])
if way == "child":
    kept = checked.Check.begin(lambda: load_config(path)).finish()
elif way == "refused":
    try:
        checked.Check.begin(lambda: load_config(path)).finish()
    except Exception as error:
        print(error, file=sys.stderr)
elif way == "here":
    kept = load_config(path)
else:
    kept = checked.read_pki(checked.Check.begin(lambda: load_config(path)).finish())
print("ready", flush=True)
sys.stdin.read()
"""

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+)")
NEEDLES = {
    "base64": KEY_PEM.splitlines()[1].encode(),
    "raw": base64.b64decode(KEY_PEM.splitlines()[1]),
}


def found_in_memory_of_a_process_that_loads(way: str, config: Path) -> set[str]:
    """Which forms of the private key stand in the writable memory of a fresh process that did it that way."""
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, way, str(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        found = set()
        scanned = 0
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
            for line in maps:
                match = _MAPPING.match(line)
                assert match is not None
                start, end = int(match[1], 16), int(match[2], 16)
                if "w" in match[3]:
                    content = os.pread(memory.fileno(), end - start, start)
                    assert len(content) == end - start
                    scanned += len(content)
                    found |= {name for name, needle in NEEDLES.items() if needle in content}
        assert scanned > 1_000_000
        process.stdin.close()
        assert process.wait(30) == 0
    return found


@pytest.mark.parametrize("form", ["by_path", "inline"])
def test_the_process_that_asked_never_has_the_key_in_its_memory(
    form: str, request: pytest.FixtureRequest
) -> None:
    assert found_in_memory_of_a_process_that_loads("child", request.getfixturevalue(form)) == set()


def test_nor_does_it_when_the_configuration_is_refused(inline: Path) -> None:
    inline.write_text(inline.read_text() + "cipher: des\n")

    assert found_in_memory_of_a_process_that_loads("refused", inline) == set()


def test_the_scan_finds_the_key_where_it_is(inline: Path) -> None:
    assert "base64" in found_in_memory_of_a_process_that_loads("here", inline)
    assert "raw" in found_in_memory_of_a_process_that_loads("control", inline)


def test_sources_name_all_three_parts(checked: Checked, by_path: Path) -> None:
    directory = by_path.parent

    assert checked.pki_sources == PkiSources(
        cert=f"pki.cert {directory}/host.crt",
        key=f"pki.key {directory}/host.key",
        ca=f"pki.ca {directory}/ca.crt",
    )
    assert isinstance(checked.config, Config)
