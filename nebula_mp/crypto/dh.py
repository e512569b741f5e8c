"""Diffie-Hellman over the two curves a network may use.

Data flow: cert.identity, noise.ix -> [crypto.dh] -> cryptography
Knows keys as Nebula stores and sends them; knows nothing of certificates or Noise.
Source: RFC 7748 (X25519); SEC 1 (P-256, uncompressed points, X coordinate as the secret).
"""

from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nebula_mp.errors import AuthError, CertError
from nebula_mp.newtypes import Curve, Entropy

PRIVATE_KEY_BYTES = 32
PUBLIC_KEY_BYTES: dict[Curve, int] = {Curve.CURVE25519: 32, Curve.P256: 65}

P256_ORDER = 0xFFFFFFFF_00000000_FFFFFFFF_FFFFFFFF_BCE6FAAD_A7179E84_F3B9CAC2_FC632551
"""Number of points of the group: scalars are 1 to this less one."""

_UNCOMPRESSED = 4  # first byte of a point that is followed by X and Y


def generate_p256_scalar(entropy: Entropy) -> bytes:
    """Draw a uniform scalar by rejection: one draw in 2**32 is thrown away."""
    for _ in range(16):
        raw = entropy(PRIVATE_KEY_BYTES)
        if 0 < int.from_bytes(raw) < P256_ORDER:
            return raw
    raise RuntimeError("the entropy source gave 16 values in a row that are no P-256 scalar: it is broken")


def load_p256_private(raw: bytes) -> ec.EllipticCurvePrivateKey:
    """Load a 32-byte big-endian scalar; CertError when it is none."""
    if len(raw) != PRIVATE_KEY_BYTES:
        raise CertError(f"a P256 private key is {PRIVATE_KEY_BYTES} bytes, got {len(raw)}")
    scalar = int.from_bytes(raw)
    if not 0 < scalar < P256_ORDER:
        raise CertError("P256 private key is zero or not below the order of the curve")
    return ec.derive_private_key(scalar, ec.SECP256R1())


def load_p256_public(raw: bytes) -> ec.EllipticCurvePublicKey:
    """Load an uncompressed 65-byte point; AuthError for any other form and for points off the curve."""
    if len(raw) != PUBLIC_KEY_BYTES[Curve.P256] or raw[0] != _UNCOMPRESSED:
        raise AuthError("P256 public key is not an uncompressed point")
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), raw)
    except ValueError:
        raise AuthError("P256 public key is not a point of the curve") from None


class PrivateKey:
    """A static or ephemeral key pair. Its repr shows the public half only."""

    __slots__ = ("_key", "curve", "public_key")

    def __init__(self, key: X25519PrivateKey | ec.EllipticCurvePrivateKey) -> None:
        self._key: Final = key
        if isinstance(key, X25519PrivateKey):
            self.curve = Curve.CURVE25519
            self.public_key = key.public_key().public_bytes_raw()
        else:
            self.curve = Curve.P256
            self.public_key = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    @classmethod
    def generate(cls, curve: Curve, entropy: Entropy) -> "PrivateKey":
        """Make a fresh pair from 32 bytes of `entropy`."""
        if curve is Curve.P256:
            return cls(load_p256_private(generate_p256_scalar(entropy)))
        return cls(X25519PrivateKey.from_private_bytes(entropy(PRIVATE_KEY_BYTES)))

    @classmethod
    def from_bytes(cls, curve: Curve, raw: bytes) -> "PrivateKey":
        """Load the pair of a stored 32-byte private key; CertError when it is none of that curve."""
        if curve is Curve.P256:
            return cls(load_p256_private(raw))
        if len(raw) != PRIVATE_KEY_BYTES:
            raise CertError(f"an X25519 private key is {PRIVATE_KEY_BYTES} bytes, got {len(raw)}")
        return cls(X25519PrivateKey.from_private_bytes(raw))

    def to_bytes(self) -> bytes:
        """Return the 32 secret bytes, for writing a key file."""
        if isinstance(self._key, X25519PrivateKey):
            return self._key.private_bytes_raw()
        return self._key.private_numbers().private_value.to_bytes(PRIVATE_KEY_BYTES)

    def exchange(self, peer_public: bytes) -> bytes:
        """Return the 32-byte shared secret; AuthError for a malformed key and for a point of low order."""
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.exchange(ec.ECDH(), load_p256_public(peer_public))
        if len(peer_public) != PUBLIC_KEY_BYTES[Curve.CURVE25519]:
            raise AuthError(f"an X25519 public key is 32 bytes, got {len(peer_public)}")
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError:  # RFC 7748 section 6.1: a point of low order
            raise AuthError("X25519 public key is a point of low order") from None

    def __repr__(self) -> str:
        return f"PrivateKey({self.curve.name}, public_key={self.public_key.hex()})"
