//! An offload header is understood, spelled the same, or refused.

use nebula_mp_core::ip::IPV6_HEADER_BYTES;
use nebula_mp_core::virtio::{
    encoded_header_bytes, Gso, OffloadError, VirtioHeader, HEADER_BYTES, PACKET_BYTES_MAX, PLAIN,
};
use proptest::prelude::*;

use crate::packets::{Plan, ACK, CWR, TCP, UDP};
use crate::plans::{any_plan, cases};

fn parse(raw: &[u8; HEADER_BYTES], packet: &[u8]) -> Result<VirtioHeader, OffloadError> {
    VirtioHeader::parse(raw, packet, packet.len())
}

/// A header as the kernel writes it before TCP over IPv4.
#[derive(Clone, Copy)]
struct Raw {
    flags: u8,
    kind: u8,
    hdr_len: u16,
    size: u16,
    start: u16,
    offset: u16,
}

const RAW: Raw = Raw {
    flags: 1,
    kind: 1,
    hdr_len: 40,
    size: 30,
    start: 20,
    offset: 16,
};

impl Raw {
    fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut raw = [self.flags, self.kind, 0, 0, 0, 0, 0, 0, 0, 0];
        let fields = [self.hdr_len, self.size, self.start, self.offset];
        for (bytes, field) in raw[2..].chunks_exact_mut(2).zip(fields) {
            bytes.copy_from_slice(&field.to_ne_bytes());
        }
        raw
    }
}

fn plan(version: u8, protocol: u8) -> Plan {
    Plan::new(version, protocol, vec![7; 90], 30)
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn the_header_of_a_superpacket_is_understood_and_spelled_the_same(plan in any_plan(), hint in any::<u16>()) {
        let packet = plan.packet();
        let mut raw = plan.virtio();
        // The kernel's word on the length of headers is not believed.
        raw[2..4].copy_from_slice(&hint.to_ne_bytes());
        let found = parse(&raw, &packet);
        let is_tcp = plan.is_tcp();
        let expected = VirtioHeader {
            gso: if !is_tcp { Gso::Udp } else if plan.version == 4 { Gso::Tcp4 } else { Gso::Tcp6 },
            has_cwr: is_tcp && plan.flags & CWR != 0,
            needs_checksum: true,
            header_bytes: plan.header_bytes() as u16,
            segment_bytes: plan.size as u16,
            checksum_start: plan.transport() as u16,
            checksum_offset: plan.checksum_offset() as u16,
        };
        prop_assert_eq!(found, Ok(expected));
        prop_assert_eq!(expected.encode(), plan.virtio());
        prop_assert_eq!(encoded_header_bytes(&expected.encode()), plan.header_bytes());
    }

    #[test]
    fn the_headers_are_all_that_must_be_there_in_one_piece(plan in any_plan(), length in any::<prop::sample::Index>()) {
        let packet = plan.packet();
        let whole = parse(&plan.virtio(), &packet);
        prop_assert!(whole.is_ok());
        let header_bytes = plan.header_bytes();
        let beginning = &packet[..header_bytes + length.index(packet.len() + 1 - header_bytes)];
        prop_assert_eq!(VirtioHeader::parse(&plan.virtio(), beginning, packet.len()), whole);
        let short = &packet[..length.index(header_bytes)];
        prop_assert_eq!(VirtioHeader::parse(&plan.virtio(), short, packet.len()), Err(OffloadError));
    }

    #[test]
    fn any_header_before_any_packet_is_consistent_or_an_offload_error(
        plan in any_plan(), raw in any::<[u8; HEADER_BYTES]>(), take in any::<[bool; HEADER_BYTES]>(),
        places in proptest::collection::vec((0_usize..80, any::<u8>()), 0..3), size in 0_usize..70_000, own in any::<bool>()
    ) {
        let mut packet = plan.packet();
        let mut header = plan.virtio();
        for (at, byte) in header.iter_mut().enumerate().filter(|(at, _)| take[*at]) {
            *byte = raw[at];
        }
        for (at, byte) in places {
            let at = at % packet.len();
            packet[at] = byte;
        }
        let size = if own { packet.len() } else { size };
        if let Ok(found) = VirtioHeader::parse(&header, &packet, size) {
            if found.gso == Gso::None {
                prop_assert_eq!((found.has_cwr, found.header_bytes, found.segment_bytes), (false, 0, 0));
            } else {
                prop_assert!(found.needs_checksum && found.segment_bytes > 0);
                prop_assert!(usize::from(found.header_bytes) <= packet.len().min(size));
                prop_assert!(found.checksum_start + found.checksum_offset + 2 <= found.header_bytes);
            }
            if found.needs_checksum {
                let end = usize::from(found.checksum_start) + usize::from(found.checksum_offset) + 2;
                prop_assert!(found.checksum_start >= 20 && end <= size);
            } else {
                prop_assert_eq!(found, VirtioHeader::default());
            }
            prop_assert_eq!(VirtioHeader::parse(&found.encode(), &packet, size), Ok(found));
        }
    }
}

#[test]
fn a_packet_that_is_complete_is_plain() {
    let verified = Raw {
        flags: 2,
        kind: 0,
        size: 7,
        ..RAW
    };
    let meaningless = Raw {
        flags: 0,
        kind: 0,
        ..RAW
    };
    for raw in [[0; HEADER_BYTES], verified.bytes(), meaningless.bytes()] {
        for packet in [plan(4, TCP).packet(), Vec::new()] {
            assert_eq!(parse(&raw, &packet), Ok(VirtioHeader::default()));
        }
    }
    assert_eq!(VirtioHeader::default().encode(), PLAIN);
}

#[test]
fn a_single_packet_may_need_its_checksum() {
    for flags in [1, 3] {
        let raw = Raw {
            flags,
            kind: 0,
            hdr_len: 9,
            size: 9,
            ..RAW
        };
        let found = parse(&raw.bytes(), &plan(4, TCP).packet());
        let expected = VirtioHeader {
            needs_checksum: true,
            checksum_start: 20,
            checksum_offset: 16,
            ..VirtioHeader::default()
        };
        assert_eq!(found, Ok(expected));
        let spelled = Raw {
            kind: 0,
            hdr_len: 0,
            size: 0,
            ..RAW
        };
        assert_eq!(expected.encode(), spelled.bytes());
    }
}

#[test]
fn what_is_unknown_is_refused() {
    let (tcp, udp) = (plan(4, TCP).packet(), plan(4, UDP).packet());
    assert!(parse(&RAW.bytes(), &tcp).is_ok());
    for (name, raw, packet) in [
        (
            "a flag of another kind of device",
            Raw { flags: 5, ..RAW },
            &tcp,
        ),
        ("an unknown flag", Raw { flags: 0x81, ..RAW }, &tcp),
        (
            "a superpacket without a checksum to complete",
            Raw { flags: 0, ..RAW },
            &tcp,
        ),
        (
            "a superpacket with a complete checksum",
            Raw { flags: 2, ..RAW },
            &tcp,
        ),
        ("type 2", Raw { kind: 2, ..RAW }, &tcp),
        ("UFO", Raw { kind: 3, ..RAW }, &udp),
        ("ECN of nothing", Raw { kind: 0x80, ..RAW }, &tcp),
        (
            "ECN of UDP",
            Raw {
                kind: 0x85,
                offset: 6,
                ..RAW
            },
            &udp,
        ),
        ("segments of no size", Raw { size: 0, ..RAW }, &tcp),
    ] {
        assert_eq!(parse(&raw.bytes(), packet), Err(OffloadError), "{name}");
    }
}

#[test]
fn what_contradicts_the_packet_is_refused() {
    let (tcp, udp, tcp6) = (
        plan(4, TCP).packet(),
        plan(4, UDP).packet(),
        plan(6, TCP).packet(),
    );
    let with = |at: usize, byte: u8| {
        let mut packet = tcp.clone();
        packet[at] = byte;
        packet
    };
    let udp_of_version_7 = [&[0x75], &udp[1..]].concat();
    let long_tcp = with(32, 0xF0)[..60].to_vec();
    let mut fragment6 = tcp6.clone();
    fragment6[6] = 44;
    let endless = [
        tcp6[..6].to_vec(),
        vec![60],
        tcp6[7..40].to_vec(),
        [60, 0, 1, 4, 0, 0, 0, 0].repeat(31),
    ]
    .concat();
    for (name, raw, packet) in [
        ("no packet", RAW, &Vec::new()),
        ("TCP4 before IPv6", RAW, &tcp6),
        (
            "TCP6 before IPv4",
            Raw {
                kind: 4,
                start: 40,
                ..RAW
            },
            &tcp,
        ),
        ("TCP before UDP", RAW, &udp),
        ("UDP before TCP", Raw { kind: 5, ..RAW }, &tcp),
        (
            "version 7",
            Raw {
                kind: 5,
                offset: 6,
                ..RAW
            },
            &udp_of_version_7,
        ),
        (
            "checksum from another place",
            Raw { start: 24, ..RAW },
            &tcp,
        ),
        (
            "checksum from outside",
            Raw {
                start: 0xFFFF,
                ..RAW
            },
            &tcp,
        ),
        ("checksum to another place", Raw { offset: 6, ..RAW }, &tcp),
        (
            "checksum to outside",
            Raw {
                offset: 0xFFFF,
                ..RAW
            },
            &tcp,
        ),
        (
            "single: checksum from outside",
            Raw {
                kind: 0,
                start: 0xFFFF,
                ..RAW
            },
            &tcp,
        ),
        (
            "single: half a field",
            Raw {
                kind: 0,
                start: 40,
                offset: 0,
                ..RAW
            },
            &tcp[..41].to_vec(),
        ),
        (
            "single: checksum over the IP header",
            Raw {
                kind: 0,
                start: 0,
                ..RAW
            },
            &tcp,
        ),
        (
            "IPv4 header too short",
            Raw { start: 16, ..RAW },
            &with(0, 0x44),
        ),
        ("TCP header too short", RAW, &with(32, 0x40)),
        ("TCP header longer than the packet", RAW, &long_tcp),
        ("first fragment", RAW, &with(6, 0x20)),
        ("later fragment", RAW, &with(7, 1)),
        (
            "IPv6 fragment",
            Raw {
                kind: 4,
                start: 48,
                ..RAW
            },
            &fragment6,
        ),
        (
            "endless chain of headers",
            Raw {
                kind: 4,
                start: 40 + 8 * 31,
                ..RAW
            },
            &endless,
        ),
        (
            "longer than IPv4 can say",
            RAW,
            &[tcp.clone(), vec![0; 0x10000 - tcp.len()]].concat(),
        ),
    ] {
        assert_eq!(parse(&raw.bytes(), packet), Err(OffloadError), "{name}");
    }
}

#[test]
fn an_ipv6_packet_may_be_longer_than_an_ipv4_one_by_its_header() {
    let mut plan = plan(6, TCP);
    plan.flags = ACK;
    let packet = plan.packet();
    let most = PACKET_BYTES_MAX + IPV6_HEADER_BYTES;
    let found = VirtioHeader::parse(&plan.virtio(), &packet, most);
    assert_eq!(found.map(|header| header.gso), Ok(Gso::Tcp6));
    assert_eq!(
        VirtioHeader::parse(&plan.virtio(), &packet, most + 1),
        Err(OffloadError)
    );
}

#[test]
fn headers_that_are_there_but_not_of_the_packet_are_refused() {
    let plan = plan(4, TCP);
    let packet = plan.packet();
    for size in 0..packet.len() {
        let found = VirtioHeader::parse(&plan.virtio(), &packet, size);
        assert_eq!(found.is_ok(), size >= plan.header_bytes(), "{size}");
    }
}

#[test]
fn nine_extension_headers_are_one_too_many() {
    for (count, is_known) in [(1, true), (8, true), (9, false)] {
        let mut packet = plan(6, TCP).packet();
        let tcp = packet.split_off(40);
        packet[6] = 60;
        for number in 1..=count {
            let next = if number == count { TCP } else { 60 };
            packet.extend([next, 0, 1, 4, 0, 0, 0, 0]);
        }
        let start = packet.len() as u16;
        packet.extend(tcp);
        let raw = Raw {
            kind: 4,
            start,
            ..RAW
        };
        assert_eq!(parse(&raw.bytes(), &packet).is_ok(), is_known, "{count}");
    }
}

#[test]
fn the_longest_chain_of_headers_is_counted_in_full() {
    // Eight of the longest extension headers, which is as many as are walked.
    let mut packet = plan(6, TCP).packet();
    let tcp = packet.split_off(40);
    packet[6] = 60;
    for number in 0..8 {
        packet.extend([if number == 7 { TCP } else { 60 }, 255]);
        packet.extend([0; 2046]);
    }
    let start = packet.len() as u16;
    packet.extend(tcp);
    let raw = Raw {
        kind: 4,
        start,
        ..RAW
    };
    let found = parse(&raw.bytes(), &packet);
    assert_eq!(
        found.map(|header| header.header_bytes),
        Ok(40 + 8 * 2048 + 20)
    );
}
