//! Regions for tests, made as the supervisor makes them: `shm.Region` and `shm_ring.RingMemory` in Python.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use crate::layout::{RING_DATA, RING_STATE};
use crate::region::{Layout, Region, PAGE_BYTES};
use crate::ring::{Consumer, Geometry, Producer, Recovery};

/// A region as its maker holds it: a writable descriptor and one that is not, and no mapping. Its layout is kept for
/// `writable` and `read_only`.
pub struct Memory {
    layout: Option<Layout>,
    writer: File,
    reader: File,
}

impl Memory {
    /// A region of zeros behind its header, of generation 1.
    pub fn new(layout: &Layout, size_bytes: usize, parameters: &[u64]) -> Self {
        Self::of_generation(layout, size_bytes, parameters, 1)
    }

    /// As `new`, of another generation.
    pub fn of_generation(
        layout: &Layout,
        size_bytes: usize,
        parameters: &[u64],
        generation: u64,
    ) -> Self {
        let mut memory = Self::bare(size_bytes, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW);
        memory.layout = Some(*layout);
        memory.write_header(layout, size_bytes, parameters, generation);
        memory
    }

    /// As `new`, larger than any memory: only what is used costs anything.
    pub fn sparse(layout: &Layout, size_bytes: usize) -> Self {
        Self::new(layout, size_bytes, &[])
    }

    /// A file of zeros without a header, with these seals.
    pub fn bare(size_bytes: usize, seals: i32) -> Self {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string; the descriptor is new and given to nobody else.
        let writer = unsafe {
            let descriptor = libc::memfd_create(c"nebula-mp:test".as_ptr(), flags);
            assert!(descriptor >= 0);
            File::from_raw_fd(descriptor)
        };
        writer.set_len(size_bytes as u64).unwrap();
        // SAFETY: fcntl with F_ADD_SEALS takes no pointer.
        let sealed = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(sealed, 0);
        let reader = File::open(format!("/proc/self/fd/{}", writer.as_raw_fd())).unwrap();
        Self {
            layout: None,
            writer,
            reader,
        }
    }

    /// Empty the first page and make it one of another generation: `shm.Region.renew`.
    pub fn renew(&self, parameters: &[u64], generation: u64) {
        let size_bytes = self.writer.metadata().unwrap().len() as usize;
        self.patch(0, &vec![0; size_bytes.min(PAGE_BYTES)]);
        self.write_header(&self.layout.unwrap(), size_bytes, parameters, generation);
    }

    fn write_header(
        &self,
        layout: &Layout,
        size_bytes: usize,
        parameters: &[u64],
        generation: u64,
    ) {
        self.patch(0, layout.magic);
        self.patch(8, &layout.version.to_le_bytes());
        self.patch(16, &generation.to_le_bytes());
        self.patch(24, &(size_bytes as u64).to_le_bytes());
        for (number, parameter) in parameters.iter().enumerate() {
            self.patch(32 + 8 * number, &parameter.to_le_bytes());
        }
    }

    /// The descriptor for who may write.
    pub fn writer(&self) -> i32 {
        self.writer.as_raw_fd()
    }

    /// The descriptor for who may only read.
    pub fn reader(&self) -> i32 {
        self.reader.as_raw_fd()
    }

    /// Attach as who may write.
    pub fn writable(&self) -> Region {
        Region::attach(self.writer(), &self.layout.unwrap(), true, "").unwrap()
    }

    /// Attach as who may only read.
    pub fn read_only(&self) -> Region {
        Region::attach(self.reader(), &self.layout.unwrap(), false, "").unwrap()
    }

    /// Overwrite bytes, as a process gone mad could.
    pub fn patch(&self, at: usize, bytes: &[u8]) {
        self.writer.write_all_at(bytes, at as u64).unwrap();
    }

    /// Overwrite a word.
    pub fn patch_word(&self, index: usize, value: u64) {
        self.patch(8 * index, &value.to_le_bytes());
    }

    /// The bytes that are there.
    pub fn bytes(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.reader.read_exact_at(&mut bytes, at as u64).unwrap();
        bytes
    }

    /// The word that is there.
    pub fn word(&self, index: usize) -> u64 {
        let mut bytes = [0; 8];
        self.reader
            .read_exact_at(&mut bytes, 8 * index as u64)
            .unwrap();
        u64::from_le_bytes(bytes)
    }
}

/// A ring of four areas of 512 bytes: 192 for header and table, 320 for data.
pub const SMALL: Geometry = Geometry {
    areas: 4,
    area_bytes: 512,
    entries_max: 8,
};

/// A ring as its maker holds it.
pub struct RingMemory {
    /// The producer's region.
    pub data: Memory,
    /// The consumer's.
    pub state: Memory,
}

impl RingMemory {
    /// An empty ring.
    pub fn new(geometry: Geometry) -> Self {
        let parameters = parameters(geometry);
        Self {
            data: Memory::new(&RING_DATA, geometry.region_bytes(), &parameters),
            state: Memory::new(&RING_STATE, PAGE_BYTES, &[]),
        }
    }

    /// Empty the ring and give it a new generation.
    pub fn reset(&self, geometry: Geometry, generation: u64) {
        self.state.renew(&[], generation);
        self.data.renew(&parameters(geometry), generation);
    }

    /// As a reader attaches that does not drain: the consumer's words are read-only to it.
    pub fn producer(&self, poison: bool) -> Producer {
        Producer::new(self.data.writable(), self.state.read_only(), poison).unwrap()
    }

    /// As a writer attaches: everything of the producer's is read-only to it.
    pub fn consumer(&self, recovery: Recovery, holder: Option<u64>) -> Consumer {
        let (data, state) = (self.data.read_only(), self.state.writable());
        Consumer::new(data, state, holder, recovery, true, 65_536).unwrap()
    }
}

fn parameters(geometry: Geometry) -> [u64; 3] {
    [
        geometry.areas as u64,
        geometry.area_bytes as u64,
        geometry.entries_max as u64,
    ]
}
