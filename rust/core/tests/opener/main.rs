//! UDP to open ring: each datagram is delivered, handed over, or counted under one reason; and what was sealed
//! comes out of the ring, cut back, byte for byte and in order.
#![cfg(all(not(miri), not(loom)))]

mod host;

use std::collections::BTreeMap;

use nebula_mp_core::aead::Cipher;
use nebula_mp_core::error::Fault;
use nebula_mp_core::header::{
    CLOSE_TUNNEL, CONTROL, DATAGRAM_BYTES_MAX, HANDSHAKE, LIGHTHOUSE, MESSAGE, RECV_ERROR, TEST,
};
use nebula_mp_core::replay::WIDTH;
use nebula_mp_core::tunnels::TunnelState;
use nebula_mp_core::upcalls::{Limits, Reason};
use nebula_mp_core::virtio::HEADER_BYTES as VIRTIO_BYTES;
use proptest::prelude::*;

use host::{
    code, elsewhere, reasons, record, Flow, Host, Plan, ACK, ALL, INDEX, NONE, NOW_MS, PSH,
};

const KINDS: [(bool, bool); 4] = [(false, true), (true, true), (false, false), (true, false)];

/// A host that admits the flow of `packet`.
fn host_for(plan: Plan, packet: &[u8]) -> Host {
    let host = Host::new(plan);
    host.allow(packet);
    host
}

/// So many packets of a flow, the last one shorter.
fn train(flow: &mut Flow, count: usize, bytes: usize) -> Vec<Vec<u8>> {
    let mut packets: Vec<_> = (1..count).map(|_| flow.next(bytes)).collect();
    packets.push(flow.next(bytes / 2 + 1));
    packets
}

fn sealed(host: &Host, first: u64, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let numbered = (first..).zip(packets);
    numbered
        .map(|(counter, each)| host.seal(counter, each))
        .collect()
}

#[test]
fn a_batch_of_one_flow_becomes_one_superpacket_of_the_same_packets() {
    for (is_ipv6, is_tcp) in KINDS {
        for cipher in [Cipher::Aes, Cipher::ChaCha] {
            let packets = train(&mut Flow::new(is_ipv6, is_tcp), 40, 1200);
            let plan = Plan {
                cipher,
                ..Plan::default()
            };
            let mut host = host_for(plan, &packets[0]);
            host.deliver_joined(&sealed(&host, 3, &packets));

            assert_eq!(host.poll(1000).unwrap(), 40);

            let (received, sizes) = host.received();
            assert_eq!(sizes, [40]);
            assert!(received == packets);
            assert!(host.upcalls().is_empty());
            assert_eq!(host.window(), 42);
            host.check_ledger(40, 0);
        }
    }
}

#[test]
fn one_flow_is_joined_across_batches_of_a_pass_and_not_across_passes() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..20).map(|_| flow.next(1000)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let datagrams = sealed(&host, 3, &packets);
    host.deliver_joined(&datagrams[..7]);
    host.deliver(&datagrams[7..9]);
    host.deliver_joined(&datagrams[9..15]);
    host.poll(1000).unwrap();
    host.deliver_joined(&datagrams[15..]);
    host.poll(1000).unwrap();

    let (received, sizes) = host.received();

    assert!(received == packets);
    assert_eq!(sizes, [15, 5]);
}

#[test]
fn a_superpacket_is_never_cut_in_two_by_the_end_of_an_area() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..4 * 45).map(|_| flow.next(1300)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let datagrams = sealed(&host, 3, &packets);
    for batch in datagrams.chunks(45) {
        host.deliver_joined(batch);
        host.poll(1000).unwrap();
    }

    let (received, sizes) = host.received();

    assert!(received == packets);
    assert_eq!(sizes, [45; 4]);
}

#[test]
fn a_superpacket_ends_where_it_is_full_and_the_next_one_begins_in_the_next_area() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..120).map(|_| flow.next(1300)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let datagrams = sealed(&host, 3, &packets);
    datagrams
        .chunks(40)
        .for_each(|batch| host.deliver_joined(batch));

    assert_eq!(host.poll_all(), 120);

    let (received, sizes) = host.received();
    assert!(received == packets);
    assert!(sizes.len() <= 4, "{sizes:?}");
    assert_eq!(sizes[0], 50); // 65,535 bytes
    host.check_ledger(120, 0);
}

#[test]
fn a_superpacket_of_udp_has_no_more_packets_than_the_kernel_would_join() {
    for (is_tcp, expected) in [(false, vec![64, 64, 22]), (true, vec![150])] {
        let mut flow = Flow::new(false, is_tcp);
        let packets: Vec<_> = (0..150).map(|_| flow.next(20)).collect();
        let mut host = host_for(Plan::default(), &packets[0]);
        let datagrams = sealed(&host, 3, &packets);
        datagrams
            .chunks(50)
            .for_each(|batch| host.deliver_joined(batch));
        host.poll_all();

        let (received, sizes) = host.received();

        assert!(received == packets);
        assert_eq!(sizes, expected);
    }
}

#[test]
fn one_flow_through_two_tunnels_of_its_peer_is_not_joined_across_them() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..10).map(|_| flow.next(300)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let second = 0xABCD_0007;
    host.connect(second, 0, TunnelState::Proven);
    let mut datagrams = sealed(&host, 3, &packets[..5]);
    datagrams.extend(
        (3..)
            .zip(&packets[5..])
            .map(|(counter, each)| host.message(MESSAGE, 0, second, counter, each)),
    );
    host.deliver_joined(&datagrams);
    host.poll(100).unwrap();

    let entries = host.entries();

    let found: Vec<_> = entries
        .iter()
        .map(|(entry, _)| (entry.row, entry.segment))
        .collect();
    assert_eq!(found, [(INDEX & 0xFFFF, 5), (7, 5)]);
    host.check_ledger(10, 0);
}

#[test]
fn small_packets_of_many_flows_fill_the_tables_of_areas_and_no_more() {
    let mut flows: Vec<_> = (0..7)
        .map(|each| Flow::new(false, true).on_port(7000 + each))
        .collect();
    let packets: Vec<_> = (0..210).map(|each| flows[each % 7].next(20)).collect();
    let plan = Plan {
        entries: 16,
        areas: 32,
        ..Plan::default()
    };
    let mut host = Host::new(plan);
    packets[..7].iter().for_each(|each| host.allow(each));
    let datagrams = sealed(&host, 3, &packets);
    datagrams
        .chunks(42)
        .for_each(|batch| host.deliver_joined(batch));
    host.poll_all();

    assert!(host.received().0 == packets);
    host.check_ledger(210, 0);
}

#[test]
fn single_datagrams_are_delivered_in_order_whatever_the_offloads() {
    for offloads in [ALL, NONE] {
        for (is_ipv6, is_tcp) in KINDS {
            let mut flow = Flow::new(is_ipv6, is_tcp);
            let packets: Vec<_> = (0..40).map(|each| flow.next(10 + 37 * each)).collect();
            let plan = Plan {
                offloads,
                ..Plan::default()
            };
            let mut host = host_for(plan, &packets[0]);
            host.deliver(&sealed(&host, 3, &packets));

            assert_eq!(host.poll(1000).unwrap(), 40);

            assert!(host.received().0 == packets);
            host.check_ledger(40, 0);
        }
    }
}

#[test]
fn only_kinds_that_the_device_takes_are_joined() {
    for (tso, uso) in [(true, false), (false, true)] {
        for (is_ipv6, is_tcp) in KINDS {
            let packets = train(&mut Flow::new(is_ipv6, is_tcp), 20, 800);
            let mut plan = Plan::default();
            (plan.offloads.tso, plan.offloads.uso) = (tso, uso);
            let mut host = host_for(plan, &packets[0]);
            host.deliver_joined(&sealed(&host, 3, &packets));
            host.poll(1000).unwrap();

            let (received, sizes) = host.received();

            assert!(received == packets);
            assert_eq!(sizes.len(), if is_tcp == tso { 1 } else { 20 });
        }
    }
}

#[test]
fn without_a_header_of_the_device_an_entry_is_the_bare_packet() {
    let packets = train(&mut Flow::new(false, true), 5, 300);
    let plan = Plan {
        offloads: nebula_mp_core::opener::Offloads {
            udp_gro: true,
            ..NONE
        },
        ..Plan::default()
    };
    let mut host = host_for(plan, &packets[0]);
    host.deliver_joined(&sealed(&host, 3, &packets));
    host.poll(1000).unwrap();

    let entries = host.entries();

    let found: Vec<_> = entries.into_iter().map(|(_, data)| data).collect();
    assert!(found == packets);
}

#[test]
fn a_lone_packet_has_an_empty_header_in_front() {
    let packet = Flow::new(true, true).next(700);
    let mut host = host_for(Plan::default(), &packet);
    host.deliver(&[host.seal(3, &packet)]);
    host.poll(10).unwrap();

    let entries = host.entries();

    let (entry, data) = &entries[0];
    assert_eq!((entries.len(), entry.segment), (1, 1));
    assert_eq!(data[..VIRTIO_BYTES], [0; VIRTIO_BYTES]);
    assert_eq!(data[VIRTIO_BYTES..], packet);
}

#[test]
fn psh_ends_a_superpacket() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..12)
        .map(|each| {
            flow.flags = if each == 4 || each == 5 {
                ACK | PSH
            } else {
                ACK
            };
            flow.next(500)
        })
        .collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    host.deliver_joined(&sealed(&host, 3, &packets));
    host.poll(1000).unwrap();

    let (received, sizes) = host.received();

    assert!(received == packets);
    assert_eq!(sizes, [5, 1, 6]);
}

#[test]
fn a_gap_a_repetition_and_a_wrong_checksum_end_a_superpacket_and_lose_nothing() {
    let mut flow = Flow::new(false, true);
    let mut packets: Vec<_> = (0..20).map(|_| flow.next(500)).collect();
    packets.remove(5); // lost by the sender's stack
    packets.swap(9, 10);
    packets[14][60] ^= 1; // damaged before it was sealed
    let mut host = host_for(Plan::default(), &packets[0]);
    host.deliver_joined(&sealed(&host, 3, &packets));
    host.poll(1000).unwrap();

    let (received, sizes) = host.received();

    assert!(received == packets);
    assert_eq!(sizes, [5, 4, 1, 1, 3, 1, 4]);
    host.check_ledger(19, 0);
}

#[test]
fn datagrams_that_came_in_another_order_are_delivered_in_that_order() {
    let mut flow = Flow::new(true, true);
    let packets: Vec<_> = (0..10).map(|_| flow.next(400)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let mut datagrams = sealed(&host, 3, &packets);
    datagrams.reverse();
    host.deliver_joined(&datagrams);
    host.poll(1000).unwrap();

    let (mut received, _) = host.received();

    received.reverse();
    assert!(received == packets);
    assert_eq!(host.window(), 12);
}

#[test]
fn flows_that_alternate_are_kept_apart_and_in_order() {
    let mut flows = [5000, 5001, 5002].map(|port| Flow::new(false, true).on_port(port));
    let packets: Vec<_> = (0..45).map(|each| flows[each % 3].next(600)).collect();
    let mut host = Host::new(Plan::default());
    packets[..3].iter().for_each(|each| host.allow(each));
    host.deliver_joined(&sealed(&host, 3, &packets));
    host.poll(1000).unwrap();

    let (received, sizes) = host.received();

    assert!(received == packets);
    assert_eq!(sizes, [1; 45]);
    host.check_ledger(45, 0);
}

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
fn other_messages_go_up_opened_even_when_the_open_ring_is_full() {
    for (kind, subtype) in [
        (TEST, 0),
        (TEST, 1),
        (LIGHTHOUSE, 0),
        (CONTROL, 0),
        (CLOSE_TUNNEL, 0),
    ] {
        let packet = Flow::new(false, true).next(10);
        let plan = Plan {
            areas: 1,
            ..Plan::default()
        };
        let mut host = host_for(plan, &packet);
        host.deliver(&[host.seal(3, &packet)]);
        host.poll(10).unwrap();
        let content = b"what the message says";
        host.deliver(&[
            host.message(kind, subtype, INDEX, 4, content),
            host.message(kind, subtype, INDEX, 4, content),
            host.seal(5, &packet),
        ]);
        host.poll(10).unwrap();

        let upcalls = host.upcalls();

        assert_eq!(reasons(&upcalls), [code(Reason::Message)]);
        let up = &upcalls[0];
        assert_eq!((up.index, up.kind, up.subtype), (INDEX, kind, subtype));
        assert_eq!((up.port, &up.packet[..]), (host.far_port(), &content[..]));
        let expected = BTreeMap::from([("drop.replay", 1), ("mp.ring.full.open", 1)]);
        assert_eq!(host.drops(), expected);
        host.check_ledger(1, 0);
    }
}

#[test]
fn messages_between_packets_go_up_and_the_packets_stay_in_order() {
    let mut flow = Flow::new(false, true);
    let packets: Vec<_> = (0..20).map(|_| flow.next(500)).collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    let mut datagrams = sealed(&host, 3, &packets);
    let size = packets[0].len();
    datagrams[7] = host.message(TEST, 0, INDEX, 10, &vec![7; size]);
    datagrams[8] = host.message(TEST, 1, INDEX, 11, &vec![8; size]);
    datagrams[9][2] = 1; // a reserved byte, which is authentic as it was sealed
    host.deliver_joined(&datagrams);
    host.poll(100).unwrap();

    let upcalls = host.upcalls();

    assert_eq!(reasons(&upcalls), [code(Reason::Message); 2]);
    assert_eq!((upcalls[0].packet[0], upcalls[1].packet[0]), (7, 8));
    let expected = [&packets[..7], &packets[10..]].concat();
    assert!(host.received().0 == expected);
    assert_eq!(host.drops(), BTreeMap::from([("drop.auth", 1)]));
    host.check_ledger(17, 0);
}

#[test]
fn what_is_not_for_readers_goes_up_raw() {
    let mut host = Host::new(Plan::default());
    let handshake = host.message(HANDSHAKE, 0, 0, 1, &[5; 100]);
    let datagrams = vec![
        vec![],
        vec![1],
        handshake,
        host.message(RECV_ERROR, 0, INDEX, 0, b""),
        host.message(MESSAGE, 1, INDEX, 7, b"a relay frame"),
    ];
    host.deliver(&datagrams);
    assert_eq!(host.poll(10).unwrap(), 5);

    let upcalls = host.upcalls();

    assert_eq!(reasons(&upcalls), [code(Reason::Datagram); 5]);
    for (up, datagram) in upcalls.iter().zip(&datagrams) {
        assert_eq!(&up.packet, datagram);
        assert_eq!(up.port, host.far_port());
    }
    assert_eq!(host.window(), 0); // never begun
    host.check_ledger(0, 0);
}

#[test]
fn unknown_indexes_go_up_raw_and_beyond_the_limit_are_counted() {
    let packet = Flow::new(false, true).next(10);
    let plan = Plan {
        limits: Limits {
            unknown: (1, 2),
            ..Plan::default().limits
        },
        ..Plan::default()
    };
    let mut host = host_for(plan, &packet);
    // The row is ours, the tunnel is not; and a row that no table has.
    let stranger = host.message(MESSAGE, 0, 0x1111_0003, 3, &packet);
    let nowhere = host.message(MESSAGE, 0, 0xFFFF_FFFF, 3, &packet);
    host.deliver(&[stranger.clone(), nowhere.clone(), stranger.clone()]);
    host.poll(10).unwrap();

    let upcalls = host.upcalls();

    assert_eq!(reasons(&upcalls), [code(Reason::UnknownIndex); 2]);
    assert_eq!(upcalls[0].packet, stranger);
    assert_eq!(upcalls[1].packet, nowhere);
    assert_eq!(host.drops(), BTreeMap::from([("drop.unknown_index", 1)]));
    host.check_ledger(0, 0);
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
fn new_flows_go_up_opened_in_the_order_in_which_they_came() {
    let mut known = Flow::new(false, true);
    let mut new = Flow::new(false, true).on_port(6000);
    let packets: Vec<_> = (0..30)
        .map(|each| match each % 10 {
            0..=6 => known.next(400),
            _ => new.next(400),
        })
        .collect();
    let mut host = host_for(Plan::default(), &packets[0]);
    host.deliver_joined(&sealed(&host, 3, &packets));
    host.poll(100).unwrap();

    let (received, sizes) = host.received();
    let upcalls = host.upcalls();

    let (passed, up): (Vec<_>, Vec<_>) = (0..30).partition(|each| each % 10 <= 6);
    assert!(received
        .iter()
        .eq(passed.iter().map(|each| &packets[*each])));
    assert_eq!(sizes, [7, 7, 7]);
    assert!(upcalls
        .iter()
        .map(|each| &each.packet)
        .eq(up.iter().map(|each| &packets[*each])));
    assert!(upcalls
        .iter()
        .all(|each| each.reason == code(Reason::NewFlowIn)));
    assert!(upcalls.iter().all(|each| each.index == INDEX));
    assert_eq!(host.window(), 32);
    host.check_ledger(21, 0);
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
fn the_first_message_on_a_candidate_goes_up_whatever_it_is() {
    let packet = Flow::new(false, true).next(100);
    let mut host = host_for(Plan::default(), &packet);
    host.connect(INDEX, 0, TunnelState::Candidate);
    host.deliver(&[
        host.seal(3, &packet),
        host.message(TEST, 1, INDEX, 4, b"reply"),
        host.seal(3, &packet),
    ]);
    host.poll(10).unwrap();

    let upcalls = host.upcalls();

    assert_eq!(reasons(&upcalls), [code(Reason::First); 2]);
    assert_eq!(upcalls[0].packet, packet);
    assert_eq!((upcalls[0].index, upcalls[0].kind), (INDEX, MESSAGE));
    assert_eq!(upcalls[1].packet, b"reply");
    assert!(host.received().0.is_empty());
    assert_eq!(host.drops(), BTreeMap::from([("drop.replay", 1)]));
    host.check_ledger(0, 0);
}

#[test]
fn a_peer_that_moved_is_delivered_from_and_told_of() {
    let packets = train(&mut Flow::new(false, true), 20, 500);
    let mut host = host_for(Plan::default(), &packets[0]);
    let datagrams = sealed(&host, 3, &packets);
    host.deliver_joined(&datagrams[..10]);
    let far = elsewhere();
    host.deliver_from(&far, &datagrams[10..]);
    host.deliver_from(&far, &datagrams[10..12]); // copies prove nothing
    host.poll(100).unwrap();

    let upcalls = host.upcalls();

    assert!(host.received().0 == packets);
    assert_eq!(reasons(&upcalls), [code(Reason::Moved); 5]); // the burst of notices
    assert!(upcalls.iter().all(|each| each.packet.is_empty()));
    assert_eq!(upcalls[0].port, far.local_addr().unwrap().port());
    assert_eq!(upcalls[0].index, INDEX);
    assert_eq!(host.count("mp.upcalls"), 0); // nothing was taken out of the stream
    assert_eq!(host.drops(), BTreeMap::from([("drop.replay", 2)]));
    host.check_ledger(20, 0);
}

#[test]
fn datagrams_of_another_readers_tunnel_are_handed_to_it_with_their_source() {
    let packet = Flow::new(false, true).next(100);
    let mut host = host_for(Plan::default(), &packet);
    let (theirs, nobodys) = (0xABCD_0007, 0xABCD_0008);
    host.connect(theirs, 1, TunnelState::Proven);
    host.connect(nobodys, 9, TunnelState::Proven);
    let datagram = host.message(MESSAGE, 0, theirs, 3, &packet);
    host.deliver(&[
        datagram.clone(),
        host.message(MESSAGE, 0, nobodys, 3, &packet),
        host.seal(3, &packet),
    ]);
    host.poll(10).unwrap();

    let handed = host.strangers();

    assert_eq!(handed.len(), 1);
    assert_eq!(handed[0], record(host.far_port(), &datagram));
    assert_eq!(host.count("mp.strangers"), 1);
    assert_eq!(host.drops(), BTreeMap::from([("mp.ring.full.stranger", 1)]));
    assert_eq!(host.received().0.len(), 1);
    host.check_ledger(1, 0);
}

#[test]
fn what_another_reader_hands_over_is_opened_as_if_it_had_come_here() {
    for offloads in [ALL, NONE] {
        let mut flow = Flow::new(false, true);
        let packets: Vec<_> = (0..10).map(|_| flow.next(500)).collect();
        let plan = Plan {
            offloads,
            ..Plan::default()
        };
        let mut host = host_for(plan, &packets[0]);
        let mut records: Vec<_> = sealed(&host, 3, &packets)
            .iter()
            .map(|each| record(host.far_port(), each))
            .collect();
        records.push(record(host.far_port(), &host.seal(3, &packets[0])));
        records.push(record(1, &vec![0; DATAGRAM_BYTES_MAX + 100]));
        records.push(record(77, &[0]));
        records.push(record(4242, &host.seal(20, &flow.next(7))));
        host.stranger_in.fill(&records);

        assert_eq!(host.poll(3).unwrap(), 11); // one area, whole
        assert_eq!(host.poll(3).unwrap(), records.len() - 11);

        let upcalls = host.upcalls();
        assert_eq!(
            reasons(&upcalls),
            [code(Reason::Datagram), code(Reason::Moved)]
        );
        assert_eq!((upcalls[0].port, upcalls[1].port), (77, 4242));
        let (received, _) = host.received();
        assert!(received[..10] == packets);
        assert_eq!(received.len(), 11);
        let expected = BTreeMap::from([("drop.replay", 1), ("drop.oversize", 1)]);
        assert_eq!(host.drops(), expected);
        assert_eq!(host.count("mp.udp.rx.packets"), 0);
        host.check_ledger(11, records.len());
    }
}

#[test]
fn a_record_that_no_reader_writes_ends_the_part() {
    for broken in [vec![0; 39], {
        let mut strange = record(1, b"x");
        strange[14] = 5; // address family
        strange
    }] {
        let mut host = Host::new(Plan::default());
        host.stranger_in.fill(&[broken]);
        assert!(matches!(host.poll(1), Err(Fault::Contradiction(_))));
    }
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

/// What happens to the next datagram of a stream.
#[derive(Debug, Clone)]
enum Event {
    Good { flow: usize, bytes: usize },
    Pushed { flow: usize, bytes: usize },
    Unknown { bytes: usize },
    Forged { flow: usize, bytes: usize },
    Again,
    Noise(Vec<u8>),
}

fn events() -> impl Strategy<Value = Vec<(Event, bool)>> {
    let bytes = prop_oneof![Just(300_usize), Just(1200), 0..400_usize];
    let event = prop_oneof![
        12 => (0..4_usize, bytes.clone()).prop_map(|(flow, bytes)| Event::Good { flow, bytes }),
        1 => (0..4_usize, bytes.clone()).prop_map(|(flow, bytes)| Event::Pushed { flow, bytes }),
        1 => bytes.clone().prop_map(|bytes| Event::Unknown { bytes }),
        1 => (0..4_usize, bytes).prop_map(|(flow, bytes)| Event::Forged { flow, bytes }),
        1 => Just(Event::Again),
        1 => prop::collection::vec(any::<u8>(), 0..80).prop_map(Event::Noise),
    ];
    // The flag: this one goes on with the batch before it, as far as sizes allow.
    prop::collection::vec((event, prop::bool::weighted(0.8)), 1..120)
}

/// Cut into batches as UDP_SEGMENT can send them.
fn batches(datagrams: &[Vec<u8>], joins: &[bool]) -> Vec<Vec<Vec<u8>>> {
    let mut batches: Vec<Vec<Vec<u8>>> = Vec::new();
    for (datagram, joins) in datagrams.iter().zip(joins) {
        if let Some(batch) = batches.last_mut() {
            let (first, last) = (batch[0].len(), batch[batch.len() - 1].len());
            let fits = batch.len() < 40 && last == first && !datagram.is_empty();
            if *joins && fits && datagram.len() <= first {
                batch.push(datagram.clone());
                continue;
            }
        }
        batches.push(vec![datagram.clone()]);
    }
    batches
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_is_delivered_in_order_or_counted(stream in events(), with_offloads: bool) {
        let mut flows = KINDS.map(|(is_ipv6, is_tcp)| Flow::new(is_ipv6, is_tcp));
        let mut unknown = Flow::new(false, true).on_port(9999);
        let offloads = if with_offloads { ALL } else { NONE };
        let mut host = Host::new(Plan { offloads, areas: 32, ..Plan::default() });
        for flow in &flows {
            host.allow(&flow.clone().next(1));
        }
        let (mut expected, mut up) = (Vec::new(), Vec::new());
        let (mut datagrams, mut joins) = (Vec::new(), Vec::new());
        let mut last = None;
        for (number, (event, join)) in stream.into_iter().enumerate() {
            let counter = 3 + number as u64;
            let datagram = match event {
                Event::Good { flow, bytes } => {
                    let packet = flows[flow].next(bytes);
                    expected.push(packet.clone());
                    host.seal(counter, &packet)
                }
                Event::Pushed { flow, bytes } => {
                    flows[flow].flags = ACK | PSH;
                    let packet = flows[flow].next(bytes);
                    flows[flow].flags = ACK;
                    expected.push(packet.clone());
                    host.seal(counter, &packet)
                }
                Event::Unknown { bytes } => {
                    let packet = unknown.next(bytes);
                    up.push(packet.clone());
                    host.seal(counter, &packet)
                }
                Event::Forged { flow, bytes } => {
                    let mut datagram = host.seal(counter, &flows[flow].clone().next(bytes));
                    datagram[16 + number % 20] ^= 1;
                    datagram
                }
                Event::Again => match &last {
                    Some(last) => Vec::clone(last),
                    None => continue,
                },
                Event::Noise(mut bytes) => {
                    if bytes.len() > 16 && bytes[0] & 1 == 0 {
                        bytes[..8].copy_from_slice(&host.seal(0, b"")[..8]);
                    }
                    bytes
                }
            };
            last = Some(datagram.clone());
            datagrams.push(datagram);
            joins.push(join);
        }
        let total = datagrams.len();
        for (number, batch) in batches(&datagrams, &joins).iter().enumerate() {
            if batch.len() > 1 {
                host.deliver_joined(batch);
            } else {
                host.deliver(batch);
            }
            if number % 4 == 3 {
                host.poll(1000).unwrap();
            }
        }
        host.poll_all();

        let (received, _) = host.received();
        let upcalls = host.upcalls();
        prop_assert!(received == expected);
        let new = upcalls.iter().filter(|each| each.reason == code(Reason::NewFlowIn));
        prop_assert!(new.map(|each| &each.packet).eq(up.iter()));
        prop_assert_eq!(host.count("mp.udp.rx.packets"), total as u64);
        host.check_ledger(received.len(), 0);
    }

    #[test]
    fn authentic_nonsense_is_counted_or_goes_up_and_harms_nobody(
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..40),
        versions: Vec<bool>,
    ) {
        let mut host = Host::new(Plan::default());
        let sealed: Vec<_> = packets
            .iter()
            .enumerate()
            .map(|(number, packet)| {
                let mut packet = packet.clone();
                if let Some(first) = packet.first_mut() {
                    *first = if versions.get(number).is_some_and(|it| *it) { 0x60 } else { 0x45 };
                }
                host.seal(3 + number as u64, &packet)
            })
            .collect();
        host.deliver(&sealed);
        prop_assert_eq!(host.poll_all(), sealed.len());
        let delivered = host.received().0.len();
        prop_assert_eq!(delivered, 0);
        host.check_ledger(0, 0);
    }
}
