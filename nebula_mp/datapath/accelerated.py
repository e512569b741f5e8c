"""The native kernel behind the same Protocol, where it is installed.

Data flow: workers -> [NativeKernel] -> nebula_mp._accel, over the shared regions it attaches to
Knows how values are handed over; every packet is Rust's from descriptor to ring. Importing this module
raises ImportError where the accelerator is missing or belongs to another version of this program.

All processes of an instance use one kernel: it counts with atomic instructions what Python's counts under
record locks, and the two do not exclude each other.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Self

from nebula_mp import _accel
from nebula_mp.config.model import Offloads
from nebula_mp.datapath.api import SOURCES_MAX, CounterFds, Drain, ReaderMemory, RingEnd, UpcallLimits
from nebula_mp.newtypes import Buffer, Counter, IPNetwork, Seconds
from nebula_mp.shm_counters import Refusal, SendCounters
from nebula_mp.shm_ring import Bell
from nebula_mp.shm_stats import DIGEST, NAMES

ABI: Final = 6
"""What the accelerator must say of itself."""

if _accel.ABI != ABI:
    raise ImportError(f"nebula_mp._accel is version {_accel.ABI}, and {ABI} is needed: build it again")

FEATURES: Final = _accel.FEATURES
"""Which library seals, and whether this processor's AVX2 is used."""


class _Names(NamedTuple):
    names: tuple[str, ...]
    digest: int


_NAMES: Final = _Names(NAMES, DIGEST)


class NativeSealer:
    """A `datapath.api.Sealer`."""

    def __init__(self, native: _accel.Reader, clock: Callable[[], Seconds]) -> None:
        self.waiting = native.seal_waiting
        self._native = native
        self._poll = native.seal_poll
        self._clock = clock

    @property
    def is_holding(self) -> bool:
        """As `Sealer.is_holding`."""
        return self._native.seal_holding

    def poll(self, budget: int) -> int:
        """As `Sealer.poll`."""
        return self._poll(budget, int(self._clock() * 1e6))


class NativeOpener:
    """A `datapath.api.Opener`."""

    def __init__(self, native: _accel.Reader, clock: Callable[[], Seconds]) -> None:
        self.waiting = native.open_waiting
        self._poll = native.open_poll
        self._clock = clock

    def poll(self, budget: int) -> int:
        """As `Opener.poll`."""
        return self._poll(budget, int(self._clock() * 1e6))


class NativeReader:
    """A `datapath.api.Reader`."""

    def __init__(self, native: _accel.Reader, clock: Callable[[], Seconds]) -> None:
        self.sealer = NativeSealer(native, clock)
        self.opener = NativeOpener(native, clock)
        self._native = native
        self._clock = clock

    def outbound(self, drain: Drain, writer: Bell) -> _accel.Half:
        """As `Reader.outbound`."""
        assert isinstance(drain, _accel.UdpDrain)
        return self._native.outbound(drain, writer.descriptor, self._clock)

    def inbound(self, drain: Drain, writer: Bell) -> _accel.Half:
        """As `Reader.inbound`."""
        assert isinstance(drain, _accel.TunDrain)
        return self._native.inbound(drain, writer.descriptor, self._clock)

    def sweep(self) -> int:
        """As `Reader.sweep`."""
        return self._native.sweep()


class NativeSendCounters(SendCounters):
    """Control's counters, taken with the same instructions as the native readers take theirs."""

    _native: _accel.SendCounters

    @classmethod
    def attach(
        cls,
        send: int,
        spans: Sequence[int],
        seal_states: Sequence[int],
        locks: int,
        *,
        worker: int | None = None,
        published: int = 0,
    ) -> Self:
        """As `SendCounters.attach`."""
        made = super().attach(send, spans, seal_states, locks, worker=worker, published=published)
        native = _accel.SendCounters(send, tuple(spans), tuple(seal_states), worker, published)
        made._native = native  # noqa: SLF001 - a constructor
        return made

    def reserve(
        self, row: int, generation: int, count: int, area: int | None = None, *, regardless: bool = False
    ) -> Counter | Refusal:
        """As `SendCounters.reserve`, which never finds the counter busy."""
        found = self._native.reserve(row, generation, count, area, regardless=regardless)
        if isinstance(found, str):
            return Refusal(found)
        self.beyond_span = self._native.beyond_span
        return Counter(found)


class NativeKernel:
    """A `datapath.api.Kernel`."""

    name = "rust"

    def reader(
        self,
        tun_fd: int,
        udp_fd: int,
        memory: ReaderMemory,
        *,
        overlay: tuple[IPNetwork, ...],
        clock: Callable[[], Seconds],
        limits: UpcallLimits,
        offloads: Offloads,
        poison: bool = False,
    ) -> NativeReader:
        """As `Kernel.reader`."""
        native = _accel.Reader(
            tun_fd,
            udp_fd,
            memory,
            names=_NAMES,
            overlay=[(network.network_address.packed, network.prefixlen) for network in overlay],
            limits=limits,
            offloads=offloads,
            poison=poison,
        )
        return NativeReader(native, clock)

    def drain_udp(
        self, end: RingEnd, udp_fd: int, *, tunnels: int, stats: int, offloads: Offloads
    ) -> _accel.UdpDrain:
        """As `Kernel.drain_udp`."""
        return _accel.UdpDrain(end, udp_fd, tunnels=tunnels, page=stats, names=_NAMES, offloads=offloads)

    def drain_tun(self, end: RingEnd, tun_fd: int, *, stats: int, offloads: Offloads) -> _accel.TunDrain:
        """As `Kernel.drain_tun`."""
        return _accel.TunDrain(end, tun_fd, page=stats, names=_NAMES, offloads=offloads)

    def send_counters(self, memory: CounterFds) -> NativeSendCounters:
        """As `Kernel.send_counters`."""
        return NativeSendCounters.attach(*memory)

    def sources(self, descriptors: Sequence[int]) -> _accel.Sources:
        """As `Kernel.sources`."""
        assert len(set(descriptors)) == len(descriptors) <= SOURCES_MAX
        return _accel.Sources(descriptors)

    def checksum(self, data: Buffer) -> int:
        """As `Kernel.checksum`."""
        return _accel.checksum(data)
