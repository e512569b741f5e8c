"""What a host may meet, as a script that any kernel can be led through, and all that it leaves behind.

Data flow: a seed | hypothesis -> [scripts] -> datapath.sites with one kernel or the other -> `Outcome`
Every step is said in bytes and numbers, so that each kernel is given the same; what is published is cut back
into single packets, since how packets are grouped is a kernel's own affair.
"""

import random
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final, NamedTuple

from nebula_mp.config.model import NO_OFFLOADS, Offloads
from nebula_mp.crypto.replay import WIDTH
from nebula_mp.datapath.api import Kernel, UpcallLimits, UpcallReason
from nebula_mp.newtypes import Cipher, RelayIndex, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import PAGE_BYTES
from nebula_mp.shm_flows import Pair
from nebula_mp.shm_relays import RelayKind, RelayRow, RelayTable
from nebula_mp.shm_table import RELAYS, PeerRef
from nebula_mp.shm_tunnels import TunnelState
from nebula_mp.wire.header import COUNTER_LIMIT, SUBTYPES, MessageType
from nebula_mp.wire.ip import parse_flow
from tests.datapath.batches import ALL, SOURCE, Batch, feed, take
from tests.datapath.sites import (
    INDEX_NEAR,
    KEY_IN,
    KEY_OUT,
    UNLIMITED,
    Site,
    connect,
    frame,
    message,
    store_counter,
)
from tests.datapath.superpackets import A4, A6, B4, B6, TIMESTAMPS, Plan
from tests.support.packets import ACK, CWR, ECE, FIN, PSH, TCP, UDP, checksum, raw_packets
from tests.support.tables import writable

INDEX_OTHER: Final = TunnelIndex(0x0D06_0009)  # of another peer, reached by IPv6
INDEX_NEW: Final = TunnelIndex(0x5EED_000B)  # a candidate, of no peer's choice
INDEX_WRONG: Final = TunnelIndex(0x1111_0003)  # the row is ours, the tunnel is not
INDEX_NOWHERE: Final = TunnelIndex(0x1111_FFFF)
INDEX_BEHIND: Final = TunnelIndex(0x0B0B_000D)  # of a peer behind the relay that the first tunnel leads to
KEYS_BEHIND: Final = (KEY_OUT[1:] + b"\x77", KEY_IN[1:] + b"\x77")
PATH_ENDS: Final = RelayIndex(0x7A7A_0003)  # through the first tunnel
PATH_PASSES: Final = RelayIndex(0x7B7B_0004)  # from the first tunnel to the other peer's
PATH_BACK: Final = RelayIndex(0x7C7C_0005)  # and from there
PATH_NOWHERE: Final = RelayIndex(0x7D7D_0006)  # to the candidate
PATHS: Final = (
    RelayRow(PATH_ENDS, INDEX_NEAR, RelayKind.TERMINAL, None, RelayIndex(0x1111_2222)),
    RelayRow(PATH_PASSES, INDEX_NEAR, RelayKind.FORWARDING, INDEX_OTHER, RelayIndex(0x1111_3333)),
    RelayRow(PATH_BACK, INDEX_OTHER, RelayKind.FORWARDING, INDEX_NEAR, RelayIndex(0x1111_4444)),
    RelayRow(PATH_NOWHERE, INDEX_NEAR, RelayKind.FORWARDING, INDEX_NEW, RelayIndex(0x1111_5555)),
)
FRAMED: Final = (
    [PATH_ENDS] * 6 + [PATH_PASSES] * 3 + [PATH_BACK, PATH_NOWHERE, RelayIndex(PATH_ENDS ^ 0x10000)]
)
INDEXES: Final = [INDEX_NEAR] * 12 + [INDEX_OTHER, INDEX_OTHER, INDEX_NEW, INDEX_WRONG, INDEX_NOWHERE]
SOURCES: Final = [SOURCE] * 6 + [("10.77.0.9", 4243), ("10.78.0.1", 4242), ("10.9.0.9", 4242)]
OFFLOADS: Final = [
    ALL,
    ALL,
    replace(ALL, uso=False),
    replace(ALL, tso=False),
    replace(ALL, udp_gro=False),
    replace(ALL, tso=False, uso=False),
    NO_OFFLOADS,
]
MOVES: Final = replace(UNLIMITED, moved=(10**6, 10**6))
LIMITED: Final = UpcallLimits(
    per_tunnel=(1000, 20),
    plain=(1000, 10),
    datagrams=(500, 5),
    unknown=(250, 7),
    relayed=(200, 9),
    moved=(10**6, 10**6),
)

# Where flows of these ports end: with a peer, with none of this gateway's, refused, or with control.
NEAR_PORTS, OTHER_PORTS, LONE_PORTS, REFUSED_PORTS, UNKNOWN_PORTS, BEHIND_PORTS = (
    (40000 + each, 50000) for each in range(6)
)
PORTS: Final = [NEAR_PORTS] * 8 + [OTHER_PORTS, BEHIND_PORTS] * 2 + [LONE_PORTS, REFUSED_PORTS, UNKNOWN_PORTS]

BASES: Final = (
    Plan(4, TCP, b"", 1, options=TIMESTAMPS),
    Plan(4, TCP, b"", 1),
    Plan(6, TCP, b"", 1, options=TIMESTAMPS),
    Plan(6, TCP, b"", 1),
    Plan(4, UDP, b"", 1),
    Plan(6, UDP, b"", 1),
)
_GIVEN_MAX: Final = 10  # packets that a socket pair holds
_GIVEN_BYTES_MAX: Final = 120_000


@dataclass(frozen=True, slots=True)
class Given:
    """The local stack sends these, each with its header if the device has one; reader 0 polls."""

    frames: tuple[bytes, ...]
    budget: int = 1000


@dataclass(frozen=True, slots=True)
class Came:
    """These come to a reader's socket, which polls; then the other one looks at its strangers."""

    batches: tuple[Batch, ...]
    worker: int = 0
    budget: int = 100_000


@dataclass(frozen=True, slots=True)
class Done:
    """Time passes, or control, or the supervisor, does something."""

    what: Callable[["Host"], object]
    name: str


Step = Given | Came | Done


@dataclass(frozen=True, slots=True)
class Script:
    """A host and what happens to it."""

    steps: tuple[Step, ...]
    offloads: Offloads = ALL
    cipher: Cipher = Cipher.AES
    limits: UpcallLimits = MOVES
    areas: int = 64
    area_bytes: int = 72 * 1024
    entries_max: int = 128

    @property
    def datagrams(self) -> int:
        """How many come from either side, a superpacket as one."""
        given = sum(len(step.frames) for step in self.steps if isinstance(step, Given))
        came = [step for step in self.steps if isinstance(step, Came)]
        return given + sum(len(batch.datagrams) for step in came for batch in step.batches)


class Outcome(NamedTuple):
    """Everything that a kernel leaves behind: what a later process, or the far end, could see of it."""

    polls: list[int]
    sealed: list[tuple[int, bytes]]  # row and datagram, in order
    opened: list[tuple[int, int, bytes]]  # worker, row and packet, in order
    upcalls: list[Any]  # of each worker, in order, but for notices of moves
    moves: set[Any]
    stats: dict[str, int]
    windows: bytes
    traffic: bytes
    send: bytes
    seen: bytes
    flows: bytes


class Host:
    """A site in the middle of a script."""

    def __init__(self, script: Script, kernel: Kernel) -> None:
        self.script = script
        self.site = Site(
            workers=2,
            areas=script.areas,
            area_bytes=script.area_bytes,
            entries_max=script.entries_max,
            limits=script.limits,
            offloads=script.offloads,
            upcall_areas=128,
            kernel=kernel,
        )
        self.rules = 1
        self.far = UdpAddr(IPv4Address(SOURCE[0]), SOURCE[1])
        connect(self.site, self.far, cipher=script.cipher)
        self.site.update(sources=frozenset({A4.packed, A6.packed, B4.packed, B6.packed}))
        self.other = self._open(INDEX_OTHER, TunnelState.PROVEN, IPv6Address("2001:db8::7"))
        self._open(INDEX_NEW, TunnelState.CANDIDATE, IPv4Address("192.0.2.9"))
        self.behind = self._open(INDEX_BEHIND, TunnelState.PROVEN, None, keys=KEYS_BEHIND, relay=PATH_ENDS)
        self.paths = RelayTable(writable(self.site.tables.relays, RELAYS))
        for path in PATHS:
            self.paths.set(path)
        lone = self.site.peers.add()
        assert lone is not None
        self.lone = lone
        self.admit()
        self.readers = [self.site.reader(worker) for worker in range(2)]

    def _open(
        self,
        index: TunnelIndex,
        state: TunnelState,
        ip: IPv4Address | IPv6Address | None,
        *,
        keys: tuple[bytes, bytes] = (KEY_OUT[::-1], KEY_IN[::-1]),
        relay: RelayIndex | None = None,
    ) -> PeerRef:
        peer = self.site.peers.add()
        assert peer is not None
        fields = replace(
            self.site.fields,
            local_index=index,
            state=state,
            peer=peer,
            owner=int(index == INDEX_OTHER),
            underlay=None if ip is None else UdpAddr(ip, 4242),
            sources=None,
            relay=relay,
        )
        self.site.tunnels.open(fields, *keys)
        if state is TunnelState.PROVEN:
            self.site.peers.set(peer, index)
        return peer

    @property
    def now_ms(self) -> int:
        return int(self.site.now * 1000)

    def admit(self) -> None:
        """Let control decide on the flows that it knows."""
        site = self.site
        for base in BASES:
            for ports, peer in (
                (NEAR_PORTS, site.peer),
                (OTHER_PORTS, self.other),
                (BEHIND_PORTS, self.behind),
                (LONE_PORTS, self.lone),
                (REFUSED_PORTS, site.peer),
            ):
                packet = replace(base, payload=b"xx", ports=ports).one(0)
                for inbound in (False, True):
                    flow = parse_flow(packet, inbound=inbound)
                    if ports == REFUSED_PORTS:
                        site.flows.refuse(flow, peer, self.now_ms, inbound=inbound)
                    else:
                        site.flows.allow(flow, peer, 60_000, self.now_ms)

    def tell_of_pairs(self, number: int, directions: int, life_ms: int) -> None:
        """Let readers admit what begins in these directions (bits) between all addresses, with one of the peers."""
        peer = (self.site.peer, self.other, self.lone)[number]
        self.site.flows.set_timeouts(60_000, 7000, 1000)
        pair = Pair(peer, bool(directions & 1), bool(directions & 2), self.rules)
        for one, two in ((A4, B4), (B4, A4), (A6, B6), (B6, A6)):
            self.site.flows.allow_pair(one.packed, two.packed, pair, life_ms, self.now_ms)

    def perform(self, step: "Step") -> list[int]:
        """Do one step; gives what the polls gave."""
        match step:
            case Given(frames, budget):
                sealer = self.readers[0].sealer
                polls = []
                for frame in frames:
                    while not self._try_give(frame):  # since small budgets have left too much there
                        polls.append(sealer.poll(1))
                return [*polls, sealer.poll(budget)]
            case Came(batches, worker, budget):
                taken = feed(self.readers[worker], *batches, budget=budget)
                # What was handed over, and what was in a frame that was and is handed back.
                return [taken, feed(self.readers[1 - worker]), feed(self.readers[worker])]
            case Done(what, _):
                what(self)
                return []

    def _try_give(self, frame: bytes) -> bool:
        try:
            self.site.inside.send(frame)
        except BlockingIOError:
            return False
        return True

    def attach(self, worker: int) -> None:
        """Let a successor take a reader's place."""
        self.readers[worker] = self.site.reader(worker)

    def change_path(self, path: RelayRow, *, is_there: bool) -> None:
        """Let control give a path, or take it back."""
        if is_there:
            self.paths.set(path)
        else:
            self.paths.clear(path.local_index)

    def own_behind(self, owner: int) -> None:
        """Let this reader have the tunnel of the peer behind the relay."""
        fields = self.site.tunnels.fields(INDEX_BEHIND)
        assert fields is not None
        self.site.tunnels.update(replace(fields, owner=owner))

    def replace_tunnel(self) -> None:
        """Let the tunnel end, and another one begin in its row."""
        site = self.site
        site.tunnels.close(site.fields.local_index)
        site.generation = site.tunnels.open(site.fields, KEY_OUT, KEY_IN)

    def new_rules(self) -> None:
        """Let all verdicts end, and those that are known be given anew."""
        self.rules += 1
        self.site.flows.set_rules_generation(self.rules)
        self.admit()


def play(script: Script, kernel: Kernel) -> Outcome:
    """Lead a kernel through a script; the rings are emptied after each step."""
    host = Host(script, kernel)
    site = host.site
    with closing(site):
        found = Outcome([], [], [], [], set(), {}, b"", b"", b"", b"", b"")
        for step in script.steps:
            found.polls.extend(host.perform(step))
            _collect(site, found)
        # What a small budget left in the queue of the device.
        while taken := host.readers[0].sealer.poll(1000):
            found.polls.append(taken)
            _collect(site, found)
        memory = site.tables
        return found._replace(
            stats=dict(site.stats()),
            windows=_rows(memory.windows.read_only),
            traffic=b"".join(_rows(each.read_only) for each in memory.traffic),
            send=_rows(memory.send.read_only),
            seen=b"".join(_rows(each.read_only) for each in memory.seen),
            flows=b"".join(_rows(each.read_only) for each in memory.flows),
        )


def _collect(site: Site, found: Outcome) -> None:
    for worker in range(2):
        found.sealed.extend((entry.row, each) for entry, cut in site.sealed(worker) for each in cut)
        found.opened.extend(
            (worker, each.row, without_meaningless_ids(packet))
            for each in take(site, site.offloads, worker)
            for packet in each.packets
        )
        for upcall in site.upcalls(worker):
            if upcall.reason is UpcallReason.MOVED:
                found.moves.add((worker, upcall))
            else:
                found.upcalls.append((worker, upcall))


def _rows(descriptor: int) -> bytes:
    with open(f"/proc/self/fd/{descriptor}", "rb") as memory:  # noqa: PTH123 - a descriptor
        return memory.read()[PAGE_BYTES:]


def without_meaningless_ids(packet: bytes) -> bytes:
    """Ids of packets that may not be fragmented are not kept by a superpacket."""
    if len(packet) < 20 or packet[0] >> 4 != 4 or not packet[6] & 0x40:
        return packet
    plain = bytearray(packet)
    plain[4:6] = plain[10:12] = bytes(2)
    # Whether the checksum was right is kept.
    return bytes(plain) + checksum(packet[: 4 * (packet[0] & 15)]).to_bytes(2, "big")


class Dice:
    """Makes scripts; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._noise = self._dice.randbytes(70_000)
        self._counters: Tally[TunnelIndex] = Tally(dict.fromkeys({*INDEXES, INDEX_BEHIND}, 3))
        self._sent: list[bytes] = []
        # Of all protocols, most of which control alone knows.
        self._odd = [
            *raw_packets(A4, B4, seed, 40),
            *raw_packets(A6, B6, seed, 40, unclassified=True),
        ]

    def script(self, datagrams: int, **how: Any) -> Script:
        """About so many datagrams."""
        dice = self._dice
        script = Script(
            (),
            offloads=dice.choice(OFFLOADS),
            cipher=dice.choice(list(Cipher)),
            limits=dice.choice([MOVES, MOVES, LIMITED]),
            **how,
        )
        steps: list[Step] = []
        count = 0
        while count < datagrams:
            made = self._step(script)
            steps.append(made)
            count += replace(script, steps=(made,)).datagrams
        return replace(script, steps=tuple(steps))

    def _step(self, script: Script) -> Step:
        dice = self._dice
        kind = dice.random()
        if kind < 0.4:
            frames = list(self._frames(script.offloads.tun_header))
            return Given(tuple(frames), dice.choice([1, 3, 1000, 1000, 1000]))
        if kind < 0.8:
            batches = [self._batch(script.cipher) for _ in range(dice.randint(1, 4))]
            return Came(tuple(batches), dice.choice([0, 0, 0, 0, 1]))
        return self._done()

    def _payload(self, size: int) -> bytes:
        at = self._dice.randrange(4096)
        return bytes(size) if self._dice.random() < 0.1 else self._noise[at : at + size]

    def _plan(self, size: int, count: int) -> Plan:
        dice = self._dice
        last = dice.choice([size, size, dice.randint(1, size)])
        return replace(
            dice.choice(BASES),
            size=size,
            payload=self._payload(size * (count - 1) + last),
            ports=dice.choice([*PORTS, (dice.randrange(1, 40_000), 50_000), (dice.randrange(1, 200), 7)]),
            flags=dice.choice([ACK, ACK, ACK | PSH, ACK | ECE, ACK | FIN, ACK | CWR | ECE]),
            flags_and_offset=dice.choice([0, 0x4000]),
            sequence=dice.choice([1000, 2**32 - 100, dice.randrange(2**32)]),
            identification=dice.choice([7, 2**16 - 3, dice.randrange(2**16)]),
            service=dice.choice([0, 0, 3, 0xB8]),
            ttl=dice.choice([64, 1, 255]),
        )

    # From the local stack.

    def _frames(self, has_header: bool) -> Iterator[bytes]:
        room = _GIVEN_BYTES_MAX
        for _ in range(self._dice.randint(1, _GIVEN_MAX)):
            frame = self._frame(has_header)
            if len(frame) > room:
                return
            room -= len(frame)
            yield frame

    def _frame(self, has_header: bool) -> bytes:
        dice = self._dice
        kind = dice.random()
        if kind < 0.1:
            header, packet = bytes(10), dice.choice(self._odd)
        elif kind < 0.5 and has_header:
            size = dice.choice([36, 88, 536, 1248, 1248, 1248, dice.randint(1, 1400)])
            plan = self._plan(size, dice.randint(1, min(50, 60_000 // size)))
            header, packet = plan.virtio(), plan.packet()
        else:
            plan = self._plan(dice.choice([1, 100, 1248, 1400]), 1)
            header, packet = bytes(10), plan.one(0)
            if dice.random() < 0.3 and has_header:  # its checksum is to be completed
                header = b"\x01" + bytes(5) + plan.virtio()[6:]
                packet = plan.packet()
        if dice.random() < 0.06:
            header = self._damage(header).ljust(10, b"\0")
        if dice.random() < 0.06:
            packet = self._damage(packet)
        return header + packet if has_header else packet

    def _damage(self, data: bytes) -> bytes:
        dice = self._dice
        if dice.random() < 0.3:
            return data[: dice.randrange(1, len(data) + 1)]
        made = bytearray(data)
        for _ in range(dice.randint(1, 2)):
            at = dice.choice([dice.randrange(len(made)), dice.randrange(min(60, len(made)))])
            made[at] ^= dice.choice([1 << dice.randrange(8), dice.randint(1, 255)])
        return bytes(made)

    # From the network.

    def _batch(self, cipher: Cipher) -> Batch:
        dice = self._dice
        if dice.random() < 0.1:
            return Batch([self._odd_datagram(cipher)], dice.choice(SOURCES))
        if dice.random() < 0.2:
            return Batch(self._frames_of_a_relay(cipher), dice.choice(SOURCES))
        index = dice.choice(INDEXES)
        key = KEY_IN if index == INDEX_NEAR else KEY_IN[::-1]
        packets = self._packets()
        counter = self._counters[index] + dice.choice(
            [0] * 8 + [1, -1, -len(packets), 70, WIDTH - 3, 3 * WIDTH, -WIDTH - 5]
        )
        counter = max(3, counter)
        numbers = list(range(counter, counter + len(packets)))
        self._counters[index] = numbers[-1] + 1
        if dice.random() < 0.2:
            one, two = dice.randrange(len(numbers)), dice.randrange(len(numbers))
            numbers[one], numbers[two] = numbers[two], numbers[dice.choice([one, two])]
        datagrams = [
            message(number, packet, index=index, cipher=cipher, key=key)
            for number, packet in zip(numbers, packets, strict=True)
        ]
        if dice.random() < 0.15:
            at = dice.randrange(len(datagrams))
            forged = bytearray(datagrams[at])
            forged[dice.choice([0, 1, 5, 15, 16, len(forged) - 1, dice.randrange(len(forged))])] ^= 4
            datagrams[at] = bytes(forged)
        if dice.random() < 0.1:
            last = datagrams[-1]
            datagrams[-1] = last[: dice.choice([15, 16, 31, 32, dice.randint(2, len(last))])]
        self._sent = (self._sent + datagrams)[-200:]
        return Batch(datagrams, dice.choice(SOURCES), cut=dice.random() < 0.01)

    def _frames_of_a_relay(self, cipher: Cipher) -> list[bytes]:
        """Datagrams in frames, of one path."""
        dice = self._dice
        path = dice.choice(FRAMED)
        index, key = (INDEX_OTHER, KEY_IN[::-1]) if path == PATH_BACK else (INDEX_NEAR, KEY_IN)
        found = []
        for packet in self._packets(BEHIND_PORTS if dice.random() < 0.7 else None):
            self._counters[INDEX_BEHIND] += dice.choice([1] * 20 + [0, -3, 70])
            number = max(3, self._counters[INDEX_BEHIND])
            inside = dice.choice([INDEX_BEHIND] * 10 + [INDEX_NOWHERE])
            content = message(number, packet, index=inside, cipher=cipher, key=KEYS_BEHIND[1])
            if dice.random() < 0.1:
                content = self._odd_datagram(cipher)[:8900]
            self._counters[index] += dice.choice([1] * 20 + [0, -3])
            made = frame(max(3, self._counters[index]), content, path, key, cipher)
            found.append(self._damage(made) if dice.random() < 0.03 else made)
        size = len(found[0])
        whole = next((at for at, each in enumerate(found) if len(each) != size), len(found))
        if whole < len(found) and len(found[whole]) < size:
            whole += 1
        self._sent = (self._sent + found)[-200:]
        return found[:whole]

    def _packets(self, ports: tuple[int, int] | None = None) -> list[bytes]:
        """Of one size, of a few flows, or of that with these ports, the last perhaps shorter."""
        dice = self._dice
        total = dice.choice([73, 90, 91, 576, 1300, 1300, 1300])
        found: list[bytes] = []
        for _ in range(dice.randint(1, 3)):
            plan = self._plan(1, 1)
            if ports is not None:
                plan = replace(plan, ports=ports)
            size = total - plan.header_bytes
            plan = replace(plan, size=size, payload=self._payload(size * dice.randint(1, 16)))
            found += plan.packets()
        if dice.random() < 0.4:
            plan = replace(plan, payload=plan.payload[: dice.randint(0, size)])
            found.append(plan.one(plan.count - 1))
        if dice.random() < 0.2:
            at = dice.randrange(len(found))
            damaged = bytearray(found[at])
            near = dice.randrange(min(60, len(damaged)))
            damaged[dice.choice([near, dice.randrange(len(damaged))])] ^= dice.randint(1, 255)
            found[at] = bytes(damaged)
        return found

    def _odd_datagram(self, cipher: Cipher) -> bytes:
        dice = self._dice
        index = dice.choice(INDEXES)
        key = KEY_IN if index == INDEX_NEAR else KEY_IN[::-1]
        kind = dice.choice(list(MessageType))
        match dice.randrange(6):
            case 0:
                return dice.randbytes(dice.choice([0, 1, 2, 15, 16, 31, 100, 9001, 9002]))
            case 1:
                return bytes((dice.choice([0x10 | kind, 0x20, 0x1F]), dice.randrange(3))) + dice.randbytes(60)
            case 2 if self._sent:
                return dice.choice(self._sent)
            case 3:
                content = dice.choice(self._odd)
            case _:
                content = dice.randbytes(dice.choice([0, 1, 40, 8960]))
        self._counters[index] += 1
        return message(
            self._counters[index],
            content,
            kind=dice.choice([MessageType.MESSAGE, kind]),
            subtype=dice.choice(list(SUBTYPES[kind]) or [0]),
            index=index,
            cipher=cipher,
            key=key,
        )

    # From control, the supervisor and the clock.

    def _done(self) -> Done:
        dice = self._dice
        ms = dice.choice([1, 1, 5, 100, 999, 1000, 7000, 61_000])
        worker = dice.randrange(2)
        moved = dice.choice(SOURCES)
        counter = dice.choice([2**32, COUNTER_LIMIT - dice.randint(1, 60)])
        state = dice.choice([TunnelState.PROVEN] * 3 + [TunnelState.CANDIDATE])
        listed = dice.choice([None, frozenset(), frozenset({A4.packed}), frozenset({A4.packed, A6.packed})])
        owner = dice.randrange(2)
        underlay = dice.choice([UdpAddr(IPv4Address(moved[0]), moved[1])] * 3 + [None])
        peer, directions = dice.choice([0, 0, 0, 1, 2]), dice.randrange(4)
        life_ms = dice.choice([1, 1000, 30_000])
        path, is_there = dice.choice(PATHS), dice.random() < 0.85
        told = f"flows with peer {peer} may begin: {directions:02b}, for {life_ms} ms"
        choices: list[tuple[int, Done]] = [
            (6, Done(lambda host: host.tell_of_pairs(peer, directions, life_ms), told)),
            (8, Done(lambda host: _pass(host, ms), f"{ms} ms pass")),
            (3, Done(lambda host: host.attach(worker), f"reader {worker} is replaced")),
            (2, Done(lambda host: [each.sweep() for each in host.readers], "keys are swept")),
            (3, Done(lambda host: host.site.update(underlay=underlay), f"the peer is at {underlay}")),
            (2, Done(lambda host: host.site.update(owner=owner), f"reader {owner} owns the tunnel")),
            (1, Done(lambda host: host.site.update(state=state), f"the tunnel is {state.name}")),
            (2, Done(lambda host: host.site.update(sources=listed), f"the peer may send from {listed}")),
            (2, Done(lambda host: host.new_rules(), "the rules are new")),
            (1, Done(lambda host: host.admit(), "control knows its flows")),
            (2, Done(lambda host: host.replace_tunnel(), "the tunnel is a new one")),
            (2, Done(lambda host: host.change_path(path, is_there=is_there), f"{path}: {is_there}")),
            (2, Done(lambda host: host.own_behind(owner), f"reader {owner} owns what is behind the relay")),
            (
                3,
                Done(
                    lambda host: store_counter(host.site, INDEX_NEAR & 0xFFFF, counter),
                    f"the last counter was {counter}",
                ),
            ),
        ]
        found: Sequence[Done] = dice.choices([each for _, each in choices], [weight for weight, _ in choices])
        return found[0]


def _pass(host: Host, ms: int) -> None:
    # In steps that milliseconds and microseconds both say exactly.
    host.site.now = Seconds(host.site.now + ms * 1024 // 1000 / 1024)
