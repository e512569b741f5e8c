from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert import codec
from nebula_mp.cert.identity import Identity
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve
from tests.cert.helpers import AT, DAY, Host, make_ca, make_host, networks
from tests.support import vectors

FILES = vectors.DIRECTORY / "certs"
GENERATED_AT = vectors.load("certs")["generated_at"]

CA = make_ca()
V1 = make_host(CA, version=1)
V2 = make_host(CA, version=2)
BOTH = V1.pem + V2.pem


def load(
    cert: str, key: str = V2.key_pem, *, initiating_version: int | None = None, at: int = AT
) -> Identity:
    return Identity.from_pem(
        cert,
        key,
        cert_source="/etc/nebula/host.crt",
        key_source="/etc/nebula/host.key",
        initiating_version=initiating_version,
        at=at,
    )


def error(*args: str, initiating_version: int | None = None, at: int = AT) -> str:
    with pytest.raises(CertError) as caught:
        load(*args, initiating_version=initiating_version, at=at)
    return str(caught.value)


@pytest.mark.parametrize("curve", Curve)
def test_a_file_with_both_versions_made_by_nebula_gives_both(curve: Curve) -> None:
    name = "P256" if curve is Curve.P256 else "25519"
    identity = load(
        (FILES / f"host-dual-{name}-bundle.crt").read_text(),
        (FILES / f"host-dual-{name}.key").read_text(),
        at=GENERATED_AT,
    )

    assert set(identity.certificates) == {CertVersion.V1, CertVersion.V2}
    assert identity.curve is curve
    assert identity.newest is identity.certificates[CertVersion.V2]
    assert identity.networks == identity.newest.networks
    assert identity.private_key.public_key == identity.newest.public_key


@pytest.mark.parametrize(
    ("cert", "asked", "initiating"),
    [
        pytest.param(V1.pem, None, 1, id="v1"),
        pytest.param(V2.pem, None, 2, id="v2"),
        pytest.param(BOTH, None, 1, id="both"),
        pytest.param(V2.pem + V1.pem, None, 1, id="both, the other way round"),
        pytest.param(BOTH, 1, 1, id="both, 1 asked for"),
        pytest.param(BOTH, 2, 2, id="both, 2 asked for"),
        pytest.param(V1.pem, 1, 1, id="v1 and 1 asked for"),
        pytest.param(V1.pem, 2, 1, id="v1 although 2 was asked for, as in Nebula"),
        pytest.param(V2.pem, 2, 2, id="v2 and 2 asked for"),
    ],
)
def test_handshakes_start_with_v1_where_there_is_one_unless_asked_for_otherwise(
    cert: str, asked: int | None, initiating: int
) -> None:
    identity = load(cert, initiating_version=asked)

    assert identity.initiating_version == initiating
    assert identity.initiating_version in identity.certificates


def test_version_1_cannot_be_asked_for_without_a_v1_certificate() -> None:
    assert error(V2.pem, initiating_version=1) == (
        "pki.initiating_version is 1, but /etc/nebula/host.crt holds no v1 certificate"
    )


@pytest.mark.parametrize("asked", [0, 3, -1])
def test_there_are_two_initiating_versions(asked: int) -> None:
    assert error(BOTH, initiating_version=asked) == f"unknown pki.initiating_version: {asked}"


def test_the_newest_certificate_is_v1_when_there_is_no_other() -> None:
    identity = load(V1.pem)

    assert identity.newest == V1.certificate
    assert identity.networks == networks("10.0.0.1/8")


def test_the_private_key_does_not_show() -> None:
    identity = load(BOTH)

    assert identity.private_key.to_bytes().hex() not in repr(identity)
    assert repr(identity.private_key.to_bytes()) not in repr(identity)


# The texts are for people, so they are written out whole.


def test_an_expired_certificate_is_reported_with_dates_clock_and_what_to_do() -> None:
    assert error(V1.pem, at=AT + DAY + 1) == (
        "/etc/nebula/host.crt: block 1 (line 1): v1 certificate 'host' expired at 2027-01-16 08:00:00 UTC; "
        "this machine's clock says 2027-01-16 08:00:01 UTC; "
        "sign a new one: nebula-mp cert sign -in-pub HOST.pub, or check the clock"
    )


def test_a_certificate_of_the_future_is_reported_with_dates_and_clock() -> None:
    assert error(V2.pem, at=AT - DAY - 1) == (
        "/etc/nebula/host.crt: block 1 (line 1): v2 certificate 'host' is not valid before "
        "2027-01-14 08:00:00 UTC; this machine's clock says 2027-01-14 07:59:59 UTC; check the clock"
    )


def test_one_expired_certificate_of_two_is_enough_to_refuse() -> None:
    short = make_host(CA, version=2, not_after=AT)

    assert error(V1.pem + short.pem, at=AT + 1).startswith(
        "/etc/nebula/host.crt: block 2 (line 7): v2 certificate 'host' expired at"
    )


def test_a_ca_certificate_is_no_host_certificate() -> None:
    assert error(CA.pem) == (
        "/etc/nebula/host.crt: block 1 (line 1): v2 certificate 'ca' is a CA certificate; "
        "pki.cert needs one that the CA signed for this host"
    )


def test_a_key_of_another_host_is_reported_with_both_public_keys() -> None:
    other = make_host(CA, "other")

    assert error(V2.pem, other.key_pem) == (
        "/etc/nebula/host.crt: block 1 (line 1): v2 certificate 'host' is not a pair with "
        f"/etc/nebula/host.key: the certificate is for public key {V2.key.public_key.hex()}, "
        f"the private key has {other.key.public_key.hex()}; "
        "use the key made with this certificate, or sign the other public key"
    )


def test_a_second_certificate_for_another_key_is_reported_too() -> None:
    other = make_host(CA, "other", version=2)

    assert error(V1.pem + other.pem).startswith(
        "/etc/nebula/host.crt: block 2 (line 7): v2 certificate 'other' is not a pair with"
    )


def test_a_key_of_another_curve_is_reported() -> None:
    p256 = make_host(make_ca(curve=Curve.P256))

    assert error(V2.pem, p256.key_pem) == (
        "/etc/nebula/host.crt: block 1 (line 1): v2 certificate 'host' is for curve CURVE25519, "
        "but /etc/nebula/host.key holds a P256 key"
    )


def test_two_certificates_of_one_version_are_one_too_many() -> None:
    assert error(V1.pem + V2.pem + V1.pem) == (
        "/etc/nebula/host.crt: block 3 (line 13): v1 certificate already found at line 1; "
        "keep one of each version"
    )


def test_both_certificates_must_start_with_the_same_network() -> None:
    moved = make_host(CA, version=2, networks=networks("10.0.0.2/8"))

    assert error(V1.pem + moved.pem) == (
        "/etc/nebula/host.crt: v1 and v2 networks are not the same: the first of v1 is 10.0.0.1/8, "
        "of v2 10.0.0.2/8"
    )


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        pytest.param(V2.key_pem, V2.pem, "/etc/nebula/host.key: block 1 (line 1) is a certificate (NEBULA CERTIFICATE V2), where a host's private key is expected; are the certificate and the key swapped?", id="swapped"),
        pytest.param(V2.key_pem, V2.key_pem, "/etc/nebula/host.crt: block 1 (line 1) is a host's private key (NEBULA X25519 PRIVATE KEY), where a certificate is expected; are the certificate and the key swapped?", id="key twice"),
        pytest.param(V2.pem, (FILES / "ca-enc-25519-v2.key").read_text(), "/etc/nebula/host.key: block 1 (line 1) is a CA's encrypted private key (NEBULA ED25519 ENCRYPTED PRIVATE KEY), where a host's private key is expected; the CA's key stays with the CA: use the one that `nebula-mp cert sign` or `keygen` made for this host", id="encrypted key"),
        pytest.param("", V2.key_pem, '/etc/nebula/host.crt: no PEM block found; one starts with "-----BEGIN NEBULA ..."', id="empty certificate"),
        pytest.param(V2.pem, "", '/etc/nebula/host.key: no PEM block found; one starts with "-----BEGIN NEBULA ..."', id="empty key"),
        pytest.param(V2.pem + "x\n", V2.key_pem, "/etc/nebula/host.crt:7: text after the last PEM block; remove it or complete the block", id="text at the end"),
        pytest.param(V2.pem[:100], V2.key_pem, "/etc/nebula/host.crt: block 1 (line 1): has no END line; the file is cut off", id="cut off"),
    ],
)  # fmt: skip
def test_wrong_files_are_reported_with_place_reason_and_the_likely_fix(
    cert: str, key: str, said: str
) -> None:
    assert error(cert, key) == said


def replaced(old: str, new: str) -> str:
    try:
        load(new).check_replaces(load(old))
    except CertError as problem:
        return str(problem)
    return "ok"


def host(version: int, *texts: str, **fields: Any) -> str:
    return make_host(CA, version=version, networks=networks(*texts), **fields).pem


A1, A2 = host(1, "10.0.0.1/8"), host(2, "10.0.0.1/8")
A2_AND_MORE = host(2, "10.0.0.1/8", "fd00::1/64")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param(A1, A1, "ok", id="the same"),
        pytest.param(A1, host(1, "10.0.0.1/8", groups=("new",), not_after=AT + 9), "ok", id="renewed"),
        pytest.param(A1, A1 + A2_AND_MORE, "ok", id="v2 added"),
        pytest.param(A2, A1 + A2, "ok", id="v1 added"),
        pytest.param(A1 + A2, A2, "ok", id="v1 removed"),
        pytest.param(A1 + A2, A1, "ok", id="v2 removed, same networks"),
        pytest.param(A1, host(1, "10.0.0.2/8"), "networks in the new v1 certificate are 10.0.0.2/8, in the old 10.0.0.1/8; restart to change addresses", id="other address"),
        pytest.param(A1, host(1, "10.0.0.1/16"), "networks in the new v1 certificate are 10.0.0.1/16, in the old 10.0.0.1/8; restart to change addresses", id="other prefix length"),
        pytest.param(A2, A2_AND_MORE, "networks in the new v2 certificate are 10.0.0.1/8, fd00::1/64, in the old 10.0.0.1/8; restart to change addresses", id="address added"),
        pytest.param(A1 + A2_AND_MORE, A1, "removing the v2 certificate is not permitted unless the v1 certificate has the same networks: v1 has 10.0.0.1/8, v2 had 10.0.0.1/8, fd00::1/64", id="v2 removed, address lost"),
    ],
)  # fmt: skip
def test_a_reload_may_renew_and_add_but_not_change_addresses(old: str, new: str, said: str) -> None:
    assert replaced(old, new) == said


@pytest.mark.parametrize("version", CertVersion)
def test_a_reload_may_not_change_the_curve(version: CertVersion) -> None:
    p256: Host = make_host(make_ca(curve=Curve.P256), version=version)
    new = load(p256.pem, p256.key_pem)
    old = load(host(version, "10.0.0.1/8"))

    with pytest.raises(CertError) as caught:
        new.check_replaces(old)

    assert str(caught.value) == (
        f"curve of the new v{version} certificate is P256, of the old CURVE25519; restart to change the curve"
    )


def test_a_reload_may_change_the_key() -> None:
    other = make_host(CA, "other")

    load(other.pem, other.key_pem).check_replaces(load(V2.pem))


@given(
    st.text(max_size=50) | st.integers(0, len(BOTH)).map(lambda cut: BOTH[:cut]),
    st.sampled_from([V2.key_pem, ""]),
)
def test_any_text_is_an_identity_or_raises_cert_error(cert: str, key: str) -> None:
    with suppress(CertError):
        assert load(cert, key).certificates


def test_certificates_that_nobody_trusts_still_make_an_identity() -> None:
    """Whom peers trust is for them to say; a node without the right CA only fails to reach anyone."""
    unsigned = codec.encode_pem(replace(V2.certificate, signature=bytes(64)))

    assert load(unsigned).newest.signature == bytes(64)
