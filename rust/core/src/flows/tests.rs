//! Tables of three readers and control's, as the supervisor makes them, of which the second reader asks.

use super::*;
use crate::layout::{
    BUCKET_ROWS, FLOWS, HEADER_WORDS, PEERS, ROWS_AT, ROWS_AT_WORD, RULES_GENERATION, SEEDS, SEEN,
    STATS, TIMEOUTS, USED,
};
use crate::region::PAGE_BYTES;
use crate::stats::COUNTED;
use crate::testing::Memory;

mod admitting;
mod hostile;
mod making_room;
mod reading;

const BUCKETS: usize = 4;
const FIRST: usize = 0;
const OURS: usize = 1;
const LAST: usize = 2;
const CONTROL: usize = 3;
const TABLES: usize = 4;
/// This one, and the next, are served.
const PEER: u64 = 3 << 32 | 9;
const OTHER: u64 = 3 << 32 | 10;
/// This one is not.
const GONE: u64 = 3 << 32 | 11;
const BOTH: u32 = ALLOW | ALLOW << 2;
const RULES: u32 = 5;
const SEEDED: [u64; 6] = [11, 22, 33, 44, 55, 66];
const NOW: u64 = 1_000_000;
const TCP_MS: u64 = 720_000;
const UDP_MS: u64 = 180_000;
const DEFAULT_MS: u64 = 600_000;

struct Tables {
    flows: Vec<Memory>,
    seen: Vec<Memory>,
    peers: Memory,
    stats: Memory,
    view: FlowView,
}

/// A row that a writer wrote, and where.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Put {
    number: usize,
    sequence: u32,
    rules: u32,
    peer: u64,
    timeout_ms: u32,
    verdicts: u32,
    seen_ms: u64,
}

const ROW: Put = Put {
    number: 6,
    sequence: 8,
    rules: RULES,
    peer: PEER,
    timeout_ms: 16_000,
    verdicts: BOTH,
    seen_ms: NOW,
};

const PAIR: Put = Put { number: 0, ..ROW };
const RULES_BEFORE: u32 = RULES - 1;

fn names() -> Vec<String> {
    let mut names = Vec::new();
    for &name in COUNTED {
        names.push(name.to_owned());
        let stem = name.strip_suffix("packets");
        names.extend(stem.map(|stem| format!("{stem}bytes")));
    }
    names
}

fn regions(buckets: usize, seen_rows: usize) -> (Memory, Memory) {
    let flows = Memory::new(&FLOWS, ROWS_AT + 512 * buckets, &[buckets as u64]);
    let seen = Memory::new(&SEEN, ROWS_AT + 8 * seen_rows, &[seen_rows as u64]);
    for (number, seed) in SEEDED.into_iter().enumerate() {
        flows.patch_word(SEEDS + number, seed);
    }
    (flows, seen)
}

fn attach(
    flows: &[Memory],
    seen: &[Memory],
    own: usize,
    peers: &Memory,
    stats: &Memory,
) -> Result<FlowView> {
    let rights = |(number, each): (usize, &Memory)| {
        if number == own {
            each.writable()
        } else {
            each.read_only()
        }
    };
    let stats = StatsPage::attach(stats.writer(), &names(), 0).unwrap();
    FlowView::new(
        flows.iter().enumerate().map(rights).collect(),
        seen.iter().map(Memory::writable).collect(),
        own,
        PeerView::new(peers.read_only()).unwrap(),
        Rc::new(stats),
    )
}

fn key(number: u64) -> FlowKey {
    of_protocol(6, number)
}

fn of_protocol(protocol: u64, number: u64) -> FlowKey {
    let rest = number | 443 << 16 | protocol << 32;
    FlowKey([0x0100_2A0A, 0, 0x0200_2A0A, 0, rest])
}

fn place(key: &FlowKey) -> Place {
    let hashed = flow_hash(&SEEDED, key);
    Place {
        bucket: (hashed >> 40) as usize % BUCKETS,
        tag: hashed as u32 | 1,
    }
}

impl Tables {
    fn new() -> Self {
        Self::with_buckets([BUCKETS; TABLES], OURS).unwrap()
    }

    fn with_buckets(buckets: [usize; TABLES], own: usize) -> Result<Self> {
        let made = buckets.map(|each| regions(each, each * BUCKET_ROWS));
        let (flows, seen): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        flows[CONTROL].patch_word(RULES_GENERATION, u64::from(RULES));
        for (number, timeout_ms) in [TCP_MS, UDP_MS, DEFAULT_MS].into_iter().enumerate() {
            flows[CONTROL].patch_word(TIMEOUTS + number, timeout_ms);
        }
        let peers = Memory::new(&PEERS, ROWS_AT + 8 * 16, &[16]);
        for peer in [PEER, OTHER] {
            let row = peer as u32 as usize;
            peers.patch_word(ROWS_AT_WORD + row, peer & !0xFFFF_FFFF | 0x0001_0002);
        }
        let stats = Memory::new(&STATS, PAGE_BYTES, &[names().len() as u64, 0]);
        let view = attach(&flows, &seen, own, &peers, &stats)?;
        Ok(Self {
            flows,
            seen,
            peers,
            stats,
            view,
        })
    }

    fn put(&self, table: usize, key: &FlowKey, row: Put) {
        let Place { bucket, tag } = place(key);
        let at = ROWS_AT + 512 * bucket;
        let flows = &self.flows[table];
        flows.patch_word(USED, flows.word(USED) | 1 << bucket);
        flows.patch(at + 8 + 4 * row.number, &tag.to_le_bytes());
        let mut bytes = Vec::new();
        bytes.extend(row.sequence.to_le_bytes());
        bytes.extend(row.rules.to_le_bytes());
        bytes.extend(key.to_bytes());
        bytes.extend(row.peer.to_le_bytes());
        bytes.extend(row.timeout_ms.to_le_bytes());
        bytes.extend(row.verdicts.to_le_bytes());
        assert_eq!(bytes.len(), 64);
        flows.patch(at + 64 + 64 * row.number, &bytes);
        let slot = bucket * BUCKET_ROWS + row.number;
        self.seen[table].patch_word(ROWS_AT_WORD + slot, row.seen_ms);
    }

    fn seen_ms(&self, table: usize, key: &FlowKey, number: usize) -> u64 {
        let slot = place(key).bucket * BUCKET_ROWS + number;
        self.seen[table].word(ROWS_AT_WORD + slot)
    }

    /// The row with this key, whole or not.
    fn row(&self, table: usize, key: &FlowKey) -> Option<Put> {
        let Place { bucket, tag } = place(key);
        let flows = &self.flows[table];
        let at = ROWS_AT + 512 * bucket;
        (0..BUCKET_ROWS).find_map(|number| {
            let row = flows.bytes(at + 64 + 64 * number, 64);
            let half = |at: usize| u32::from_le_bytes(row[at..at + 4].try_into().unwrap());
            let found_tag = flows.bytes(at + 8 + 4 * number, 4);
            let is_it = found_tag == tag.to_le_bytes() && row[8..48] == key.to_bytes();
            is_it.then(|| Put {
                number,
                sequence: half(0),
                rules: half(4),
                peer: u64::from(half(48)) | u64::from(half(52)) << 32,
                timeout_ms: half(56),
                verdicts: half(60),
                seen_ms: self.seen_ms(table, key, number),
            })
        })
    }

    /// Let control say of all flows like `key(1)` what this row says.
    fn put_pair(&self, row: Put) {
        self.put(CONTROL, &key(1).pair(), Put { number: 0, ..row });
    }

    /// Flows admitted, and evicted.
    fn counts(&self) -> (u64, u64) {
        let word = |name: &str| {
            let slot = names().iter().position(|each| each == name).unwrap();
            self.stats.word(HEADER_WORDS + slot)
        };
        (word("mp.flows.admitted"), word("mp.flows.evicted"))
    }

    /// Everything that is in memory but the own table's tags and rows, the last-seen words, and counters.
    fn untouchable(&self) -> Vec<Vec<u8>> {
        let bytes = ROWS_AT + 512 * BUCKETS;
        let mut all = vec![self.peers.bytes(0, ROWS_AT + 8 * 16)];
        for (number, flows) in self.flows.iter().enumerate() {
            all.push(flows.bytes(0, if number == OURS { ROWS_AT } else { bytes }));
            all.push(self.seen[number].bytes(0, ROWS_AT));
        }
        for bucket in 0..BUCKETS {
            let at = ROWS_AT + 512 * bucket;
            all.push(self.flows[OURS].bytes(at, 8));
            all.push(self.flows[OURS].bytes(at + 36, 28));
        }
        all
    }

    /// Everything that is in all tables, and all last-seen words.
    fn everything(&self) -> Vec<Vec<u8>> {
        let flows = self.flows.iter();
        let flows = flows.map(|each| each.bytes(0, ROWS_AT + 512 * BUCKETS));
        let seen = self.seen.iter();
        let seen = seen.map(|each| each.bytes(0, ROWS_AT + 8 * BUCKETS * BUCKET_ROWS));
        flows.chain(seen).collect()
    }

    fn ask(&mut self, key: &FlowKey) -> (Outbound, Inbound) {
        (
            self.view.outbound(key, NOW),
            self.view.inbound(key, PEER, NOW),
        )
    }
}

const UNKNOWN: (Outbound, Inbound) = (Outbound::Unknown, Inbound::Unknown);
const ALLOWED: (Outbound, Inbound) = (Outbound::To(PEER), Inbound::Allowed);

#[test]
fn tables_that_do_not_fit_each_other_are_refused() {
    let said = |buckets| {
        Tables::with_buckets(buckets, OURS)
            .err()
            .unwrap()
            .to_string()
    };
    let expected = "shared memory 'flows': number of buckets is 3, expected a power of two";
    assert_eq!(said([4, 3, 4, 4]), expected);
    let expected = "shared memory 'flows': number of buckets is 8, expected 4";
    assert_eq!(said([8, 4, 4, 4]), expected);
    let expected = "shared memory 'flows': number of buckets is 4, expected 8";
    assert_eq!(said([8, 8, 4, 8]), expected);

    let (flows, seen) = regions(4, 27);
    let refusal = FlowRows::new(flows.read_only(), seen.writable()).err();
    let expected = "shared memory 'flows last seen': number of rows is 27, expected 28";
    assert_eq!(refusal.unwrap().to_string(), expected);
}

#[test]
fn tables_are_asked_in_the_order_own_controls_and_others_by_number() {
    // Each of them names a peer of its own.
    for (own, order) in [
        (0, [0, CONTROL, 1, 2]),
        (1, [1, CONTROL, 0, 2]),
        (2, [2, CONTROL, 0, 1]),
    ] {
        let mut tables = Tables::with_buckets([BUCKETS; TABLES], own).unwrap();
        for table in 0..TABLES {
            let peer = 3 << 32 | table as u64;
            tables.peers.patch_word(ROWS_AT_WORD + table, 3 << 32 | 7);
            tables.put(table, &key(1), Put { peer, ..ROW });
        }
        for table in order {
            let expected = Outbound::To(3 << 32 | table as u64);
            assert_eq!(tables.view.outbound(&key(1), NOW), expected);
            tables.put(table, &key(1), Put { sequence: 9, ..ROW });
        }
        assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::Unknown);
    }
}
