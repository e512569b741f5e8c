import hashlib
from dataclasses import replace
from typing import Annotated, Any

import pytest
from cryptography.hazmat import asn1
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert import v2
from nebula_mp.cert.pool import CaPool
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve
from nebula_mp.wire import der
from tests.cert.helpers import AT, make_ca, make_host, networks
from tests.support import vectors
from tests.support.vectors import Vector

VECTORS = [each for each in vectors.load("certs")["certs"] if each["version"] == 2]
CA = make_ca()
HOST = make_host(
    CA,
    groups=("web",),
    unsafe_networks=networks("192.168.1.7/24"),
    networks=networks("10.0.0.1/8", "fd00::1/64"),
).certificate
MAPPED_START = bytes(10) + b"\xff\xff"

TAGS = {
    "name": 0x80, "networks": 0xA1, "unsafe_networks": 0xA2, "groups": 0xA3, "is_ca": 0x84,
    "not_before": 0x85, "not_after": 0x86, "issuer": 0x87,
}  # fmt: skip
PARTS = {
    "name": b"host",
    "networks": bytes.fromhex("0405 0a000001 08"),
    "not_before": b"\x01",
    "not_after": b"\x02",
    "issuer": bytes(32),
}


def encoded(outer: dict[int, bytes] | None = None, tail: bytes = b"", **parts: bytes | None) -> bytes:
    """A certificate assembled by hand; `None` leaves an element out, `tail` follows the details' elements."""
    chosen = PARTS | parts
    details = b"".join(
        der.encode(tag, content) for part, tag in TAGS.items() if (content := chosen.get(part)) is not None
    )
    elements = {0x82: bytes(32), 0x83: b"signature"} | (outer or {})
    rest = b"".join(der.encode(tag, elements[tag]) for tag in sorted(elements) if elements[tag] != b"-")
    return der.encode(der.SEQUENCE, der.encode(0xA0, details + tail), rest)


@asn1.sequence
class TheirDetails:
    name: Annotated[str, asn1.Implicit(0)]
    networks: Annotated[list[bytes] | None, asn1.Implicit(1)]
    unsafe_networks: Annotated[list[bytes] | None, asn1.Implicit(2)]
    groups: Annotated[list[str] | None, asn1.Implicit(3)]
    is_ca: Annotated[bool, asn1.Default(False), asn1.Implicit(4)]
    not_before: Annotated[int, asn1.Implicit(5)]
    not_after: Annotated[int, asn1.Implicit(6)]
    issuer: Annotated[bytes | None, asn1.Implicit(7)]


@asn1.sequence
class TheirCertificate:
    """A version 2 certificate as a second DER implementation sees it."""

    details: Annotated[TheirDetails, asn1.Implicit(0)]
    curve: Annotated[bytes | None, asn1.Implicit(1)]
    public_key: Annotated[bytes, asn1.Implicit(2)]
    signature: Annotated[bytes, asn1.Implicit(3)]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda each: each["file"])
def test_a_second_der_implementation_reads_the_same_fields(vector: Vector) -> None:
    raw = bytes.fromhex(vector["raw"])
    ours = v2.parse(raw)

    theirs = asn1.decode_der(TheirCertificate, raw)

    assert asn1.encode_der(theirs) == raw == v2.encode(ours)
    assert theirs.details.name == ours.name
    assert theirs.details.is_ca is ours.is_ca
    assert (theirs.details.not_before, theirs.details.not_after) == (ours.not_before, ours.not_after)
    assert (theirs.details.groups or []) == list(ours.groups)
    assert (theirs.details.issuer or b"").hex() == ours.issuer
    assert theirs.curve == (None if ours.curve is Curve.CURVE25519 else b"\x01")
    assert (theirs.public_key, theirs.signature) == (ours.public_key, ours.signature)
    for raw_networks, read in (
        (theirs.details.networks, ours.networks),
        (theirs.details.unsafe_networks, ours.unsafe_networks),
    ):
        assert [each.ip.packed + bytes([each.network.prefixlen]) for each in read] == (raw_networks or [])


texts = st.text(min_size=1, max_size=20).filter(lambda text: len(text.encode()) < 250)
ipv4 = st.tuples(st.ip_addresses(v=4), st.integers(0, 32))
ipv6 = st.tuples(st.ip_addresses(v=6), st.integers(0, 128))
interfaces = st.lists(
    (ipv4 | ipv6).filter(lambda pair: not pair[0].is_unspecified and pair[0].packed[:12] != MAPPED_START),
    max_size=4,
    unique=True,
).map(lambda pairs: networks(*(f"{address}/{length}" for address, length in pairs)))


@given(
    name=texts,
    ranges=interfaces,
    groups=st.lists(texts, max_size=3),
    times=st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1)),
    curve=st.sampled_from(Curve),
    issuer=st.sampled_from([b"", b"\xab" * 32]),
    signature=st.binary(min_size=1, max_size=80),
)
def test_what_we_write_is_what_a_second_der_implementation_writes_and_we_read_it_back(
    *,
    name: str,
    ranges: Any,
    groups: list[str],
    times: tuple[int, int],
    curve: Curve,
    issuer: bytes,
    signature: bytes,
) -> None:
    in_order = v2.sorted_networks(ranges)
    packed = [each.ip.packed + bytes([each.network.prefixlen]) for each in in_order] or None
    key = bytes(65 if curve is Curve.P256 else 32)
    theirs = TheirCertificate(
        details=TheirDetails(
            name=name,
            networks=packed,
            unsafe_networks=packed,
            groups=groups or None,
            is_ca=True,
            not_before=times[0],
            not_after=times[1],
            issuer=issuer or None,
        ),
        curve=b"\x01" if curve is Curve.P256 else None,
        public_key=key,
        signature=signature,
    )
    ours = replace(
        CA.certificate,
        details=b"",
        name=name,
        networks=in_order,
        unsafe_networks=in_order,
        groups=tuple(groups),
        not_before=times[0],
        not_after=times[1],
        curve=curve,
        issuer=issuer.hex(),
        public_key=key,
        signature=signature,
    )

    raw = v2.encode(ours)

    assert raw == asn1.encode_der(theirs)
    assert replace(v2.parse(raw), details=b"") == ours
    rebuilt = v2.parse_from_handshake(v2.encode_for_handshake(ours), key, curve)
    assert replace(rebuilt, details=b"") == ours


def test_the_fingerprint_covers_details_curve_key_and_signature_and_is_no_hash_of_the_file() -> None:
    covered = HOST.details + b"\x00" + HOST.public_key + HOST.signature

    assert HOST.fingerprint == hashlib.sha256(covered).hexdigest()
    assert HOST.fingerprint != hashlib.sha256(v2.encode(HOST)).hexdigest()


def test_an_element_that_a_later_release_adds_is_kept_and_covered_by_the_signature() -> None:
    plain = der.Reader(HOST.details).read(0xA0)
    details = der.encode(0xA0, plain, der.encode(0x88, b"from the future"))
    signed = replace(HOST, details=details)
    signed = replace(signed, signature=CA.key.sign(v2.signed_bytes(signed)))

    parsed = v2.parse(v2.encode(signed))

    assert parsed.details == details
    assert v2.encode(parsed) == v2.encode(signed)
    assert CaPool([CA.certificate]).verify(parsed, AT).certificate is parsed
    stripped = replace(parsed, details=b"")
    with pytest.raises(CertError, match=r"^certificate signature did not match$"):
        CaPool([CA.certificate]).verify(stripped, AT)


def test_networks_are_sorted_by_family_address_and_prefix_length_whatever_the_issuer_did() -> None:
    raw = bytes.fromhex("0411fd00000000000000000000000000000140 04050a00000908 04050a00000110 04050a00000108")

    parsed = v2.parse(encoded(networks=raw))

    assert parsed.networks == networks("10.0.0.1/8", "10.0.0.1/16", "10.0.0.9/8", "fd00::1/64")


@pytest.mark.parametrize(
    ("content", "is_ca"),
    [
        pytest.param(b"\xff", True, id="FF"),
        pytest.param(b"\x01", True, id="01"),
        pytest.param(b"\0", False, id="00"),
    ],
)
def test_is_ca_is_any_byte_but_zero(content: bytes, is_ca: bool) -> None:
    assert v2.parse(encoded(is_ca=content)).is_ca is is_ca


def test_a_curve_that_could_have_been_left_out_is_understood() -> None:
    assert v2.parse(encoded({0x81: b"\0"})).curve is Curve.CURVE25519


def test_a_handshake_certificate_that_says_another_curve_than_ours_is_refused() -> None:
    raw = encoded({0x81: b"\x01", 0x82: b"-"})

    with pytest.raises(CertError, match=r"^certificate curve P256 does not match expected CURVE25519$"):
        v2.parse_from_handshake(raw, bytes(65), Curve.CURVE25519)


def test_the_longest_name_is_253_bytes_not_characters() -> None:
    assert v2.parse(encoded(name=b"n" * 253)).name == "n" * 253
    for name in ("n" * 254, "ü" * 127, ""):
        with pytest.raises(CertError, match="name must be 1 to 253 bytes"):
            v2.encode(replace(HOST, details=b"", name=name))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "1 to 65536 bytes, got 0", id="empty"),
        pytest.param(bytes(65537), "1 to 65536 bytes, got 65537", id="too long"),
        pytest.param(b"\x31\x00", "expected tag 0x30, found 0x31", id="no sequence"),
        pytest.param(encoded() + b"\0", "1 bytes too many", id="bytes after the certificate"),
        pytest.param(encoded({0x84: b"more"}), "6 bytes too many", id="element after the signature"),
        pytest.param(encoded()[:-1], "are left", id="cut off"),
        pytest.param(encoded({0x81: b"\x02"}), "unknown curve 2", id="unknown curve"),
        pytest.param(encoded({0x81: b"\0\0"}), "curve must be 1 byte, got 2", id="long curve"),
        pytest.param(encoded({0x81: b"\x01"}), "P256 keys are 65 bytes, got 32", id="key of another curve"),
        pytest.param(encoded({0x82: b"-"}), "CURVE25519 keys are 32 bytes, got 0", id="no key"),
        pytest.param(encoded({0x83: b"-"}), "data ends", id="no signature"),
        pytest.param(encoded({0x83: b""}), "empty signature", id="empty signature"),
        pytest.param(encoded(name=None), "expected tag 0x80", id="no name"),
        pytest.param(encoded(name=b""), "name must be 1 to 253 bytes, got 0", id="empty name"),
        pytest.param(encoded(name=b"n" * 254), "name must be 1 to 253 bytes, got 254", id="long name"),
        pytest.param(encoded(name=b"\xff"), "not UTF-8", id="name that is not UTF-8"),
        pytest.param(encoded(groups=b"\x0c\x01\xff"), "not UTF-8", id="group that is not UTF-8"),
        pytest.param(encoded(groups=b"\x0c\x00"), "a group is empty", id="empty group"),
        pytest.param(encoded(groups=b"\x04\x01a"), "expected tag 0x0c, found 0x04", id="group of another type"),
        pytest.param(encoded(networks=None), "at least one network", id="no network"),
        pytest.param(encoded(networks=b""), "at least one network", id="empty networks"),
        pytest.param(encoded(networks=bytes.fromhex("0400")), "an empty string is no network", id="empty network"),
        pytest.param(encoded(networks=bytes.fromhex("040108")), "08 is no network", id="network of 1 byte"),
        pytest.param(
            encoded(networks=bytes.fromhex("04050a00000121")), "0a00000121 is no network", id="prefix length 33"
        ),
        pytest.param(
            encoded(networks=bytes.fromhex("04050000000008")), "must not use the zero address", id="zero address"
        ),
        pytest.param(
            encoded(networks=bytes.fromhex("0411" + MAPPED_START.hex() + "0a00000178")),
            "4in6 networks are not allowed: ::ffff:10.0.0.1/120",
            id="mapped address",
        ),
        pytest.param(
            encoded(networks=bytes.fromhex("04050a00000108") * 2), "duplicate network detected: 10.0.0.1/8", id="twice"
        ),
        pytest.param(
            encoded(unsafe_networks=bytes.fromhex("0411fd" + "00" * 15 + "08")),
            "IPv6 unsafe networks require an IPv6 address assignment: fd00::/8",
            id="unsafe network of another family",
        ),
        pytest.param(
            encoded(unsafe_networks=bytes.fromhex("0405c0a8010018") * 2), "duplicate network detected", id="unsafe twice"
        ),
        pytest.param(encoded(is_ca=b""), "isCA must be 1 byte, got 0", id="isCA without a byte"),
        pytest.param(encoded(not_before=b""), "integer has no bytes", id="time without bytes"),
        pytest.param(encoded(not_before=b"\0\x01"), "not in its shortest form", id="time with a leading zero"),
        pytest.param(encoded(not_after=bytes([1] * 9)), "does not fit 64 bits", id="time of 9 bytes"),
        pytest.param(encoded(not_after=None), "expected tag 0x86", id="no notAfter"),
        pytest.param(encoded(issuer=b""), "issuer is empty", id="empty issuer"),
        pytest.param(encoded(issuer=bytes(31)), "issuer must be 32 bytes, got 31", id="short issuer"),
        pytest.param(encoded(tail=der.encode(0x84, b"\xff")), "0x84 is repeated or out of order", id="isCA at the end"),
        pytest.param(encoded(tail=der.encode(0x87, bytes(32))), "0x87 is repeated", id="issuer twice"),
        pytest.param(encoded(tail=b"\x88\x05"), "an element says 5 bytes", id="broken element at the end"),
    ],
)  # fmt: skip
def test_impossible_certificates_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(CertError, match=reason):
        v2.parse(data)


def test_the_certificate_those_were_made_from_is_fine() -> None:
    assert v2.parse(encoded()).name == "host"
    assert v2.parse(encoded()).version is CertVersion.V2
    assert v2.parse(encoded(issuer=None, is_ca=b"\xff", networks=None)).is_ca
