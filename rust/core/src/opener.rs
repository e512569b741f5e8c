//! UDP socket -> tunnel, window, key -> opened into the open ring; as `nebula_mp.datapath.opening`.
//!
//! ```text
//! UDP | another reader's strangers -> [Opener] -> delivery -> open ring -> drains::TunDrain
//!                                              -> outlet -> seal ring -> drains::UdpDrain
//!                                              -> upcall ring -> control
//!                                              -> stranger ring -> the owner of the tunnel
//! ```
//!
//! Knows the order of the checks, of which the first that fails gives a datagram its one reason; decides nothing.
//! Source: docs/wire-format.md, "Packet header" and "Replay window"; docs/architecture.md, "Steering"; udp(7) and
//! Linux net/ipv4/udp_offload.c (UDP_GRO): what one call gives are datagrams of one size, the last may be shorter.
//!
//! Nothing that is not authentic changes anything: the window moves after the tag was found right, and what was
//! forged is opened into bytes that nobody else reads and that are zeros afterwards. An authentic packet from
//! another address than the tunnel's is delivered as any other, and control is told of the address: so no packet
//! overtakes another, or is lost, while a peer moves.
//!
//! Datagrams of one batch that follow each other with the same type and index are handled together: tunnel, window
//! and sender are looked up once, traffic is counted once, and control is told once that the peer has moved. Relay
//! frames are handled one by one.

use std::cell::RefCell;
use std::rc::Rc;

use crate::delivery::{Delivery, Desk};
use crate::error::{Fault, Result};
use crate::filler::Filler;
use crate::header::{
    index_and_counter, kind, DATAGRAM_BYTES_MAX, HANDSHAKE, HEADER_BYTES, MESSAGE, MESSAGE_RELAY,
    OVERHEAD_BYTES, RECV_ERROR, TAG_BYTES, VERSION,
};
use crate::relays::{Leads, Path};
use crate::replay::Refused;
use crate::ring::Consumer;
use crate::sealer::{Sealer, Shared};
use crate::stats::Slots;
use crate::sys;
use crate::tunnels::{Tunnel, TunnelState, UdpAddr};
use crate::upcalls::{parse_record, Arrival, Reason, Strangers, RECORD_BYTES};
use crate::windows::ReceiveWindows;

/// The most that one call gives.
const BATCH_BYTES_MAX: usize = 65_536;
const PUNCH_BYTES_MAX: usize = 1;

/// Which superpackets the TUN device takes, and how datagrams come.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Offloads {
    pub tso: bool,
    pub uso: bool,
    pub udp_gro: bool,
    pub udp_segment: bool,
}

impl Offloads {
    /// Every packet of a TUN queue has a virtio header in front.
    pub fn tun_header(&self) -> bool {
        self.tso || self.uso
    }
}

/// A network inside the overlay: address (IPv4 in the first 4 bytes), family 4 or 6, bits.
pub type Network = ([u8; 16], u8, u8);

/// Whether an address lies in a network.
fn contains(network: &Network, address: &UdpAddr) -> bool {
    let (base, family, bits) = network;
    let of_family = if *family == 4 { 32 } else { 128 };
    let bits = u32::from(*bits).min(of_family);
    // IPv4 addresses are the upper bits, with zeros behind.
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    let differing = u128::from_be_bytes(*base) ^ u128::from_be_bytes(address.ip);
    *family == address.family && differing & mask == 0
}

/// The inbound half of a reader.
pub struct Opener {
    udp_fd: i32,
    batch: Vec<u8>,
    /// How much of `batch` a call may fill.
    room: usize,
    overlay: Vec<Network>,
    /// The last sender, and whether it lies inside the overlay.
    known: Option<(UdpAddr, bool)>,
    strangers_in: Vec<Consumer>,
    inbound: Inbound,
    shared: Rc<RefCell<Shared>>,
}

impl Opener {
    /// As `PythonOpener`. `overlay`: datagrams from these networks have looped. `outbound`: what frames go on through.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        udp_fd: i32,
        worker: u16,
        filler: Filler,
        windows: ReceiveWindows,
        strangers: Strangers,
        strangers_in: Vec<Consumer>,
        overlay: Vec<Network>,
        outbound: Rc<RefCell<Sealer>>,
        offloads: Offloads,
    ) -> Self {
        // Without UDP_GRO a larger datagram is cut there, since it is refused for its size whatever it has.
        let room = if offloads.udp_gro {
            BATCH_BYTES_MAX
        } else {
            DATAGRAM_BYTES_MAX + 1
        };
        let shared = outbound.borrow().shared();
        Self {
            udp_fd,
            batch: vec![0; BATCH_BYTES_MAX],
            room,
            overlay,
            known: None,
            strangers_in,
            inbound: Inbound {
                worker,
                windows,
                strangers,
                delivery: Delivery::new(filler, offloads),
                message: vec![0; RECORD_BYTES + DATAGRAM_BYTES_MAX + 1],
                outbound,
                has_forwarded: false,
            },
            shared,
        }
    }

    /// As `api.Opener.poll`; `now_us` is the monotonic clock.
    pub fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize> {
        let now_ms = now_us / 1000;
        let shared = Rc::clone(&self.shared);
        let shared = &mut *shared.borrow_mut();
        let mut taken = self.poll_strangers(budget, now_ms, shared)?;
        let (mut packets, mut bytes) = (0, 0);
        let mut lost = None;
        while taken < budget {
            let received = match sys::receive(self.udp_fd, &mut self.batch[..self.room]) {
                Ok(received) => received,
                Err(libc::EAGAIN) => break,
                Err(number) if sys::is_lost(number) => {
                    lost = Some(number);
                    break;
                }
                Err(_) => {
                    // Counts as one, so that a flood of them cannot hold the loop.
                    shared.stats.add(shared.stats.slots.rx_icmp, 1);
                    taken += 1;
                    continue;
                }
            };
            let size = received.bytes.min(self.room);
            let stride = match received.stride {
                stride if 0 < stride && stride < size => stride,
                _ => size,
            };
            let count = size.div_ceil(stride.max(1)).max(1);
            taken += count;
            packets += count as u64;
            bytes += size as u64;
            if received.is_cut {
                // By a kernel that joins more than it says.
                let slot = shared.stats.slots.drop_oversize;
                shared.stats.add(slot, count as u64);
                continue;
            }
            let source = self.judge_source(&received.source);
            let batch = &self.batch[..size];
            self.inbound.take(batch, stride, source, now_ms, shared)?;
        }
        self.inbound.delivery.flush();
        if self.inbound.has_forwarded {
            self.inbound.outbound.borrow_mut().publish();
        }
        shared.upcalls.flush();
        self.inbound.strangers.flush();
        if packets > 0 {
            let slot = shared.stats.slots.udp_rx_packets;
            shared.stats.add_traffic(slot, packets, bytes);
        }
        match lost {
            Some(number) => Err(Fault::Lost(number)),
            None => Ok(taken),
        }
    }

    /// As `api.Opener.waiting`.
    pub fn waiting(&mut self) -> Result<u64> {
        self.inbound.delivery.waiting()
    }

    /// Whether anything was forwarded since this was asked last: then the other half is to see to it that it goes.
    pub fn take_forwarded(&mut self) -> bool {
        std::mem::take(&mut self.inbound.has_forwarded)
    }

    /// The sender, or None if it lies inside the overlay: then the datagram has looped.
    fn judge_source(&mut self, source: &UdpAddr) -> Option<UdpAddr> {
        let has_looped = match &self.known {
            Some((known, has_looped)) if known == source => *has_looped,
            _ => {
                let found = self.overlay.iter().any(|each| contains(each, source));
                self.known = Some((*source, found));
                found
            }
        };
        (!has_looped).then_some(*source)
    }

    /// Take what other readers, and control, handed to us, whole areas at a time.
    fn poll_strangers(&mut self, budget: usize, now_ms: u64, shared: &mut Shared) -> Result<usize> {
        let mut taken = 0;
        for ring in &mut self.strangers_in {
            while taken < budget && ring.pending()? > 0 {
                for number in ring.load()?..ring.len() {
                    let (_, data) = ring.entry(number);
                    // A copy: another process could still write there. One byte too many is too many.
                    let length = data.len().min(RECORD_BYTES + DATAGRAM_BYTES_MAX + 1);
                    let copy = &mut self.batch[..length];
                    copy.copy_from_slice(&data[..length]);
                    match parse_record(copy)? {
                        (0, source, datagram) => {
                            let stride = datagram.len();
                            self.inbound
                                .take(datagram, stride, source, now_ms, shared)?;
                        }
                        (path, _, datagram) => {
                            self.inbound
                                .handle_relayed(path, datagram, 1, now_ms, shared)?;
                        }
                    }
                    taken += 1;
                }
                ring.release()?;
            }
        }
        Ok(taken)
    }
}

/// What an opener needs for a datagram, wherever it came from.
struct Inbound {
    worker: u16,
    windows: ReceiveWindows,
    strangers: Strangers,
    delivery: Delivery,
    /// Where messages are opened that go up.
    message: Vec<u8>,
    /// Seals what goes on.
    outbound: Rc<RefCell<Sealer>>,
    has_forwarded: bool,
}

/// A batch from one datagram on, and how it came.
#[derive(Clone, Copy)]
struct Rest<'a> {
    bytes: &'a [u8],
    stride: usize,
    /// More that came together with them.
    further: usize,
}

impl<'a> Rest<'a> {
    fn first(&self) -> &'a [u8] {
        &self.bytes[..self.stride.min(self.bytes.len())]
    }

    /// So many came together.
    fn left(&self) -> usize {
        self.bytes.len().div_ceil(self.stride.max(1)) + self.further
    }

    fn skip(&mut self) {
        self.bytes = &self.bytes[self.stride.min(self.bytes.len())..];
    }
}

impl Inbound {
    /// See to it that each datagram is opened, handed over or counted; `source` is None if they have looped.
    ///
    /// They have `stride` bytes each, which is 0 for nothing but an empty one.
    fn take(
        &mut self,
        bytes: &[u8],
        stride: usize,
        source: Option<UdpAddr>,
        now_ms: u64,
        shared: &mut Shared,
    ) -> Result<()> {
        let mut rest = Rest {
            bytes,
            stride,
            further: 0,
        };
        loop {
            self.handle(&mut rest, source, now_ms, shared)?;
            if rest.bytes.is_empty() {
                return Ok(());
            }
        }
    }

    /// Do so for the next datagram, or for several that are of one kind and for one tunnel.
    fn handle(
        &mut self,
        rest: &mut Rest<'_>,
        source: Option<UdpAddr>,
        now_ms: u64,
        shared: &mut Shared,
    ) -> Result<()> {
        let datagram = rest.first();
        let slots = &shared.stats.slots;
        let size = datagram.len();
        if size > DATAGRAM_BYTES_MAX {
            shared.stats.add(slots.drop_oversize, 1);
            rest.skip();
            return Ok(());
        }
        let header = datagram.first_chunk::<HEADER_BYTES>();
        let mut known = None;
        if size > PUNCH_BYTES_MAX {
            let refused = match header {
                None => Some(slots.drop_short),
                Some([first, subtype, ..]) => match kind(*first, *subtype) {
                    Some(kind) => {
                        known = Some((kind, *subtype));
                        None
                    }
                    None if first >> 4 == VERSION => Some(slots.drop_type),
                    None => Some(slots.drop_version),
                },
            };
            if let Some(slot) = refused {
                shared.stats.add(slot, 1);
                rest.skip();
                return Ok(());
            }
        }
        let Some(source) = source else {
            shared.stats.add(slots.drop_looped, 1);
            rest.skip();
            return Ok(());
        };
        let (kind, subtype) = known.unwrap_or((0, 0));
        let arrival = Arrival {
            source: Some(source),
            kind,
            subtype,
            at_ms: now_ms,
        };
        let header = match header {
            Some(header) if kind != HANDSHAKE && kind != RECV_ERROR => header,
            _ => {
                self.delivery.settle(); // what came earlier goes up earlier
                shared.upcalls.raw(Reason::Datagram, &arrival, datagram)?;
                rest.skip();
                return Ok(());
            }
        };
        if (kind, subtype) == (MESSAGE, MESSAGE_RELAY) {
            let left = rest.left();
            rest.skip();
            return self.take_frame(datagram, header, left, &arrival, shared);
        }
        self.open_rest(rest, header, &arrival, 0, shared)
    }

    /// Open messages of the tunnel that the first, whose header this is, is for; or see to it that this one is handed
    /// over. It came in a frame of `path`, if that is not 0.
    fn open_rest(
        &mut self,
        rest: &mut Rest<'_>,
        header: &[u8; HEADER_BYTES],
        arrival: &Arrival,
        path: u32,
        shared: &mut Shared,
    ) -> Result<()> {
        let datagram = rest.first();
        let (index, _) = index_and_counter(header);
        if path != 0 && shared.tunnels.get(index)?.is_none() {
            rest.skip();
            return self.hand_up_relayed(path, arrival, datagram, shared);
        }
        let desk = &mut Desk {
            flows: &mut shared.flows,
            upcalls: &mut shared.upcalls,
            stats: &shared.stats,
        };
        match shared.tunnels.get(index)? {
            None => {
                self.delivery.settle(); // what came earlier goes up earlier
                desk.upcalls.raw(Reason::UnknownIndex, arrival, datagram)?;
                rest.skip();
            }
            Some(tunnel) if tunnel.owner != self.worker => {
                self.strangers.push(tunnel.owner, arrival, datagram, path)?;
                rest.skip();
            }
            Some(tunnel) => {
                let (packets, bytes) = self.open_all(rest, header, tunnel, arrival, desk)?;
                if packets > 0 {
                    let generation = tunnel.generation;
                    let row = tunnel.row();
                    shared
                        .traffic
                        .received(row, generation, packets, bytes, arrival.at_ms);
                }
            }
        }
        Ok(())
    }

    /// See to it that a relay frame is handed over or counted, or what it holds goes where it leads. `left`: so many
    /// datagrams, with this one, came together.
    fn take_frame(
        &mut self,
        frame: &[u8],
        header: &[u8; HEADER_BYTES],
        left: usize,
        arrival: &Arrival,
        shared: &mut Shared,
    ) -> Result<()> {
        let (index, counter) = index_and_counter(header);
        let path = shared.relays.get(index)?;
        let tunnel = match &path {
            Some(path) => shared.tunnels.get(path.carrier)?,
            None => None,
        };
        let (Some(path), Some(tunnel)) = (path, tunnel) else {
            self.delivery.settle(); // what came earlier goes up earlier
            return shared.upcalls.raw(Reason::Datagram, arrival, frame);
        };
        if tunnel.owner != self.worker {
            return self.strangers.push(tunnel.owner, arrival, frame, 0);
        }
        let (stats, slots) = (&shared.stats, &shared.stats.slots);
        if frame.len() < OVERHEAD_BYTES {
            stats.add(slots.drop_truncated, 1);
            return Ok(());
        }
        let (row, generation) = (tunnel.row(), tunnel.generation);
        let Some(window) = self.windows.get(row, generation) else {
            // The row has a later tunnel, and this one ended.
            stats.add(slots.drop_unknown_index, 1);
            return Ok(());
        };
        if let Err(refused) = window.check(counter) {
            stats.add(slot_of(refused, slots), 1);
            return Ok(());
        }
        if tunnel.receive.open_frame(counter, frame).is_err() {
            stats.add(slots.drop_auth, 1);
            return Ok(());
        }
        window.update(counter);
        let now_ms = arrival.at_ms;
        shared
            .traffic
            .received(row, generation, 1, frame.len() as u64, now_ms);
        let content = &frame[HEADER_BYTES..frame.len() - TAG_BYTES];
        let local_index = tunnel.local_index;
        if tunnel.state != TunnelState::Proven {
            self.delivery.settle(); // as above
            return shared
                .upcalls
                .opened(Reason::First, arrival, local_index, content);
        }
        if tunnel.underlay != arrival.source {
            shared.upcalls.moved(arrival, local_index)?;
        }
        match path.leads {
            Leads::Here => self.handle_relayed(index, content, left, now_ms, shared),
            Leads::Through(next) => self.forward(&path, next, content, now_ms, shared),
        }
    }

    /// Let control see what came in a frame of this path, if that is still there.
    fn hand_up_relayed(
        &mut self,
        index: u32,
        arrival: &Arrival,
        datagram: &[u8],
        shared: &mut Shared,
    ) -> Result<()> {
        let Some(path) = shared.relays.get(index)? else {
            shared.stats.add(shared.stats.slots.drop_relay_index, 1);
            return Ok(());
        };
        self.delivery.settle(); // as above
        shared.upcalls.relayed(arrival, &path, datagram)
    }

    /// Send the content of a frame on, or count why not.
    fn forward(
        &mut self,
        path: &Path,
        next: u32,
        content: &[u8],
        now_ms: u64,
        shared: &mut Shared,
    ) -> Result<()> {
        let mut outbound = self.outbound.borrow_mut();
        self.has_forwarded |= outbound.forward(shared, path, next, content, now_ms)?;
        Ok(())
    }

    /// See to it that what came in a frame of this path is opened, handed over or counted; `left` as above.
    fn handle_relayed(
        &mut self,
        path: u32,
        datagram: &[u8],
        left: usize,
        now_ms: u64,
        shared: &mut Shared,
    ) -> Result<()> {
        let slots = &shared.stats.slots;
        let judged = match datagram.first_chunk::<HEADER_BYTES>() {
            // From another reader: no frame has room for it.
            _ if datagram.len() > DATAGRAM_BYTES_MAX => Err(slots.drop_oversize),
            None => Err(slots.drop_short),
            Some(header) => match kind(header[0], header[1]) {
                Some(MESSAGE) if header[1] == MESSAGE_RELAY => Err(slots.drop_relay_index),
                Some(kind) => Ok((header, kind)),
                None if header[0] >> 4 == VERSION => Err(slots.drop_type),
                None => Err(slots.drop_version),
            },
        };
        let (header, kind) = match judged {
            Ok(judged) => judged,
            Err(slot) => {
                shared.stats.add(slot, 1);
                return Ok(());
            }
        };
        let arrival = Arrival {
            source: None,
            kind,
            subtype: header[1],
            at_ms: now_ms,
        };
        if kind == HANDSHAKE || kind == RECV_ERROR {
            return self.hand_up_relayed(path, &arrival, datagram, shared);
        }
        let mut rest = Rest {
            bytes: datagram,
            stride: datagram.len(),
            further: left - 1,
        };
        self.open_rest(&mut rest, header, &arrival, path, shared)
    }

    /// Open messages of a tunnel that is ours, as long as they have the type and index of the first, whose header
    /// this is. Gives how many were authentic, and their bytes.
    fn open_all(
        &mut self,
        rest: &mut Rest<'_>,
        first: &[u8; HEADER_BYTES],
        tunnel: &Tunnel,
        arrival: &Arrival,
        desk: &mut Desk<'_>,
    ) -> Result<(u64, u64)> {
        let Self {
            windows,
            delivery,
            message,
            ..
        } = self;
        let slots = &desk.stats.slots;
        let mut found = None; // the window, looked for when there is something to open
        let is_proven = tunnel.state == TunnelState::Proven;
        let is_packet = arrival.kind == MESSAGE;
        if is_packet && is_proven {
            delivery.enter(tunnel, arrival.source);
        } else {
            delivery.settle(); // what came earlier goes up earlier
        }
        // What came in a frame came from nowhere.
        let mut has_moved =
            is_packet && is_proven && arrival.source.is_some() && tunnel.underlay != arrival.source;
        let (mut packets, mut bytes) = (0, 0);
        while !rest.bytes.is_empty() {
            let datagram = rest.first();
            let Some((header, sealed)) = datagram.split_first_chunk::<HEADER_BYTES>() else {
                break; // the last one, which has its own reason
            };
            if header[..2] != first[..2] || header[4..8] != first[4..8] {
                break;
            }
            let left = rest.left();
            rest.skip();
            let (_, counter) = index_and_counter(header);
            if datagram.len() < OVERHEAD_BYTES {
                desk.stats.add(slots.drop_truncated, 1);
                continue;
            }
            let Some(window) =
                found.get_or_insert_with(|| windows.get(tunnel.row(), tunnel.generation))
            else {
                // The row has a later tunnel, and this one ended.
                desk.stats.add(slots.drop_unknown_index, 1);
                continue;
            };
            if let Err(refused) = window.check(counter) {
                desk.stats.add(slot_of(refused, slots), 1);
                continue;
            }
            let size = sealed.len() - TAG_BYTES;
            let out = if is_packet {
                if !delivery.fits(size) {
                    desk.stats.add(slots.drop_oversize, 1);
                    continue;
                }
                match delivery.try_place(size, left)? {
                    Some(place) => place,
                    None => {
                        // Before it is opened: the window has not moved.
                        desk.stats.add(slots.ring_full_open, 1);
                        continue;
                    }
                }
            } else {
                &mut message[..size]
            };
            let opened = tunnel.receive.open_separate(counter, header, sealed, out);
            if opened.is_err() {
                if is_packet {
                    delivery.give_back();
                }
                desk.stats.add(slots.drop_auth, 1);
                continue;
            }
            window.update(counter);
            packets += 1;
            bytes += datagram.len() as u64;
            if is_packet && is_proven {
                if has_moved {
                    has_moved = false;
                    desk.upcalls.moved(arrival, tunnel.local_index)?;
                }
                delivery.take(tunnel, arrival, desk)?;
                continue;
            }
            let reason = if is_proven {
                Reason::Message
            } else {
                Reason::First
            };
            let content = if is_packet {
                delivery.placed()
            } else {
                &message[..size]
            };
            desk.upcalls
                .opened(reason, arrival, tunnel.local_index, content)?;
        }
        Ok((packets, bytes))
    }
}

/// Where it is counted that a window refused a counter.
fn slot_of(refused: Refused, slots: &Slots) -> usize {
    match refused {
        Refused::Old => slots.drop_old,
        Refused::Seen => slots.drop_replay,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipv4(ip: [u8; 4]) -> UdpAddr {
        let mut padded = [0; 16];
        padded[..4].copy_from_slice(&ip);
        UdpAddr {
            ip: padded,
            family: 4,
            port: 4242,
            scope: 0,
        }
    }

    #[test]
    fn a_network_contains_the_addresses_with_its_first_bits_and_of_its_family() {
        let network = |bits| (ipv4([10, 9, 200, 1]).ip, 4, bits);
        for (bits, inside, outside) in [
            (32, [10, 9, 200, 1], [10, 9, 200, 0]),
            (31, [10, 9, 200, 0], [10, 9, 200, 2]),
            (16, [10, 9, 0, 255], [10, 8, 200, 1]),
            (1, [127, 0, 0, 1], [128, 0, 0, 1]),
        ] {
            assert!(contains(&network(bits), &ipv4(inside)));
            assert!(!contains(&network(bits), &ipv4(outside)));
        }
        assert!(contains(&network(0), &ipv4([255; 4])));
    }

    #[test]
    fn a_network_does_not_contain_addresses_of_the_other_family() {
        let mut address = ipv4([10, 9, 0, 1]);
        address.family = 6;
        assert!(!contains(&(ipv4([10, 9, 0, 0]).ip, 4, 16), &address));
        assert!(contains(&([0; 16], 6, 0), &address));
        assert!(!contains(&([0; 16], 6, 128), &address));
        assert!(!contains(&([0; 16], 6, 0), &ipv4([10, 9, 0, 1])));
    }

    #[test]
    fn a_scope_does_not_matter_to_a_network() {
        let mut address = ipv4([0xFE, 0x80, 0, 0]);
        (address.family, address.scope) = (6, 3);
        let mut base = [0; 16];
        base[..2].copy_from_slice(&[0xFE, 0x80]);
        assert!(contains(&(base, 6, 10), &address));
    }
}
