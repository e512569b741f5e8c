"""What one node does alone, by role: `python -m tests.bench.alone`, as root, on a quiet machine.

    tx: recorded packets -> TUN device -> reader (and writer) -> UDP -> veth, whose other end drops them
    rx: recorded datagrams -> UDP -> reader (and writer) -> TUN device -> forwarded to that veth
    relay: recorded relay frames -> UDP -> reader (and writer) -> UDP -> that veth

The load is sealed or built beforehand and sent with `sendmmsg`, a limited number of packets ahead of the node:
so as good as nothing is lost, nothing but the node seals or opens, and a slow node is not kept busy dropping. The
node's processes are the program's, with real shared memory, device and socket; only control is missing, which
has nothing to do once a flow is known. Prints packets/s, Gbit/s of inner packets and microseconds of CPU a
packet, medians of interleaved rounds; `--json` keeps every sample. docs/performance.md says what follows.
Without `--roles`: tx and rx.

Shapes: UDP packets of 64, 512 and 1300 bytes and a mix of 7 x 64, 4 x 576 and 1 x 1300 (`imix`), of 32 flows in
turn, so that none can be joined; `tcp`: one flow's superpackets of 49 packets of 1300 bytes. Datagrams come in
trains, as a sender like us makes them; with `--train 1` one by one, as older ones do.
"""

import argparse
import itertools
import json
import os
import platform
import random
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_interface
from pathlib import Path
from typing import Any, Final

from pyroute2 import IPRoute

from nebula_mp import netlink
from nebula_mp.config.model import DrainMode, Offloads, TunConfig
from nebula_mp.datapath import kernels
from nebula_mp.datapath.api import Drop
from nebula_mp.datapath.drains import TRAIN_BYTES_IPV4, TRAIN_LENGTHS
from nebula_mp.ioctl_tun import TunDevice
from nebula_mp.newtypes import RelayIndex, TunnelIndex, UdpAddr
from nebula_mp.shm import HEADER_BYTES, Mapping
from nebula_mp.shm_relays import RelayKind, RelayRow, RelayTable
from nebula_mp.shm_stats import SLOTS
from nebula_mp.shm_table import RELAYS
from nebula_mp.workers.parts import ReaderParts, Role, WriterParts
from tests.bench.replay import Message, Recording, Replay, trains
from tests.datapath.sites import FAR, INDEX_NEAR, KEY_IN, KEY_OUT, NEAR, address_of, connect, frame, message
from tests.datapath.superpackets import TIMESTAMPS
from tests.support.packets import TCP, UDP, checksum, ip, ipv4, tcp, udp
from tests.support.private_net import private_network
from tests.workers.rig import Rig, soon

MTU: Final = 1300
FLOWS: Final = 32
SUPERPACKET: Final = 49
"""Packets of a superpacket whose train is sent with one call."""

RECORDED_BYTES: Final = 32 << 20
RECORDED_MAX: Final = 100_000
WARM_S: Final = 0.3
BUFFER_BYTES: Final = 16 << 20
_SO_RCVBUFFORCE: Final = 33
_UDP_GRO: Final = 104
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_QDISC_BYPASS, _ETH_P_IP = 263, 15, 20, 0x0800
_TCP_HEADER_BYTES: Final = 52
_DONT_FRAGMENT: Final = 0x4000
SINK: Final = IPv4Address("192.0.2.2")
DEVICE, NEAR_END, FAR_END = "nmpalone0", "nmpalone1", "nmpalone2"
_NOBODY: Final = "02:00:00:00:00:01"
NEXT: Final = TunnelIndex(0x0D0D_000C)
PASSES: Final = RelayRow(
    RelayIndex(0x7B7B_0004), INDEX_NEAR, RelayKind.FORWARDING, NEXT, RelayIndex(0x7C7C_0011)
)
_IMIX: Final = (64,) * 7 + (576,) * 4 + (MTU,)


@dataclass(frozen=True, slots=True)
class Shape:
    """Packets of the inside, in the order in which they come; `joined`: as superpackets."""

    name: str
    sizes: tuple[int, ...]
    joined: bool = False

    def packets(self, *, back: bool) -> list[bytes]:
        """Give them, from us to the far host or `back`."""
        source, to = (FAR, NEAR) if back else (NEAR, FAR)
        if self.joined:
            payload = random.Random(1).randbytes(MTU - _TCP_HEADER_BYTES)
            sequences = range(1000, 1000 + SUPERPACKET * len(payload), len(payload))
            return [
                ipv4(
                    source,
                    to,
                    TCP,
                    tcp(source, to, *_ports(0, back), payload, sequence=sequence, options=TIMESTAMPS),
                    identification=number,
                    flags_and_offset=_DONT_FRAGMENT,
                )
                for number, sequence in enumerate(sequences)
            ]
        return [
            ip(source, to, UDP, udp(source, to, *_ports(number % FLOWS, back), bytes(size - 28)))
            for number, size in enumerate(self.sizes)
        ]


def _ports(flow: int, back: bool) -> tuple[int, int]:
    ports = 5000 + flow, 53
    return ports[::-1] if back else ports


def _mixed() -> tuple[int, ...]:
    sizes = list(_IMIX) * FLOWS
    random.Random(1).shuffle(sizes)
    return tuple(sizes)


SHAPES: Final = {
    shape.name: shape
    for shape in (
        *(Shape(str(size), (size,) * FLOWS) for size in (64, 512, MTU)),
        Shape("imix", _mixed()),
        Shape("tcp", (MTU,) * SUPERPACKET, joined=True),
    )
}


def outbound(shape: Shape) -> list[Message]:
    """What the local stack sends, each with its virtio header."""
    packets = shape.packets(back=False)
    if not shape.joined:
        return [Message(bytes(10) + packet, 1) for packet in packets * (1024 // len(packets) + 1)]
    payload = b"".join(packet[_TCP_HEADER_BYTES:] for packet in packets)
    whole = bytearray(packets[0][:_TCP_HEADER_BYTES] + payload)
    whole[2:4] = len(whole).to_bytes(2, "big")
    whole[10:12] = bytes(2)
    whole[10:12] = checksum(bytes(whole[:20])).to_bytes(2, "big")
    pseudo = bytes(whole[12:20]) + struct.pack("!II", TCP, len(whole) - 20)
    whole[36:38] = (checksum(pseudo) ^ 0xFFFF).to_bytes(2, "big")
    virtio = struct.pack("=BBHHHH", 1, 1, _TCP_HEADER_BYTES, MTU - _TCP_HEADER_BYTES, 20, 16)
    return [Message(virtio + bytes(whole), SUPERPACKET)] * 64


def inbound(shape: Shape, *, train: int, framed: bool) -> list[Message]:
    """What the far host sends: sealed, each under a counter of its own; `framed`: in frames for another one."""
    packets = shape.packets(back=True)
    mean = sum(map(len, packets)) / len(packets)
    count = min(RECORDED_MAX, int(RECORDED_BYTES / mean))

    def datagrams() -> Iterator[bytes]:
        for counter, packet in enumerate(itertools.islice(itertools.cycle(packets), count), 3):
            if framed:  # what is inside is nothing to the relay: any 32 bytes more will do
                yield frame(counter, packet + bytes(32), PASSES.local_index)
            else:
                yield message(counter, packet)

    most = min(train, SUPERPACKET if shape.joined else TRAIN_LENGTHS[0])
    return trains(datagrams(), most=most, limit_bytes=TRAIN_BYTES_IPV4)


class Network:
    """In the network of this thread: the device, and a wire whose far end drops everything."""

    def __init__(self, closing: ExitStack) -> None:
        self.device, refused = TunDevice.open(TunConfig(dev=DEVICE, tx_queue=1000), Offloads())
        closing.callback(self.device.close)
        if refused:
            print("refused by this kernel:", *refused, file=sys.stderr)
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for each in ("all", "default"):
            Path(f"/proc/sys/net/ipv4/conf/{each}/rp_filter").write_text("0")
        with IPRoute() as routes:
            routes.link("add", ifname=NEAR_END, kind="veth", peer=FAR_END)
            netlink.configure(DEVICE, [ip_interface("10.9.200.1/16")], MTU)
            netlink.configure(NEAR_END, [ip_interface("192.0.2.1/24")], 1500)
            netlink.configure(FAR_END, [], 1500)
            (index,) = routes.link_lookup(ifname=NEAR_END)
            # Not the far end's address: it drops what comes, as no router's would.
            routes.neigh("replace", dst=str(SINK), lladdr=_NOBODY, ifindex=index, state="permanent")
            routes.route("replace", dst=f"{NEAR}/32", gateway=str(SINK), oif=index)
        self.index = self.device.index

    @property
    def offloads(self) -> Offloads:
        """What the node is granted."""
        granted = self.device.offloads
        return Offloads(tso=granted.tso, uso=granted.uso)


class AloneRig(Rig):
    """A node of one worker on the device and on a socket as the program has them."""

    def __init__(self, network: Network, kernel: str, drain: DrainMode) -> None:
        super().__init__(drain=drain, poison=False, areas=32, kernel=kernels.get(kernel))
        self._network = network
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._closing.callback(self.socket.close)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
        self.socket.setsockopt(socket.SOL_UDP, _UDP_GRO, 1)
        self.socket.bind(("0.0.0.0", 0))
        self.udp_fds, self.tun_fds = [self.socket.fileno()], [network.device.fileno()]

    def reader_parts(self, worker: int = 0) -> ReaderParts:
        return replace(super().reader_parts(worker), offloads=self._network.offloads)

    def writer_parts(self, worker: int = 0) -> WriterParts:
        return replace(super().writer_parts(worker), offloads=self._network.offloads)

    def add_next(self) -> None:
        """Be the relay of a path from the far host to the sink."""
        site, peer = self.site, self.site.peers.add()
        assert peer is not None
        there = UdpAddr(SINK, 4242)
        site.tunnels.open(replace(site.fields, local_index=NEXT, peer=peer, underlay=there), KEY_OUT, KEY_IN)
        RelayTable(Mapping(site.tables.relays.descriptor, RELAYS, writable=True)).set(PASSES)

    def reopen(self) -> None:
        """Have the tunnel anew, with a window that has seen nothing."""
        site = self.site
        site.tunnels.close(INDEX_NEAR)
        site.generation = site.tunnels.open(site.fields, KEY_OUT, KEY_IN)


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    kernel: str
    role: str
    shape: str
    drain: DrainMode

    @property
    def processes(self) -> tuple[Role, ...]:
        """Those that work."""
        return (Role.READER, Role.WRITER) if self.drain is DrainMode.WRITER else (Role.READER,)


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one round."""

    packets_per_s: float
    cpu_us: tuple[float, ...]  # for a packet, by process
    busy: tuple[float, ...]  # share of a core, by process
    lost: int
    drops: dict[str, int]  # in all, warming up included


def measure(case: Case, network: Network, messages: list[Message], span_s: float) -> Sample:
    """Start a node, let it warm up, and look at it for so long."""
    with AloneRig(network, case.kernel, case.drain) as rig, ExitStack() as closing:
        is_tx = case.role == "tx"
        far = UdpAddr(SINK, 4242) if is_tx else address_of(rig.site.far)
        connect(rig.site, far)
        if case.role == "relay":
            rig.add_next()
        shape = SHAPES[case.shape]
        rig.site.allow(*dict.fromkeys(shape.packets(back=False)))
        rig.site.allow(*dict.fromkeys(shape.packets(back=True)), inbound=True)
        for role in case.processes:
            rig.start(role)
        assert soon(lambda: all(rig.count("mp.passes", role) for role in case.processes)), rig.log_text()
        counters = (
            ("mp.udp.tx.packets", Drop.SEAL_RING_FULL)
            if case.role != "rx"
            else ("mp.tun.tx.packets", Drop.OPEN_RING_FULL)
        )
        # A writer that gets no processor for a while leaves no room; what is dropped then is not waited for.
        arrived, gone = _counter(rig, counters[0]), _counter(rig, *counters)
        if is_tx:
            source = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            closing.callback(source.close)
            for option in (_PACKET_VNET_HDR, _PACKET_QDISC_BYPASS):
                source.setsockopt(_SOL_PACKET, option, 1)
            name = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(_ETH_P_IP), network.index, 0, 0, 0)
            recording = Recording(messages, name)
            window = 400 * messages[0].packets if not shape.joined else 32 * SUPERPACKET
            replay = Replay(recording, source.fileno(), gone, window)
        else:
            port = rig.socket.getsockname()[1]
            name = struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), b"\x7f\0\0\1")
            recording = Recording(messages, name)
            window = max(512, 12 * max(each.packets for each in messages))  # what a ring has room for
            replay = Replay(recording, rig.site.far.fileno(), gone, window, again=rig.reopen)
        replay.run(WARM_S)
        pids = [rig.child(role).pid for role in case.processes]
        packets, began, used = arrived(), time.monotonic(), [_used_ns(pid) for pid in pids]
        replay.run(span_s)
        packets = arrived() - packets
        span = time.monotonic() - began
        spent = [_used_ns(pid) - before for pid, before in zip(pids, used, strict=True)]
        replay.settle()
        rig.finish()
        stats = rig.site.stats()
        assert not stats["mp.upcalls"], "the flows are not known"
        return Sample(
            packets / span,
            tuple(each / 1000 / packets for each in spent),
            tuple(each / 1e9 / span for each in spent),
            replay.lost + sum(rig.site.drops().values()),
            rig.site.drops(),
        )


def _counter(rig: Rig, *names: str) -> Callable[[], int]:
    """The sum of these counters of both processes."""
    ats = [HEADER_BYTES + 8 * SLOTS[name] for name in names]
    pages = [page.read_only for page in rig.site.pages]

    def count() -> int:
        return sum(int.from_bytes(os.pread(page, 8, at), "little") for page in pages for at in ats)

    return count


def _used_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


@contextmanager
def _network() -> Iterator[Network]:
    with private_network(), ExitStack() as closing:
        yield Network(closing)


def summary(case: Case, samples: list[Sample]) -> dict[str, Any]:
    """Medians, and what follows from them."""
    rate = statistics.median(each.packets_per_s for each in samples)
    cpu = [statistics.median(column) for column in zip(*(each.cpu_us for each in samples), strict=True)]
    busy = [statistics.median(column) for column in zip(*(each.busy for each in samples), strict=True)]
    sizes = SHAPES[case.shape].sizes
    mean = sum(sizes) / len(sizes)
    return {
        "kernel": case.kernel,
        "role": case.role,
        "shape": case.shape,
        "drain": str(case.drain),
        "packets_per_s": rate,
        "gbit_per_s": rate * mean * 8 / 1e9,
        "cpu_us_per_packet": dict(zip(case.processes, cpu, strict=True)),
        "busy": dict(zip(case.processes, busy, strict=True)),
        # The slower of the two limits the pair, whatever else the machine had to do.
        "packets_per_s_of_a_whole_core_each": 1e6 / max(cpu),
        "lost": sum(each.lost for each in samples),
        "samples": [
            {
                "packets_per_s": each.packets_per_s,
                "cpu_us": each.cpu_us,
                "busy": each.busy,
                "drops": each.drops,
            }
            for each in samples
        ],
    }


def report(found: list[dict[str, Any]]) -> None:
    """Print a table."""
    print(
        f"{'kernel':8}{'role':6}{'shape':6}{'drain':8}{'kpps':>8}{'Gbit/s':>8}{'reader us':>10}"
        f"{'writer us':>10}{'busy':>12}{'kpps/core':>11}{'lost':>6}"
    )
    for row in found:
        cpu, busy = list(row["cpu_us_per_packet"].values()), list(row["busy"].values())
        writer = f"{cpu[1]:10.3f}" if len(cpu) > 1 else f"{'':10}"
        shares = " ".join(f"{each:.0%}" for each in busy)
        print(
            f"{row['kernel']:8}{row['role']:6}{row['shape']:6}{row['drain']:8}"
            f"{row['packets_per_s'] / 1e3:8.0f}{row['gbit_per_s']:8.2f}{cpu[0]:10.3f}{writer}{shares:>12}"
            f"{row['packets_per_s_of_a_whole_core_each'] / 1e3:11.0f}{row['lost']:6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    installed = [kernels.PYTHON, *([kernels.RUST] if kernels.is_installed() else [])]
    parser.add_argument("--kernels", nargs="+", choices=installed, default=installed)
    parser.add_argument("--roles", nargs="+", choices=("tx", "rx", "relay"), default=["tx", "rx"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--drains", nargs="+", choices=("reader", "writer"), default=["reader", "writer"])
    parser.add_argument("--train", type=int, default=TRAIN_LENGTHS[0], help="most datagrams received at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a measurement")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    chosen = parser.parse_args()
    cases = [
        Case(kernel, role, shape, DrainMode(drain))
        for role in chosen.roles
        for shape in chosen.shapes
        for drain in chosen.drains
        for kernel in chosen.kernels
    ]
    loads = {
        (role, shape): outbound(SHAPES[shape])
        if role == "tx"
        else inbound(SHAPES[shape], train=chosen.train, framed=role == "relay")
        for role in chosen.roles
        for shape in chosen.shapes
    }
    samples: dict[Case, list[Sample]] = {case: [] for case in cases}
    with _network() as network:
        for number in range(chosen.rounds):
            for case in cases:
                print(f"\r{number + 1}/{chosen.rounds} {case}\033[K", end="", file=sys.stderr, flush=True)
                messages = loads[case.role, case.shape]
                samples[case].append(measure(case, network, messages, chosen.seconds))
    print("\r\033[K", end="", file=sys.stderr)
    found = [summary(case, samples[case]) for case in cases]
    report(found)
    if chosen.json is not None:
        facts = {"machine": platform.machine(), "linux": platform.release(), "cpus": os.cpu_count()}
        facts |= {"rounds": chosen.rounds, "seconds": chosen.seconds, "train": chosen.train}
        chosen.json.write_text(json.dumps({**facts, "cases": found}, indent=1))


if __name__ == "__main__":
    main()
