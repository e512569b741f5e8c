//! Segments are the packets that would have been sent alone.

use nebula_mp_core::segment::{complete, segment, Cut, HEADERS_MAX};
use nebula_mp_core::virtio::VirtioHeader;
use proptest::prelude::*;

use crate::packets::{is_right, u16_at, Plan, ACK, CWR, ECE, FIN, PSH, TCP, UDP};
use crate::plans::{any_plan, cases};

fn parse(plan: &Plan) -> VirtioHeader {
    let packet = plan.packet();
    VirtioHeader::parse(&plan.virtio(), &packet, packet.len()).expect("a right superpacket")
}

fn cut(plan: &Plan) -> Cut {
    let packet = plan.packet();
    Cut::new(&parse(plan), &packet, packet.len()).expect("a right superpacket")
}

fn segments(plan: &Plan) -> Vec<Vec<u8>> {
    segment(&parse(plan), &plan.packet()).expect("a right superpacket")
}

proptest! {
    #![proptest_config(cases(120))]

    #[test]
    fn each_segment_is_the_packet_that_would_have_been_sent_alone(plan in any_plan()) {
        let found = segments(&plan);
        prop_assert_eq!(&found, &plan.packets());
        for packet in &found {
            prop_assert!(is_right(packet));
        }
    }

    #[test]
    fn packets_are_placed_and_stamped_in_parts_at_any_stride_and_nothing_else_is_touched(
        plan in any_plan(), gap in 0_usize..40, parts in 1_usize..20
    ) {
        let (packet, cut) = (plan.packet(), cut(&plan));
        let stride = cut.segment_bytes + gap;
        for first in (0..cut.count).step_by(parts) {
            let count = parts.min(cut.count - first);
            let mut out = vec![0xEE; stride * count];
            cut.place(&packet, &mut out, stride, first, count);
            cut.stamp(&mut out, stride, first, count);
            for (number, slot) in (first..).zip(out.chunks(stride)) {
                let (found, behind) = slot.split_at(cut.segment_size(number));
                prop_assert_eq!(found, plan.one(number));
                prop_assert!(behind.iter().all(|byte| *byte == 0xEE));
            }
        }
    }

    #[test]
    fn payload_that_was_read_to_its_place_needs_only_the_headers(plan in any_plan()) {
        let packet = plan.packet();
        let header = parse(&plan);
        // All that is there of the superpacket in one piece are its headers.
        let cut = Cut::new(&header, &packet[..plan.header_bytes()], packet.len()).expect("all headers");
        let mut pieces = packet[plan.header_bytes()..].chunks(plan.size);
        for number in 0..cut.count {
            let payload = pieces.next().unwrap_or(&[]);
            let mut out = [vec![0xEE; cut.header_bytes], payload.to_vec()].concat();
            prop_assert_eq!(out.len(), cut.segment_size(number));
            let stride = out.len();
            cut.stamp(&mut out, stride, number, 1);
            prop_assert_eq!(out, plan.one(number));
        }
        prop_assert!(pieces.next().is_none());
    }

    #[test]
    fn one_packet_at_a_time_fits_a_buffer_that_is_used_again(plan in any_plan()) {
        let (packet, cut) = (plan.packet(), cut(&plan));
        let mut out = vec![0; cut.segment_bytes + 1];
        for number in 0..cut.count {
            out.fill(0xEE);
            let size = cut.write_one(&packet, number, &mut out);
            prop_assert_eq!(&out[..size], plan.one(number));
            prop_assert!(out[size..].iter().all(|byte| *byte == 0xEE));
        }
    }

    #[test]
    fn a_single_packet_gets_its_checksum(plan in any_plan()) {
        let mut single = plan.clone();
        single.size = plan.payload.len().min(1400);
        single.payload.truncate(single.size);
        let mut raw = single.virtio();
        raw[1] = 0;
        let mut packet = single.packet();
        let header = VirtioHeader::parse(&raw, &packet, packet.len()).expect("a right packet");
        complete(&header, &mut packet);
        let mut expected = single.one(0);
        // The protocol is not known there, so even TCP never gets the checksum 0.
        let at = single.transport() + single.checksum_offset();
        if expected[at..at + 2] == [0, 0] {
            expected[at..at + 2].fill(0xFF);
        }
        prop_assert_eq!(&packet, &expected);
        prop_assert_eq!(segment(&header, &single.packet()), Some(vec![expected]));
    }

    #[test]
    fn damaged_superpackets_are_cut_or_refused(
        plan in any_plan(), places in proptest::collection::vec((0_usize..130, any::<u8>()), 1..4), length in any::<prop::sample::Index>()
    ) {
        let (mut raw, mut packet) = (plan.virtio(), plan.packet());
        for (at, byte) in places {
            match at.checked_sub(raw.len()) {
                None => raw[at] = byte,
                Some(at) => {
                    let at = at % packet.len();
                    packet[at] = byte;
                }
            }
        }
        packet.truncate(packet.len() - length.index(packet.len()) / 4);
        if let Ok(header) = VirtioHeader::parse(&raw, &packet, packet.len()) {
            let header_bytes = usize::from(header.header_bytes);
            let found = segment(&header, &packet);
            if header_bytes > HEADERS_MAX {
                prop_assert_eq!(found, None);
            } else {
                let found = found.expect("parsed with this packet");
                let payload: Vec<u8> = found.iter().flat_map(|each| &each[header_bytes..]).copied().collect();
                if header_bytes > 0 {
                    prop_assert_eq!(payload, &packet[header_bytes..]);
                } else {
                    prop_assert_eq!(payload.len(), packet.len());
                }
            }
        }
    }
}

#[test]
fn the_largest_superpackets_are_cut_at_any_segment_size() {
    let length = if cfg!(miri) { 300 } else { 0xFFFF };
    for (version, protocol) in [(4, TCP), (4, UDP), (6, TCP), (6, UDP)] {
        for size in [9, 1448, 32_000, 0xFFFF] {
            let mut plan = Plan::new(version, protocol, vec![0xA5; length], size);
            let most = if version == 4 { 0xFFFF } else { 0xFFFF + 40 };
            plan.payload.truncate(most - plan.header_bytes());
            if size == 0xFFFF {
                // More than there is: one packet, and its lengths are those of what there is.
                plan.size = plan.payload.len();
                let mut raw = plan.virtio();
                raw[4..6].copy_from_slice(&0xFFFF_u16.to_ne_bytes());
                let packet = plan.packet();
                let header = VirtioHeader::parse(&raw, &packet, packet.len()).expect("right");
                assert_eq!(segment(&header, &packet), Some(plan.packets()));
            } else {
                assert_eq!(
                    segments(&plan),
                    plan.packets(),
                    "{version} {protocol} {size}"
                );
            }
        }
    }
}

#[test]
fn a_superpacket_of_one_segment_or_none_is_complete_afterwards() {
    for (version, protocol) in [(4, TCP), (4, UDP), (6, TCP), (6, UDP)] {
        for length in [0, 1, 99, 100] {
            let mut plan = Plan::new(version, protocol, vec![7; length], 100);
            plan.flags = ACK | FIN | PSH | CWR;
            assert_eq!(segments(&plan), plan.packets());
        }
    }
}

#[test]
fn cwr_is_on_the_first_segment_only_and_psh_and_fin_on_the_last() {
    let mut plan = Plan::new(4, TCP, vec![0; 350], 100);
    plan.flags = ACK | CWR | ECE | PSH | FIN;
    let flags: Vec<u8> = segments(&plan).iter().map(|each| each[33]).collect();
    let (ack, end) = (ACK | ECE, ACK | ECE | PSH | FIN);
    assert_eq!(flags, [ack | CWR, ack, ack, end]);
}

/// Give the payload two bytes that make the checksum of its first packet 0, before that is avoided.
fn with_checksum_zero(plan: &mut Plan) {
    let at = plan.transport() + plan.checksum_offset();
    plan.payload[..2].fill(0);
    let field = u16_at(&plan.one(0), at);
    plan.payload[..2].copy_from_slice(&field.to_be_bytes());
}

#[test]
fn a_udp_checksum_of_zero_is_written_as_all_ones_and_one_of_tcp_as_it_is() {
    for (protocol, expected) in [(UDP, 0xFFFF), (TCP, 0)] {
        for version in [4, 6] {
            let mut plan = Plan::new(version, protocol, vec![3; 300], 100);
            plan.sequence = 0;
            with_checksum_zero(&mut plan);
            let found = segments(&plan);
            let at = plan.transport() + plan.checksum_offset();
            assert_eq!(u16_at(&found[0], at), expected, "{protocol} {version}");
            assert_eq!(found, plan.packets());
        }
    }
}

#[test]
fn a_single_packet_never_has_the_checksum_that_means_none() {
    for protocol in [UDP, TCP] {
        let mut plan = Plan::new(4, protocol, vec![3; 90], 90);
        with_checksum_zero(&mut plan);
        let mut raw = plan.virtio();
        raw[1] = 0;
        let mut packet = plan.packet();
        let header = VirtioHeader::parse(&raw, &packet, packet.len()).expect("right");
        complete(&header, &mut packet);
        assert_eq!(
            u16_at(&packet, plan.transport() + plan.checksum_offset()),
            0xFFFF
        );
    }
}

#[test]
fn a_single_packet_that_is_complete_stays_as_it_is() {
    let mut packet = Plan::new(4, TCP, vec![3; 90], 90).one(0);
    let before = packet.clone();
    complete(&VirtioHeader::default(), &mut packet);
    assert_eq!(packet, before);
}

#[test]
fn longer_headers_than_there_is_room_for_are_refused() {
    let mut plan = Plan::new(6, TCP, vec![1; 900], 300);
    plan.extension = vec![0; HEADERS_MAX - 40 - 20 - 2 - 2];
    plan.extension
        .truncate(plan.extension.len() / 8 * 8 + 6 - 8);
    assert!(plan.header_bytes() <= HEADERS_MAX);
    assert_eq!(segments(&plan), plan.packets());

    plan.extension.extend([0; 8]);
    while plan.header_bytes() <= HEADERS_MAX {
        plan.extension.extend([0; 8]);
    }
    assert_eq!(segment(&parse(&plan), &plan.packet()), None);
}

#[test]
fn a_header_that_was_parsed_with_another_packet_is_refused_or_cuts_something() {
    let plan = Plan::new(4, TCP, vec![1; 900], 300);
    let (header, packet) = (parse(&plan), plan.packet());
    assert!(Cut::new(&VirtioHeader::default(), &packet, packet.len()).is_none());
    for length in 0..plan.header_bytes() {
        assert!(Cut::new(&header, &packet[..length], packet.len()).is_none());
    }
    assert!(Cut::new(&header, &packet, plan.header_bytes() - 1).is_none());
    assert!(Cut::new(&header, &packet, 0x10000).is_none());
    let short = VirtioHeader {
        header_bytes: 30,
        ..header
    };
    assert!(Cut::new(&short, &packet, packet.len()).is_none());
    let nothing = VirtioHeader {
        segment_bytes: 0,
        ..header
    };
    assert!(Cut::new(&nothing, &packet, packet.len()).is_none());
    let inside = VirtioHeader {
        checksum_start: 12,
        ..header
    };
    assert!(Cut::new(&inside, &packet, packet.len()).is_none());
}
