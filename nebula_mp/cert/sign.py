"""Issuing certificates.

Data flow: cli -> [cert.sign] -> crypto.signing, cert.codec
Knows what a CA may put its name to; knows nothing of files, flags or clocks. Whatever is issued here was
read back by our own parser first.
Source: docs/wire-format.md, "Certificates and keys"; slackhq/nebula, cert/sign.go.
"""

from dataclasses import dataclass, replace

from nebula_mp.cert import codec, v1, v2
from nebula_mp.cert.model import Certificate, check_constraints
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve, IPInterface

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRequest:
    """What a certificate shall say. Times are unix seconds; for a CA the lists limit what it may sign."""

    version: CertVersion
    name: str
    not_before: int
    not_after: int
    networks: tuple[IPInterface, ...] = ()
    unsafe_networks: tuple[IPInterface, ...] = ()
    groups: tuple[str, ...] = ()


def self_sign(request: CertificateRequest, key: SigningKey) -> Certificate:
    """Return a new CA certificate; CertError when the request is impossible."""
    certificate = _fill(request, curve=key.curve, public_key=key.public_key, is_ca=True, issuer="")
    return _seal(certificate, key)


def sign_certificate(
    request: CertificateRequest, public_key: bytes, ca: Certificate, key: SigningKey
) -> Certificate:
    """Return a host certificate for `public_key`, which must be of the CA's curve; `key` is the CA's.

    Raise CertError when the key is not the CA's, or when the request is impossible or more than the
    CA may sign. Whether the CA is valid today is for the caller, who has a clock.
    """
    if not ca.is_ca:
        raise CertError(f"{ca.name}: certificate is not a CA")
    if key.curve is not ca.curve or key.public_key != ca.public_key:
        raise CertError("refusing to sign, root certificate does not match private key")
    if request.version is CertVersion.V1 and [each.version for each in request.networks] != [4]:
        raise CertError("v1 certificates can only have a single ipv4 address")
    certificate = _fill(request, curve=ca.curve, public_key=public_key, is_ca=False, issuer=ca.fingerprint)
    check_constraints(ca, certificate)
    return _seal(certificate, key)


def _fill(
    request: CertificateRequest, *, curve: Curve, public_key: bytes, is_ca: bool, issuer: str
) -> Certificate:
    if not 0 <= request.not_before <= request.not_after <= _INT64_MAX:
        raise CertError("the certificate would expire before it becomes valid")
    return Certificate(
        version=request.version,
        curve=curve,
        name=request.name,
        networks=_order(request.version, request.networks),
        unsafe_networks=_order(request.version, request.unsafe_networks),
        groups=request.groups,
        is_ca=is_ca,
        not_before=request.not_before,
        not_after=request.not_after,
        issuer=issuer,
        public_key=public_key,
        signature=b"",
    )


def _order(version: CertVersion, networks: tuple[IPInterface, ...]) -> tuple[IPInterface, ...]:
    """Version 2 readers sort what they read, so issuers sort what they sign."""
    return v2.sorted_networks(networks) if version is CertVersion.V2 else networks


def _seal(certificate: Certificate, key: SigningKey) -> Certificate:
    signed = replace(certificate, signature=key.sign(codec.signed_bytes(certificate)))
    parse = v1.parse if certificate.version is CertVersion.V1 else v2.parse
    return parse(codec.encode(signed))
