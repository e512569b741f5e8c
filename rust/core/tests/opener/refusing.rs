//! What is not authentic, was there before or does not fit is counted under one reason and changes nothing.

use std::collections::BTreeMap;

use nebula_mp_core::error::Fault;
use nebula_mp_core::header::DATAGRAM_BYTES_MAX;
use nebula_mp_core::replay::WIDTH;
use nebula_mp_core::upcalls::Reason;

use crate::host::{code, elsewhere, reasons, Host, Plan, ALL, INDEX, NONE, NOW_MS};
use crate::packets::Flow;
use crate::{host_for, sealed, train};

#[test]
fn a_forged_datagram_in_the_middle_of_a_batch_leaves_no_trace() {
    let mut flow = Flow::new(false, true);
    let mut packets: Vec<_> = (0..30).map(|_| flow.next(900)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let mut datagrams = sealed(&host, 3, &packets);
    let repeated = host.seal(33, &packets[12]);
    let last = datagrams[12].len() - 1;
    datagrams[12][last] ^= 0x80;
    host.deliver_joined(&datagrams);
    host.deliver(&[repeated]);
    host.poll(1000).unwrap();

    let (received, sizes) = host.received();

    let late = packets.remove(12);
    packets.push(late);
    assert!(received == packets);
    assert_eq!(sizes, [12, 17, 1]);
    assert_eq!(host.drops(), BTreeMap::from([("drop.auth", 1)]));
    // Its counter is free still.
    host.deliver(&[host.seal(15, &flow.next(9))]);
    host.poll(10).unwrap();
    assert_eq!(host.received().0.len(), 1);
}

#[test]
fn nothing_forged_can_be_read_from_the_ring() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..5).map(|_| flow.next(900)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let secret = packets[3][400..800].to_vec();
    let mut datagrams = sealed(&host, 3, &packets);
    datagrams[3][940] ^= 1;
    host.deliver_joined(&datagrams[..4]); // behind a superpacket
    host.poll(10).unwrap();
    host.deliver(&datagrams[3..4]); // by itself
    host.poll(10).unwrap();

    let all = host.open.everything();

    let holds = |part: &[u8]| all.windows(part.len()).any(|each| each == part);
    assert!(holds(&packets[2][400..800]));
    assert!(!holds(&secret));
    assert_eq!(host.count("drop.auth"), 2);
}

#[test]
fn every_changed_bit_of_a_datagram_is_noticed_and_moves_nothing() {
    let packet = Flow::new(false, false).next(5);
    let mut host = host_for(Plan::default(), &packet);
    let good = host.seal(3, &packet);
    for bit in 0..8 * good.len() {
        let mut forged = good.clone();
        forged[bit / 8] ^= 1 << (bit % 8);
        host.deliver(&[forged]);
    }
    assert_eq!(host.poll_all(), 8 * good.len());
    assert!(host.received().0.is_empty());
    assert_eq!(host.window(), 2);
    let raw = [code(Reason::UnknownIndex), code(Reason::Datagram)];
    assert!(reasons(&host.upcalls())
        .iter()
        .all(|each| raw.contains(each)));

    host.deliver(&[good]);
    host.poll(10).unwrap();

    assert!(host.received().0 == [packet]);
    assert!(host.count("drop.auth") > 400);
    host.check_ledger(1, 0);
}

#[test]
fn a_hundred_thousand_replays_deliver_nothing() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..50).map(|_| flow.next(100)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let datagrams = sealed(&host, 3, &packets);
    host.deliver_joined(&datagrams);
    host.poll_all();
    assert_eq!(host.received().0.len(), 50);
    for round in 0..2000 {
        if round % 10 == 0 {
            host.deliver(&datagrams);
        } else {
            host.deliver_joined(&datagrams);
        }
        assert_eq!(host.poll_all(), 50);
    }

    assert!(host.received().0.is_empty());
    assert_eq!(host.drops(), BTreeMap::from([("drop.replay", 100_000)]));
    host.check_ledger(50, 0);
}

#[test]
fn what_lies_behind_the_window_is_old() {
    let packet = Flow::new(false, true).next(10);
    let mut host = host_for(Plan::default(), &packet);
    let datagrams: Vec<_> = [WIDTH + 10, 10, 11]
        .iter()
        .map(|counter| host.seal(*counter, &packet))
        .collect();
    host.deliver(&datagrams);
    host.poll(10).unwrap();

    assert_eq!(host.drops(), BTreeMap::from([("drop.old", 1)]));
    assert_eq!(host.received().0.len(), 2);
}

#[test]
fn a_successor_remembers_every_counter() {
    let packets = train(&mut Flow::new(false, true), 20, 300);
    let mut host = host_for(Plan::default(), &packets[0]);
    let datagrams = sealed(&host, 3, &packets);
    host.deliver_joined(&datagrams[..10]);
    host.poll_all();
    host.attach();
    host.deliver(&datagrams);
    host.poll_all();

    assert!(host.received().0 == packets);
    assert_eq!(host.drops(), BTreeMap::from([("drop.replay", 10)]));
}

#[test]
fn each_bad_datagram_has_its_reason_and_the_next_good_one_is_delivered() {
    let packet = Flow::new(false, true).next(10);
    let header = |kind: u8, subtype: u8, counter: u64, more: usize| {
        let mut datagram = vec![kind, subtype, 0, 0];
        datagram.extend(INDEX.to_be_bytes());
        datagram.extend(counter.to_be_bytes());
        datagram.extend(vec![0; more]);
        datagram
    };
    let maker = Host::new(Plan::default());
    let cases: Vec<(Vec<u8>, &'static str)> = vec![
        (vec![0; DATAGRAM_BYTES_MAX + 1], "drop.oversize"),
        (vec![0x11; 60_000], "drop.oversize"),
        (vec![0; 2], "drop.short"),
        (header(0x11, 0, 3, 0)[..15].to_vec(), "drop.short"),
        (header(0x21, 0, 3, 0), "drop.version"),
        (header(0x17, 0, 3, 0), "drop.type"),
        (header(0x11, 2, 3, 0), "drop.type"),
        (header(0x11, 0, 3, 0), "drop.truncated"),
        (header(0x11, 0, 3, 15), "drop.truncated"),
        (header(0x11, 0, 3, 16), "drop.auth"),
        (header(0x11, 0, 2, 16), "drop.replay"),
        (header(0x11, 0, 0, 16), "drop.replay"),
        (maker.seal(3, b""), "drop.inner_ip"),
        (maker.seal(3, &packet[..19]), "drop.inner_ip"),
        (maker.seal(3, &vec![0x45; 8900]), "drop.source_addr"),
    ];
    for offloads in [ALL, NONE] {
        for (datagram, reason) in &cases {
            let plan = Plan {
                offloads,
                ..Plan::default()
            };
            let mut host = host_for(plan, &packet);
            host.deliver(&[datagram.clone(), host.seal(4, &packet)]);

            assert_eq!(host.poll(10).unwrap(), 2);

            assert_eq!(host.drops(), BTreeMap::from([(*reason, 1)]));
            assert!(host.received().0 == std::slice::from_ref(&packet));
            host.check_ledger(1, 0);
        }
    }
}

#[test]
fn a_packet_that_fits_no_area_is_oversize_and_its_counter_stays_free() {
    let mut flow = Flow::new(false, true);
    let (large, small) = (flow.next(4000), flow.next(100));
    let plan = Plan {
        area_bytes: 4096,
        ..Plan::default()
    };
    let mut host = host_for(plan, &large);
    host.deliver(&[host.seal(3, &large), host.seal(3, &small)]);
    host.poll(10).unwrap();

    assert_eq!(host.drops(), BTreeMap::from([("drop.oversize", 1)]));
    assert!(host.received().0 == [small]);
}

#[test]
fn a_full_ring_drops_before_the_window_moves() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..120).map(|_| flow.next(1300)).collect();
    let plan = Plan {
        areas: 1,
        ..Plan::default()
    };
    let mut host = host_for(plan, &packets[0]);
    let datagrams = sealed(&host, 3, &packets);
    datagrams
        .chunks(40)
        .for_each(|batch| host.deliver_joined(batch));
    assert_eq!(host.poll_all(), 120);

    let (received, _) = host.received();
    let count = received.len();
    assert!(count >= 40);
    assert!(received == packets[..count]);
    assert_eq!(host.count("mp.ring.full.open"), 120 - count as u64);
    assert_eq!(host.window(), 2 + count as u64);

    for batch in datagrams[count..].chunks(40) {
        host.deliver_joined(batch);
        host.poll_all();
        let (received, _) = host.received();
        assert!(received.iter().all(|each| packets.contains(each)));
    }
    assert_eq!(host.window(), 122);
}

#[test]
fn a_tunnel_that_ended_while_its_row_went_on_is_not_known() {
    let packet = Flow::new(false, true).next(10);
    let mut host = host_for(Plan::default(), &packet);
    host.outdate_window();
    host.deliver(&[host.seal(3, &packet)]);
    host.poll(10).unwrap();

    assert_eq!(host.drops(), BTreeMap::from([("drop.unknown_index", 1)]));
    assert!(host.received().0.is_empty());
}

#[test]
fn datagrams_from_inside_the_overlay_have_looped() {
    let packet = Flow::new(false, true).next(10);
    let mut plan = Plan::default();
    let mut loopback = [0; 16];
    loopback[0] = 127;
    plan.overlay.push((loopback, 4, 8));
    let mut host = host_for(plan, &packet);
    host.deliver(&[host.seal(3, &packet), vec![1], vec![0; 3]]);
    host.poll(10).unwrap();

    let expected = BTreeMap::from([("drop.looped", 2), ("drop.short", 1)]);
    assert_eq!(host.drops(), expected);
    host.check_ledger(0, 0);
}

#[test]
fn refused_flows_and_addresses_that_are_not_the_peers_are_counted() {
    let mut refused = Flow::new(true, true);
    let mut lying = Flow::new(false, false);
    lying.source = [10, 9, 0, 77];
    let mut good = Flow::new(false, true);
    let packets = [refused.next(100), lying.next(100), good.next(100)];
    let mut host = host_for(Plan::default(), &packets[2]);
    host.refuse(&packets[0]);
    host.deliver(&sealed(&host, 3, &packets));
    host.poll(10).unwrap();

    let expected = BTreeMap::from([
        ("drop.firewall.incoming.no_rule", 1),
        ("drop.source_addr", 1),
    ]);
    assert_eq!(host.drops(), expected);
    assert!(host.received().0 == packets[2..]);
    host.check_ledger(1, 0);
}

#[test]
fn traffic_is_what_was_authentic() {
    let packets = train(&mut Flow::new(false, true), 10, 500);
    let mut host = host_for(Plan::default(), &packets[0]);
    let mut datagrams = sealed(&host, 3, &packets);
    datagrams[4][20] ^= 1;
    host.deliver_joined(&datagrams);
    host.poll(100).unwrap();

    let bytes: usize = datagrams.iter().map(Vec::len).sum();
    let authentic = bytes - datagrams[4].len();
    assert_eq!(host.traffic(), [9, authentic as u64, NOW_MS]);
    assert_eq!(host.count("mp.udp.rx.packets"), 10);
    assert_eq!(host.count("mp.udp.rx.bytes"), bytes as u64);
}

#[test]
fn a_poll_takes_no_more_than_its_budget() {
    let packet = Flow::new(false, true).next(10);
    let mut host = host_for(Plan::default(), &packet);
    let datagrams: Vec<_> = (3..13).map(|each| host.seal(each, &packet)).collect();
    host.deliver(&datagrams);

    let polls = [4; 4].map(|budget| host.poll(budget).unwrap());

    assert_eq!(polls, [4, 4, 2, 0]);
    let opener = host.opener.as_mut().unwrap();
    assert_eq!(opener.waiting().unwrap(), 3);
}

#[test]
fn an_error_of_the_network_is_counted_and_a_lost_descriptor_ends_the_part() {
    let packet = Flow::new(false, true).next(10);
    let mut host = host_for(Plan::default(), &packet);
    host.poll(1).unwrap();
    let nobody = elsewhere();
    let gone = nobody.local_addr().unwrap();
    drop(nobody);
    host.udp.connect(gone).unwrap();
    host.udp.send(b"x").unwrap(); // ECONNREFUSED comes back
    assert_eq!(host.poll(10).unwrap(), 1);
    assert_eq!(host.count("mp.rx.icmp"), 1);

    let pipe = std::fs::File::open("/dev/null").unwrap();
    let udp = std::os::fd::AsRawFd::as_raw_fd(&host.udp);
    // SAFETY: replaces one descriptor of ours by another.
    assert!(unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&pipe), udp) } >= 0);
    assert_eq!(host.poll(10), Err(Fault::Lost(libc::ENOTSOCK)));
}
