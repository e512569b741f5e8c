"""What is read from `pki`, and what is said when it cannot be used."""

import os
from pathlib import Path

import pytest

from nebula_mp.cert.codec import encode_pem
from nebula_mp.cert.keys import encode_private_key
from nebula_mp.config.model import PkiConfig
from nebula_mp.errors import CertError, ConfigError, NebulaError
from nebula_mp.newtypes import CertVersion
from nebula_mp.workers.pki import load_pki
from tests.support.pki import ANY_TIME, Pki

SHARED = Pki.shared()
IDENTITY = SHARED.identity("host", "10.42.0.1/24")
CA_PEM = encode_pem(SHARED.ca)
CERT_PEM = encode_pem(IDENTITY.certificates[CertVersion.V2])
KEY_PEM = encode_private_key(IDENTITY.private_key)


@pytest.fixture
def files(tmp_path: Path) -> PkiConfig:
    for name, text in (("ca.crt", CA_PEM), ("host.crt", CERT_PEM), ("host.key", KEY_PEM)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    return PkiConfig(
        ca=str(tmp_path / "ca.crt"), cert=str(tmp_path / "host.crt"), key=str(tmp_path / "host.key")
    )


def test_paths_and_inline_text_give_the_same(files: PkiConfig) -> None:
    by_path = load_pki(files, ANY_TIME)
    inline = load_pki(PkiConfig(ca=CA_PEM, cert=CERT_PEM, key=KEY_PEM), ANY_TIME)

    assert by_path.identity.newest == inline.identity.newest == IDENTITY.newest
    assert by_path.warnings == inline.warnings == ()
    assert by_path.pool.verify(IDENTITY.newest, ANY_TIME).certificate == IDENTITY.newest


def test_the_blocklist_reaches_the_pool(files: PkiConfig) -> None:
    blocked = PkiConfig(ca=files.ca, cert=files.cert, key=files.key, blocklist=(IDENTITY.newest.fingerprint,))

    with pytest.raises(CertError):
        load_pki(blocked, ANY_TIME).pool.verify(IDENTITY.newest, ANY_TIME)


def test_a_key_that_everybody_can_read_is_a_warning_and_a_group_may(files: PkiConfig) -> None:
    Path(files.key).chmod(0o640)
    group = load_pki(files, ANY_TIME).warnings
    Path(files.key).chmod(0o644)
    everybody = load_pki(files, ANY_TIME).warnings

    assert group == ()
    assert everybody == (
        f"pki.key {files.key}: every user of this machine can read the private key: chmod 600 it",
    )


def test_a_certificate_that_our_own_cas_do_not_trust_is_a_warning(files: PkiConfig) -> None:
    Path(files.ca).write_text(encode_pem(Pki.other_ca().ca))

    (warning,) = load_pki(files, ANY_TIME).warnings

    assert warning.startswith(
        f"pki.cert {files.cert}: peers that trust the CAs of pki.ca {files.ca} will refuse"
    )


@pytest.mark.parametrize("key", ["ca", "cert", "key"])
def test_a_missing_file_is_named_with_its_key_and_what_makes_one(key: str, files: PkiConfig) -> None:
    path = Path(getattr(files, key))
    path.unlink()

    with pytest.raises(ConfigError) as caught:
        load_pki(files, ANY_TIME)
    assert str(caught.value).startswith(f"pki.{key} {path}: No such file or directory: ")
    assert "nebula-mp cert" in str(caught.value)


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
        pytest.param(lambda path: path.write_text(""), r"(?i)pem|no .*block|empty", id="empty"),
        pytest.param(lambda path: path.write_text("hello"), r"(?i)pem|block", id="not PEM"),
    ],
)
@pytest.mark.parametrize("key", ["ca", "cert", "key"])
def test_content_that_cannot_be_used_is_named_with_its_file(
    key: str, spoil: "object", words: str, files: PkiConfig
) -> None:
    path = Path(getattr(files, key))
    assert callable(spoil)
    spoil(path)

    with pytest.raises(NebulaError, match=words) as caught:
        load_pki(files, ANY_TIME)
    assert str(path) in str(caught.value)


def test_files_that_were_swapped_are_noticed(files: PkiConfig) -> None:
    with pytest.raises(CertError, match=r"host\.(key|crt).*swapped"):
        load_pki(PkiConfig(ca=files.ca, cert=files.key, key=files.cert), ANY_TIME)


def test_another_hosts_key_an_expired_certificate_and_a_ca_are_refused(files: PkiConfig) -> None:
    other = encode_private_key(SHARED.identity("other", "10.42.0.2/24").private_key)
    for config, at, words in (
        (PkiConfig(ca=CA_PEM, cert=CERT_PEM, key=other), ANY_TIME, "pair"),
        (files, IDENTITY.newest.not_after + 1, "expired"),
        (files, IDENTITY.newest.not_before - 1, "valid"),
        (PkiConfig(ca=CA_PEM, cert=CA_PEM, key=KEY_PEM), ANY_TIME, "CA"),
    ):
        with pytest.raises(CertError, match=words) as caught:
            load_pki(config, at)
        assert "PRIVATE" not in str(caught.value)


@pytest.mark.parametrize("value", ["pkcs11:token=x;object=y", " ", "a\0b"])
def test_a_value_that_is_neither_path_nor_pem_is_refused(value: str, files: PkiConfig) -> None:
    with pytest.raises(ConfigError, match=r"pki\.key"):
        load_pki(PkiConfig(ca=files.ca, cert=files.cert, key=value), ANY_TIME)


def test_no_message_and_no_repr_shows_the_private_key(files: PkiConfig) -> None:
    secret = "".join(KEY_PEM.splitlines()[1:-1])
    broken = PkiConfig(ca=files.ca, cert=files.cert, key=KEY_PEM.replace("X25519", "X25520"))

    with pytest.raises(NebulaError) as caught:
        load_pki(broken, ANY_TIME)

    assert secret[:12] not in str(caught.value)
    assert secret[:12] not in repr(load_pki(files, ANY_TIME))
