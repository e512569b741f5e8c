"""What a gateway holds of the machine: its name, overlay device, sockets, and news about the underlay.

Data flow: Checked -> supervisor -> [workers.host] -> instance, tun_queues, steering, netlink
           -> descriptors -> workers.memory -> the parts of each process
The supervisor's alone: every descriptor stays open here while children come and go. Knows in which order
things are opened, changed and given back; knows nothing of processes, nor of when any of it happens.
Source: docs/architecture.md, "Start, reload, stop, crash".
"""

import errno
import fcntl
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Final, NamedTuple

from nebula_mp import netlink
from nebula_mp.config.model import Config, ListenConfig, LogLevel, Offloads
from nebula_mp.crypto.aead import TAG_BYTES
from nebula_mp.errors import SystemCallError
from nebula_mp.ioctl_tun import check_name, require_net_admin
from nebula_mp.newtypes import IPInterface, UdpAddr
from nebula_mp.shm_table import WORKERS_MAX
from nebula_mp.steering import SteeringGroup
from nebula_mp.tun_queues import TunQueues
from nebula_mp.wire.header import HEADER_BYTES
from nebula_mp.workers import logs
from nebula_mp.workers.checked import Checked
from nebula_mp.workers.instance import Instance, instance_name

_TUNGETIFF: Final = 0x800454D2
_IFREQ_BYTES: Final = 40
_UNDERLAY_BYTES_MAX: Final = {4: 65507, 6: 65487}  # of one send, whatever it is cut into
_SEGMENTS_MAX: Final = 65535


class _Wanted(NamedTuple):
    """What device and sockets are to be like; a reload changes it."""

    config: Config
    networks: tuple[IPInterface, ...]


def usable_cpus() -> tuple[int, ...]:
    """The CPUs this program may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def worker_count(config: Config, cpus: int) -> int:
    """How many reader/writer pairs to start: as configured, else one for every two CPUs."""
    if config.mp.workers is not None:
        wanted = config.mp.workers
    elif config.routines is not None:
        wanted = config.routines
    else:
        wanted = cpus // 2
    return min(max(wanted, 1), WORKERS_MAX)


def superpacket_segments(mtu_bytes: int, underlay_version: int) -> int:
    """How many packets of a full-sized superpacket one send takes once they are sealed.

    A superpacket of more would cost a second send, and the peer a second receive and a second write.
    """
    sealed_bytes = mtu_bytes + HEADER_BYTES + TAG_BYTES
    return min(max(_UNDERLAY_BYTES_MAX[underlay_version] // sealed_bytes, 1), _SEGMENTS_MAX)


class Host:
    """`open`, then `prepare`, `hand_over` and `reopen_device` as things happen; `close_device` at the end.

    Whoever opened it closes the rest, by the stack that `open` was given.
    """

    def __init__(
        self,
        instance: Instance,
        tun: TunQueues,
        steering: SteeringGroup,
        *,
        watcher: netlink.AddressWatcher,
        listener: socket.socket,
        wanted: _Wanted,
        offloads: Offloads,
    ) -> None:
        """Internal: use `open`."""
        self.instance = instance
        self.steering = steering
        self.watcher = watcher
        self.listener = listener
        self.device = tun.name
        self.workers = len(tun.queues)
        self.cpus = usable_cpus()
        self.offloads = offloads
        """Granted, for as long as this program runs."""
        self.segments: int | None = None
        """How many packets the local stack joins at most; None where that is up to the kernel."""
        self._tun = tun
        self._wanted = wanted
        self._given_up: set[int] = set()

    @classmethod
    def open(cls, checked: Checked, undo: ExitStack) -> tuple["Host", tuple[str, ...]]:
        """Take name, device and sockets, and set addresses and routes. Returns the host, and warnings.

        Raises NebulaError; what was opened before is in `undo`, as is everything afterwards.
        """
        config = checked.config
        check_name(config.tun.dev)
        require_net_admin(config.tun.dev)
        name = instance_name(config)
        instance = _claim(config, name, undo) if name is not None else None
        tun, steering, offloads, warnings = _open_device_and_sockets(config, undo)
        if instance is None:
            instance = _claim(config, tun.name, undo)
        warnings = (*warnings, *_configure_sockets(steering, config.listen))
        netlink.configure(tun.name, checked.networks, config.tun.mtu)
        watcher = netlink.AddressWatcher(tun.queues[0].index)
        undo.callback(watcher.close)
        listener = instance.listen()
        undo.callback(listener.close)
        wanted = _Wanted(config, checked.networks)
        host = cls(
            instance, tun, steering, watcher=watcher, listener=listener, wanted=wanted, offloads=offloads
        )
        undo.callback(host.close_device)
        host._limit_segments()
        return host, warnings

    @property
    def tuns(self) -> tuple[int, ...]:
        """Descriptors of the queues, by worker."""
        return tuple(queue.fileno() for queue in self._tun.queues)

    @property
    def udp(self) -> UdpAddr:
        """Where the gateway listens."""
        return self.steering.control.local

    def say_offloads(self) -> None:
        """Log which offloads are in force; what the kernel refused is among the warnings of `open`."""
        granted, config = self.offloads, self._wanted.config
        fields: dict[str, object] = {"tso": granted.tso, "uso": granted.uso}
        fields |= {"udpSegment": granted.udp_segment, "udpGro": granted.udp_gro, "queues": self.workers}
        fields |= {"gsoMaxSegs": self.segments} if self.segments is not None else {}
        logs.write(LogLevel.INFO, "offloads", fields)
        wanted = worker_count(config, len(self.cpus))
        if not config.mp.offload.multiqueue and wanted > 1:
            logs.write(LogLevel.INFO, "one worker, as mp.offload.multiqueue is off", {"wanted": wanted})

    def device_error(self) -> str | None:
        """Why the device cannot be used any more: somebody deleted it; None if it is there."""
        queue = next(self._tun.queues[number] for number in sorted(self._tun.attached))
        try:
            fcntl.ioctl(queue.fileno(), _TUNGETIFF, bytes(_IFREQ_BYTES))
        except OSError as error:
            if error.errno in (errno.EBADFD, errno.EBADF):
                return f"tun {self.device!r}: the device was deleted"
        return None

    def reopen_device(self) -> None:
        """Make the device anew after `close_device`, with as many queues and the same offloads.

        Raises SystemCallError.

        Nobody else may have a queue of the old one open under the same name.
        """
        config, networks = self._wanted
        tun, _ = TunQueues.open(replace(config.tun, dev=self.device), self.workers, self.offloads)
        try:
            assert len(tun.queues) == self.workers  # the kernel gave as many before
            assert tun.offloads == self.offloads  # and these
            self.watcher.set_own_index(tun.queues[0].index)
            netlink.configure(self.device, networks, config.tun.mtu)
            self._limit_segments()
            for worker in self._given_up:
                tun.detach(worker)
        except BaseException:
            tun.close()
            raise
        self._tun = tun

    def close_device(self) -> None:
        """Let go of the device, which ends when the children have; may be called again."""
        self._tun.close()

    @property
    def has_device(self) -> bool:
        """Whether the device is open."""
        return self._tun.queues[0].fileno() >= 0

    def foreign_queues(self) -> int:
        """How many queues of the device are somebody else's."""
        return self._tun.foreign_queues() if self.has_device else 0

    def hand_over(self, worker: int, to: int) -> tuple[str, ...]:
        """Give the share of a worker whose processes have ended to another. Returns what went wrong."""
        self._given_up.add(worker)
        faults = []
        try:
            self.steering.hand_over(worker, to)
        except SystemCallError as error:
            faults.append(str(error))
        if self.has_device:
            try:
                self._tun.detach(worker)
            except SystemCallError as error:
                faults.append(str(error))
        return tuple(faults)

    def prepare(self, config: Config, networks: tuple[IPInterface, ...], undo: ExitStack) -> tuple[str, ...]:
        """Change sockets and device to what a reload asks for. Returns warnings.

        Raises SystemCallError. `undo` takes everything back, until its callbacks are dropped.
        """
        old = self._wanted
        new = _Wanted(config, networks)
        undo.callback(self._restore_sockets, old.config.listen)
        warnings = _configure_sockets(self.steering, config.listen)
        undo.callback(self._restore_device, old)
        self._wanted = new
        if self.has_device and (networks, config.tun.mtu) != (old.networks, old.config.tun.mtu):
            self._configure_device()
        elif self.has_device:
            self._limit_segments()  # we may have become a router
        return warnings

    def _configure_device(self) -> None:
        """Set MTU, addresses and routes. Raises SystemCallError."""
        config, networks = self._wanted
        self._tun.queues[0].set_mtu(config.tun.mtu)
        netlink.configure(self.device, networks, config.tun.mtu)
        self._limit_segments()

    def _limit_segments(self) -> None:
        """Have no superpackets that are too large for one send; a refusal costs performance only.

        None but the local stack's own: a superpacket that came from elsewhere and has more packets would be
        cut up by the kernel, into single ones (12 Gbit/s became 1 to 2), where without the limit it costs a
        second send. So a machine that forwards has no limit.
        """
        if not self.offloads.tun_header:
            return
        segments = _SEGMENTS_MAX  # what a device has
        if not netlink.forwards():
            segments = superpacket_segments(self._wanted.config.tun.mtu, self.udp.ip.version)
        is_set = netlink.limit_segments(self.device, segments)
        self.segments = segments if is_set else None
        if not is_set:
            logs.write(LogLevel.DEBUG, "gso_max_segs refused", {"dev": self.device, "segments": segments})

    def _restore_device(self, old: _Wanted) -> None:
        new, self._wanted = self._wanted, old
        if self.has_device and (new.networks, new.config.tun.mtu) != (old.networks, old.config.tun.mtu):
            with suppress(SystemCallError):
                self._configure_device()

    def _restore_sockets(self, old: ListenConfig) -> None:
        for member in self.steering.members:
            with suppress(SystemCallError):
                member.configure(old)


def _claim(config: Config, name: str, undo: ExitStack) -> Instance:
    instance = Instance.claim(config.mp.run_dir, name)
    undo.callback(instance.release)
    return instance


def _open_device_and_sockets(
    config: Config, undo: ExitStack
) -> tuple[TunQueues, SteeringGroup, Offloads, Sequence[str]]:
    """Open as many queues as sockets, one for each worker; one where the kernel refuses several of either.

    Gives the offloads that were granted as well, and warnings.
    """
    wanted = config.mp.offload
    with ExitStack() as attempt:
        tun, warnings = TunQueues.open(config.tun, worker_count(config, len(usable_cpus())), wanted)
        attempt.callback(tun.close)
        steering, refusals = SteeringGroup.open(config.listen, len(tun.queues), coalesce=wanted.udp_gro)
        attempt.callback(steering.close)
        if not steering.is_steered and len(tun.queues) > 1:
            tun.close()
            tun, warnings = TunQueues.open(config.tun, 1, wanted)
            attempt.callback(tun.close)
        # `Host.close_device` closes the device in force, which may be another one by then.
        undo.push(attempt.pop_all())
    granted = replace(tun.offloads, udp_gro=steering.coalesces)
    reason = steering.control.segmentation_error() if wanted.udp_segment else None
    if reason is not None:
        granted = replace(granted, udp_segment=False)
        cost = "each costs a call of its own, and TCP several times the CPU; UDP_SEGMENT needs Linux 4.18"
        refusals = (*refusals, f"udp: the kernel does not cut datagrams ({reason}): {cost}")
    return tun, steering, granted, (*warnings, *refusals)


def _configure_sockets(steering: SteeringGroup, config: ListenConfig) -> tuple[str, ...]:
    """Set buffers and mark of every member. Returns warnings, each once. Raises SystemCallError."""
    warnings = [warning for member in steering.members for warning in member.configure(config)]
    return tuple(dict.fromkeys(warnings))
