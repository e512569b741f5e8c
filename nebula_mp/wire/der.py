"""Strict reading and writing of DER elements: as much of ASN.1 as a version 2 certificate needs.

Data flow: cert.v2 -> [wire.der] -> cert.v2
Knows tags, lengths and integers; knows nothing of certificates. Every element has one encoding here: lengths
are minimal and definite, tags fit one byte, and nothing may follow what was expected.
Source: ITU-T X.690 (DER), sections 8 and 10.1.
"""

from typing import Final

from nebula_mp.errors import TruncatedError, WireError
from nebula_mp.newtypes import Buffer

INTEGER: Final = 0x02
OCTET_STRING: Final = 0x04
UTF8_STRING: Final = 0x0C
SEQUENCE: Final = 0x30

CONTEXT: Final = 0x80  # class bits of an element whose number is given by the surrounding structure
CONSTRUCTED: Final = 0x20

_HIGH_TAG_NUMBER = 0x1F  # the number follows in further bytes; Nebula never uses one
_LONG_LENGTH = 0x80
_LENGTH_BYTES_MAX = 4


class Reader:
    """Elements one after another. After an error the reader must not be used again.

    Every method raises TruncatedError when the data ends inside an element and WireError for an
    encoding that is not DER or an element other than the one asked for.
    """

    __slots__ = ("_at", "_data")

    def __init__(self, data: Buffer) -> None:
        self._data = bytes(data)
        self._at = 0

    @property
    def at_end(self) -> bool:
        """Whether every byte was read."""
        return self._at == len(self._data)

    def read_any(self) -> tuple[int, bytes]:
        """Return tag and content of the next element."""
        tag, start, end = self._locate()
        self._at = end
        return tag, self._data[start:end]

    def read_element(self, tag: int) -> bytes:
        """Return the next element, which must have this tag, with its tag and length."""
        before = self._at
        self.read(tag)
        return self._data[before : self._at]

    def read(self, tag: int) -> bytes:
        """Return the content of the next element, which must have this tag."""
        found, content = self.read_any()
        if found != tag:
            raise WireError(f"DER: expected tag {tag:#04x}, found {found:#04x}")
        return content

    def read_optional(self, tag: int) -> bytes | None:
        """Return the content of the next element if it has this tag; else None, and nothing is read."""
        if self.at_end or self._data[self._at] != tag:
            return None
        return self.read(tag)

    def finish(self) -> None:
        """Raise WireError unless every byte was read."""
        if not self.at_end:
            raise WireError(f"DER: {len(self._data) - self._at} bytes too many")

    def _locate(self) -> tuple[int, int, int]:
        """Tag, and where the content of the element at the cursor starts and ends."""
        data, at = self._data, self._at
        if len(data) - at < 2:
            raise TruncatedError("DER: the data ends inside a tag or length")
        tag, length = data[at], data[at + 1]
        if tag & _HIGH_TAG_NUMBER == _HIGH_TAG_NUMBER:
            raise WireError("DER: tag numbers above 30 are not supported")
        start = at + 2
        if length >= _LONG_LENGTH:
            count = length - _LONG_LENGTH
            if not 1 <= count <= _LENGTH_BYTES_MAX:
                raise WireError("DER: the length is indefinite or too long")
            start += count
            if start > len(data):
                raise TruncatedError("DER: the data ends inside a length")
            length = int.from_bytes(data[at + 2 : start])
            if length < _LONG_LENGTH or length >> (8 * (count - 1)) == 0:
                raise WireError("DER: the length is not in its shortest form")
        end = start + length
        if end > len(data):
            raise TruncatedError(f"DER: an element says {length} bytes, {len(data) - start} are left")
        return tag, start, end


def parse_integer(content: bytes) -> int:
    """Return the signed number an INTEGER holds; WireError unless it is in its shortest form."""
    if not content:
        raise WireError("DER: an integer has no bytes")
    if len(content) > 1 and content[0] == (0xFF if content[1] & 0x80 else 0x00):
        raise WireError("DER: the integer is not in its shortest form")
    return int.from_bytes(content, signed=True)


def encode_integer(value: int) -> bytes:
    """Return the content of an INTEGER, to be wrapped by `encode`."""
    magnitude = value if value >= 0 else ~value
    return value.to_bytes(magnitude.bit_length() // 8 + 1, signed=True)


def encode(tag: int, *contents: bytes) -> bytes:
    """Return one element around the contents, joined."""
    content = b"".join(contents)
    length = len(content)
    if length < _LONG_LENGTH:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes((tag, _LONG_LENGTH | len(octets))) + octets + content
