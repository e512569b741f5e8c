"""The Internet checksum of many packets at once, and the packets of a batch as columns of numbers.

Data flow: datapath.segment | datapath.coalesce -> [checksums] -> numpy
Knows sums, and where in memory rows of equal length lie; knows nothing of what their bytes mean.
Source: RFC 1071, RFC 9293 section 3.1 and RFC 8200 section 8.1 (pseudo headers).

Sums are plain integers that are congruent modulo 65535 to the sum of the big-endian 16-bit words: 2**16 is 1
there, so wider words may be added as they are, and nothing is folded before the end. No sum here exceeds
2**55, so a few of them, and any fields, may be added or subtracted in an int64.
"""

import sys
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nebula_mp.newtypes import Buffer

Numbers: TypeAlias = NDArray[np.int64]
"""One number for each row."""

U16: Final = np.dtype(">u2")
U32: Final = np.dtype(">u4")

# Words are read in the order of this machine. A sum of swapped words is the swapped sum (RFC 1071 section
# 2(B)), and to swap the bytes of a number modulo 65535 is to multiply it by 256.
_SWAP: Final = 256 if sys.byteorder == "little" else 1
_ONE_BYTE: Final = 1 if sys.byteorder == "little" else 256  # a last odd byte as a word with a zero behind it


class Rows(NamedTuple):
    """`height` rows, the first at `offset` of `memory`, each `stride` bytes behind the one before.

    Views of them are views of the memory, and writable if that is. ValueError if a row leaves the memory.
    """

    memory: Buffer
    offset: int
    stride: int
    height: int

    def block(self, column: int, width: int) -> NDArray[np.uint8]:
        """Show `width` bytes of each row as a (height, width) array."""
        view: NDArray[np.uint8] = np.ndarray(
            (self.height, width), np.uint8, self.memory, self.offset + column, (self.stride, 1)
        )
        return view

    def fields(self, column: int, dtype: "np.dtype[Any] | type[np.uint8 | np.uint16]") -> NDArray[Any]:
        """Show one item of each row: U16 or U32 in network order, or another."""
        return np.ndarray((self.height,), dtype, self.memory, self.offset + column, (self.stride,))

    def numbers(self, column: int, dtype: "np.dtype[Any] | type[np.uint8]") -> Numbers:
        """Copy one number of each row, to calculate with it."""
        return self.fields(column, dtype).astype(np.int64)

    def top(self, height: int) -> "Rows":
        """Only the first rows."""
        return Rows(self.memory, self.offset, self.stride, height)


class Words:
    """`width` bytes of each row, from `column` on, as words that can be added up.

    To be kept for memory that is filled again and again: the views cost a quarter of a microsecond each.
    """

    __slots__ = ("_byte", "_pair", "_whole")

    def __init__(self, rows: Rows, column: int, width: int) -> None:
        """ValueError if a row leaves the memory."""
        memory, offset, stride, height = rows
        # No rows may begin anywhere.
        at = offset + column if height else 0
        words, rest = divmod(width, 4) if height else (0, 0)
        self._whole: NDArray[np.uint32] = np.ndarray((height, words), np.uint32, memory, at, (stride, 4))
        self._pair: NDArray[np.uint16] | None = None
        self._byte: NDArray[np.uint8] | None = None
        if rest & 2:
            self._pair = np.ndarray((height,), np.uint16, memory, at + 4 * words, (stride,))
        if rest & 1:
            self._byte = np.ndarray((height,), np.uint8, memory, at + width - 1, (stride,))

    def swapped_sums(self, first: int, end: int) -> Numbers:
        """Sum rows `first` to `end`, in words of this machine; an odd last byte has a zero byte behind it.

        0.1 us for each row of 1300 bytes, when there are many; alignment makes no difference. This is the
        quickest way that is exact: sums in floats, or of 64-bit words with their carries, take as long or
        longer.
        """
        sums: Numbers = np.add.reduce(self._whole[first:end], 1, np.int64)
        if self._pair is not None:
            sums += self._pair[first:end]
        if self._byte is not None:
            sums += self._byte[first:end] * np.int64(_ONE_BYTE)
        return sums


def row_sums(rows: Rows, column: int, width: int) -> Numbers:
    """Sum `width` bytes of each row; a last odd byte counts as if a zero byte followed."""
    sums = Words(rows, column, width).swapped_sums(0, rows.height)
    sums *= _SWAP
    return sums


def plain_sum(data: Buffer) -> int:
    """Sum the bytes of one piece without numpy: quicker for a header, as quick for a packet."""
    return (int.from_bytes(data, "big") << (len(data) % 2 * 8)) % 0xFFFF


def swapped(number: int) -> int:
    """What a number of 16 bits in network order counts in sums of words of this machine."""
    return number * _SWAP


def swapped_sum(data: Buffer) -> int:
    """Do as `plain_sum`, and give what `Words.swapped_sums` would give."""
    return plain_sum(data) * _SWAP


def pseudo_sum(addresses: Buffer, protocol: int, length: int) -> int:
    """Sum the pseudo header of IPv4 or IPv6: both addresses together, protocol, length of the segment."""
    return int.from_bytes(addresses, "big") % 0xFFFF + protocol + length


def checksum_fields(sums: Numbers) -> Numbers:
    """Give the checksum field for each sum over data in which that field is 0.

    Something in the data must not be 0, as is so with any IP header or pseudo header. For UDP use
    `udp_checksum_fields`.
    """
    return np.negative(sums) % 0xFFFF


def udp_checksum_fields(sums: Numbers) -> Numbers:
    """Do as `checksum_fields`, with 0xFFFF for 0, which would mean that there is no checksum (RFC 768)."""
    return 0xFFFF - sums % 0xFFFF


def swapped_fields(sums: Numbers, *, is_udp: bool, rest: int = 0) -> Numbers:
    """Give what the functions above give, in words of this machine, for sums in words of this machine.

    `rest` is added to all sums first, without a call for it.
    """
    # To swap the bytes of a remainder is to multiply it by 256 modulo 65535: 0 and 0xFFFF stay what they are.
    if is_udp:
        return 0xFFFF - (sums + rest) % 0xFFFF
    return (-rest - sums) % 0xFFFF


def are_right(sums: Numbers) -> NDArray[np.bool_]:
    """Whether each sum, over data that includes its checksum field, is that of a correct packet."""
    right: NDArray[np.bool_] = sums % 0xFFFF == 0
    return right


def checksums(rows: Rows, width: int) -> Numbers:
    """Give for each row what `wire.ip.internet_checksum` gives for its first `width` bytes."""
    sums = row_sums(rows, 0, width)
    # Only data of nothing but zeros has the sum 0, and then the field is 0xFFFF.
    return np.where(sums == 0, 0xFFFF, checksum_fields(sums))
