"""Certificates of version 2: DER, IPv4 and IPv6.

Data flow: cert.codec -> [cert.v2] -> wire.der, cert.model
Knows the encoding; knows nothing of PEM, trust or time. The signature covers the details element exactly as
it was received, so a certificate may hold elements after the issuer that a later release defined.
Source: docs/wire-format.md, "Version 2"; slackhq/nebula, cert/cert_v2.go and cert_v2.asn1.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from itertools import pairwise

from nebula_mp.cert.model import Certificate, check_properties, format_network, parse_curve
from nebula_mp.errors import CertError, WireError
from nebula_mp.newtypes import CertVersion, Curve, IPInterface
from nebula_mp.wire import der

MAX_BYTES = 65536
NAME_BYTES_MAX = 253

_DETAILS = der.CONTEXT | der.CONSTRUCTED | 0
_CURVE = der.CONTEXT | 1
_PUBLIC_KEY = der.CONTEXT | 2
_SIGNATURE = der.CONTEXT | 3

_NAME = der.CONTEXT | 0
_NETWORKS = der.CONTEXT | der.CONSTRUCTED | 1
_UNSAFE_NETWORKS = der.CONTEXT | der.CONSTRUCTED | 2
_GROUPS = der.CONTEXT | der.CONSTRUCTED | 3
_IS_CA = der.CONTEXT | 4
_NOT_BEFORE = der.CONTEXT | 5
_NOT_AFTER = der.CONTEXT | 6
_ISSUER = der.CONTEXT | 7
_KNOWN_IN_DETAILS = frozenset(
    {_NAME, _NETWORKS, _UNSAFE_NETWORKS, _GROUPS, _IS_CA, _NOT_BEFORE, _NOT_AFTER, _ISSUER}
)

_TRUE = b"\xff"
_INT64_BYTES = 8


def parse(data: bytes) -> Certificate:
    """Read the certificate of a file's block; CertError when it is none."""
    return _parse(data, None, Curve.CURVE25519)


def parse_from_handshake(data: bytes, public_key: bytes, curve: Curve) -> Certificate:
    """Read the certificate of a handshake, whose public key came with the Noise message; or CertError."""
    certificate = _parse(data, public_key, curve)
    if certificate.curve is not curve:
        raise CertError(f"certificate curve {certificate.curve.name} does not match expected {curve.name}")
    return certificate


def encode(certificate: Certificate) -> bytes:
    """Return the canonical bytes, as files hold them."""
    parts = [details_element(certificate)]
    if certificate.curve is not Curve.CURVE25519:
        parts.append(der.encode(_CURVE, bytes([certificate.curve])))
    parts.append(der.encode(_PUBLIC_KEY, certificate.public_key))
    parts.append(der.encode(_SIGNATURE, certificate.signature))
    return der.encode(der.SEQUENCE, *parts)


def encode_for_handshake(certificate: Certificate) -> bytes:
    """Do as `encode`, without curve and public key."""
    signature = der.encode(_SIGNATURE, certificate.signature)
    return der.encode(der.SEQUENCE, details_element(certificate), signature)


def signed_bytes(certificate: Certificate) -> bytes:
    """Return what the CA signs: the curve is present here even where the encoding leaves it out."""
    return details_element(certificate) + bytes([certificate.curve]) + certificate.public_key


def details_element(certificate: Certificate) -> bytes:
    """Return the details with tag and length: as received, or built from the fields; or CertError."""
    if certificate.details:
        return certificate.details
    name = certificate.name.encode()
    if not 1 <= len(name) <= NAME_BYTES_MAX:
        raise CertError(f"v2 certificate: the name must be 1 to {NAME_BYTES_MAX} bytes, got {len(name)}")
    parts = [der.encode(_NAME, name)]
    for tag, networks in ((_NETWORKS, certificate.networks), (_UNSAFE_NETWORKS, certificate.unsafe_networks)):
        if networks:
            parts.append(der.encode(tag, *(der.encode(der.OCTET_STRING, _packed(one)) for one in networks)))
    if certificate.groups:
        groups = (der.encode(der.UTF8_STRING, group.encode()) for group in certificate.groups)
        parts.append(der.encode(_GROUPS, *groups))
    if certificate.is_ca:
        parts.append(der.encode(_IS_CA, _TRUE))
    parts.append(der.encode(_NOT_BEFORE, der.encode_integer(certificate.not_before)))
    parts.append(der.encode(_NOT_AFTER, der.encode_integer(certificate.not_after)))
    if certificate.issuer:
        parts.append(der.encode(_ISSUER, bytes.fromhex(certificate.issuer)))
    return der.encode(_DETAILS, *parts)


def sorted_networks(networks: Iterable[IPInterface]) -> tuple[IPInterface, ...]:
    """Return them in the order of version 2: IPv4 first, then by address, then by prefix length."""
    return tuple(sorted(networks, key=lambda one: (one.version, int(one.ip), one.network.prefixlen)))


def _parse(data: bytes, public_key: bytes | None, curve: Curve) -> Certificate:
    if not 1 <= len(data) <= MAX_BYTES:
        raise CertError(f"v2 certificate: must be 1 to {MAX_BYTES} bytes, got {len(data)}")
    try:
        certificate = _read(data, public_key, curve)
    except WireError as error:
        raise CertError(f"v2 certificate: {error}") from None
    except UnicodeDecodeError:
        raise CertError("v2 certificate: a name or group is not UTF-8") from None
    _check(certificate)
    return certificate


def _read(data: bytes, public_key: bytes | None, curve: Curve) -> Certificate:
    outer = der.Reader(data)
    body = der.Reader(outer.read(der.SEQUENCE))
    outer.finish()

    details = body.read_element(_DETAILS)
    raw_curve = body.read_optional(_CURVE)
    if raw_curve is not None:
        if len(raw_curve) != 1:
            raise CertError(f"v2 certificate: the curve must be 1 byte, got {len(raw_curve)}")
        curve = parse_curve(raw_curve[0])
    raw_public_key = body.read_optional(_PUBLIC_KEY)
    if public_key is None:
        public_key = raw_public_key or b""
    elif raw_public_key is not None:
        raise CertError("certificate has unexpected pubkey present")
    signature = body.read(_SIGNATURE)
    body.finish()
    if not signature:
        raise CertError("v2 certificate: empty signature")

    return _read_details(details, curve, public_key, signature)


def _read_details(element: bytes, curve: Curve, public_key: bytes, signature: bytes) -> Certificate:
    reader = der.Reader(der.Reader(element).read(_DETAILS))
    name = reader.read(_NAME)
    if not 1 <= len(name) <= NAME_BYTES_MAX:
        raise CertError(f"v2 certificate: the name must be 1 to {NAME_BYTES_MAX} bytes, got {len(name)}")
    networks = _read_networks(reader.read_optional(_NETWORKS))
    unsafe_networks = _read_networks(reader.read_optional(_UNSAFE_NETWORKS))
    groups = _read_groups(reader.read_optional(_GROUPS))
    is_ca = reader.read_optional(_IS_CA)
    if is_ca is not None and len(is_ca) != 1:
        raise CertError(f"v2 certificate: isCA must be 1 byte, got {len(is_ca)}")
    not_before = _read_time(reader.read(_NOT_BEFORE))
    not_after = _read_time(reader.read(_NOT_AFTER))
    issuer = reader.read_optional(_ISSUER)
    if issuer == b"":
        raise CertError("v2 certificate: the issuer is empty")
    while not reader.at_end:
        tag, _ = reader.read_any()
        if tag in _KNOWN_IN_DETAILS:
            raise CertError(f"v2 certificate: element {tag:#04x} is repeated or out of order")

    return Certificate(
        version=CertVersion.V2,
        curve=curve,
        name=name.decode(),
        networks=sorted_networks(networks),
        unsafe_networks=sorted_networks(unsafe_networks),
        groups=groups,
        is_ca=is_ca is not None and is_ca != b"\x00",
        not_before=not_before,
        not_after=not_after,
        issuer=(issuer or b"").hex(),
        public_key=public_key,
        signature=signature,
        details=element,
    )


def _read_networks(content: bytes | None) -> list[IPInterface]:
    reader = der.Reader(content or b"")
    networks = []
    while not reader.at_end:
        networks.append(_unpacked(reader.read(der.OCTET_STRING)))
    return networks


def _read_groups(content: bytes | None) -> tuple[str, ...]:
    reader = der.Reader(content or b"")
    groups = []
    while not reader.at_end:
        group = reader.read(der.UTF8_STRING)
        if not group:
            raise CertError("v2 certificate: a group is empty")
        groups.append(group.decode())
    return tuple(groups)


def _read_time(content: bytes) -> int:
    if len(content) > _INT64_BYTES:
        raise CertError("v2 certificate: a time does not fit 64 bits")
    return der.parse_integer(content)


def _packed(network: IPInterface) -> bytes:
    return network.ip.packed + bytes([network.network.prefixlen])


def _unpacked(raw: bytes) -> IPInterface:
    address, length = raw[:-1], raw[-1] if raw else 0
    if len(address) == 4 and length <= 32:
        return IPv4Interface((IPv4Address(address), length))
    if len(address) == 16 and length <= 128:
        return IPv6Interface((IPv6Address(address), length))
    raise CertError(f"v2 certificate: {raw.hex() or 'an empty string'} is no network")


def _check(certificate: Certificate) -> None:
    """Raise CertError unless the fields are possible in version 2."""
    check_properties(certificate)
    for network in certificate.networks:
        if network.version == 6 and network.ip.ipv4_mapped:
            raise CertError(f"4in6 networks are not allowed: {format_network(network)}")
    families = {network.version for network in certificate.networks}
    for network in certificate.unsafe_networks:
        if not certificate.is_ca and network.version not in families:
            raise CertError(
                f"IPv{network.version} unsafe networks require an IPv{network.version} address assignment: "
                f"{format_network(network)}"
            )
    for networks in (certificate.networks, certificate.unsafe_networks):
        for one, following in pairwise(networks):
            if one == following:
                raise CertError(f"duplicate network detected: {format_network(one)}")
