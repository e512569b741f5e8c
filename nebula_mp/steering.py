"""Which process gets which datagram: the sockets of one listen address, and the program that picks one.

Data flow: UDP :4242 -> kernel, by the program of [steering] -> control's socket | reader i's socket
The sockets form a SO_REUSEPORT group. Member 0 is control's, member 1 + i reader i's; a member's number is
the order in which it was bound. A share is a remainder `remote index % readers`; each has an owner, at first
the reader of that number. Knows nothing of tunnels, of worker processes, or of who reads a socket when.
Source: socket(7) on SO_REUSEPORT and SO_ATTACH_REUSEPORT_CBPF; bpf(4) for the classic instruction set;
Linux Documentation/networking/filter.rst; docs/wire-format.md for the header.

- The program sees the UDP payload. A load behind its end makes the program return 0, which is control: right
  for a hole punch of one byte. A member that does not exist would be replaced by the kernel's own choice.
- Members are closed together: closing one gives its number to the last.
- Before the program runs, the kernel asks one member, picked by a hash of addresses and ports, whether it
  takes coalesced datagrams (UDP_GRO). So it is on at every member, control's too, or at none.
- A batch that the kernel has coalesced goes where its first datagram belongs.
- What waits in a socket when its share moves stays there: the new owner empties that socket as well.
"""

import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from nebula_mp.config.model import ListenConfig
from nebula_mp.errors import SystemCallError
from nebula_mp.newtypes import Buffer, TunnelIndex
from nebula_mp.udp_socket import UDP_GRO, UdpSocket
from nebula_mp.wire.header import MessageType

CONTROL = 0
"""The member that gets handshakes, recv_errors and whatever is too short to have an index."""

_SO_ATTACH_REUSEPORT_CBPF = 51
_PROBE_WAIT_MS = 200
_INDEX_OFFSET = 4
_INDEX_END = 8

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jump if true, jump if false, k
_PROGRAM = struct.Struct("@HP")  # struct sock_fprog: number of instructions, their address
_LOAD_BYTE = 0x30  # BPF_LD | BPF_B | BPF_ABS
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS, from network to host order
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_ADD = 0x04  # BPF_ALU | BPF_ADD | BPF_K
_MODULO = 0x94  # BPF_ALU | BPF_MOD | BPF_K
_JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_RETURN_A = 0x16  # BPF_RET | BPF_A

_FOR_CONTROL = (MessageType.HANDSHAKE, MessageType.RECV_ERROR)


def member_for(datagram: Buffer, owners: Sequence[int]) -> int:
    """Say what the program of `owners` says of a datagram, in Python; the specification of the program."""
    if len(datagram) < _INDEX_END or datagram[0] & 15 in _FOR_CONTROL:
        return CONTROL
    index = TunnelIndex(int.from_bytes(datagram[_INDEX_OFFSET:_INDEX_END], "big"))
    return 1 + owner_of(index, owners)


def owner_of(index: TunnelIndex, owners: Sequence[int]) -> int:
    """Which reader owns the inbound side of the tunnel that has this local index."""
    return owners[index % len(owners)]


def steering_program(owners: Sequence[int]) -> bytes:
    """Spell the program in which share `s` belongs to reader `owners[s]`, as an array of struct sock_filter.

    Shares that are still their first owner's take the short way: one addition. Jumps are short whatever the
    number of readers, since an offset has 8 bits.
    """
    code = [(_LOAD_BYTE, 0, 0, 0), (_AND, 0, 0, 15)]
    for kind in _FOR_CONTROL:
        code += [(_JUMP_IF_EQUAL, 0, 1, int(kind)), (_RETURN, 0, 0, CONTROL)]
    code += [(_LOAD_WORD, 0, 0, _INDEX_OFFSET), (_MODULO, 0, 0, len(owners))]
    for share, owner in enumerate(owners):
        if share != owner:
            code += [(_JUMP_IF_EQUAL, 0, 1, share), (_RETURN, 0, 0, 1 + owner)]
    code += [(_ADD, 0, 0, 1), (_RETURN_A, 0, 0, 0)]
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


class SteeringGroup:
    """`open`, hand the members out by fork, `hand_over` when a worker is given up; `close` ends all.

    `is_steered` False means that the kernel cannot steer: there is then one socket and one reader, who gets
    every datagram, handshakes included; control only sends on it. `coalesces` says whether UDP_GRO is on:
    then each receive needs 64 KiB and splits what it got at the size the kernel tells, as `UdpSocket` does.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], owners: Sequence[int], *, is_steered: bool, coalesces: bool
    ) -> None:
        """Internal: use `open`."""
        self._sockets = tuple(sockets)
        self._owners = tuple(owners)
        self.members = tuple(UdpSocket(member, coalesces=coalesces) for member in sockets)
        self.is_steered = is_steered
        self.coalesces = coalesces

    @classmethod
    def open(
        cls, config: ListenConfig, readers: int, *, coalesce: bool
    ) -> tuple["SteeringGroup", tuple[str, ...]]:
        """Bind `1 + readers` sockets to the listen address and steer them. Returns the group and warnings.

        The address is taken first and shared then, so where a program has it, even one that would share it,
        we are refused. One that shares it later, which the kernel allows to our own uid only, gets nothing:
        the program never names it. `coalesce` asks for UDP_GRO. `configure` on each member sets buffers and
        mark. Raises SystemCallError as `UdpSocket.open`.
        """
        assert readers >= 1
        first = _open_first(config)
        with ExitStack() as undo:
            undo.callback(first.close)
            owners = range(readers)
            if (reason := probe_steering()) is None:
                try:
                    others = _open_others(first, readers, undo)
                    _attach(first, owners)
                except OSError as error:
                    reason = _name(error)
                else:
                    coalesces, warnings = _coalesce([first, *others], wanted=coalesce)
                    undo.pop_all()
                    return cls([first, *others], owners, is_steered=True, coalesces=coalesces), warnings
            undo.pop_all().close()
        # Made anew rather than kept: a port that is shared once can be joined for as long as it is bound.
        single = _open_first(config)
        coalesces, warnings = _coalesce([single], wanted=coalesce)
        group = cls([single], [0], is_steered=False, coalesces=coalesces)
        refusal = f"udp {group.control.local}: the kernel does not steer datagrams by tunnel ({reason})"
        advice = "one reader serves all of them; SO_ATTACH_REUSEPORT_CBPF needs Linux 4.5"
        return group, (f"{refusal}: {advice}", *warnings)

    @property
    def readers(self) -> int:
        """How many readers the group has sockets for."""
        return len(self._owners)

    @property
    def owners(self) -> tuple[int, ...]:
        """The reader that each share belongs to."""
        return self._owners

    @property
    def control(self) -> UdpSocket:
        """The socket of control; where nothing is steered it is the reader's, and not to be read."""
        return self.members[CONTROL]

    def reader(self, number: int) -> UdpSocket:
        """The socket of one reader, counted from 0."""
        return self.members[1 + number if self.is_steered else 0]

    def steer(self, owners: Sequence[int]) -> None:
        """Give share `s` to reader `owners[s]` from the next datagram on.

        Raises SystemCallError, and nothing changes, when the kernel refuses.
        """
        assert self.is_steered
        assert len(owners) == self.readers
        assert all(0 <= owner < self.readers for owner in owners)
        try:
            _attach(self._sockets[CONTROL], owners)
        except OSError as error:
            raise SystemCallError(
                f"udp {self.control.local}: another steering of the readers was refused ({_name(error)})"
            ) from None
        self._owners = tuple(owners)

    def hand_over(self, given_up: int, to: int) -> None:
        """Give every share of one reader to another; raises SystemCallError as `steer`."""
        self.steer([to if owner == given_up else owner for owner in self._owners])

    def close(self) -> None:
        """Close all members; may be called again."""
        for member in self._sockets:
            member.close()


def probe_steering() -> str | None:
    """Try the program on sockets of the loopback interface. Returns why it does not work, or None.

    None also where the loopback interface lets nothing through: then attaching is the only test.
    """
    config = ListenConfig(host="127.0.0.1")
    with ExitStack() as undo:
        try:
            first = undo.enter_context(_open_first(config))
            others = _open_others(first, 2, undo)
            sender = undo.enter_context(
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            )
            sender.connect(first.getsockname())
        except SystemCallError:
            return None
        except OSError as error:
            return _name(error)
        members = [first, *others]
        for owners in ((0, 1), (1, 0)):
            try:
                _attach(first, owners)
            except OSError as error:
                return _name(error)
            for kind, index in (
                (MessageType.HANDSHAKE, 0),
                (MessageType.MESSAGE, 0),
                (MessageType.MESSAGE, 1),
            ):
                datagram = struct.pack("!BxxxI", kind, index)
                try:
                    sender.send(datagram)
                except OSError:
                    return None
                found = _member_that_got(members)
                if found is None:
                    return None
                if found != member_for(datagram, owners):
                    return "the program was accepted but is not obeyed"
    return None


def _member_that_got(members: Sequence[socket.socket]) -> int | None:
    poll = select.poll()
    for member in members:
        poll.register(member, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll(_PROBE_WAIT_MS)]
    for number, member in enumerate(members):
        if member.fileno() in ready:
            member.recv(1)
            return number
    return None


def _open_first(config: ListenConfig) -> socket.socket:
    """Bind the address without sharing it, so that no other program's group is joined."""
    opened = UdpSocket.open(config)
    try:
        return socket.socket(fileno=os.dup(opened.fileno()))
    finally:
        opened.close()


def _open_others(first: socket.socket, count: int, undo: ExitStack) -> list[socket.socket]:
    """Bind `count` more sockets to the address of the first; raises OSError."""
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    others = []
    for _ in range(count):
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        other = undo.enter_context(socket.socket(first.family, kind))
        if first.family == socket.AF_INET6:
            other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(first.getsockname())
        others.append(other)
    return others


def _attach(member: socket.socket, owners: Sequence[int]) -> None:
    """Set the program of the whole group; the kernel copies it. Raises OSError."""
    program = steering_program(owners)
    instructions = ctypes.create_string_buffer(program, len(program))
    option = _PROGRAM.pack(len(program) // _INSTRUCTION.size, ctypes.addressof(instructions))
    member.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, option)


def _coalesce(sockets: Sequence[socket.socket], *, wanted: bool) -> tuple[bool, tuple[str, ...]]:
    """Turn UDP_GRO on at every socket, or leave it off at all. Returns whether it is on, and warnings."""
    if not wanted:
        return False, ()
    try:
        for member in sockets:
            member.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    except OSError as error:
        for member in sockets:
            with suppress(OSError):
                member.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 0)
        cost = "each costs a call of its own, and TCP about three times the CPU; UDP_GRO needs Linux 5.0"
        return False, (f"udp: the kernel does not coalesce datagrams ({_name(error)}): {cost}",)
    return True, ()


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))
