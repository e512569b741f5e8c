"""Anonymous shared memory, and the locks that guard it between processes.

Data flow: supervisor: [shm.Region] -> descriptors -> fork -> child: [shm.Mapping] -> shm_ring, shm_stats
Knows the header that every region begins with; knows nothing of what follows it, nor of processes and roles.
Source: memfd_create(2), fcntl(2) on seals and record locks, mmap(2), and Intel's manual, volume 3A, 9.2.

Header, 64 bytes, little-endian; written by the supervisor when no child is attached, by nobody else:

    +0   8 bytes  magic           which layout this is
    +8   u32      layout version
    +12  u32      spare, 0
    +16  u64      generation      1 and up; a region that was emptied for a successor has a new one
    +24  u64      size            of the whole region in bytes
    +32  u64[4]   parameters      what the layout wants to be told (number of areas, ...)

Rules:

- A word that two processes use is 8 bytes long, aligned, and stored through `Mapping.words`, a memoryview
  cast to "Q": that is one move instruction. `struct` stores byte by byte, and readers do see halves.
- x86-64 keeps stores in order and loads in order, so data stored before a cursor is seen by who has seen the
  cursor. It may delay a store past a later load of another word; nothing here relies on the contrary. Where
  the order of a store and a load matters there is a system call between them that takes a lock in the kernel.
- Read-only means: mapped from a descriptor opened read-only, in a process that closed the writable one. A
  PROT_READ mapping of a writable descriptor can be made writable again with mprotect. The regions are of mode
  0400 so that a process of another uid cannot open them for writing through /proc either.
- Sizes are sealed, so no process can make another one's access fail with SIGBUS; so is the set of seals, or
  one could seal a region against its next writer.
- `mmap` duplicates the descriptor it is given and closes the duplicate when it is collected. A child
  therefore closes what it inherited first and attaches afterwards: the other order closes descriptors of
  mappings, and later, by number, somebody else's. The supervisor maps nothing, so that no child inherits
  a mapping.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nebula_mp.errors import RingError, SystemCallError

PAGE_BYTES = 4096
HEADER_BYTES = 64
HEADER_WORDS = HEADER_BYTES // 8
PARAMETERS_MAX = 4
GENERATION = 2
"""Index of the header's generation among a mapping's words."""

U64_MAX = 2**64 - 1

_HEADER = struct.Struct("<8sIIQQ4Q")
_WORD = struct.Struct("<Q")
_MFD_NOEXEC_SEAL = 8  # Linux 6.3; refused as unknown before, demanded by sysctl vm.memfd_noexec=2 since
_ACCESS = {os.O_RDONLY: "read-only", os.O_WRONLY: "write-only", os.O_RDWR: "read-write"}
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MLOCK_ONFAULT = 1  # lock a page when it is first used, so that locking costs no memory

_libc = ctypes.CDLL(None, use_errno=True)

_not_inherited: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
_lost: list[mmap.mmap] = []


def _keep_what_was_not_inherited() -> None:
    """In a forked child: never let go of mappings that it does not have.

    To forget one unmaps its addresses, where by then something else of the child's may lie.
    """
    _lost.extend(_not_inherited)


os.register_at_fork(after_in_child=_keep_what_was_not_inherited)


class Layout(NamedTuple):
    """What a region contains. Any change of offsets or meanings needs a new version."""

    name: str  # for messages and /proc/*/maps
    magic: bytes  # 8 bytes
    version: int


def require_ordered_stores(machine: str | None = None, pointer_bytes: int | None = None) -> None:
    """Refuse a machine on which Python cannot share memory between processes.

    Raises SystemCallError. The arguments stand in for this machine in tests.
    """
    machine = os.uname().machine if machine is None else machine
    pointer_bytes = struct.calcsize("P") if pointer_bytes is None else pointer_bytes
    if machine != "x86_64" or pointer_bytes != 8 or sys.byteorder != "little":
        raise SystemCallError(
            f"shared memory: this is a {8 * pointer_bytes}-bit Python on {machine}, and the Python kernel"
            " relies on the store order of x86-64: install the accelerator and start with --kernel rust"
        )


class Region:
    """A region as its maker, the supervisor, holds it: two descriptors and no mapping.

    `descriptor` is writable, `read_only` is not; each child keeps the one it is entitled to. Both are closed
    on exec and stay open until `close`.
    """

    def __init__(
        self, layout: Layout, size_bytes: int, parameters: tuple[int, ...], descriptor: int, read_only: int
    ) -> None:
        """Internal: use `create`."""
        self.layout = layout
        self.size_bytes = size_bytes
        self.parameters = parameters
        self.descriptor = descriptor
        self.read_only = read_only
        self.generation = 0

    @classmethod
    def create(
        cls,
        layout: Layout,
        size_bytes: int,
        parameters: Sequence[int] = (),
        *,
        name: str = "",
        generation: int = 1,
        reserve: bool = True,
    ) -> "Region":
        """Make a region of zeros behind its header. `size_bytes` is a multiple of 8 and includes the header.

        `name` tells several regions of one layout apart in /proc. With `reserve` the memory is taken at once,
        so that a full machine shows here and not as a killed worker; without, only pages that are used cost
        anything. Raises SystemCallError.
        """
        require_ordered_stores()
        assert len(layout.magic) == 8
        assert size_bytes >= HEADER_BYTES
        assert size_bytes % 8 == 0
        assert len(parameters) <= PARAMETERS_MAX
        name = f"{layout.name} {name}".rstrip()
        with contextlib.ExitStack() as undo:
            try:
                descriptor = _memfd(name)
                undo.callback(os.close, descriptor)
                os.ftruncate(descriptor, size_bytes)
                if reserve:
                    os.posix_fallocate(descriptor, 0, size_bytes)
                os.fchmod(descriptor, 0o400)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
                read_only = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
                undo.callback(os.close, read_only)
            except OSError as error:
                raise _refused(name, size_bytes, error) from None
            region = cls(layout, size_bytes, tuple(parameters), descriptor, read_only)
            region.renew(generation)
            undo.pop_all()
        return region

    def renew(self, generation: int) -> None:
        """Write the header anew and zero the rest of the first page; what lies behind it stays.

        Only while no process uses the region: whoever is still attached finds another generation.
        """
        assert 0 < generation <= U64_MAX
        layout = self.layout
        parameters = (*self.parameters, *[0] * (PARAMETERS_MAX - len(self.parameters)))
        header = _HEADER.pack(layout.magic, layout.version, 0, generation, self.size_bytes, *parameters)
        page = header.ljust(min(self.size_bytes, PAGE_BYTES), b"\0")
        written = os.pwrite(self.descriptor, page, 0)
        assert written == len(page)
        self.generation = generation

    def store_word(self, index: int, value: int) -> None:
        """Store word `index` of the region without mapping it; a reader may see half of it."""
        written = os.pwrite(self.descriptor, _WORD.pack(value), 8 * index)
        assert written == 8

    def close(self) -> None:
        """Close both descriptors. The memory lives on while anybody maps it or holds a descriptor."""
        for descriptor in (self.descriptor, self.read_only):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self.read_only = -1


def load_word(descriptor: int, index: int) -> int:
    """Word `index` of a region, read without mapping it; may be half of a store. For status output."""
    value: int = _WORD.unpack(os.pread(descriptor, 8, 8 * index))[0]
    return value


class Mapping:
    """One process's view of a region whose header was found right.

    `data` shows it as bytes, `words` as u64; both are read-only unless `writable`. The memory stays mapped
    while this object or any view of it lives.
    """

    __slots__ = ("data", "generation", "name", "parameters", "size_bytes", "words", "writable")

    def __init__(self, descriptor: int, layout: Layout, *, writable: bool, name: str = "") -> None:
        """Attach to the region behind `descriptor`, which is borrowed: the caller may close it afterwards.

        `name` says in messages which of several regions it is. Raises RingError when it is no region of this
        layout and version, has another size than its header says, could still change its size, or when the
        descriptor gives more or fewer rights than `writable` says. Raises SystemCallError when it cannot be
        mapped.
        """
        require_ordered_stores()
        self.name = f"{layout.name} {name}".rstrip()
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        self._check("access of the descriptor", _ACCESS[access], "read-write" if writable else "read-only")
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:  # a file that cannot be sealed
            seals = 0
        self._check("set of size seals", seals & _SIZE_SEALS, _SIZE_SEALS)
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes < HEADER_BYTES or size_bytes % 8:
            raise self.contradiction("size", size_bytes, "room for a header and whole words")
        protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        try:
            memory = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, protection)
        except OSError as error:
            raise _refused(self.name, size_bytes, error) from None
        self.writable = writable
        self.data = memoryview(memory)
        self.words = self.data.cast("Q")
        # Copied once: a process that may write here may also change its mind.
        magic, version, _, generation, stated, *parameters = _HEADER.unpack(bytes(self.data[:HEADER_BYTES]))
        self._check("magic", magic, layout.magic)
        self._check("layout version", version, layout.version)
        self._check("size", stated, size_bytes)
        if generation == 0:
            raise self.contradiction("generation", 0, "1 or more")
        self.generation: int = generation
        self.size_bytes = size_bytes
        self.parameters: tuple[int, ...] = tuple(parameters)

    def protect(self) -> bool:
        """Keep memory with secrets out of core dumps and out of children that this process forks.

        In such a child any use of a view of it is a fault: it has to attach for itself. The pages stay out of
        swap too, where the limit of locked memory allows that (`LimitMEMLOCK`); gives whether it does. Raises
        SystemCallError.
        """
        memory = self.data.obj
        assert isinstance(memory, mmap.mmap)
        _not_inherited.add(memory)
        try:
            memory.madvise(mmap.MADV_DONTDUMP)
            memory.madvise(mmap.MADV_DONTFORK)
        except OSError as error:
            raise _refused(self.name, self.size_bytes, error) from None
        if not hasattr(_libc, "mlock2"):
            return False
        address, size_bytes = ctypes.c_void_p(_address(self.data)), ctypes.c_size_t(self.size_bytes)
        return bool(_libc.mlock2(address, size_bytes, ctypes.c_uint(_MLOCK_ONFAULT)) == 0)

    def contradiction(self, field: str, value: object, expected: str) -> RingError:
        """Make the error that says which memory contradicts us, and how."""
        return RingError(f"shared memory {self.name!r}", field, value, expected)

    def check_generation(self) -> None:
        """Raise RingError when the region was emptied since we attached."""
        if self.words[GENERATION] != self.generation:
            raise self.contradiction("generation", self.words[GENERATION], str(self.generation))

    def _check(self, field: str, found: object, expected: object) -> None:
        if found != expected:
            raise self.contradiction(field, found, str(expected))


class LockFile:
    """An empty file that exists for its byte ranges: one for each object that processes take turns with.

    Make one in the supervisor, before the first fork, and let every process keep exactly this descriptor
    open until it ends. A process that closes *any* descriptor of the file loses all locks it has on it:
    so the file is never mapped (mmap duplicates the descriptor and closes the duplicate) and never reopened.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def create(cls) -> "LockFile":
        """Raises SystemCallError."""
        try:
            descriptor = _memfd("locks")
        except OSError as error:
            raise _refused("locks", 0, error) from None
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
        return cls(descriptor)

    def lock(self, number: int) -> "RecordLock":
        """The lock of object `number`."""
        return RecordLock(self.descriptor, number)

    def close(self) -> None:
        """Close the file, which drops every lock this process has on it."""
        os.close(self.descriptor)
        self.descriptor = -1


class RecordLock:
    """A POSIX record lock on one byte: excludes other processes, and ends with the process that has it.

    The kernel drops it when the holder dies, before a parent can reap it. 0.5 us to take and drop.

    Traps, each with a test:
    - It belongs to the process, not to this object: within one process a second `try_take` succeeds, and one
      `drop` ends both. A fork does not inherit it. Never use it between threads.
    - It is not flock() nor an OFD lock: those belong to the open file description, which forked processes
      share, so they neither exclude the other process nor end with the one that took them.
    - A holder that is stopped keeps it. Whoever waits in `hold` then waits until the holder is killed.
    - Holding two at once can end in EDEADLK; nobody waits for one while holding another.
    """

    __slots__ = ("_descriptor", "_number")

    def __init__(self, descriptor: int, number: int) -> None:
        self._descriptor = descriptor
        self._number = number

    def try_take(self) -> bool:
        """Take the lock unless another process has it; never waits."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._number)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def drop(self) -> None:
        """Let others have it. A system call that takes a lock in the kernel: stores before it are visible."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._number)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the lock and have it for the length of the block, in which no call may block."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, self._number)
        try:
            yield
        finally:
            self.drop()


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of the C API, the only way to learn where read-only memory lies."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address(view: memoryview) -> int:
    """Where the memory behind a view begins."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def _memfd(name: str) -> int:
    """An anonymous file that is closed on exec, can be sealed, and where possible can never be executed."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(f"nebula-mp:{name}", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(f"nebula-mp:{name}", flags)


def _refused(name: str, size_bytes: int, error: OSError) -> SystemCallError:
    why = errno.errorcode.get(error.errno or 0, str(error))
    hint = {
        errno.ENOMEM: "free memory, or lower the number of workers",
        errno.ENOSPC: "free memory, or lower the number of workers",
        errno.EMFILE: "raise LimitNOFILE (ulimit -n)",
        errno.ENFILE: "raise fs.file-max",
        errno.ENOENT: "mount /proc",
    }.get(error.errno or 0, "a sandbox may forbid memfd_create, mmap or /proc")
    return SystemCallError(f"shared memory {name!r} of {size_bytes} bytes: refused ({why}): {hint}")
