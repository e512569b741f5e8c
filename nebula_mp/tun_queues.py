"""The queues of the overlay device: one for each reader.

Data flow: local stack -> TUN -> kernel, by flow -> queue i of [tun_queues] -> reader i; writer i -> queue i
The kernel chooses the queue of an outgoing packet: the one that the flow's packets were last written to, or
else by a hash of the flow. Nothing may rely on that choice. Every queue takes packets for every flow.
Knows nothing of addresses and routes (netlink) or of what a packet means.
Source: Linux Documentation/networking/tuntap.rst, section 3.3 on multiqueue.

A device with several queues lets anybody who may open /dev/net/tun add one, and read and write through it,
until it has an owner: then only that user or CAP_NET_ADMIN may. The kernel knows no way to create it with
one, so a process of another user can be quicker; `foreign_queues` shows it.

A queue that is detached gets no packets until it is attached again; those that waited in it are lost; it
still takes packets for the local stack. Neither needs a capability, only the descriptor, so a worker's
share can be handed on after every right is gone.
"""

import errno
import fcntl
import os
import socket
import struct
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytun

from nebula_mp.config.model import Offloads, TunConfig
from nebula_mp.errors import SystemCallError
from nebula_mp.ioctl_tun import DEVICE_NODE, TunDevice, check_name, create_queue, create_with_offloads

_TUNSETOWNER = 0x400454CC
_TUNSETQUEUE = 0x400454D9
_IFF_ATTACH_QUEUE = 0x0200
_IFF_DETACH_QUEUE = 0x0400
_REQUEST = struct.Struct("=16sH22x")  # struct ifreq with its flags; the name is not looked at


class TunQueues:
    """`open`, hand the queues out by fork; `detach` and `attach` at any time; `close` removes the device.

    The device exists while any descriptor of any of its queues is open, in whichever process.
    """

    def __init__(self, queues: tuple[TunDevice, ...], offloads: Offloads) -> None:
        """Internal: use `open`."""
        self.queues = queues
        self.offloads = offloads
        """Granted: `tso`, `uso` and `multiqueue` are the device's, the others as they were wanted."""
        self._attached = set(range(len(queues)))

    @classmethod
    def open(cls, config: TunConfig, count: int, wanted: Offloads) -> tuple["TunQueues", tuple[str, ...]]:
        """Create the device, still down, with `count` queues, its MTU and queue length; and warnings.

        It has those of the `wanted` offloads that the kernel grants. Where several queues are not wanted
        there is one; where the kernel refuses them there is one, and a warning. Refuses to attach to a
        device that exists. Raises SystemCallError as `TunDevice.open`.
        """
        assert count >= 1
        if count == 1 or not wanted.multiqueue:
            device, warnings = TunDevice.open(config, wanted)
            return cls((device,), device.offloads), warnings
        check_name(config.dev)
        try:
            queues, refusals = create_with_offloads(
                lambda offloads: _open_queues(config.dev or "", count, offloads), wanted
            )
        except OSError as error:
            # What is wrong with the name, the device node or our rights is wrong with one queue as well, and
            # raised from here with its explanation.
            device, warnings = TunDevice.open(config, wanted)
            reason = errno.errorcode.get(error.errno or 0, str(error))
            refusal = (
                f"tun {device.name!r}: the kernel refused {count} queues ({reason}): one reader serves all"
            )
            return cls((device,), replace(device.offloads, multiqueue=False)), (refusal, *warnings)
        opened = cls(queues, queues[0].offloads)
        try:
            opened._refuse_strangers()
            queues[0].set_mtu(config.mtu)
            return opened, (*refusals, *queues[0].set_queue_length(config.tx_queue))
        except BaseException:
            opened.close()
            raise

    @property
    def name(self) -> str:
        """The name of the device."""
        return self.queues[0].name

    @property
    def attached(self) -> frozenset[int]:
        """The queues that get packets."""
        return frozenset(self._attached)

    def detach(self, number: int) -> None:
        """Let the local stack's packets go to the other queues. Raises SystemCallError.

        What waits in the queue is lost, so its reader is to be stopped first. One queue stays attached:
        without any, the device would silently drop all packets.
        """
        assert self._attached != {number}
        if number in self._attached:
            set_attached(self.queues[number], attached=False)
            self._attached.remove(number)

    def attach(self, number: int) -> None:
        """Give a detached queue its share again. Raises SystemCallError."""
        if number not in self._attached:
            set_attached(self.queues[number], attached=True)
            self._attached.add(number)

    def _refuse_strangers(self) -> None:
        if self.foreign_queues():
            raise SystemCallError(
                f"tun {self.name!r}: while the device was created, another process added a queue to it: find"
                f" it with `grep -l 'iff:.{self.name}$' /proc/*/fdinfo/*`, stop it, and think of mode 0600"
                f" for {DEVICE_NODE}"
            )

    def foreign_queues(self) -> int:
        """How many queues get packets that are not ours, if /sys shows this network namespace; else 0.

        Other than 0 means that somebody else reads the local stack's packets. To be asked from time to time
        as well: a queue that is detached at the moment is not counted.
        """
        classes = Path("/sys/class/net")
        try:
            seen = {
                (int((each / "ifindex").read_text()), each.name)
                for each in classes.iterdir()
                if each.is_dir()
            }
            if seen != set(socket.if_nameindex()):
                return 0
            return len(list((classes / self.name / "queues").glob("tx-*"))) - len(self._attached)
        except (OSError, ValueError):
            return 0

    def close(self) -> None:
        """Close our descriptors of every queue; may be called again."""
        for queue in self.queues:
            queue.close()


def set_attached(queue: TunDevice, *, attached: bool) -> None:
    """Attach or detach one queue, from any process that has its descriptor.

    Raises SystemCallError, also when the queue is in that state already (EINVAL).
    """
    flag = _IFF_ATTACH_QUEUE if attached else _IFF_DETACH_QUEUE
    try:
        fcntl.ioctl(queue.fileno(), _TUNSETQUEUE, _REQUEST.pack(b"", flag))
    except OSError as error:
        verb = "attached" if attached else "detached"
        reason = errno.errorcode.get(error.errno or 0, str(error))
        raise SystemCallError(f"tun {queue.name!r}: a queue could not be {verb} ({reason})") from None


def _open_queues(name: str, count: int, offloads: Offloads) -> tuple[TunDevice, ...]:
    """Create the device with its first queue, then open the others. Raises OSError, and nothing is left."""
    queues: list[TunDevice] = []
    with ExitStack() as undo:
        for number in range(count):
            exclusive = pytun.IFF_TUN_EXCL if number == 0 else 0
            queue = create_queue(name, pytun.IFF_MULTI_QUEUE | exclusive, offloads)
            undo.callback(queue.close)
            name = queue.name
            if number == 0:
                _set_owner(queue.fileno())
            queues.append(queue)
        undo.pop_all()
    return tuple(queues)


def _set_owner(descriptor: int) -> None:
    """Reserve further queues to root and CAP_NET_ADMIN; our own user would mean our children as well."""
    try:
        fcntl.ioctl(descriptor, _TUNSETOWNER, 0)
    except OSError:  # a user namespace that has no root
        fcntl.ioctl(descriptor, _TUNSETOWNER, os.geteuid())
