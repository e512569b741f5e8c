//! Reads a queue of the TUN device, as a rule to where the packets of a superpacket will be sealed.
//!
//! ```text
//! readv:  virtio | headers, payload 0 | payload 1 | payload 2 | ... | what there is no room for
//!            |           |                  |           |                        |
//!         header | 16 |  v           | 16 | 16 + headers | v | ...             arena
//!                area: | place 0          | place 1          | ...
//! ```
//!
//! A connection that sends superpackets sends more of them with the same headers and payloads, so the next one is read
//! to pieces where its payloads belong, and is not copied again. If something else comes it is put together in the
//! arena, which costs a copy; after a few times in a row the queue is read to the arena again. The area is the
//! producer's until it is published, so whatever is written there in vain does no harm.
//! Knows where bytes come to lie; knows nothing of their meaning.

use crate::error::Result;
use crate::filler::Filler;
use crate::header::{HEADER_BYTES, OVERHEAD_BYTES};
use crate::runs::{sealed_bytes, PACKETS_MAX};
use crate::segment::Cut;
use crate::sys;
use crate::virtio;

/// The most that a device gives at once, without its header.
const PACKET_BYTES_MAX: usize = virtio::PACKET_BYTES_MAX + 40;
const ARENA_BYTES: usize = 4 * PACKET_BYTES_MAX;
/// So many packets of another kind in a row, and the next one is not expected to be as the last superpacket.
const MISSES_MAX: u32 = 4;

/// What a read gave.
pub enum Read {
    /// Nothing waits.
    Nothing,
    /// The device is lost, with this error.
    Lost(i32),
    /// It ended in the header in front of the packet.
    Short,
    /// A packet of so many bytes in the arena, where `TunQueue::at` was.
    Linear(usize),
    /// A packet in pieces.
    Scattered(Scatter),
}

/// A packet that was read to pieces: to places in the area being filled, and the rest to the arena.
#[derive(Debug, Clone, Copy)]
pub struct Scatter {
    /// Number of the area.
    pub area: u64,
    /// Where in the area the first place, with room for the header, begins.
    pub base: usize,
    /// Bytes of the packet.
    pub len: usize,
    header_bytes: usize,
    payload_bytes: usize,
    /// Bytes of the packet that have a place in the area.
    placed: usize,
}

impl Scatter {
    fn stride(&self) -> usize {
        self.header_bytes + self.payload_bytes + OVERHEAD_BYTES
    }

    /// Where the beginning of the packet lies in the area, and how much of it without a gap.
    pub fn head(&self) -> std::ops::Range<usize> {
        let begin = self.base + HEADER_BYTES;
        let whole = (self.header_bytes + self.payload_bytes).min(self.placed);
        begin..begin + self.len.min(whole)
    }

    /// Whether every byte lies where this cut wants it.
    pub fn fits(&self, cut: &Cut) -> bool {
        cut.header_bytes == self.header_bytes
            && cut.payload_bytes == self.payload_bytes
            && self.len <= self.placed
    }
}

/// What the next superpacket may be like.
#[derive(Clone, Copy)]
struct Guess {
    header_bytes: usize,
    payload_bytes: usize,
    /// Of the last one, once it was sealed.
    sealed_bytes: usize,
    misses: u32,
}

/// A queue, and the memory where packets lie until they are sealed.
pub struct TunQueue {
    /// Where in the arena the next packet comes to lie.
    pub at: usize,
    descriptor: i32,
    has_header: bool,
    arena: Box<[u8]>,
    guess: Option<Guess>,
    parts: Vec<libc::iovec>,
}

fn part(memory: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: memory.as_mut_ptr().cast(),
        iov_len: memory.len(),
    }
}

impl TunQueue {
    /// `descriptor` is borrowed; with `has_header` every packet has a virtio header in front.
    pub fn new(descriptor: i32, has_header: bool) -> Self {
        Self {
            at: 0,
            descriptor,
            has_header,
            arena: vec![0; ARENA_BYTES].into_boxed_slice(),
            guess: None,
            parts: Vec::with_capacity(PACKETS_MAX + 2),
        }
    }

    /// Whether there is room to read.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.at + PACKET_BYTES_MAX <= ARENA_BYTES
    }

    /// Where packets lie.
    #[inline]
    pub fn arena(&self) -> &[u8] {
        &self.arena
    }

    /// The packet of `len` bytes that was read last.
    #[inline]
    pub fn last(&mut self, len: usize) -> &mut [u8] {
        &mut self.arena[self.at..self.at + len]
    }

    /// Read a packet, and what stands in front of it to `header`.
    ///
    /// `ahead`: what is to be sealed, in bytes and entries, before anything that is read now.
    pub fn read(
        &mut self,
        header: &mut [u8; virtio::HEADER_BYTES],
        filler: &mut Filler,
        ahead: (usize, usize),
    ) -> Result<Read> {
        self.parts.clear();
        if self.has_header {
            self.parts.push(part(header));
        }
        let at = self.at;
        let scatter = match self.guess {
            Some(guess) => self.aim(&guess, filler, ahead)?,
            None => None,
        };
        let rest = at + scatter.map_or(0, |it| it.placed);
        let end = at + PACKET_BYTES_MAX;
        if rest < end {
            self.parts.push(part(&mut self.arena[rest..end]));
        }
        // SAFETY: the parts are the caller's header, places of the area, which nobody but us uses until it is published,
        // and a part of the arena: all apart from each other, and none is used before the call has returned.
        let result = unsafe { sys::readv(self.descriptor, &self.parts) };
        let size = match result {
            Ok(size) => size,
            Err(libc::EAGAIN) => return Ok(Read::Nothing),
            Err(number) => return Ok(Read::Lost(number)),
        };
        let skipped = if self.has_header {
            virtio::HEADER_BYTES
        } else {
            0
        };
        Ok(match (size.checked_sub(skipped), scatter) {
            (None, _) => Read::Short,
            (Some(len), None) => Read::Linear(len),
            (Some(len), Some(scatter)) => Read::Scattered(Scatter { len, ..scatter }),
        })
    }

    /// Have places in the area for what is expected, and read to them; None if it has no room.
    fn aim(
        &mut self,
        guess: &Guess,
        filler: &mut Filler,
        (bytes, entries): (usize, usize),
    ) -> Result<Option<Scatter>> {
        let &Guess {
            header_bytes,
            payload_bytes,
            sealed_bytes,
            ..
        } = guess;
        let stride = header_bytes + payload_bytes + OVERHEAD_BYTES;
        let room_bytes = filler.room_bytes();
        let needed = bytes + sealed_bytes;
        if needed > room_bytes
            || entries + 1 > filler.entries_max()
            || !filler.try_room(needed, entries + 1, 1)?
        {
            return Ok(None);
        }
        let (base, area) = (filler.at + bytes, filler.area());
        let places = (PACKET_BYTES_MAX - header_bytes)
            .div_ceil(payload_bytes)
            .min(PACKETS_MAX);
        let end = room_bytes.min(base + places * stride);
        let (mut gap, mut placed) = (HEADER_BYTES, header_bytes);
        for place in filler.data()[base..end].chunks_mut(stride) {
            // The last one may have room only for a shorter packet.
            let Some(payload) = place.len().checked_sub(header_bytes + OVERHEAD_BYTES) else {
                break;
            };
            placed += payload;
            let end = HEADER_BYTES + header_bytes + payload;
            self.parts.push(part(&mut place[gap..end]));
            gap = HEADER_BYTES + header_bytes;
        }
        Ok(Some(Scatter {
            area,
            base,
            len: 0,
            header_bytes,
            payload_bytes,
            placed,
        }))
    }

    /// Put a packet together in the arena, as if it had been read there.
    pub fn linearise(&mut self, it: &Scatter, area: &[u8]) {
        let out = &mut self.arena[self.at..self.at + it.len.min(it.placed)];
        let head = it.head();
        let (first, rest) = out.split_at_mut(head.len());
        first.copy_from_slice(&area[head]);
        let mut from = it.base + HEADER_BYTES + it.header_bytes;
        for piece in rest.chunks_mut(it.payload_bytes) {
            from += it.stride();
            piece.copy_from_slice(&area[from..from + piece.len()]);
        }
    }

    /// Expect more superpackets like this one.
    pub fn expect(&mut self, cut: &Cut) {
        // One that needs more places than a run has would not be whole in the area.
        self.guess = (cut.count <= PACKETS_MAX).then(|| Guess {
            header_bytes: cut.header_bytes,
            payload_bytes: cut.payload_bytes,
            sealed_bytes: sealed_bytes(cut, 0, cut.count),
            misses: 0,
        });
    }

    /// Something else came.
    pub fn miss(&mut self) {
        if let Some(guess) = &mut self.guess {
            guess.misses += 1;
            if guess.misses >= MISSES_MAX {
                self.guess = None;
            }
        }
    }
}
