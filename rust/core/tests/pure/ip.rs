//! Inner packets become flow keys, or are malformed.

use nebula_mp_core::ip::{parse_flow, upper_protocol, FlowKey, Malformed, Upper, ICMP, ICMPV6};
use proptest::prelude::*;

use crate::packets::{Plan, DF, TCP, UDP};
use crate::plans::{any_plan, cases};

const A4: [u8; 4] = [10, 50, 1, 2];
const B4: [u8; 4] = [10, 50, 2, 2];
const A6: [u8; 16] = [0xFD, 0, 0, 0x50, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const B6: [u8; 16] = [0xFD, 0, 0, 0x50, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];

/// The 40 bytes of a key, field by field.
fn packed(
    local: &[u8],
    remote: &[u8],
    local_port: u16,
    remote_port: u16,
    protocol: u8,
    fragment: bool,
) -> [u8; 40] {
    let mut key = [0; 40];
    key[..local.len()].copy_from_slice(local);
    key[16..16 + remote.len()].copy_from_slice(remote);
    key[32..34].copy_from_slice(&local_port.to_le_bytes());
    key[34..36].copy_from_slice(&remote_port.to_le_bytes());
    key[36] = protocol;
    key[37] = u8::from(fragment) | u8::from(local.len() == 16) << 1;
    key
}

fn ipv4(protocol: u8, options: &[u8], fragment: u16, behind: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45 + (options.len() / 4) as u8, 0, 0, 0, 0, 0];
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend([A4, B4].concat());
    packet.extend(options);
    packet.extend(behind);
    packet
}

fn ipv6(protocol: u8, behind: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
    packet.extend([A6, B6].concat());
    packet.extend(behind);
    packet
}

/// Both directions' keys: outbound first.
fn keys(packet: &[u8]) -> [Result<[u8; 40], Malformed>; 2] {
    [false, true].map(|inbound| parse_flow(packet, inbound).map(|key| key.to_bytes()))
}

fn expect(packet: &[u8], ports: (u16, u16), protocol: u8, fragment: bool) {
    let (source, destination): (&[u8], &[u8]) = if packet[0] >> 4 == 4 {
        (&A4, &B4)
    } else {
        (&A6, &B6)
    };
    let outbound = packed(source, destination, ports.0, ports.1, protocol, fragment);
    let inbound = packed(destination, source, ports.1, ports.0, protocol, fragment);
    assert_eq!(keys(packet), [Ok(outbound), Ok(inbound)]);
}

#[test]
fn ports_are_local_first_whichever_way_the_packet_goes() {
    let ports = [0, 5, 0, 6];
    expect(&ipv4(UDP, &[], 0, &ports), (5, 6), UDP, false);
    expect(
        &ipv4(TCP, &[7, 7, 4, 0, 0, 0, 0, 0], DF, &ports),
        (5, 6),
        TCP,
        false,
    );
    // Every protocol over IPv4 but ICMP has four bytes that are taken for ports; over IPv6 only TCP and UDP.
    expect(&ipv4(132, &[], 0, &ports), (5, 6), 132, false);
    expect(&ipv4(50, &[], 0, &ports), (5, 6), 50, false);
    expect(&ipv4(ICMPV6, &[], 0, &ports), (5, 6), ICMPV6, false);
    expect(&ipv6(UDP, &ports), (5, 6), UDP, false);
    expect(&ipv6(TCP, &ports), (5, 6), TCP, false);
    expect(&ipv6(132, &ports), (0, 0), 132, false);
    expect(&ipv6(59, &[]), (0, 0), 59, false);
    expect(&ipv6(50, &[]), (0, 0), 50, false);
    expect(&ipv6(ICMP, &[]), (0, 0), ICMP, false);
}

#[test]
fn a_first_fragment_has_ports_and_a_later_one_none() {
    let ports = [0, 5, 0, 6];
    expect(&ipv4(UDP, &[], 0x2000, &ports), (5, 6), UDP, false);
    expect(&ipv4(UDP, &[], 0x2001, &ports), (0, 0), UDP, true);
    expect(&ipv4(ICMP, &[], 0x1FFF, &[]), (0, 0), ICMP, true);
    let fragment = |offset: u16, behind: &[u8]| {
        let offset = offset.to_be_bytes();
        ipv6(
            44,
            &[&[UDP, 0, offset[0], offset[1], 0, 0, 0, 9], behind].concat(),
        )
    };
    expect(&fragment(1, &ports), (5, 6), UDP, false);
    expect(&fragment(8, &ports), (0, 0), UDP, true);
    expect(&fragment(9, &[]), (0, 0), UDP, true);
    // Its protocol is the one that the fragment header names, be it another extension header.
    let mut options = fragment(0xFFF8, &[]);
    options[40] = 60;
    expect(&options, (0, 0), 60, true);
    // All options of an IPv4 header must be there, in a fragment too.
    let cut = &ipv4(UDP, &[1; 8], 1, &[])[..27];
    assert_eq!(keys(cut), [Err(Malformed); 2]);
}

#[test]
fn an_echo_request_and_its_reply_have_one_key() {
    let echo = |kind| [kind, 0, 1, 2, 0xAB, 0xCD];
    let there = parse_flow(&ipv4(ICMP, &[], 0, &echo(8)), false).map(|key| key.to_bytes());
    assert_eq!(there, Ok(packed(&A4, &B4, 0, 0xABCD, ICMP, false)));
    let back = parse_flow(&ipv4(ICMP, &[], 0, &echo(0)), true).map(|key| key.to_bytes());
    assert_eq!(back, Ok(packed(&B4, &A4, 0, 0xABCD, ICMP, false)));
    let there = parse_flow(&ipv6(ICMPV6, &echo(128)), false).map(|key| key.to_bytes());
    assert_eq!(there, Ok(packed(&A6, &B6, 0, 0xABCD, ICMPV6, false)));
    let back = parse_flow(&ipv6(ICMPV6, &echo(129)), true).map(|key| key.to_bytes());
    assert_eq!(back, Ok(packed(&B6, &A6, 0, 0xABCD, ICMPV6, false)));
}

#[test]
fn every_icmp_type_over_ipv4_has_an_identifier_but_over_ipv6_only_echo() {
    let message = [3, 0, 0, 0, 0xAB, 0xCD];
    let over4 = parse_flow(&ipv4(ICMP, &[], 0, &message), false).map(|key| key.to_bytes());
    assert_eq!(over4, Ok(packed(&A4, &B4, 0, 0xABCD, ICMP, false)));
    let over6 = parse_flow(&ipv6(ICMPV6, &message), false).map(|key| key.to_bytes());
    assert_eq!(over6, Ok(packed(&A6, &B6, 0, 0, ICMPV6, false)));
}

#[test]
fn ports_are_found_behind_many_extension_headers() {
    let chain = [
        [43, 0].as_slice(), // hop by hop, 8 bytes
        &[0; 6],
        &[60, 2], // routing, 24 bytes
        &[0; 22],
        &[51, 0], // destination options
        &[0; 6],
        &[44, 4], // authentication, 24 bytes
        &[0; 22],
        &[TCP, 0, 0, 1, 0, 0, 0, 0], // a first fragment
        &[0, 3, 0, 4],
    ]
    .concat();
    expect(&ipv6(0, &chain), (3, 4), TCP, false);
    let expected = Upper {
        protocol: TCP,
        offset: 40 + chain.len() - 4,
        is_fragment: false,
    };
    assert_eq!(upper_protocol(&ipv6(0, &chain)), Ok(expected));
}

#[test]
fn eight_extension_headers_are_walked_and_nine_are_refused() {
    for (count, is_known) in [(0, true), (7, true), (8, true), (9, false), (30, false)] {
        let mut chain = [60, 0, 1, 4, 0, 0, 0, 0].repeat(count);
        if let Some(last) = count.checked_sub(1) {
            chain[last * 8] = UDP;
        }
        chain.extend([0, 3, 0, 4]);
        let packet = ipv6(if count == 0 { UDP } else { 60 }, &chain);
        if is_known {
            expect(&packet, (3, 4), UDP, false);
        } else {
            assert_eq!(keys(&packet), [Err(Malformed); 2], "{count}");
        }
    }
}

#[test]
fn a_packet_that_ends_too_early_is_malformed() {
    let chain = [UDP, 1]
        .into_iter()
        .chain([0; 14])
        .chain([0, 3, 0, 4])
        .collect::<Vec<_>>();
    for (packet, needed) in [
        (ipv4(UDP, &[], 0, &[0; 20]), 24),
        (ipv4(ICMP, &[], 0, &[8; 20]), 26),
        (ipv4(TCP, &[1; 40], 0, &[0; 20]), 64),
        (ipv6(UDP, &[0; 20]), 44),
        (ipv6(ICMPV6, &[128; 20]), 46),
        (ipv6(ICMPV6, &[1; 20]), 44),
        (ipv6(60, &chain), 60),
        (ipv6(59, &[]), 40),
        (ipv6(44, &[UDP, 0, 0, 8, 0, 0, 0, 0]), 48),
    ] {
        for length in 0..packet.len() {
            let found = keys(&packet[..length]);
            assert_eq!(found[0].is_ok(), length >= needed, "{packet:?} {length}");
            assert_eq!(found[1].is_ok(), length >= needed);
        }
    }
}

#[test]
fn other_versions_and_impossible_lengths_are_malformed() {
    for version in (0..16).filter(|version| *version != 4 && *version != 6) {
        let mut packet = ipv4(UDP, &[], 0, &[0; 60]);
        packet[0] = version << 4 | 5;
        assert_eq!(keys(&packet), [Err(Malformed); 2]);
    }
    for words in 0..5 {
        let mut packet = ipv4(UDP, &[], 0, &[0; 60]);
        packet[0] = 0x40 | words;
        assert_eq!(keys(&packet), [Err(Malformed); 2]);
    }
    assert_eq!(keys(&[]), [Err(Malformed); 2]);
}

#[test]
fn the_remote_address_is_told_with_its_family() {
    let key = |packet: &[u8], inbound| parse_flow(packet, inbound).expect("a right packet");
    let mut padded = [0; 16];
    padded[..4].copy_from_slice(&B4);
    assert_eq!(
        key(&ipv4(UDP, &[], 0, &[0; 4]), false).remote(),
        (padded, false)
    );
    assert_eq!(
        key(&ipv4(UDP, &[], 0x10, &[0; 4]), false).remote(),
        (padded, false)
    );
    assert_eq!(key(&ipv6(UDP, &[0; 4]), false).remote(), (B6, true));
    assert_eq!(key(&ipv6(UDP, &[0; 4]), true).remote(), (A6, true));
    let fragment = ipv6(44, &[UDP, 0, 0, 8, 0, 0, 0, 0]);
    assert_eq!(key(&fragment, true).remote(), (A6, true));
    assert_eq!(FlowKey::default().remote(), ([0; 16], false));
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn any_bytes_are_a_flow_or_malformed(
        mut packet in proptest::collection::vec(any::<u8>(), 0..120), first in prop::sample::select(vec![0x45, 0x46, 0x4F, 0x60, 0x6F, 0x00]),
        chain in proptest::collection::vec((prop::sample::select(vec![0, 43, 44, 51, 60, 6, 17, 58]), 0_u8..3), 0..11)
    ) {
        if let Some(byte) = packet.first_mut() {
            *byte = first;
        }
        if packet.len() > 40 {
            // Something like a chain of extension headers.
            for (number, (next, length)) in chain.iter().enumerate() {
                let at = if number == 0 { 6 } else { 40 + 8 * (number - 1) };
                if let Some([kind, size, ..]) = packet.get_mut(at..) {
                    *kind = *next;
                    if number > 0 {
                        *size = *length;
                    }
                }
            }
        }
        let [outbound, inbound] = [false, true].map(|inbound| parse_flow(&packet, inbound));
        prop_assert_eq!(outbound.is_ok(), inbound.is_ok());
        if let (Ok(FlowKey(one)), Ok(FlowKey(other))) = (outbound, inbound) {
            prop_assert_eq!((one[0], one[1], one[2], one[3]), (other[2], other[3], other[0], other[1]));
            prop_assert_eq!(one[4] >> 32, other[4] >> 32);
        }
    }

    #[test]
    fn a_superpacket_and_its_packets_are_one_flow(plan in any_plan()) {
        let (ports, protocol): ((u16, u16), u8) = (plan.ports, plan.protocol);
        for packet in plan.packets().iter().chain([&plan.packet()]) {
            expect(packet, ports, protocol, false);
        }
    }
}

#[test]
fn plans_are_read_as_they_are_meant() {
    for (version, protocol) in [(4, TCP), (4, UDP), (6, TCP), (6, UDP)] {
        let mut plan = Plan::new(version, protocol, vec![1; 10], 10);
        plan.extension = vec![1, 4, 0, 0, 0, 0];
        expect(&plan.packet(), (40000, 50000), protocol, false);
    }
}
