//! Both sides over real regions, and everything that a process gone mad may write there; as `test_shm_ring.py`.

use super::*;
use crate::layout::{RING_DATA, RING_STATE};
use crate::testing::{Memory, RingMemory, SMALL};

mod contradictions;

const READER: u64 = 1001 | 1 << 32;
const WRITER: u64 = 1002 | 2 << 32;

fn ring() -> RingMemory {
    RingMemory::new(SMALL)
}

fn produce(memory: &RingMemory) -> Producer {
    memory.producer(false)
}

/// Of the seal ring.
fn sends(memory: &RingMemory) -> Consumer {
    memory.consumer(Recovery::SendAgain, None)
}

/// Of the open ring.
fn writes(memory: &RingMemory) -> Consumer {
    memory.consumer(Recovery::GoOnBehind, None)
}

fn publish(producer: &mut Producer, packets: &[&[u8]]) -> bool {
    if !producer.try_begin().unwrap() {
        return false;
    }
    for packet in packets {
        assert!(producer.try_add(packet, 1, 7));
    }
    producer.publish();
    true
}

/// One area.
fn drain(consumer: &mut Consumer) -> Vec<Vec<u8>> {
    let begun = consumer.load().unwrap();
    let packets = (begun..consumer.len())
        .map(|number| consumer.entry(number).1.to_vec())
        .collect();
    consumer.release().unwrap();
    packets
}

fn drain_all(consumer: &mut Consumer) -> Vec<Vec<Vec<u8>>> {
    (0..consumer.pending().unwrap())
        .map(|_| drain(consumer))
        .collect()
}

fn area_bytes(memory: &RingMemory, area: usize) -> Vec<u8> {
    memory.data.bytes(PAGE_BYTES + 512 * area, 512)
}

fn text(fault: &Fault) -> String {
    fault.to_string()
}

// Layout.

#[test]
fn the_programs_rings_have_71616_bytes_of_data_in_an_area() {
    let memory = RingMemory::new(Geometry {
        areas: 32,
        area_bytes: 72 * 1024,
        entries_max: 128,
    });
    let geometry = produce(&memory).geometry();

    assert_eq!(
        (geometry.data_offset(), geometry.data_bytes()),
        (2112, 71_616)
    );
    assert_eq!(geometry.region_bytes(), 4096 + 32 * 72 * 1024);
}

#[test]
fn a_published_area_looks_in_memory_as_the_layout_says() {
    let memory = ring();
    let mut producer = produce(&memory);
    publish(&mut producer, &[b"first"]);
    publish(&mut producer, &[b"packet", b"next"]);

    let area = area_bytes(&memory, 1);

    assert_eq!(memory.data.word(HEAD), 2);
    let expected: Vec<u8> = [2_u64, 1]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    assert_eq!(area[..16], expected);
    let expected: Vec<u8> = [0_u32, 6, 1, 7, 6, 4, 1, 7]
        .iter()
        .flat_map(|half| half.to_le_bytes())
        .collect();
    assert_eq!(area[64..96], expected);
    assert_eq!(&area[192..202], b"packetnext");
}

#[test]
fn impossible_sizes_are_refused() {
    for (areas, area_bytes, entries_max) in [
        (0, 512, 8),
        (4097, 512, 8),
        (4, 500, 8),
        (4, 512, 0),
        (4, 512, 28),
        (4, 1 << 20, 4096),
        (4, 512, u64::MAX),
        (4, u64::MAX - 63, 8),
        (1, u64::MAX - 63, 8),
        (u64::MAX, u64::MAX, u64::MAX),
    ] {
        let bytes = (areas as usize)
            .wrapping_mul(area_bytes as usize)
            .wrapping_add(PAGE_BYTES);
        let bytes = bytes.clamp(PAGE_BYTES, 1 << 30).next_multiple_of(8);
        let data = Memory::new(&RING_DATA, bytes, &[areas, area_bytes, entries_max]);
        let state = Memory::new(&RING_STATE, PAGE_BYTES, &[]);

        let fault = Producer::new(data.writable(), state.read_only(), false)
            .err()
            .unwrap();

        let expected = format!(
            "shared memory 'ring data': geometry is ({areas}, {area_bytes}, {entries_max}), expected one that fills \
             {bytes} bytes"
        );
        assert_eq!(text(&fault), expected);
    }
}

#[test]
fn the_smallest_and_largest_sizes_are_possible() {
    for (areas, area_bytes, entries_max) in [(1, 128, 3), (4096, 128, 1), (1, 64 * 1025, 4095)] {
        let memory = RingMemory::new(Geometry {
            areas,
            area_bytes,
            entries_max,
        });
        let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
        let packet = vec![5; producer.geometry().data_bytes()];

        assert!(publish(&mut producer, &[&packet]));
        assert_eq!(drain_all(&mut consumer), [[packet]]);
    }
}

#[test]
fn two_regions_that_do_not_belong_together_are_refused() {
    let fits = SMALL.region_bytes();
    for (data_bytes, state_bytes, generation, expected) in [
        (
            fits + 512,
            PAGE_BYTES,
            1,
            "'ring data': geometry is (4, 512, 8), expected one that fills 6656 bytes",
        ),
        (
            fits,
            2 * PAGE_BYTES,
            1,
            "'ring state': size is 8192, expected 4096",
        ),
        (
            fits,
            PAGE_BYTES,
            2,
            "'ring state': generation is 2, expected 1 as in the data",
        ),
    ] {
        let data = Memory::new(&RING_DATA, data_bytes, &[4, 512, 8]);
        let state = Memory::of_generation(&RING_STATE, state_bytes, &[], generation);

        let fault = Producer::new(data.writable(), state.read_only(), false)
            .err()
            .unwrap();

        assert_eq!(text(&fault), format!("shared memory {expected}"));
    }
}

// Filling and draining.

#[test]
fn what_is_published_comes_out_in_order_with_its_bytes() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
    publish(&mut producer, &[b"a", b"bc"]);
    publish(&mut producer, &[b"def"]);

    assert_eq!(consumer.pending(), Ok(2));
    assert_eq!(consumer.load(), Ok(0));
    assert_eq!(consumer.len(), 2);
    let second = Entry {
        offset: 1,
        length: 2,
        segment: 1,
        row: 7,
    };
    assert_eq!(consumer.entry(0).1, b"a");
    assert_eq!(consumer.entry(1), (second, &b"bc"[..]));
    consumer.release().unwrap();
    assert!(consumer.is_empty());
    assert_eq!(drain_all(&mut consumer), [[b"def"]]);
    assert_eq!(consumer.pending(), Ok(0));
}

#[test]
fn nothing_is_seen_before_it_is_published() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));

    assert!(producer.try_begin().unwrap());
    assert!(producer.try_add(b"packet", 0, 0));

    assert_eq!((consumer.pending(), producer.waiting()), (Ok(0), Ok(0)));
}

#[test]
fn a_full_ring_refuses_and_nothing_in_it_changes() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
    for number in [b"0", b"1", b"2", b"3"] {
        assert!(publish(&mut producer, &[number]));
    }
    let before = memory.data.bytes(0, SMALL.region_bytes());

    assert_eq!(producer.try_begin(), Ok(false));

    assert_eq!(memory.data.bytes(0, SMALL.region_bytes()), before);
    assert_eq!((consumer.pending(), producer.waiting()), (Ok(4), Ok(4)));
    assert_eq!(drain(&mut consumer), [b"0"]);
    assert!(publish(&mut producer, &[b"4"]));
    assert_eq!(producer.try_begin(), Ok(false));
    assert_eq!(drain_all(&mut consumer), [[b"1"], [b"2"], [b"3"], [b"4"]]);
}

#[test]
fn an_area_that_is_being_drained_is_not_free() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
    for _ in 0..4 {
        publish(&mut producer, &[b"x"]);
    }
    assert_eq!(consumer.pending(), Ok(4));
    consumer.load().unwrap();
    consumer.entry(0);

    assert_eq!(producer.try_begin(), Ok(false));
    consumer.release().unwrap();

    assert_eq!(producer.try_begin(), Ok(true));
}

#[test]
fn beginning_again_before_publishing_starts_the_area_anew() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
    assert!(producer.try_begin().unwrap());
    assert!(producer.try_add(b"thrown away", 0, 0));

    publish(&mut producer, &[b"kept"]);

    assert_eq!(drain_all(&mut consumer), [[b"kept"]]);
}

#[test]
fn a_full_table_and_full_data_refuse_and_keep_what_is_there() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));

    assert!(producer.try_begin().unwrap());
    for _ in 0..8 {
        assert!(producer.try_add(b"x", 0, 0));
    }
    assert!(!producer.try_add(b"x", 0, 0));
    assert!(!producer.try_append(100, 1, 0, 0));
    producer.publish();
    assert!(producer.try_begin().unwrap());
    assert!(producer.try_add(&[0; 319], 0, 0));
    assert!(!producer.try_add(b"xy", 0, 0));
    assert!(producer.try_add(b"x", 0, 0));
    assert!(!producer.try_add(b"y", 0, 0));
    producer.publish();

    assert_eq!(
        drain_all(&mut consumer),
        [vec![b"x".to_vec(); 8], vec![vec![0; 319], b"x".to_vec()]]
    );
}

#[test]
fn a_producer_may_lay_out_the_data_itself() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
    assert!(producer.try_begin().unwrap());
    assert_eq!(producer.data().len(), 320);

    producer.data()[20..30].copy_from_slice(b"0123456789");
    assert!(producer.try_append(24, 6, 2, 65_535));
    assert!(producer.try_append(20, 4, 0, 0));
    assert!(producer.try_add(b"behind", 0, 0));
    producer.publish();

    assert_eq!(
        drain_all(&mut consumer),
        [vec![&b"456789"[..], b"0123", b"behind"]]
    );
}

/// Each is a mistake of our own code, which no packet and no process can cause.
macro_rules! misuses {
    ($($name:ident: |$producer:ident, $consumer:ident| $misuse:expr;)*) => {$(
        #[test]
        #[should_panic]
        #[allow(unused_variables, unused_mut)]
        fn $name() {
            let memory = ring();
            let (mut $producer, mut $consumer) = (produce(&memory), sends(&memory));
            let _ = $misuse;
        }
    )*};
}

misuses! {
    misuse_publish_without_begin: |producer, consumer| producer.publish();
    misuse_publish_nothing: |producer, consumer| {
        let _ = producer.try_begin();
        producer.publish();
    };
    misuse_publish_twice: |producer, consumer| {
        publish(&mut producer, &[b"a"]);
        producer.publish();
    };
    misuse_data_without_begin: |producer, consumer| { producer.data(); };
    misuse_append_without_begin: |producer, consumer| producer.try_append(0, 1, 0, 0);
    misuse_empty_entry: |producer, consumer| {
        let _ = producer.try_begin();
        producer.try_append(0, 0, 0, 0)
    };
    misuse_entry_beyond_the_area: |producer, consumer| {
        let _ = producer.try_begin();
        producer.try_append(1, 320, 0, 0)
    };
    misuse_load_without_pending: |producer, consumer| consumer.load();
    misuse_release_of_nothing: |producer, consumer| consumer.release();
    misuse_release_before_the_last_call_returned: |producer, consumer| {
        publish(&mut producer, &[b"a", b"b"]);
        let _ = consumer.pending();
        let _ = consumer.load();
        consumer.entry(0);
        consumer.release()
    };
    misuse_pending_without_the_lease: |producer, consumer| {
        ring().consumer(Recovery::SendAgain, Some(WRITER)).pending()
    };
    misuse_a_read_only_state: |producer, consumer| {
        let (data, state) = (ring().data.read_only(), ring().state.read_only());
        Consumer::new(data, state, None, Recovery::SendAgain, true, 1)
    };
    misuse_read_only_data: |producer, consumer| {
        Producer::new(ring().data.read_only(), ring().state.read_only(), false)
    };
}

// The lease.

#[test]
fn only_one_of_two_processes_is_the_consumer() {
    let memory = ring();
    let mut reader = memory.consumer(Recovery::SendAgain, Some(READER));
    let mut writer = memory.consumer(Recovery::SendAgain, Some(WRITER));

    assert!(writer.try_take());
    assert_eq!(memory.state.word(LEASE), WRITER);
    assert!(!reader.try_take());
    assert_eq!(writer.drop_lease(), Ok(false));
    assert_eq!(memory.state.word(LEASE), 0);
    assert!(reader.try_take());
    assert_eq!(memory.state.word(LEASE), READER);
}

#[test]
fn who_takes_the_lease_goes_on_where_the_other_stopped() {
    let memory = ring();
    let mut producer = produce(&memory);
    let mut reader = memory.consumer(Recovery::SendAgain, Some(READER));
    let mut writer = memory.consumer(Recovery::SendAgain, Some(WRITER));
    for number in [b"0", b"1", b"2"] {
        publish(&mut producer, &[number]);
    }

    let mut came_out = Vec::new();
    let mut left = Vec::new();
    for turn in 0..3 {
        let consumer = if turn == 1 { &mut writer } else { &mut reader };
        assert!(consumer.try_take());
        consumer.pending().unwrap();
        came_out.extend(drain(consumer));
        left.push(consumer.drop_lease().unwrap());
    }

    assert_eq!(came_out, [b"0", b"1", b"2"]);
    assert_eq!(left, [true, true, false]);
}

#[test]
fn a_consumer_without_a_lease_may_take_and_drop_like_one_with() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
    publish(&mut producer, &[b"x"]);

    assert!(consumer.try_take());
    assert_eq!(consumer.drop_lease(), Ok(true));
    assert_eq!(drain_all(&mut consumer), [[b"x"]]);
    assert_eq!(consumer.drop_lease(), Ok(false));
    assert_eq!(memory.state.word(LEASE), 0);
}

#[test]
fn a_holder_whose_lease_was_taken_away_notices_before_it_releases_or_drops() {
    for word in [0, READER] {
        let memory = ring();
        publish(&mut produce(&memory), &[b"x"]);
        let mut consumer = memory.consumer(Recovery::SendAgain, Some(WRITER));
        assert!(consumer.try_take());
        assert_eq!(consumer.pending(), Ok(1));
        consumer.load().unwrap();
        consumer.entry(0);
        memory.state.patch_word(LEASE, word);

        for fault in [consumer.release().err(), consumer.drop_lease().err()] {
            assert_eq!(
                text(&fault.unwrap()),
                format!(
                    "shared memory 'ring state': lease is {word:#x}, expected our own {WRITER:#x}"
                )
            );
        }

        assert_eq!(memory.state.word(TAIL), 0);
        assert_eq!(memory.state.word(LEASE), word);
    }
}

// Successors.

#[test]
fn a_successor_of_the_producer_goes_on_at_head_and_what_was_not_published_is_lost() {
    let memory = ring();
    let mut consumer = sends(&memory);
    let mut producer = produce(&memory);
    publish(&mut producer, &[b"published"]);
    assert!(producer.try_begin().unwrap());
    assert!(producer.try_add(b"lost", 0, 0));
    drop(producer);

    publish(&mut produce(&memory), &[b"new"]);

    assert_eq!(drain_all(&mut consumer), [[&b"published"[..]], [b"new"]]);
}

#[test]
fn a_successor_on_the_seal_ring_sends_the_whole_area_again_and_keeps_no_progress() {
    let memory = ring();
    publish(&mut produce(&memory), &[b"a", b"b", b"c"]);
    let mut consumer = sends(&memory);
    consumer.pending().unwrap();
    consumer.load().unwrap();
    for number in 0..3 {
        consumer.entry(number);
    }
    assert_eq!(memory.state.word(PROGRESS), 0);
    memory.state.patch_word(PROGRESS, 1);

    let mut successor = sends(&memory);

    assert_eq!(drain_all(&mut successor), [[b"a", b"b", b"c"]]);
    assert_eq!(successor.resumed(), 0);
}

#[test]
fn a_successor_on_the_open_ring_goes_on_behind_the_entry_that_was_begun_and_counts_its_packets() {
    for begun in 0..=3 {
        let memory = ring();
        let mut producer = produce(&memory);
        assert!(producer.try_begin().unwrap());
        for (packet, packets) in [(b"letters", 5), (b"numbers", 7), (b"symbols", 2)] {
            assert!(producer.try_add(packet, packets, 0));
        }
        producer.publish();
        publish(&mut producer, &[b"d"]);
        let mut consumer = writes(&memory);
        consumer.pending().unwrap();
        consumer.load().unwrap();
        for number in 0..begun {
            consumer.entry(number);
        }

        let mut successor = writes(&memory);
        assert_eq!(successor.pending(), Ok(2));

        let all = [b"letters", b"numbers", b"symbols"];
        assert_eq!(drain(&mut successor), all[begun..]);
        assert_eq!(drain(&mut successor), [b"d"]);
        assert_eq!(successor.resumed(), [0, 5, 7, 2][begun]);
    }
}

#[test]
fn a_released_area_leaves_no_trace_in_the_progress_of_the_next_one() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), writes(&memory));
    publish(&mut producer, &[b"a", b"b"]);
    drain_all(&mut consumer);
    publish(&mut producer, &[b"c", b"d"]);

    let mut successor = writes(&memory);

    assert_eq!(drain_all(&mut successor), [[b"c", b"d"]]);
    assert_eq!(successor.resumed(), 0);
}

// Poison.

#[test]
fn with_poison_a_released_area_is_overwritten_before_it_is_used_again_and_no_other_is() {
    let memory = ring();
    let (mut producer, mut consumer) = (memory.producer(true), sends(&memory));
    for number in [b"0", b"1", b"2"] {
        publish(&mut producer, &[number]);
    }
    let kept = [area_bytes(&memory, 1), area_bytes(&memory, 2)];
    consumer.pending().unwrap();
    consumer.load().unwrap();
    consumer.entry(0);

    producer.waiting().unwrap();
    assert_eq!(consumer.entry(0).1, b"0");
    consumer.release().unwrap();
    producer.waiting().unwrap();

    let poisoned = |area| area_bytes(&memory, area).iter().all(|byte| *byte == POISON);
    assert_eq!([0, 1, 2, 3].map(poisoned), [true, false, false, true]);
    assert_eq!([area_bytes(&memory, 1), area_bytes(&memory, 2)], kept);
    assert_eq!(drain_all(&mut consumer), [[b"1"], [b"2"]]);
}

#[test]
fn a_successor_poisons_what_is_free_and_only_that() {
    let memory = ring();
    let mut producer = produce(&memory);
    publish(&mut producer, &[b"0"]);
    publish(&mut producer, &[b"1"]);
    let mut consumer = sends(&memory);
    consumer.pending().unwrap();
    drain(&mut consumer);

    memory.producer(true);

    let poisoned = |area| area_bytes(&memory, area).iter().all(|byte| *byte == POISON);
    assert_eq!([0, 1, 2, 3].map(poisoned), [true, false, true, true]);
    assert_eq!(drain_all(&mut consumer), [[b"1"]]);
}

#[test]
fn without_poison_a_released_area_keeps_its_bytes() {
    let memory = ring();
    let (mut producer, mut consumer) = (produce(&memory), sends(&memory));
    publish(&mut producer, &[b"0"]);
    let before = area_bytes(&memory, 0);

    drain_all(&mut consumer);
    producer.waiting().unwrap();

    assert_eq!(area_bytes(&memory, 0), before);
}
