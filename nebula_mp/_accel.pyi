"""The native kernel as `rust/accel` builds it; `datapath.accelerated` is its face, and nobody else uses it.

Every object belongs to the thread that made it. Descriptors are borrowed: those of memory for the call,
sockets, queues and bells for as long as the object lives. What is not spelled out here is as in
`datapath.api`. All of them raise RingError, SystemCallError or OSError as the Python kernel does.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict, final

from nebula_mp.config.model import Offloads
from nebula_mp.datapath.api import ReaderMemory, RingEnd, UpcallLimits
from nebula_mp.newtypes import Buffer

ABI: int
"""Changes with every name, argument or meaning of this module."""

class _Features(TypedDict):
    aead: str  # name of the library
    avx2: bool  # this processor has it, and it is used

FEATURES: _Features

class _Names(Protocol):
    """The counters' names in their order, and what a page says it was made for."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def digest(self) -> int: ...

@final
class Reader:
    def __new__(
        cls,
        tun_fd: int,
        udp_fd: int,
        memory: ReaderMemory,
        *,
        names: _Names,
        overlay: list[tuple[bytes, int]],
        limits: UpcallLimits,
        offloads: Offloads,
        poison: bool,
    ) -> Reader:
        """`overlay`: packed address and bits of each network."""

    def seal_poll(self, budget: int, now_us: int) -> int: ...
    @property
    def seal_holding(self) -> bool: ...
    def seal_waiting(self) -> int: ...
    def open_poll(self, budget: int, now_us: int) -> int: ...
    def open_waiting(self) -> int: ...
    def outbound(self, drain: UdpDrain, bell: int, clock: Callable[[], float]) -> Half:
        """`bell` is the writer's."""

    def inbound(self, drain: TunDrain, bell: int, clock: Callable[[], float]) -> Half: ...
    def sweep(self) -> int: ...

@final
class Half:
    def work(self, budget: int, drains: bool) -> int: ...

@final
class Sources:
    def __new__(cls, descriptors: Sequence[int]) -> Sources: ...
    def wait(self, limit_ms: int, heeded: int) -> int: ...

class _Drain:
    def try_take(self) -> bool: ...
    def pending(self) -> int: ...
    def drop(self) -> bool: ...
    @property
    def areas(self) -> int: ...
    @property
    def given_up(self) -> str | None: ...
    def drain(self, budget: int) -> int: ...

@final
class UdpDrain(_Drain):
    def __new__(
        cls, end: RingEnd, udp_fd: int, *, tunnels: int, page: int, names: _Names, offloads: Offloads
    ) -> UdpDrain:
        """`tunnels` and `page` are descriptors."""

@final
class TunDrain(_Drain):
    def __new__(cls, end: RingEnd, tun_fd: int, *, page: int, names: _Names, offloads: Offloads) -> TunDrain:
        """`page` is a descriptor."""

@final
class SendCounters:
    def __new__(
        cls,
        send: int,
        spans: tuple[int, ...],
        seal_states: tuple[int, ...],
        worker: int | None = None,
        published: int = 0,
    ) -> SendCounters: ...
    def reserve(
        self, row: int, generation: int, count: int, area: int | None = None, *, regardless: bool = False
    ) -> int | str:
        """The first of `count` counters, or the value of a `shm_counters.Refusal`."""

    @property
    def beyond_span(self) -> int: ...

def checksum(data: Buffer) -> int:
    """As `wire.ip.internet_checksum`."""

def segment(vnet: bytes, packet: bytes) -> list[bytes] | None:
    """The packets of a superpacket, or the one with its checksum; None if its header contradicts it."""

def coalesce(packets: list[bytes], tso: bool, uso: bool) -> list[tuple[bytes, int]]:
    """What the device gets for these packets: each with its header, and how many packets it stands for."""

def parse_flow(packet: bytes, inbound: bool) -> bytes | None:
    """As `shm_flows.pack_key` of `wire.ip.parse_flow`; None where that raises."""

def flow_hash(seeds: tuple[int, ...], key: bytes) -> int:
    """As `shm_flows.flow_hash`."""

def seal(cipher: int, key: bytes, counter: int, header: bytes, plaintext: bytes) -> bytes:
    """Ciphertext and tag. `cipher` is the tunnel table's code."""

def open(cipher: int, key: bytes, counter: int, header: bytes, sealed: bytes) -> tuple[bool, bytes]:  # noqa: A001
    """Whether it is authentic, and what lies in the caller's memory then."""

def layouts() -> list[tuple[str, bytes, int]]:
    """Name, magic and version of each kind of region, as in `shm.Layout`."""

def layout_offsets() -> list[tuple[str, int, int]]:
    """Name, offset and size of everything in shared memory, as in `("TUNNEL_ROW.peer", 24, 8)`."""
