"""Signatures of certificate authorities.

Data flow: cert.pool, cert.sign -> [crypto.signing] -> cryptography
Knows keys and signatures as Nebula stores them; knows nothing of what is signed.
Source: RFC 8032 (Ed25519); FIPS 186-5 and RFC 6979 (deterministic ECDSA over P-256 with SHA-256).
"""

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nebula_mp.crypto.dh import P256_ORDER, generate_p256_scalar, load_p256_private, load_p256_public
from nebula_mp.errors import AuthError, CertError
from nebula_mp.newtypes import Buffer, Curve, Entropy

SIGNING_KEY_BYTES: dict[Curve, int] = {Curve.CURVE25519: 64, Curve.P256: 32}
"""Of a stored private key. Ed25519 keys are stored as the 32-byte seed followed by the 32-byte public key."""

_SEED_BYTES = 32


class SigningKey:
    """A CA key pair. Its repr shows the public half only."""

    __slots__ = ("_key", "curve", "public_key")

    def __init__(self, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> None:
        self._key: Final = key
        if isinstance(key, Ed25519PrivateKey):
            self.curve = Curve.CURVE25519
            self.public_key = key.public_key().public_bytes_raw()
        else:
            self.curve = Curve.P256
            self.public_key = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    @classmethod
    def generate(cls, curve: Curve, entropy: Entropy) -> "SigningKey":
        """Make a fresh pair from 32 bytes of `entropy`."""
        if curve is Curve.P256:
            return cls(load_p256_private(generate_p256_scalar(entropy)))
        return cls(Ed25519PrivateKey.from_private_bytes(entropy(_SEED_BYTES)))

    @classmethod
    def from_bytes(cls, curve: Curve, raw: bytes) -> "SigningKey":
        """Load the pair of a stored private key; CertError when it is none of that curve."""
        if curve is Curve.P256:
            return cls(load_p256_private(raw))
        if len(raw) != SIGNING_KEY_BYTES[curve]:
            raise CertError(f"an Ed25519 private key is {SIGNING_KEY_BYTES[curve]} bytes, got {len(raw)}")
        key = cls(Ed25519PrivateKey.from_private_bytes(raw[:_SEED_BYTES]))
        if key.public_key != raw[_SEED_BYTES:]:
            raise CertError("the two halves of the Ed25519 private key do not belong together")
        return key

    def to_bytes(self) -> bytes:
        """Return the secret bytes as a key file holds them, see SIGNING_KEY_BYTES."""
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.private_bytes_raw() + self.public_key
        return self._key.private_numbers().private_value.to_bytes(SIGNING_KEY_BYTES[Curve.P256])

    def sign(self, message: Buffer) -> bytes:
        """Sign: 64 bytes for Ed25519, ASN.1 DER with low s for P256. Same message, same signature."""
        if isinstance(self._key, Ed25519PrivateKey):
            return self._key.sign(message)
        return with_low_s(self._key.sign(message, ec.ECDSA(SHA256(), deterministic_signing=True)))

    def __repr__(self) -> str:
        return f"SigningKey({self.curve.name}, public_key={self.public_key.hex()})"


def with_other_s(signature: bytes) -> bytes:
    """Return the other valid form of a P256 signature, n - s for s; AuthError when it is not DER."""
    r, s = _decode(signature)
    return encode_dss_signature(r, P256_ORDER - s)


def with_low_s(signature: bytes) -> bytes:
    """Return the form of a P256 signature whose s is at most n/2; AuthError when it is not DER."""
    r, s = _decode(signature)
    return encode_dss_signature(r, min(s, P256_ORDER - s))


def _decode(signature: bytes) -> tuple[int, int]:
    try:
        r, s = decode_dss_signature(signature)
    except ValueError:
        raise AuthError("P256 signature is not ASN.1 DER") from None
    if not (0 < r < P256_ORDER and 0 < s < P256_ORDER):
        raise AuthError("P256 signature holds a number outside the group")
    return r, s


def verify(curve: Curve, public_key: bytes, signature: bytes, message: Buffer) -> None:
    """Return when the signature fits, else raise AuthError. Both forms of a P256 signature fit."""
    try:
        if curve is Curve.P256:
            load_p256_public(public_key).verify(signature, message, ec.ECDSA(SHA256()))
        else:
            _load_ed25519_public(public_key).verify(signature, message)
    except InvalidSignature:
        raise AuthError("signature does not fit") from None


def _load_ed25519_public(raw: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError:
        raise AuthError("Ed25519 public key is malformed") from None
