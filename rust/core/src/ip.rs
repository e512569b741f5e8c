//! What the flow table needs to know of an inner IP packet; as `nebula_mp.wire.ip.parse_flow`.

/// A packet, header chain or transport header that ends too early, or contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// A flow as the flow table spells it (`shm_flows.pack_key`): local and remote address, ports, protocol, kind;
/// the 40 bytes as five little-endian u64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct FlowKey(pub [u64; 5]);

impl FlowKey {
    /// The address of the far end, 16 bytes with zeros behind IPv4, and whether it is IPv6.
    pub fn remote(&self) -> ([u8; 16], bool) {
        todo!()
    }
}

/// Classify an IP packet; `inbound` means from the tunnel, so that its destination is local.
pub fn parse_flow(packet: &[u8], inbound: bool) -> Result<FlowKey, Malformed> {
    todo!("{} {inbound}", packet.len())
}
