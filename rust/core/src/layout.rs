//! Where every word of the shared memory lies: `shm`, `shm_ring`, `shm_table` and `shm_stats` in Python, with
//! `#[repr(C)]`. `offsets` gives all of them by name, and a test compares them with Python's.
//!
//! Knows offsets, not what the values mean. All numbers are little-endian, addresses in network order. A word that
//! another process may be writing is read through an atomic; the structures here are for copies, and for offsets.

use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::region::{Layout, Region, HEADER_BYTES, PAGE_BYTES};

/// Words of the header that every region begins with.
pub const HEADER_WORDS: usize = HEADER_BYTES / 8;
/// Offset of the first row in every table.
pub const ROWS_AT: usize = PAGE_BYTES;
/// Index of its first word.
pub const ROWS_AT_WORD: usize = PAGE_BYTES / 8;
/// Tunnels, peers and relays: a row is the low half of a local index.
pub const ROWS_MAX: usize = 65_536;
/// Bits of `SendRow::sealers`.
pub const WORKERS_MAX: usize = 64;
/// Rows of a bucket of the flow table.
pub const BUCKET_ROWS: usize = 7;
/// The flow table's index of a bucket is what is left of a hash beside its tag.
pub const BUCKETS_MAX: usize = 1 << 24;

/// Index of the header's generation among a region's words.
pub const GENERATION: usize = 2;
/// Flows: index of the word that says which rules the verdicts are of.
pub const RULES_GENERATION: usize = HEADER_WORDS;
/// Flows: index of the first word of the hash's seeds.
pub const SEEDS: usize = HEADER_WORDS + 1;
/// How many seeds there are.
pub const SEED_COUNT: usize = 6;
/// Flows: index of the first word that says how long a flow holds that a reader admits: TCP, UDP, anything else.
pub const TIMEOUTS: usize = SEEDS + SEED_COUNT;
/// How many of them there are.
pub const TIMEOUT_COUNT: usize = 3;
/// Flows: index of the first word of the bits that say which groups of buckets were ever written to.
pub const USED: usize = PAGE_BYTES / 2 / 8;
/// How many words of them there are.
pub const USED_COUNT: usize = PAGE_BYTES / 2 / 8;
/// Span: index of the word that says whether its worker will still send what it sealed.
pub const LIVE: usize = HEADER_WORDS;
/// Span: index of the word that says from which row on none was ever written.
pub const TOUCHED: usize = HEADER_WORDS + 1;
/// Ring data: index of the word with the areas published.
pub const HEAD: usize = 8;
/// Ring state: index of the word with the areas released.
pub const TAIL: usize = 8;
/// Ring state: index of the word that says who drains.
pub const LEASE: usize = 16;
/// Ring state: index of the word with the entries begun.
pub const PROGRESS: usize = 24;

const fn layout(name: &'static str, magic: &'static [u8; 8]) -> Layout {
    Layout {
        name,
        magic,
        version: 1,
    }
}

/// Rows of tunnels, but for their keys.
pub const TUNNELS: Layout = Layout {
    version: 2,
    ..layout("tunnels", b"nmp:tunl")
};
/// The keys of those rows.
pub const KEYS: Layout = layout("tunnel keys", b"nmp:keys");
/// Current tunnel of each peer.
pub const PEERS: Layout = layout("peers", b"nmp:peer");
/// Paths through relays.
pub const RELAYS: Layout = layout("relays", b"nmp:rela");
/// Verdicts by inner addresses and ports.
pub const FLOWS: Layout = Layout {
    version: 3,
    ..layout("flows", b"nmp:flow")
};
/// When each flow last had a packet.
pub const SEEN: Layout = layout("flows last seen", b"nmp:seen");
/// Send counter of each tunnel.
pub const SEND: Layout = layout("send counters", b"nmp:send");
/// Replay window of each tunnel.
pub const WINDOWS: Layout = layout("replay windows", b"nmp:wind");
/// What one worker has sealed and not yet sent.
pub const SPAN: Layout = layout("span", b"nmp:span");
/// Packets and bytes of each tunnel by sealer.
pub const TRAFFIC: Layout = layout("traffic", b"nmp:traf");
/// One process's counters.
pub const STATS: Layout = layout("stats", b"nmp:coun");
/// What a ring's producer writes.
pub const RING_DATA: Layout = layout("ring data", b"nmp:data");
/// What a ring's consumer writes.
pub const RING_STATE: Layout = layout("ring state", b"nmp:stat");

/// Every layout that this crate attaches to.
pub const LAYOUTS: [Layout; 13] = [
    TUNNELS, KEYS, PEERS, RELAYS, FLOWS, SEEN, SEND, WINDOWS, SPAN, TRAFFIC, STATS, RING_DATA,
    RING_STATE,
];

/// Structures of integers only, without padding, and the list of where their fields are.
macro_rules! rows {
    ($($(#[$about:meta])* $python:literal $name:ident { $($(#[$of:meta])* $field:ident: $kind:ty,)* })*) => {
        $(
            $(#[$about])*
            #[derive(Debug, Clone, Copy)]
            #[repr(C)]
            #[allow(missing_docs)] // the fields are documented in Python
            pub struct $name { $($(#[$of])* pub $field: $kind,)* }

            // Without padding a copy of the words may be taken for the structure.
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$kind>())*);
        )*

        fn rows() -> Vec<(String, usize, usize)> {
            let mut found = Vec::new();
            $(
                found.push(($python.to_owned(), 0, size_of::<$name>()));
                $(found.push((
                    format!("{}.{}", $python, stringify!($field)),
                    std::mem::offset_of!($name, $field),
                    size_of::<$kind>(),
                ));)*
            )*
            found
        }
    };
}

rows! {
    /// What every region begins with.
    "HEADER" Header {
        magic: [u8; 8],
        version: u32,
        spare: u32,
        generation: u64,
        size: u64,
        parameters: [u64; 4],
    }
    /// What every area of a ring begins with.
    "AREA_HEADER" AreaHeader {
        count: u64,
        number: u64,
        spare: [u64; 6],
    }
    /// Bytes of an area that belong together.
    "ENTRY" EntryRow {
        offset: u32,
        length: u32,
        segment: u32,
        row: u32,
    }
    /// Two cache lines; what a reader needs for each packet is in the first.
    "TUNNEL_ROW" TunnelRow {
        sequence: u64,
        local_index: u32,
        remote_index: u32,
        generation: u64,
        peer: u64,
        ipv4: [u8; 4],
        port: u16,
        family: u8,
        spare_a: u8,
        ipv6: [u8; 16],
        state: u8,
        cipher: u8,
        owner: u16,
        source_count: u8,
        source_families: u8,
        spare_b: [u8; 2],
        sources: [[u8; 16]; 3],
        relay: u32,
        spare_c: [u8; 12],
    }
    /// The keys of a tunnel.
    "KEY_ROW" KeyRow {
        send: [u8; 32],
        receive: [u8; 32],
    }
    /// Local index of the current tunnel or 0, and generation << 32.
    "PEER_ROW" PeerRow {
        tunnel: u64,
    }
    /// A path through a relay, free if `kind` is 0.
    "RELAY_ROW" RelayRow {
        sequence: u64,
        local_index: u32,
        carrier: u32,
        kind: u32,
        next_tunnel: u32,
        next_index: u32,
        spare: u32,
    }
    /// The last counter reserved, and bit n of `sealers` if worker n has sealed for this tunnel.
    "SEND_ROW" SendRow {
        counter: u64,
        generation: u64,
        sealers: u64,
        spare: [u64; 5],
    }
    /// From `current` on this is the state of a `replay::ReplayWindow`.
    "WINDOW_ROW" WindowRow {
        generation: u64,
        spare: [u64; 6],
        current: u64,
        bits: [u64; 256],
    }
    /// Not all from `first` on is sent until `until` areas were released.
    "SPAN_ROW" SpanRow {
        generation: u64,
        first: u64,
        until: u64,
        spare: u64,
    }
    /// One sealer's share of a tunnel's traffic.
    "TRAFFIC_ROW" TrafficRow {
        generation: u64,
        packets_in: u64,
        bytes_in: u64,
        last_in_ms: u64,
        packets_out: u64,
        bytes_out: u64,
        last_out_ms: u64,
        spare: u64,
    }
    /// A line of tags, then rows of a line each.
    "BUCKET" Bucket {
        lock: u64,
        tags: [u32; BUCKET_ROWS],
        spare: [u32; 7],
        rows: [FlowRow; BUCKET_ROWS],
    }
    /// A verdict on a flow.
    "FLOW_ROW" FlowRow {
        sequence: u32,
        rules_generation: u32,
        local: [u8; 16],
        remote: [u8; 16],
        local_port: u16,
        remote_port: u16,
        protocol: u8,
        kind: u8,
        spare: [u8; 2],
        peer: u64,
        timeout_ms: u32,
        verdicts: u32,
    }
    /// When a flow last had a packet.
    "SEEN_ROW" SeenRow {
        seen_ms: u64,
    }
}

/// Every offset and size, as `("TUNNEL_ROW.peer", offset, size)`, the size of a row as `("TUNNEL_ROW", 0, size)`,
/// and words of whole regions by Python's names for their indexes, as `("RULES_GENERATION", offset, size)`.
pub fn offsets() -> Vec<(String, usize, usize)> {
    let words = [
        ("GENERATION", GENERATION, 1),
        ("RULES_GENERATION", RULES_GENERATION, 1),
        ("SEEDS", SEEDS, SEED_COUNT),
        ("TIMEOUTS", TIMEOUTS, TIMEOUT_COUNT),
        ("USED", USED, USED_COUNT),
        ("LIVE", LIVE, 1),
        ("TOUCHED", TOUCHED, 1),
        ("HEAD", HEAD, 1),
        ("TAIL", TAIL, 1),
        ("LEASE", LEASE, 1),
        ("PROGRESS", PROGRESS, 1),
        ("ROWS_AT_WORD", ROWS_AT_WORD, 0),
    ];
    let mut found = rows();
    found.extend(words.map(|(name, index, count)| (name.to_owned(), 8 * index, 8 * count)));
    found
}

/// How many rows of a size a region holds; a contradiction when it is not what its maker made it.
pub fn row_count(region: &Region, row_bytes: usize, most: usize) -> Result<usize> {
    let count = region.parameters()[0];
    let size = region.size();
    let fits = |rows: usize| {
        rows.checked_mul(row_bytes)
            .is_some_and(|bytes| ROWS_AT + bytes == size)
    };
    match usize::try_from(count) {
        Ok(rows) if (1..=most).contains(&rows) && fits(rows) => Ok(rows),
        _ => Err(region.contradiction("number of rows", count, format!("what fits {size} bytes"))),
    }
}

/// Copy words, each of them whole, together perhaps of different writes.
#[inline]
pub fn copy_words<const COUNT: usize>(region: &Region, first: usize) -> [u64; COUNT] {
    std::array::from_fn(|number| region.word(first + number).load(Ordering::Relaxed))
}

impl TunnelRow {
    /// Take a copy of the words for a row.
    pub fn from_words(words: [u64; size_of::<Self>() / 8]) -> Self {
        // SAFETY: of the same size, and any bits are integers.
        unsafe { std::mem::transmute(words) }
    }
}

impl RelayRow {
    /// Take a copy of the words for a row.
    pub fn from_words(words: [u64; size_of::<Self>() / 8]) -> Self {
        // SAFETY: of the same size, and any bits are integers.
        unsafe { std::mem::transmute(words) }
    }
}

impl FlowRow {
    /// Take a copy of the words for a row.
    pub fn from_words(words: [u64; size_of::<Self>() / 8]) -> Self {
        // SAFETY: of the same size, and any bits are integers.
        unsafe { std::mem::transmute(words) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_of_a_row_follows_the_one_before() {
        let mut end = (String::new(), 0);
        for (name, offset, size) in rows() {
            match name.split_once('.') {
                None => end = (name, 0),
                Some((row, _)) => {
                    assert_eq!((row, offset), (end.0.as_str(), end.1), "{name}");
                    end.1 += size;
                }
            }
        }
        assert_eq!(end, ("SEEN_ROW".to_owned(), 8));
    }

    #[test]
    fn each_name_stands_once_and_words_are_aligned() {
        let found = offsets();
        let mut names: Vec<&str> = found.iter().map(|(name, _, _)| name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), found.len());
        for (name, offset, size) in &found {
            assert!(*size != 8 || offset % 8 == 0, "{name}");
        }
    }

    #[test]
    fn a_copy_of_words_is_the_row_that_was_written() {
        let mut bytes = [0; size_of::<TunnelRow>()];
        bytes[8..12].copy_from_slice(&0x1234_5678_u32.to_le_bytes());
        bytes[36..38].copy_from_slice(&4242_u16.to_le_bytes());
        bytes[38] = 4;
        bytes[64..80].copy_from_slice(&[9; 16]);
        let words = std::array::from_fn(|each| {
            u64::from_le_bytes(bytes[8 * each..8 * each + 8].try_into().unwrap())
        });

        let row = TunnelRow::from_words(words);

        assert_eq!(row.local_index, 0x1234_5678);
        assert_eq!((row.port, row.family), (4242, 4));
        assert_eq!(row.sources, [[9; 16], [0; 16], [0; 16]]);
    }
}
