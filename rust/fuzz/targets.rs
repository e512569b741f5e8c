//! What is done with each input of a fuzz target. The fuzzer and the replay of its corpus both include this file,
//! so that they cannot drift apart.
//!
//! Every body takes any bytes, and panics if something is wrong.

#[path = "../core/tests/common/packets.rs"]
pub mod packets;

use nebula_mp_core::coalesce;
use nebula_mp_core::header;
use nebula_mp_core::ip::{parse_flow, FlowKey};
use nebula_mp_core::segment::{complete, segment, Cut, HEADERS_MAX};
use nebula_mp_core::virtio::{Gso, VirtioHeader, HEADER_BYTES, PLAIN};

use packets::{find_transport, is_right, is_same, pseudo_sum, repair, set_u16, u16_at};

/// A target's name, which is that of its folder of the corpus, and its body.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 5] = [
    ("header", fuzz_header),
    ("ip", fuzz_ip),
    ("virtio", fuzz_virtio),
    ("segment", fuzz_segment),
    ("coalesce", fuzz_coalesce),
];

/// A datagram.
pub fn fuzz_header(data: &[u8]) {
    let Some(raw) = data.first_chunk::<{ header::HEADER_BYTES }>() else {
        return;
    };
    let (index, counter) = header::index_and_counter(raw);
    for subtype in [header::MESSAGE_IP, header::MESSAGE_RELAY] {
        let mut written = [0xEE; header::HEADER_BYTES];
        header::write_message(&mut written, subtype, index, counter);
        assert_eq!(header::index_and_counter(&written), (index, counter));
        assert_eq!(header::kind(written[0], written[1]), Some(header::MESSAGE));
        assert_eq!(written[1], subtype);
        assert_eq!(written[4..], raw[4..]);
    }
    if let Some(kind) = header::kind(raw[0], raw[1]) {
        assert!(kind <= header::CONTROL && raw[1] <= 1);
        assert_eq!(raw[0], header::VERSION << 4 | kind);
    }
}

/// An IP packet.
pub fn fuzz_ip(packet: &[u8]) {
    let [outbound, inbound] = [false, true].map(|inbound| parse_flow(packet, inbound));
    assert_eq!(outbound.is_ok(), inbound.is_ok());
    let (Ok(outbound), Ok(inbound)) = (outbound, inbound) else {
        return;
    };
    let (FlowKey(one), FlowKey(other)) = (outbound, inbound);
    assert_eq!(one[..2], other[2..4]);
    assert_eq!(one[2..4], other[..2]);
    assert_eq!(one[4] >> 32, other[4] >> 32);
    let (remote, is_ipv6) = outbound.remote();
    if is_ipv6 {
        assert_eq!(remote, packet[24..40]);
    } else {
        assert_eq!(
            (&remote[..4], &remote[4..]),
            (&packet[16..20], &[0; 12][..])
        );
    }
    assert_eq!(inbound.remote().1, is_ipv6);
}

/// An offload header, the bytes of the packet it stands before, and the beginning of that packet.
pub fn fuzz_virtio(data: &[u8]) {
    let Some((raw, rest)) = data.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Some((size, packet)) = rest.split_first_chunk::<2>() else {
        return;
    };
    for size in [packet.len(), usize::from(u16::from_le_bytes(*size)) * 2] {
        let Ok(header) = VirtioHeader::parse(raw, packet, size) else {
            continue;
        };
        let field_end = header.checksum_start as usize + header.checksum_offset as usize + 2;
        if header.gso == Gso::None {
            assert_eq!(
                (header.has_cwr, header.header_bytes, header.segment_bytes),
                (false, 0, 0)
            );
        } else {
            let header_bytes = usize::from(header.header_bytes);
            assert!(header.needs_checksum && header.segment_bytes > 0);
            assert!(field_end <= header_bytes && header_bytes <= size.min(packet.len()));
        }
        if header.needs_checksum {
            assert!(header.checksum_start >= 20 && field_end <= size);
        } else {
            assert_eq!(header, VirtioHeader::default());
        }
        assert_eq!(
            VirtioHeader::parse(&header.encode(), packet, size),
            Ok(header)
        );
    }
}

/// An offload header and its packet.
pub fn fuzz_segment(data: &[u8]) {
    let Some((raw, packet)) = data.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Ok(header) = VirtioHeader::parse(raw, packet, packet.len()) else {
        return;
    };
    let found = segment(&header, packet);
    if header.gso == Gso::None {
        let mut single = packet.to_vec();
        complete(&header, &mut single);
        assert_eq!(found, Some(vec![single]));
        return;
    }
    let header_bytes = usize::from(header.header_bytes);
    let Some(found) = found else {
        assert!(header_bytes > HEADERS_MAX);
        return;
    };
    let cut = Cut::new(&header, &packet[..header_bytes], packet.len()).expect("all of its headers");
    assert_eq!(found.len(), cut.count);
    let payload: Vec<u8> = found
        .iter()
        .flat_map(|each| &each[header_bytes..])
        .copied()
        .collect();
    assert_eq!(payload, packet[header_bytes..]);

    // All at once and with gaps, it is the same as one by one.
    let stride = cut.segment_bytes + 3;
    if cut.count * stride <= 1 << 20 {
        let mut out = vec![0xEE; cut.count * stride];
        cut.place(packet, &mut out, stride, 0, cut.count);
        cut.stamp(&mut out, stride, 0, cut.count);
        for (slot, expected) in out.chunks(stride).zip(&found) {
            let (found, behind) = slot.split_at(expected.len());
            assert_eq!(found, expected);
            assert!(behind.iter().all(|byte| *byte == 0xEE));
        }
    }

    // Where the sum of the pseudo header was right, every packet is.
    let (transport, protocol) = find_transport(packet).expect("parsed");
    let field_at = transport + usize::from(header.checksum_offset);
    if u16_at(packet, field_at) == pseudo_sum(packet, transport, protocol) {
        assert!(found.iter().all(|each| is_right(each)));
    }
    // A flow stays one.
    if let Ok(flow) = parse_flow(packet, true) {
        assert!(found.iter().all(|each| parse_flow(each, true) == Ok(flow)));
    }
}

/// Which superpackets the device takes; then packets, each with two bytes of what is done with it first.
///
/// The first byte: 1 makes its lengths right, 2 its checksums, 4 continues the packet before it, of which it then has
/// the headers. The second: so many bytes are its own, but for 0, which takes 256.
pub fn fuzz_coalesce(data: &[u8]) {
    let Some((kinds, mut rest)) = data.split_first() else {
        return;
    };
    let mut packets: Vec<Vec<u8>> = Vec::new();
    while let Some((&[how, length], behind)) = rest.split_first_chunk::<2>() {
        let length = if length == 0 {
            256
        } else {
            usize::from(length)
        };
        let (own, behind) = behind.split_at(length.min(behind.len()));
        let packet = make_packet(how, own, packets.last());
        packets.push(packet);
        rest = behind;
    }
    let (tso, uso) = (kinds & 1 != 0, kinds & 2 != 0);
    let slices: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
    let mut sent = packets.iter();
    for (count, whole) in coalesce::coalesce(&slices, tso, uso) {
        let (raw, packet) = whole
            .split_first_chunk::<HEADER_BYTES>()
            .expect("a virtio header");
        if count == 1 {
            assert_eq!(*raw, PLAIN);
            assert_eq!(sent.next().map(Vec::as_slice), Some(packet));
            continue;
        }
        let header = VirtioHeader::parse(raw, packet, packet.len()).expect("of our own");
        assert_eq!(header.encode(), *raw);
        assert!(if header.gso == Gso::Udp { uso } else { tso });
        let parts = segment(&header, packet).expect("short headers");
        assert_eq!(parts.len(), count);
        for part in &parts {
            assert!(is_right(part));
            assert!(is_same(
                part,
                sent.next().expect("no more packets than before")
            ));
        }
    }
    assert_eq!(sent.next(), None);
}

fn make_packet(how: u8, own: &[u8], before: Option<&Vec<u8>>) -> Vec<u8> {
    let mut packet = own.to_vec();
    if let (true, Some(before)) = (how & 4 != 0, before) {
        if let Some((transport, protocol)) = find_transport(before) {
            let is_tcp = protocol == packets::TCP;
            let header_bytes = transport
                + if is_tcp {
                    usize::from(before[transport + 12] >> 4) * 4
                } else {
                    8
                };
            packet = [&before[..header_bytes], own].concat();
            if before[0] >> 4 == 4 {
                set_u16(&mut packet, 4, u16_at(before, 4).wrapping_add(1));
            }
            if is_tcp {
                let field = &mut packet[transport + 4..transport + 8];
                let mut sequence = [0; 4];
                sequence.copy_from_slice(field);
                let added = (before.len() - header_bytes) as u32;
                let sequence = u32::from_be_bytes(sequence).wrapping_add(added);
                field.copy_from_slice(&sequence.to_be_bytes());
            }
        }
    }
    let Some((transport, protocol)) = find_transport(&packet) else {
        return packet;
    };
    let size = packet.len();
    if how & 1 != 0 {
        if packet[0] >> 4 == 4 {
            set_u16(&mut packet, 2, size as u16);
        } else {
            set_u16(&mut packet, 4, (size - 40) as u16);
        }
        if protocol == packets::UDP {
            set_u16(&mut packet, transport + 4, (size - transport) as u16);
        }
    }
    if how & 2 != 0 {
        repair(&mut packet, transport, protocol);
    }
    packet
}
