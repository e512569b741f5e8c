"""What the controller wants done; the shell performs each with one `match`.

Data flow: control.controller -> [control.actions] -> workers.control, tests.sim
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from nebula_mp.config.model import LogLevel
from nebula_mp.newtypes import TunnelIndex, UdpAddr


class SendDatagram(NamedTuple):
    """Send `data` from our underlay socket. Each new flow makes one of these, and a tuple is made fastest."""

    data: bytes
    to: UdpAddr


class WriteTun(NamedTuple):
    """Hand an IP packet to the local stack through one queue of the device, from 0."""

    packet: bytes
    queue: int = 0


@dataclass(frozen=True, slots=True)
class HandOver:
    """Let the data path open a datagram, as if it had come to it, now that it knows the tunnel."""

    local_index: TunnelIndex
    datagram: bytes
    source: UdpAddr


@dataclass(frozen=True, slots=True)
class LogEvent:
    """One log record; `fields` are the key=value pairs after the message, in this order."""

    level: LogLevel
    message: str
    fields: Mapping[str, object] = field(default_factory=dict)


Action = SendDatagram | WriteTun | HandOver | LogEvent
