"""The Noise pattern IX, message by message: Noise_IX_(25519|P256)_(AESGCM|ChaChaPoly)_SHA256.

    -> e, s, payload
    <- e, ee, se, s, es, payload

Data flow: handshake.machine -> [noise.ix] -> noise.symmetric, crypto.dh
Payloads are opaque bytes here; whose static key it is, and whether to trust it, the caller decides.
Source: The Noise Protocol Framework, revision 34, sections 5.3, 7.5 and 12. P256 is not in that document:
points travel uncompressed (65 bytes) and the shared secret is the 32-byte X coordinate.
"""

from dataclasses import dataclass, field

from nebula_mp.crypto.aead import TAG_BYTES
from nebula_mp.crypto.dh import PUBLIC_KEY_BYTES, PrivateKey
from nebula_mp.errors import AuthError, HandshakeError, TruncatedError
from nebula_mp.newtypes import Cipher, Curve, Entropy
from nebula_mp.noise.symmetric import SymmetricState

MESSAGE_MAX_BYTES = 65535

_DH_NAMES = {Curve.CURVE25519: "25519", Curve.P256: "P256"}
_CIPHER_NAMES = {Cipher.AES: "AESGCM", Cipher.CHACHAPOLY: "ChaChaPoly"}


def protocol_name(curve: Curve, cipher: Cipher) -> str:
    """Name what both sides hash first; no psk in it, whatever Nebula's subtype is called."""
    return f"Noise_IX_{_DH_NAMES[curve]}_{_CIPHER_NAMES[cipher]}_SHA256"


@dataclass(frozen=True, slots=True)
class IxKeys:
    """What a finished handshake leaves: one 32-byte key for each direction. The repr hides them."""

    initiator_to_responder: bytes = field(repr=False)
    responder_to_initiator: bytes = field(repr=False)
    handshake_hash: bytes  # 32 bytes, equal on both sides, not secret


class _Side:
    """What both sides keep between the two messages."""

    def __init__(
        self, curve: Curve, cipher: Cipher, static: PrivateKey, entropy: Entropy, prologue: bytes = b""
    ) -> None:
        """`entropy` is for the one ephemeral key. Nebula's prologue is empty, and hashed all the same."""
        assert static.curve is curve
        self._curve = curve
        self._static = static
        self._entropy = entropy
        self._public_bytes = PUBLIC_KEY_BYTES[curve]
        self._state = SymmetricState(protocol_name(curve, cipher), cipher)
        self._state.mix_hash(prologue)

    @property
    def handshake_hash(self) -> bytes:
        """The running hash over what was said so far."""
        return self._state.handshake_hash


class IxInitiator(_Side):
    """Call `write_message_1` once, then `read_message_2` until one answer is good."""

    _ephemeral: PrivateKey | None = None

    def write_message_1(self, payload: bytes) -> bytes:
        """Return the message, in which `payload` travels in clear.

        HandshakeError above 65,535 bytes: the object is spent.
        """
        assert self._ephemeral is None
        self._ephemeral = PrivateKey.generate(self._curve, self._entropy)
        state = self._state
        state.mix_hash(self._ephemeral.public_key)
        message = (
            self._ephemeral.public_key
            + state.encrypt_and_hash(self._static.public_key)
            + state.encrypt_and_hash(payload)
        )
        return _not_too_long(message)

    def read_message_2(self, message: bytes) -> tuple[bytes, bytes, IxKeys]:
        """Return the payload, the responder's static public key, and the keys.

        AuthError for anything that is not an answer to our message 1. No call changes the object, so that a
        forged answer does not spoil the handshake; after a good one the caller drops it.
        """
        ephemeral = self._ephemeral
        assert ephemeral is not None
        size = self._public_bytes
        static_end = size + size + TAG_BYTES
        if not static_end + TAG_BYTES <= len(message) <= MESSAGE_MAX_BYTES:
            raise AuthError(f"noise message 2: {len(message)} bytes is not a possible length")
        remote_ephemeral = message[:size]
        state = self._state.copy()
        state.mix_hash(remote_ephemeral)
        state.mix_key(ephemeral.exchange(remote_ephemeral))
        state.mix_key(self._static.exchange(remote_ephemeral))
        remote_static = state.decrypt_and_hash(message[size:static_end])
        state.mix_key(ephemeral.exchange(remote_static))
        payload = state.decrypt_and_hash(message[static_end:])
        return payload, remote_static, IxKeys(*state.split(), state.handshake_hash)


class IxResponder(_Side):
    """Call `read_message_1`, then `write_message_2`, once each."""

    _remote: tuple[bytes, bytes] | None = None  # ephemeral and static key of the initiator

    def read_message_1(self, message: bytes) -> tuple[bytes, bytes]:
        """Return payload and the initiator's static public key, both claimed only.

        Nothing in message 1 is proved. No Diffie-Hellman is done here, so that refusing is cheap; a bad
        public key comes to light in `write_message_2`. TruncatedError or AuthError for an impossible length;
        nothing changes then.
        """
        assert self._remote is None
        size = self._public_bytes
        if len(message) < 2 * size:
            raise TruncatedError(f"noise message 1: need {2 * size} bytes, got {len(message)}")
        if len(message) > MESSAGE_MAX_BYTES:
            raise AuthError(f"noise message 1: {len(message)} bytes exceed {MESSAGE_MAX_BYTES}")
        ephemeral = message[:size]
        self._state.mix_hash(ephemeral)
        static = self._state.decrypt_and_hash(message[size : 2 * size])
        payload = self._state.decrypt_and_hash(message[2 * size :])
        self._remote = ephemeral, static
        return payload, static

    def write_message_2(self, payload: bytes) -> tuple[bytes, IxKeys]:
        """Return the message and the keys. AuthError for a malformed or low-order key of the initiator.

        HandshakeError above 65,535 bytes. After any error the object is spent.
        """
        assert self._remote is not None
        remote_ephemeral, remote_static = self._remote
        ephemeral = PrivateKey.generate(self._curve, self._entropy)
        state = self._state
        state.mix_hash(ephemeral.public_key)
        state.mix_key(ephemeral.exchange(remote_ephemeral))
        state.mix_key(ephemeral.exchange(remote_static))
        sealed_static = state.encrypt_and_hash(self._static.public_key)
        state.mix_key(self._static.exchange(remote_ephemeral))
        message = ephemeral.public_key + sealed_static + state.encrypt_and_hash(payload)
        return _not_too_long(message), IxKeys(*state.split(), state.handshake_hash)


def _not_too_long(message: bytes) -> bytes:
    if len(message) > MESSAGE_MAX_BYTES:
        raise HandshakeError(f"noise: our message of {len(message)} bytes exceeds {MESSAGE_MAX_BYTES}")
    return message
