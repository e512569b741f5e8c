//! Which of several tables is right, and flows that a reader admits.

use super::*;

const OUT: u32 = 1 << 4;
const IN: u32 = 2 << 4;

/// A row as the reader writes its first one of a bucket.
const ADMITTED: Put = Put {
    number: 0,
    sequence: 2,
    rules: RULES,
    peer: PEER,
    timeout_ms: TCP_MS as u32,
    verdicts: BOTH | OUT,
    seen_ms: NOW,
};

#[test]
fn a_flow_that_the_pair_allows_is_admitted_outbound() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);

    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(PEER));

    assert_eq!(tables.row(OURS, &key(1)), Some(ADMITTED));
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn a_flow_that_the_pair_allows_is_admitted_inbound() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);

    let verdict = tables.view.inbound(&key(1), PEER, NOW);

    assert_eq!(verdict, Inbound::Allowed);
    let expected = Put {
        verdicts: BOTH | IN,
        ..ADMITTED
    };
    assert_eq!(tables.row(OURS, &key(1)), Some(expected));
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn what_was_admitted_is_known_in_both_directions_without_the_pair() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);
    tables.view.outbound(&key(1), NOW);
    tables.put_pair(Put {
        sequence: 9,
        ..PAIR
    });

    assert_eq!(tables.ask(&key(1)), ALLOWED);
    assert_eq!(tables.ask(&key(2)), UNKNOWN);
    assert_eq!(tables.row(OURS, &key(1)), Some(ADMITTED));
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn what_one_reader_admitted_another_one_finds() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);
    tables.view.outbound(&key(1), NOW);
    let Tables {
        flows,
        seen,
        peers,
        stats,
        ..
    } = &tables;
    let mut other = attach(flows, seen, LAST, peers, stats).unwrap();

    assert_eq!(other.inbound(&key(1), PEER, NOW), Inbound::Allowed);
    assert_eq!(other.outbound(&key(1), NOW), Outbound::To(PEER));

    assert_eq!(tables.row(LAST, &key(1)), None);
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn a_pair_allows_flows_begun_in_the_direction_that_it_names() {
    for (verdicts, expected) in [
        (ALLOW, (Outbound::To(PEER), Inbound::Unknown)),
        (ALLOW << 2, (Outbound::Unknown, Inbound::Allowed)),
        (REFUSE | REFUSE << 2, UNKNOWN),
        (3 | 3 << 2, UNKNOWN),
        (OUT | IN, UNKNOWN),
    ] {
        let mut tables = Tables::new();
        tables.put_pair(Put { verdicts, ..PAIR });
        assert_eq!(tables.view.outbound(&key(1), NOW), expected.0);
        let verdict = tables.view.inbound(&key(2), PEER, NOW);
        assert_eq!(verdict, expected.1, "{verdicts:#x}");
        let admitted = u64::from(expected != UNKNOWN);
        assert_eq!(tables.counts(), (admitted, 0));
    }
}

#[test]
fn a_pair_that_does_not_hold_admits_nothing() {
    let cases = [
        PAIR,
        Put {
            seen_ms: NOW - 16_000,
            ..PAIR
        },
        Put {
            rules: RULES_BEFORE,
            ..PAIR
        },
        Put {
            rules: RULES + 1,
            ..PAIR
        },
        Put {
            sequence: 9,
            ..PAIR
        },
    ];
    for (number, row) in cases.into_iter().enumerate() {
        let mut tables = Tables::new();
        tables.put_pair(row);
        let before = tables.everything();
        let expected = if number == 0 { ALLOWED } else { UNKNOWN };
        assert_eq!(tables.ask(&key(1)), expected, "{row:?}");
        assert_eq!(tables.everything() == before, number != 0);
    }
}

#[test]
fn a_pair_is_not_refreshed_by_what_it_admits() {
    let mut tables = Tables::new();
    let seen_ms = NOW - 15_999;
    tables.put_pair(Put { seen_ms, ..PAIR });
    assert_eq!(tables.ask(&key(1)), ALLOWED);
    assert_eq!(tables.seen_ms(CONTROL, &key(1).pair(), 0), seen_ms);
    assert_eq!(tables.view.outbound(&key(2), NOW + 1), Outbound::Unknown);
}

#[test]
fn only_control_speaks_of_pairs() {
    for table in [FIRST, OURS, LAST] {
        let mut tables = Tables::new();
        tables.put(table, &key(1).pair(), PAIR);
        assert_eq!(tables.ask(&key(1)), UNKNOWN);
    }
}

#[test]
fn a_pair_is_of_two_addresses_of_one_family() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);
    let [a, b, c, d, rest] = key(1).0;
    for other in [
        FlowKey([a + 1, b, c, d, rest]),
        FlowKey([a, b + 1, c, d, rest]),
        FlowKey([a, b, c + 1, d, rest]),
        FlowKey([a, b, c, d + 1, rest]),
        FlowKey([a, b, c, d, rest | 2 << 40]),
    ] {
        assert_eq!(tables.ask(&other), UNKNOWN);
    }
    // Later fragments too, and protocols without ports.
    let fragment = FlowKey([a, b, c, d, 17 << 32 | 1 << 40]);
    assert_eq!(tables.ask(&fragment), ALLOWED);
    assert_eq!(tables.ask(&of_protocol(1, 7 << 16)), ALLOWED);

    let six = FlowKey([a, b, c, d, rest | 2 << 40]);
    let pair_of_six = FlowKey([a, b, c, d, 6 << 40]);
    assert_eq!(six.pair(), pair_of_six);
    tables.put(CONTROL, &pair_of_six, Put { number: 1, ..PAIR });
    assert_eq!(tables.ask(&six), ALLOWED);
}

#[test]
fn a_pair_of_another_peer_admits_nothing_inbound() {
    let mut tables = Tables::new();
    tables.put_pair(Put {
        peer: OTHER,
        ..PAIR
    });
    let before = tables.everything();
    let verdict = tables.view.inbound(&key(1), PEER, NOW);
    assert_eq!(verdict, Inbound::Unknown);
    assert_eq!(tables.everything(), before);
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(OTHER));
}

#[test]
fn a_pair_whose_peer_has_no_tunnel_admits_nothing_outbound() {
    let mut tables = Tables::new();
    tables.put_pair(Put { peer: GONE, ..PAIR });
    let before = tables.everything();
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::Unknown);
    assert_eq!(tables.everything(), before);
    // What comes through a tunnel came through one.
    let verdict = tables.view.inbound(&key(1), GONE, NOW);
    assert_eq!(verdict, Inbound::Allowed);
}

#[test]
fn a_refusal_loses_against_an_allowance_of_any_table() {
    for refusing in 0..TABLES {
        for allowing in (0..TABLES).filter(|&each| each != refusing) {
            let mut tables = Tables::new();
            let verdicts = REFUSE | REFUSE << 2;
            tables.put(refusing, &key(1), Put { verdicts, ..ROW });
            assert_eq!(
                tables.ask(&key(1)),
                (Outbound::Refused, Inbound::Refused),
                "{refusing}"
            );
            tables.put(allowing, &key(1), ROW);
            assert_eq!(tables.ask(&key(1)), ALLOWED, "{refusing} {allowing}");
        }
    }
}

#[test]
fn a_refusal_that_holds_wins_over_the_pair() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);
    let verdicts = REFUSE | REFUSE << 2;
    tables.put(CONTROL, &key(1), Put { verdicts, ..ROW });
    assert_eq!(tables.ask(&key(1)), (Outbound::Refused, Inbound::Refused));
    assert_eq!(tables.counts(), (0, 0));

    let seen_ms = NOW - 16_000;
    tables.put(
        CONTROL,
        &key(1),
        Put {
            verdicts,
            seen_ms,
            ..ROW
        },
    );
    assert_eq!(tables.ask(&key(1)), ALLOWED);
}

#[test]
fn another_peers_refusal_is_not_of_this_packet() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);
    let refusal = Put {
        verdicts: REFUSE << 2,
        peer: OTHER,
        ..ROW
    };
    tables.put(CONTROL, &key(1), refusal);
    let verdict = tables.view.inbound(&key(1), PEER, NOW);
    assert_eq!(verdict, Inbound::Allowed);
}

#[test]
fn a_packet_is_noted_in_the_table_that_allowed_it() {
    for table in 0..TABLES {
        for inbound in [false, true] {
            let mut tables = Tables::new();
            let seen_ms = NOW - 1000;
            for each in table..TABLES {
                tables.put(each, &key(1), Put { seen_ms, ..ROW });
            }
            let first = [OURS, CONTROL, FIRST, LAST]
                .into_iter()
                .find(|&each| each >= table)
                .unwrap();
            if inbound {
                tables.view.inbound(&key(1), PEER, NOW);
            } else {
                tables.view.outbound(&key(1), NOW);
            }
            for each in table..TABLES {
                let expected = if each == first { NOW } else { seen_ms };
                assert_eq!(tables.seen_ms(each, &key(1), 6), expected);
            }
        }
    }
}

#[test]
fn a_row_whose_peer_has_no_tunnel_is_healed_by_the_pair() {
    let mut tables = Tables::new();
    tables.put(OURS, &key(1), Put { peer: GONE, ..ROW });
    tables.put_pair(PAIR);

    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(PEER));

    let expected = Put {
        number: 6,
        sequence: 10,
        ..ADMITTED
    };
    assert_eq!(tables.row(OURS, &key(1)), Some(expected));
    assert_eq!(tables.counts(), (1, 0));
}

#[test]
fn a_row_whose_peer_has_no_tunnel_goes_up_if_nobody_knows_better() {
    let mut tables = Tables::new();
    let seen_ms = NOW - 5000;
    let stale = Put {
        peer: GONE,
        seen_ms,
        ..ROW
    };
    tables.put(OURS, &key(1), stale);
    tables.put(
        FIRST,
        &key(1),
        Put {
            peer: GONE + 1,
            ..stale
        },
    );
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(GONE));
    assert_eq!(tables.counts(), (0, 0));

    tables.put(LAST, &key(1), ROW);
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(PEER));

    let verdicts = REFUSE;
    tables.put(LAST, &key(1), Put { verdicts, ..ROW });
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::Refused);
}

#[test]
fn a_packet_of_another_peer_takes_the_flow_over_if_the_pair_is_of_that_peer() {
    let mut tables = Tables::new();
    tables.put(OURS, &key(1), Put { peer: OTHER, ..ROW });
    let verdict = tables.view.inbound(&key(1), PEER, NOW);
    assert_eq!(verdict, Inbound::Unknown);
    tables.put_pair(PAIR);

    let verdict = tables.view.inbound(&key(1), PEER, NOW);

    assert_eq!(verdict, Inbound::Allowed);
    let expected = Put {
        number: 6,
        sequence: 10,
        verdicts: BOTH | IN,
        ..ADMITTED
    };
    assert_eq!(tables.row(OURS, &key(1)), Some(expected));
}

#[test]
fn an_own_row_that_contradicts_another_table_is_replaced() {
    let before = Put {
        verdicts: BOTH | IN,
        peer: OTHER,
        ..ROW
    };
    for table in [FIRST, LAST, CONTROL] {
        for (said, origin) in [(OUT, OUT), (IN, IN), (0, IN), (OUT | IN, IN)] {
            for own in [
                before,
                // Whole is enough.
                Put {
                    rules: RULES_BEFORE,
                    seen_ms: 0,
                    verdicts: 0,
                    ..before
                },
            ] {
                let mut tables = Tables::new();
                tables.put(OURS, &key(1), own);
                let verdicts = BOTH | said;
                tables.put(table, &key(1), Put { verdicts, ..ROW });
                let untouchable = tables.untouchable();

                let verdict = tables.view.inbound(&key(1), PEER, NOW);

                assert_eq!(verdict, Inbound::Allowed);
                let expected = Put {
                    number: 6,
                    sequence: 10,
                    verdicts: BOTH | origin,
                    ..ADMITTED
                };
                assert_eq!(tables.row(OURS, &key(1)), Some(expected));
                assert_eq!(tables.counts(), (1, 0));
                assert_eq!(tables.untouchable(), untouchable);
            }
        }
    }
}

#[test]
fn a_flow_of_another_table_is_not_copied_for_want_of_an_own_row() {
    let cases = [
        None,
        Some(Put { rules: 0, ..ROW }),
        Some(Put {
            sequence: 9,
            peer: OTHER,
            ..ROW
        }),
    ];
    for own in cases {
        let mut tables = Tables::new();
        if let Some(own) = own {
            tables.put(OURS, &key(1), own);
        }
        tables.put(LAST, &key(1), ROW);
        let before = tables.everything();
        let verdict = tables.view.inbound(&key(1), PEER, NOW);
        assert_eq!(verdict, Inbound::Allowed);
        assert_eq!(tables.everything(), before, "{own:?}");
    }
}

/// The origin that a flow is admitted with, of which a row was there, by a packet in this direction.
fn origin_after(rows: &[(usize, Put)], pair: u32, direction: Direction) -> u32 {
    let mut tables = Tables::new();
    for (table, row) in rows {
        tables.put(*table, &key(1), *row);
    }
    tables.put_pair(Put {
        verdicts: pair,
        ..PAIR
    });
    match direction {
        Direction::Outbound => {
            assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(PEER));
        }
        Direction::Inbound => {
            let verdict = tables.view.inbound(&key(1), PEER, NOW);
            assert_eq!(verdict, Inbound::Allowed);
        }
    }
    assert_eq!(tables.counts(), (1, 0));
    tables.row(OURS, &key(1)).unwrap().verdicts & !BOTH
}

fn before(verdicts: u32) -> Put {
    Put {
        rules: RULES_BEFORE,
        verdicts,
        seen_ms: NOW - 15_999,
        ..ROW
    }
}

#[test]
fn a_flow_stays_whose_it_was_over_a_change_of_rules_that_allow_it() {
    use Direction::{Inbound, Outbound};
    for table in 0..TABLES {
        for (verdicts, pair, direction, origin) in [
            (BOTH | IN, BOTH, Outbound, IN),
            (BOTH | OUT, BOTH, Inbound, OUT),
            (ALLOW | IN, BOTH, Outbound, IN),
            (ALLOW << 2 | IN, BOTH, Outbound, IN),
            // Not begun so any more.
            (BOTH | IN, ALLOW, Outbound, OUT),
            (BOTH | IN, ALLOW | REFUSE << 2, Outbound, OUT),
            (BOTH | OUT, ALLOW << 2, Inbound, IN),
            // Nothing was said.
            (BOTH, BOTH, Outbound, OUT),
            (BOTH | OUT | IN, BOTH, Inbound, IN),
            (IN, BOTH, Outbound, OUT),
            (REFUSE | REFUSE << 2 | IN, BOTH, Outbound, OUT),
        ] {
            let found = origin_after(&[(table, before(verdicts))], pair, direction);
            assert_eq!(found, origin, "{table} {verdicts:#x} {pair:#x}");
        }
    }
}

#[test]
fn a_flow_that_was_over_has_no_origin() {
    let over = Put {
        seen_ms: NOW - 16_000,
        ..before(BOTH | IN)
    };
    let torn = Put {
        sequence: 9,
        ..before(BOTH | IN)
    };
    for row in [over, torn] {
        let found = origin_after(&[(LAST, row)], BOTH, Direction::Outbound);
        assert_eq!(found, OUT);
    }
}

#[test]
fn the_origin_is_the_first_that_a_table_says_in_their_order() {
    let order = [OURS, CONTROL, FIRST, LAST];
    for first in 0..TABLES {
        let rows = order.iter().enumerate().map(|(each, &table)| {
            let origin = match each.cmp(&first) {
                std::cmp::Ordering::Less => 0,
                std::cmp::Ordering::Equal => IN,
                std::cmp::Ordering::Greater => OUT,
            };
            (table, before(BOTH | origin))
        });
        let rows: Vec<_> = rows.collect();
        assert_eq!(origin_after(&rows, BOTH, Direction::Outbound), IN);
    }
}

#[test]
fn the_timeout_is_that_of_the_protocol() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);
    for (protocol, timeout_ms) in [
        (6, TCP_MS),
        (17, UDP_MS),
        (1, DEFAULT_MS),
        (58, DEFAULT_MS),
        (0, DEFAULT_MS),
        (255, DEFAULT_MS),
    ] {
        let key = of_protocol(protocol, 7);
        assert_eq!(tables.ask(&key), ALLOWED);
        let row = tables.row(OURS, &key).unwrap();
        assert_eq!(u64::from(row.timeout_ms), timeout_ms, "{protocol}");
    }
    tables.flows[CONTROL].patch_word(TIMEOUTS, 1 << 32);
    assert_eq!(tables.ask(&key(8)), ALLOWED);
    let row = tables.row(OURS, &key(8)).unwrap();
    assert_eq!(row.timeout_ms, u32::MAX);
}

#[test]
fn what_is_admitted_is_of_the_rules_that_the_pair_was_of() {
    let mut tables = Tables::new();
    tables.put_pair(PAIR);
    assert_eq!(tables.ask(&key(1)), ALLOWED);
    tables.flows[CONTROL].patch_word(RULES_GENERATION, u64::from(RULES) + 1);
    assert_eq!(tables.ask(&key(1)), UNKNOWN);
    tables.put_pair(Put {
        rules: RULES + 1,
        ..PAIR
    });
    assert_eq!(tables.ask(&key(1)), ALLOWED);
    let expected = Put {
        sequence: 4,
        rules: RULES + 1,
        ..ADMITTED
    };
    assert_eq!(tables.row(OURS, &key(1)), Some(expected));
}

#[test]
fn who_admits_a_flow_says_that_its_bucket_was_written_to() {
    let mut tables = Tables::new();
    tables.put(CONTROL, &key(1).pair(), PAIR);
    assert_eq!(tables.flows[OURS].word(USED), 0);
    assert_eq!(tables.view.outbound(&key(1), NOW), Outbound::To(PEER));
    assert_eq!(tables.flows[OURS].word(USED), 1 << place(&key(1)).bucket);
}
