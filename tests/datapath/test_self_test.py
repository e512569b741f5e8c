"""The accelerator's self-test: its answers are those of the Python kernel, and no wrong one gets past it."""

from collections.abc import Callable
from typing import Any

import pytest

from nebula_mp.crypto.aead import TAG_BYTES, Aead
from nebula_mp.datapath.coalesce import coalesce
from nebula_mp.datapath.segment import segment
from nebula_mp.datapath.virtio import VirtioHeader
from nebula_mp.errors import KernelError
from nebula_mp.newtypes import Cipher

pytestmark = pytest.mark.native

CODES = {1: Cipher.AES, 2: Cipher.CHACHAPOLY}


@pytest.fixture
def test() -> Any:
    from nebula_mp.datapath import self_test  # noqa: PLC0415 - not everywhere

    return self_test


def test_the_expected_tags_are_those_of_the_python_kernel(test: Any) -> None:
    assert test.TAGS.keys() == CODES.keys()
    for code, cipher in CODES.items():
        sealed = Aead(cipher, test._SECRET).seal(test._COUNTER, test._HEADER, test._PLAINTEXT)
        assert sealed[-TAG_BYTES:] == test.TAGS[code]


def test_the_expected_packets_are_those_that_the_python_kernel_cuts_and_joins(test: Any) -> None:
    header = VirtioHeader.parse(test.OFFLOAD, test.SUPERPACKET)
    stride = max(map(len, test.PACKETS))
    memory = b"".join(packet.ljust(stride, b"\0") for packet in test.PACKETS)

    (joined,) = coalesce(memoryview(bytearray(memory)), stride, [len(each) for each in test.PACKETS])

    assert segment(header, test.SUPERPACKET) == list(test.PACKETS)
    assert joined.packets == len(test.PACKETS)
    assert joined.head == test.OFFLOAD + test.SUPERPACKET[: header.header_bytes]


def test_the_accelerator_that_is_installed_passes(test: Any) -> None:
    test.run()


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def moved(places: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return [(name, offset + 8 * (name == "TUNNEL_ROW.peer"), size) for name, offset, size in places]


WRONG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "one word of the tunnel table": ("layout_offsets", moved, "place of TUNNEL_ROW.peer"),
    "a table that is missing": (
        "layout_offsets",
        lambda places: [place for place in places if place[0] != "PEER_ROW"],
        "size of PEER_ROW: found None",
    ),
    "a region of another version": (
        "layouts",
        lambda regions: [(name, magic, version + 1) for name, magic, version in regions],
        "tunnels: version 2 is not known",
    ),
    "a sum": ("checksum", lambda found: found ^ 1, "checksum: found"),
    "a ciphertext": ("seal", lambda found: flip(found, 3), "opened: found"),
    "a tag": ("seal", lambda found: flip(found, len(found) - 1), "tag: found"),
    "a forged packet that is opened": ("open", lambda found: (True, found[1]), "is authentic"),
    "a good packet that is not": ("open", lambda found: (False, found[1]), "opened: found"),
    "a packet of three": ("segment", lambda found: [*found[:2], flip(found[2], 30)], "segment: found"),
    "packets that stay apart": ("coalesce", lambda found: [*found, *found], "coalesce: found"),
}


@pytest.mark.parametrize(("name", "spoil", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_found(
    name: str, spoil: Callable[[Any], Any], said: str, test: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(test._accel, name)
    monkeypatch.setattr(test._accel, name, lambda *arguments, **named: spoil(right(*arguments, **named)))

    with pytest.raises(KernelError, match=f"self-test: .*({said})"):
        test.run()
