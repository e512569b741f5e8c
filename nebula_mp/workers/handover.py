"""Control's way to the readers: datagrams that came before their tunnel was known go to the one that owns it.

Data flow: workers.control -> [workers.handover] -> stranger ring -> datapath.opening, as any other
Control is one more of those that fill stranger rings, beside the other readers. Knows rings and bells; knows
nothing of tunnels. A tunnel is published before anything of it is pushed here.
Source: docs/architecture.md, "What comes before its tunnel".
"""

from collections.abc import Sequence

from nebula_mp.datapath.api import Arrival, Drop, RingFds
from nebula_mp.datapath.filling import Drops, Strangers
from nebula_mp.errors import RingError
from nebula_mp.newtypes import Buffer, Seconds, UdpAddr
from nebula_mp.shm import Mapping
from nebula_mp.shm_ring import DATA, STATE, Bell, Producer
from nebula_mp.shm_stats import StatsPage


class Handover:
    """`attach` to each reader, `push` while working, `flush` at the end of a turn."""

    def __init__(self, rings: Sequence[RingFds], bells: Sequence[int], page: StatsPage) -> None:
        """`rings` and `bells` by reader; the descriptors are borrowed."""
        self._rings = rings
        self._bells = [Bell(bell) for bell in bells]
        self._page = page
        self._drops = Drops(page)
        self._owners: dict[int, Strangers] = {}

    def attach(self, owner: int) -> None:
        """Fill the ring of a reader from here on, behind what is in it. Raises RingError."""
        self.detach(owner)
        ring, name = self._rings[owner], f"to {owner}"
        data = Mapping(ring.data, DATA, writable=True, name=name)
        producer = Producer(data, Mapping(ring.state, STATE, writable=False, name=name))
        self._owners[owner] = Strangers(
            {owner: producer}, {owner: self._bells[owner]}, self._page, self._drops
        )

    def detach(self, owner: int) -> None:
        """Leave a ring alone until `attach`: the supervisor empties it, with what was not flushed."""
        self._owners.pop(owner, None)

    def push(self, owner: int, datagram: Buffer, source: UdpAddr, now: Seconds) -> None:
        """Hand a datagram to a reader, or count why not. Raises RingError, and is detached from it then."""
        strangers = self._owners.get(owner)
        if strangers is None:
            self._drops.count(Drop.STRANGER_RING_FULL)
            return
        try:
            strangers.push(owner, Arrival(source, 0, 0, int(now * 1000)), datagram)
        except RingError:
            self.detach(owner)
            self._drops.count(Drop.STRANGER_RING_FULL)
            raise

    def flush(self) -> None:
        """Publish, and wake the readers."""
        for strangers in self._owners.values():
            strangers.flush()
