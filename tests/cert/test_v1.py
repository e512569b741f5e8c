import hashlib
from dataclasses import replace
from ipaddress import IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nebula_mp.cert import v1
from nebula_mp.cert.pool import CaPool
from nebula_mp.errors import CertError
from nebula_mp.newtypes import Curve
from nebula_mp.wire import nebula_pb2 as pb
from tests.cert.helpers import AT, make_ca, make_host, networks

CA = make_ca(version=1)
HOST = make_host(CA, version=1, groups=("web", ""), unsafe_networks=networks("192.168.1.7/24")).certificate


def message(**changes: object) -> bytes:
    """HOST with fields of its details replaced."""
    raw = pb.RawNebulaCertificate.FromString(v1.encode(HOST))
    for name, value in changes.items():
        raw.Details.ClearField(name)
        raw.Details.MergeFrom(pb.RawNebulaCertificateDetails(**{name: value}))  # type: ignore[arg-type]
    return raw.SerializeToString()


def test_the_fingerprint_is_the_hash_of_the_encoded_certificate() -> None:
    assert HOST.fingerprint == hashlib.sha256(v1.encode(HOST)).hexdigest()


def test_host_bits_of_networks_and_unsafe_networks_and_empty_groups_are_kept() -> None:
    parsed = v1.parse(v1.encode(HOST))

    assert parsed.networks == networks("10.0.0.1/8")
    assert parsed.unsafe_networks == networks("192.168.1.7/24")
    assert parsed.groups == ("web", "")


def test_several_networks_stay_in_the_order_of_the_issuer() -> None:
    pairs = [0x0A000009, 0xFF000000, 0x0A000001, 0xFF000000]

    assert v1.parse(message(Ips=pairs)).networks == networks("10.0.0.9/8", "10.0.0.1/8")


@pytest.mark.parametrize(
    ("mask", "prefix"),
    [(0xFFFFFFFF, 32), (0xFFFF0000, 16), (0x80000000, 1), (0, 0), (0xFF00FF00, 0), (0x0000FFFF, 0)],
)
def test_a_mask_with_holes_counts_as_prefix_length_0(mask: int, prefix: int) -> None:
    assert v1.parse(message(Ips=[0x0A000001, mask])).networks == networks(f"10.0.0.1/{prefix}")


def test_a_certificate_whose_mask_has_holes_is_not_trusted_because_it_is_serialised_anew() -> None:
    details = pb.RawNebulaCertificate.FromString(message(Ips=[0x0A000001, 0xFF00FF00])).Details
    signature = CA.key.sign(details.SerializeToString())
    parsed = v1.parse(pb.RawNebulaCertificate(Details=details, Signature=signature).SerializeToString())

    with pytest.raises(CertError, match=r"^certificate signature did not match$"):
        CaPool([CA.certificate]).verify(parsed, AT)


def test_fields_we_do_not_know_are_dropped_and_break_a_signature_that_covers_them() -> None:
    unknown = bytes.fromhex("f80101")  # field 31, varint 1
    details = pb.RawNebulaCertificate.FromString(v1.encode(HOST)).Details.SerializeToString() + unknown
    forged = pb.RawNebulaCertificate(Signature=CA.key.sign(details)).SerializeToString()
    parsed = v1.parse(b"\x0a" + bytes([len(details) % 128 + 128, len(details) // 128]) + details + forged)

    assert v1.signed_bytes(parsed) == v1.signed_bytes(HOST)
    with pytest.raises(CertError, match=r"^certificate signature did not match$"):
        CaPool([CA.certificate]).verify(parsed, AT)


def test_fields_outside_the_details_that_we_do_not_know_change_nothing() -> None:
    parsed = v1.parse(v1.encode(HOST) + bytes.fromhex("f80101"))

    assert parsed == HOST
    assert parsed.fingerprint == HOST.fingerprint


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "no bytes", id="empty"),
        pytest.param(b"\xff\xff", "not a protobuf message", id="no protobuf"),
        pytest.param(b"\x0a\x03\x0a\x01\xff", "not a protobuf message", id="name that is not UTF-8"),
        pytest.param(b"\x12\x01x", "no details", id="signature only"),
        pytest.param(message(Ips=[1]), "networks: an address has no mask", id="odd networks"),
        pytest.param(message(Subnets=[1, 2, 3]), "unsafe networks: an address has no mask", id="odd subnets"),
        pytest.param(message(Ips=[]), "at least one network", id="no network"),
        pytest.param(message(Ips=[0, 0xFF000000]), "must not use the zero address", id="zero address"),
        pytest.param(message(PublicKey=b""), "32 bytes, got 0", id="no public key"),
        pytest.param(message(PublicKey=bytes(33)), "32 bytes, got 33", id="long public key"),
        pytest.param(message(curve=2), "unknown curve 2", id="unknown curve"),
        pytest.param(message(curve=1), "P256 keys are 65 bytes, got 32", id="key of another curve"),
        pytest.param(message(Issuer=bytes(31)), "issuer must be 32 bytes, got 31", id="short issuer"),
    ],
)
def test_impossible_certificates_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(CertError, match=reason):
        v1.parse(data)


def test_an_ipv6_network_cannot_be_written() -> None:
    with pytest.raises(CertError, match="v1 certificates can only hold IPv4 networks, got fd00::1/64"):
        v1.encode(replace(HOST, networks=networks("fd00::1/64")))


def test_the_handshake_form_lacks_the_public_key_and_nothing_else() -> None:
    raw = pb.RawNebulaCertificate.FromString(v1.encode(HOST))
    raw.Details.ClearField("PublicKey")

    assert v1.encode_for_handshake(HOST) == raw.SerializeToString(deterministic=True)


def test_a_handshake_certificate_for_p256_is_refused_by_a_25519_network() -> None:
    host = make_host(make_ca(curve=Curve.P256), version=1).certificate

    with pytest.raises(CertError, match=r"^certificate curve P256 does not match expected CURVE25519$"):
        v1.parse_from_handshake(v1.encode_for_handshake(host), host.public_key, Curve.CURVE25519)


octets = st.integers(1, 2**32 - 1)
prefixes = st.integers(0, 32)


@given(
    name=st.text(max_size=20),
    ranges=st.lists(st.tuples(octets, prefixes), min_size=1, max_size=3),
    groups=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    not_before=st.integers(-(2**63), 2**63 - 1),
    issuer=st.sampled_from(["", "ab" * 32]),
    signature=st.binary(max_size=80),
)
def test_what_is_written_is_read_back(
    *,
    name: str,
    ranges: list[tuple[int, int]],
    groups: tuple[str, ...],
    not_before: int,
    issuer: str,
    signature: bytes,
) -> None:
    interfaces = tuple(map(IPv4Interface, ranges))
    certificate = replace(
        HOST,
        name=name,
        networks=interfaces,
        unsafe_networks=interfaces,
        groups=groups,
        not_before=not_before,
        issuer=issuer,
        signature=signature,
    )

    assert v1.parse(v1.encode(certificate)) == certificate
    encoded = v1.encode_for_handshake(certificate)
    assert v1.parse_from_handshake(encoded, certificate.public_key, certificate.curve) == certificate
