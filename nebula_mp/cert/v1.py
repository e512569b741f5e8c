"""Certificates of version 1: protobuf, IPv4 only.

Data flow: cert.codec -> [cert.v1] -> cert.model
Knows the encoding; knows nothing of PEM, trust or time. The signature covers a fresh serialisation of the
fields we know, never the bytes received: unknown fields and odd encodings are lost on the way, on purpose.
Source: docs/wire-format.md, "Version 1"; slackhq/nebula, cert/cert_v1.go and cert_v1.proto.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Interface

from google.protobuf.message import DecodeError

from nebula_mp.cert.model import Certificate, check_properties, parse_curve
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve, IPInterface
from nebula_mp.wire import nebula_pb2 as pb

_ALL_ONES = 0xFFFFFFFF


def parse(data: bytes) -> Certificate:
    """Read the certificate of a file's block; CertError when it is none."""
    message = _read(data)
    return _build(message, bytes(message.Details.PublicKey))


def parse_from_handshake(data: bytes, public_key: bytes, curve: Curve) -> Certificate:
    """Read the certificate of a handshake, whose public key came with the Noise message; or CertError."""
    message = _read(data)
    if message.Details.PublicKey:
        raise CertError("certificate has unexpected pubkey present")
    certificate = _build(message, public_key)
    if certificate.curve is not curve:
        raise CertError(f"certificate curve {certificate.curve.name} does not match expected {curve.name}")
    return certificate


def encode(certificate: Certificate) -> bytes:
    """Return the canonical bytes, as files hold them and as the fingerprint covers them."""
    return _message(certificate, certificate.public_key)


def encode_for_handshake(certificate: Certificate) -> bytes:
    """Do as `encode`, without the public key."""
    return _message(certificate, b"")


def signed_bytes(certificate: Certificate) -> bytes:
    """Return what the CA signs."""
    return _details(certificate, certificate.public_key).SerializeToString(deterministic=True)


def _read(data: bytes) -> pb.RawNebulaCertificate:
    if not data:
        raise CertError("v1 certificate: no bytes")
    message = pb.RawNebulaCertificate()
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise CertError("v1 certificate: not a protobuf message") from None
    if not message.HasField("Details"):
        raise CertError("v1 certificate: no details")
    return message


def _build(message: pb.RawNebulaCertificate, public_key: bytes) -> Certificate:
    details = message.Details
    certificate = Certificate(
        version=CertVersion.V1,
        curve=parse_curve(details.curve),
        name=details.Name,
        networks=_interfaces(details.Ips, "networks"),
        unsafe_networks=_interfaces(details.Subnets, "unsafe networks"),
        groups=tuple(details.Groups),
        is_ca=details.IsCA,
        not_before=details.NotBefore,
        not_after=details.NotAfter,
        issuer=details.Issuer.hex(),
        public_key=public_key,
        signature=message.Signature,
    )
    check_properties(certificate)
    return certificate


def _interfaces(pairs: Sequence[int], what: str) -> tuple[IPInterface, ...]:
    """Address and mask alternate. A mask with holes counts as prefix length 0, as in Nebula."""
    if len(pairs) % 2:
        raise CertError(f"v1 certificate: {what}: an address has no mask")
    return tuple(
        IPv4Interface((address, _prefix_length(mask)))
        for address, mask in zip(pairs[::2], pairs[1::2], strict=True)
    )


def _prefix_length(mask: int) -> int:
    ones = mask.bit_count()
    return ones if mask == _ALL_ONES ^ (_ALL_ONES >> ones) else 0


def _pairs(networks: Iterable[IPInterface]) -> list[int]:
    pairs = []
    for network in networks:
        if network.version != 4:
            raise CertError(f"v1 certificates can only hold IPv4 networks, got {network}")
        pairs += [int(network.ip), int(network.netmask)]
    return pairs


def _details(certificate: Certificate, public_key: bytes) -> pb.RawNebulaCertificateDetails:
    return pb.RawNebulaCertificateDetails(
        Name=certificate.name,
        Ips=_pairs(certificate.networks),
        Subnets=_pairs(certificate.unsafe_networks),
        Groups=certificate.groups,
        NotBefore=certificate.not_before,
        NotAfter=certificate.not_after,
        PublicKey=public_key,
        IsCA=certificate.is_ca,
        Issuer=bytes.fromhex(certificate.issuer),
        curve=pb.Curve.P256 if certificate.curve is Curve.P256 else pb.Curve.CURVE25519,
    )


def _message(certificate: Certificate, public_key: bytes) -> bytes:
    message = pb.RawNebulaCertificate(
        Details=_details(certificate, public_key), Signature=certificate.signature
    )
    return message.SerializeToString(deterministic=True)
