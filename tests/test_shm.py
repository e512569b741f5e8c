import contextlib
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nebula_mp import shm
from nebula_mp.errors import RingError, SystemCallError
from nebula_mp.shm import (
    GENERATION,
    HEADER_BYTES,
    HEADER_WORDS,
    PAGE_BYTES,
    U64_MAX,
    Layout,
    LockFile,
    Mapping,
    Region,
    load_word,
    require_ordered_stores,
)
from tests.support.processes import Forked, Keep, eventually, forked, vm_flags

LAYOUT = Layout("test", b"nmp:test", 3)
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE = 4
NOBODY_ID = 65_534


@pytest.fixture
def keep() -> Iterator[Keep]:
    with Keep() as keeper:
        yield keeper


@pytest.fixture
def region(keep: Keep) -> Region:
    return keep(Region.create(LAYOUT, 2 * PAGE_BYTES, (7, 8), name="a/0"))


@pytest.fixture
def locks(keep: Keep) -> LockFile:
    return keep(LockFile.create())


# Regions.


def test_who_attaches_sees_zeros_behind_a_header_that_says_what_the_region_is(region: Region) -> None:
    mapping = Mapping(region.descriptor, LAYOUT, writable=True)

    assert (mapping.generation, mapping.size_bytes, mapping.parameters) == (1, 2 * PAGE_BYTES, (7, 8, 0, 0))
    assert bytes(mapping.data[:HEADER_BYTES]) == struct.pack(
        "<8sIIQQ4Q", b"nmp:test", 3, 0, 1, 2 * PAGE_BYTES, 7, 8, 0, 0
    )
    assert mapping.words[GENERATION] == 1
    assert not any(mapping.data[HEADER_BYTES:])


def test_a_store_is_seen_in_every_process_and_through_words_and_bytes_alike(region: Region) -> None:
    writer = Mapping(region.descriptor, LAYOUT, writable=True)
    reader = Mapping(region.read_only, LAYOUT, writable=False)

    with forked(lambda: writer.words.__setitem__(600, 0x0102030405060708)) as child:
        assert child.wait() == 0

    assert reader.words[600] == 0x0102030405060708
    assert bytes(reader.data[4800:4808]) == bytes.fromhex("0807060504030201")
    assert load_word(region.descriptor, 600) == 0x0102030405060708


def test_the_maker_stores_and_loads_words_without_a_mapping(region: Region) -> None:
    mapping = Mapping(region.read_only, LAYOUT, writable=False)

    region.store_word(1023, U64_MAX)

    assert mapping.words[1023] == U64_MAX
    assert load_word(region.read_only, 1023) == U64_MAX


def test_no_reader_ever_sees_half_of_a_store(region: Region) -> None:
    """The two values differ in every byte; a store byte by byte is caught here within milliseconds."""
    words = Mapping(region.read_only, LAYOUT, writable=False).words

    def flip() -> None:
        own = Mapping(region.descriptor, LAYOUT, writable=True).words
        while True:
            own[100] = U64_MAX
            own[100] = 0

    with forked(flip):
        assert eventually(lambda: words[100] == U64_MAX)
        end = time.monotonic() + 0.4
        seen = set()
        while time.monotonic() < end:
            seen.update([words[100] for _ in range(1000)])

    assert seen == {0, U64_MAX}


def test_a_renewed_region_has_a_new_generation_and_an_empty_first_page_and_the_old_view_says_so(
    region: Region,
) -> None:
    old = Mapping(region.descriptor, LAYOUT, writable=True)
    old.words[8] = old.words[511] = old.words[512] = 5
    old.check_generation()

    region.renew(2)

    new = Mapping(region.descriptor, LAYOUT, writable=True)
    new.check_generation()
    assert (new.generation, new.parameters) == (2, (7, 8, 0, 0))
    assert [new.words[index] for index in (8, 511, 512)] == [0, 0, 5]
    with pytest.raises(RingError, match="shared memory 'test': generation is 2, expected 1"):
        old.check_generation()


@pytest.mark.parametrize(
    ("offset", "patch", "text"),
    [
        pytest.param(0, b"nmp:Test", "magic is b'nmp:Test', expected b'nmp:test'", id="magic"),
        pytest.param(8, b"\x04", "layout version is 4, expected 3", id="version"),
        pytest.param(16, bytes(8), "generation is 0, expected 1 or more", id="generation"),
        pytest.param(24, b"\x08", "size is 8200, expected 8192", id="size"),
    ],
)
def test_a_wrong_header_is_refused_and_the_error_names_region_field_and_value(
    region: Region, offset: int, patch: bytes, text: str
) -> None:
    os.pwrite(region.descriptor, patch, offset)

    with pytest.raises(RingError, match=f"shared memory 'test a/0': {text}") as caught:
        Mapping(region.read_only, LAYOUT, writable=False, name="a/0")

    assert text.startswith(f"{caught.value.field} is {caught.value.value}, expected")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        pytest.param(HEADER_BYTES - 8, "size is 56", id="too small for a header"),
        pytest.param(HEADER_BYTES + 4, "size is 68", id="half a word at its end"),
    ],
)
def test_a_region_of_an_impossible_size_is_refused(size_bytes: int, text: str) -> None:
    descriptor = os.memfd_create("odd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with pytest.raises(RingError, match=text):
            Mapping(descriptor, LAYOUT, writable=True)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_a_region_whose_size_may_change_is_refused(seals: int, region: Region) -> None:
    descriptor = os.memfd_create("open", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.pwrite(descriptor, os.pread(region.descriptor, 2 * PAGE_BYTES, 0), 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        with pytest.raises(RingError, match="set of size seals is"):
            Mapping(descriptor, LAYOUT, writable=True)
    finally:
        os.close(descriptor)


def test_a_file_that_cannot_be_sealed_is_refused() -> None:
    descriptor = os.open("/dev/zero", os.O_RDWR)
    try:
        with pytest.raises(RingError, match="set of size seals is 0"):
            Mapping(descriptor, LAYOUT, writable=True)
    finally:
        os.close(descriptor)


def test_nobody_can_change_the_size_of_a_region_or_seal_it_against_its_writer(region: Region) -> None:
    for size in (0, PAGE_BYTES, 3 * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(region.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    assert os.fstat(region.descriptor).st_size == 2 * PAGE_BYTES


@pytest.mark.parametrize(
    ("layout", "size_bytes", "parameters", "generation"),
    [
        pytest.param(Layout("test", b"short", 1), 4096, (), 1, id="magic of 5 bytes"),
        pytest.param(LAYOUT, HEADER_BYTES - 8, (), 1, id="no room for the header"),
        pytest.param(LAYOUT, HEADER_BYTES + 4, (), 1, id="half a word"),
        pytest.param(LAYOUT, 4096, (1, 2, 3, 4, 5), 1, id="five parameters"),
        pytest.param(LAYOUT, 4096, (), 0, id="generation 0"),
        pytest.param(LAYOUT, 4096, (), U64_MAX + 1, id="generation too large"),
    ],
)
def test_our_own_code_cannot_make_an_impossible_region(
    layout: Layout, size_bytes: int, parameters: tuple[int, ...], generation: int
) -> None:
    before = open_descriptors()

    with pytest.raises(AssertionError):
        Region.create(layout, size_bytes, parameters, generation=generation)

    assert open_descriptors() == before


def test_the_smallest_region_is_its_header_with_four_parameters(keep: Keep) -> None:
    region = keep(Region.create(LAYOUT, HEADER_BYTES, (1, 2, 3, U64_MAX), generation=U64_MAX))

    mapping = Mapping(region.read_only, LAYOUT, writable=False)

    assert (region.generation, mapping.generation) == (U64_MAX, U64_MAX)
    assert mapping.parameters == (1, 2, 3, U64_MAX)
    assert len(mapping.words) == HEADER_WORDS == 8
    assert mapping.words[GENERATION] == 0xFFFF_FFFF_FFFF_FFFF


def test_a_region_can_be_reserved_or_take_memory_page_by_page(keep: Keep) -> None:
    reserved = keep(Region.create(LAYOUT, 64 * PAGE_BYTES))
    sparse = keep(Region.create(LAYOUT, 64 * PAGE_BYTES, reserve=False))

    blocks = [os.fstat(region.descriptor).st_blocks * 512 for region in (reserved, sparse)]

    assert blocks == [64 * PAGE_BYTES, PAGE_BYTES]


def test_a_region_leaves_no_name_in_the_file_system_and_is_closed_on_exec(region: Region) -> None:
    for descriptor in (region.descriptor, region.read_only):
        link = Path(f"/proc/self/fd/{descriptor}").readlink()
        assert str(link) == "/memfd:nebula-mp:test a/0 (deleted)"
        assert not os.get_inheritable(descriptor)


def test_a_region_can_never_be_executed(region: Region) -> None:
    assert os.fstat(region.descriptor).st_mode & 0o777 == 0o400
    with contextlib.suppress(PermissionError):  # Linux 6.3 and later refuse
        os.fchmod(region.descriptor, 0o500)
        assert os.uname().release < "6.3"


# Read-only.


def test_a_read_only_view_cannot_be_stored_to(region: Region) -> None:
    mapping = Mapping(region.read_only, LAYOUT, writable=False)

    for view in (mapping.data, mapping.words):
        assert view.readonly
        with pytest.raises(TypeError):
            view[100] = 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(region.read_only, b"x", 100)


@pytest.mark.parametrize("writable", [False, True])
def test_a_descriptor_with_more_or_fewer_rights_than_were_asked_for_is_refused(
    region: Region, *, writable: bool
) -> None:
    wrong = region.read_only if writable else region.descriptor

    with pytest.raises(RingError, match="access of the descriptor is read"):
        Mapping(wrong, LAYOUT, writable=writable)


def address_of(memory: mmap.mmap) -> int:
    """Where a mapping lies, also a read-only one."""
    view = (ctypes.c_size_t * 16)()
    py_buffer = ctypes.pythonapi.PyObject_GetBuffer
    assert py_buffer(ctypes.py_object(memory), view, 0) == 0
    try:
        return int(view[0])
    finally:
        ctypes.pythonapi.PyBuffer_Release(view)


def make_writable(memory: mmap.mmap) -> str:
    """What mprotect says to it."""
    ctypes.set_errno(0)
    wanted = mmap.PROT_READ | mmap.PROT_WRITE
    LIBC.mprotect(ctypes.c_void_p(address_of(memory)), ctypes.c_size_t(len(memory)), wanted)
    return errno.errorcode.get(ctypes.get_errno(), "done")


def test_a_read_only_view_cannot_be_made_writable_again(region: Region) -> None:
    mapping = Mapping(region.read_only, LAYOUT, writable=False)

    assert isinstance(mapping.data.obj, mmap.mmap)
    assert make_writable(mapping.data.obj) == "EACCES"


def test_a_prot_read_mapping_of_a_writable_descriptor_could_be_which_is_why_there_are_two_descriptors(
    region: Region,
) -> None:
    with mmap.mmap(region.descriptor, 2 * PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        assert make_writable(memory) == "done"


def test_another_user_cannot_open_a_read_only_descriptor_again_for_writing(region: Region) -> None:
    def attempt() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY_ID, NOBODY_ID, NOBODY_ID)
            os.setresuid(NOBODY_ID, NOBODY_ID, NOBODY_ID)
            LIBC.prctl(PR_SET_DUMPABLE, 1)  # so that only the region's own mode stands in the way
            with pytest.raises(PermissionError):
                os.fchmod(region.read_only, 0o600)
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{region.read_only}", os.O_RDWR)

    with forked(attempt) as child:
        assert child.wait() == 0


# Descriptors.


def open_descriptors() -> set[str]:
    gc.collect()  # what earlier tests left in cycles may hold descriptors, and close them at any moment
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("writable", [True, False])
def test_protected_memory_is_neither_dumped_nor_inherited(region: Region, writable: bool) -> None:
    descriptor = region.descriptor if writable else region.read_only
    mapping = Mapping(descriptor, LAYOUT, writable=writable)
    [before] = vm_flags("test a/0")

    mapping.protect()

    [flags] = vm_flags("test a/0")
    assert not {"dd", "dc", "lo"} & before
    assert {"dd", "dc"} <= flags
    with forked(lambda: check(vm_flags("test a/0") == [])) as child:
        assert child.wait() == 0
    assert mapping.words[GENERATION] == 1


def check(condition: bool) -> None:
    assert condition


@pytest.mark.parametrize("allowed", [True, False])
def test_protected_memory_is_locked_page_by_page_as_far_as_the_limit_allows(
    keep: Keep, allowed: bool
) -> None:
    large = keep(Region.create(LAYOUT, 8 * PAGE_BYTES, name="large", reserve=False))

    def protect() -> None:
        _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 * PAGE_BYTES if allowed else 0, most))
        if os.geteuid() == 0:  # root has no limit
            os.setgroups([])
            os.setresuid(NOBODY_ID, NOBODY_ID, NOBODY_ID)
        mapping = Mapping(large.descriptor, LAYOUT, writable=True)
        assert mapping.protect() is allowed
        mapping.words[100] = 1
        assert mapping.words[100] == 1

    with forked(protect) as child:
        assert child.wait() == 0
    # Nothing was taken for pages that nobody uses.
    assert os.fstat(large.descriptor).st_blocks * 512 == PAGE_BYTES


def test_a_kernel_that_cannot_protect_memory_is_refused(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = Mapping(region.descriptor, LAYOUT, writable=True)
    monkeypatch.setattr(mmap, "MADV_DONTDUMP", 12_345)

    with pytest.raises(SystemCallError, match=r"shared memory 'test' .*refused \(EINVAL\)"):
        mapping.protect()


def test_a_c_library_that_cannot_lock_page_by_page_leaves_memory_unlocked(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = Mapping(region.descriptor, LAYOUT, writable=True)
    monkeypatch.setattr(shm, "_libc", object())

    assert not mapping.protect()

    assert "lo" not in vm_flags("test a/0")[0]


def test_a_child_that_forgets_protected_memory_it_never_had_loses_nothing_of_its_own(region: Region) -> None:
    mapping = [Mapping(region.descriptor, LAYOUT, writable=True)]
    mapping[0].protect()
    address, size = shm._address(mapping[0].data), mapping[0].size_bytes
    take = LIBC.mmap
    take.restype = ctypes.c_void_p
    take.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def forget() -> None:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        assert take(address, size, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0) == address
        ctypes.memset(address, 7, size)
        mapping.clear()
        gc.collect()
        assert ctypes.string_at(address, size) == bytes([7]) * size

    with forked(forget) as child:
        assert child.wait() == 0


def test_a_mapping_outlives_its_descriptor_and_gives_its_own_back_when_it_is_forgotten(keep: Keep) -> None:
    region = keep(Region.create(LAYOUT, PAGE_BYTES))
    before = open_descriptors()
    mapping = Mapping(region.descriptor, LAYOUT, writable=True)
    view = mapping.words[8:10]
    region.close()

    del mapping
    view[0] = 5

    assert view[0] == 5
    del view
    assert len(open_descriptors()) == len(before) - 2


def test_a_region_may_be_closed_twice() -> None:
    region = Region.create(LAYOUT, PAGE_BYTES)
    region.close()

    region.close()

    assert (region.descriptor, region.read_only) == (-1, -1)


def test_refused_regions_leave_no_descriptor_behind(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    os.pwrite(region.descriptor, b"?", 0)
    for _ in range(3):
        with pytest.raises(RingError):
            Mapping(region.descriptor, LAYOUT, writable=True)
    for call in ("ftruncate", "posix_fallocate", "fchmod", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse(errno.ENOSPC))
            with pytest.raises(SystemCallError):
                Region.create(LAYOUT, PAGE_BYTES)

    assert open_descriptors() == before


def refuse(code: int) -> Callable[..., None]:
    def call(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free memory, or lower the number of workers"),
        (errno.ENOMEM, "free memory, or lower the number of workers"),
        (errno.EMFILE, "raise LimitNOFILE"),
        (errno.ENFILE, "raise fs.file-max"),
        (errno.EPERM, "a sandbox may forbid memfd_create"),
    ],
)
def test_a_refusal_of_the_kernel_says_what_it_was_for_and_what_to_do(
    code: int, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "memfd_create", refuse(code))

    text = f"shared memory 'test b/1' of 8192 bytes: refused .{errno.errorcode[code]}.: {hint}"
    with pytest.raises(SystemCallError, match=text):
        Region.create(LAYOUT, 8192, name="b/1")
    with pytest.raises(
        SystemCallError, match=f"'locks' of 0 bytes: refused .{errno.errorcode[code]}.: {hint}"
    ):
        LockFile.create()


def test_a_refused_mapping_is_a_system_call_error(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", refuse(errno.ENOMEM))

    with pytest.raises(SystemCallError, match="'test' of 8192 bytes: refused"):
        Mapping(region.read_only, LAYOUT, writable=False)


def test_only_a_kernel_that_does_not_know_the_no_exec_flag_is_asked_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def refuses(_: str, flags: int) -> int:
        calls.append(flags)
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refuses)
    with pytest.raises(SystemCallError, match="EACCES"):
        Region.create(LAYOUT, PAGE_BYTES)

    assert calls == [11]


def test_a_kernel_that_does_not_know_the_no_exec_flag_gets_a_region_all_the_same(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    memfd_create, flags = os.memfd_create, []

    def old_kernel(name: str, wanted: int) -> int:
        flags.append(wanted)
        if wanted & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return memfd_create(name, wanted)

    monkeypatch.setattr(os, "memfd_create", old_kernel)
    made = keep(Region.create(LAYOUT, PAGE_BYTES))

    assert Mapping(made.descriptor, LAYOUT, writable=True).generation == 1
    assert flags == [11, 3]


# Machines.


@pytest.mark.parametrize(("machine", "pointer_bytes"), [("aarch64", 8), ("x86_64", 4), ("riscv64", 8)])
def test_a_machine_without_ordered_8_byte_stores_is_refused_with_the_way_out(
    machine: str, pointer_bytes: int
) -> None:
    text = f"a {8 * pointer_bytes}-bit Python on {machine}.* install the accelerator .* --kernel rust"
    with pytest.raises(SystemCallError, match=text):
        require_ordered_stores(machine, pointer_bytes)


def test_regions_are_neither_made_nor_mapped_on_such_a_machine(
    region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_ordered_stores()
    uname = os.uname_result(("Linux", "host", "6.1", "#1", "aarch64"))
    monkeypatch.setattr(os, "uname", lambda: uname)

    with pytest.raises(SystemCallError, match="aarch64"):
        Region.create(LAYOUT, PAGE_BYTES)
    with pytest.raises(SystemCallError, match="aarch64"):
        Mapping(region.read_only, LAYOUT, writable=False)


# Record locks.


@contextlib.contextmanager
def holding(locks: LockFile, *numbers: int) -> Iterator[Forked]:
    """A process that has these locks, and stays until it is killed."""
    ready, tell = os.pipe()

    def take() -> None:
        assert all(locks.lock(number).try_take() for number in numbers)
        os.write(tell, b"x")
        while True:
            signal.pause()

    try:
        with forked(take) as child:
            assert os.read(ready, 1) == b"x"
            yield child
    finally:
        os.close(ready)
        os.close(tell)


def taken_elsewhere(locks: LockFile, number: int) -> bool:
    """Whether another process can take the lock."""
    with forked(lambda: os._exit(not locks.lock(number).try_take())) as child:
        return child.wait() == 0


def test_a_lock_excludes_every_other_process_from_its_own_object_only(locks: LockFile) -> None:
    with holding(locks, 3, 5):
        free = [number for number in range(7) if locks.lock(number).try_take()]

    assert free == [0, 1, 2, 4, 6]


def test_a_dropped_lock_can_be_taken_by_another_process(locks: LockFile) -> None:
    lock = locks.lock(1)

    assert lock.try_take()
    assert not taken_elsewhere(locks, 1)
    lock.drop()
    assert taken_elsewhere(locks, 1)


def test_a_lock_ends_with_the_process_that_had_it_before_its_death_is_reported(locks: LockFile) -> None:
    for _ in range(30):
        with holding(locks, 1) as child:
            assert not locks.lock(1).try_take()
            child.kill()
            assert locks.lock(1).try_take()
            locks.lock(1).drop()


def test_a_stopped_process_keeps_its_lock(locks: LockFile) -> None:
    with holding(locks, 1) as child:
        child.stop()
        assert not locks.lock(1).try_take()


def test_whoever_waits_for_a_lock_gets_it_when_its_holder_is_killed(locks: LockFile) -> None:
    ready, tell = os.pipe()

    def wait() -> None:
        with locks.lock(1).hold():
            os.write(tell, b"x")

    try:
        with holding(locks, 1) as holder, forked(wait) as waiter:
            os.set_blocking(ready, False)
            time.sleep(0.05)
            with pytest.raises(BlockingIOError):
                os.read(ready, 1)
            holder.stop()
            holder.kill()
            assert waiter.wait() == 0
            assert os.read(ready, 1) == b"x"
    finally:
        os.close(ready)
        os.close(tell)


def test_while_one_lock_is_held_its_neighbours_are_free(locks: LockFile) -> None:
    with locks.lock(5).hold():
        assert [taken_elsewhere(locks, number) for number in (4, 5, 6)] == [True, False, True]


def test_a_fault_that_is_no_busy_lock_is_an_error(locks: LockFile) -> None:
    lock = locks.lock(1)
    descriptor = os.open("/dev/null", os.O_RDONLY)
    unwritable = LockFile(descriptor).lock(1)

    with pytest.raises(OSError, match="Bad file descriptor"):
        unwritable.try_take()

    os.close(descriptor)
    assert lock.try_take()


def test_a_block_that_fails_gives_its_lock_back(locks: LockFile) -> None:
    with pytest.raises(KeyError), locks.lock(1).hold():
        raise KeyError

    assert taken_elsewhere(locks, 1)


def test_load_add_store_under_a_lock_loses_nothing_and_repeats_nothing_though_processes_are_killed(
    region: Region, locks: LockFile
) -> None:
    """A shared counter, advanced before its values are used: each value is used at most once."""
    # Word indexes; `limit`: how far they may go by now; from `used` on, how often each value was taken.
    total, limit, used = 100, 101, 200
    values = 800
    words = Mapping(region.descriptor, LAYOUT, writable=True).words

    def take_values() -> None:
        own = Mapping(region.descriptor, LAYOUT, writable=True).words
        lock = locks.lock(9)
        while True:
            with lock.hold():
                value = own[total]
                if value == values:
                    return
                if value >= own[limit]:
                    continue
                own[total] = value + 1
            own[used + value] += 1

    deaths = 0
    children = [Forked(take_values) for _ in range(3)]
    try:
        for threshold in range(50, values - 50, 50):
            words[limit] = threshold + 40  # so nobody is done before it is killed
            assert eventually(lambda threshold=threshold: words[total] >= threshold)  # type: ignore[misc]
            victim = children.pop(0)
            deaths += victim.kill() == -signal.SIGKILL
            children.append(Forked(take_values))
        words[limit] = values
        assert [child.wait() for child in children] == [0, 0, 0]
    finally:
        for child in children:
            child.kill()

    assert deaths == 14
    taken = words[used : used + values].tolist()
    assert max(taken) == 1
    assert taken.count(0) <= deaths


def test_within_one_process_a_lock_excludes_nobody_and_one_drop_ends_it_for_all(locks: LockFile) -> None:
    first, second = locks.lock(1), locks.lock(1)
    assert first.try_take()

    assert second.try_take()
    second.drop()

    assert taken_elsewhere(locks, 1)


def test_a_forked_child_does_not_have_its_parents_lock(locks: LockFile) -> None:
    assert locks.lock(1).try_take()

    assert not taken_elsewhere(locks, 1)


def test_closing_any_descriptor_of_the_file_loses_all_locks_so_there_must_be_only_one(
    locks: LockFile,
) -> None:
    assert locks.lock(1).try_take()
    assert locks.lock(2).try_take()

    os.close(os.dup(locks.descriptor))

    assert taken_elsewhere(locks, 1)
    assert taken_elsewhere(locks, 2)


def test_closing_the_lock_file_drops_its_locks_and_gives_the_descriptor_back(keep: Keep) -> None:
    before = open_descriptors()
    locks = LockFile.create()
    other = os.dup(locks.descriptor)
    keep.callback(os.close, other)
    assert locks.lock(1).try_take()

    locks.close()

    assert locks.descriptor == -1
    assert open_descriptors() == before | {str(other)}
    assert taken_elsewhere(LockFile(other), 1)


def test_flock_would_not_exclude_a_forked_process_which_is_why_it_is_not_used(locks: LockFile) -> None:
    fcntl.flock(locks.descriptor, fcntl.LOCK_EX)

    with forked(lambda: fcntl.flock(locks.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)) as child:
        assert child.wait() == 0


def test_the_lock_file_holds_no_byte_and_never_will(locks: LockFile) -> None:
    with pytest.raises(PermissionError):
        os.pwrite(locks.descriptor, b"x", 0)
    with pytest.raises(ValueError, match="empty file"):
        mmap.mmap(locks.descriptor, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(locks.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
