"""Traffic of Linux's own TCP and UDP between two devices that take superpackets, recorded once and kept.

Data flow: `python -m tests.support.recording` -> tests/vectors/tun_frames.json -> [support.recording] `load`
What a device gave is what the other one was given, so both ends are real connections: with their handshakes,
acknowledgements, ECN and retransmissions. To record needs root and Linux 6.2; to load needs neither.
"""

import base64
import json
import lzma
import random
import select
import socket
import struct
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple

from tests.support.offload_tun import EVERYTHING, OffloadTun, offload_tun
from tests.support.private_net import private_network

FILE: Final = Path(__file__).parents[1] / "vectors" / "tun_frames.json"
_RECORD: Final = struct.Struct("<BI")
_UDP_SEGMENT: Final = 103
_ADDRESSES: Final = (("10.50.1.2", "fd00:50:1::2"), ("10.50.2.2", "fd00:50:2::2"))
_TEXT: Final = b"the quick brown fox jumps over the lazy dog; "
_LIMIT_S: Final = 20.0


class Frame(NamedTuple):
    """What one device gave: virtio header and packet."""

    side: int  # 0 or 1
    data: bytes


def load() -> list[Frame]:
    """All frames, in the order in which they came."""
    data = lzma.decompress(base64.b64decode(json.loads(FILE.read_text())["frames"]))
    found, at = [], 0
    while at < len(data):
        side, size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        found.append(Frame(side, data[at : at + size]))
        at += size
    return found


class _Recorder:
    """Two networks and the wire between them."""

    def __init__(self, closing: ExitStack) -> None:
        self.frames: list[Frame] = []
        self._closing = closing
        self._tuns: list[OffloadTun] = []
        self._dice = random.Random(6)

    def enter(self, side: int) -> None:
        """Move into the network of a side, and have its device."""
        self._closing.enter_context(private_network())
        Path("/proc/sys/net/ipv4/tcp_ecn").write_text("1")
        four, six = _ADDRESSES[side]
        made = offload_tun(f"nmprec{side}", [f"{four}/8", f"{six}/32"], 1300, EVERYTHING)
        self._tuns.append(self._closing.enter_context(made))

    def socket(self, side: int, version: int, kind: socket.SocketKind) -> socket.socket:
        """In the network this thread is in."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        made = self._closing.enter_context(socket.socket(family, kind | socket.SOCK_NONBLOCK))
        made.bind((_ADDRESSES[side][version == 6], 0))
        return made

    def carry(self, until: float) -> None:
        """Let what either device gives be what the other one is given, now and then one is lost."""
        while time.monotonic() < until:
            ready, _, _ = select.select(self._tuns, [], [], 0.002)
            for tun in ready:
                side = self._tuns.index(tun)
                while (frame := tun.receive()) is not None:
                    self.frames.append(Frame(side, b"".join(frame)))
                    if self._dice.random() > 0.02:
                        self._tuns[1 - side].send(b"".join(frame))
            if not ready:
                return


def record() -> list[Frame]:
    """Transfers over TCP and UDP, IPv4 and IPv6, several at once."""
    with ExitStack() as closing:
        recorder = _Recorder(closing)
        recorder.enter(0)
        near = [recorder.socket(0, version, socket.SOCK_STREAM) for version in (4, 6)]
        near_udp = [recorder.socket(0, version, socket.SOCK_DGRAM) for version in (4, 6)]
        recorder.enter(1)
        far = [recorder.socket(1, version, socket.SOCK_STREAM) for version in (4, 6)]
        far_udp = [recorder.socket(1, version, socket.SOCK_DGRAM) for version in (4, 6)]
        for each in far:
            each.listen()
        for one, two in zip(near, far, strict=True):
            one.connect_ex(two.getsockname())
        ends = [(one, _accept(recorder, two)) for one, two in zip(near, far, strict=True)]
        for out, into in ends:
            for source, target, size in ((out, into, 300_000), (into, out, 90_000)):
                _transfer(recorder, source, target, (_TEXT * (size // len(_TEXT) + 1))[:size])
        for one, two in zip(near_udp, far_udp, strict=True):
            for count, size in ((1, 20), (30, 1200), (7, 1200), (2, 1)):
                data = (_TEXT * 1000)[: count * size - size // 3]
                one.sendmsg([data], [(17, _UDP_SEGMENT, struct.pack("=H", size))], 0, two.getsockname())
                two.sendto(data[:1000], one.getsockname())
                recorder.carry(time.monotonic() + 0.2)
        return recorder.frames


def _accept(recorder: _Recorder, listening: socket.socket) -> socket.socket:
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        recorder.carry(time.monotonic() + 0.05)
        try:
            accepted, _ = listening.accept()
        except BlockingIOError:
            continue
        accepted.setblocking(False)
        return accepted
    raise AssertionError("nobody came")


def _transfer(recorder: _Recorder, source: socket.socket, target: socket.socket, data: bytes) -> None:
    sent = received = 0
    end = time.monotonic() + _LIMIT_S
    while received < len(data):
        assert time.monotonic() < end, (sent, received)
        with suppress(BlockingIOError):
            sent += source.send(data[sent : sent + 60_000])
        recorder.carry(time.monotonic() + 0.05)
        with suppress(BlockingIOError):
            received += len(target.recv(1 << 20))


def main() -> None:
    frames = record()
    data = b"".join(_RECORD.pack(side, len(each)) + each for side, each in frames)
    packed = base64.b64encode(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)).decode()
    FILE.write_text(
        json.dumps({"made by": "python -m tests.support.recording", "frames": packed}, indent=1) + "\n"
    )
    large = sum(each.data[1] != 0 for each in frames)
    print(f"{len(frames)} frames, {large} superpackets, {len(data)} bytes, {FILE.stat().st_size} in {FILE}")


if __name__ == "__main__":
    main()
