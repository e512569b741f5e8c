//! What another process has to decide goes up, or to the reader that owns the tunnel.

use std::collections::BTreeMap;

use nebula_mp_core::error::Fault;
use nebula_mp_core::header::{
    CLOSE_TUNNEL, CONTROL, DATAGRAM_BYTES_MAX, HANDSHAKE, LIGHTHOUSE, MESSAGE, RECV_ERROR, TEST,
};
use nebula_mp_core::tunnels::TunnelState;
use nebula_mp_core::upcalls::{Limits, Reason};

use crate::host::{code, elsewhere, reasons, record, Host, Plan, ALL, INDEX, NONE};
use crate::packets::Flow;
use crate::{host_for, sealed, train};

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
