//! What is not sealed: it goes up to control as single packets, or is counted once for each of them.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use nebula_mp_core::error::Fault;

use crate::plans::{frame, longest, plain, small, tcp, udp, whole, Plan};
use crate::site::{Row, Shape, Site, FIRST_COUNTER, PROVEN};
use crate::{poll_all, NEW_FLOW_OUT, NO_TUNNEL};

#[test]
fn a_full_ring_drops_the_rest_of_a_superpacket_without_taking_counters() {
    let mut site = Site::new(Shape {
        areas: 2,
        ..Shape::default()
    });
    let plan = longest(tcp(36, 0));
    site.allow(&plan.packet());
    site.allow(&small(1, 40));
    site.give(&frame(&plan));
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
    assert_eq!(site.opened(&datagrams, next), [small(1, 40)]);
}

#[test]
fn a_ring_that_is_full_when_the_next_superpacket_is_expected_drops_it_and_goes_on() {
    let mut site = Site::new(Shape {
        areas: 1,
        ..Shape::default()
    });
    let plan = tcp(1248, 61_152);
    site.allow(&plan.packet());
    let mut sealer = site.sealer(0);
    let mut next = FIRST_COUNTER;
    for _ in 0..3 {
        site.give(&frame(&plan));
        site.give(&frame(&plan));
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
    let mut empty_segments = frame(&tcp(1248, 3000));
    empty_segments[4..6].fill(0);
    let mut wrong_version = frame(&tcp(1248, 3000));
    wrong_version[1] = 4;
    for bad in [
        vec![],
        vec![0; 9],
        wrong_flag,
        empty_segments,
        wrong_version,
    ] {
        let mut site = Site::new(Shape::default());
        let plan = tcp(1248, 3000);
        site.allow(&plan.packet());
        let mut sealer = site.sealer(0);
        // In front of what is read in one piece, and of what is read to pieces.
        for frame in [&bad, &frame(&plan), &bad] {
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
            let plan = tcp(size, 39_960);
            site.allow(&plan.packet());
            let mut sealer = site.sealer(0);
            site.give(&frame(&plan));
            poll_all(&site, &mut sealer);
            let sealed = site.wire(0).len();
            change(&site, &plan);
            site.give(&frame(&plan));
            site.give(&frame(&plan));

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
    let (known, unknown) = (tcp(1248, 39_960), udp(1248, 30_000));
    site.allow(&known.packet());
    let mut sealer = site.sealer(0);
    for frame in [
        frame(&unknown),
        frame(&known),
        frame(&unknown),
        plain(1, 50),
    ] {
        site.give(&frame);
    }

    poll_all(&site, &mut sealer);

    let datagrams = site.wire(0);
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), known.packets());
    let mut expected = [unknown.packets(), unknown.packets()].concat();
    expected.push(small(1, 50));
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
    let known = tcp(1248, 39_960);
    let mut unknown = known.clone();
    unknown.ports.0 = 1;
    unknown.payload.reverse();
    site.allow(&known.packet());
    let mut sealer = site.sealer(0);
    site.give(&frame(&known));
    site.give(&frame(&unknown));
    site.give(&frame(&known));

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
    let (known, refused) = (tcp(1000, 10_000), tcp(1000, 10_000));
    let refused = Plan {
        ports: (1, 2),
        ..refused
    };
    site.allow(&known.packet());
    site.refuse(&refused.packet());
    let mut sealer = site.sealer(0);
    for plan in [&refused, &known, &refused] {
        site.give(&frame(plan));
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
    let (large, fits) = (tcp(1950, 10_000), tcp(1900, 1_900));
    site.allow(&large.packet());
    site.allow(&small(1, 1950));
    site.give(&frame(&large));
    site.give(&plain(1, 1950));
    site.give(&frame(&fits));
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
    let plan = tcp(1000, 10_000);
    site.give(&frame(&plan));
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
fn a_lost_device_is_a_fault_and_one_without_packets_is_none() {
    let site = Site::new(Shape::default());
    let mut sealer = site.sealer_on(0, -1);
    assert_eq!(sealer.poll(10, site.now_us), Err(Fault::Lost(libc::EBADF)));
    let (unconnected, _peer) = UnixDatagram::pair().unwrap();
    unconnected.set_nonblocking(true).unwrap();
    let mut sealer = site.sealer_on(0, unconnected.as_raw_fd());
    assert_eq!(sealer.poll(10, site.now_us), Ok(0));
}

#[test]
fn a_packet_that_goes_up_leaves_its_room_in_front_of_a_superpacket_that_is_where_it_belongs() {
    let mut site = Site::new(Shape::default());
    let plan = tcp(1248, 20_000);
    let mut other = tcp(1000, 700);
    other.ports = (1, 2);
    site.allow(&plan.packet());
    site.allow_other(&other.packet()); // which has no tunnel
    let mut sealer = site.sealer(0);
    for frame in [frame(&plan), whole(&other.one(0)), frame(&plan)] {
        site.give(&frame);
    }

    poll_all(&site, &mut sealer);

    assert_eq!(sealer.scattered(), 1);
    assert_eq!(site.upcalls(), [(NO_TUNNEL, other.one(0))]);
    let found = site.sealed(0);
    let behind = found[0].0.offset + found[0].0.length;
    assert_eq!(found[1].0.offset, behind + 740 + 32);
    let datagrams: Vec<_> = found.into_iter().flat_map(|(_, all)| all).collect();
    let expected = [plan.packets(), plan.packets()].concat();
    assert_eq!(site.opened(&datagrams, FIRST_COUNTER), expected);
    site.check_ledger(datagrams.len());
}
