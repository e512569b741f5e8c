"""Random walks of calls to a data path as a hostmap makes them, and what each must have done.

Data flow: tests -> [support.plane_walk] -> workers.tables.ShmPlane
A walk is made of its seed and of the model it starts from, so the test knows which calls a killed process
made from their number alone.
"""

import copyreg
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address
from random import Random
from typing import NamedTuple

from nebula_mp.control.plane import Saved
from nebula_mp.crypto.aead import Aead
from nebula_mp.firewall.conntrack import Direction
from nebula_mp.handshake.machine import Completed, SessionKeys
from nebula_mp.newtypes import Cipher, IPAddress, Seconds, TunnelIndex, UdpAddr
from nebula_mp.shm import Mapping
from nebula_mp.shm_flows import REFUSED, FlowView
from nebula_mp.shm_peers import PeerView
from nebula_mp.shm_table import (
    FLOWS,
    KEYS,
    PEERS,
    ROWS_AT,
    ROWS_AT_WORD,
    SEEN,
    TUNNEL_ROW,
    TUNNELS,
    PeerRef,
    Tables,
)
from nebula_mp.shm_tunnels import TunnelRow, TunnelState, TunnelView
from nebula_mp.wire.header import STAGE_2_COUNTER
from nebula_mp.wire.ip import TCP, FlowKey
from nebula_mp.workers.tables import ShmPlane
from tests.support.sessions import PKI, POOL, US, Clock, Memory, at, digest, granted, shake, tunnel_of

Keys = tuple[bytes, bytes]

# Of two of them the first address is the same: a host whose certificate was renewed with another second one.
NETWORKS = (
    ("10.42.0.2/16",),
    ("10.42.0.3/16", "fd42::3/64"),
    ("10.42.0.4/16",),
    ("10.42.0.4/16", "fd42::4/64"),
    ("10.42.0.5/16", "fd42::5/64", "fd42::6/64", "fd42::7/64"),
)
REMOTES = (
    at("192.0.2.1"),
    at("192.0.2.1", 4343),
    at("192.0.2.2"),
    at("192.0.2.3"),
    at("2001:db8::1"),
    at("fe80::1%7"),
)
PORTS = 20


@cache
def templates() -> tuple[Completed, ...]:
    """One real session with each peer."""
    sessions = []
    for number, networks in enumerate(NETWORKS):
        unsafe = ("172.16.0.0/12",) if number == 0 else ()
        peer = PKI.identity(f"peer-{number}", *networks, unsafe=unsafe)
        sessions.append(shake(peer, number + 1, we_start=number % 2 == 0)[0])
    return tuple(sessions)


def keys_of(index: int) -> Keys:
    """The two keys of whichever tunnel has this local index."""
    seed = index.to_bytes(8, "little")
    return sha256(seed + b"send").digest(), sha256(seed + b"receive").digest()


def remote_index_of(index: int) -> int:
    return index ^ 0x1234_5678


def session_of(index: int, peer: int) -> Completed:
    """Give a session of `peer` an index, keys and a stage 1 of its own."""
    cipher = Cipher.AES if index % 3 else Cipher.CHACHAPOLY
    send, receive = keys_of(index)
    return replace(
        templates()[peer],
        local_index=TunnelIndex(index),
        remote_index=TunnelIndex(remote_index_of(index)),
        peer_time_ns=index,
        send=Aead(cipher, send),
        receive=Aead(cipher, receive),
        keys=SessionKeys(bytearray(send), bytearray(receive)),
        stage1=index.to_bytes(100, "little"),
    )


def first_of(peer: int) -> IPAddress:
    return templates()[peer].peer.certificate.addresses[0]


def flow_of(peer: int, port: int) -> FlowKey:
    """Any of a few flows with a peer: whose tunnels it may use follows from its remote address."""
    remote = first_of(peer).packed
    return FlowKey(bytes([10, 42, 0, 1]), remote, 5000, port, TCP, fragment=False)


# A model is copied with its addresses: the Python of Debian 12, 3.11.2, would lose the scope of fe80::1%7.
copyreg.pickle(IPv6Address, lambda address: (IPv6Address, (str(address),)))


class Call(NamedTuple):
    """One call to the plane."""

    name: str
    local: int = 0  # the tunnel's local index
    peer: int = 0
    remote: UdpAddr = REMOTES[0]
    proven: bool = False
    number: int = 0


@dataclass
class Known:
    """What a plane must know of one tunnel."""

    peer: int
    remote: UdpAddr
    proven: bool
    order: int = -1  # in which it was proven
    counter: int = STAGE_2_COUNTER


@dataclass
class Model:
    """All that was asked of a plane so far."""

    rows: int
    workers: int
    tunnels: dict[int, Known] = field(default_factory=dict)  # by local index
    routes: dict[IPAddress, int] = field(default_factory=dict)
    owners: tuple[int, ...] = ()
    orders: int = 0
    high: int = 1  # of the next index; never used twice

    def apply(self, call: Call) -> None:
        known = self.tunnels.get(call.local)
        match call.name:
            case "opened":
                self.high = max(self.high, (call.local >> 16) + 1)
                known = self.tunnels[call.local] = Known(call.peer, call.remote, call.proven)
                self._prove(known)
            case "changed":
                assert known is not None
                known.proven, known.remote = call.proven, call.remote
                self._prove(known)
            case "closed":
                assert known is not None
                del self.tunnels[call.local]
            case "route" if call.local:
                self.routes[first_of(call.peer)] = call.local
            case "route":
                self.routes.pop(first_of(call.peer), None)
            case "reserve":
                assert known is not None
                known.counter += 1
            case "owners":
                self.owners = tuple(call.number >> each & 1 for each in range(self.workers))

    def _prove(self, known: Known) -> None:
        if known.proven and known.order < 0:
            known.order = self.orders
            self.orders += 1

    def outlives(self) -> list[int]:
        """Indexes of the tunnels that a successor must find, oldest first."""
        found = [index for index, known in self.tunnels.items() if known.proven]
        return sorted(found, key=lambda index: self.tunnels[index].order)

    def primaries(self) -> dict[IPAddress, int]:
        """What each peer must be sent through after a recovery."""
        newest = {first_of(self.tunnels[index].peer): index for index in self.outlives()}
        kept = {
            first: index
            for first, index in self.routes.items()
            if index in self.tunnels and self.tunnels[index].proven
        }
        return newest | {first: index for first, index in kept.items() if first in newest}

    def saved(self) -> dict[int, tuple[UdpAddr, bool]]:
        """What `recover` must give, in this order."""
        primaries = set(self.primaries().values())
        return {index: (self.tunnels[index].remote, index in primaries) for index in self.outlives()}

    def recovered(self) -> "Model":
        """The model of the plane that a successor has."""
        model = deepcopy(self)
        model.routes = self.primaries()
        model.tunnels = {index: model.tunnels[index] for index in self.outlives()}
        return model


class Walk:
    """Gives call after call; each is made as if the one before had been applied to the model."""

    def __init__(self, model: Model, seed: object) -> None:
        self.model = model
        self._dice = Random(str(seed))
        self._next: list[Call] = []

    def next(self) -> Call:
        while not self._next:
            self._next = self._think()
        return self._next.pop(0)

    def _think(self) -> list[Call]:
        """What a hostmap calls for one thing that happens to it."""
        model, dice = self.model, self._dice
        index = dice.choice([*model.tunnels, 0])
        known = model.tunnels.get(index)
        what = dice.choice(
            ["candidate", "open", "prove", "roam", "close", "primary", "reserve", "flow", "rare"]
        )
        match what:
            case "candidate" | "open":
                return self._open(proven=what == "open")
            case "flow":
                return self._flow()
            case "rare" if dice.random() < 0.2:
                return [Call("forget")]
            case "rare":
                return [Call("owners", number=dice.randrange(1 << model.workers))]
        if known is None:
            return []
        call = Call("", index, known.peer, known.remote, known.proven)
        match what:
            case "prove" if not known.proven:
                return [call._replace(name="changed", proven=True), call._replace(name="route")]
            case "roam":
                return [call._replace(name="changed", remote=dice.choice(REMOTES))]
            case "close" if dice.random() < 0.5 or len(model.tunnels) > model.rows // 2:
                return [*self._reroute(index, known), call._replace(name="closed")]
            case "primary" if known.proven:
                return [call._replace(name="route")]
            case "reserve":
                return [call._replace(name="reserve")] * dice.randrange(1, 4)
        return []

    def _open(self, *, proven: bool) -> list[Call]:
        model, dice = self.model, self._dice
        taken = {index & 0xFFFF for index in model.tunnels}
        free = [row for row in range(model.rows) if row not in taken]
        if not free:
            return []
        index = model.high << 16 | dice.choice(free)
        peer = dice.randrange(len(NETWORKS))
        call = Call("opened", index, peer, dice.choice(REMOTES), proven)
        return [call, call._replace(name="route")] if proven else [call]

    def _flow(self) -> list[Call]:
        model, dice = self.model, self._dice
        index = dice.choice([*model.tunnels, 0])
        peer = model.tunnels[index].peer if index else dice.randrange(len(NETWORKS))
        verdict = dice.choice(["allow", "refuse in", "refuse out"]) if index else "refuse nobody"
        return [Call(verdict, index, peer, number=dice.randrange(PORTS)), Call("settle")]

    def _reroute(self, index: int, known: Known) -> list[Call]:
        first = first_of(known.peer)
        if self.model.routes.get(first) != index:
            return []
        others = [
            (other.order, each)
            for each, other in self.model.tunnels.items()
            if each != index and other.proven and first_of(other.peer) == first
        ]
        if not others:
            return [Call("route", 0, known.peer)]
        _, successor = max(others)
        return [Call("route", successor, self.model.tunnels[successor].peer)]


class Driver:
    """Makes the calls of a walk to a real plane, as the controller and its shell would."""

    def __init__(self, plane: ShmPlane, clock: Clock, saved: list[Saved]) -> None:
        self.plane = plane
        self.clock = clock
        self.tunnels = {each.session.local_index: tunnel_of(each.session, each.remote) for each in saved}

    def make(self, call: Call) -> int | None:
        """For `reserve` gives the counter."""
        plane, index = self.plane, TunnelIndex(call.local)
        tunnel = self.tunnels.get(index)
        match call.name:
            case "opened":
                tunnel = tunnel_of(session_of(index, call.peer), call.remote, proven=call.proven)
                self.tunnels[index] = tunnel
                plane.opened(tunnel)
                assert not tunnel.session.keys.send
            case "changed":
                assert tunnel is not None
                tunnel.proven, tunnel.remote = call.proven, call.remote
                plane.changed(tunnel)
            case "closed":
                plane.closed(self.tunnels.pop(index))
            case "route":
                plane.route(first_of(call.peer), tunnel)
            case "reserve":
                assert tunnel is not None
                return plane.try_reserve(tunnel, 100)
            case "owners":
                plane.set_owners([call.number >> each & 1 for each in range(plane.workers)])
            case "forget":
                plane.forget_flows()
            case "settle":
                self.clock.now += 0.3
                plane.settle(self.clock())
            case "allow":
                assert tunnel is not None
                plane.allow(flow_of(call.peer, call.number), tunnel, granted(5), self.clock())
            case _:
                direction = Direction.INBOUND if call.name == "refuse in" else Direction.OUTBOUND
                plane.refuse(flow_of(call.peer, call.number), tunnel, direction, self.clock())
        return None


class Reader:
    """A reader's view of all tables; each look checks that what it sees belongs together."""

    def __init__(self, tables: Tables) -> None:
        self._memory = Mapping(tables.tunnels.read_only, TUNNELS, writable=False)
        keys = Mapping(tables.keys.read_only, KEYS, writable=False)
        self._key_memory = keys.data
        self._tunnels = TunnelView(self._memory, keys, _copy_keys, lambda: Seconds(time.monotonic()))
        self._peer_words = Mapping(tables.peers.read_only, PEERS, writable=False).words
        self._peers = PeerView(Mapping(tables.peers.read_only, PEERS, writable=False))
        seen = Mapping(tables.seen[-1].descriptor, SEEN, writable=True)
        self._flows = FlowView(Mapping(tables.flows[-1].read_only, FLOWS, writable=False), seen)
        self.rows = self._memory.parameters[0]

    def tunnel(self, index: int) -> TunnelRow[Keys] | None:
        """Look one up, whose parts must be those of one tunnel."""
        row = self._tunnels.get(index)
        if row is not None:
            assert row.ciphers == keys_of(index)
            assert row.remote_index == remote_index_of(index)
            assert row.local_index == index
            assert row.underlay in _UNDERLAYS
        return row

    def index_in(self, row: int) -> int:
        """What is in the row now, perhaps half written."""
        at = ROWS_AT + row * TUNNEL_ROW.size + TUNNEL_ROW.fields["local_index"].offset
        return int.from_bytes(self._memory.data[at : at + 4], "little")

    def route(self, ref: PeerRef) -> int | None:
        """Where a peer's packets go: to a tunnel of that peer, or of nobody."""
        index = self._peers.tunnel(ref)
        if index is not None:
            row = self.tunnel(index)
            assert row is None or row.peer == ref
            return None if row is None else index
        return None

    def look(self, dice: Random) -> None:
        """Look at something, while control may be writing."""
        self.tunnel(self.index_in(dice.randrange(self.rows)))
        word = self._peer_words[ROWS_AT_WORD + dice.randrange(self.rows)]
        row = self.tunnel(word & 0xFFFF_FFFF)
        if row is not None:
            self.route(row.peer)
        self.flow(dice.randrange(len(NETWORKS)), dice.randrange(PORTS))

    def flow(self, peer: int, port: int) -> int | None:
        """Look a flow up, outbound, however old it is; gives the tunnel that its packet would take."""
        ref = self._flows.outbound(flow_of(peer, port), 0)
        return None if ref is None or ref == REFUSED else self.route(ref)

    def check(self, model: Model) -> None:
        """Compare everything with the model of a plane that is between two calls."""
        refs: dict[tuple[IPAddress, ...], PeerRef] = {}
        for row in range(self.rows):
            index = self.index_in(row)
            known = model.tunnels.get(index)
            seen = self.tunnel(index)
            if known is None:
                assert seen is None
                assert index == 0
                assert self._key_memory[ROWS_AT + 64 * row : ROWS_AT + 64 * row + 64] == bytes(64)
                continue
            assert seen is not None
            certificate = templates()[known.peer].peer.certificate
            packed = frozenset(address.packed for address in certificate.addresses)
            assert seen.state is (TunnelState.PROVEN if known.proven else TunnelState.CANDIDATE)
            assert seen.owner == (model.owners or range(model.workers))[index % model.workers]
            assert seen.underlay == _unscoped(known.remote)
            assert seen.sources == (None if known.peer in (0, 4) else packed)
            assert refs.setdefault(certificate.addresses, seen.peer) == seen.peer
        assert len(set(refs.values())) == len(refs)
        routed = {self.route(ref) for ref in refs.values()} - {None}
        assert routed == set(model.routes.values())
        words = list(self._peer_words[ROWS_AT_WORD : ROWS_AT_WORD + self.rows])
        assert {word & 0xFFFF_FFFF for word in words} - {0} == routed
        assert len(model.tunnels) == sum(self.index_in(row) != 0 for row in range(self.rows))
        for peer in range(len(NETWORKS)):
            for port in range(PORTS):
                used = self.flow(peer, port)
                assert used is None or first_of(model.tunnels[used].peer) == first_of(peer)


def recovered_as(memory: Memory, clock: Clock, *models: Model) -> tuple[Driver, Model]:
    """Start a successor, which must find the tables as one of these models says; gives it, and which one."""
    owners = models[0].owners or range(models[0].workers)
    plane = memory.plane(*owners, clock=clock)
    saved = plane.recover(US, POOL)
    found = [(int(each.session.local_index), (each.remote, each.primary)) for each in saved]
    expected = [list(each.saved().items()) for each in models]
    assert found in expected
    model = models[expected.index(found)].recovered()
    for each in saved:
        index = each.session.local_index
        assert digest(each.session) == digest(session_of(index, model.tunnels[index].peer))
        assert not each.session.keys.send
        assert not each.session.keys.receive
    Reader(memory.tables).check(model)
    driver = Driver(plane, clock, saved)
    for each in saved:
        if each.primary:
            tunnel = driver.tunnels[each.session.local_index]
            plane.route(tunnel.addresses[0], tunnel)
    Reader(memory.tables).check(model)
    return driver, model


def _copy_keys(cipher: Cipher, send: memoryview, receive: memoryview) -> Keys:
    assert cipher in Cipher
    return bytes(send), bytes(receive)


def _unscoped(remote: UdpAddr) -> UdpAddr:
    """As rows have it: no scope fits into them."""
    ip = remote.ip
    return UdpAddr(IPv4Address(ip.packed) if len(ip.packed) == 4 else IPv6Address(ip.packed), remote.port)


_UNDERLAYS = frozenset(map(_unscoped, REMOTES))
