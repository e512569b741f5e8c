"""Traffic between two sites through the overlay, and whether it arrived as it was sent.

Data flow: tests/e2e -> [support.traffic] -> sockets inside the sites -> overlay devices -> nodes
Sockets are opened inside a namespace and used from this process, so nothing has to be started there.
Knows nothing of Nebula: it is given sites, overlay addresses and a device name.
Source: icmp(7), packet(7), RFC 792, RFC 4443.
"""

import contextlib
import hashlib
import itertools
import os
import random
import re
import select
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from nebula_mp.newtypes import IPAddress
from tests.support.netns import Site, entered
from tests.support.udp_batches import receive, receive_batches, send_segmented

UDP_SIZES = (0, 1, 64, 1200, 1272)
SEGMENT_SIZES = (1, 64, 999, 1200, 1252)
PING_SIZES = (4000, 8000)
TRANSFER_BYTES = 3_000_000
RAW_PACKETS = 400
_TRANSFER_WITHIN_S = 60.0
_ECHO_WITHIN_S = 3.0
_RAW_WINDOW = 32
_RAW_WITHIN_S = 5.0
_ETH_P_ALL = 0x0003
_PACKET_HOST = 0
_SO_RCVBUFFORCE = 33
_TCP_UNANSWERED = frozenset(
    {1, 4, 9, 11}
)  # ESTABLISHED, FIN_WAIT1, LAST_ACK, CLOSING: linux/net/tcp_states.h


@dataclass(frozen=True)
class Endpoint:
    """Where traffic starts or ends: a site and its overlay address there."""

    site: Site
    address: IPAddress

    def socket(self, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
        """A non-blocking socket of the address's family inside the site."""
        family = socket.AF_INET if self.address.version == 4 else socket.AF_INET6
        with entered(self.site.space):
            opened = socket.socket(family, kind, protocol)
        opened.setblocking(False)
        return opened


def ping(source: Endpoint, destination: Endpoint, *, within_s: float = 10.0) -> float:
    """Ping four times a second until an answer comes; seconds until then, AssertionError if none does."""
    started = time.monotonic()
    with PingTrain(source, destination, interval_s=0.25) as train:
        return train.wait_for_answer(since=started, within_s=within_s) - started


def check_large_pings(source: Endpoint, destination: Endpoint, sizes: Sequence[int] = PING_SIZES) -> None:
    """`ping -s SIZE`, five of each, in fragments: each is answered, with its content unchanged."""
    for size in sizes:
        # After its last packet ping waits for two round trips and no longer, a few milliseconds here: so one
        # more is sent, whose answer does not count.
        options = ["-n", f"-{source.address.version}", "-c", "6", "-i", "0.2", "-W", "3", "-s", str(size)]
        command = source.site.space.command("ping", *options, str(destination.address))
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        answered = set(map(int, re.findall(r"icmp_seq=(\d+) .*time=", done.stdout)))
        # `ping` compares the content itself and says "wrong data byte".
        assert answered >= {1, 2, 3, 4, 5} and "wrong data" not in done.stdout, (  # noqa: PT018 - one message
            f"ping -s {size} {source.site.name} -> {destination.address}:\n{done.stdout}{done.stderr}"
        )


def check_udp_echo(source: Endpoint, destination: Endpoint, sizes: Sequence[int] = UDP_SIZES) -> None:
    """One datagram of each size goes there and comes back unchanged."""
    server, client = destination.socket(socket.SOCK_DGRAM), source.socket(socket.SOCK_DGRAM)
    with server, client:
        server.bind((str(destination.address), 0))
        client.connect(server.getsockname()[:2])
        for size in sizes:
            sent = os.urandom(size)
            client.send(sent)
            where = f"UDP {size} bytes {source.address} -> {destination.address}"
            assert select.select([server], [], [], _ECHO_WITHIN_S)[0], f"{where}: did not arrive"
            received, sender = server.recvfrom(65535)
            assert received == sent, f"{where}: arrived as {len(received)} other bytes"
            server.sendto(received, sender)
            assert select.select([client], [], [], _ECHO_WITHIN_S)[0], f"{where}: no echo"
            assert client.recv(65535) == sent, f"{where}: the echo is different"


def check_udp_segmented(
    source: Endpoint, destination: Endpoint, sizes: Sequence[int] = SEGMENT_SIZES, *, joined: bool = False
) -> None:
    """Datagrams sent with one call (UDP_SEGMENT) arrive each once and unchanged, as if sent one by one.

    `joined` lets the receiving socket take several with one call too (UDP_GRO), which must change nothing. Two
    datagrams go there and back first: what comes at once of a flow that nobody knows yet may be dropped.
    """
    server, client = destination.socket(socket.SOCK_DGRAM), source.socket(socket.SOCK_DGRAM)
    with server, client:
        server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        server.bind((str(destination.address), 0))
        client.connect(server.getsockname()[:2])
        if joined:
            receive_batches(server)
        memory = memoryview(bytearray(1 << 16))
        for _ in range(2):
            client.send(b"known?")
            assert select.select([server], [], [], _ECHO_WITHIN_S)[0], "a datagram did not arrive"
            server.sendto(*server.recvfrom(2048))
            assert select.select([client], [], [], _ECHO_WITHIN_S)[0], "no echo"
            client.recv(2048)
        for size in sizes:
            sent = os.urandom(size * min(40, 60_000 // size) + size // 2)
            send_segmented(client, sent, size)
            expected = [sent[at : at + size] for at in range(0, len(sent), size)]
            received: list[bytes] = []
            where = f"UDP_SEGMENT {size} bytes {source.address} -> {destination.address}"
            while len(received) < len(expected):
                ready = select.select([server], [], [], _ECHO_WITHIN_S)[0]
                assert ready, f"{where}: {len(received)} of {len(expected)} arrived"
                received += map(bytes, receive(server, memory))
            assert sorted(received) == sorted(expected), f"{where}: arrived as {list(map(len, received))}"


class _Stream:
    """One end of a TCP connection: sends `data`, hashes what comes."""

    def __init__(self, end: socket.socket, data: bytes, expected_bytes: int) -> None:
        self.end = end
        self._rest = memoryview(data)
        self._missing = expected_bytes
        self.hash = hashlib.sha256()

    @property
    def done(self) -> bool:
        return not self._rest and not self._missing

    @property
    def events(self) -> int:
        return (selectors.EVENT_WRITE if self._rest else 0) | (selectors.EVENT_READ if self._missing else 0)

    @property
    def progress(self) -> str:
        return f"{len(self._rest)} bytes unsent, {self._missing} bytes not received"

    def handle(self, events: int) -> None:
        if events & selectors.EVENT_WRITE and self._rest:
            self._rest = self._rest[self.end.send(self._rest[:65536]) :]
        if events & selectors.EVENT_READ:
            data = self.end.recv(65536)
            assert data, f"the connection was closed early: {self.progress}"
            self._missing -= len(data)
            self.hash.update(data)


def check_tcp(
    source: Endpoint,
    destination: Endpoint,
    size: int = TRANSFER_BYTES,
    *,
    within_s: float = _TRANSFER_WITHIN_S,
    window_bytes: int = 0,
) -> float:
    """Random bytes both ways at once over one connection; equal hashes. Returns seconds taken.

    With `window_bytes` no more than that is under way: queues stay short enough to lose nothing else.
    """
    upward, downward = random.randbytes(size), random.randbytes(size)
    listener, client = destination.socket(socket.SOCK_STREAM), source.socket(socket.SOCK_STREAM)
    if window_bytes:
        for opened in (listener, client):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
    started = time.monotonic()
    where = f"TCP {source.address} -> {destination.address}"
    with listener, client:
        listener.bind((str(destination.address), 0))
        listener.listen(1)
        with contextlib.suppress(BlockingIOError):
            client.connect(listener.getsockname()[:2])
        assert select.select([listener], [], [], within_s)[0], f"{where}: no connection after {within_s:g} s"
        server, _ = listener.accept()
        with server:
            server.setblocking(False)
            ends = [_Stream(client, upward, size), _Stream(server, downward, size)]
            deadline = started + within_s
            with selectors.DefaultSelector() as selector:
                for end in ends:
                    selector.register(end.end, end.events, end)
                while not all(end.done for end in ends):
                    for key, events in selector.select(0.5):
                        stream: _Stream = key.data
                        stream.handle(events)
                        if stream.events:
                            selector.modify(stream.end, stream.events, stream)
                        else:
                            selector.unregister(stream.end)
                    stuck = "; ".join(end.progress for end in ends)
                    assert time.monotonic() < deadline, f"{where}: not done after {within_s:g} s: {stuck}"
            _hang_up(client, server, deadline)
    assert ends[1].hash.digest() == hashlib.sha256(upward).digest(), f"{where}: the bytes arrived altered"
    assert ends[0].hash.digest() == hashlib.sha256(downward).digest(), f"{where}: the bytes came back altered"
    return time.monotonic() - started


def _hang_up(client: socket.socket, server: socket.socket, deadline: float) -> None:
    """End the connection and wait until neither stack has anything to say about it any more.

    A FIN that is still under way would be a packet too many for who counts them next.
    """
    for end in (client, server):
        end.shutdown(socket.SHUT_WR)
    while _may_still_send(client) or _may_still_send(server):
        assert time.monotonic() < deadline, "the end of a TCP connection is not answered"
        time.sleep(0.005)


def _may_still_send(end: socket.socket) -> bool:
    """Whether this end waits for an answer to what it sent (tcp(7), TCP_INFO: the first byte is the state)."""
    state = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state in _TCP_UNANSWERED


def silence_local_stacks(*ends: Endpoint) -> None:
    """Make the hosts deaf to their overlay addresses, so that their stacks answer nothing they receive.

    Packets are still delivered to the device, where a packet socket sees them first. For good: the site
    is of use for raw packets only afterwards.
    """
    for end in ends:
        family = f"-{end.address.version}"
        routes = end.site.ip(family, "route", "show", "table", "local", "type", "local").splitlines()
        route = next(line for line in routes if f"local {end.address} " in line)
        end.site.ip(family, "route", "del", *route.split(), "table", "local")


def check_raw_packets(source: Endpoint, destination: Endpoint, device: str, packets: Sequence[bytes]) -> None:
    """Put IP packets on the overlay device as if the host had sent them; each comes out there, as it was, once.

    `silence_local_stacks` first: then nothing else may come out, and nothing goes back.
    """
    with entered(source.site.space):
        injector = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with entered(destination.site.space):
        capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with injector, capture:
        capture.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
        capture.bind((device, _ETH_P_ALL))
        arrived: Counter[bytes] = Counter()
        for start in range(0, len(packets), _RAW_WINDOW):
            window = packets[start : start + _RAW_WINDOW]
            for packet in window:
                injector.sendto(packet, (device, 0x0800 if packet[0] >> 4 == 4 else 0x86DD))
            _receive(capture, arrived, Counter(packets[: start + len(window)]))
        expected = Counter(packets)
        lost, strange = list((expected - arrived).elements()), list((arrived - expected).elements())
        where = f"{source.address} -> {destination.address}"
        if lost or strange:
            lines = [f"raw packets {where}: {len(lost)} of {len(packets)} lost, {len(strange)} unexpected"]
            lines += [f"lost     #{packets.index(packet)} {_show(packet)}" for packet in lost[:8]]
            lines += [f"appeared {_show(packet)}" for packet in strange[:8]]
            raise AssertionError("\n".join(lines))


def _show(packet: bytes) -> str:
    return f"{packet[:64].hex()} ({len(packet)} B)"


def _receive(capture: socket.socket, arrived: Counter[bytes], expected: Counter[bytes]) -> None:
    deadline = time.monotonic() + _RAW_WITHIN_S
    while expected - arrived and (left := deadline - time.monotonic()) > 0:
        if select.select([capture], [], [], left)[0]:
            packet, address = capture.recvfrom(65535)
            if address[2] == _PACKET_HOST:
                arrived[packet] += 1


@dataclass
class PingTrain:
    """Echo requests at a fixed pace from a thread, each remembered with its answer; a context manager."""

    source: Endpoint
    destination: Endpoint
    interval_s: float = 0.05
    sent_at: list[float] = field(default_factory=list)
    answered_at: dict[int, float] = field(default_factory=dict)
    duplicates: int = 0

    def __post_init__(self) -> None:
        v4 = self.source.address.version == 4
        self._request, self._reply = (8, 0) if v4 else (128, 129)
        protocol = socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6
        self._skip_header = v4  # a raw IPv4 socket gives the IP header as well
        self._socket = self.source.socket(socket.SOCK_RAW, protocol)
        self._identifier = random.randrange(1, 65536)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ping train", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, *, grace_s: float = 1.0) -> None:
        """Send no more, and wait up to `grace_s` for answers under way. May be called again."""
        if not self._ending.is_set():
            deadline = time.monotonic() + grace_s
            last = len(self.sent_at) - 1
            while last not in self.answered_at and time.monotonic() < deadline:
                time.sleep(0.01)
            self._ending.set()
            self._thread.join()
            self._socket.close()
            # What was sent while waiting has had less than its grace: it is not judged.
            del self.sent_at[last + 1 :]

    @property
    def lost(self) -> list[int]:
        """Numbers of the requests without an answer; meaningful after `stop`."""
        return [number for number in range(len(self.sent_at)) if number not in self.answered_at]

    def answers(self, *, since: float) -> list[float]:
        """When answers came, to requests sent at or after `since` (monotonic seconds)."""
        sent, taken = self.sent_at[:], list(self.answered_at.items())
        return sorted(at for number, at in taken if number < len(sent) and sent[number] >= since)

    def wait_for_answer(self, *, since: float, within_s: float) -> float:
        """The first answer to a request sent at or after `since`, within that time of `since`."""
        while not (answers := self.answers(since=since)):
            waited = time.monotonic() - since
            where = f"{self.source.address} -> {self.destination.address}"
            assert waited < within_s, f"no ping {where} answered within {within_s:g} s"
            time.sleep(0.01)
        return answers[0]

    def longest_silence_s(self, *, since: float) -> float:
        """The longest time without any answer from `since` to the last request; after `stop`."""
        times = [since, *sorted(at for at in self.answered_at.values() if at >= since)]
        times.append(max(self.sent_at[-1], times[-1]))
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ending.is_set():
            if (now := time.monotonic()) >= due:
                self.sent_at.append(now)
                # No route while a device is away: that request counts as lost.
                with contextlib.suppress(OSError):
                    self._socket.sendto(
                        self._message(len(self.sent_at) - 1), (str(self.destination.address), 0)
                    )
                due = max(due + self.interval_s, now)
            if select.select([self._socket], [], [], max(0.0, min(due - time.monotonic(), 0.1)))[0]:
                self._read()

    def _message(self, number: int) -> bytes:
        def fields(checksum: int) -> bytes:
            return struct.pack(
                "!BBHHHQ", self._request, 0, checksum, self._identifier, number & 0xFFFF, number
            )

        message = fields(0)
        return fields(_checksum(message)) if self._skip_header else message  # the kernel sums ICMPv6

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            packet, sender = self._socket.recvfrom(2048)
            message = packet[(packet[0] & 15) * 4 :] if self._skip_header else packet
            if len(message) < 16 or message[0] != self._reply or sender[0] != str(self.destination.address):
                return
            _, _, _, identifier, _, number = struct.unpack_from("!BBHHHQ", message)
            if identifier == self._identifier and number < len(self.sent_at):
                if number in self.answered_at:
                    self.duplicates += 1
                self.answered_at.setdefault(number, time.monotonic())


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def collect(checks: Sequence[Callable[[], object]], what: str) -> None:
    """Run every check, and raise all their failures together: one does not hide another."""
    failures: list[Exception] = []
    for check in checks:
        try:
            check()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            failures.append(error)
    if failures:
        raise ExceptionGroup(what, failures)
