//! What the rows of one table say.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// A row that had its last packet then.
fn seen(seen_ms: u64, timeout_ms: u32) -> Put {
    Put {
        seen_ms,
        timeout_ms,
        ..ROW
    }
}

#[test]
fn a_flow_that_is_not_there_is_controls_to_decide() {
    assert_eq!(Tables::new().ask(&key(1)), UNKNOWN);
}

#[test]
fn an_allowed_flow_is_allowed_both_ways_in_whatever_row_it_is() {
    for number in 0..BUCKET_ROWS {
        let mut table = Tables::new();
        table.put(CONTROL, &key(1), Put { number, ..ROW });
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
        let mut table = Tables::new();
        table.put(CONTROL, &key(1), Put { verdicts, ..ROW });
        assert_eq!(table.ask(&key(1)), expected, "{verdicts:#x}");
    }
}

#[test]
fn another_peers_packet_is_not_of_this_flow() {
    let mut table = Tables::new();
    table.put(CONTROL, &key(1), ROW);
    for peer in [PEER + 1, PEER + (1 << 32), 0] {
        assert_eq!(table.view.inbound(&key(1), peer, NOW), Inbound::Unknown);
    }
}

#[test]
fn what_is_allowed_to_nobody_is_refused() {
    let mut table = Tables::new();
    table.put(CONTROL, &key(1), Put { peer: 0, ..ROW });
    assert_eq!(table.view.outbound(&key(1), NOW), Outbound::Refused);
}

#[test]
fn rows_of_other_rules_do_not_hold() {
    let mut table = Tables::new();
    table.put(CONTROL, &key(1), ROW);
    table.flows[CONTROL].patch_word(RULES_GENERATION, u64::from(RULES) + 1);
    assert_eq!(table.ask(&key(1)), UNKNOWN);
    // Not cut to 32 bits.
    table.flows[CONTROL].patch_word(RULES_GENERATION, u64::from(RULES) | 1 << 32);
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
        let mut table = Tables::new();
        let seen_ms = NOW - age;
        table.put(CONTROL, &key(1), seen(seen_ms, timeout_ms));
        assert_eq!(table.ask(&key(1)) == ALLOWED, holds, "{age} {timeout_ms}");
    }
}

#[test]
fn a_packet_from_the_future_ends_no_flow() {
    for seen_ms in [NOW + 1, u64::MAX] {
        for timeout_ms in [0, 8, 16_000] {
            let mut table = Tables::new();
            table.put(CONTROL, &key(1), seen(seen_ms, timeout_ms));
            assert_eq!(table.ask(&key(1)), ALLOWED);
            assert_eq!(table.seen_ms(CONTROL, &key(1), 6), seen_ms);
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
            let mut table = Tables::new();
            let seen_ms = NOW - age;
            table.put(CONTROL, &key(1), seen(seen_ms, timeout_ms));
            if inbound {
                table.view.inbound(&key(1), PEER, NOW);
            } else {
                table.view.outbound(&key(1), NOW);
            }
            let expected = if noted { NOW } else { seen_ms };
            assert_eq!(
                table.seen_ms(CONTROL, &key(1), 6),
                expected,
                "{timeout_ms} {age}"
            );
        }
    }
}

#[test]
fn a_refusal_is_not_refreshed_by_packets() {
    let mut table = Tables::new();
    let verdicts = REFUSE | REFUSE << 2;
    table.put(
        CONTROL,
        &key(1),
        Put {
            verdicts,
            seen_ms: NOW - 5000,
            ..ROW
        },
    );
    assert_eq!(table.ask(&key(1)), (Outbound::Refused, Inbound::Refused));
    assert_eq!(table.seen_ms(CONTROL, &key(1), 6), NOW - 5000);
}

#[test]
fn a_row_that_is_being_written_is_a_miss() {
    let mut table = Tables::new();
    table.put(CONTROL, &key(1), Put { sequence: 9, ..ROW });
    assert_eq!(table.ask(&key(1)), UNKNOWN);
}

#[test]
fn behind_a_torn_row_and_another_key_with_its_tag_the_flow_is_found() {
    let mut table = Tables::new();
    let Place { bucket, tag } = place(&key(1));
    for (number, sequence) in [(0, 3), (1, 4)] {
        // Of another flow, or of none that could be read.
        let at = ROWS_AT + 512 * bucket;
        table.flows[CONTROL].patch(at + 8 + 4 * number, &tag.to_le_bytes());
        table.flows[CONTROL].patch(at + 64 + 64 * number, &u32::to_le_bytes(sequence));
    }
    table.put(CONTROL, &key(1), ROW);
    assert_eq!(table.ask(&key(1)), ALLOWED);
}

#[test]
fn a_change_of_the_row_is_seen_at_once() {
    let mut table = Tables::new();
    table.put(CONTROL, &key(1), ROW);
    assert_eq!(table.ask(&key(1)), ALLOWED);
    table.put(
        CONTROL,
        &key(1),
        Put {
            sequence: 10,
            verdicts: REFUSE,
            ..ROW
        },
    );
    assert_eq!(table.ask(&key(1)), (Outbound::Refused, Inbound::Unknown));
}

#[test]
fn a_row_is_never_read_half_of_one_and_half_of_another() {
    let mut table = Tables::new();
    table.put(CONTROL, &key(1), ROW);
    let (flows, seen) = (table.flows[CONTROL].writer(), table.seen[CONTROL].writer());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = &done;
        scope.spawn(move || {
            let flows = Region::attach(flows, &FLOWS, true, "").unwrap();
            let seen = Region::attach(seen, &SEEN, true, "").unwrap();
            let writer = FlowRows::new(flows, seen).unwrap();
            // A refusal has peer 7, what is allowed has PEER.
            for round in 0..200_000_u32 {
                let (peer, bits) = if round % 2 == 0 {
                    (7, REFUSE << 2)
                } else {
                    (PEER, BOTH)
                };
                let verdict = Verdict {
                    rules_generation: RULES,
                    peer,
                    timeout_ms: 16_000,
                    bits,
                };
                let row = Row {
                    number: 6,
                    verdict,
                    seen_ms: NOW,
                };
                writer.write(place(&key(1)), &key(1), &row);
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

#[test]
fn buckets_that_were_never_written_to_are_not_looked_at() {
    let mut tables = Tables::new();
    tables.put(OURS, &key(1), ROW);
    tables.flows[OURS].patch_word(USED, 0);
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::Unknown);
    tables.flows[OURS].patch_word(USED, 1 << place(&key(1)).bucket);
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(PEER));
}

#[test]
fn a_bit_stands_for_four_buckets_of_a_table_of_the_usual_size() {
    let tables = Tables::with_buckets([65_536; TABLES], OURS).unwrap();
    let pair = key(1).pair();
    let bucket = (flow_hash(&SEEDED, &pair) >> 40) as usize % 65_536;
    let rows = FlowRows::new(tables.flows[OURS].writable(), tables.seen[OURS].writable()).unwrap();
    let at = rows.place(&SEEDED, &pair);
    assert_eq!(at.bucket, bucket);
    let verdict = Verdict::allow(RULES, PEER, 1, Direction::Outbound);
    let row = Row {
        number: 0,
        verdict,
        seen_ms: NOW,
    };
    rows.write(at, &pair, &row);
    for word in 0..crate::layout::USED_COUNT {
        let expected = if word == bucket / 4 / 64 {
            1 << (bucket / 4 % 64)
        } else {
            0
        };
        assert_eq!(tables.flows[OURS].word(USED + word), expected);
    }
    assert_eq!(rows.find(at, &pair), Some(row));
}
