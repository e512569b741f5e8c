//! Whatever comes, in whatever order: the peer gets it as it is meant, or it is counted.

use proptest::prelude::*;

use crate::plans::{
    frame, plain, small, tcp, udp, v6, Plan, ACK, CWR, FIN, PSH, TCP, TIMESTAMPS, UDP,
};
use crate::poll_all;
use crate::site::{Shape, Site, FIRST_COUNTER};

/// What a step of a history gives to the device.
#[derive(Debug, Clone)]
enum Item {
    Super(Plan),
    Plain(u32, usize),
}

impl Item {
    fn frame(&self) -> Vec<u8> {
        match self {
            Item::Super(plan) => frame(plan),
            Item::Plain(number, size) => plain(*number, *size),
        }
    }

    fn packets(&self) -> Vec<Vec<u8>> {
        match self {
            Item::Super(plan) => plan.packets(),
            Item::Plain(number, size) => vec![small(*number, *size)],
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
        let mut plan = tcp(size, length);
        plan.version = if is_ipv6 { 6 } else { 4 };
        plan.protocol = if is_udp && !has_options { UDP } else { TCP };
        if has_options {
            plan.options = TIMESTAMPS.to_vec();
        }
        if ends {
            plan.flags = ACK | PSH | FIN | CWR;
        }
        Item::Super(plan)
    });
    let again = (0..3_usize).prop_map(|which| {
        let mut plan = tcp(1248, [61_152, 20_000, 1249][which]);
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
        area_bytes in prop::sample::select(vec![4096_usize, 9216, 72 * 1024]),
        at_once in 1..4_usize,
        budget in prop::sample::select(vec![1_usize, 40, 1000]),
    ) {
        // Room for three superpackets of the most and smallest packets.
        let areas = if area_bytes < 10_000 { 2048 } else { 64 };
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
        let plan = tcp(1248, 30_000);
        if is_known {
            for known in [tcp(1248, 30_000), udp(1248, 30_000), v6(tcp(1248, 30_000))] {
                site.allow(&known.packet());
            }
        }
        let mut sealer = site.sealer(0);
        let mut sealed = 0;
        for forged in frames {
            site.give(&frame(&plan));
            site.give(&forged);
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
        let mut plan = tcp(1248, length);
        plan.version = if is_ipv6 { 6 } else { 4 };
        plan.protocol = if is_udp { UDP } else { TCP };
        let mut frame = frame(&plan);
        for (at, value) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        frame
    });
    let short = (0..120_usize).prop_map(|length| {
        let mut frame = frame(&tcp(1248, 100));
        frame.truncate(length);
        frame
    });
    prop_oneof![prop::collection::vec(any::<u8>(), 0..200), changed, short,]
}
