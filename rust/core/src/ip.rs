//! What the flow table needs to know of an inner IP packet; as `nebula_mp.wire.ip.parse_flow`.
//!
//! ```text
//! TUN packet | opened message -> [ip] -> flows
//! ```
//!
//! Reads addresses, ports and fragment state; knows nothing of rules, tunnels or what lies behind the ports.
//! Source: RFC 791, RFC 8200 section 4, RFC 4302 section 2.2; which fields become ports is Nebula's choice
//! (docs/wire-format.md, "Firewall").

/// IP protocol numbers.
pub const HOP_BY_HOP: u8 = 0;
/// ICMP of IPv4.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// IPv6 routing header.
pub const ROUTING: u8 = 43;
/// IPv6 fragment header.
pub const FRAGMENT: u8 = 44;
/// Authentication header.
pub const AUTHENTICATION: u8 = 51;
/// ICMP of IPv6.
pub const ICMPV6: u8 = 58;
/// IPv6 destination options.
pub const DESTINATION_OPTIONS: u8 = 60;

/// Bytes of an IPv4 header without options.
pub const IPV4_HEADER_BYTES: usize = 20;
/// Bytes of the fixed IPv6 header.
pub const IPV6_HEADER_BYTES: usize = 40;
/// An IPv6 packet with more extension headers than this is refused.
pub const EXTENSION_HEADERS_MAX: usize = 8;

const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
const OFFSET_MASK: u16 = 0x1FFF;
const KIND_FRAGMENT: u8 = 1;
const KIND_IPV6: u8 = 2;
/// Of no packet: all flows between two addresses.
const KIND_PAIR: u8 = 4;

/// A packet, header chain or transport header that ends too early, or contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// A flow as the flow table spells it (`shm_flows.pack_key`): local and remote address, ports, protocol, kind;
/// the 40 bytes as five little-endian u64. Equal for both directions of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct FlowKey(pub [u64; 5]);

impl FlowKey {
    /// The address of the far end, 16 bytes with zeros behind IPv4, and whether it is IPv6.
    #[inline]
    pub fn remote(&self) -> ([u8; 16], bool) {
        let mut address = [0; 16];
        address[..8].copy_from_slice(&self.0[2].to_le_bytes());
        address[8..].copy_from_slice(&self.0[3].to_le_bytes());
        (address, self.kind() & KIND_IPV6 != 0)
    }

    /// Of the upper layer.
    #[inline]
    pub fn protocol(&self) -> u8 {
        (self.0[4] >> 32) as u8
    }

    /// What stands for all flows between the two ends of this one.
    pub fn pair(&self) -> Self {
        let [a, b, c, d, _] = self.0;
        let kind = self.kind() & KIND_IPV6 | KIND_PAIR;
        Self([a, b, c, d, u64::from(kind) << 40])
    }

    /// Whether this is what `pair` gives.
    pub fn is_pair(&self) -> bool {
        self.kind() & KIND_PAIR != 0
    }

    #[inline]
    fn kind(&self) -> u8 {
        (self.0[4] >> 40) as u8
    }

    /// The 40 bytes.
    pub fn to_bytes(&self) -> [u8; 40] {
        let mut packed = [0; 40];
        for (bytes, word) in packed.chunks_exact_mut(8).zip(self.0) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        packed
    }
}

/// What stands in the packet: of the two ends still the sender and the receiver.
struct Ends {
    source: [u64; 2],
    destination: [u64; 2],
    source_port: u16,
    destination_port: u16,
    /// The ports are those of the far end, whoever sends.
    fixed: bool,
}

impl Ends {
    #[inline]
    fn key(&self, protocol: u8, kind: u8, inbound: bool) -> FlowKey {
        let (local, remote, local_port, remote_port) = if inbound {
            (
                self.destination,
                self.source,
                self.destination_port,
                self.source_port,
            )
        } else {
            (
                self.source,
                self.destination,
                self.source_port,
                self.destination_port,
            )
        };
        let (local_port, remote_port) = if self.fixed {
            (self.source_port, self.destination_port)
        } else {
            (local_port, remote_port)
        };
        let rest = u64::from(local_port)
            | u64::from(remote_port) << 16
            | u64::from(protocol) << 32
            | u64::from(kind) << 40;
        FlowKey([local[0], local[1], remote[0], remote[1], rest])
    }
}

/// Classify an IP packet; `inbound` means from the tunnel, so that its destination is local.
///
/// The key's protocol is the upper one, behind all extension headers. Of ICMP and ICMPv6 echo the identifier is the
/// remote port. A fragment other than the first of its datagram has no ports.
#[inline]
pub fn parse_flow(packet: &[u8], inbound: bool) -> Result<FlowKey, Malformed> {
    match packet.first().ok_or(Malformed)? >> 4 {
        4 => parse_ipv4(packet, inbound),
        6 => parse_ipv6(packet, inbound),
        _ => Err(Malformed),
    }
}

#[inline]
fn parse_ipv4(packet: &[u8], inbound: bool) -> Result<FlowKey, Malformed> {
    let header: &[u8; IPV4_HEADER_BYTES] = packet.first_chunk().ok_or(Malformed)?;
    let header_bytes = usize::from(header[0] & 0x0F) * 4;
    if header_bytes < IPV4_HEADER_BYTES {
        return Err(Malformed);
    }
    let protocol = header[9];
    let mut ends = Ends {
        source: [ipv4_word(header, 12), 0],
        destination: [ipv4_word(header, 16), 0],
        source_port: 0,
        destination_port: 0,
        fixed: false,
    };
    if u16::from_be_bytes([header[6], header[7]]) & OFFSET_MASK != 0 {
        // Of a fragment all options must be there as well.
        if packet.len() < header_bytes {
            return Err(Malformed);
        }
        return Ok(ends.key(protocol, KIND_FRAGMENT, inbound));
    }
    let behind = packet.get(header_bytes..).ok_or(Malformed)?;
    if protocol == ICMP {
        ends.destination_port = identifier(behind)?;
        ends.fixed = true;
    } else {
        // Every protocol but ICMP: Nebula takes the first four bytes as ports, be they such or not.
        (ends.source_port, ends.destination_port) = ports(behind)?;
    }
    Ok(ends.key(protocol, 0, inbound))
}

#[inline(never)]
fn parse_ipv6(packet: &[u8], inbound: bool) -> Result<FlowKey, Malformed> {
    let header: &[u8; IPV6_HEADER_BYTES] = packet.first_chunk().ok_or(Malformed)?;
    let mut ends = Ends {
        source: [ipv6_word(header, 8), ipv6_word(header, 16)],
        destination: [ipv6_word(header, 24), ipv6_word(header, 32)],
        source_port: 0,
        destination_port: 0,
        fixed: false,
    };
    let Upper {
        protocol,
        offset,
        is_fragment,
    } = upper_protocol(packet)?;
    if is_fragment {
        return Ok(ends.key(protocol, KIND_IPV6 | KIND_FRAGMENT, inbound));
    }
    let behind = packet.get(offset..).ok_or(Malformed)?;
    match protocol {
        ICMPV6 => {
            if matches!(behind.first(), Some(&(ECHO_REQUEST | ECHO_REPLY))) {
                ends.destination_port = identifier(behind)?;
            } else if behind.len() < 4 {
                return Err(Malformed);
            }
            ends.fixed = true;
        }
        TCP | UDP => (ends.source_port, ends.destination_port) = ports(behind)?,
        _ => {}
    }
    Ok(ends.key(protocol, KIND_IPV6, inbound))
}

/// What lies behind the extension headers of an IPv6 packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upper {
    /// The upper protocol.
    pub protocol: u8,
    /// Where its header begins; of a fragment that is not the first, where the fragment header does.
    pub offset: usize,
    /// A fragment other than the first.
    pub is_fragment: bool,
}

/// Walk the extension headers of an IPv6 packet; they must lie in the packet, and be at most
/// `EXTENSION_HEADERS_MAX`.
pub fn upper_protocol(packet: &[u8]) -> Result<Upper, Malformed> {
    let mut protocol = *packet.get(6).ok_or(Malformed)?;
    let mut offset = IPV6_HEADER_BYTES;
    for _ in 0..=EXTENSION_HEADERS_MAX {
        let behind = packet.get(offset..).ok_or(Malformed)?;
        match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                // Length in 8 bytes, beyond the first 8.
                let [next, length] = *behind.first_chunk().ok_or(Malformed)?;
                (protocol, offset) = (next, offset + (usize::from(length) + 1) * 8);
            }
            AUTHENTICATION => {
                // Length in 4 bytes, beyond the first 8.
                let [next, length] = *behind.first_chunk().ok_or(Malformed)?;
                (protocol, offset) = (next, offset + (usize::from(length) + 2) * 4);
            }
            FRAGMENT => {
                let [next, _, high, low, ..] = *behind.first_chunk::<8>().ok_or(Malformed)?;
                if u16::from_be_bytes([high, low]) & 0xFFF8 != 0 {
                    return Ok(Upper {
                        protocol: next,
                        offset,
                        is_fragment: true,
                    });
                }
                (protocol, offset) = (next, offset + 8);
            }
            _ => {
                return Ok(Upper {
                    protocol,
                    offset,
                    is_fragment: false,
                })
            }
        }
    }
    Err(Malformed)
}

#[inline]
fn ipv4_word(header: &[u8; IPV4_HEADER_BYTES], at: usize) -> u64 {
    u64::from(u32::from_le_bytes([
        header[at],
        header[at + 1],
        header[at + 2],
        header[at + 3],
    ]))
}

#[inline]
fn ipv6_word(header: &[u8; IPV6_HEADER_BYTES], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&header[at..at + 8]);
    u64::from_le_bytes(word)
}

#[inline]
fn ports(behind: &[u8]) -> Result<(u16, u16), Malformed> {
    let [a, b, c, d] = *behind.first_chunk().ok_or(Malformed)?;
    Ok((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

/// Of an echo: it stands at the same place whoever sends, so request and reply get one key.
#[inline]
fn identifier(behind: &[u8]) -> Result<u16, Malformed> {
    let [_, _, _, _, high, low] = *behind.first_chunk().ok_or(Malformed)?;
    Ok(u16::from_be_bytes([high, low]))
}
