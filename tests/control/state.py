"""The whole state of a controller as plain data, so that two moments can be compared.

Left out, because a stranger may change them and they decide nothing about proven tunnels: counters of drops, the
rate limits of log lines and of replies, candidates (whose limits have tests of their own) with their timers and
indexes, the cache of certificate checks, and random state.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from nebula_mp.cert.pool import CaPool
from nebula_mp.control.controller import Controller
from nebula_mp.control.core import TimerKind
from nebula_mp.control.hostmap import HostMap, IndexAllocator, Tunnel
from nebula_mp.control.outbox import Outbox
from nebula_mp.control.timers import Timers
from tests.support.plane import LocalPlane

_PLAIN = (
    int, float, str, bytes, bool, type(None), Enum,
    IPv4Address, IPv6Address, IPv4Network, IPv6Network, IPv4Interface, IPv6Interface,
)  # fmt: skip
_LEFT_OUT = (Outbox, CaPool, IndexAllocator, LocalPlane)
_CONTROLLER_LEFT_OUT = {"_recv_error_window", "_recv_errors_sent"}


def state_of(controller: Controller) -> object:
    """Everything reachable from the controller, as nested tuples."""
    return _plain(controller, set())


def _plain(value: object, above: set[int]) -> object:
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, _LEFT_OUT) or callable(value):
        return type(value).__name__
    if id(value) in above:
        return "above"
    above = above | {id(value)}
    if isinstance(value, Timers):
        deadlines = value._deadlines
        kept = {key: at for key, (at, _) in deadlines.items() if key[0] is not TimerKind.CANDIDATE}
        return _plain(kept, above)
    if isinstance(value, HostMap):
        # Counters are left out: reacting to a hint, at most once a second, sends a test, which uses one.
        plane = value._plane
        assert isinstance(plane, LocalPlane)
        received = tuple(
            (known.received, known.last_in, known.window.current, bytes(known.window._bits))
            for tunnel in value
            if tunnel.proven and (known := plane.tunnels[tunnel.local_index])
        )
        return (
            received,
            tuple(_plain(tunnel, above) for tunnel in value if tunnel.proven),
            tuple(
                (address, tuple(tunnel.local_index for tunnel in tunnels))
                for address, tunnels in value._by_address.items()
            ),
        )
    if isinstance(value, Mapping):
        return tuple((_plain(key, above), _plain(each, above)) for key, each in value.items())
    if isinstance(value, AbstractSet):
        return tuple(sorted(repr(_plain(each, above)) for each in value))
    if isinstance(value, list | tuple):
        return tuple(_plain(each, above) for each in value)
    names = _names(value)
    if isinstance(value, Controller):
        names = [name for name in names if name not in _CONTROLLER_LEFT_OUT]
    if isinstance(value, Tunnel):
        names = [name for name in names if name not in {"probed_at", "suspected_at"}]
    return type(value).__name__, tuple(
        (name, _plain(getattr(value, name), above)) for name in names if hasattr(value, name)
    )


def _names(value: object) -> list[str]:
    if is_dataclass(value):
        return [each.name for each in fields(value)]
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*slots, *getattr(value, "__dict__", {})]
