//! A reader's side of the flow table; as `nebula_mp.shm_flows.FlowView`.
//!
//! Knows keys, verdicts and how long they hold; knows nothing of rules, of packets, or of who the peer is. A bucket is
//! a line of tags, then 7 rows of a cache line each, so that a hit touches two lines and a miss one; nothing is
//! remembered here of rows that were found. A row is read under its sequence number, which is odd while control writes.
//!
//! A row holds while it has the current rules generation and its last packet is not older than its timeout. ALLOW is
//! refreshed by packets of both directions, REFUSE is not. For an inbound packet the row's peer must be the tunnel's.

use std::mem::offset_of;
use std::sync::atomic::{fence, Ordering};

use crate::error::Result;
use crate::ip::FlowKey;
use crate::layout::{
    row_count, Bucket, FlowRow, SeenRow, BUCKETS_MAX, BUCKET_ROWS, ROWS_AT, ROWS_AT_WORD,
    RULES_GENERATION, SEEDS, SEED_COUNT,
};
use crate::region::Region;

/// Readers note a packet when the last one noted is this old, or an eighth of the timeout if that is less.
const SEEN_STEP_MS: u32 = 1000;
/// To read a row that is being written; a miss only costs an upcall.
const TRIES: usize = 3;

const ALLOW: u32 = 1;
const REFUSE: u32 = 2;
const VERDICT: u32 = 3;
const INBOUND_SHIFT: u32 = 2;
/// The peer of a row that stands for packets which nobody would take.
const NOBODY: u64 = 0;

const TAGS_AT: usize = offset_of!(Bucket, tags);
const ROWS_IN_BUCKET_AT: usize = offset_of!(Bucket, rows);
const KEY_WORD: usize = offset_of!(FlowRow, local) / 8;
const PEER_WORD: usize = offset_of!(FlowRow, peer) / 8;
/// Timeout in the low half, verdicts in the high one.
const REST_WORD: usize = offset_of!(FlowRow, timeout_ms) / 8;
const RULES_HALF: usize = offset_of!(FlowRow, rules_generation) / 4;

const _: () = assert!(
    offset_of!(FlowRow, sequence) == 0
        && PEER_WORD == KEY_WORD + 5
        && offset_of!(FlowRow, verdicts) == offset_of!(FlowRow, timeout_ms) + 4
);

/// What the table says of a packet from the local stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outbound {
    /// It goes to this peer (`PeerRef`).
    To(u64),
    /// Drop it.
    Refused,
    /// Only control knows.
    Unknown,
}

/// What the table says of a packet that came through a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Inbound {
    Allowed,
    Refused,
    /// Only control knows.
    Unknown,
}

/// Verdicts, and the words that say when a flow last had a packet.
pub struct FlowView {
    flows: Region,
    seen: Region,
    mask: usize,
    seeds: [u64; SEED_COUNT],
}

/// A row that holds.
struct Found {
    /// Index of its word in the region of last-seen words.
    seen: usize,
    peer: u64,
    verdicts: u32,
    /// Whether a packet of it is to be noted.
    note: bool,
}

impl FlowView {
    /// `flows` is read-only, `seen` writable.
    pub fn new(flows: Region, seen: Region) -> Result<Self> {
        assert!(seen.is_writable());
        let buckets = row_count(&flows, size_of::<Bucket>(), BUCKETS_MAX)?;
        if !buckets.is_power_of_two() {
            return Err(flows.contradiction("number of buckets", buckets, "a power of two"));
        }
        let rows = buckets * BUCKET_ROWS;
        if row_count(&seen, size_of::<SeenRow>(), BUCKETS_MAX * BUCKET_ROWS)? != rows {
            return Err(seen.contradiction("number of rows", seen.parameters()[0], rows));
        }
        let seeds =
            std::array::from_fn(|number| flows.word(SEEDS + number).load(Ordering::Relaxed));
        Ok(Self {
            flows,
            seen,
            mask: buckets - 1,
            seeds,
        })
    }

    /// Whom a packet from the local stack goes to.
    #[inline]
    pub fn outbound(&mut self, key: &FlowKey, now_ms: u64) -> Outbound {
        let Some(found) = self.find(key, now_ms) else {
            return Outbound::Unknown;
        };
        match found.verdicts & VERDICT {
            ALLOW => {
                self.note(&found, now_ms);
                match found.peer {
                    NOBODY => Outbound::Refused,
                    peer => Outbound::To(peer),
                }
            }
            REFUSE => Outbound::Refused,
            _ => Outbound::Unknown,
        }
    }

    /// Whether a packet that came through a tunnel of `peer` may pass.
    #[inline]
    pub fn inbound(&mut self, key: &FlowKey, peer: u64, now_ms: u64) -> Inbound {
        let Some(found) = self.find(key, now_ms) else {
            return Inbound::Unknown;
        };
        if found.peer != peer {
            return Inbound::Unknown;
        }
        match found.verdicts >> INBOUND_SHIFT & VERDICT {
            ALLOW => {
                self.note(&found, now_ms);
                Inbound::Allowed
            }
            REFUSE => Inbound::Refused,
            _ => Inbound::Unknown,
        }
    }

    #[inline]
    fn note(&self, found: &Found, now_ms: u64) {
        if found.note {
            self.seen.word(found.seen).store(now_ms, Ordering::Relaxed);
        }
    }

    /// The row of a flow, if it holds.
    #[inline]
    fn find(&self, key: &FlowKey, now_ms: u64) -> Option<Found> {
        let hashed = flow_hash(&self.seeds, key);
        let bucket = (hashed >> 40) as usize & self.mask;
        let tag = hashed as u32 | 1;
        let at = ROWS_AT + bucket * size_of::<Bucket>();
        for number in 0..BUCKET_ROWS {
            let half = (at + TAGS_AT) / 4 + number;
            if self.flows.half(half).load(Ordering::Relaxed) != tag {
                continue;
            }
            let word = (at + ROWS_IN_BUCKET_AT + number * size_of::<FlowRow>()) / 8;
            if let Some((rules_generation, peer, rest)) = self.read(word, key) {
                let seen = ROWS_AT_WORD + bucket * BUCKET_ROWS + number;
                return self.judge(rules_generation, peer, rest, seen, now_ms);
            }
        }
        None
    }

    /// Rules generation, peer and the last word of a row that is whole and has this key.
    #[inline]
    fn read(&self, word: usize, key: &FlowKey) -> Option<(u32, u64, u64)> {
        let half = 2 * word;
        let load = |number: usize| self.flows.word(word + number).load(Ordering::Relaxed);
        for _ in 0..TRIES {
            let sequence = self.flows.half(half).load(Ordering::Acquire);
            if sequence & 1 != 0 {
                return None;
            }
            let rules_generation = self.flows.half(half + RULES_HALF).load(Ordering::Relaxed);
            let found: [u64; 5] = std::array::from_fn(|number| load(KEY_WORD + number));
            let (peer, rest) = (load(PEER_WORD), load(REST_WORD));
            fence(Ordering::Acquire);
            if self.flows.half(half).load(Ordering::Relaxed) != sequence {
                continue;
            }
            return (found == key.0).then_some((rules_generation, peer, rest));
        }
        None
    }

    #[inline]
    fn judge(
        &self,
        rules_generation: u32,
        peer: u64,
        rest: u64,
        seen: usize,
        now_ms: u64,
    ) -> Option<Found> {
        let (timeout_ms, verdicts) = (rest as u32, (rest >> 32) as u32);
        let current = self.flows.word(RULES_GENERATION).load(Ordering::Relaxed);
        // Signed: another process may have noted a packet that it received later than we did ours.
        let age = i128::from(now_ms) - i128::from(self.seen.word(seen).load(Ordering::Relaxed));
        if u64::from(rules_generation) != current || age >= i128::from(timeout_ms) {
            return None;
        }
        Some(Found {
            seen,
            peer,
            verdicts,
            note: age >= i128::from((timeout_ms >> 3).min(SEEN_STEP_MS)),
        })
    }
}

/// The hash of a key with the table's six seeds: `shm_flows.flow_hash`, three multiply-folds.
#[inline]
pub fn flow_hash(seeds: &[u64; 6], key: &FlowKey) -> u64 {
    let [a, b, c, d, e] = key.0;
    let [p, q, r, s, t, u] = *seeds;
    fold(fold(a ^ p, b ^ q) ^ e ^ t, fold(c ^ r, d ^ s) ^ u)
}

/// The low half of the 128-bit product xor its high half.
#[inline]
fn fold(left: u64, right: u64) -> u64 {
    let product = u128::from(left) * u128::from(right);
    product as u64 ^ (product >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_pythons() {
        // By `shm_flows.flow_hash`, for `pack_key` of 10.42.0.1:1234 -> 10.42.0.2:443 TCP and others.
        let seeds =
            std::array::from_fn(|each| 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(each as u64 + 1));
        for (key, expected) in HASHES {
            assert_eq!(flow_hash(&seeds, &FlowKey(key)), expected, "{key:x?}");
        }
    }

    #[test]
    fn nothing_overflows_in_the_hash() {
        assert_eq!(flow_hash(&[0; 6], &FlowKey([u64::MAX; 5])), PYTHONS_OF_ONES);
        assert_eq!(flow_hash(&[0; 6], &FlowKey([0; 5])), 0);
    }

    const HASHES: [([u64; 5], u64); 3] = [
        (
            [
                0x0000_0000_0100_2A0A,
                0x0000_0000_0000_0000,
                0x0000_0000_0200_2A0A,
                0x0000_0000_0000_0000,
                0x0000_0006_01BB_04D2,
            ],
            0xDCBB_3D1D_E5F3_22D4,
        ),
        (
            [
                0x0000_0000_4200_00FD,
                0x0100_0000_0000_0000,
                0x0000_0000_4200_00FD,
                0x0200_0000_0000_0000,
                0x0000_0311_FFFF_0035,
            ],
            0x2FDD_BB3D_AE2C_F51A,
        ),
        (
            [
                0x0000_0000_0000_0000,
                0x0000_0000_0000_0000,
                0x0000_0000_FFFF_FFFF,
                0x0000_0000_0000_0000,
                0x0000_0001_0000_0000,
            ],
            0x5DA2_00E5_EB68_0094,
        ),
    ];
    const PYTHONS_OF_ONES: u64 = 0x0000_0000_0000_0000;
}

#[cfg(all(test, not(miri)))]
mod table_tests {
    use super::*;
    use crate::layout::{FLOWS, SEEN};
    use crate::testing::Memory;

    const BUCKETS: usize = 4;
    const PEER: u64 = 3 << 32 | 9;
    const BOTH: u32 = ALLOW | ALLOW << INBOUND_SHIFT;
    const RULES: u32 = 5;
    const SEEDED: [u64; 6] = [11, 22, 33, 44, 55, 66];
    const NOW: u64 = 1_000_000;

    struct Table {
        flows: Memory,
        seen: Memory,
        view: FlowView,
    }

    /// A row that control wrote, and where.
    #[derive(Clone, Copy)]
    struct Row {
        number: usize,
        sequence: u32,
        rules: u32,
        peer: u64,
        timeout_ms: u32,
        verdicts: u32,
        seen_ms: u64,
    }

    const ROW: Row = Row {
        number: 6,
        sequence: 8,
        rules: RULES,
        peer: PEER,
        timeout_ms: 16_000,
        verdicts: BOTH,
        seen_ms: NOW,
    };

    fn regions(buckets: usize, seen_rows: usize) -> (Memory, Memory) {
        let flows = Memory::new(&FLOWS, ROWS_AT + 512 * buckets, &[buckets as u64]);
        let seen = Memory::new(&SEEN, ROWS_AT + 8 * seen_rows, &[seen_rows as u64]);
        for (number, seed) in SEEDED.into_iter().enumerate() {
            flows.patch_word(SEEDS + number, seed);
        }
        flows.patch_word(RULES_GENERATION, u64::from(RULES));
        (flows, seen)
    }

    fn table() -> Table {
        let (flows, seen) = regions(BUCKETS, BUCKETS * BUCKET_ROWS);
        let view = FlowView::new(flows.read_only(), seen.writable()).unwrap();
        Table { flows, seen, view }
    }

    fn key(number: u64) -> FlowKey {
        FlowKey([0x0100_2A0A, 0, 0x0200_2A0A, 0, 443 << 16 | 6 << 32 | number])
    }

    fn place(key: &FlowKey) -> (usize, u32) {
        let hashed = flow_hash(&SEEDED, key);
        ((hashed >> 40) as usize % BUCKETS, hashed as u32 | 1)
    }

    impl Table {
        fn put(&self, key: &FlowKey, row: Row) {
            let (bucket, tag) = place(key);
            let at = ROWS_AT + 512 * bucket;
            self.flows
                .patch(at + 8 + 4 * row.number, &tag.to_le_bytes());
            let mut bytes = Vec::new();
            bytes.extend(row.sequence.to_le_bytes());
            bytes.extend(row.rules.to_le_bytes());
            bytes.extend(key.to_bytes());
            bytes.extend(row.peer.to_le_bytes());
            bytes.extend(row.timeout_ms.to_le_bytes());
            bytes.extend(row.verdicts.to_le_bytes());
            assert_eq!(bytes.len(), 64);
            self.flows.patch(at + 64 + 64 * row.number, &bytes);
            let slot = bucket * BUCKET_ROWS + row.number;
            self.seen.patch_word(ROWS_AT_WORD + slot, row.seen_ms);
        }

        fn seen_ms(&self, key: &FlowKey, number: usize) -> u64 {
            self.seen
                .word(ROWS_AT_WORD + place(key).0 * BUCKET_ROWS + number)
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
    fn a_flow_that_is_not_there_is_controls_to_decide() {
        assert_eq!(table().ask(&key(1)), UNKNOWN);
    }

    #[test]
    fn an_allowed_flow_is_allowed_both_ways_in_whatever_row_it_is() {
        for number in 0..BUCKET_ROWS {
            let mut table = table();
            table.put(&key(1), Row { number, ..ROW });
            assert_eq!(table.ask(&key(1)), ALLOWED);
            assert_eq!(table.ask(&key(2)), UNKNOWN);
        }
    }

    #[test]
    fn verdicts_are_for_one_direction_each() {
        let cases = [
            (0, UNKNOWN),
            (ALLOW, (Outbound::To(PEER), Inbound::Unknown)),
            (REFUSE, (Outbound::Refused, Inbound::Unknown)),
            (REFUSE << 2, (Outbound::Unknown, Inbound::Refused)),
            (ALLOW << 2, (Outbound::Unknown, Inbound::Allowed)),
            (REFUSE | REFUSE << 2, (Outbound::Refused, Inbound::Refused)),
            (3 | 3 << 2, UNKNOWN),
            (0xFFFF_FFF0 | BOTH, ALLOWED),
        ];
        for (verdicts, expected) in cases {
            let mut table = table();
            table.put(&key(1), Row { verdicts, ..ROW });
            assert_eq!(table.ask(&key(1)), expected, "{verdicts:#x}");
        }
    }

    #[test]
    fn another_peers_packet_is_not_of_this_flow() {
        let mut table = table();
        table.put(&key(1), ROW);
        for peer in [PEER + 1, PEER + (1 << 32), 0] {
            assert_eq!(table.view.inbound(&key(1), peer, NOW), Inbound::Unknown);
        }
    }

    #[test]
    fn what_is_allowed_to_nobody_is_refused() {
        let mut table = table();
        table.put(&key(1), Row { peer: 0, ..ROW });
        assert_eq!(table.view.outbound(&key(1), NOW), Outbound::Refused);
    }

    #[test]
    fn rows_of_other_rules_do_not_hold() {
        let mut table = table();
        table.put(&key(1), ROW);
        table
            .flows
            .patch_word(RULES_GENERATION, u64::from(RULES) + 1);
        assert_eq!(table.ask(&key(1)), UNKNOWN);
        // Not cut to 32 bits.
        table
            .flows
            .patch_word(RULES_GENERATION, u64::from(RULES) | 1 << 32);
        assert_eq!(table.ask(&key(1)), UNKNOWN);
    }

    #[test]
    fn a_flow_holds_until_its_timeout_is_over() {
        let cases = [
            (15_999, 16_000, true),
            (16_000, 16_000, false),
            (0, 0, false),
            (NOW, u32::MAX, true),
        ];
        for (age, timeout_ms, holds) in cases {
            let mut table = table();
            let seen_ms = NOW - age;
            table.put(
                &key(1),
                Row {
                    seen_ms,
                    timeout_ms,
                    ..ROW
                },
            );
            assert_eq!(table.ask(&key(1)) == ALLOWED, holds, "{age} {timeout_ms}");
        }
    }

    #[test]
    fn a_packet_from_the_future_ends_no_flow() {
        for seen_ms in [NOW + 1, u64::MAX] {
            for timeout_ms in [0, 8, 16_000] {
                let mut table = table();
                table.put(
                    &key(1),
                    Row {
                        seen_ms,
                        timeout_ms,
                        ..ROW
                    },
                );
                assert_eq!(table.ask(&key(1)), ALLOWED);
                assert_eq!(table.seen_ms(&key(1), 6), seen_ms);
            }
        }
    }

    #[test]
    fn a_packet_is_noted_after_a_second_or_an_eighth_of_the_timeout() {
        let cases = [
            (16_000, 1000, true),
            (16_000, 999, false),
            (4000, 500, true),
            (4000, 499, false),
            (7, 0, true),
        ];
        for (timeout_ms, age, noted) in cases {
            for inbound in [false, true] {
                let mut table = table();
                let seen_ms = NOW - age;
                table.put(
                    &key(1),
                    Row {
                        seen_ms,
                        timeout_ms,
                        ..ROW
                    },
                );
                if inbound {
                    table.view.inbound(&key(1), PEER, NOW);
                } else {
                    table.view.outbound(&key(1), NOW);
                }
                let expected = if noted { NOW } else { seen_ms };
                assert_eq!(table.seen_ms(&key(1), 6), expected, "{timeout_ms} {age}");
            }
        }
    }

    #[test]
    fn a_refusal_is_not_refreshed_by_packets() {
        let mut table = table();
        let verdicts = REFUSE | REFUSE << 2;
        table.put(
            &key(1),
            Row {
                verdicts,
                seen_ms: NOW - 5000,
                ..ROW
            },
        );
        assert_eq!(table.ask(&key(1)), (Outbound::Refused, Inbound::Refused));
        assert_eq!(table.seen_ms(&key(1), 6), NOW - 5000);
    }

    #[test]
    fn a_row_that_is_being_written_is_a_miss() {
        let mut table = table();
        table.put(&key(1), Row { sequence: 9, ..ROW });
        assert_eq!(table.ask(&key(1)), UNKNOWN);
    }

    #[test]
    fn behind_a_torn_row_and_another_key_with_its_tag_the_flow_is_found() {
        let mut table = table();
        let (bucket, tag) = place(&key(1));
        for (number, sequence) in [(0, 3), (1, 4)] {
            // Of another flow, or of none that could be read.
            let at = ROWS_AT + 512 * bucket;
            table.flows.patch(at + 8 + 4 * number, &tag.to_le_bytes());
            table
                .flows
                .patch(at + 64 + 64 * number, &u32::to_le_bytes(sequence));
        }
        table.put(&key(1), ROW);
        assert_eq!(table.ask(&key(1)), ALLOWED);
    }

    #[test]
    fn a_change_of_the_row_is_seen_at_once() {
        let mut table = table();
        table.put(&key(1), ROW);
        assert_eq!(table.ask(&key(1)), ALLOWED);
        table.put(
            &key(1),
            Row {
                sequence: 10,
                verdicts: REFUSE,
                ..ROW
            },
        );
        assert_eq!(table.ask(&key(1)), (Outbound::Refused, Inbound::Unknown));
    }

    #[test]
    fn tables_that_do_not_fit_each_other_are_refused() {
        let said = |buckets, seen_rows| {
            let (flows, seen) = regions(buckets, seen_rows);
            let view = FlowView::new(flows.read_only(), seen.writable());
            view.err().unwrap().to_string()
        };
        let expected = "shared memory 'flows': number of buckets is 3, expected a power of two";
        assert_eq!(said(3, 21), expected);
        let expected = "shared memory 'flows last seen': number of rows is 27, expected 28";
        assert_eq!(said(4, 27), expected);
    }

    #[test]
    fn a_row_is_never_read_half_of_one_and_half_of_another() {
        let mut table = table();
        table.put(&key(1), ROW);
        let descriptor = table.flows.writer();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let flows = Region::attach(descriptor, &FLOWS, true, "").unwrap();
                let word = (ROWS_AT + 512 * place(&key(1)).0 + 64 + 64 * 6) / 8;
                let half = flows.half(2 * word);
                // A refusal has peer 7, what is allowed has PEER.
                for round in 0..200_000_u32 {
                    let sequence = half.load(Ordering::Relaxed);
                    half.store(sequence | 1, Ordering::Relaxed);
                    fence(Ordering::Release);
                    let (peer, verdicts) = if round % 2 == 0 {
                        (7, REFUSE << 2)
                    } else {
                        (PEER, BOTH)
                    };
                    flows.word(word + PEER_WORD).store(peer, Ordering::Relaxed);
                    let rest = 16_000 | u64::from(verdicts) << 32;
                    flows.word(word + REST_WORD).store(rest, Ordering::Relaxed);
                    half.store(sequence.wrapping_add(2), Ordering::Release);
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                let verdict = table.view.inbound(&key(1), PEER, NOW);
                assert_ne!(verdict, Inbound::Refused);
                let verdict = table.view.inbound(&key(1), 7, NOW);
                assert_ne!(verdict, Inbound::Allowed);
            }
        });
    }
}
