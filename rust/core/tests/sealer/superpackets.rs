//! Superpackets and single packets are cut, placed and sealed as they are meant, however they were read.

use nebula_mp_core::aead::Cipher;
use nebula_mp_core::runs::PACKETS_MAX;

use crate::plans::{
    frame, longest, plain, small, tcp, udp, v6, whole, Plan, ACK, CWR, FIN, PSH, TIMESTAMPS,
};
use crate::site::{Shape, Site, FIRST_COUNTER};
use crate::{poll_all, NEW_FLOW_OUT};

fn kinds(size: usize) -> [Plan; 4] {
    let mut timestamps = tcp(size, 0);
    timestamps.options = TIMESTAMPS.to_vec();
    [timestamps, v6(tcp(size, 0)), udp(size, 0), v6(udp(size, 0))].map(longest)
}

#[test]
fn the_largest_superpackets_arrive_packet_by_packet_in_as_many_areas_as_they_need() {
    for size in [36, 88, 536, 1248, 8948] {
        for plan in kinds(size) {
            let mut site = Site::new(Shape::default());
            site.allow(&plan.packet());
            let mut sealer = site.sealer(0);
            let mut next = FIRST_COUNTER;
            // Read to the arena at first, then to where they are sealed.
            for pass in 0..3 {
                site.give(&frame(&plan));
                assert_eq!(sealer.poll(1, site.now_us).unwrap(), plan.count());
                let found = site.sealed(0);
                let datagrams: Vec<_> = found.into_iter().flat_map(|(_, all)| all).collect();
                assert_eq!(site.opened(&datagrams, next), plan.packets());
                next += plan.count() as u64;
                let is_whole = plan.count() <= PACKETS_MAX && size >= 1248;
                assert_eq!(sealer.scattered(), if is_whole { pass } else { 0 });
            }
            let bytes: usize = plan.packets().iter().map(Vec::len).sum();
            assert_eq!(site.stat("mp.tun.rx.bytes"), 3 * bytes as u64);
            assert_eq!(site.drops(), []);
            let packets = 3 * plan.count() as u64;
            assert_eq!(site.sent(0), (packets, 3 * bytes as u64 + 32 * packets));
        }
    }
}

#[test]
fn a_superpacket_that_fits_an_area_is_one_entry_and_shares_the_area_with_others() {
    let mut site = Site::new(Shape::default());
    let (first, second) = (tcp(1248, 20_000), tcp(1248, 9_000));
    site.allow(&first.packet());
    site.allow(&small(1, 40));
    let mut sealer = site.sealer(0);
    site.give(&frame(&first));
    site.give(&plain(1, 40));
    site.give(&frame(&second));

    poll_all(&site, &mut sealer);

    assert_eq!(site.pending(0), 1);
    let found = site.sealed(0);
    let shape: Vec<_> = found
        .iter()
        .map(|(entry, all)| (entry.segment, all.len()))
        .collect();
    assert_eq!(
        shape,
        [(1320, first.count()), (100, 1), (1320, second.count())]
    );
    let datagrams: Vec<_> = found.into_iter().flat_map(|(_, all)| all).collect();
    let mut expected = first.packets();
    expected.push(small(1, 40));
    expected.extend(second.packets());
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
    assert_eq!(sealer.scattered(), 1);
}

#[test]
fn packets_of_one_size_and_a_shorter_one_behind_them_share_an_entry() {
    let mut site = Site::new(Shape::default());
    site.allow(&small(0, 40));
    let sizes = [40, 40, 30, 30, 20, 50, 50];
    for (number, size) in (0..).zip(sizes) {
        site.give(&plain(number, size));
    }
    let mut sealer = site.sealer(0);

    assert_eq!(sealer.poll(100, site.now_us).unwrap(), sizes.len());

    let found = site.sealed(0);
    let lengths: Vec<_> = found.iter().map(|(_, all)| all.len()).collect();
    assert_eq!(lengths, [3, 2, 2]);
    let datagrams: Vec<_> = found.into_iter().flat_map(|(_, all)| all).collect();
    let expected: Vec<_> = (0..)
        .zip(sizes)
        .map(|(each, size)| small(each, size))
        .collect();
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
}

#[test]
fn superpackets_of_one_layout_share_an_entry_until_one_ends_with_a_shorter_packet() {
    let mut site = Site::new(Shape::default());
    let whole = tcp(1000, 10_000);
    let shorter = tcp(1000, 4_500);
    let other = tcp(900, 9_000);
    // Together shorter than one of the packets before it.
    let tiny = tcp(1, 3);
    site.allow(&whole.packet());
    let mut sealer = site.sealer(0);
    let mut expected = Vec::new();
    for plan in [&whole, &whole, &shorter, &whole, &other, &other, &tiny] {
        site.give(&frame(plan));
        expected.extend(plan.packets());
    }

    poll_all(&site, &mut sealer);

    assert_eq!(site.pending(0), 1);
    let found = site.sealed(0);
    let shape: Vec<_> = found
        .iter()
        .map(|(entry, all)| (entry.segment, all.len()))
        .collect();
    assert_eq!(shape, [(1072, 25), (1072, 10), (972, 20), (73, 3)]);
    let datagrams: Vec<_> = found.into_iter().flat_map(|(_, all)| all).collect();
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
}

#[test]
fn ids_flags_and_sequence_numbers_are_right_where_a_superpacket_is_divided() {
    for cipher in [Cipher::Aes, Cipher::ChaCha] {
        let mut site = Site::new(Shape {
            area_bytes: 4096,
            cipher,
            ..Shape::default()
        });
        let mut plan = tcp(300, 2461);
        plan.flags = ACK | PSH | FIN | CWR;
        plan.sequence = u32::MAX - 700;
        plan.identification = u16::MAX - 2;
        site.allow(&plan.packet());
        site.give(&frame(&plan));
        let mut sealer = site.sealer(0);

        sealer.poll(100, site.now_us).unwrap();

        assert_eq!(site.pending(0), 2);
        let datagrams = site.wire(0);
        assert_eq!(site.opened(&datagrams, FIRST_COUNTER), plan.packets());
    }
}

#[test]
fn a_superpacket_fits_an_area_up_to_the_last_byte() {
    // 1984 bytes for data.
    for (missing, lengths) in [(0, vec![4]), (1, vec![4]), (-1, vec![3, 1])] {
        let mut site = Site::new(Shape {
            area_bytes: 4096,
            ..Shape::default()
        });
        let room = 1984 - 4 * 32 - 4 * 40 - missing;
        let plan = tcp(500, room as usize);
        assert_eq!(plan.count(), 4);
        site.allow(&plan.packet());
        let mut sealer = site.sealer(0);
        for first in [FIRST_COUNTER, FIRST_COUNTER + 4] {
            site.give(&frame(&plan));
            sealer.poll(1, site.now_us).unwrap();

            let found = site.sealed(0);
            let each: Vec<_> = found.iter().map(|(_, all)| all.len()).collect();
            assert_eq!(each, lengths);
            let datagrams: Vec<_> = found.into_iter().flat_map(|(_, all)| all).collect();
            assert_eq!(site.opened(&datagrams, first), plan.packets());
        }
    }
}

#[test]
fn what_is_no_superpacket_like_the_last_one_is_put_together_again() {
    let mut site = Site::new(Shape::default());
    let expected = tcp(1248, 61_152);
    let mut options = expected.clone();
    options.options = TIMESTAMPS.to_vec();
    let mut others = vec![tcp(1248, 65_495), tcp(1200, 61_152), tcp(1248, 5)];
    others.extend([tcp(36, 2000), tcp(9000, 60_000), udp(1248, 61_152), options]);
    for each in &others {
        site.allow(&each.packet());
    }
    site.allow(&expected.packet());
    let mut sealer = site.sealer(0);
    let mut next = FIRST_COUNTER;
    for other in &others {
        for plan in [&expected, other] {
            site.give(&frame(plan));
            poll_all(&site, &mut sealer);
            let datagrams = site.wire(0);
            assert_eq!(site.opened(&datagrams, next), plan.packets());
            next += plan.count() as u64;
        }
    }
    // The first of the others is longer, but still has room; all the rest are not what was expected.
    assert_eq!(sealer.scattered(), 2);
}

#[test]
fn small_packets_behind_superpackets_are_read_in_one_piece_again_after_a_few() {
    let mut site = Site::new(Shape::default());
    let plan = tcp(1248, 61_152);
    site.allow(&plan.packet());
    site.allow(&small(0, 40));
    let mut sealer = site.sealer(0);
    let (mut next, mut expected) = (FIRST_COUNTER, Vec::new());
    for number in 0..3 {
        site.give(&frame(&plan));
        site.give(&plain(number, 40));
        expected.extend(plan.packets());
        expected.push(small(number, 40));
        poll_all(&site, &mut sealer);
    }
    assert_eq!(sealer.scattered(), 2);
    for number in 0..4 {
        site.give(&plain(number, 40));
        expected.push(small(number, 40));
    }
    poll_all(&site, &mut sealer);
    site.give(&frame(&plan));
    expected.extend(plan.packets());
    poll_all(&site, &mut sealer);

    assert_eq!(sealer.scattered(), 2);
    let datagrams = site.wire(0);
    assert_eq!(site.opened(&datagrams, next), expected);
    next += expected.len() as u64;
    assert_eq!(site.counter(), next - 1);
}

#[test]
fn a_poll_exceeds_its_budget_by_one_superpacket_at_most() {
    let site = Site::new(Shape::default());
    let plan = tcp(1000, 10_000);
    site.allow(&plan.packet());
    site.allow(&small(1, 40));
    for frame in [plain(1, 40), frame(&plan), frame(&plan), plain(1, 40)] {
        site.give(&frame);
    }
    let mut sealer = site.sealer(0);

    let taken = [1, 5, 12, 12].map(|budget| sealer.poll(budget, site.now_us).unwrap());

    assert_eq!(taken, [1, 10, 11, 0]);
}

#[test]
fn without_offloads_a_packet_stands_alone() {
    let mut site = Site::new(Shape {
        has_header: false,
        ..Shape::default()
    });
    site.allow(&small(1, 40));
    site.give(&small(1, 40));
    site.give(&small(2, 1300));
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);
    let datagrams = site.wire(0);
    let expected = [small(1, 40), small(2, 1300)];
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
}

#[test]
fn a_checksum_that_was_left_to_us_is_completed() {
    for plan in kinds(1400).map(|mut plan| {
        plan.payload.truncate(861);
        plan
    }) {
        for is_allowed in [true, false] {
            let mut site = Site::new(Shape::default());
            if is_allowed {
                site.allow(&plan.packet());
            }
            let mut frame = frame(&plan);
            frame[1..6].fill(0);
            site.give(&frame);
            let mut sealer = site.sealer(0);
            poll_all(&site, &mut sealer);
            if is_allowed {
                let datagrams = site.wire(0);
                assert_eq!(site.opened(&datagrams, FIRST_COUNTER), plan.packets());
            } else {
                let up = (NEW_FLOW_OUT, plan.packets().remove(0));
                assert_eq!(site.upcalls(), [up]);
            }
        }
    }
}

#[test]
fn memory_for_what_was_read_is_used_again() {
    let mut site = Site::new(Shape::default());
    site.allow(&small(0, 40));
    site.allow(&tcp(1248, 40).packet());
    let mut sealer = site.sealer(0);
    let mut next = FIRST_COUNTER;
    for number in 0..100 {
        let (one, two) = (small(number, 30_000), small(number, 33_000));
        for packet in [&one, &two, &one, &two, &one, &two, &one, &two] {
            site.give(&whole(packet));
        }
        poll_all(&site, &mut sealer);
        let datagrams = site.wire(0);
        let both = [one, two];
        assert_eq!(site.opened(&datagrams, next), [&both[..]; 4].concat());
        next += 8;
    }
}
