"""Private and public keys as files hold them.

Data flow: text of a file -> [cert.keys] -> crypto.dh, crypto.signing -> [cert.keys] -> text of a file
Knows which banner goes with which curve and use; knows nothing of files or prompts. A host's key agrees
keys, a CA's key signs; neither is taken for the other.
Source: docs/wire-format.md, "PEM banners"; slackhq/nebula, cert/pem.go.
"""

from collections.abc import Callable

from nebula_mp.cert.encrypted_key import Argon2Parameters, decrypt, encrypt
from nebula_mp.cert.pem import Banner, PemBlock, encode_block, parse_blocks
from nebula_mp.crypto.dh import PUBLIC_KEY_BYTES, PrivateKey
from nebula_mp.crypto.signing import SigningKey
from nebula_mp.errors import CertError
from nebula_mp.newtypes import Curve, Entropy

_PRIVATE = {Curve.CURVE25519: Banner.X25519_PRIVATE, Curve.P256: Banner.P256_PRIVATE}
_PUBLIC = {Curve.CURVE25519: Banner.X25519_PUBLIC, Curve.P256: Banner.P256_PUBLIC}
_SIGNING = {Curve.CURVE25519: Banner.ED25519_PRIVATE, Curve.P256: Banner.ECDSA_P256_PRIVATE}
_ENCRYPTED = {Curve.CURVE25519: Banner.ED25519_ENCRYPTED, Curve.P256: Banner.ECDSA_P256_ENCRYPTED}

_SWAPPED = "; are the certificate and the key swapped?"
_PUBLIC_HALF = "; use the .key file made together with it"
_OF_CA = (
    "; the CA's key stays with the CA: use the one that `nebula-mp cert sign` or `keygen` made for this host"
)
_HINTS: dict[str, str] = {
    Banner.CERTIFICATE_V1: _SWAPPED,
    Banner.CERTIFICATE_V2: _SWAPPED,
    Banner.X25519_PUBLIC: _PUBLIC_HALF,
    Banner.P256_PUBLIC: _PUBLIC_HALF,
    **dict.fromkeys([*_SIGNING.values(), *_ENCRYPTED.values()], _OF_CA),
}


def encode_private_key(key: PrivateKey) -> str:
    """Return a host's private key as PEM."""
    return encode_block(_PRIVATE[key.curve], key.to_bytes())


def encode_public_key(key: PrivateKey) -> str:
    """Return a host's public key as PEM."""
    return encode_block(_PUBLIC[key.curve], key.public_key)


def encode_signing_key(key: SigningKey) -> str:
    """Return a CA's private key as PEM, in the clear."""
    return encode_block(_SIGNING[key.curve], key.to_bytes())


def encrypt_signing_key(
    key: SigningKey, passphrase: bytes, parameters: Argon2Parameters, entropy: Entropy
) -> str:
    """Return a CA's private key as PEM, encrypted."""
    return encode_block(_ENCRYPTED[key.curve], encrypt(key.to_bytes(), passphrase, parameters, entropy))


def parse_private_key(text: str, source: str) -> PrivateKey:
    """Read a host's private key from the first block; CertError says what else stands there."""
    block = next(parse_blocks(text, source))
    for curve, banner in _PRIVATE.items():
        if block.banner == banner:
            try:
                return PrivateKey.from_bytes(curve, block.body)
            except CertError as error:
                raise CertError(f"{block.where}: {error}") from None
    hint = _HINTS.get(block.banner, "")
    raise CertError(f"{block.where} is {block.what}, where a host's private key is expected{hint}")


def parse_public_key(text: str, source: str) -> tuple[Curve, bytes]:
    """Read a host's public key from the first block. Whether it is a point of the curve is not checked."""
    block = next(parse_blocks(text, source))
    for curve, banner in _PUBLIC.items():
        if block.banner == banner:
            if len(block.body) != PUBLIC_KEY_BYTES[curve]:
                raise CertError(
                    f"{block.where}: {curve.name} public keys are {PUBLIC_KEY_BYTES[curve]} bytes, "
                    f"got {len(block.body)}"
                )
            return curve, block.body
    raise CertError(f"{block.where} is {block.what}, where a host's public key is expected")


def parse_signing_key(text: str, source: str, passphrase: Callable[[], bytes]) -> SigningKey:
    """Read a CA's private key from the first block. `passphrase` is called only if it is encrypted."""
    block = next(parse_blocks(text, source))
    for curve in Curve:
        if block.banner == _SIGNING[curve]:
            return _signing_key(curve, block.body, block)
        if block.banner == _ENCRYPTED[curve]:
            secret = passphrase()
            try:
                raw = decrypt(block.body, secret)
            except CertError as error:
                raise CertError(f"{block.where}: {error}") from None
            return _signing_key(curve, raw, block)
    raise CertError(f"{block.where} is {block.what}, where a CA's private key is expected")


def _signing_key(curve: Curve, raw: bytes, block: PemBlock) -> SigningKey:
    try:
        return SigningKey.from_bytes(curve, raw)
    except CertError as error:
        raise CertError(f"{block.where}: {error}") from None
