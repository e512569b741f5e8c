"""PEM blocks with the banners of Nebula.

Data flow: text of a file -> [cert.pem] -> cert.codec, cert.keys -> [cert.pem] -> text of a file
Knows banners, lines and base64; knows nothing of what a block holds. Remembers where each block stood, so
that every later error can say so.
Source: RFC 7468; docs/wire-format.md, "PEM banners"; slackhq/nebula, cert/pem.go.
"""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from nebula_mp.errors import CertError

_BEGIN = "-----BEGIN "
_END = "-----END "
_DASHES = "-----"
_COLUMNS = 64


class Banner(StrEnum):
    """What stands between the dashes. "ECDSA" marks a P256 key that signs; without it, it agrees keys."""

    CERTIFICATE_V1 = "NEBULA CERTIFICATE"
    CERTIFICATE_V2 = "NEBULA CERTIFICATE V2"
    X25519_PRIVATE = "NEBULA X25519 PRIVATE KEY"
    X25519_PUBLIC = "NEBULA X25519 PUBLIC KEY"
    P256_PRIVATE = "NEBULA P256 PRIVATE KEY"
    P256_PUBLIC = "NEBULA P256 PUBLIC KEY"
    ED25519_PRIVATE = "NEBULA ED25519 PRIVATE KEY"
    ED25519_PUBLIC = "NEBULA ED25519 PUBLIC KEY"
    ED25519_ENCRYPTED = "NEBULA ED25519 ENCRYPTED PRIVATE KEY"
    ECDSA_P256_PRIVATE = "NEBULA ECDSA P256 PRIVATE KEY"
    ECDSA_P256_PUBLIC = "NEBULA ECDSA P256 PUBLIC KEY"
    ECDSA_P256_ENCRYPTED = "NEBULA ECDSA P256 ENCRYPTED PRIVATE KEY"


_WHAT = {
    Banner.CERTIFICATE_V1: "a certificate",
    Banner.CERTIFICATE_V2: "a certificate",
    Banner.X25519_PRIVATE: "a host's private key",
    Banner.P256_PRIVATE: "a host's private key",
    Banner.X25519_PUBLIC: "a host's public key",
    Banner.P256_PUBLIC: "a host's public key",
    Banner.ED25519_PRIVATE: "a CA's private key",
    Banner.ECDSA_P256_PRIVATE: "a CA's private key",
    Banner.ED25519_PUBLIC: "a CA's public key",
    Banner.ECDSA_P256_PUBLIC: "a CA's public key",
    Banner.ED25519_ENCRYPTED: "a CA's encrypted private key",
    Banner.ECDSA_P256_ENCRYPTED: "a CA's encrypted private key",
}


@dataclass(frozen=True, slots=True)
class PemBlock:
    """One block: what it says it is, its bytes, and where it stood."""

    banner: str  # compares equal to the Banner it names, if any
    body: bytes = field(repr=False)  # may be a private key
    source: str  # the file, as errors name it
    number: int  # of the block within the source, from 1
    line: int  # of its BEGIN, from 1

    @property
    def where(self) -> str:
        """`host.crt: block 2 (line 9)`."""
        return f"{self.source}: block {self.number} (line {self.line})"

    @property
    def what(self) -> str:
        """`a host's private key (NEBULA X25519 PRIVATE KEY)`."""
        try:
            return f"{_WHAT[Banner(self.banner)]} ({self.banner})"
        except ValueError:
            return f'"{self.banner}", which is nothing of Nebula'


def encode_block(banner: Banner, body: bytes) -> str:
    """Return the block as text of 64 columns that ends with a newline."""
    encoded = base64.b64encode(body).decode()
    lines = [encoded[at : at + _COLUMNS] for at in range(0, len(encoded), _COLUMNS)]
    return "\n".join([f"{_BEGIN}{banner}{_DASHES}", *lines, f"{_END}{banner}{_DASHES}", ""])


def parse_blocks(text: str, source: str) -> Iterator[PemBlock]:
    """Give the blocks of a file one by one; at least one, or CertError, which names source and line.

    Lines before a block are skipped as comments. Text after the last block is an error, and so is a
    block that does not end or is no base64. Nothing after the block a caller stops at is looked at.
    """
    lines = enumerate((line.strip() for line in text.split("\n")), start=1)
    number = 0
    stray: int | None = None  # line of the first text since the last block
    for line, content in lines:
        if content.startswith(_BEGIN):
            number += 1
            stray = None
            yield _read_block(lines, content, source, number, line)
        elif content.startswith(_END):
            raise CertError(f"{source}:{line}: END of a block that has no BEGIN")
        elif content and stray is None:
            stray = line
    if number == 0:
        raise CertError(f'{source}: no PEM block found; one starts with "-----BEGIN NEBULA ..."')
    if stray is not None:
        raise CertError(f"{source}:{stray}: text after the last PEM block; remove it or complete the block")


def _read_block(
    lines: Iterator[tuple[int, str]], first: str, source: str, number: int, line: int
) -> PemBlock:
    """Read up to and including the END that belongs to `first`."""
    where = f"{source}: block {number} (line {line})"
    if not first.endswith(_DASHES):
        raise CertError(f"{where}: the BEGIN line does not end with five dashes")
    banner = first[len(_BEGIN) : -len(_DASHES)]
    encoded: list[str] = []
    for at, content in lines:
        if content.startswith(_BEGIN):
            raise CertError(f"{where}: another BEGIN on line {at}, before its END")
        if content.startswith(_END):
            if content != f"{_END}{banner}{_DASHES}":
                raise CertError(f'{where}: BEGIN says "{banner}", line {at} says "{content}"')
            return PemBlock(banner, _decode("".join(encoded), where), source, number, line)
        encoded.append(content)
    raise CertError(f"{where}: has no END line; the file is cut off")


def _decode(encoded: str, where: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise CertError(f"{where}: the body is not base64; the file is damaged") from None
