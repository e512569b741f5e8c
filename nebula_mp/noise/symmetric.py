"""The Noise CipherState and SymmetricState; knows nothing of Nebula, of patterns or of Diffie-Hellman.

Data flow: noise.ix -> [noise.symmetric] -> crypto.aead
Source: The Noise Protocol Framework, revision 34, sections 4.3, 5.1 and 5.2, with SHA-256.
"""

from copy import copy
from typing import NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nebula_mp.crypto.aead import Aead
from nebula_mp.newtypes import Buffer, Cipher

HASH_BYTES = 32


def _sha256(*parts: Buffer) -> bytes:
    digest = Hash(SHA256())
    for part in parts:
        digest.update(part)
    return digest.finalize()


def _hkdf_2(chaining_key: bytes, input_key_material: bytes) -> tuple[bytes, bytes]:
    """Do Noise's HKDF with two outputs, which is RFC 5869 with the chaining key as salt and no info."""
    okm = HKDF(SHA256(), 2 * HASH_BYTES, salt=chaining_key, info=b"").derive(input_key_material)
    return okm[:HASH_BYTES], okm[HASH_BYTES:]


class CipherState(NamedTuple):
    """A key and the nonce that comes next. Immutable, so a failed message leaves the old one in place."""

    aead: Aead
    nonce: int


class SymmetricState:
    """Section 5.2. `copy()` is the checkpoint: work on the copy, keep it only when the message was good."""

    __slots__ = ("_chaining_key", "_cipher", "_cipher_state", "handshake_hash")

    def __init__(self, protocol_name: str, cipher: Cipher) -> None:
        """InitializeSymmetric: a name of up to 32 bytes is padded with zeros, a longer one is hashed."""
        name = protocol_name.encode("ascii")
        self.handshake_hash = name.ljust(HASH_BYTES, b"\0") if len(name) <= HASH_BYTES else _sha256(name)
        self._chaining_key = self.handshake_hash
        self._cipher = cipher
        self._cipher_state: CipherState | None = None

    def copy(self) -> "SymmetricState":
        """Return an independent state that is equal to this one; all fields are immutable."""
        return copy(self)

    def mix_key(self, input_key_material: bytes) -> None:
        """Do MixKey."""
        self._chaining_key, key = _hkdf_2(self._chaining_key, input_key_material)
        self._cipher_state = CipherState(Aead(self._cipher, key), 0)

    def mix_hash(self, data: Buffer) -> None:
        """Do MixHash."""
        self.handshake_hash = _sha256(self.handshake_hash, data)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        """Do EncryptAndHash: the plaintext itself as long as there is no key."""
        ciphertext = plaintext
        if (state := self._cipher_state) is not None:
            ciphertext = state.aead.seal(state.nonce, self.handshake_hash, plaintext)
            self._cipher_state = CipherState(state.aead, state.nonce + 1)
        self.mix_hash(ciphertext)
        return ciphertext

    def decrypt_and_hash(self, ciphertext: bytes) -> bytes:
        """Do DecryptAndHash; AuthError, and nothing changes, when the tag does not fit."""
        plaintext = ciphertext
        if (state := self._cipher_state) is not None:
            plaintext = state.aead.open(state.nonce, self.handshake_hash, ciphertext)
            self._cipher_state = CipherState(state.aead, state.nonce + 1)
        self.mix_hash(ciphertext)
        return plaintext

    def split(self) -> tuple[bytes, bytes]:
        """Do Split and return raw keys: initiator to responder, then responder to initiator."""
        return _hkdf_2(self._chaining_key, b"")
