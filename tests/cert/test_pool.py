from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert import codec, pool, v2
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pool import BlocklistedError, CaPool, VerifiedCertificate
from nebula_mp.cert.sign import CertificateRequest
from nebula_mp.crypto import signing
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve
from tests.cert.helpers import AT, DAY, Authority, make_ca, make_host, networks
from tests.support import vectors
from tests.support.vectors import Vector

FILES = vectors.DIRECTORY / "certs"
VECTORS = vectors.load("certs")
GENERATED_AT = VECTORS["generated_at"]
AUTHORITIES = [each for each in VECTORS["certs"] if each["is_ca"]]
HOSTS = [each for each in VECTORS["certs"] if not each["is_ca"]]

each_host = pytest.mark.parametrize("vector", HOSTS, ids=lambda each: each["file"])


def read(vector: Vector) -> str:
    return (FILES / str(vector["file"])).read_text()


def parse(vector: Vector) -> Certificate:
    [(_, certificate)] = codec.parse_pem(read(vector), vector["file"])
    return certificate


def trusting_all(*, blocklist: tuple[str, ...] = ()) -> CaPool:
    text = "".join(map(read, AUTHORITIES))
    return CaPool.from_pem(text, source="ca.crt", at=GENERATED_AT, blocklist=blocklist)


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except CertError as error:
        return str(error)
    return "ok"


def forge(ca: Authority, **changes: object) -> Certificate:
    """A certificate that the CA did sign, although its own rules forbid it."""
    host = make_host(make_ca("another"), "forged").certificate
    fields = {"issuer": ca.certificate.fingerprint, "details": b"", "signature": b""} | changes
    unsigned = replace(host, **fields)  # type: ignore[arg-type]
    signed = replace(unsigned, signature=ca.key.sign(codec.signed_bytes(unsigned)))
    return v2.parse(codec.encode(signed))


@each_host
def test_every_certificate_made_by_nebula_is_trusted_or_refused_with_the_words_of_nebula(
    vector: Vector,
) -> None:
    certificate = parse(vector)

    said = outcome(lambda: trusting_all().verify(certificate, GENERATED_AT))

    assert said == vector["verify_against_all_cas"]


@each_host
def test_verifying_a_certificate_again_says_the_same(vector: Vector) -> None:
    certificate, pool = parse(vector), trusting_all()

    said = [outcome(lambda: pool.verify(certificate, GENERATED_AT)) for _ in range(2)]

    assert said[0] == said[1]


@pytest.mark.parametrize("vector", AUTHORITIES, ids=lambda each: each["file"])
def test_every_ca_made_by_nebula_may_join_a_pool_and_expired_ones_are_reported(vector: Vector) -> None:
    assert vector["self_signature_ok"]
    expired = vector["pool_add"] != "ok"

    alone = CaPool.from_pem(read(vector), source="ca.crt", at=GENERATED_AT, allow_expired=True)

    assert alone.authorities == (parse(vector),)
    assert len(alone.warnings) == expired
    if expired:
        assert vector["pool_add"] == f"{vector['name']}: certificate is expired"
        assert alone.warnings[0].startswith(
            f"ca.crt: block 1 (line 1): CA '{vector['name']}' ({vector['fingerprint']}) expired at 20"
        )


@each_host
def test_a_listed_fingerprint_blocks_a_certificate_before_anything_else_is_looked_at(vector: Vector) -> None:
    with pytest.raises(BlocklistedError, match=r"^certificate is in the block list$"):
        trusting_all(blocklist=(vector["fingerprint"],)).verify(parse(vector), GENERATED_AT)


@pytest.mark.parametrize(
    "vector",
    [each for each in HOSTS if "alternate_fingerprint" in each and each["verify_against_all_cas"] == "ok"],
    ids=lambda each: each["file"],
)
def test_listing_either_form_of_a_p256_certificate_blocks_both(vector: Vector) -> None:
    certificate = parse(vector)
    pool = trusting_all(blocklist=(vector["alternate_fingerprint"],))

    for _ in range(2):
        with pytest.raises(BlocklistedError):
            pool.verify(certificate, GENERATED_AT)


def test_a_fingerprint_in_upper_case_blocks_nothing() -> None:
    host = make_host(ca := make_ca()).certificate

    CaPool([ca.certificate], [host.fingerprint.upper()]).verify(host, AT)


def test_a_listed_ca_does_not_block_what_it_signed() -> None:
    host = make_host(ca := make_ca()).certificate

    CaPool([ca.certificate], [ca.certificate.fingerprint]).verify(host, AT)


CA = make_ca()
SHORT = make_ca("short", not_before=AT - DAY, not_after=AT + DAY)
LIMITED = make_ca(
    "limited",
    groups=("web", "db"),
    networks=networks("10.1.0.0/16", "fd00::/16"),
    unsafe_networks=networks("192.168.0.0/16"),
)
STRANGER = make_ca("stranger")


@pytest.mark.parametrize(
    ("certificate", "at", "said"),
    [
        pytest.param(CA.certificate, AT, "no issuer in certificate", id="a CA"),
        pytest.param(make_host(STRANGER).certificate, AT, "could not find ca for the certificate", id="stranger"),
        pytest.param(forge(CA, curve=Curve.P256, public_key=b"\4" * 65), AT, "certificate curve does not match CA", id="curve"),
        pytest.param(make_host(SHORT, not_after=AT).certificate, AT + 2 * DAY, "root certificate is expired", id="both expired"),
        pytest.param(make_host(SHORT, not_before=AT).certificate, AT - 2 * DAY, "root certificate is expired", id="both not valid yet"),
        pytest.param(make_host(CA, not_after=AT).certificate, AT + 1, "certificate is expired", id="expired"),
        pytest.param(make_host(CA, not_before=AT).certificate, AT - 1, "certificate is expired", id="not valid yet"),
        pytest.param(replace(make_host(CA).certificate, signature=bytes(64)), AT, "certificate signature did not match", id="signature"),
        pytest.param(replace(make_host(CA).certificate, signature=b"x"), AT, "certificate signature did not match", id="no signature at all"),
        pytest.param(forge(SHORT, not_after=AT + DAY + 1), AT, "certificate expires after signing certificate", id="longer than the CA"),
        pytest.param(forge(SHORT, not_before=AT - DAY - 1, not_after=AT), AT, "certificate is valid before the signing certificate", id="earlier than the CA"),
        pytest.param(forge(LIMITED, groups=("web", "admin")), AT, "certificate contained a group not present on the signing ca: admin", id="group"),
        pytest.param(forge(LIMITED, networks=networks("10.2.0.1/16")), AT, "certificate contained a network assignment outside the limitations of the signing ca: 10.2.0.1/16", id="network"),
        pytest.param(forge(LIMITED, networks=networks("10.1.0.1/15")), AT, "certificate contained a network assignment outside the limitations of the signing ca: 10.1.0.1/15", id="wider network"),
        pytest.param(forge(LIMITED, networks=networks("10.1.0.1/16", "fe80::1/64")), AT, "certificate contained a network assignment outside the limitations of the signing ca: fe80::1/64", id="second network"),
        pytest.param(forge(LIMITED, networks=networks("10.1.0.1/24"), unsafe_networks=networks("172.16.0.0/12")), AT, "certificate contained an unsafe network assignment outside the limitations of the signing ca: 172.16.0.0/12", id="unsafe network"),
        pytest.param(make_host(LIMITED, groups=("db",), networks=networks("10.1.2.3/16", "fd00::1/64"), unsafe_networks=networks("192.168.1.0/24")).certificate, AT, "ok", id="within the limits"),
        pytest.param(make_host(LIMITED, networks=networks("10.1.2.3/32")).certificate, AT, "ok", id="fewer than allowed"),
        pytest.param(make_host(CA, groups=("any",), unsafe_networks=networks("0.0.0.0/0")).certificate, AT, "ok", id="no limits"),
        pytest.param(make_host(SHORT, not_before=AT - DAY, not_after=AT + DAY).certificate, AT + DAY, "ok", id="last second of both"),
    ],
)  # fmt: skip
def test_checks_fail_in_the_order_and_with_the_words_of_nebula(
    certificate: Certificate, at: int, said: str
) -> None:
    pool = CaPool([CA.certificate, SHORT.certificate, LIMITED.certificate])

    assert outcome(lambda: pool.verify(certificate, at)) == said


@pytest.mark.parametrize("version", CertVersion)
@pytest.mark.parametrize("ca_version", CertVersion)
@pytest.mark.parametrize("curve", Curve)
def test_a_ca_of_either_version_may_sign_certificates_of_either(
    version: CertVersion, ca_version: CertVersion, curve: Curve
) -> None:
    ca = make_ca(version=ca_version, curve=curve)
    host = make_host(ca, version=version).certificate

    assert CaPool([ca.certificate]).verify(host, AT) == VerifiedCertificate(host, ca.certificate)


class Signatures:
    """Counts how often a signature is checked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checked = 0
        self._verify = signing.verify
        monkeypatch.setattr(signing, "verify", self)

    def __call__(self, curve: Curve, public_key: bytes, signature: bytes, message: bytes) -> None:
        self.checked += 1
        self._verify(curve, public_key, signature, message)


def test_a_certificate_seen_again_costs_no_signature_check(monkeypatch: pytest.MonkeyPatch) -> None:
    host = make_host(CA).certificate
    trusting = CaPool([CA.certificate])
    signatures = Signatures(monkeypatch)

    for _ in range(3):
        # Parsed anew, as from another handshake: nothing hangs on the object.
        trusting.verify(v2.parse(codec.encode(host)), AT)

    assert signatures.checked == 1


def test_a_certificate_seen_again_is_still_refused_when_it_has_expired() -> None:
    host = make_host(CA, not_after=AT).certificate
    trusting = CaPool([CA.certificate])
    trusting.verify(host, AT)

    assert outcome(lambda: trusting.verify(host, AT + 1)) == "certificate is expired"


def test_a_certificate_seen_again_is_refused_when_another_signature_is_put_under_it() -> None:
    host = make_host(CA).certificate
    trusting = CaPool([CA.certificate])
    trusting.verify(host, AT)

    forged = replace(host, signature=bytes(64))

    assert outcome(lambda: trusting.verify(forged, AT)) == "certificate signature did not match"


def test_bad_signatures_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    forged = replace(make_host(CA).certificate, signature=bytes(64))
    trusting = CaPool([CA.certificate])
    signatures = Signatures(monkeypatch)

    for _ in range(2):
        assert outcome(lambda: trusting.verify(forged, AT)) == "certificate signature did not match"

    assert signatures.checked == 2


def test_the_memory_of_checked_certificates_is_bounded_and_forgets_the_longest_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "CHECKED_MAX", 2)
    a, b, c = (make_host(CA, name).certificate for name in "abc")
    trusting = CaPool([CA.certificate])
    signatures = Signatures(monkeypatch)

    for certificate in (a, b, a, c, a, b):
        trusting.verify(certificate, AT)

    assert signatures.checked == 4  # a, b, c, and b again


def test_recheck_accepts_what_was_verified_and_checks_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    verified = CaPool([CA.certificate]).verify(make_host(CA).certificate, AT)
    signatures = Signatures(monkeypatch)
    newer = CaPool([STRANGER.certificate, CA.certificate])
    signatures.checked = 0  # the pool checks that its CAs signed themselves

    newer.recheck(verified, AT)

    assert signatures.checked == 0


@pytest.mark.parametrize(
    ("newer", "at", "said"),
    [
        pytest.param(CaPool([CA.certificate]), AT + DAY + 1, "certificate is expired", id="expired"),
        pytest.param(CaPool([CA.certificate]), AT - DAY - 1, "certificate is expired", id="clock set back"),
        pytest.param(
            CaPool([CA.certificate]), AT + 200 * DAY, "root certificate is expired", id="CA expired"
        ),
        pytest.param(
            CaPool([STRANGER.certificate]), AT, "could not find ca for the certificate", id="CA removed"
        ),
    ],
)
def test_recheck_refuses_what_is_no_longer_trusted(newer: CaPool, at: int, said: str) -> None:
    verified = CaPool([CA.certificate]).verify(make_host(CA).certificate, AT)

    assert outcome(lambda: newer.recheck(verified, at)) == said


@pytest.mark.parametrize("form", ["fingerprint", "alternate_fingerprint"])
@pytest.mark.parametrize("at", [AT, AT + 2 * DAY])
def test_recheck_tells_a_blocked_certificate_from_any_other_trouble(form: str, at: int) -> None:
    ca = make_ca(curve=Curve.P256)
    host = make_host(ca).certificate
    verified = CaPool([ca.certificate]).verify(host, AT)

    with pytest.raises(BlocklistedError):
        CaPool([ca.certificate], [getattr(host, form)]).recheck(verified, at)


def test_recheck_refuses_a_certificate_that_another_ca_had_verified() -> None:
    host = make_host(CA).certificate

    said = outcome(
        lambda: CaPool([CA.certificate]).recheck(VerifiedCertificate(host, STRANGER.certificate), AT)
    )

    assert said == "certificate fingerprint did not match"


def test_a_pool_keeps_expired_cas_and_warns_with_place_dates_and_clock() -> None:
    pool = CaPool.from_pem(CA.pem + SHORT.pem, source="/etc/nebula/ca.crt", at=AT + 2 * DAY)

    assert pool.authorities == (CA.certificate, SHORT.certificate)
    [warning] = pool.warnings
    assert warning == (
        f"/etc/nebula/ca.crt: block 2 (line 6): CA 'short' ({SHORT.certificate.fingerprint}) "
        "expired at 2027-01-16 08:00:00 UTC; this machine's clock says 2027-01-17 08:00:00 UTC"
    )


def test_a_pool_of_expired_cas_only_is_an_error_that_says_why() -> None:
    with pytest.raises(CertError) as caught:
        CaPool.from_pem(CA.pem + SHORT.pem, source="ca.crt", at=AT + 300 * DAY)

    assert str(caught.value).count("expired at") == 2
    assert str(caught.value).endswith("\nca.crt: no valid CA certificates present")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "ca.crt: no PEM block found", id="empty"),
        pytest.param(CA.pem + "junk", "ca.crt:6: text after the last PEM block", id="junk"),
        pytest.param(CA.pem + make_host(CA).pem, "ca.crt: block 2 (line 6): host: certificate is not a CA; give the certificate that signs those of hosts", id="host"),
        pytest.param(
            codec.encode_pem(replace(CA.certificate, signature=bytes(64))),
            "ca.crt: block 1 (line 1): ca: certificate is not self-signed",
            id="signed by nobody",
        ),
        pytest.param((FILES / "ca-P256-v1.key").read_text(), "ca.crt: block 1 (line 1) is a CA's private key", id="key"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_made_of_cas_is_an_error_with_place_and_reason(text: str, said: str) -> None:
    with pytest.raises(CertError) as caught:
        CaPool.from_pem(text, source="ca.crt", at=AT)

    assert str(caught.value).startswith(said)


def test_a_pool_made_of_certificates_refuses_what_is_no_ca() -> None:
    with pytest.raises(CertError, match=r"^host: certificate is not a CA$"):
        CaPool([make_host(CA).certificate])


@given(st.text(max_size=100) | st.integers(0, len(CA.pem)).map(lambda cut: CA.pem[:cut]))
def test_any_text_is_made_of_cas_or_raises_cert_error(text: str) -> None:
    with suppress(CertError):
        assert CaPool.from_pem(text, source="any", at=AT).authorities


@given(st.data())
def test_what_a_ca_would_not_sign_it_does_not_verify(data: st.DataObject) -> None:
    """Issuing and verifying are two pieces of code; they must draw the same line."""
    groups = data.draw(st.lists(st.sampled_from(["web", "db", "admin"]), max_size=2, unique=True).map(tuple))
    length = data.draw(st.integers(8, 32))
    address = data.draw(st.sampled_from(["10.1.2.3", "10.2.0.1"]))
    period = data.draw(st.tuples(st.integers(-200, 0), st.integers(0, 200)))
    request = CertificateRequest(
        version=CertVersion.V2,
        name="drawn",
        networks=networks(f"{address}/{length}"),
        groups=groups,
        not_before=AT + period[0] * DAY,
        not_after=AT + period[1] * DAY,
    )
    fields = {name: getattr(request, name) for name in ("networks", "groups", "not_before", "not_after")}

    signs = outcome(lambda: make_host(LIMITED, "drawn", **fields))
    verifies = outcome(lambda: CaPool([LIMITED.certificate]).verify(forge(LIMITED, **fields), AT))

    assert signs == verifies
