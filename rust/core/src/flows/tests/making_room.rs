//! Which row of a full bucket a flow gets.

use super::*;

const TCP: u64 = 6;
const UDP: u64 = 17;
const IDLE: u64 = NOW - 2000;
const NOT_IDLE: u64 = NOW - 1999;

/// Flows of one bucket of the own table, of these protocols and rows in their order, and one that is not there.
fn full(rows: [(u64, Put); BUCKET_ROWS]) -> (Tables, FlowKey, Vec<FlowKey>) {
    let tables = Tables::new();
    tables.put_pair(ROW);
    let bucket = place(&key(1)).bucket;
    let mut candidate = 1;
    let keys = rows
        .into_iter()
        .enumerate()
        .map(|(number, (protocol, row))| {
            let key = loop {
                candidate += 1;
                let key = of_protocol(protocol, candidate);
                if place(&key).bucket == bucket {
                    break key;
                }
            };
            tables.put(OURS, &key, Put { number, ..row });
            key
        });
    let keys = keys.collect();
    (tables, key(1), keys)
}

/// Admit one more; gives which row it got, and whether that ended a flow.
fn admit(rows: [(u64, Put); BUCKET_ROWS]) -> (usize, bool) {
    let (mut tables, new, keys) = full(rows);
    let kept: Vec<_> = keys.iter().map(|each| tables.row(OURS, each)).collect();
    let untouchable = tables.untouchable();

    assert_eq!(tables.view.outbound(&new, NOW), Outbound::To(PEER));

    let row = tables.row(OURS, &new).unwrap();
    let before = rows[row.number].1;
    let expected = Put {
        number: row.number,
        sequence: (before.sequence | 1).wrapping_add(1),
        rules: RULES,
        peer: PEER,
        timeout_ms: TCP_MS as u32,
        verdicts: BOTH | 1 << 4,
        seen_ms: NOW,
    };
    assert_eq!(row, expected);
    for (number, each) in keys.iter().enumerate() {
        let found = tables.row(OURS, each);
        assert_eq!(found, kept[number].filter(|_| number != row.number));
    }
    assert_eq!(tables.untouchable(), untouchable);
    let (admitted, evicted) = tables.counts();
    assert_eq!(admitted, 1);
    (row.number, evicted == 1)
}

fn seen(seen_ms: u64) -> Put {
    Put { seen_ms, ..ROW }
}

const BUSY: (u64, Put) = (TCP, ROW);

#[test]
fn rows_make_room_in_their_order() {
    // The worst first; each case has all ranks from its own on, the others hidden behind a busy flow.
    let ranked = [
        (TCP, Put { sequence: 7, ..ROW }),
        (
            TCP,
            Put {
                rules: RULES_BEFORE,
                ..ROW
            },
        ),
        (
            TCP,
            Put {
                verdicts: REFUSE,
                ..ROW
            },
        ),
        (UDP, seen(IDLE)),
        (TCP, seen(IDLE - 5000)),
        (UDP, seen(NOT_IDLE)),
    ];
    let ends = [false, false, false, true, true, true];
    for best in 0..ranked.len() {
        for turn in 0..BUCKET_ROWS {
            let mut rows = [BUSY; BUCKET_ROWS];
            rows[best..ranked.len()].copy_from_slice(&ranked[best..]);
            rows.rotate_right(turn);
            let expected = (best + turn) % BUCKET_ROWS;
            assert_eq!(admit(rows), (expected, ends[best]), "{best} {turn}");
        }
    }
}

#[test]
fn of_one_rank_the_row_goes_that_was_longest_without_a_packet() {
    let refusal = |seen_ms| Put {
        verdicts: REFUSE << 2,
        ..seen(seen_ms)
    };
    let dead = |seen_ms| Put {
        timeout_ms: 1,
        ..seen(seen_ms)
    };
    let cases: [(u64, &dyn Fn(u64) -> Put); 4] =
        [(UDP, &seen), (TCP, &seen), (TCP, &refusal), (UDP, &dead)];
    for (protocol, row) in cases {
        for oldest in 0..BUCKET_ROWS {
            let rows = std::array::from_fn(|number| {
                let seen_ms = NOW - 3000 - u64::from(number == oldest);
                (protocol, row(seen_ms))
            });
            assert_eq!(admit(rows).0, oldest);
        }
    }
    let all_busy = std::array::from_fn(|number| (UDP, seen(NOW + 100 - number as u64)));
    assert_eq!(admit(all_busy), (6, true));
    assert_eq!(admit([BUSY; BUCKET_ROWS]), (0, true));
}

#[test]
fn a_dead_flow_ends_no_more() {
    let mut rows = [BUSY; BUCKET_ROWS];
    rows[2].1.seen_ms = NOW - 16_000;
    assert_eq!(admit(rows), (2, false));
}

#[test]
fn a_pair_that_lies_in_the_own_table_makes_room_like_a_refusal() {
    let mut rows = [(UDP, seen(IDLE)); BUCKET_ROWS];
    rows[3] = BUSY;
    let (mut tables, new, keys) = full(rows);
    let mut of_pair = keys[3];
    of_pair.0[4] |= 4 << 40;
    let at = ROWS_AT + 512 * place(&new).bucket + 64 + 64 * 3 + 8;
    tables.flows[OURS].patch(at, &of_pair.to_bytes());

    assert_eq!(tables.view.outbound(&new, NOW), Outbound::To(PEER));

    assert_eq!(tables.row(OURS, &new).unwrap().number, 3);
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn a_row_that_was_never_used_is_taken_first() {
    let mut rows = [(UDP, seen(0)); BUCKET_ROWS];
    rows[1].1.sequence = 7;
    let (mut tables, new, keys) = full(rows);
    for number in [4, 5] {
        let tag_at = ROWS_AT + 512 * place(&new).bucket + 8 + 4 * number;
        tables.flows[OURS].patch(tag_at, &[0; 4]);
    }

    assert_eq!(tables.view.outbound(&new, NOW), Outbound::To(PEER));

    assert_eq!(tables.row(OURS, &new).unwrap().number, 4);
    assert!(tables.row(OURS, &keys[1]).is_some());
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn a_flow_keeps_its_row() {
    let (mut tables, _, keys) = full([(TCP, seen(NOW - 16_000)); BUCKET_ROWS]);
    let tag_at = ROWS_AT + 512 * place(&keys[0]).bucket + 8;
    tables.flows[OURS].patch(tag_at, &[0; 4]);

    assert_eq!(tables.view.outbound(&keys[5], NOW), Outbound::To(PEER));

    let row = tables.row(OURS, &keys[5]).unwrap();
    assert_eq!((row.number, row.sequence), (5, 10));
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn a_row_left_half_written_is_a_miss_and_then_used_again() {
    for (sequence, then) in [(1, 2), (7, 8), (u32::MAX, 0)] {
        let mut rows = [BUSY; BUCKET_ROWS];
        rows[4].1.sequence = sequence;
        rows[5].1.sequence = sequence;
        let (mut tables, _, keys) = full(rows);

        assert_eq!(tables.view.outbound(&keys[4], NOW), Outbound::To(PEER));

        let row = tables.row(OURS, &keys[4]).unwrap();
        assert_eq!((row.number, row.sequence), (4, then));
        let torn = tables.row(OURS, &keys[5]).unwrap();
        assert_eq!(torn.sequence, sequence);
        assert_eq!(tables.counts(), (1, 0));
    }
}

#[test]
fn a_sequence_begins_again_at_the_end_of_its_numbers() {
    let mut tables = Tables::new();
    tables.put_pair(ROW);
    let row = Put {
        sequence: u32::MAX - 1,
        peer: GONE,
        ..ROW
    };
    tables.put(OURS, &key(1), row);
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(PEER));
    assert_eq!(tables.row(OURS, &key(1)).unwrap().sequence, 0);
}
