"""Seal and open with the network's AEAD; the nonce is the 64-bit counter.

Data flow: noise.symmetric, control.controller, datapath -> [crypto.aead] -> cryptography
Knows where the counter sits in the nonce; does not know whether a counter was used before.
Source: Noise section 12 (cipher functions); RFC 8439; NIST SP 800-38D.
"""

import struct
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from nebula_mp.errors import AuthError
from nebula_mp.newtypes import Buffer, Cipher

KEY_BYTES = 32
TAG_BYTES = 16

# 12 bytes each: four zero bytes, then the counter. The byte orders differ on purpose, as in Noise.
_NONCE_AES = struct.Struct(">4xQ")
_NONCE_CHACHAPOLY = struct.Struct("<4xQ")


class Aead:
    """One key of one direction. Has no state: callers see to it that no counter is sealed twice."""

    __slots__ = ("_cipher", "_nonce", "cipher")

    def __init__(self, cipher: Cipher, key: Buffer) -> None:
        """`key` is 32 bytes and is copied."""
        assert len(key) == KEY_BYTES  # keys come from our own key schedule
        self.cipher: Final = cipher
        self._cipher: Final = AESGCM(key) if cipher is Cipher.AES else ChaCha20Poly1305(key)
        self._nonce: Final = (_NONCE_AES if cipher is Cipher.AES else _NONCE_CHACHAPOLY).pack

    def seal(self, counter: int, associated_data: Buffer, plaintext: Buffer) -> bytes:
        """Return ciphertext and 16-byte tag. `counter` is a u64 never sealed with this key before."""
        return self._cipher.encrypt(self._nonce(counter), plaintext, associated_data)

    def open(self, counter: int, associated_data: Buffer, ciphertext: Buffer) -> bytes:
        """Return the plaintext of ciphertext and tag; AuthError when they do not fit or are too short."""
        try:
            return self._cipher.decrypt(self._nonce(counter), ciphertext, associated_data)
        except InvalidTag:
            raise AuthError(f"authentication tag of packet {counter} does not fit") from None

    def seal_into(self, counter: int, associated_data: Buffer, plaintext: Buffer, out: memoryview) -> None:
        """Do as `seal`, but write to `out`, which has room for exactly the plaintext and a tag.

        `out` may begin where `plaintext` lies, which is then overwritten; they may overlap in no other way.
        """
        self._cipher.encrypt_into(self._nonce(counter), plaintext, associated_data, out)

    def seal_each(
        self,
        first: int,
        associated_data: Iterable[Buffer],
        plaintexts: Iterable[Buffer],
        outs: Iterable[memoryview],
    ) -> None:
        """Do as `seal_into` for many, with the counters from `first` on; all three are equally long.

        No byte code is executed for each of them: 0.63 us for 1300 bytes, 0.50 us of it for the call.
        """
        nonces = map(self._nonce, count(first))
        deque(map(self._cipher.encrypt_into, nonces, plaintexts, associated_data, outs), maxlen=0)

    def open_into(self, counter: int, associated_data: Buffer, ciphertext: Buffer, out: memoryview) -> None:
        """Do as `open`, but write to `out`, which has room for exactly the ciphertext without its tag.

        On AuthError it is all zeros: nobody can take what was not authentic for a plaintext.
        """
        try:
            self._cipher.decrypt_into(self._nonce(counter), ciphertext, associated_data, out)
        except InvalidTag:
            out[:] = bytes(len(out))
            raise AuthError(f"authentication tag of packet {counter} does not fit") from None

    def open_each_into(
        self,
        counters: Iterable[int],
        associated_data: Sequence[Buffer],
        ciphertexts: Sequence[Buffer],
        outs: Sequence[memoryview],
        kept: Sequence[memoryview],
    ) -> list[bytes]:
        """Do as `open_into` for one packet after the other; all arguments are equally long.

        The place of a packet may overlap those of earlier ones: gives a copy of each of `kept`, made when its
        packet had been opened and before the next one was. On AuthError the `out` of the packet that did not
        fit is all zeros, and nothing behind it was opened. 0.7 us for each packet of 1300 bytes.
        """
        opened: list[bytes] = []
        add, decrypt = opened.append, self._cipher.decrypt_into
        nonces = map(self._nonce, counters)
        out = outs[0]
        try:
            for nonce, data, ciphertext, out, keep in zip(
                nonces, associated_data, ciphertexts, outs, kept, strict=True
            ):
                decrypt(nonce, ciphertext, data, out)
                add(keep.tobytes())
        except InvalidTag:
            out[:] = bytes(len(out))
            raise AuthError(f"authentication tag of packet {len(opened)} of a batch does not fit") from None
        return opened


class Ciphers(NamedTuple):
    """What is made of a tunnel's keys, once for each generation of its row."""

    send: Aead
    receive: Aead

    @classmethod
    def build(cls, cipher: Cipher, send_key: memoryview, receive_key: memoryview) -> "Ciphers":
        """Expand both keys, which are borrowed for the call."""
        return cls(Aead(cipher, send_key), Aead(cipher, receive_key))
