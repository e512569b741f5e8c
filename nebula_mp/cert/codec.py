"""One door to both encodings of certificates.

Data flow: handshake.machine, cert.pool, cert.identity, cli -> [cert.codec] -> cert.v1 | cert.v2
Knows which version speaks which encoding and which PEM banner; knows nothing of either in detail.
Source: docs/wire-format.md, "Certificates and keys" and "Handshake".
"""

from collections.abc import Iterator

from nebula_mp.cert import v1, v2
from nebula_mp.cert.model import Certificate
from nebula_mp.cert.pem import Banner, PemBlock, encode_block, parse_blocks
from nebula_mp.errors import CertError
from nebula_mp.newtypes import CertVersion, Curve

_BANNERS = {CertVersion.V1: Banner.CERTIFICATE_V1, CertVersion.V2: Banner.CERTIFICATE_V2}
_HINTS: dict[str, str] = dict.fromkeys(
    (Banner.X25519_PRIVATE, Banner.P256_PRIVATE), "; are the certificate and the key swapped?"
)


def encode(certificate: Certificate) -> bytes:
    """Return the canonical bytes, as files hold them."""
    return v1.encode(certificate) if _is_v1(certificate) else v2.encode(certificate)


def encode_for_handshake(certificate: Certificate) -> bytes:
    """Return the bytes of a handshake: without what the Noise message carries already."""
    return (
        v1.encode_for_handshake(certificate) if _is_v1(certificate) else v2.encode_for_handshake(certificate)
    )


def parse_from_handshake(version: int, data: bytes, public_key: bytes, curve: Curve) -> Certificate:
    """Rebuild a peer's certificate from a handshake; CertError when it cannot be one.

    `version` is that of the message, where 0 (left out) means 1. `public_key` is the Noise static key
    and `curve` our own: a certificate of another curve, or with a key of its own, is refused.
    """
    if not public_key:
        raise CertError("no peer static key was present")
    if not data:
        raise CertError("provided payload was empty")
    match version:
        case 0 | CertVersion.V1:
            return v1.parse_from_handshake(data, public_key, curve)
        case CertVersion.V2:
            return v2.parse_from_handshake(data, public_key, curve)
        case _:
            raise CertError("certificate version unrecognized")


def signed_bytes(certificate: Certificate) -> bytes:
    """Return what the CA signs."""
    return v1.signed_bytes(certificate) if _is_v1(certificate) else v2.signed_bytes(certificate)


def fingerprint_bytes(certificate: Certificate) -> bytes:
    """Return what the fingerprint is the SHA-256 of; in version 2 that is not the encoded certificate."""
    if _is_v1(certificate):
        return v1.encode(certificate)
    return v2.signed_bytes(certificate) + certificate.signature


def encode_pem(certificate: Certificate) -> str:
    """Return the PEM block of a file, with a newline at its end."""
    return encode_block(_BANNERS[certificate.version], encode(certificate))


def parse_block(block: PemBlock) -> Certificate:
    """Read one PEM block; CertError says where it stands and what is wrong with it."""
    try:
        match block.banner:
            case Banner.CERTIFICATE_V1:
                return v1.parse(block.body)
            case Banner.CERTIFICATE_V2:
                return v2.parse(block.body)
    except CertError as error:
        raise CertError(f"{block.where}: {error}") from None
    raise CertError(
        f"{block.where} is {block.what}, where a certificate is expected{_HINTS.get(block.banner, '')}"
    )


def parse_pem(text: str, source: str) -> Iterator[tuple[PemBlock, Certificate]]:
    """Read the certificates of a file one by one, so that the caller may stop at the first.

    `source` names the file in errors: CertError for anything that is no certificate, before, between
    or after them, except that lines before a block are skipped as comments.
    """
    for block in parse_blocks(text, source):
        yield block, parse_block(block)


def _is_v1(certificate: Certificate) -> bool:
    return certificate.version is CertVersion.V1
