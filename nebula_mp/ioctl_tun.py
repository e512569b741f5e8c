"""The overlay device: one TUN queue, its offloads, and writing to it packet by packet.

Data flow: workers.control -> [ioctl_tun] -> TUN -> local stack; its descriptor -> readers, writers
python-pytun creates the device; its descriptor is inheritable and blocking and its calls copy or refuse
buffers, so everything after that happens on a duplicate with ioctl and write.
Knows nothing of addresses and routes (netlink) or of what a packet means.
Source: Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h, drivers/net/tun.c;
netdevice(7); Nebula's `tun` keys.

Offloads are the device's, not a queue's. The kernel refuses a set of them as a whole: for an unknown one, for
TSO or USO without checksums, for USO over one version of IP only. With any of them every packet has a header
of `datapath.virtio` in front, at every queue, in both directions. Whether it has is settled when the device
is created, so a driver that refuses all of them gets the device created anew. IFF_NAPI is not set: it gains
nothing on a TUN device.
"""

import contextlib
import errno
import fcntl
import os
import re
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import pytun

from nebula_mp.config.model import NO_OFFLOADS, Offloads, TunConfig
from nebula_mp.datapath.virtio import HEADER_BYTES
from nebula_mp.errors import SystemCallError

DEVICE_NODE = "/dev/net/tun"
_NAME_BYTES_MAX = 15
_WRITE_WAIT_MS = 10
_TUNSETOFFLOAD = 0x400454D0
_TUN_F_CSUM = 0x01
_TUN_F_TSO = 0x02 | 0x04 | 0x08  # over IPv4, over IPv6, with ECN
_TUN_F_USO = 0x20 | 0x40  # over IPv4, over IPv6
_SIOCSIFTXQLEN = 0x8943
_SIOCSIFMTU = 0x8922
_REQUEST = struct.Struct("16si20x")  # struct ifreq with one int in its union
_CAP_NET_ADMIN = 12
_DELETED = frozenset({errno.EBADFD, errno.EFAULT})
"""What the driver answers on a queue whose device is gone; EFAULT when a call met the deletion."""

GRANT = (
    "run as root, or grant CAP_NET_ADMIN: AmbientCapabilities=CAP_NET_ADMIN in the systemd unit,"
    " --cap-add NET_ADMIN for a container, or setcap cap_net_admin+ep on the Python interpreter"
)


class WriteFault(StrEnum):
    """Why a packet did not reach the local stack; the value is the name of its counter."""

    NO_MEMORY = "mp.tun.drop.nobufs"
    REFUSED = "mp.tun.drop.refused"  # the kernel did not take it for an IP packet, or the device is down
    FULL = "mp.tun.drop.again"  # not writable for 10 ms


class TunLostError(SystemCallError):
    """The device was deleted under us. Reopen it, or end with `exit_code`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"tun {name!r}: the device was deleted", exit_code=5)


class TunDevice:
    """`open`, then `write` at any time; the device ends with `close`.

    `write` raises TunLostError when somebody deleted the device, and nothing else that a packet can cause.
    """

    def __init__(self, descriptor: int, name: str, offloads: Offloads = NO_OFFLOADS) -> None:
        """Of a descriptor whose device was created with `offloads`."""
        self.offloads = offloads
        """Granted; only `tso` and `uso` are the device's."""
        self._header = bytes(HEADER_BYTES) if offloads.tun_header else b""  # of a packet that is complete
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self.name = name
        self.again = 0  # writes that had to wait until the queue was writable

    @classmethod
    def open(cls, config: TunConfig, wanted: Offloads = NO_OFFLOADS) -> tuple["TunDevice", tuple[str, ...]]:
        """Create the device, still down, with its MTU and queue length. Returns it and warnings.

        It has those of the `wanted` offloads that the kernel grants. Refuses to attach to a device that
        exists. Raises SystemCallError that names the device, the reason and what to do; exit code 4 where a
        capability is missing.
        """
        check_name(config.dev)
        name = config.dev or ""
        try:
            (device,), refusals = create_with_offloads(
                lambda offloads: (create_queue(name, pytun.IFF_TUN_EXCL, offloads),), wanted
            )
        except OSError as error:
            raise _create_error(name, error) from None
        try:
            device.set_mtu(config.mtu)
            return device, (*refusals, *device.set_queue_length(config.tx_queue))
        except BaseException:
            device.close()
            raise

    def fileno(self) -> int:
        """Give the descriptor, which this object owns."""
        return self._descriptor

    @property
    def index(self) -> int:
        """Give the interface index."""
        return socket.if_nametoindex(self.name)

    def close(self) -> None:
        """Close the queue, which removes the device, its addresses and its routes; may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def set_mtu(self, mtu_bytes: int) -> None:
        """Set the device MTU. Raises SystemCallError when the kernel refuses the size."""
        try:
            self._set(_SIOCSIFMTU, mtu_bytes)
        except OSError as error:
            raise SystemCallError(
                f"tun {self.name!r}: MTU {mtu_bytes} refused ({_name(error)}): correct tun.mtu"
            ) from None

    def set_queue_length(self, packets: int) -> tuple[str, ...]:
        """Set txqueuelen. A refusal costs performance only, so it is returned as a warning."""
        try:
            self._set(_SIOCSIFTXQLEN, packets)
        except OSError as error:
            return (f"tun {self.name!r}: tun.tx_queue {packets} refused ({_name(error)})",)
        return ()

    def _set(self, request: int, value: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            fcntl.ioctl(control, request, _REQUEST.pack(self.name.encode(), value))

    def write(self, packet: bytes) -> WriteFault | None:
        """Hand a whole IP packet to the local stack; None, or why it was dropped. Waits at most 10 ms."""
        for last in (False, True):
            try:
                os.write(self._descriptor, self._header + packet)
            except BlockingIOError:
                self.again += 1
                if last or not self._poll.poll(_WRITE_WAIT_MS):
                    return WriteFault.FULL
            except OSError as error:
                if error.errno in (errno.ENOBUFS, errno.ENOMEM):
                    return WriteFault.NO_MEMORY
                if error.errno in (errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.ENETDOWN):
                    return WriteFault.REFUSED
                if error.errno in _DELETED:
                    raise TunLostError(self.name) from None
                raise
            else:
                return None
        return WriteFault.FULL


def create_queue(name: str, flags: int, offloads: Offloads) -> TunDevice:
    """Create a device, or open one more queue of it: `flags` say which. Raises OSError.

    It has a header in front of its packets if `offloads` need one; they are not asked for here.
    """
    flags |= pytun.IFF_TUN | pytun.IFF_NO_PI | (pytun.IFF_VNET_HDR if offloads.tun_header else 0)
    created = pytun.TunTapDevice(name=name, flags=flags, dev=DEVICE_NODE)
    try:
        # Our own descriptor: that of the package is inheritable and blocking.
        descriptor = fcntl.fcntl(created.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
        name = created.name
    finally:
        created.close()  # the duplicate keeps the device
    os.set_blocking(descriptor, False)
    return TunDevice(descriptor, name, offloads)


def create_with_offloads(
    create: Callable[[Offloads], tuple[TunDevice, ...]], wanted: Offloads
) -> tuple[tuple[TunDevice, ...], tuple[str, ...]]:
    """Have a device created with those of the `wanted` offloads that the kernel grants; and warnings.

    `create` gives all queues of a device that is down. Raises what it raises, and nothing is left then.
    """
    queues = create(wanted)
    granted, reason = _ask_for_offloads(queues[0], wanted)
    if granted.tun_header != wanted.tun_header:
        for queue in queues:
            queue.close()
        queues = create(granted)
    for queue in queues:
        queue.offloads = granted
    return queues, _refusals(queues[0].name, wanted, granted, reason)


def _ask_for_offloads(device: TunDevice, wanted: Offloads) -> tuple[Offloads, str]:
    """Give what the driver has of it, and why it has not the rest."""
    reason = ""
    granted = wanted
    while granted.tun_header:
        flags = _TUN_F_CSUM | (_TUN_F_TSO if granted.tso else 0) | (_TUN_F_USO if granted.uso else 0)
        try:
            fcntl.ioctl(device.fileno(), _TUNSETOFFLOAD, flags)
            break
        except OSError as error:
            reason = _name(error)
        granted = replace(granted, uso=False, tso=granted.tso and granted.uso)
    return granted, reason


def _refusals(name: str, wanted: Offloads, granted: Offloads, reason: str) -> tuple[str, ...]:
    """Say what a refusal costs; what was not wanted is none."""
    if wanted.tso and not granted.tso:
        cost = "each packet costs a call of its own, and TCP about three times the CPU"
        return (f"tun {name!r}: the kernel refused all offloads ({reason}): {cost}",)
    if wanted.uso and not granted.uso:
        cost = "each costs a call of its own; USO needs Linux 6.2"
        return (f"tun {name!r}: the kernel does not join UDP packets ({reason}): {cost}",)
    return ()


def check_name(name: str | None) -> None:
    """Check that the kernel would take `name` for a device. Raises SystemCallError."""
    wanted = name or ""
    if len(wanted.encode()) > _NAME_BYTES_MAX or re.search(r"[/:\s\0%]", wanted) or wanted in (".", ".."):
        raise SystemCallError(
            f"tun {wanted!r}: not a device name: at most {_NAME_BYTES_MAX} bytes without '/', ':', '%' or"
            " blanks; correct tun.dev"
        )


def require_net_admin(name: str | None) -> None:
    """Check, before anything on the host is touched, that a device can be created.

    Raises SystemCallError with exit code 4.
    """
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
        if found and not int(found[1], 16) >> _CAP_NET_ADMIN & 1:
            raise SystemCallError(f"{_where(name)}: CAP_NET_ADMIN is missing: {GRANT}", exit_code=4)


def _where(name: str | None) -> str:
    return f"tun {name!r}" if name else "tun"


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


def _create_error(name: str, error: OSError) -> SystemCallError:
    where = _where(name)
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return SystemCallError(
            f"{where}: {DEVICE_NODE} is missing ({_name(error)}): run `modprobe tun`; in a container pass the"
            f" device in with --device {DEVICE_NODE}"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return SystemCallError(
            f"{where}: {DEVICE_NODE} or TUNSETIFF refused ({_name(error)}): needs CAP_NET_ADMIN and the right"
            f" to read and write {DEVICE_NODE}: {GRANT}",
            exit_code=4,
        )
    if error.errno == errno.EBUSY:
        holder = device_holder(name)
        taken = f"in use by {holder}: stop it" if holder else "taken by an existing interface: remove that"
        return SystemCallError(f"{where}: the name is {taken}, or choose another tun.dev")
    return SystemCallError(f"{where}: cannot be created ({_name(error)}: {error.strerror or error})")


def device_holder(name: str) -> str | None:
    """`name (pid n)` of a process that has a queue of this TUN device open, if /proc shows it to us."""
    wanted = f"iff:\t{name}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # Device names are per network namespace, and a process elsewhere is none of our business.
            if not (process / "ns" / "net").samefile("/proc/thread-self/ns/net"):
                continue
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if (
                        str(link.readlink()) == DEVICE_NODE
                        and wanted in (process / "fdinfo" / link.name).read_text().splitlines()
                    ):
                        return f"{_process_name(process)} (pid {process.name})"
    return None


def _process_name(process: Path) -> str:
    title = (process / "cmdline").read_text(errors="replace").partition("\0")[0]
    return title if title.startswith("nebula-mp") else (process / "comm").read_text().strip()
