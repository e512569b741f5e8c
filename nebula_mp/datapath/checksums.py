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

    def fields(self, column: int, dtype: "np.dtype[Any] | type[np.uint8]") -> NDArray[Any]:
        """Show one number of each row: U16 or U32 in network order, or np.uint8."""
        return np.ndarray((self.height,), dtype, self.memory, self.offset + column, (self.stride,))

    def numbers(self, column: int, dtype: "np.dtype[Any] | type[np.uint8]") -> Numbers:
        """Copy one number of each row, to calculate with it."""
        return self.fields(column, dtype).astype(np.int64)

    def top(self, height: int) -> "Rows":
        """Only the first rows."""
        return Rows(self.memory, self.offset, self.stride, height)


def row_sums(rows: Rows, column: int, width: int) -> Numbers:
    """Sum `width` bytes of each row; a last odd byte counts as if a zero byte followed.

    0.1 us for each row of 1300 bytes, when there are many; alignment makes no difference.
    """
    memory, offset, stride, height = rows
    if not height:  # which may begin anywhere
        return np.zeros(0, np.int64)
    at = offset + column
    words, rest = divmod(width, 4)
    whole: NDArray[np.uint32] = np.ndarray((height, words), np.uint32, memory, at, (stride, 4))
    sums: Numbers = np.add.reduce(whole, 1, np.int64)
    if rest & 2:
        sums += np.ndarray((height,), np.uint16, memory, at + 4 * words, (stride,))
    if rest & 1:
        sums += np.ndarray((height,), np.uint8, memory, at + width - 1, (stride,)) * np.int64(_ONE_BYTE)
    sums *= _SWAP
    return sums


def word_sums(rows: Rows, weights: NDArray[np.float64]) -> Numbers:
    """Sum the 16-bit words at the beginning of each row, of which each counts as often as `weights` says.

    `weights` has a row for each word, and a column for each sum; gives the sums as (columns, height).
    """
    memory, offset, stride, height = rows
    words: NDArray[np.uint16] = np.ndarray((height, len(weights)), np.uint16, memory, offset, (stride, 2))
    # In floats, which are exact here, since only those are multiplied by a library.
    sums: Numbers = (words.astype(np.float64) @ weights).T.astype(np.int64)
    sums *= _SWAP
    return sums


def plain_sum(data: Buffer) -> int:
    """Sum the bytes of one piece without numpy: quicker for a header, as quick for a packet."""
    return (int.from_bytes(data, "big") << (len(data) % 2 * 8)) % 0xFFFF


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


def are_right(sums: Numbers) -> NDArray[np.bool_]:
    """Whether each sum, over data that includes its checksum field, is that of a correct packet."""
    right: NDArray[np.bool_] = sums % 0xFFFF == 0
    return right


def checksums(rows: Rows, width: int) -> Numbers:
    """Give for each row what `wire.ip.internet_checksum` gives for its first `width` bytes."""
    sums = row_sums(rows, 0, width)
    # Only data of nothing but zeros has the sum 0, and then the field is 0xFFFF.
    return np.where(sums == 0, 0xFFFF, checksum_fields(sums))
