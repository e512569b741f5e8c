"""CA private keys encrypted with a passphrase.

Data flow: cert.keys -> [cert.encrypted_key] -> cryptography (Argon2id, AES-256-GCM)
Knows the protobuf envelope and the key derivation; knows nothing of PEM, prompts or what the key is for.
Source: docs/wire-format.md, "Encrypted CA key"; RFC 9106 (Argon2); slackhq/nebula, cert/crypto.go.
"""

from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from google.protobuf.message import DecodeError

from nebula_mp.errors import CertError
from nebula_mp.newtypes import Entropy
from nebula_mp.wire import nebula_pb2 as pb

ALGORITHM = "AES-256-GCM"
ARGON2_VERSION = 19

_KEY_BYTES = 32
_NONCE_BYTES = 12
_SALT_BYTES = 32
_SALT_BYTES_MIN = 16
_UINT32_MAX = 0xFFFFFFFF
_PARALLELISM_MAX = 255
_MEMORY_PER_LANE_MIN = 8  # KiB, RFC 9106 section 3.1


@dataclass(frozen=True, slots=True)
class Argon2Parameters:
    """How much work one try of a passphrase is. CertError when a value is out of range."""

    memory_kib: int = 2 * 1024 * 1024
    iterations: int = 1
    parallelism: int = 4

    def __post_init__(self) -> None:
        for name, value, highest in (
            ("memory", self.memory_kib, _UINT32_MAX),
            ("iterations", self.iterations, _UINT32_MAX),
            ("parallelism", self.parallelism, _PARALLELISM_MAX),
        ):
            if not 1 <= value <= highest:
                raise CertError(f"argon2 {name} must be 1 to {highest}, got {value}")
        if self.memory_kib < _MEMORY_PER_LANE_MIN * self.parallelism:
            raise CertError(
                f"argon2 memory must be at least {_MEMORY_PER_LANE_MIN} KiB for each of the "
                f"{self.parallelism} lanes, got {self.memory_kib} KiB"
            )


def encrypt(raw_key: bytes, passphrase: bytes, parameters: Argon2Parameters, entropy: Entropy) -> bytes:
    """Return the envelope with the key inside. Reads 32 bytes of `entropy` for the salt, 12 for the nonce."""
    salt = entropy(_SALT_BYTES)
    nonce = entropy(_NONCE_BYTES)
    key = _derive(passphrase, salt, parameters)
    envelope = pb.RawNebulaEncryptedData(
        EncryptionMetadata=pb.RawNebulaEncryptionMetadata(
            EncryptionAlgorithm=ALGORITHM,
            Argon2Parameters=pb.RawNebulaArgon2Parameters(
                version=ARGON2_VERSION,
                memory=parameters.memory_kib,
                iterations=parameters.iterations,
                parallelism=parameters.parallelism,
                salt=salt,
            ),
        ),
        Ciphertext=nonce + AESGCM(key).encrypt(nonce, raw_key, None),
    )
    return envelope.SerializeToString(deterministic=True)


def decrypt(envelope: bytes, passphrase: bytes) -> bytes:
    """Return the key inside; CertError for a wrong passphrase or an envelope that is not one."""
    message = _read(envelope)
    metadata = message.EncryptionMetadata
    if metadata.EncryptionAlgorithm != ALGORITHM:
        raise CertError(f"unsupported encryption algorithm: {metadata.EncryptionAlgorithm}")
    argon2 = metadata.Argon2Parameters
    if argon2.version != ARGON2_VERSION:
        raise CertError(f"incompatible Argon2 version: {argon2.version}")
    if len(argon2.salt) < _SALT_BYTES_MIN:
        raise CertError(f"the salt must be at least {_SALT_BYTES_MIN} bytes, got {len(argon2.salt)}")
    if len(message.Ciphertext) <= _NONCE_BYTES:
        raise CertError("the encrypted key is shorter than its nonce")
    parameters = Argon2Parameters(argon2.memory, argon2.iterations, argon2.parallelism)
    key = _derive(passphrase, argon2.salt, parameters)
    nonce, ciphertext = message.Ciphertext[:_NONCE_BYTES], message.Ciphertext[_NONCE_BYTES:]
    try:
        return AESGCM(key).decrypt(nonce, ciphertext, None)
    except InvalidTag:
        raise CertError("invalid passphrase or corrupt private key") from None


def _read(envelope: bytes) -> pb.RawNebulaEncryptedData:
    message = pb.RawNebulaEncryptedData()
    try:
        message.ParseFromString(envelope)
    except DecodeError:
        raise CertError("the encrypted key is not a protobuf message") from None
    if not message.EncryptionMetadata.HasField("Argon2Parameters"):
        raise CertError("the encrypted key does not say how it was encrypted")
    return message


def _derive(passphrase: bytes, salt: bytes, parameters: Argon2Parameters) -> bytes:
    try:
        return Argon2id(
            salt=salt,
            length=_KEY_BYTES,
            iterations=parameters.iterations,
            lanes=parameters.parallelism,
            memory_cost=parameters.memory_kib,
        ).derive(passphrase)
    except MemoryError:
        raise CertError(
            f"the key needs {parameters.memory_kib // 1024} MiB of memory for Argon2, "
            "which this machine does not give"
        ) from None
