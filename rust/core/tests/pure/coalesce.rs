//! Packets are joined only where to cut the superpacket gives them back.

use nebula_mp_core::coalesce::{coalesce, shape_of, Run, JOINT_HEADERS_MAX};
use nebula_mp_core::segment::segment;
use nebula_mp_core::virtio::{Gso, VirtioHeader, HEADER_BYTES, PACKET_BYTES_MAX, PLAIN};
use proptest::prelude::*;

use crate::packets::{
    find_transport, is_right, is_same, repair, set_u16, Plan, ACK, CWR, DF, ECE, FIN, PSH, RST,
    SYN, TCP, TIMESTAMPS, UDP, URG,
};
use crate::plans::{cases, joinable};

fn join(packets: &[Vec<u8>]) -> Vec<(usize, Vec<u8>)> {
    let packets: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
    coalesce(&packets, true, true)
}

fn groups(packets: &[Vec<u8>]) -> Vec<usize> {
    join(packets).iter().map(|(count, _)| *count).collect()
}

/// Cut each result again, which must have as many packets as it says.
fn take_apart(results: &[(usize, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for (count, whole) in results {
        let (raw, packet) = whole
            .split_first_chunk::<HEADER_BYTES>()
            .expect("a virtio header");
        let header = VirtioHeader::parse(raw, packet, packet.len()).expect("of our own");
        assert_eq!(header.encode(), *raw);
        assert_eq!(header.gso == Gso::None, *count == 1);
        let parts = segment(&header, packet).expect("headers of our own");
        assert_eq!(parts.len(), *count);
        found.extend(parts);
    }
    found
}

/// Payload of each packet of `plans`, and of the last.
const PIECE: usize = if cfg!(miri) { 24 } else { 1000 };
const LAST: usize = PIECE / 5 * 3;

/// One of each kind, of five packets.
fn plans() -> [Plan; 4] {
    let payload: Vec<u8> = (0..=255).cycle().take(4 * PIECE + LAST).collect();
    [(4, TCP), (4, UDP), (6, TCP), (6, UDP)].map(|(version, protocol)| {
        let mut plan = Plan::new(version, protocol, payload.clone(), PIECE);
        plan.flags_and_offset = 0;
        if protocol == TCP {
            plan.options = TIMESTAMPS.to_vec();
        }
        plan
    })
}

proptest! {
    #![proptest_config(cases(120))]

    #[test]
    fn to_cut_a_superpacket_and_to_join_its_packets_changes_nothing(plan in joinable()) {
        let packets = plan.packets();
        let results = join(&packets);
        prop_assert_eq!(results.len(), 1);
        let (count, whole) = &results[0];
        prop_assert_eq!(*count, packets.len());
        if *count == 1 {
            prop_assert_eq!(whole, &[PLAIN.as_slice(), &packets[0]].concat());
        } else {
            let mut expected = plan.packet();
            if plan.version == 4 && expected[10..12] == [0, 0] {
                expected[10..12].fill(0xFF);
            }
            prop_assert_eq!(whole, &[plan.virtio().as_slice(), &expected].concat());
        }
        for (found, sent) in take_apart(&results).iter().zip(&packets) {
            prop_assert!(is_same(found, sent));
        }
    }

    #[test]
    fn to_join_packets_and_to_cut_them_changes_nothing_however_they_are_damaged(
        plan in joinable(), other in joinable(),
        damages in proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..90, any::<u8>(), any::<bool>()), 0..6),
        swap in any::<prop::sample::Index>(), kinds in 0..4
    ) {
        let mut packets = [plan.packets(), other.packets(), plan.packets()].concat();
        for (number, at, byte, right) in damages {
            let packet = number.get(&packets).clone();
            let number = number.index(packets.len());
            let mut packet = packet;
            let at = at % packet.len();
            packet[at] = byte;
            if let (true, Some((transport, protocol))) = (right, find_transport(&packet)) {
                repair(&mut packet, transport, protocol);
            }
            packets[number] = packet;
        }
        let at = swap.index(packets.len());
        packets.swap(at, 0);
        let slices: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
        let results = coalesce(&slices, kinds & 1 != 0, kinds & 2 != 0);
        let found = take_apart(&results);
        prop_assert_eq!(found.len(), packets.len());
        let mut sent = packets.iter().zip(&found);
        for (count, _) in results {
            for (sent, found) in (&mut sent).take(count) {
                // What was joined was right, and what was not is untouched.
                let is_kept = found == sent || (count > 1 && is_same(found, sent));
                prop_assert!(is_kept);
                prop_assert!(count == 1 || is_right(found));
            }
        }
    }

    #[test]
    fn any_bytes_are_a_shape_inside_the_packet_or_none(
        mut packet in proptest::collection::vec(any::<u8>(), 0..140), start in 0_usize..5, protocol in 0_usize..3
    ) {
        // Mostly bytes that get beyond the first check.
        let starts: [&[u8]; 5] = [&[], &[0x45, 0, 0, 0, 0, 0, 0x40, 0], &[0x60], &[0x6F], &[0x46]];
        for (to, from) in packet.iter_mut().zip(starts[start]) {
            *to = *from;
        }
        for at in [6, 9] {
            if packet.len() > at && protocol > 0 && (at == 9 || start > 1) {
                packet[at] = [0, TCP, UDP][protocol];
            }
        }
        if let Some(shape) = shape_of(&packet) {
            prop_assert!(shape.addresses_at < shape.transport);
            prop_assert!(shape.transport + 8 <= shape.header_bytes);
            prop_assert!(shape.header_bytes <= JOINT_HEADERS_MAX);
            prop_assert!(shape.header_bytes < packet.len());
        }
        if let Some(mut run) = Run::begin(&packet) {
            run.try_add(&packet);
        }
        for plan in plans() {
            let first = plan.one(0);
            let mut run = Run::begin(&first).expect("a first packet");
            prop_assert!(!run.try_add(&packet));
            prop_assert!(run.try_add(&plan.one(1)));
        }
    }
}

#[test]
fn the_caller_may_overwrite_a_packet_that_was_taken() {
    for plan in plans() {
        let mut place = plan.one(0);
        let mut run = Run::begin(&place).expect("a first packet");
        for number in 1..plan.count() {
            assert!(!run.is_closed);
            let next = plan.one(number);
            place[..next.len()].copy_from_slice(&next);
            assert!(run.try_add(&place[..next.len()]), "{number}");
        }
        assert!(run.is_closed);
        assert_eq!((run.packets, run.payload_bytes), (5, plan.payload.len()));
        let mut out = vec![0xEE; 200];
        let bytes = run.write_head(&mut out);
        let (before, head) = out.split_at(out.len() - bytes);
        assert!(before.iter().all(|byte| *byte == 0xEE));
        let expected = [
            plan.virtio().as_slice(),
            &plan.packet()[..plan.header_bytes()],
        ]
        .concat();
        assert_eq!(head, expected);
    }
}

#[test]
fn the_head_of_a_single_packet_is_an_empty_one_and_its_own() {
    for plan in plans() {
        let packet = plan.one(0);
        let run = Run::begin(&packet).expect("a first packet");
        let mut out = [0xEE; HEADER_BYTES + JOINT_HEADERS_MAX];
        let bytes = run.write_head(&mut out);
        let head = &out[out.len() - bytes..];
        assert_eq!(
            head,
            [PLAIN.as_slice(), &packet[..plan.header_bytes()]].concat()
        );
    }
}

#[test]
fn ids_of_packets_that_must_not_be_fragmented_mean_nothing() {
    for protocol in [TCP, UDP] {
        for (fragment, expected) in [(DF, vec![5]), (0, vec![1; 5])] {
            let mut plan = Plan::new(4, protocol, vec![9; 500], 100);
            plan.flags_and_offset = fragment;
            let packets: Vec<_> = (0..5)
                .map(|number| {
                    plan.identification = 60_000 - 11 * number as u16;
                    plan.one(number)
                })
                .collect();
            assert_eq!(groups(&packets), expected, "{protocol} {fragment:#x}");
        }
    }
}

#[test]
fn a_shorter_packet_ends_a_superpacket_and_a_longer_one_begins_the_next() {
    for mut plan in plans() {
        let mut packets = plan.packets();
        plan.sequence += plan.payload.len() as u32;
        plan.identification += 5;
        packets.extend(plan.packets());
        assert_eq!(groups(&packets), [5, 5]);

        // A packet of the size of the last one does not join it.
        let mut rest = plan.clone();
        rest.sequence += plan.payload.len() as u32;
        rest.identification += 5;
        rest.payload.truncate(LAST);
        packets.extend(rest.packets());
        assert_eq!(groups(&packets), [5, 5, 1]);
    }
}

#[test]
fn a_push_ends_a_superpacket_which_then_has_it() {
    for version in [4, 6] {
        let mut plan = Plan::new(version, TCP, vec![1; 600], 100);
        let mut packets = plan.packets();
        plan.flags = ACK | PSH;
        plan.payload.truncate(300);
        packets[2] = plan.one(2);
        let results = join(&packets);
        let flags_at = HEADER_BYTES + plan.transport() + 13;
        let found: Vec<_> = results
            .iter()
            .map(|(count, whole)| (*count, whole[flags_at]))
            .collect();
        assert_eq!(found, [(3, ACK | PSH), (3, ACK)]);
        assert_eq!(take_apart(&results), packets);
        // And none begins with it.
        assert!(Run::begin(&packets[2]).is_none());
    }
}

#[test]
#[cfg_attr(miri, ignore = "64 KiB take minutes there")]
fn a_superpacket_is_no_longer_than_its_length_fields_can_say() {
    for (version, protocol) in [(4, TCP), (4, UDP), (6, TCP), (6, UDP)] {
        let mut plan = Plan::new(version, protocol, Vec::new(), 9000);
        let room = PACKET_BYTES_MAX - plan.header_bytes();
        // The last packet may fill it to its last byte, and no further.
        plan.payload = vec![5; room];
        assert_eq!(groups(&plan.packets()), [plan.count()]);
        plan.payload.push(5);
        assert_eq!(groups(&plan.packets()), [plan.count() - 1, 1]);
        plan.payload = vec![5; 18 * 9000];
        assert_eq!(groups(&plan.packets()), [7, 7, 4]);
        for (_, whole) in join(&plan.packets()) {
            assert!(whole.len() <= HEADER_BYTES + PACKET_BYTES_MAX);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "64 KiB take minutes there")]
fn a_packet_that_leaves_no_room_for_another_begins_none() {
    let mut plan = Plan::new(6, UDP, Vec::new(), 0xFFFF);
    for (length, is_first) in [
        (PACKET_BYTES_MAX - 1, true),
        (PACKET_BYTES_MAX, false),
        (PACKET_BYTES_MAX + 40, false),
    ] {
        plan.payload = vec![5; length - plan.header_bytes()];
        let packet = plan.one(0);
        assert!(is_right(&packet));
        assert_eq!(Run::begin(&packet).is_some(), is_first, "{length}");
        assert_eq!(groups(&[packet.clone(), packet]), [1, 1]);
    }
}

#[test]
fn only_what_the_device_takes_is_joined() {
    for plan in plans() {
        let packets = plan.packets();
        let slices: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
        for (tso, uso) in [(false, false), (true, false), (false, true), (true, true)] {
            let is_taken = if plan.is_tcp() { tso } else { uso };
            let expected = if is_taken { 1 } else { 5 };
            assert_eq!(coalesce(&slices, tso, uso).len(), expected);
        }
    }
}

#[test]
fn packets_of_several_flows_keep_their_order() {
    let plans = plans();
    let mixed: Vec<_> = (0..5)
        .flat_map(|number| plans.iter().map(move |plan| plan.one(number)))
        .collect();
    assert_eq!(groups(&mixed), [1; 20]);
    assert_eq!(take_apart(&join(&mixed)), mixed);
    let blocks: Vec<_> = plans.iter().flat_map(Plan::packets).collect();
    assert_eq!(groups(&blocks), [5; 4]);
    assert_eq!(take_apart(&join(&blocks)), blocks);
}

#[test]
fn nothing_and_one_packet_are_given_as_they_came() {
    assert_eq!(join(&[]), []);
    assert_eq!(join(&[vec![]]), [(1, PLAIN.to_vec())]);
    let packet = plans()[0].one(0);
    assert_eq!(
        join(std::slice::from_ref(&packet)),
        [(1, [PLAIN.as_slice(), &packet].concat())]
    );
}

#[test]
fn both_spellings_of_zero_are_right() {
    // The sequence number makes the checksum of the second packet 0.
    let mut plan = Plan::new(4, TCP, vec![0; 300], 100);
    let at = plan.transport() + 16;
    let field = u32::from(u16::from_be_bytes([plan.one(1)[at], plan.one(1)[at + 1]]));
    plan.sequence += field;
    let mut packets = plan.packets();
    assert_eq!(packets[1][at..at + 2], [0, 0]);
    assert_eq!(groups(&packets), [3]);
    packets[1][at..at + 2].fill(0xFF);
    assert_eq!(groups(&packets), [3]);
}

/// A name, and what is changed in the plan of a packet.
type Change<'a> = (&'a str, &'a dyn Fn(&mut Plan));

/// The third packet of a changed plan.
fn field(plan: &Plan, change: &dyn Fn(&mut Plan)) -> Vec<u8> {
    let mut changed = plan.clone();
    change(&mut changed);
    changed.one(2)
}

/// Change bits of one byte of a packet; `fix` makes checksums right afterwards.
fn flip(plan: &Plan, at: usize, bits: u8, fix: bool) -> Vec<u8> {
    let mut packet = plan.one(2);
    packet[at] ^= bits;
    if fix {
        repair(&mut packet, plan.transport(), plan.protocol);
    }
    packet
}

/// A packet that differs in one thing stays alone, between the two before it and the two behind it.
fn stays_alone(name: &str, plan: &Plan, changed: Vec<u8>) {
    let mut packets = plan.packets();
    assert_ne!(packets[2], changed, "{name}");
    packets[2] = changed.clone();
    let results = join(&packets);
    let counts: Vec<_> = results.iter().map(|(count, _)| *count).collect();
    assert_eq!(
        counts,
        [2, 1, 2],
        "{name} {} {}",
        plan.version,
        plan.protocol
    );
    assert_eq!(
        results[1].1,
        [PLAIN.as_slice(), &changed].concat(),
        "{name}"
    );
}

#[test]
fn a_packet_that_differs_stays_alone_and_as_it_is() {
    for plan in plans() {
        let (transport, header_bytes) = (plan.transport(), plan.header_bytes());
        let changes: [Change; 4] = [
            ("port", &|plan| plan.ports.1 += 1),
            ("hop limit", &|plan| plan.ttl -= 1),
            ("DSCP", &|plan| plan.service = 0x88),
            ("ECT to CE", &|plan| plan.service = 3),
        ];
        for (name, change) in changes {
            stays_alone(name, &plan, field(&plan, change));
        }
        stays_alone("address", &plan, flip(&plan, 15, 1, true));
        stays_alone(
            "damaged payload",
            &plan,
            flip(&plan, header_bytes + PIECE / 2, 1, false),
        );
        stays_alone("another version", &plan, flip(&plan, 0, 0x10, false));
        stays_alone("nothing", &plan, Vec::new());
        stays_alone("nothing but a byte", &plan, plan.one(2)[..1].to_vec());
        stays_alone("only headers", &plan, plan.one(2)[..header_bytes].to_vec());
        let mut empty = plan.clone();
        empty.payload.clear();
        empty.sequence += 2 * PIECE as u32;
        empty.identification += 2;
        stays_alone("no payload", &plan, empty.one(0));
        stays_alone("trailing bytes", &plan, [plan.one(2), vec![0; 2]].concat());
        stays_alone(
            "cut short",
            &plan,
            plan.one(2)[..plan.one(2).len() - 2].to_vec(),
        );
        let checksum = transport + plan.checksum_offset();
        stays_alone("checksum", &plan, flip(&plan, checksum, 1, false));
    }
}

#[test]
fn a_packet_of_ipv4_or_ipv6_that_differs_stays_alone() {
    for plan in plans() {
        if plan.version == 4 {
            let changes: [Change; 7] = [
                ("id repeated", &|plan| plan.identification -= 1),
                ("id jumps", &|plan| plan.identification += 1),
                ("DF", &|plan| plan.flags_and_offset = DF),
                ("MF", &|plan| plan.flags_and_offset = 0x2000),
                ("later fragment", &|plan| plan.flags_and_offset = 5),
                ("reserved flag", &|plan| plan.flags_and_offset = 0x8000),
                ("options", &|plan| plan.ip_options = vec![0x94, 4, 0, 0]),
            ];
            for (name, change) in changes {
                stays_alone(name, &plan, field(&plan, change));
            }
            stays_alone("IP checksum", &plan, flip(&plan, 10, 1, false));
            stays_alone("IP length", &plan, flip(&plan, 3, 8, true));
            stays_alone("protocol", &plan, flip(&plan, 9, 1, true));
        } else {
            let options = field(&plan, &|plan| plan.extension = vec![1, 4, 0, 0, 0, 0]);
            stays_alone("extension header", &plan, options);
            stays_alone("flow label", &plan, flip(&plan, 3, 1, false));
            stays_alone("IPv6 length", &plan, flip(&plan, 5, 8, true));
            stays_alone("next header", &plan, flip(&plan, 6, 1, true));
        }
    }
}

#[test]
fn a_packet_of_tcp_or_udp_that_differs_stays_alone() {
    for plan in plans() {
        let transport = plan.transport();
        if !plan.is_tcp() {
            stays_alone("UDP length", &plan, flip(&plan, transport + 5, 8, true));
            let mut packet = plan.one(2);
            set_u16(&mut packet, transport + 6, 0);
            stays_alone("no UDP checksum", &plan, packet);
            continue;
        }
        let changes: [Change; 9] = [
            ("acknowledgement", &|plan| plan.acknowledgement += 1),
            ("window", &|plan| plan.window += 1),
            ("time stamp", &|plan| plan.options[11] ^= 1),
            ("other options", &|plan| plan.options[2] = 5),
            ("fewer options", &|plan| plan.options.clear()),
            ("gap", &|plan| plan.sequence += 1),
            ("sent again", &|plan| plan.sequence = 0),
            ("ECE", &|plan| plan.flags |= ECE),
            ("no ACK", &|plan| plan.flags = 0),
        ];
        for (name, change) in changes {
            stays_alone(name, &plan, field(&plan, change));
        }
        for (name, at, bits) in [
            ("urgent pointer", 18, 1),
            ("reserved bits", 12, 1),
            ("longer header", 12, 0xF0 ^ 0x80),
            ("header too short", 12, 0xC0),
            ("FIN", 13, FIN),
            ("SYN", 13, SYN),
            ("RST", 13, RST),
            ("URG", 13, URG),
            ("CWR", 13, CWR),
        ] {
            stays_alone(name, &plan, flip(&plan, transport + at, bits, true));
        }
    }
}

#[test]
fn equal_packets_with_such_flags_are_not_joined() {
    for flags in [
        0,
        SYN,
        ACK | SYN,
        ACK | URG,
        ACK | RST,
        ACK | FIN,
        ACK | CWR,
        ACK | PSH,
    ] {
        let mut plan = Plan::new(4, TCP, vec![1; 500], 100);
        plan.flags = ACK;
        let packets: Vec<_> = plan
            .packets()
            .into_iter()
            .map(|mut packet| {
                packet[33] = flags;
                repair(&mut packet, 20, TCP);
                packet
            })
            .collect();
        assert_eq!(groups(&packets), [1; 5], "{flags:#x}");
    }
}

#[test]
fn equal_packets_with_bits_that_have_no_meaning_yet_are_not_joined() {
    for bits in [1, 2, 4, 8] {
        let packets: Vec<_> = Plan::new(6, TCP, vec![1; 500], 100)
            .packets()
            .into_iter()
            .map(|mut packet| {
                packet[40 + 12] |= bits;
                repair(&mut packet, 40, TCP);
                packet
            })
            .collect();
        assert_eq!(groups(&packets), [1; 5], "{bits}");
    }
}

#[test]
fn equal_fragments_are_not_joined() {
    for fragment in [0x2000, 0x8000, 0x0100, 0x0001, DF | 0x2000] {
        let mut plan = Plan::new(4, UDP, vec![1; 500], 100);
        plan.flags_and_offset = fragment;
        assert_eq!(groups(&plan.packets()), [1; 5], "{fragment:#x}");
    }
}

#[test]
fn a_udp_checksum_of_zero_means_none_even_where_the_sum_is_right() {
    let mut plan = Plan::new(6, UDP, vec![0; 300], 100);
    let at = plan.transport() + 6;
    let packet = plan.one(1);
    plan.payload[100..102].copy_from_slice(&packet[at..at + 2]);
    let mut packets = plan.packets();
    assert_eq!(packets[1][at..at + 2], [0xFF, 0xFF]);
    assert_eq!(groups(&packets), [3]);
    packets[1][at..at + 2].fill(0);
    assert_eq!(groups(&packets), [1, 1, 1]);
}

#[test]
fn a_damaged_packet_is_found_wherever_it_stands() {
    for plan in plans() {
        for number in 0..5 {
            let mut packets = plan.packets();
            *packets[number].last_mut().expect("not empty") ^= 1;
            let expected: Vec<_> = [number, 1, 4 - number]
                .into_iter()
                .filter(|count| *count > 0)
                .collect();
            assert_eq!(groups(&packets), expected);
        }
    }
}

#[test]
fn udp_packets_without_checksum_are_not_joined() {
    let plan = Plan::new(4, UDP, vec![1; 500], 100);
    let packets: Vec<_> = plan
        .packets()
        .into_iter()
        .map(|mut packet| {
            set_u16(&mut packet, 26, 0);
            packet
        })
        .collect();
    assert_eq!(groups(&packets), [1; 5]);
}
