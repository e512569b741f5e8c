"""What `nebula-mp start` says and returns on a machine or with a configuration it cannot work with.

The real program is started in a namespace, up to three times: each start ends with the right code and one clear
message and leaves nothing behind, and one of them within a second, since a busy machine may hold up the others.
Unit tests hold the exact texts; here each message must name what has to be changed.
"""

import contextlib
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import pairs
from tests.support.netns import Site, entered, wait_until
from tests.support.nodes import DEVICE, PORT, Pair, Variant
from tests.support.peers import OURS, our_command

pytestmark = pytest.mark.e2e

_WITHIN_S = 1.0
_ATTEMPTS = 3
_FAILED = 1
_NEEDS_ROOT = 4
_NOBODY = "65534"
_HOLD_DEVICE = """
import fcntl, struct, sys
TUNSETIFF, IFF_TUN = 0x400454CA, 0x0001
with open("/dev/net/tun", "r+b", buffering=0) as device:
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", sys.argv[1].encode(), IFF_TUN))
    sys.stdin.read()
"""

GOOD = """\
pki:
  ca: {ca}
  cert: {cert}
  key: {key}
cipher: aes
static_host_map:
  "10.42.0.2": ["10.99.2.2:4242"]
listen:
  host: 0.0.0.0
  port: 4242
tun:
  dev: nebula1
  mtu: 1300
handshakes:
  try_interval: 100ms
  retries: 10
logging:
  level: info
mp:
  run_dir: {run_dir}
firewall:
  outbound:
    - port: any
      proto: any
      host: any
  inbound:
    - port: any
      proto: any
      host: any
"""


@dataclass(frozen=True)
class Refusal:
    """How a start ended."""

    code: int
    seconds: float
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Place:
    """A site with good files for one gateway, in which each test spoils something."""

    pair: Pair
    home: Path

    @property
    def files(self) -> dict[str, str]:
        host = self.pair.a.host
        run_dir = self.home / "run"
        return {
            "ca": str(host.authority),
            "cert": str(host.certificate),
            "key": str(host.key),
            "run_dir": str(run_dir),
        }

    def start(self, config: str, *prefix: str) -> Refusal:
        """Start with that configuration, in the site's namespace, by way of `prefix`."""
        path = self.home / "config.yml"
        path.write_text(config)
        argv = self.pair.a.site.space.command(*prefix, *our_command("start", "-c", str(path)))
        started = time.monotonic()
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=False)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it runs:\n{error.stdout!r}\n{error.stderr!r}") from None
        return Refusal(done.returncode, time.monotonic() - started, done.stdout, done.stderr)

    def assert_refused_and_within_a_second_at_best(
        self, config: str, code: int, words: Sequence[str], *prefix: str, left: Sequence[int] = ()
    ) -> None:
        """Every start is refused with `code` by one message which has all of `words`; only `left` still runs.

        One start of at most `_ATTEMPTS` ends in time: the quickest counts, the others may meet a busy machine.
        """
        took: list[float] = []
        while len(took) < _ATTEMPTS and min(took, default=math.inf) > _WITHIN_S:
            refusal = self.start(config, *prefix)
            took.append(refusal.seconds)
            assert refusal.code == code, refusal
            lines = [line for line in refusal.stderr.splitlines() if not line.startswith("warning")]
            assert len(lines) == 1, refusal.stderr
            for word in words:
                assert re.search(word, lines[0]), f"{word!r} is not in: {lines[0]}"
            assert "Traceback" not in refusal.stdout + refusal.stderr
            assert self.pair.a.site.space.pids() == list(left)
        assert min(took) <= _WITHIN_S, f"no start of {_ATTEMPTS} ended within {_WITHIN_S} s: {took}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("refused")
    with pairs(home) as make:
        pair = make(OURS, Variant("v1-25519"))
        (home / "run").mkdir(mode=0o777)
        (home / "run").chmod(0o777)  # so that a start without root fails for no other reason
        yield Place(pair, home)


def _capabilities(kept: str) -> list[str]:
    return [f"--{which}={kept}" for which in ("inh-caps", "ambient-caps", "bounding-set")]


@pytest.mark.parametrize(
    "privileges",
    [
        # May read everything, so that it does not matter where Python and the clone are; nothing else.
        pytest.param(
            [
                "--reuid",
                _NOBODY,
                "--regid",
                _NOBODY,
                "--clear-groups",
                *_capabilities("-all,+dac_read_search"),
            ],
            id="another-user",
        ),
        pytest.param(["--bounding-set=-all", "--inh-caps=-all"], id="root-without-capabilities"),
    ],
)
def test_start_without_the_right_to_make_devices_ends_with_4(place: Place, privileges: list[str]) -> None:
    words = ["CAP_NET_ADMIN", "root"]
    place.assert_refused_and_within_a_second_at_best(
        GOOD.format(**place.files), _NEEDS_ROOT, words, "setpriv", *privileges
    )
    assert not place.pair.a.site.has_device(DEVICE)


def test_start_without_dev_net_tun_says_how_to_get_it(place: Place) -> None:
    hidden = 'mount -t tmpfs none /dev/net && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", hidden, "sh"]
    place.assert_refused_and_within_a_second_at_best(
        GOOD.format(**place.files), _FAILED, ["/dev/net/tun", "modprobe tun"], *prefix
    )


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "with-SO_REUSEPORT"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.99.1.2"])
def test_start_on_a_port_in_use_names_the_port(place: Place, host: str, *, shared: bool) -> None:
    with entered(place.pair.a.site.space):
        holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    with holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        holder.bind((host, PORT))
        config = GOOD.format(**place.files).replace("0.0.0.0", f'"{host}"')
        place.assert_refused_and_within_a_second_at_best(
            config, _FAILED, [f"{PORT}", "taken", f"pid {os.getpid()}"]
        )
    assert not place.pair.a.site.has_device(DEVICE)


def test_start_with_a_device_name_in_use_names_the_device_and_who_has_it(place: Place) -> None:
    site = place.pair.a.site
    with _holder_of_device(site) as holder:
        words = [f"'{DEVICE}'", f"pid {holder}"]
        place.assert_refused_and_within_a_second_at_best(
            GOOD.format(**place.files), _FAILED, words, left=[holder]
        )
        assert site.has_device(DEVICE), "what others made stays"


def test_start_with_a_device_name_in_use_blames_no_process_of_another_namespace(place: Place) -> None:
    site, elsewhere = place.pair.a.site, place.pair.b.site
    site.ip("tuntap", "add", "dev", DEVICE, "mode", "tun")
    try:
        with _holder_of_device(elsewhere):
            place.assert_refused_and_within_a_second_at_best(
                GOOD.format(**place.files), _FAILED, [f"'{DEVICE}'.*existing interface"]
            )
        assert site.has_device(DEVICE), "what others made stays"
    finally:
        site.ip("link", "del", DEVICE)


@contextlib.contextmanager
def _holder_of_device(site: Site) -> Iterator[int]:
    """A process in that site which has a TUN device open; its id."""
    argv = site.space.command("setpriv", "--pdeathsig", "KILL", sys.executable, "-c", _HOLD_DEVICE, DEVICE)
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:  # ends when its stdin is closed
        wait_until(lambda: site.has_device(DEVICE), "the device of another program", within_s=5)
        yield process.pid


def test_start_with_the_key_of_another_host_names_both_files(place: Place) -> None:
    other = place.pair.b.host
    files = {**place.files, "key": str(other.key)}
    words = [
        rf"config\.yml:3:9: pki\.cert: {re.escape(files['cert'])}: .*not a pair",
        re.escape(files["key"]),
    ]
    place.assert_refused_and_within_a_second_at_best(GOOD.format(**files), _FAILED, words)


def test_start_with_an_expired_certificate_names_the_file_and_says_expired(place: Place) -> None:
    pair = place.pair
    public = pair.a.host.key.with_suffix(".pub")
    expired = place.home / "expired.crt"
    pem = pair.tool.sign(pair.authorities[1], "host-late", public, pair.a.host.networks, duration="1s")
    expired.write_text(pem)
    signed = time.time()
    wait_until(lambda: time.time() > signed + 2, "the certificate has expired", within_s=5)

    files = {**place.files, "cert": str(expired)}
    words = [rf"config\.yml:3:9: pki\.cert: {re.escape(str(expired))}: .*expired .*sign a new one"]
    place.assert_refused_and_within_a_second_at_best(GOOD.format(**files), _FAILED, words)


def test_start_with_a_ca_in_the_place_of_the_host_says_so(place: Place) -> None:
    files = {**place.files, "cert": place.files["ca"], "key": place.files["key"]}
    words = [rf"config\.yml:3:9: pki\.cert: {re.escape(files['cert'])}: .*is a CA certificate"]
    place.assert_refused_and_within_a_second_at_best(GOOD.format(**files), _FAILED, words)


def test_start_with_a_host_in_the_place_of_the_ca_says_so(place: Place) -> None:
    files = {**place.files, "ca": place.files["cert"]}
    words = [
        rf"config\.yml:2:7: pki\.ca: {re.escape(files['ca'])}: .*is not a CA; give the certificate that signs"
    ]
    place.assert_refused_and_within_a_second_at_best(GOOD.format(**files), _FAILED, words)


def test_start_with_three_files_that_cannot_be_used_names_all_of_them_beside_the_warnings(
    place: Place,
) -> None:
    files = {**place.files, "ca": "/nowhere/ca.crt", "cert": "/nowhere/a.crt", "key": "/tmp"}
    config = GOOD.format(**files).replace("cipher: aes\n", "ciper: aes\n")
    refusal = place.start(config)

    assert refusal.code == _FAILED
    said = [line.replace(f"{place.home}/", "") for line in refusal.stderr.splitlines()]
    assert [line.split(": ")[:4] for line in said] == [
        ["warning", "config.yml:5:1", "ciper", 'unknown key; did you mean "cipher"?'],
        ["config.yml:2:7", "pki.ca", "/nowhere/ca.crt", "No such file or directory"],
        ["config.yml:3:9", "pki.cert", "/nowhere/a.crt", "No such file or directory"],
        ["config.yml:4:8", "pki.key", "/tmp", said[3].split(": ")[3]],
    ]


# What is replaced in GOOD, by what, and what the message must say; `{line}` is where the replacement begins.
_BAD = {
    "broken-yaml": ("pki:\n", "pki: [\n", ["config.yml:"]),
    "tab-for-indentation": ("  host: 0.0.0.0", "\thost: 0.0.0.0", ["config.yml:{line}:"]),
    "a-list-at-the-top": (GOOD, "- pki\n- listen\n", ["config.yml"]),
    "the-same-key-twice": ("  port: 4242\n", "  port: 4242\n  port: 4243\n", ["config.yml:11:", "port"]),
    "no-ca": ("  ca: {ca}\n", "", [r"config\.yml:1:1: pki\.ca: required"]),
    "no-cert": ("  cert: {cert}\n", "", [r"config\.yml:1:1: pki\.cert: required"]),
    "no-key": ("  key: {key}\n", "", [r"config\.yml:1:1: pki\.key: required"]),
    "a-ca-that-is-not-there": (
        "{ca}",
        "/nowhere/ca.crt",
        [r"config\.yml:{line}:7: pki\.ca: /nowhere/ca\.crt: No such file.*nebula-mp cert ca"],
    ),
    "a-certificate-that-is-not-there": (
        "{cert}",
        "/nowhere/a.crt",
        [r"config\.yml:{line}:9: pki\.cert: /nowhere/a\.crt: No such file.*nebula-mp cert sign"],
    ),
    "a-key-that-is-a-directory": (
        "{key}",
        "/tmp",
        [r"config\.yml:{line}:8: pki\.key: /tmp: .*(regular file|directory)"],
    ),
    "a-certificate-that-is-no-pem": (
        "{cert}",
        "{config}",
        [r"config\.yml:{line}:9: pki\.cert: \S+/config\.yml: no PEM block found"],
    ),
    "an-unknown-cipher": ("cipher: aes", "cipher: des", ["config.yml:{line}:", "cipher", "aes"]),
    "a-port-too-high": ("  port: 4242", "  port: 70000", ["config.yml:{line}:", r"listen\.port", "65535"]),
    "a-port-with-a-letter": (
        "  port: 4242",
        "  port: 4242x",
        ["config.yml:{line}:", r"listen\.port", "4242x"],
    ),
    "listen-as-a-list": ("  host: 0.0.0.0\n  port: 4242\n", "  - 4242\n", ["config.yml:{line}:", "listen"]),
    "a-map-key-that-is-no-address": (
        '"10.42.0.2"',
        '"peer"',
        ["config.yml:{line}:", "static_host_map", "peer"],
    ),
    "a-remote-without-port": (
        "10.99.2.2:4242",
        "10.99.2.2",
        ["config.yml:{line}:", "static_host_map", "port"],
    ),
    "a-device-name-too-long": ("nebula1", "nebula-with-a-name", ["config.yml:{line}:", r"tun\.dev", "15"]),
    "an-mtu-that-is-no-number": ("mtu: 1300", "mtu: large", ["config.yml:{line}:", r"tun\.mtu", "large"]),
    "a-duration-without-unit": ("100ms", "fast", ["config.yml:{line}:", r"handshakes\.try_interval", "fast"]),
    "retries-below-zero": (
        "retries: 10",
        "retries: -1",
        ["config.yml:{line}:", r"handshakes\.retries", "-1"],
    ),
    "an-unknown-level": ("level: info", "level: loud", ["config.yml:{line}:", r"logging\.level", "loud"]),
    "an-unknown-protocol": (
        "      proto: any\n      host: any\n  inbound",
        "      proto: tpc\n      host: any\n  inbound",
        ["config.yml:{line}:", r"firewall\.outbound\[0\]\.proto", "tpc"],
    ),
    "a-rule-for-a-group": (
        "      host: any\n  inbound",
        "      group: servers\n  inbound",
        ["config.yml:23:", r"firewall\.outbound\[0\]", "group"],
    ),
    "a-rule-without-port": (
        "    - port: any\n      proto: any\n      host: any\n  inbound",
        "    - proto: any\n      host: any\n  inbound",
        ["config.yml:{line}:", r"firewall\.outbound\[0\]\.port"],
    ),
}


@pytest.mark.parametrize("name", _BAD)
def test_start_with_a_bad_configuration_names_line_and_key(place: Place, name: str) -> None:
    old, new, words = _BAD[name]
    assert GOOD.count(old) >= 1
    line = 1 + GOOD[: GOOD.index(old)].count("\n")
    config = GOOD.replace(old, new, 1)
    for key, value in {**place.files, "config": str(place.home / "config.yml")}.items():
        config = config.replace(f"{{{key}}}", value)

    place.assert_refused_and_within_a_second_at_best(
        config, _FAILED, [word.replace("{line}", str(line)) for word in words]
    )


def test_start_with_several_faults_names_them_all(place: Place) -> None:
    refusal = place.start("cipher: des\nlogging:\n  level: loud\n")

    assert refusal.code == _FAILED
    for key in ("pki.ca", "pki.cert", "pki.key", "cipher", "logging.level"):
        assert sum(f": {key}: " in line for line in refusal.stderr.splitlines()) == 1, refusal.stderr


def test_start_with_a_configuration_that_is_not_there_names_the_file(place: Place) -> None:
    argv = place.pair.a.site.space.command(*our_command("start", "-c", "/nowhere/config.yml"))
    done = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=False)

    assert done.returncode == _FAILED
    assert "/nowhere/config.yml" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_configuration_all_these_are_made_of_is_good_and_starts_once(place: Place) -> None:
    good = GOOD.format(**place.files)
    path = place.home / "good.yml"
    path.write_text(good)
    argv = place.pair.a.site.space.command(*our_command("start", "-c", str(path)))
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        with contextlib.ExitStack() as stack:
            stack.callback(process.terminate)
            wait_until(lambda: place.pair.a.site.has_device(DEVICE), "the device", within_s=5)
            second = place.start(good)
            assert second.code == _FAILED, second
            assert f"pid {process.pid}" in second.stderr, second
            assert place.pair.a.site.has_device(DEVICE)
            assert process.poll() is None
        assert process.wait(5) == 0
