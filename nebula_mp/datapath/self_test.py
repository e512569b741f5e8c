"""Whether the accelerator does its work here: what must hold before packets are trusted to it.

Data flow: datapath.kernels -> [self_test] -> nebula_mp._accel
One answer to a known question from each of its parts, and every offset of the shared memory: what a wrong
build, a processor or a compiler can break. That both kernels do the same with any bytes, the tests show.
Takes a millisecond. Knows nothing of numpy and cryptography, so that every command can afford it.
"""

from typing import Final

from nebula_mp import _accel, shm_ring, shm_stats, shm_table
from nebula_mp.errors import KernelError
from nebula_mp.shm import Layout
from nebula_mp.shm_table import Row
from nebula_mp.wire.ip import internet_checksum

_SECRET: Final = bytes(range(32))
_HEADER: Final = bytes(range(16))
_COUNTER: Final = 7
_PLAINTEXT: Final = bytes(range(256)) * 5 + bytes(20)  # as long as a packet: not what is done byte by byte
_CIPHERS: Final = {1: "AES-256-GCM", 2: "ChaCha20-Poly1305"}
TAGS: Final = {
    1: bytes.fromhex("8f5ea5815d53f707ae425505826a0eb0"),
    2: bytes.fromhex("cc358d2d4faf8390f47239c51f586348"),
}
"""Of the plaintext, by the tunnel table's code of the cipher; they depend on every byte."""

OFFLOAD: Final = bytes.fromhex("01012800080014001000")
"""In front of the superpacket: TCP over IPv4, 8 bytes to a packet."""
SUPERPACKET: Final = bytes.fromhex(
    "4500003c000740004006234e0a3201020a3202029c40c350000003e80000004d501801f417960000"
    "000102030405060708090a0b0c0d0e0f10111213"
)
PACKETS: Final = tuple(
    map(
        bytes.fromhex,
        (
            "45000030000740004006235a0a3201020a3202029c40c350000003e80000004d501001f4269b00000001020304050607",
            "4500003000084000400623590a3201020a3202029c40c350000003f00000004d501001f40673000008090a0b0c0d0e0f",
            "4500002c000940004006235c0a3201020a3202029c40c350000003f80000004d501801f41073000010111213",
        ),
    )
)
"""What the superpacket is cut into, and what joined to it again."""

_CONTROLS_OWN: Final = ("JOURNAL", "JOURNAL_ROW")
_CHECKSUM_SIZES: Final = (0, 1, 20, 64, 1319)


def run() -> None:
    """Raises KernelError, or whatever the accelerator raises, if it is not to be trusted."""
    _check_layouts()
    for size in _CHECKSUM_SIZES:
        _expect("checksum", _accel.checksum(_PLAINTEXT[:size]), internet_checksum(_PLAINTEXT[:size]))
    for cipher, name in _CIPHERS.items():
        _check_cipher(cipher, name)
    _expect("segment", _accel.segment(OFFLOAD, SUPERPACKET), list(PACKETS))
    joined = _accel.coalesce(list(PACKETS), tso=True, uso=True)
    _expect("coalesce", joined, [(OFFLOAD + SUPERPACKET, len(PACKETS))])


def _check_layouts() -> None:
    theirs = {(name, magic, version) for name, magic, version in _accel.layouts()}
    for module in (shm_table, shm_ring, shm_stats):
        for name, layout in vars(module).items():
            if isinstance(layout, Layout) and name not in _CONTROLS_OWN and tuple(layout) not in theirs:
                raise KernelError(f"self-test: {layout.name}: version {layout.version} is not known")
    places = {name: (offset, size) for name, offset, size in _accel.layout_offsets()}
    for name, row in vars(shm_table).items():
        if isinstance(row, Row) and name not in _CONTROLS_OWN:
            _expect(f"size of {name}", places.get(name), (0, row.size))
            for part, field in row.fields.items():
                _expect(f"place of {name}.{part}", places.get(f"{name}.{part}"), tuple(field))


def _check_cipher(cipher: int, name: str) -> None:
    tag = TAGS[cipher]
    sealed = _accel.seal(cipher, _SECRET, _COUNTER, _HEADER, _PLAINTEXT)
    _expect(f"{name}: tag", sealed[len(_PLAINTEXT) :], tag)
    opened = _accel.open(cipher, _SECRET, _COUNTER, _HEADER, sealed)
    _expect(f"{name}: opened", opened, (True, _PLAINTEXT))
    is_authentic, _ = _accel.open(cipher, _SECRET, _COUNTER + 1, _HEADER, sealed)
    if is_authentic:
        raise KernelError(f"self-test: {name}: what was sealed with another counter is authentic")


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise KernelError(f"self-test: {what}: found {_short(found)}, expected {_short(expected)}")


def _short(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
