//! Packets for one peer that are given their counters at once, and how they are sealed into an area; as
//! `nebula_mp.datapath.runs`.
//!
//! ```text
//! area   | header | packet 0      | tag | header | packet 1      | tag | ... | header | shorter | tag |
//!        |<------------- stride ------->|<------------- stride ------->|
//! ```
//!
//! Knows where in an area each datagram lies and that its entry is cut every `segment` bytes; knows nothing of
//! tables, and takes no counters itself.

use crate::aead::Key;
use crate::counters::SPAN_MAX;
use crate::filler::Filler;
use crate::header::{write_message, HEADER_BYTES, MESSAGE_IP, OVERHEAD_BYTES, TAG_BYTES};
use crate::segment::Cut;

/// Packets of a run. Of two workers that send to one peer each may then be one run behind the other.
pub const PACKETS_MAX: usize = SPAN_MAX as usize / 2;

/// The tunnel a run is sealed for, and its first counter.
pub struct Target<'a> {
    /// Seals.
    pub key: &'a Key,
    /// The peer's index.
    pub remote_index: u32,
    /// Where the tunnel's row is.
    pub row: u32,
    /// The run has counters from here on.
    pub first: u64,
}

impl Target<'_> {
    /// Seal the packet of `size` bytes that lies behind room for its header at the beginning of `out`.
    #[inline]
    fn seal(&self, number: usize, out: &mut [u8], size: usize) {
        let counter = self.first + number as u64;
        if let Some((header, rest)) = out.split_first_chunk_mut::<HEADER_BYTES>() {
            write_message(header, MESSAGE_IP, self.remote_index, counter);
            self.key
                .seal_in_place(counter, header, &mut rest[..size + TAG_BYTES]);
        }
    }
}

/// Plain packets in the order in which they came, which lie one behind the other.
///
/// Those of equal size that follow each other, and one shorter one behind them, become one entry.
pub struct PlainRun {
    /// Whom they are for; says nothing while there is none.
    pub peer: u64,
    /// Where the first one lies.
    pub start: usize,
    /// Once they are sealed.
    pub size_bytes: usize,
    /// How many entries they become.
    pub entries: usize,
    sizes: Vec<u32>,
    packets_max: usize,
    rule: EntryRule,
}

/// Which packets share an entry.
#[derive(Clone, Copy, Default)]
struct EntryRule {
    size: usize,
    is_open: bool,
}

impl EntryRule {
    /// Add a packet; false if it begins an entry.
    #[inline]
    fn add(&mut self, size: usize) -> bool {
        let joins = self.is_open && size <= self.size;
        if joins {
            self.is_open = size == self.size;
        } else {
            *self = Self {
                size,
                is_open: true,
            };
        }
        joins
    }
}

impl PlainRun {
    /// Without a packet; `packets_max` is allocated now and is the most it takes.
    pub fn new(packets_max: usize) -> Self {
        Self {
            peer: 0,
            start: 0,
            size_bytes: 0,
            entries: 0,
            sizes: Vec::with_capacity(packets_max),
            packets_max,
            rule: EntryRule::default(),
        }
    }

    /// How many packets there are.
    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }

    /// Whether a packet of `size` bytes for `peer` can be added, so that all fit `room_bytes`.
    #[inline]
    pub fn takes(&self, peer: u64, size: usize, room_bytes: usize) -> bool {
        !self.is_empty()
            && self.peer == peer
            && self.size_bytes + size + OVERHEAD_BYTES <= room_bytes
            && self.len() < self.packets_max
    }

    /// Begin, where there is none, with packets for `peer`, of which the first lies at `start`.
    pub fn begin(&mut self, peer: u64, start: usize) {
        self.clear();
        self.peer = peer;
        self.start = start;
    }

    /// Add the packet that lies behind the last one.
    #[inline]
    pub fn append(&mut self, size: usize) {
        self.sizes.push(size as u32);
        self.size_bytes += size + OVERHEAD_BYTES;
        if !self.rule.add(size) {
            self.entries += 1;
        }
    }

    /// Forget them all.
    pub fn clear(&mut self) {
        self.sizes.clear();
        self.size_bytes = 0;
        self.entries = 0;
        self.rule = EntryRule::default();
    }

    /// Each packet by itself; `arena` is where they lie.
    pub fn packets<'a>(&'a self, arena: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let mut at = self.start;
        self.sizes.iter().map(move |size| {
            let begin = at;
            at += *size as usize;
            &arena[begin..at]
        })
    }

    /// Seal them to where `try_room` has made room for all.
    pub fn seal(&self, arena: &[u8], filler: &mut Filler, target: &Target<'_>) {
        let mut rule = EntryRule::default();
        let (mut length, mut segment) = (0, 0);
        for (number, packet) in self.packets(arena).enumerate() {
            let size = packet.len() + OVERHEAD_BYTES;
            if !rule.add(packet.len()) {
                if length > 0 {
                    filler.describe_train(length, segment as u32, target.row);
                }
                (length, segment) = (0, size);
            }
            let begin = filler.at + length;
            let out = &mut filler.data()[begin..begin + size];
            out[HEADER_BYTES..HEADER_BYTES + packet.len()].copy_from_slice(packet);
            target.seal(number, out, packet.len());
            length += size;
        }
        if length > 0 {
            filler.describe_train(length, segment as u32, target.row);
        }
    }
}

/// Where the packets of a superpacket are before they are sealed.
#[derive(Clone, Copy)]
pub enum Payload<'a> {
    /// The whole superpacket as it was read.
    Linear(&'a [u8]),
    /// Each payload behind room for its header, where it will be sealed.
    InPlace,
}

/// From one datagram of a superpacket to the next.
pub fn stride(cut: &Cut) -> usize {
    cut.segment_bytes + OVERHEAD_BYTES
}

/// Bytes that `count` packets of a superpacket, from `first` on, have once they are sealed.
pub fn sealed_bytes(cut: &Cut, first: usize, count: usize) -> usize {
    (count - 1) * stride(cut) + cut.segment_size(first + count - 1) + OVERHEAD_BYTES
}

/// How many packets of a superpacket, from `first` on, make the next run, which fits `room_bytes`; one does.
pub fn next_run(cut: &Cut, first: usize, room_bytes: usize) -> usize {
    let left = cut.count - first;
    if left <= PACKETS_MAX && sealed_bytes(cut, first, left) <= room_bytes {
        left
    } else {
        (room_bytes / stride(cut)).min(PACKETS_MAX).min(left)
    }
}

/// Seal `count` packets of a superpacket, from `first` on, to where `try_room` has made room; one entry.
pub fn seal_super(
    cut: &Cut,
    payload: Payload<'_>,
    first: usize,
    count: usize,
    filler: &mut Filler,
    target: &Target<'_>,
) {
    let (stride, size_bytes) = (stride(cut), sealed_bytes(cut, first, count));
    let begin = filler.at;
    let out = &mut filler.data()[begin..begin + size_bytes];
    // One packet after the other: what was just copied and added up is at hand when it is sealed.
    for number in 0..count {
        let each = &mut out[number * stride..];
        let packet = &mut each[HEADER_BYTES..];
        match payload {
            Payload::Linear(whole) => {
                cut.write_one(whole, first + number, packet);
            }
            Payload::InPlace => cut.stamp(packet, stride, first + number, 1),
        }
        target.seal(number, each, cut.segment_size(first + number));
    }
    filler.describe_train(size_bytes, stride.min(size_bytes) as u32, target.row);
}
