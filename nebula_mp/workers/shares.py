"""Into which share of the local indexes the next tunnel falls, and so to which reader.

Data flow: workers.tables -> [workers.shares] -> workers.tables
Knows underlay IPs and counts; knows nothing of readers or indexes. All tunnels of one IP fall into one share
if possible: the kernel joins datagrams of one address before it steers them, so a batch then has one owner.
Source: docs/architecture.md, "Processes".
"""

import collections
from collections.abc import Collection
from typing import Final

from nebula_mp.newtypes import IPAddress

_RECENT_MAX: Final = 1024


class Shares:
    """How many tunnels there are of each IP and in each share."""

    def __init__(self, count: int) -> None:
        self._tunnels = [0] * count
        self._at: dict[IPAddress, collections.Counter[int]] = {}
        self._next = 0
        # What was chosen for an IP without a tunnel, so that its next handshake gets the same answer.
        self._recent: collections.OrderedDict[IPAddress, int] = collections.OrderedDict()

    def choose(self, ip: IPAddress, live: Collection[int]) -> int:
        """Share for the next tunnel to this IP; a new one is taken from those that are live."""
        there = self._at.get(ip)
        if there is not None:
            return max(sorted(there), key=there.__getitem__)
        share = self._recent.get(ip)
        if share is None or share not in live:
            fewest = min(self._tunnels[each] for each in live)
            count = len(self._tunnels)
            share = min(
                (each for each in live if self._tunnels[each] == fewest),
                key=lambda each: (each - self._next) % count,
            )
            self._next = (share + 1) % count
            self._recent[ip] = share
            if len(self._recent) > _RECENT_MAX:
                self._recent.popitem(last=False)
        return share

    def add(self, ip: IPAddress, share: int) -> None:
        """Count a tunnel to this IP, whatever share it is in."""
        self._tunnels[share] += 1
        self._at.setdefault(ip, collections.Counter())[share] += 1
        self._recent.pop(ip, None)

    def remove(self, ip: IPAddress, share: int) -> None:
        """Count one less."""
        self._tunnels[share] -= 1
        there = self._at[ip]
        there[share] -= 1
        if not there[share]:
            del there[share]
        if not there:
            del self._at[ip]
