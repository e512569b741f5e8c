//! A reader's own flow table: which row a flow gets that it admits itself, and whose flow that is; as the writing side
//! of `nebula_mp.shm_flows`.
//!
//! Knows what may make room for a flow; knows nothing of who decided that it is allowed.

use crate::flow_rows::{Direction, FlowRows, Place, Row, Verdict, ALLOW};
use crate::ip::{FlowKey, TCP};
use crate::layout::BUCKET_ROWS;

/// A flow without a packet for this long may make room for another one; twice the precision of last-seen.
pub const IDLE_AFTER_MS: i128 = 2000;

/// Which row makes room for a new flow: of the lowest of these the longest without a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Dead,
    RefusalOrPair,
    Idle,
    IdleTcp,
    NotIdle,
}

/// Store a flow in the reader's own table, where it had its packet just now. Gives whether one that was allowed and
/// held made room for it.
pub fn store(own: &FlowRows, place: Place, key: &FlowKey, verdict: Verdict, now_ms: u64) -> bool {
    let (number, evicts) = match own.find(place, key) {
        Some(row) => (row.number, false),
        None => make_room(own, place.bucket, verdict.rules_generation, now_ms),
    };
    let row = Row {
        number,
        verdict,
        seen_ms: now_ms,
    };
    own.write(place, key, &row);
    evicts
}

/// Choose a row, and say whether that ends a flow.
fn make_room(own: &FlowRows, bucket: usize, rules_generation: u32, now_ms: u64) -> (usize, bool) {
    if let Some(number) = (0..BUCKET_ROWS).find(|&number| own.tag(bucket, number) == 0) {
        return (number, false);
    }
    let mut best: Option<(Rank, i128, usize)> = None;
    for number in 0..BUCKET_ROWS {
        let Some((key, row)) = own.read(bucket, number) else {
            // Half-written by a predecessor.
            return (number, false);
        };
        let age_ms = row.age_ms(now_ms);
        let this = (rank(&key, &row, rules_generation, now_ms), -age_ms, number);
        best = Some(best.map_or(this, |best| best.min(this)));
    }
    best.map_or((0, false), |(rank, _, number)| {
        (number, rank > Rank::RefusalOrPair)
    })
}

fn rank(key: &FlowKey, row: &Row, rules_generation: u32, now_ms: u64) -> Rank {
    if !row.holds(u64::from(rules_generation), now_ms) {
        Rank::Dead
    } else if key.is_pair() || !row.verdict.allows_any() {
        Rank::RefusalOrPair
    } else if row.age_ms(now_ms) < IDLE_AFTER_MS {
        Rank::NotIdle
    } else if key.protocol() == TCP {
        Rank::IdleTcp
    } else {
        Rank::Idle
    }
}

/// In which direction a flow was begun of which a packet came in `direction`: a flow stays whose it was when the rules
/// change, as long as they allow it to have been begun so.
pub fn origin(
    tables: &[FlowRows],
    place: Place,
    key: &FlowKey,
    pair: &Verdict,
    direction: Direction,
    now_ms: u64,
) -> Direction {
    tables
        .iter()
        .filter_map(|table| table.find(place, key))
        .filter(|row| row.verdict.allows_any() && row.is_recent(now_ms))
        .find_map(|row| row.verdict.origin())
        .filter(|&origin| pair.of(origin) == ALLOW)
        .unwrap_or(direction)
}
