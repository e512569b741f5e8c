"""The checked configuration as frozen dataclasses; defaults are those of Nebula.

Data flow: config.load -> [config.model] -> everything that is configured
Knows nothing of YAML, files or how a value was spelled. Durations are seconds.
Source: slackhq/nebula, examples/config.yml and the keys its code reads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from nebula_mp.newtypes import Cipher, IPAddress, IPNetwork, Seconds


class RecvErrorPolicy(StrEnum):
    """When to send or to believe a recv_error: `private` means only RFC 1918 and ULA addresses."""

    ALWAYS = "always"
    NEVER = "never"
    PRIVATE = "private"


class LogLevel(StrEnum):
    """Least severity that is logged."""

    TRACE = "trace"
    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPort:
    """One underlay address of `static_host_map`: a literal or a name that is resolved repeatedly."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PkiConfig:
    """`pki`: each of the three is a path, or the PEM text itself."""

    ca: str
    cert: str
    key: str
    blocklist: tuple[str, ...] = ()  # lower-case hex fingerprints
    disconnect_invalid: bool = True
    initiating_version: Literal[1, 2] | None = None  # None: 1 if a v1 certificate is loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticMapConfig:
    """`static_map`: how names in `static_host_map` are resolved."""

    cadence: Seconds = Seconds(30)
    network: Literal["ip4", "ip6", "ip"] = "ip4"
    lookup_timeout: Seconds = Seconds(0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenConfig:
    """`listen`: the underlay socket. Port 0 lets the kernel choose; buffers are bytes, None leaves them."""

    host: str = "0.0.0.0"  # noqa: S104 - Nebula's default is every address
    port: int = 0
    read_buffer: int | None = None
    write_buffer: int | None = None
    so_mark: int = 0
    udp_offloads: bool = True  # what `mp.offload.udp_segment` and `udp_gro` are where they are not set
    send_recv_error: RecvErrorPolicy = RecvErrorPolicy.ALWAYS
    accept_recv_error: RecvErrorPolicy = RecvErrorPolicy.ALWAYS


@dataclass(frozen=True, slots=True, kw_only=True)
class TunConfig:
    """`tun`: the overlay device. `dev` None lets the kernel choose a name."""

    dev: str | None = None
    mtu: int = 1300
    tx_queue: int = 500
    drop_local_broadcast: bool = False
    drop_multicast: bool = False
    use_offloads: bool = True  # what `mp.offload.tso` and `uso` are where they are not set


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackConfig:
    """`firewall.conntrack`: how long an idle flow stays allowed."""

    tcp_timeout: Seconds = Seconds(12 * 60)
    udp_timeout: Seconds = Seconds(3 * 60)
    default_timeout: Seconds = Seconds(10 * 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallRule:
    """One rule that admits any protocol, port and peer; `local_cidr` alone may narrow it.

    `local_cidr`: a network, "any", or None when the key is absent (protocol.md 10.3: then all local
    addresses, or only the overlay networks if the certificate has unsafe networks).
    """

    local_cidr: IPNetwork | Literal["any"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallConfig:
    """`firewall`: no rule in a direction means that everything new in it is dropped."""

    inbound: tuple[FirewallRule, ...] = ()
    outbound: tuple[FirewallRule, ...] = ()
    default_local_cidr_any: bool = False
    conntrack: ConntrackConfig = field(default_factory=ConntrackConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakesConfig:
    """`handshakes`: after attempt n the next one follows n * try_interval later."""

    try_interval: Seconds = Seconds(0.1)
    retries: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelsConfig:
    """`tunnels`: whether and when an idle tunnel is closed."""

    drop_inactive: bool = False
    inactivity_timeout: Seconds = Seconds(10 * 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimersConfig:
    """`timers`: how often a tunnel's traffic is checked, and how long an unanswered test may take."""

    connection_alive_interval: Seconds = Seconds(5)
    pending_deletion_interval: Seconds = Seconds(10)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """`logging`: severity, `text` or `json` lines, with or without the time."""

    level: LogLevel = LogLevel.INFO
    format: Literal["text", "json"] = "text"
    disable_timestamp: bool = False


WORKERS_MAX = 64
"""Reader and writer pairs of one gateway."""


class DrainMode(StrEnum):
    """`mp.drain`: who makes the system calls on what waits in a worker's rings."""

    AUTO = "auto"  # the reader, unless a trial shows that the writer moves more
    WRITER = "writer"  # a pipeline over two cores
    READER = "reader"  # the writer only steps in


class KernelChoice(StrEnum):
    """`mp.kernel`: which implementation of `datapath.api.Kernel` carries packets."""

    AUTO = "auto"  # the native one if it can be used here
    PYTHON = "python"
    RUST = "rust"  # or no start at all


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloads:
    """Kernel features that move many packets with one call: those asked for, or those that were granted."""

    tso: bool = True  # the TUN device gives and takes TCP superpackets
    uso: bool = True  # and UDP ones
    udp_segment: bool = True  # the kernel cuts what we send into datagrams
    udp_gro: bool = True  # and joins those that we receive
    multiqueue: bool = True  # a TUN queue for each reader

    @property
    def tun_header(self) -> bool:
        """Whether a header of `datapath.virtio` stands in front of every packet of the TUN device."""
        return self.tso or self.uso


NO_OFFLOADS = Offloads(tso=False, uso=False, udp_segment=False, udp_gro=False, multiqueue=False)
"""Packet by packet, one queue: what any kernel can do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MpConfig:
    """`mp`: our own settings; the original ignores the whole section."""

    run_dir: str = "/run/nebula-mp"
    workers: int | None = None  # None: `auto`
    drain: DrainMode = DrainMode.AUTO
    kernel: KernelChoice | None = None  # None: what NEBULA_MP_KERNEL of the environment says, else `auto`
    user: str | None = None  # whom the children run as when we are root; None: nebula-mp, else nobody
    offload: Offloads = field(default_factory=Offloads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole `config.yml`, checked."""

    pki: PkiConfig
    cipher: Cipher = Cipher.AES
    static_host_map: Mapping[IPAddress, tuple[HostPort, ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    static_map: StaticMapConfig = field(default_factory=StaticMapConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)
    tun: TunConfig = field(default_factory=TunConfig)
    firewall: FirewallConfig = field(default_factory=FirewallConfig)
    handshakes: HandshakesConfig = field(default_factory=HandshakesConfig)
    tunnels: TunnelsConfig = field(default_factory=TunnelsConfig)
    timers: TimersConfig = field(default_factory=TimersConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    routines: int | None = None  # what `mp.workers: auto` means, 1 to WORKERS_MAX; None: by the CPUs
    mp: MpConfig = field(default_factory=MpConfig)
