//! What no process of ours writes is a contradiction, and never more than that.

use super::*;

/// Overwrite one number of a ring with two packets, as a process gone mad could.
fn patch(memory: &RingMemory, name: &str, value: u64) {
    let half = |index: usize| {
        memory
            .data
            .patch(PAGE_BYTES + 64 + 4 * index, &(value as u32).to_le_bytes())
    };
    match name {
        "head" => memory.data.patch_word(HEAD, value),
        "count" => memory.data.patch_word(PAGE_BYTES / 8, value),
        "number" => memory.data.patch_word(PAGE_BYTES / 8 + 1, value),
        "data generation" => memory.data.patch_word(2, value),
        "progress" => memory.state.patch_word(PROGRESS, value),
        "offset" => half(0),
        "length" => half(1),
        "segment" => half(2),
        "row" => half(3),
        _ => panic!("{name}"),
    }
}

/// With 100 rows.
fn patched(name: &str, value: u64) -> (RingMemory, Consumer) {
    let memory = ring();
    publish(&mut produce(&memory), &[b"9 letters", b"more"]);
    let (data, state) = (memory.data.read_only(), memory.state.writable());
    let consumer = Consumer::new(data, state, None, Recovery::GoOnBehind, true, 100).unwrap();
    patch(&memory, name, value);
    (memory, consumer)
}

#[test]
fn a_consumer_refuses_every_impossible_number_and_delivers_nothing_of_its_area() {
    const MAX: u64 = u64::MAX;
    const HALF: u64 = u32::MAX as u64;
    for (name, value, expected) in [
        ("head", 5, "data': head is 5, expected 0..4".to_owned()),
        ("head", MAX, format!("data': head is {MAX}, expected 0..4")),
        (
            "count",
            0,
            "data': area 0: entries is 0, expected 1..8".to_owned(),
        ),
        (
            "count",
            9,
            "data': area 0: entries is 9, expected 1..8".to_owned(),
        ),
        (
            "count",
            MAX,
            format!("data': area 0: entries is {MAX}, expected 1..8"),
        ),
        (
            "number",
            4,
            "data': area 0: number is 4, expected 0: it changed hands while it was ours".to_owned(),
        ),
        (
            "offset",
            320,
            "data': area 0: offset is 320, expected below 320".to_owned(),
        ),
        (
            "offset",
            HALF,
            format!("data': area 0: offset is {HALF}, expected below 320"),
        ),
        (
            "offset",
            312,
            "data': area 0: length is 9, expected 1..8 at 312".to_owned(),
        ),
        (
            "length",
            0,
            "data': area 0: length is 0, expected 1..320 at 0".to_owned(),
        ),
        (
            "length",
            321,
            "data': area 0: length is 321, expected 1..320 at 0".to_owned(),
        ),
        (
            "length",
            HALF,
            format!("data': area 0: length is {HALF}, expected 1..320 at 0"),
        ),
        (
            "segment",
            0,
            "data': area 0: segment is 0, expected 1..9".to_owned(),
        ),
        (
            "segment",
            10,
            "data': area 0: segment is 10, expected 1..9".to_owned(),
        ),
        (
            "row",
            100,
            "data': area 0: row is 100, expected below 100".to_owned(),
        ),
        (
            "progress",
            3,
            "state': progress is (0, 3), expected at most (0, 2)".to_owned(),
        ),
        (
            "progress",
            1 << 12,
            "state': progress is (1, 0), expected at most (0, 2)".to_owned(),
        ),
        (
            "data generation",
            2,
            "data': generation is 2, expected 1".to_owned(),
        ),
    ] {
        let (_memory, mut consumer) = patched(name, value);

        let fault = match consumer.pending() {
            Ok(pending) => {
                assert!(pending > 0);
                consumer.load().unwrap_err()
            }
            Err(fault) => fault,
        };

        assert_eq!(text(&fault), format!("shared memory 'ring {expected}"));
        assert!(consumer.is_empty());
    }
}

#[test]
fn the_largest_possible_numbers_are_taken() {
    for (name, value) in [
        ("head", 4),
        ("count", 1),
        ("offset", 311),
        ("length", 320),
        ("segment", 9),
        ("row", 99),
        ("progress", 2),
    ] {
        let (_memory, mut consumer) = patched(name, value);

        assert!(consumer.pending().unwrap() > 0);
        drain(&mut consumer);
    }
}

#[test]
fn in_a_ring_without_segments_the_third_number_is_anything() {
    let memory = ring();
    publish(&mut produce(&memory), &[b"upcall"]);
    patch(&memory, "segment", u64::from(u32::MAX));
    let (data, state) = (memory.data.read_only(), memory.state.writable());

    let mut consumer =
        Consumer::new(data, state, None, Recovery::SendAgain, false, 65_536).unwrap();

    assert_eq!(consumer.pending(), Ok(1));
    consumer.load().unwrap();
    assert_eq!(consumer.entry(0).0.segment, u32::MAX);
}

#[test]
fn a_producer_refuses_an_impossible_tail() {
    for (published, drained, tail) in [(2, 0, 3), (2, 2, 1), (4, 2, u64::MAX)] {
        let memory = ring();
        let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
        for _ in 0..published {
            publish(&mut producer, &[b"x"]);
        }
        for _ in 0..drained {
            consumer.pending().unwrap();
            drain(&mut consumer);
        }
        assert_eq!(producer.waiting(), Ok(published - drained));
        memory.state.patch_word(TAIL, tail);

        let expected =
            format!("shared memory 'ring data': tail is {tail}, expected {drained}..{published}");
        assert_eq!(text(&producer.try_begin().unwrap_err()), expected);
        assert_eq!(text(&producer.waiting().unwrap_err()), expected);
    }
}

#[test]
fn a_successor_refuses_cursors_that_are_too_far_apart() {
    for (head, tail, refused) in [
        (5, 0, "tail is 0, expected 1..5"),
        (2, 3, "tail is 3, expected 3..2"),
    ] {
        let memory = ring();
        memory.data.patch_word(HEAD, head);
        memory.state.patch_word(TAIL, tail);

        let fault = Producer::new(memory.data.writable(), memory.state.read_only(), false).err();
        assert_eq!(
            text(&fault.unwrap()),
            format!("shared memory 'ring data': {refused}")
        );
        let (data, state) = (memory.data.read_only(), memory.state.writable());
        let fault = Consumer::new(data, state, None, Recovery::SendAgain, true, 1).err();
        assert_eq!(
            text(&fault.unwrap()),
            format!(
                "shared memory 'ring data': head is {head}, expected {tail}..{}",
                tail + 4
            )
        );
    }
}

#[test]
fn cursors_at_the_end_of_all_numbers_are_a_contradiction_and_no_panic() {
    let memory = ring();
    memory.data.patch_word(HEAD, u64::MAX);
    memory.state.patch_word(TAIL, u64::MAX);
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));

    publish(&mut producer, &[b"x"]);

    assert_eq!(
        text(&consumer.pending().unwrap_err()),
        "shared memory 'ring data': head is 0, expected 18446744073709551615..18446744073709551619"
    );
    assert!(producer.try_begin().is_err());
}

#[test]
fn an_area_that_changes_while_it_is_borrowed_is_noticed() {
    let memory = ring();
    publish(&mut produce(&memory), &[b"packet"]);
    let mut consumer = sends(&memory);
    consumer.pending().unwrap();
    consumer.load().unwrap();
    consumer.entry(0);
    patch(&memory, "number", 4);

    assert_eq!(
        text(&consumer.release().unwrap_err()),
        "shared memory 'ring data': area 0: number is 4, expected 0: it changed hands while it was ours"
    );

    assert_eq!(memory.state.word(TAIL), 0);
}

#[test]
fn a_reset_ring_is_empty_and_of_a_new_generation_and_old_users_notice() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), writes(&memory));
    for _ in 0..3 {
        publish(&mut producer, &[b"a", b"b"]);
    }
    consumer.pending().unwrap();
    drain(&mut consumer);
    memory.state.patch_word(LEASE, WRITER);

    memory.reset(SMALL, 2);

    let faults = [
        producer.try_begin().err(),
        consumer.pending().err(),
        consumer.drop_lease().err(),
    ];
    for fault in faults {
        assert_eq!(
            text(&fault.unwrap()),
            "shared memory 'ring data': generation is 2, expected 1"
        );
    }
    let (mut successor, mut other) = (produce(&memory), writes(&memory));
    publish(&mut successor, &[b"c", b"d"]);
    assert_eq!(drain_all(&mut other), [[b"c", b"d"]]);
    assert_eq!((other.resumed(), memory.state.word(LEASE)), (0, 0));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(300))]
    #[test]
    fn whatever_is_scribbled_over_a_ring_comes_out_as_entries_within_it_or_as_a_contradiction(
        scribbles in proptest::collection::vec(
            // Mostly where something is read: the cursors, and heads and tables of areas.
            (
                proptest::prop_oneof![0..4096_usize, 4096..6144_usize, 64..72_usize, 6144..10240_usize],
                0..300_usize,
                proptest::collection::vec(proptest::prelude::any::<u8>(), 1..8),
            ),
            1..12,
        )
    ) {
        let memory = ring();
        let (mut producer, mut consumer) = (produce(&memory), writes(&memory));
        for _ in 0..4 {
            publish(&mut producer, &[b"some", b"packets"]);
        }
        for (at, further, bytes) in scribbles {
            let at = if at < 4096 && at > 72 { 4096 + 512 * (at % 4) + further % 192 } else { at };
            match at.checked_sub(SMALL.region_bytes()) {
                Some(at) => memory.state.patch(at.min(4088), &bytes),
                None => memory.data.patch(at.min(SMALL.region_bytes() - 8), &bytes),
            }
        }
        if let Ok(pending) = consumer.pending() {
            for _ in 0..pending {
                let Ok(begun) = consumer.load() else { break };
                for number in begun..consumer.len() {
                    let (entry, data) = consumer.entry(number);
                    assert!(entry.length > 0 && entry.length as usize == data.len());
                    assert!((entry.offset + entry.length) as usize <= SMALL.data_bytes());
                    assert!(entry.row < 65_536);
                }
                if consumer.release().is_err() {
                    break;
                }
            }
        }
        if producer.try_begin() == Ok(true) {
            producer.try_add(b"x", 1, 1);
            producer.publish();
        }
        for successor in [attach_producer(&memory).err(), attach_consumer(&memory).err()] {
            assert!(successor.is_none_or(|fault| matches!(fault, Fault::Contradiction(_))));
        }
    }
}

fn attach_producer(memory: &RingMemory) -> Result<Producer> {
    let data = Region::attach(memory.data.writer(), &RING_DATA, true, "")?;
    Producer::new(
        data,
        Region::attach(memory.state.reader(), &RING_STATE, false, "")?,
        true,
    )
}

fn attach_consumer(memory: &RingMemory) -> Result<Consumer> {
    let data = Region::attach(memory.data.reader(), &RING_DATA, false, "")?;
    let state = Region::attach(memory.state.writer(), &RING_STATE, true, "")?;
    Consumer::new(
        data,
        state,
        Some(WRITER),
        Recovery::GoOnBehind,
        true,
        65_536,
    )
}
