//! Anything at all, in any order: delivered in order, handed over or counted.

use nebula_mp_core::upcalls::Reason;
use proptest::prelude::*;

use crate::host::{code, Host, Plan, ALL, NONE};
use crate::packets::{Flow, ACK, PSH};
use crate::KINDS;

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
