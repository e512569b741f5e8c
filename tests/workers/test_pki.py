"""What is read from `pki`, and what is said when it cannot be used."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.config.load import load_config
from nebula_mp.errors import CertError, ConfigError
from nebula_mp.newtypes import CertVersion
from nebula_mp.workers.pki import Pki as Loaded
from nebula_mp.workers.pki import load_pki
from tests.support.pki import ANY_TIME, Pki

SHARED = Pki.shared()
IDENTITY = SHARED.identity("host", "10.42.0.1/24")
CA_PEM = encode_pem(SHARED.ca)
CERT_PEM = encode_pem(IDENTITY.certificates[CertVersion.V2])
KEY_PEM = encode_private_key(IDENTITY.private_key)
OTHER_KEY_PEM = encode_private_key(SHARED.identity("other", "10.42.0.2/24").private_key)
LINES = {"ca": 2, "cert": 3, "key": 4}  # of the values in what `configure` writes


def configure(directory: Path, **changes: object) -> Path:
    """A configuration with ca, cert and key in this order, one a line as long as they are paths."""
    names = {"ca": "ca.crt", "cert": "host.crt", "key": "host.key"}
    pki = {**{key: str(directory / name) for key, name in names.items()}, **changes}
    path = directory / "config.yml"
    path.write_text(yaml.safe_dump({"pki": pki}, sort_keys=False, width=1000))
    return path


def judge(config: Path, at: int = ANY_TIME) -> Loaded:
    _, pki = load_pki(load_config(config), at)
    return pki


def problems(config: Path, at: int = ANY_TIME) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        judge(config, at)
    return caught.value.problems


def write_files(directory: Path) -> Path:
    """Good files and a configuration that names them; its path."""
    for name, text in (("ca.crt", CA_PEM), ("host.crt", CERT_PEM), ("host.key", KEY_PEM)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o600)
    return configure(directory)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_files(tmp_path)


def path_of(config: Path, key: str) -> Path:
    return config.parent / {"ca": "ca.crt", "cert": "host.crt", "key": "host.key"}[key]


def beginning(config: Path, key: str) -> str:
    """How a problem with the file of this key begins."""
    return f"{config}:{LINES[key]}:{len(key) + 5}: pki.{key}: {path_of(config, key)}"


# ---- what is good ----


def test_paths_and_inline_text_give_the_same(config: Path) -> None:
    by_path = judge(config)
    texts, inline = load_pki(
        load_config(configure(config.parent, ca=CA_PEM, cert=CERT_PEM, key=KEY_PEM)), ANY_TIME
    )

    assert by_path.identity.newest == inline.identity.newest == IDENTITY.newest
    assert by_path.warnings == inline.warnings == ()
    assert by_path.pool.verify(IDENTITY.newest, ANY_TIME).certificate == IDENTITY.newest
    assert (texts.ca.text, texts.certificate.text, texts.key.text) == (CA_PEM, CERT_PEM, KEY_PEM)


def test_the_blocklist_reaches_the_pool(config: Path) -> None:
    configure(config.parent, blocklist=[IDENTITY.newest.fingerprint])

    with pytest.raises(CertError):
        judge(config).pool.verify(IDENTITY.newest, ANY_TIME)


def test_a_key_that_everybody_can_read_is_a_warning_and_a_group_may(config: Path) -> None:
    key = path_of(config, "key")
    key.chmod(0o640)
    group = judge(config).warnings
    key.chmod(0o644)
    everybody = judge(config).warnings

    assert group == ()
    assert everybody == (f"pki.key {key}: every user of this machine can read the private key: chmod 600 it",)


def test_a_certificate_that_our_own_cas_do_not_trust_is_a_warning(config: Path) -> None:
    path_of(config, "ca").write_text(encode_pem(Pki.other_ca().ca))

    (warning,) = judge(config).warnings

    ca, cert = path_of(config, "ca"), path_of(config, "cert")
    assert warning.startswith(f"pki.cert {cert}: peers that trust the CAs of pki.ca {ca} will refuse")


# ---- what is wrong with one of the three ----


@pytest.mark.parametrize("key", ["ca", "cert", "key"])
def test_a_missing_file_is_named_with_its_key_its_line_and_what_makes_one(key: str, config: Path) -> None:
    path_of(config, key).unlink()

    (problem,) = problems(config)

    assert problem.startswith(f"{beginning(config, key)}: No such file or directory: ")
    assert "nebula-mp cert" in problem


def spoil_with_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def spoil_with_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(spoil_with_directory, "Is a directory|not a regular file", id="directory"),
        pytest.param(spoil_with_pipe, "not a regular file", id="pipe"),
        pytest.param(lambda path: path.write_bytes(b"\x30\x82\xff\x00"), "binary data", id="binary"),
        pytest.param(lambda path: path.write_bytes(bytes(2 << 20)), "more than 1048576 bytes", id="huge"),
        pytest.param(lambda path: path.write_text(""), "no PEM block found", id="empty"),
        pytest.param(lambda path: path.write_text("hello"), "no PEM block found", id="not PEM"),
    ],
)
@pytest.mark.parametrize("key", ["ca", "cert", "key"])
def test_content_that_cannot_be_used_is_named_with_its_file_and_line(
    key: str, spoil: Callable[[Path], object], words: str, config: Path
) -> None:
    spoil(path_of(config, key))

    (problem,) = problems(config)

    assert problem.startswith(f"{beginning(config, key)}: ")
    assert re.search(words, problem)


@contextmanager
def without_rights() -> Iterator[int]:
    """As somebody who may not read everything, as root may; the user's number."""
    if os.geteuid() != 0:
        yield os.geteuid()
        return
    os.seteuid(65534)
    try:
        yield 65534
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("key", ["ca", "cert", "key"])
def test_a_file_we_may_not_read_is_named_with_who_we_are(key: str) -> None:
    with TemporaryDirectory() as name:  # the directories of pytest are for one user only
        config = write_files(Path(name))
        config.parent.chmod(0o755)
        for other in LINES:
            path_of(config, other).chmod(0o644 if other != key else 0)
        loaded = load_config(config)
        with without_rights() as user, pytest.raises(ConfigError) as caught:
            load_pki(loaded, ANY_TIME)

    assert caught.value.problems == (
        f"{beginning(config, key)}: Permission denied: run as root, or let uid {user} read it",
    )


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        (
            "ca",
            CERT_PEM,
            r"block 1 \(line 1\): host: certificate is not a CA; give the certificate that signs",
        ),
        ("cert", CA_PEM, "is a CA certificate; pki.cert needs one that the CA signed for this host"),
        ("cert", KEY_PEM, "is a host's private key .* swapped"),
        ("key", CERT_PEM, "is a certificate .* swapped"),
        ("cert", CERT_PEM + "x\n", "text after the last PEM block; remove it"),
        ("cert", CERT_PEM * 2, "v2 certificate already found at line 1; keep one of each version"),
    ],
)
def test_pem_that_is_something_else_is_named_with_file_and_line_of_its_key(
    key: str, text: str, words: str, config: Path
) -> None:
    path_of(config, key).write_text(text)

    (problem,) = problems(config)

    assert problem.startswith(f"{beginning(config, key)}:")
    assert re.search(words, problem)


@pytest.mark.parametrize(
    ("at", "words"),
    [
        (IDENTITY.newest.not_after + 1, "expired .*; sign a new one"),
        (IDENTITY.newest.not_before - 1, "is not valid before .*; check the clock"),
    ],
)
def test_a_certificate_outside_its_time_is_named_with_its_line(at: int, words: str, config: Path) -> None:
    cert_problems = [problem for problem in problems(config, at) if ": pki.cert: " in problem]

    assert len(cert_problems) == 1
    assert cert_problems[0].startswith(beginning(config, "cert"))
    assert re.search(words, cert_problems[0])


def test_cas_of_which_none_is_valid_any_more_are_named_one_by_one(config: Path) -> None:
    late = problems(config, SHARED.ca.not_after + 1)

    ca_problems = [problem for problem in late if ": pki.ca: " in problem]
    assert len(ca_problems) == 2
    assert all(problem.startswith(f"{beginning(config, 'ca')}: ") for problem in ca_problems)
    assert "expired" in ca_problems[0]
    assert ca_problems[1].endswith("no valid CA certificates present")


@pytest.mark.parametrize("value", [" ", "~nowhere"])
def test_a_value_that_is_no_path_is_refused_with_its_line(value: str, config: Path) -> None:
    configure(config.parent, key=value)

    (problem,) = problems(config)

    assert problem.startswith(f"{config}:4:8: pki.key: ")
    assert "nebula-mp cert" in problem


# ---- what is wrong with several ----


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(Path.unlink, "No such file or directory", id="missing"),
        pytest.param(lambda path: path.write_text("hello"), "no PEM block found", id="not PEM"),
    ],
)
def test_problems_of_all_three_are_told_at_once_in_the_order_of_the_file(
    spoil: Callable[[Path], object], words: str, config: Path
) -> None:
    for key in ("key", "cert", "ca"):
        spoil(path_of(config, key))

    found = problems(config)

    assert len(found) == 3
    for key, problem in zip(("ca", "cert", "key"), found, strict=True):
        assert problem.startswith(f"{beginning(config, key)}: {words}")


def test_a_missing_file_does_not_hide_what_is_wrong_inside_the_others(config: Path) -> None:
    path_of(config, "key").unlink()
    path_of(config, "ca").write_text(CERT_PEM)
    configure(config.parent, initiating_version=1)

    ca, key, version = problems(config)

    assert "certificate is not a CA" in ca
    assert "No such file or directory" in key
    assert version == (
        f"{config}:5:23: pki.initiating_version: is 1, but pki.cert {path_of(config, 'cert')}"
        " holds no v1 certificate"
    )


def test_a_key_that_is_no_pair_of_the_certificate_is_named_with_both_files(config: Path) -> None:
    path_of(config, "key").write_text(OTHER_KEY_PEM)

    (problem,) = problems(config)

    assert problem.startswith(
        f"{beginning(config, 'cert')}: block 1 (line 1): v2 certificate 'host' is not a "
    )
    assert f"pair with pki.key {path_of(config, 'key')}: " in problem
    assert problem.endswith("use the key made with this certificate, or sign the other public key")


def test_files_that_were_swapped_are_both_named(config: Path) -> None:
    names = {key: str(path_of(config, key)) for key in ("cert", "key")}
    configure(config.parent, cert=names["key"], key=names["cert"])

    cert, key = problems(config)

    assert cert.startswith(f"{config}:3:9: pki.cert: {names['key']}: ")
    assert key.startswith(f"{config}:4:8: pki.key: {names['cert']}: ")
    assert "swapped" in cert
    assert "swapped" in key


def test_warnings_of_the_configuration_and_of_good_files_come_with_the_problems(config: Path) -> None:
    configure(config.parent, initiating_version=1)  # which is not to be had of a v2 certificate
    config.write_text(config.read_text() + "nonsense: 1\npunchy: {punch: true}\n")
    path_of(config, "key").chmod(0o644)
    path_of(config, "ca").write_text(encode_pem(Pki.other_ca().ca))

    with pytest.raises(ConfigError) as caught:
        judge(config)

    assert len(caught.value.problems) == 1
    unknown, later, *of_files = caught.value.warnings
    assert "nonsense: unknown key" in unknown
    assert "without effect here yet: punchy.punch" in later
    assert len(of_files) == 2
    assert any("every user of this machine can read" in warning for warning in of_files)
    assert any("will refuse certificate 'host'" in warning for warning in of_files)


# ---- text in the configuration itself ----


def test_a_problem_of_inline_text_names_its_line(config: Path) -> None:
    configure(config.parent, key=OTHER_KEY_PEM.replace("X25519", "X25520"))

    (problem,) = problems(config)

    assert problem.startswith(f"{config}:4:8: pki.key: (inline): block 1 (line 1) is ")


def test_no_message_and_no_repr_shows_the_private_key(config: Path) -> None:
    secret = "".join(KEY_PEM.splitlines()[1:-1])
    good = judge(config)
    configure(config.parent, key=KEY_PEM.replace("X25519", "X25520"))
    no_key = problems(config)
    configure(config.parent, key=OTHER_KEY_PEM)
    no_pair = problems(config)

    for said in (
        *no_key,
        *no_pair,
        repr(good),
        repr(load_pki(load_config(configure(config.parent)), ANY_TIME)),
    ):
        assert "PRIVATE KEY-" not in said
        assert secret[:12] not in said
        assert OTHER_KEY_PEM.splitlines()[1][:12] not in said
