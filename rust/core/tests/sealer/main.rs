//! TUN queue to seal ring: what is sealed, what goes up, what is counted, and that no counter is used twice.

mod plans;
mod site;

use std::os::unix::net::UnixDatagram;

use nebula_mp_core::aead::Cipher;
use nebula_mp_core::counters::SPAN_MAX;
use nebula_mp_core::error::Fault;
use nebula_mp_core::header::COUNTER_LIMIT;
use nebula_mp_core::runs::PACKETS_MAX;
use nebula_mp_core::sealer::Sealer;
use nebula_mp_core::upcalls::Reason;
use proptest::prelude::*;

use plans::{plain, plain_packet, Plan, ACK, CWR, FIN, PSH};
use site::{open, Row, Shape, Site, FIRST_COUNTER, INDEX, PROVEN};

const NEW_FLOW_OUT: u32 = Reason::NewFlowOut as u32;
const NO_TUNNEL: u32 = Reason::NoTunnel as u32;
const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 1, 2, 3, 4, 5, 6, 7];

/// Poll until nothing waits; gives the number of packets.
fn poll_all(site: &Site, sealer: &mut Sealer) -> usize {
    let mut taken = 0;
    loop {
        match sealer.poll(1000, site.now_us).unwrap() {
            0 => return taken,
            some => taken += some,
        }
    }
}

fn kinds(size: usize) -> [Plan; 4] {
    let mut timestamps = Plan::new(size, 0);
    timestamps.options = TIMESTAMPS.to_vec();
    [
        timestamps,
        Plan::new(size, 0).ipv6(),
        Plan::new(size, 0).udp(),
        Plan::new(size, 0).udp().ipv6(),
    ]
    .map(Plan::longest)
}

#[test]
fn the_largest_superpackets_arrive_packet_by_packet_in_as_many_areas_as_they_need() {
    for size in [36, 88, 536, 1248, 8948] {
        for plan in kinds(size) {
            let mut site = Site::new(Shape::default());
            site.allow(&plan.whole());
            let mut sealer = site.sealer(0);
            let mut next = FIRST_COUNTER;
            // Read to the arena at first, then to where they are sealed.
            for pass in 0..3 {
                site.give(&plan.frame());
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
    let (first, second) = (Plan::new(1248, 20_000), Plan::new(1248, 9_000));
    site.allow(&first.whole());
    site.allow(&plain_packet(1, 40));
    let mut sealer = site.sealer(0);
    site.give(&first.frame());
    site.give(&plain(1, 40));
    site.give(&second.frame());

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
    expected.push(plain_packet(1, 40));
    expected.extend(second.packets());
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
    assert_eq!(sealer.scattered(), 1);
}

#[test]
fn packets_of_one_size_and_a_shorter_one_behind_them_share_an_entry() {
    let mut site = Site::new(Shape::default());
    site.allow(&plain_packet(0, 40));
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
        .map(|(each, size)| plain_packet(each, size))
        .collect();
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
}

#[test]
fn superpackets_of_one_layout_share_an_entry_until_one_ends_with_a_shorter_packet() {
    let mut site = Site::new(Shape::default());
    let whole = Plan::new(1000, 10_000);
    let shorter = Plan::new(1000, 4_500);
    let other = Plan::new(900, 9_000);
    // Together shorter than one of the packets before it.
    let tiny = Plan::new(1, 3);
    site.allow(&whole.whole());
    let mut sealer = site.sealer(0);
    let mut expected = Vec::new();
    for plan in [&whole, &whole, &shorter, &whole, &other, &other, &tiny] {
        site.give(&plan.frame());
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
        let mut plan = Plan::new(300, 2461);
        plan.flags = ACK | PSH | FIN | CWR;
        plan.sequence = u32::MAX - 700;
        plan.id = u16::MAX - 2;
        site.allow(&plan.whole());
        site.give(&plan.frame());
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
        let plan = Plan::new(500, room as usize);
        assert_eq!(plan.count(), 4);
        site.allow(&plan.whole());
        let mut sealer = site.sealer(0);
        for first in [FIRST_COUNTER, FIRST_COUNTER + 4] {
            site.give(&plan.frame());
            sealer.poll(1, site.now_us).unwrap();

            let found = site.sealed(0);
            let each: Vec<_> = found.iter().map(|(_, all)| all.len()).collect();
            assert_eq!(each, lengths);
            let datagrams: Vec<_> = found.into_iter().flat_map(|(_, all)| all).collect();
            assert_eq!(site.opened(&datagrams, first), plan.packets());
        }
    }
}

/// What a step of a history gives to the device.
#[derive(Debug, Clone)]
enum Item {
    Super(Plan),
    Plain(u32, usize),
}

impl Item {
    fn frame(&self) -> Vec<u8> {
        match self {
            Item::Super(plan) => plan.frame(),
            Item::Plain(number, size) => plain(*number, *size),
        }
    }

    fn packets(&self) -> Vec<Vec<u8>> {
        match self {
            Item::Super(plan) => plan.packets(),
            Item::Plain(number, size) => vec![plain_packet(*number, *size)],
        }
    }
}

/// Few geometries, so that what comes is often what was expected, and as often is not.
fn item() -> impl Strategy<Value = Item> {
    let plan = (
        prop::sample::select(vec![9, 36, 536, 1248, 1250]),
        prop_oneof![2 => 0..90_usize, 1 => 1..9_000_usize, 1 => 1..60_000_usize],
        any::<(bool, bool, bool, bool)>(),
    );
    let plan = plan.prop_map(|(size, length, (is_ipv6, is_udp, has_options, ends))| {
        let mut plan = Plan::new(size, length);
        (plan.is_ipv6, plan.is_udp) = (is_ipv6, is_udp && !has_options);
        if has_options {
            plan.options = TIMESTAMPS.to_vec();
        }
        if ends {
            plan.flags = ACK | PSH | FIN | CWR;
        }
        Item::Super(plan)
    });
    let again = (0..3_usize).prop_map(|which| {
        let mut plan = Plan::new(1248, [61_152, 20_000, 1249][which]);
        plan.options = TIMESTAMPS.to_vec();
        Item::Super(plan)
    });
    prop_oneof![
        2 => plan,
        4 => again,
        3 => (0..9_u32, 4..1400_usize).prop_map(|(number, size)| Item::Plain(number, size)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_goes_in_the_peer_opens_exactly_the_packets_it_means_in_order(
        items in prop::collection::vec(item(), 1..14),
        area_bytes in prop::sample::select(vec![4096_u64, 9216, 72 * 1024]),
        at_once in 1..4_usize,
        budget in prop::sample::select(vec![1_usize, 40, 1000]),
    ) {
        let areas = if area_bytes < 10_000 { 512 } else { 32 };
        let mut site = Site::new(Shape { areas, area_bytes, ..Shape::default() });
        for item in &items {
            site.allow(&item.packets()[0]);
        }
        let mut sealer = site.sealer(0);
        let (mut datagrams, mut expected) = (Vec::new(), Vec::new());
        for some in items.chunks(at_once) {
            for item in some {
                site.give(&item.frame());
                expected.extend(item.packets());
            }
            while sealer.poll(budget, site.now_us).unwrap() > 0 {}
            datagrams.extend(site.wire(0));
        }
        prop_assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
        prop_assert_eq!(site.drops(), []);
        site.check_ledger(datagrams.len());
    }

    #[test]
    fn no_header_and_no_packet_makes_it_fail_or_lose_count(
        frames in prop::collection::vec(forged(), 1..20),
        is_known in any::<bool>(),
    ) {
        let mut site = Site::new(Shape::default());
        let plan = Plan::new(1248, 30_000);
        if is_known {
            for known in [plan.clone(), plan.clone().udp(), plan.clone().ipv6()] {
                site.allow(&known.whole());
            }
        }
        let mut sealer = site.sealer(0);
        let mut sealed = 0;
        for frame in frames {
            site.give(&plan.frame());
            site.give(&frame);
            poll_all(&site, &mut sealer);
            sealed += site.wire(0).len();
            site.upcalls();
            site.check_ledger(sealed);
        }
        prop_assert_eq!(site.sent(0).0, sealed as u64);
    }
}

/// Random bytes; a superpacket with some bytes of its front changed; and one that is cut short.
fn forged() -> impl Strategy<Value = Vec<u8>> {
    let front = prop::collection::vec((0..70_usize, any::<u8>()), 1..4);
    let which = (any::<(bool, bool)>(), 0..40_000_usize);
    let changed = (which, front).prop_map(|(((is_ipv6, is_udp), length), changes)| {
        let mut plan = Plan::new(1248, length);
        (plan.is_ipv6, plan.is_udp) = (is_ipv6, is_udp);
        let mut frame = plan.frame();
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame
    });
    let short = (0..120_usize).prop_map(|length| {
        let mut frame = Plan::new(1248, 100).frame();
        frame.truncate(length);
        frame
    });
    prop_oneof![prop::collection::vec(any::<u8>(), 0..200), changed, short,]
}

#[test]
fn what_is_no_superpacket_like_the_last_one_is_put_together_again() {
    let mut site = Site::new(Shape::default());
    let expected = Plan::new(1248, 61_152);
    let mut options = expected.clone();
    options.options = TIMESTAMPS.to_vec();
    let mut others = vec![
        Plan::new(1248, 65_495),
        Plan::new(1200, 61_152),
        Plan::new(1248, 5),
    ];
    others.extend([
        Plan::new(36, 2000),
        Plan::new(9000, 60_000),
        expected.clone().udp(),
        options,
    ]);
    for each in &others {
        site.allow(&each.whole());
    }
    site.allow(&expected.whole());
    let mut sealer = site.sealer(0);
    let mut next = FIRST_COUNTER;
    for other in &others {
        for plan in [&expected, other] {
            site.give(&plan.frame());
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
    let plan = Plan::new(1248, 61_152);
    site.allow(&plan.whole());
    site.allow(&plain_packet(0, 40));
    let mut sealer = site.sealer(0);
    let (mut next, mut expected) = (FIRST_COUNTER, Vec::new());
    for number in 0..3 {
        site.give(&plan.frame());
        site.give(&plain(number, 40));
        expected.extend(plan.packets());
        expected.push(plain_packet(number, 40));
        poll_all(&site, &mut sealer);
    }
    assert_eq!(sealer.scattered(), 2);
    for number in 0..4 {
        site.give(&plain(number, 40));
        expected.push(plain_packet(number, 40));
    }
    poll_all(&site, &mut sealer);
    site.give(&plan.frame());
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
    let plan = Plan::new(1000, 10_000);
    site.allow(&plan.whole());
    site.allow(&plain_packet(1, 40));
    for frame in [plain(1, 40), plan.frame(), plan.frame(), plain(1, 40)] {
        site.give(&frame);
    }
    let mut sealer = site.sealer(0);

    let taken = [1, 5, 12, 12].map(|budget| sealer.poll(budget, site.now_us).unwrap());

    assert_eq!(taken, [1, 10, 11, 0]);
}

#[test]
fn a_full_ring_drops_the_rest_of_a_superpacket_without_taking_counters() {
    let mut site = Site::new(Shape {
        areas: 2,
        ..Shape::default()
    });
    let plan = Plan::new(36, 0).longest();
    site.allow(&plan.whole());
    site.allow(&plain_packet(1, 40));
    site.give(&plan.frame());
    site.give(&plain(1, 40));
    let mut sealer = site.sealer(0);

    poll_all(&site, &mut sealer);

    let datagrams = site.wire(0);
    let sealed = datagrams.len();
    assert!(500 < sealed && sealed < plan.count());
    assert_eq!(
        site.opened(&datagrams, FIRST_COUNTER),
        plan.packets()[..sealed]
    );
    let dropped = (plan.count() - sealed + 1) as u64;
    assert_eq!(site.drops(), [("mp.ring.full.seal", dropped)]);
    site.check_ledger(sealed);
    site.give(&plain(1, 40));
    poll_all(&site, &mut sealer);
    let datagrams = site.wire(0);
    let next = FIRST_COUNTER + sealed as u64;
    assert_eq!(site.opened(&datagrams, next), [plain_packet(1, 40)]);
}

#[test]
fn a_ring_that_is_full_when_the_next_superpacket_is_expected_drops_it_and_goes_on() {
    let mut site = Site::new(Shape {
        areas: 1,
        ..Shape::default()
    });
    let plan = Plan::new(1248, 61_152);
    site.allow(&plan.whole());
    let mut sealer = site.sealer(0);
    let mut next = FIRST_COUNTER;
    for _ in 0..3 {
        site.give(&plan.frame());
        site.give(&plan.frame());
        poll_all(&site, &mut sealer);
        let datagrams = site.wire(0);
        assert_eq!(site.opened(&datagrams, next), plan.packets());
        next += plan.count() as u64;
    }
    assert_eq!(
        site.drops(),
        [("mp.ring.full.seal", 3 * plan.count() as u64)]
    );
}

#[test]
fn a_header_that_is_none_or_contradicts_its_packet_is_counted() {
    let mut wrong_flag = plain(1, 40);
    wrong_flag[0] = 4;
    let mut empty_segments = Plan::new(1248, 3000).frame();
    empty_segments[4..6].fill(0);
    let mut wrong_version = Plan::new(1248, 3000).frame();
    wrong_version[1] = 4;
    for bad in [
        vec![],
        vec![0; 9],
        wrong_flag,
        empty_segments,
        wrong_version,
    ] {
        let mut site = Site::new(Shape::default());
        let plan = Plan::new(1248, 3000);
        site.allow(&plan.whole());
        let mut sealer = site.sealer(0);
        // In front of what is read in one piece, and of what is read to pieces.
        for frame in [&bad, &plan.frame(), &bad] {
            site.give(frame);
        }
        assert_eq!(poll_all(&site, &mut sealer), plan.count() + 2);

        let datagrams = site.wire(0);
        assert_eq!(site.opened(&datagrams, FIRST_COUNTER), plan.packets());
        assert_eq!(site.drops(), [("mp.tun.drop.offload", 2)]);
        site.check_ledger(datagrams.len());
    }
}

#[test]
fn what_is_no_ip_packet_is_counted() {
    for has_header in [false, true] {
        let site = Site::new(Shape {
            has_header,
            ..Shape::default()
        });
        let mut sealer = site.sealer(0);
        let mut cut = vec![0x45];
        cut.extend([0; 10]);
        for bad in [vec![], cut, vec![0xF5; 60]] {
            let mut frame = if has_header { vec![0; 10] } else { vec![] };
            frame.extend(bad);
            site.give(&frame);
        }
        assert_eq!(poll_all(&site, &mut sealer), 3);
        assert_eq!(site.drops(), [("drop.tun.inner_ip", 3)]);
    }
}

#[test]
fn without_offloads_a_packet_stands_alone() {
    let mut site = Site::new(Shape {
        has_header: false,
        ..Shape::default()
    });
    site.allow(&plain_packet(1, 40));
    site.give(&plain_packet(1, 40));
    site.give(&plain_packet(2, 1300));
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);
    let datagrams = site.wire(0);
    let expected = [plain_packet(1, 40), plain_packet(2, 1300)];
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
                site.allow(&plan.whole());
            }
            let mut frame = plan.frame();
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

/// Make of a site with a known flow one whose packets go up, and say for which reason.
type Change = (u32, fn(&Site, &Plan));

const UPWARDS: [Change; 5] = [
    (NO_TUNNEL, |site, _| site.set_tunnel(None)),
    (NO_TUNNEL, |site, _| site.close()),
    (NO_TUNNEL, |site, _| site.open(Row { state: 1, ..PROVEN })),
    (NO_TUNNEL, |site, _| {
        site.open(Row {
            has_underlay: false,
            ..PROVEN
        })
    }),
    (NO_TUNNEL, |site, _| site.end_counters()),
];

#[test]
fn a_superpacket_without_a_tunnel_goes_up_packet_by_packet_however_it_was_read() {
    for (reason, change) in UPWARDS {
        for size in [300, 1248] {
            let mut site = Site::new(Shape::default());
            let plan = Plan::new(size, 39_960);
            site.allow(&plan.whole());
            let mut sealer = site.sealer(0);
            site.give(&plan.frame());
            poll_all(&site, &mut sealer);
            let sealed = site.wire(0).len();
            change(&site, &plan);
            site.give(&plan.frame());
            site.give(&plan.frame());

            poll_all(&site, &mut sealer);

            let expected: Vec<_> = plan
                .packets()
                .into_iter()
                .map(|each| (reason, each))
                .collect();
            assert_eq!(site.upcalls(), [expected.clone(), expected].concat());
            assert_eq!(site.wire(0), Vec::<Vec<u8>>::new());
            site.check_ledger(sealed);
        }
    }
}

#[test]
fn packets_of_a_flow_that_is_not_known_go_up_as_they_are_however_they_were_read() {
    let mut site = Site::new(Shape::default());
    let (known, unknown) = (Plan::new(1248, 39_960), Plan::new(1248, 30_000).udp());
    site.allow(&known.whole());
    let mut sealer = site.sealer(0);
    for frame in [
        unknown.frame(),
        known.frame(),
        unknown.frame(),
        plain(1, 50),
    ] {
        site.give(&frame);
    }

    poll_all(&site, &mut sealer);

    let datagrams = site.wire(0);
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), known.packets());
    let mut expected = [unknown.packets(), unknown.packets()].concat();
    expected.push(plain_packet(1, 50));
    let expected: Vec<_> = expected
        .into_iter()
        .map(|each| (NEW_FLOW_OUT, each))
        .collect();
    assert_eq!(site.upcalls(), expected);
    site.check_ledger(datagrams.len());
}

#[test]
fn a_superpacket_of_an_unknown_flow_that_is_laid_out_as_expected_is_put_together_for_control() {
    let mut site = Site::new(Shape::default());
    let known = Plan::new(1248, 39_960);
    let mut unknown = known.clone();
    unknown.port = 1;
    unknown.payload.reverse();
    site.allow(&known.whole());
    let mut sealer = site.sealer(0);
    site.give(&known.frame());
    site.give(&unknown.frame());
    site.give(&known.frame());

    poll_all(&site, &mut sealer);

    let expected: Vec<_> = unknown
        .packets()
        .into_iter()
        .map(|each| (NEW_FLOW_OUT, each))
        .collect();
    assert_eq!(site.upcalls(), expected);
    let datagrams = site.wire(0);
    assert_eq!(
        site.opened(&datagrams, FIRST_COUNTER),
        [known.packets(), known.packets()].concat()
    );
}

#[test]
fn each_packet_of_a_refused_superpacket_is_counted_however_it_was_read() {
    let mut site = Site::new(Shape::default());
    let (known, refused) = (Plan::new(1000, 10_000), Plan::new(1000, 10_000));
    let refused = Plan { port: 1, ..refused };
    site.allow(&known.whole());
    site.refuse(&refused.whole());
    let mut sealer = site.sealer(0);
    for plan in [&refused, &known, &refused] {
        site.give(&plan.frame());
    }
    poll_all(&site, &mut sealer);
    assert_eq!(site.drops(), [("drop.firewall.outgoing.no_rule", 20)]);
    assert_eq!(site.wire(0).len(), 10);
}

#[test]
fn each_packet_that_fits_no_area_is_counted() {
    let mut site = Site::new(Shape {
        area_bytes: 4096,
        ..Shape::default()
    });
    let (large, fits) = (Plan::new(1950, 10_000), Plan::new(1900, 1_900));
    site.allow(&large.whole());
    site.allow(&plain_packet(1, 1950));
    site.give(&large.frame());
    site.give(&plain(1, 1950));
    site.give(&fits.frame());
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);
    assert_eq!(site.drops(), [("drop.oversize", large.count() as u64 + 1)]);
    let datagrams = site.wire(0);
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), fits.packets());
    site.check_ledger(1);
}

#[test]
fn upcalls_of_a_superpacket_are_limited_packet_by_packet() {
    let mut site = Site::new(Shape {
        plain: (10, 4),
        ..Shape::default()
    });
    let plan = Plan::new(1000, 10_000);
    site.give(&plan.frame());
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);
    let up: Vec<_> = site
        .upcalls()
        .into_iter()
        .map(|(_, packet)| packet)
        .collect();
    assert_eq!(up, plan.packets()[..4]);
    assert_eq!(site.drops(), [("mp.upcalls.limited", 6)]);
    site.check_ledger(0);
}

#[test]
fn a_superpacket_needs_counters_for_all_its_packets_however_it_was_read() {
    let mut site = Site::new(Shape::default());
    let plan = Plan::new(1000, 10_000);
    site.allow(&plan.whole());
    site.allow(&plain_packet(1, 40));
    site.store_counter(COUNTER_LIMIT - 12);
    for _ in 0..2 {
        site.give(&plan.frame());
    }
    site.give(&plain(1, 40));
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);
    site.give(&plain(1, 40));
    poll_all(&site, &mut sealer);

    let datagrams = site.wire(0);
    let mut expected = plan.packets();
    expected.push(plain_packet(1, 40));
    assert_eq!(site.opened(&datagrams, COUNTER_LIMIT - 11), expected);
    assert_eq!(site.drops(), [("drop.exhausted", 11)]);
    site.check_ledger(datagrams.len());
}

#[test]
fn a_tunnel_that_ends_before_its_counters_are_taken_gives_way_to_its_successor_with_one_store() {
    let mut site = Site::new(Shape::default());
    let plan = Plan::new(1000, 5000);
    site.allow(&plan.whole());
    let mut sealer = site.sealer(0);
    site.give(&plan.frame());
    poll_all(&site, &mut sealer);
    let first = site.wire(0);
    let later = Row {
        index: INDEX + 1,
        remote_index: 0x0707_0001,
        key: [0x44; 32],
        ..PROVEN
    };
    site.open(later);
    site.set_tunnel(Some(later.index));
    site.give(&plan.frame());
    poll_all(&site, &mut sealer);

    assert_eq!(site.opened(&first, FIRST_COUNTER), plan.packets());
    let found = site.sealed(0);
    assert_eq!(found[0].0.row, later.index & 0xFFFF);
    let opened = open(
        Cipher::Aes,
        &later.key,
        later.remote_index,
        &found[0].1,
        FIRST_COUNTER,
    );
    assert_eq!(opened, plan.packets());
}

#[test]
fn what_would_overtake_another_worker_is_held_for_a_millisecond_and_what_comes_behind_it_waits() {
    let plan = Plan::new(1248, 12_480);
    let (small, super_) = (plain(2, 40), plan.frame());
    // What is held: a packet, with a superpacket behind it; a superpacket that was read in one piece, or to pieces.
    for (warm, frames) in [
        (false, vec![&small, &super_]),
        (false, vec![&super_]),
        (true, vec![&super_]),
        (true, vec![&small, &super_]),
    ] {
        for waits in [false, true] {
            let mut site = Site::new(Shape {
                workers: 2,
                ..Shape::default()
            });
            site.allow(&plan.whole());
            site.allow(&plain_packet(1, 40));
            let (mut slow, mut fast) = (site.sealer(0), site.sealer(1));
            let mut expected = Vec::new();
            let mut first = FIRST_COUNTER;
            if warm {
                site.give(&super_);
                poll_all(&site, &mut fast);
                let datagrams = site.wire(1);
                assert_eq!(site.opened(&datagrams, first), plan.packets());
                first += plan.count() as u64;
            }
            site.give(&plain(1, 40));
            poll_all(&site, &mut slow); // published, not sent
            site.store_counter(first + SPAN_MAX);
            for frame in &frames {
                site.give(frame);
                expected.extend(if **frame == small {
                    vec![plain_packet(2, 40)]
                } else {
                    plan.packets()
                });
            }

            let taken = fast.poll(1000, site.now_us).unwrap();
            assert_eq!(taken, expected.len());
            assert!(fast.is_holding());
            assert_eq!(fast.waiting().unwrap(), 0);
            site.give(&small);
            expected.push(plain_packet(2, 40));
            assert_eq!(fast.poll(1000, site.now_us + 999).unwrap(), 0);
            assert!(fast.is_holding());
            if waits {
                // One run after the other goes regardless; time goes on with each.
                for _ in 0..4 {
                    site.now_us += 1000;
                    fast.poll(1000, site.now_us).unwrap();
                }
            } else {
                assert_eq!(site.wire(0).len(), 1);
                assert_eq!(fast.poll(1000, site.now_us + 999).unwrap(), 1);
            }

            assert!(!fast.is_holding());
            let datagrams = site.wire(1);
            assert_eq!(site.opened(&datagrams, first + SPAN_MAX + 1), expected);
            assert_eq!(site.stat("mp.counter.span") > 0, waits);
            let before = if warm { plan.count() } else { 0 };
            let left = if waits { site.wire(0).len() } else { 1 };
            site.check_ledger(before + left + datagrams.len());
        }
    }
}

#[test]
fn a_packet_for_another_peer_waits_behind_a_run_that_is_held() {
    let mut site = Site::new(Shape {
        workers: 2,
        ..Shape::default()
    });
    let other = Plan::new(1000, 500);
    site.allow(&plain_packet(1, 40));
    site.allow_other(&other.whole());
    let later = Row {
        index: INDEX + 1,
        remote_index: 0x0707_0001,
        key: [0x44; 32],
        ..PROVEN
    };
    site.open(later);
    site.set_other_tunnel(later.index);
    let (mut slow, mut fast) = (site.sealer(0), site.sealer(1));
    site.give(&plain(1, 40));
    poll_all(&site, &mut slow);
    site.store_counter(FIRST_COUNTER + SPAN_MAX);
    let theirs = [vec![0; 10], other.packets().remove(0)].concat();
    for frame in [&plain(2, 40), &plain(3, 40), &theirs, &theirs] {
        site.give(frame);
    }

    assert_eq!(fast.poll(1000, site.now_us).unwrap(), 3);
    assert!(fast.is_holding());
    assert_eq!(site.wire(0).len(), 1); // it has sent
    assert_eq!(fast.poll(1000, site.now_us).unwrap(), 1);

    let found = site.sealed(1);
    let shape: Vec<_> = found
        .iter()
        .map(|(entry, all)| (entry.row, all.len()))
        .collect();
    assert_eq!(shape, [(3, 2), (4, 2)]);
    let ours = site.opened(&found[0].1, FIRST_COUNTER + SPAN_MAX + 1);
    assert_eq!(ours, [plain_packet(2, 40), plain_packet(3, 40)]);
    let opened = open(
        Cipher::Aes,
        &later.key,
        later.remote_index,
        &found[1].1,
        FIRST_COUNTER,
    );
    assert_eq!(opened, [other.packets(), other.packets()].concat());
    site.check_ledger(5);
}

#[test]
fn a_superpacket_that_loses_its_tunnel_while_it_is_held_goes_up() {
    for warm in [false, true] {
        let mut site = Site::new(Shape {
            workers: 2,
            ..Shape::default()
        });
        let plan = Plan::new(1248, 12_480);
        site.allow(&plan.whole());
        site.allow(&plain_packet(1, 40));
        let (mut slow, mut fast) = (site.sealer(1), site.sealer(0));
        if warm {
            site.give(&plan.frame());
            poll_all(&site, &mut fast);
            assert_eq!(site.wire(0).len(), plan.count());
        }
        site.give(&plain(1, 40));
        poll_all(&site, &mut slow);
        site.store_counter(site.counter() + SPAN_MAX);
        site.give(&plan.frame());
        poll_all(&site, &mut fast);
        assert!(fast.is_holding());
        site.close();
        poll_all(&site, &mut fast);

        let expected: Vec<_> = plan
            .packets()
            .into_iter()
            .map(|each| (NO_TUNNEL, each))
            .collect();
        assert_eq!(site.upcalls(), expected);
        assert!(!fast.is_holding());
    }
}

#[test]
fn who_attaches_again_goes_on_behind_the_counters_that_were_given_out() {
    let mut site = Site::new(Shape::default());
    let plan = Plan::new(1000, 10_000);
    site.allow(&plan.whole());
    let mut next = FIRST_COUNTER;
    for _ in 0..3 {
        let mut sealer = site.sealer(0);
        for _ in 0..2 {
            site.give(&plan.frame());
            poll_all(&site, &mut sealer);
            let datagrams = site.wire(0);
            assert_eq!(site.opened(&datagrams, next), plan.packets());
            next += plan.count() as u64;
        }
    }
}

#[test]
fn memory_for_what_was_read_is_used_again() {
    let mut site = Site::new(Shape::default());
    site.allow(&plain_packet(0, 40));
    site.allow(&Plan::new(1248, 40).whole());
    let mut sealer = site.sealer(0);
    let mut next = FIRST_COUNTER;
    for number in 0..100 {
        let (one, two) = (plain_packet(number, 30_000), plain_packet(number, 33_000));
        for packet in [&one, &two, &one, &two, &one, &two, &one, &two] {
            let mut frame = vec![0; 10];
            frame.extend(packet);
            site.give(&frame);
        }
        poll_all(&site, &mut sealer);
        let datagrams = site.wire(0);
        let both = [one, two];
        assert_eq!(site.opened(&datagrams, next), [&both[..]; 4].concat());
        next += 8;
    }
}

#[test]
fn packets_of_two_tunnels_have_entries_of_their_own() {
    let mut site = Site::new(Shape::default());
    let plan = Plan::new(1000, 5000);
    let other = Plan {
        port: 1,
        ..plan.clone()
    };
    site.allow(&plan.whole());
    site.allow_other(&other.whole());
    let later = Row {
        index: INDEX + 1,
        remote_index: 0x0707_0001,
        key: [0x44; 32],
        ..PROVEN
    };
    site.open(later);
    site.set_other_tunnel(later.index);
    let small = |plan: &Plan| [vec![0; 10], plan.packets().remove(4)].concat();
    for frame in [
        plan.frame(),
        other.frame(),
        small(&plan),
        small(&other),
        small(&other),
    ] {
        site.give(&frame);
    }
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);

    let found = site.sealed(0);
    let shape: Vec<_> = found
        .iter()
        .map(|(entry, all)| (entry.row, all.len()))
        .collect();
    assert_eq!(shape, [(3, 5), (4, 5), (3, 1), (4, 2)]);
    let ours = [&found[0].1[..], &found[2].1].concat();
    let last = plan.packets().remove(4);
    let opened = site.opened(&ours, FIRST_COUNTER);
    assert_eq!(opened, [plan.packets(), vec![last]].concat());
    let theirs = [&found[1].1[..], &found[3].1].concat();
    let opened = open(
        Cipher::Aes,
        &later.key,
        later.remote_index,
        &theirs,
        FIRST_COUNTER,
    );
    let last = other.packets().remove(4);
    assert_eq!(opened, [other.packets(), vec![last.clone(), last]].concat());
}

#[test]
fn a_lost_device_is_a_fault_and_one_without_packets_is_none() {
    let site = Site::new(Shape::default());
    let mut sealer = site.sealer_on(0, -1);
    assert_eq!(sealer.poll(10, site.now_us), Err(Fault::Lost(libc::EBADF)));
    let (unconnected, _peer) = UnixDatagram::pair().unwrap();
    unconnected.set_nonblocking(true).unwrap();
    let mut sealer = site.sealer_on(0, std::os::fd::AsRawFd::as_raw_fd(&unconnected));
    assert_eq!(sealer.poll(10, site.now_us), Ok(0));
}
