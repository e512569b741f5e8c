import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert import codec
from nebula_mp.cert.pool import CaPool
from nebula_mp.cert.sign import CertificateRequest, self_sign, sign_certificate
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve
from tests.cert.helpers import AT, DAY, entropy, make_ca, make_host, networks

HALF_OF_THE_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551 // 2


@pytest.mark.parametrize("version", CertVersion)
@pytest.mark.parametrize("curve", Curve)
def test_a_new_ca_says_what_was_asked_for_and_trusts_itself(version: CertVersion, curve: Curve) -> None:
    key = SigningKey.generate(curve, entropy("ca"))

    ca = self_sign(
        CertificateRequest(
            version=version,
            name="ca",
            not_before=AT,
            not_after=AT + DAY,
            networks=networks("10.0.0.0/8"),
            unsafe_networks=networks("192.168.0.0/16"),
            groups=("web",),
        ),
        key,
    )

    assert (ca.version, ca.curve, ca.is_ca, ca.issuer) == (version, curve, True, "")
    assert (ca.not_before, ca.not_after, ca.public_key) == (AT, AT + DAY, key.public_key)
    assert (ca.name, ca.groups) == ("ca", ("web",))
    assert (ca.networks, ca.unsafe_networks) == (networks("10.0.0.0/8"), networks("192.168.0.0/16"))
    assert CaPool([ca]).authorities == (ca,)


@pytest.mark.parametrize("version", CertVersion)
@pytest.mark.parametrize("curve", Curve)
def test_a_new_host_says_what_was_asked_for_and_names_its_ca(version: CertVersion, curve: Curve) -> None:
    ca = make_ca(curve=curve)

    host = make_host(ca, "web-7", version=version, groups=("web",), networks=networks("10.0.0.7/8"))

    certificate = host.certificate
    assert (certificate.version, certificate.curve, certificate.is_ca) == (version, curve, False)
    assert certificate.issuer == ca.certificate.fingerprint
    assert certificate.public_key == host.key.public_key
    assert (certificate.name, certificate.groups) == ("web-7", ("web",))
    assert certificate.networks == networks("10.0.0.7/8")


def test_v2_certificates_are_signed_with_sorted_networks_and_v1_as_asked() -> None:
    unsorted = networks("192.168.9.0/24", "172.16.0.0/12")
    ca = make_ca()

    v1 = make_host(ca, version=1, unsafe_networks=unsorted).certificate
    v2 = make_host(ca, version=2, unsafe_networks=unsorted).certificate

    assert v1.unsafe_networks == unsorted
    assert v2.unsafe_networks == networks("172.16.0.0/12", "192.168.9.0/24")


@given(st.integers(0, 2**32))
def test_p256_signatures_always_have_a_low_s(name: int) -> None:
    certificate = make_host(make_ca(curve=Curve.P256), str(name)).certificate

    size_r = certificate.signature[3]
    assert int.from_bytes(certificate.signature[6 + size_r :]) <= HALF_OF_THE_P256_ORDER


def test_the_same_request_gives_the_same_certificate() -> None:
    assert codec.encode(make_ca(curve=Curve.P256).certificate) == codec.encode(
        make_ca(curve=Curve.P256).certificate
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        pytest.param({"networks": ()}, "at least one network", id="no network"),
        pytest.param({"networks": networks("0.0.0.0/8")}, "zero address", id="zero address"),
        pytest.param({"networks": networks("10.0.0.1/8", "10.0.0.1/8")}, "duplicate network", id="twice"),
        pytest.param({"networks": networks("::ffff:1.2.3.4/128")}, "4in6", id="mapped address"),
        pytest.param({"unsafe_networks": networks("fd00::/8")}, "require an IPv6 address", id="unsafe family"),
        pytest.param({"name": ""}, "name must be 1 to 253 bytes", id="no name"),
        pytest.param({"name": "n" * 254}, "name must be 1 to 253 bytes", id="long name"),
        pytest.param({"groups": ("",)}, "a group is empty", id="empty group"),
        pytest.param({"not_after": AT + 181 * DAY}, "expires after signing", id="outlives the CA"),
        pytest.param({"not_before": AT - 181 * DAY}, "valid before the signing", id="older than the CA"),
        pytest.param({"not_before": AT, "not_after": AT - 1}, "expire before it becomes", id="backwards"),
        pytest.param({"version": 1, "networks": networks("10.0.0.1/8", "10.0.0.2/8")}, "single ipv4", id="v1, two"),
        pytest.param({"version": 1, "networks": networks("fd00::1/8")}, "single ipv4", id="v1, IPv6"),
        pytest.param({"version": 1, "unsafe_networks": networks("fd00::/8")}, "only hold IPv4", id="v1, unsafe IPv6"),
    ],
)  # fmt: skip
def test_what_no_host_may_have_is_not_signed(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(CertError, match=reason):
        make_host(make_ca(), **({"name": "host"} | fields))  # type: ignore[arg-type]


def test_only_the_ca_itself_can_sign() -> None:
    ca, other = make_ca(), make_ca("other")
    host = make_host(ca)
    request = CertificateRequest(
        version=CertVersion.V2, name="h", not_before=AT, not_after=AT, networks=networks("10.0.0.1/8")
    )
    p256 = SigningKey.generate(Curve.P256, entropy("p256"))

    with pytest.raises(CertError, match=r"^refusing to sign, root certificate does not match private key$"):
        sign_certificate(request, host.key.public_key, ca.certificate, other.key)
    with pytest.raises(CertError, match=r"^refusing to sign, root certificate does not match private key$"):
        sign_certificate(request, host.key.public_key, ca.certificate, p256)
    with pytest.raises(CertError, match=r"^host: certificate is not a CA$"):
        sign_certificate(request, host.key.public_key, host.certificate, ca.key)


def test_a_public_key_of_another_curve_is_not_signed() -> None:
    ca = make_ca()
    request = CertificateRequest(
        version=CertVersion.V2, name="h", not_before=AT, not_after=AT, networks=networks("10.0.0.1/8")
    )

    with pytest.raises(CertError, match="CURVE25519 keys are 32 bytes, got 65"):
        sign_certificate(request, bytes(65), ca.certificate, ca.key)


def test_a_time_beyond_64_bits_is_not_signed() -> None:
    with pytest.raises(CertError, match="would expire before it becomes valid"):
        make_ca(not_after=2**63)
