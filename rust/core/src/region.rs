//! A region of shared memory as one process maps it; as `nebula_mp.shm.Mapping`, whose checks it makes.
//!
//! Knows the header that every region begins with; knows nothing of what follows it, nor of processes and roles.
//!
//! Other processes may write to a region at any time, also ones gone mad. So it gives no reference to its bytes but to
//! who promises that they are his alone (`slice`, `slice_mut`): everything else is a load or a store of an atomic
//! word, or a copy of bytes that is made of such loads. What was loaded is checked before it is used.
//!
//! The rights are those of the descriptor: a store to a region that was attached read-only is a fault, as it is for
//! anybody who maps it. Sizes are sealed, so no process can make another one's access fail.
//!
//! Source: memfd_create(2), fcntl(2) on seals, mmap(2), madvise(2), mlock2(2).

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering};

use crate::error::{Fault, Result};

/// Bytes of the header that every region begins with.
pub const HEADER_BYTES: usize = 64;
/// Regions' tables begin behind their first page.
pub const PAGE_BYTES: usize = 4096;
/// Most numbers that a layout is told by its header.
pub const PARAMETERS_MAX: usize = 4;

// Word indexes of the header; magic is word 0, the version the lower half of word 1.
const GENERATION: usize = 2;
const SIZE: usize = 3;
const PARAMETERS: usize = 4;

const SIZE_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// What a region contains: `shm.Layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// For messages.
    pub name: &'static str,
    /// First 8 bytes.
    pub magic: &'static [u8; 8],
    /// Any change of offsets or meanings has a new one.
    pub version: u32,
}

/// One process's view of a region whose header was found right. Unmapped when it is dropped.
///
/// Offsets are in bytes and indexes in words of the whole region, header included; one beyond its end is a mistake
/// of our own code, and a panic.
pub struct Region {
    base: NonNull<u8>,
    size_bytes: usize,
    generation: u64,
    parameters: [u64; PARAMETERS_MAX],
    name: String,
    writable: bool,
    protected_in: Option<u32>,
}

impl Region {
    /// Attach to the region behind `descriptor`, which is borrowed: the caller may close it afterwards. The rights are
    /// those of the descriptor; where `writable` is asked for and not given (or the reverse), and for every
    /// contradiction of the header, this is a `Contradiction`. `name` tells regions of one layout apart.
    pub fn attach(descriptor: i32, layout: &Layout, writable: bool, name: &str) -> Result<Self> {
        let name = format!("{} {name}", layout.name).trim_end().to_string();
        check(
            &name,
            "access of the descriptor",
            access(descriptor)?,
            if writable { "read-write" } else { "read-only" },
        )?;
        // SAFETY: fcntl with F_GET_SEALS takes no pointer.
        let seals = unsafe { libc::fcntl(descriptor, libc::F_GET_SEALS) };
        // -1: a file that cannot be sealed
        let seals = if seals < 0 { 0 } else { seals & SIZE_SEALS };
        check(&name, "set of size seals", seals, SIZE_SEALS)?;
        let size_bytes = size_of(descriptor)?;
        if size_bytes < HEADER_BYTES || size_bytes % 8 != 0 {
            let expected = "room for a header and whole words";
            return Err(Fault::contradiction(&name, "size", size_bytes, expected));
        }
        let mut region = Self {
            base: map(descriptor, size_bytes, writable)
                .map_err(|it| refused(&name, size_bytes, &it))?,
            size_bytes,
            generation: 0,
            parameters: [0; PARAMETERS_MAX],
            name,
            writable,
            protected_in: None,
        };
        region.read_header(layout)?;
        Ok(region)
    }

    /// Each word is loaded once: a process that may write here may also change its mind.
    fn read_header(&mut self, layout: &Layout) -> Result<()> {
        let mut header = [0; HEADER_BYTES];
        self.copy(0, &mut header);
        let word = |index: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[8 * index..8 * index + 8]);
            u64::from_le_bytes(bytes)
        };
        let (found, expected) = (Spelled(&header[..8]), Spelled(layout.magic));
        if found.0 != expected.0 {
            return Err(self.contradiction("magic", found, expected));
        }
        check(&self.name, "layout version", word(1) as u32, layout.version)?;
        check(&self.name, "size", word(SIZE), self.size_bytes as u64)?;
        if word(GENERATION) == 0 {
            return Err(self.contradiction("generation", 0, "1 or more"));
        }
        self.generation = word(GENERATION);
        self.parameters = std::array::from_fn(|number| word(PARAMETERS + number));
        Ok(())
    }

    /// Keep memory with secrets out of core dumps and out of children that this process forks.
    ///
    /// In such a child any use of it is a fault: it has to attach for itself. The pages stay out of swap too, where the
    /// limit of locked memory allows that (`LimitMEMLOCK`); gives whether it does.
    pub fn protect(&mut self) -> Result<bool> {
        let (at, size_bytes) = (self.base.as_ptr().cast(), self.size_bytes);
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // SAFETY: the range is ours and stays mapped; neither advice changes what it holds.
            if unsafe { libc::madvise(at, size_bytes, advice) } != 0 {
                return Err(refused(&self.name, size_bytes, &io::Error::last_os_error()));
            }
            self.protected_in = Some(std::process::id());
        }
        // Locked when it is first used, so that locking costs no memory.
        // SAFETY: the range is ours, and locking changes nothing in it.
        Ok(unsafe { libc::mlock2(at, size_bytes, libc::MLOCK_ONFAULT as libc::c_uint) } == 0)
    }

    /// For messages: layout and name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Of the whole region, in bytes.
    pub fn size(&self) -> usize {
        self.size_bytes
    }

    /// 1 and up; a region that was emptied for a successor has a new one.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What the layout wanted to be told.
    pub fn parameters(&self) -> &[u64; PARAMETERS_MAX] {
        &self.parameters
    }

    /// Whether it may be stored to.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it is still of the generation that we attached to.
    #[inline]
    pub fn check_generation(&self) -> Result<()> {
        let found = self.word(GENERATION).load(Ordering::Relaxed);
        if found != self.generation {
            return Err(self.contradiction("generation", found, self.generation));
        }
        Ok(())
    }

    /// Make the fault that says which memory contradicts us, and how.
    #[cold]
    pub fn contradiction(
        &self,
        field: impl Into<Cow<'static, str>>,
        value: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Fault {
        Fault::contradiction(&self.name, field, value, expected)
    }

    /// All words.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the region is mapped while self lives, and its base is that of a page; u64 has no invalid values.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.size_bytes / 8) }
    }

    /// Word `index`.
    #[inline]
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.size_bytes / 8);
        // SAFETY: within the region, which is mapped while self lives; aligned, since the base is that of a page.
        unsafe { &*self.base.as_ptr().cast::<AtomicU64>().add(index) }
    }

    /// Half of a word: number `index` of the region's u32.
    #[inline]
    pub fn half(&self, index: usize) -> &AtomicU32 {
        assert!(index < self.size_bytes / 4);
        // SAFETY: as in `word`.
        unsafe { &*self.base.as_ptr().cast::<AtomicU32>().add(index) }
    }

    /// The byte at `at`.
    #[inline]
    pub fn byte(&self, at: usize) -> &AtomicU8 {
        assert!(at < self.size_bytes);
        // SAFETY: as in `word`.
        unsafe { &*self.base.as_ptr().cast::<AtomicU8>().add(at) }
    }

    /// Copy what is at `at`, as it is while somebody may be writing there: each whole word is loaded once.
    #[inline]
    pub fn copy(&self, at: usize, into: &mut [u8]) {
        assert!(at <= self.size_bytes && into.len() <= self.size_bytes - at);
        let (head, words) = split(at, into.len());
        let (first, rest) = into.split_at_mut(head);
        let (middle, last) = rest.split_at_mut(8 * words);
        for (number, byte) in first.iter_mut().enumerate() {
            *byte = self.byte(at + number).load(Ordering::Relaxed);
        }
        let from = (at + head) / 8;
        for (number, word) in middle.chunks_exact_mut(8).enumerate() {
            let loaded = self.word(from + number).load(Ordering::Relaxed);
            word.copy_from_slice(&loaded.to_le_bytes());
        }
        let from = at + head + 8 * words;
        for (number, byte) in last.iter_mut().enumerate() {
            *byte = self.byte(from + number).load(Ordering::Relaxed);
        }
    }

    /// Store `bytes` at `at`, where somebody may be reading: each whole word is stored at once.
    #[inline]
    pub fn store(&self, at: usize, bytes: &[u8]) {
        assert!(self.writable);
        assert!(at <= self.size_bytes && bytes.len() <= self.size_bytes - at);
        let (head, words) = split(at, bytes.len());
        let (first, rest) = bytes.split_at(head);
        let (middle, last) = rest.split_at(8 * words);
        for (number, byte) in first.iter().enumerate() {
            self.byte(at + number).store(*byte, Ordering::Relaxed);
        }
        let from = (at + head) / 8;
        for (number, word) in middle.chunks_exact(8).enumerate() {
            let mut whole = [0; 8];
            whole.copy_from_slice(word);
            self.word(from + number)
                .store(u64::from_le_bytes(whole), Ordering::Relaxed);
        }
        let from = at + head + 8 * words;
        for (number, byte) in last.iter().enumerate() {
            self.byte(from + number).store(*byte, Ordering::Relaxed);
        }
    }

    /// Bytes that nobody changes while they are borrowed.
    ///
    /// # Safety
    /// By protocol no process writes `length` bytes from `at` on before the borrow ends.
    #[inline]
    pub unsafe fn slice(&self, at: usize, length: usize) -> &[u8] {
        assert!(at <= self.size_bytes && length <= self.size_bytes - at);
        // SAFETY: within the region; that nobody writes there is the caller's promise.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(at), length) }
    }

    /// Bytes that are ours alone while they are borrowed.
    ///
    /// # Safety
    /// By protocol no process reads or writes `length` bytes from `at` on before the borrow ends, and this process has
    /// no other reference to any of them.
    #[inline]
    pub unsafe fn slice_mut(&mut self, at: usize, length: usize) -> &mut [u8] {
        assert!(self.writable);
        assert!(at <= self.size_bytes && length <= self.size_bytes - at);
        // SAFETY: within the region, which is mapped writable; that nobody else is there is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(at), length) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // A forked child does not have what was protected: by then something else may lie at its addresses.
        if self
            .protected_in
            .is_none_or(|process| process == std::process::id())
        {
            // SAFETY: mapped by `attach`, and no reference to it outlives self.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.size_bytes) };
        }
    }
}

/// How many bytes come before the first whole word of `length` bytes at `at`, and how many words then.
fn split(at: usize, length: usize) -> (usize, usize) {
    let head = (at.wrapping_neg() % 8).min(length);
    (head, (length - head) / 8)
}

/// Bytes as Python spells them.
struct Spelled<'a>(&'a [u8]);

impl fmt::Display for Spelled<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "b'{}'", self.0.escape_ascii())
    }
}

fn check<T: PartialEq + fmt::Display>(
    name: &str,
    field: &'static str,
    found: T,
    expected: T,
) -> Result<()> {
    if found != expected {
        return Err(Fault::contradiction(name, field, found, expected));
    }
    Ok(())
}

fn access(descriptor: i32) -> Result<&'static str> {
    // SAFETY: fcntl with F_GETFL takes no pointer.
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFL) };
    if flags < 0 {
        return Err(lost());
    }
    Ok(match flags & libc::O_ACCMODE {
        libc::O_RDONLY => "read-only",
        libc::O_WRONLY => "write-only",
        _ => "read-write",
    })
}

fn size_of(descriptor: i32) -> Result<usize> {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat writes to the buffer it is given, or fails.
    if unsafe { libc::fstat(descriptor, status.as_mut_ptr()) } != 0 {
        return Err(lost());
    }
    // SAFETY: fstat has filled it.
    let status = unsafe { status.assume_init() };
    Ok(usize::try_from(status.st_size).unwrap_or(0))
}

fn map(descriptor: i32, size_bytes: usize, writable: bool) -> io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
    // SAFETY: a new mapping at an address that the kernel chooses; no memory of ours is touched.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size_bytes,
            protection,
            libc::MAP_SHARED,
            descriptor,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
}

fn lost() -> Fault {
    Fault::Lost(io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

/// As `shm._refused`.
fn refused(name: &str, size_bytes: usize, error: &io::Error) -> Fault {
    let why = match error.raw_os_error() {
        Some(libc::EACCES) => "EACCES".to_string(),
        Some(libc::EAGAIN) => "EAGAIN".to_string(),
        Some(libc::EINVAL) => "EINVAL".to_string(),
        Some(libc::EMFILE) => "EMFILE".to_string(),
        Some(libc::ENFILE) => "ENFILE".to_string(),
        Some(libc::ENODEV) => "ENODEV".to_string(),
        Some(libc::ENOMEM) => "ENOMEM".to_string(),
        Some(libc::EOVERFLOW) => "EOVERFLOW".to_string(),
        Some(libc::EPERM) => "EPERM".to_string(),
        _ => error.to_string(),
    };
    let hint = match error.raw_os_error() {
        Some(libc::ENOMEM) => "free memory, or lower the number of workers",
        Some(libc::ENFILE) => "raise fs.file-max",
        _ => "a sandbox may forbid memfd_create, mmap or /proc",
    };
    Fault::Refused(format!(
        "shared memory '{name}' of {size_bytes} bytes: refused ({why}): {hint}"
    ))
}

#[cfg(all(test, not(miri)))]
mod tests;
