//! What belongs together becomes one superpacket, and what comes out of the ring is what was sealed, in order.

use nebula_mp_core::aead::Cipher;
use nebula_mp_core::header::MESSAGE;
use nebula_mp_core::opener::Offloads;
use nebula_mp_core::tunnels::TunnelState;
use nebula_mp_core::virtio::HEADER_BYTES as VIRTIO_BYTES;

use crate::host::{Host, Plan, ALL, INDEX, NONE};
use crate::packets::{Flow, ACK, PSH};
use crate::{host_for, sealed, train, KINDS};

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
        offloads: Offloads {
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
