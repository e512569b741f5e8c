//! The consumer's side: what waits in a ring is sent or written, as much as one system call takes at a time; as
//! `nebula_mp.datapath.drains`, whose table of refusals holds here too.
//!
//! ```text
//! seal ring -> [UdpDrain] -> UDP socket        open ring -> [TunDrain] -> TUN queue
//! ```
//!
//! What is sent or written lies in the ring area until the call on it has returned: no call keeps a reference to the
//! bytes it was given. The area is released after the last of its calls. Knows which fault of a call leads to what;
//! knows no keys, and looks inside a packet only to cut it.
//!
//! The kernel's refusals are learned from as in Python: a train that is refused as a train goes datagram by datagram, and
//! a superpacket packet by packet, but nothing is learned unless one of those was taken.
//!
//! Source: udp(7), ip(7), Linux net/ipv4/udp.c (`udp_send_skb`), Documentation/networking/tuntap.rst.

use std::collections::HashMap;

use crate::error::{Fault, Result};
use crate::opener::Offloads;
use crate::ring::Consumer;
use crate::segment::Cut;
use crate::stats::StatsPage;
use crate::sys::{self, SockAddr};
use crate::tunnels::{UdpAddr, UnderlayView};
use crate::virtio::{encoded_header_bytes, Gso, VirtioHeader, HEADER_BYTES, PACKET_BYTES_MAX};

/// So many superpackets in a row that were refused, and their packets not, end the trying.
const REFUSALS_MAX: u32 = 3;

const UDP_WAIT_MS: i32 = 1;
const TUN_WAIT_MS: i32 = 10;

/// The most that a train may have: a UDP datagram of IPv4. 4-in-6 is IPv4: one byte more is EMSGSIZE.
const TRAIN_BYTES_IPV4: usize = 65_507;

/// 20 bytes less, so that the whole is below 64 KiB with the larger header too, which is what devices take.
const TRAIN_BYTES_IPV6: usize = 65_487;

/// Datagrams of a train that a kernel may have as its limit; any takes the last.
const TRAIN_LENGTHS: [usize; 4] = [128, 127, 64, 63];

/// Entries that go singly before a train is tried again where one was too large for the path.
const SINGLE_ENTRIES: u32 = 256;

/// Targets with a narrow path that are remembered.
const NARROW_MAX: usize = 4096;

/// The system calls of a drain on its descriptor, so that a test can stand in their way.
pub trait Calls {
    /// `sys::send`.
    fn send(
        &mut self,
        data: &[u8],
        target: &SockAddr,
        segment: Option<u16>,
    ) -> std::result::Result<(), i32>;
    /// `sys::write`.
    fn write(&mut self, data: &[u8]) -> std::result::Result<usize, i32>;
    /// `sys::wait_writable`.
    fn wait(&mut self, limit_ms: i32) -> bool;
}

/// The real ones, on a descriptor that is borrowed.
pub struct System(i32);

impl Calls for System {
    #[inline]
    fn send(
        &mut self,
        data: &[u8],
        target: &SockAddr,
        segment: Option<u16>,
    ) -> std::result::Result<(), i32> {
        sys::send(self.0, data, target, segment)
    }

    #[inline]
    fn write(&mut self, data: &[u8]) -> std::result::Result<usize, i32> {
        sys::write(self.0, data)
    }

    fn wait(&mut self, limit_ms: i32) -> bool {
        sys::wait_writable(self.0, limit_ms)
    }
}

/// Waits until the descriptor takes more; after one wait in vain no more until `is_patient` is set again.
struct Patient<C> {
    calls: C,
    limit_ms: i32,
    is_patient: bool,
}

impl<C: Calls> Patient<C> {
    fn wait(&mut self) -> bool {
        if self.is_patient {
            self.is_patient = self.calls.wait(self.limit_ms);
        }
        self.is_patient
    }
}

/// How much of an entry one call may carry; learns it from what the kernel refuses.
struct Trains {
    is_on: bool,
    datagrams_max: usize,
    /// Targets with a narrow path: the shortest datagram that was too long, and entries left to go singly.
    narrow: HashMap<UdpAddr, (usize, u32)>,
}

impl Trains {
    fn new(is_on: bool) -> Self {
        Self {
            is_on,
            datagrams_max: TRAIN_LENGTHS[0],
            narrow: HashMap::new(),
        }
    }

    /// Bytes that a call may carry of an entry of datagrams of `step` bytes; `step`: each has its own. Ask once for
    /// each entry.
    fn room(&mut self, step: usize, target: &Target) -> usize {
        if !self.is_on {
            return step;
        }
        if !self.narrow.is_empty() {
            if let Some((shortest, left)) = self.narrow.get_mut(&target.address) {
                if step >= *shortest {
                    if *left > 0 {
                        *left -= 1;
                        return step;
                    }
                    self.narrow.remove(&target.address);
                }
            }
        }
        step.max(target.train_bytes.min(self.datagrams_max * step))
    }

    /// A train was refused with error `number` and its datagrams were not; true if it was the last one.
    fn learn(&mut self, number: i32, step: usize, datagrams: usize, target: &Target) -> bool {
        if is_unable(number) {
            self.is_on = false;
        } else if number == libc::EINVAL && datagrams > TRAIN_LENGTHS[TRAIN_LENGTHS.len() - 1] {
            let shorter = TRAIN_LENGTHS.into_iter().find(|each| *each < datagrams);
            self.datagrams_max = shorter.unwrap_or(1);
        } else {
            if self.narrow.len() >= NARROW_MAX {
                self.narrow.clear();
            }
            self.narrow.insert(target.address, (step, SINGLE_ENTRIES));
        }
        !self.is_on
    }
}

/// A datagram of the train is larger than the path's MTU, or there are more of them than this kernel cuts.
fn is_too_large(number: i32) -> bool {
    matches!(number, libc::EMSGSIZE | libc::EINVAL)
}

/// The device calculates no checksums, or IPsec is on the path.
fn is_unable(number: i32) -> bool {
    matches!(number, libc::EIO | libc::EOPNOTSUPP)
}

/// Answers to an earlier datagram that the kernel reports at a later call.
fn is_icmp(number: i32) -> bool {
    matches!(
        number,
        libc::ECONNREFUSED | libc::EPROTO | libc::ENOPROTOOPT | libc::EHOSTDOWN | libc::ENONET
    )
}

/// Where the datagrams of an entry go. Made anew for each: that is a copy of 28 bytes, and less than to look it up.
struct Target {
    address: UdpAddr,
    name: SockAddr,
    train_bytes: usize,
}

impl Target {
    fn new(address: UdpAddr, dual: bool) -> Option<Self> {
        let name = SockAddr::to(&address, dual)?;
        let train_bytes = if address.family == 4 {
            TRAIN_BYTES_IPV4
        } else {
            TRAIN_BYTES_IPV6
        };
        Some(Self {
            address,
            name,
            train_bytes,
        })
    }
}

/// An `api.Drain` of a seal ring.
pub struct UdpDrain<C: Calls = System> {
    /// For the lease.
    pub ring: Consumer,
    /// `api.Drain.given_up`.
    pub given_up: Option<&'static str>,
    underlay: UnderlayView,
    dual: bool,
    sender: Sender<C>,
}

impl UdpDrain {
    /// As `Kernel.drain_udp`. The socket stays open for as long as the drain lives.
    pub fn new(
        ring: Consumer,
        udp_fd: i32,
        underlay: UnderlayView,
        stats: StatsPage,
        offloads: Offloads,
    ) -> Result<Self> {
        let dual = sys::is_ipv6_socket(udp_fd).map_err(Fault::Lost)?;
        Ok(Self::with_calls(
            ring,
            System(udp_fd),
            dual,
            underlay,
            stats,
            offloads,
        ))
    }
}

impl<C: Calls> UdpDrain<C> {
    /// With other system calls; `dual`: they are those of an IPv6 socket.
    pub fn with_calls(
        ring: Consumer,
        calls: C,
        dual: bool,
        underlay: UnderlayView,
        stats: StatsPage,
        offloads: Offloads,
    ) -> Self {
        Self {
            ring,
            given_up: None,
            underlay,
            dual,
            sender: Sender {
                room: Patient {
                    calls,
                    limit_ms: UDP_WAIT_MS,
                    is_patient: true,
                },
                trains: Trains::new(offloads.udp_segment),
                stats,
            },
        }
    }

    /// As `api.Drain.drain`.
    pub fn drain(&mut self, budget: usize) -> Result<usize> {
        let had_trains = self.sender.trains.is_on;
        self.sender.room.is_patient = true;
        let mut areas = 0;
        while areas < budget && self.ring.pending()? > 0 {
            let begun = self.ring.load()?;
            for number in begun..self.ring.len() {
                let (entry, data) = self.ring.entry(number);
                let step = match entry.segment as usize {
                    0 => data.len(),
                    bytes => bytes,
                };
                // Asked when it is sent, so that a peer that moved meanwhile gets it at its new address.
                let address = self.underlay.get(entry.row)?;
                match address.and_then(|it| Target::new(it, self.dual)) {
                    Some(target) => self.sender.send_entry(data, step, &target)?,
                    None => {
                        let stats = &self.sender.stats;
                        let datagrams = data.len().div_ceil(step);
                        stats.add(stats.slots.udp_drop_unreachable, datagrams as u64);
                    }
                }
            }
            self.ring.release()?;
            areas += 1;
        }
        if had_trains && !self.sender.trains.is_on {
            self.given_up = Some("udp_segment");
        }
        Ok(areas)
    }
}

/// What an entry becomes on the socket.
struct Sender<C> {
    room: Patient<C>,
    trains: Trains,
    stats: StatsPage,
}

impl<C: Calls> Sender<C> {
    fn send_entry(&mut self, data: &[u8], step: usize, target: &Target) -> Result<()> {
        if step >= data.len() {
            self.send(data, target)?;
            return Ok(());
        }
        let mut room = self.trains.room(step, target);
        let mut rest = data;
        while !rest.is_empty() {
            let size = if rest.len() <= room {
                rest.len()
            } else {
                room - room % step
            };
            let (part, behind) = rest.split_at(size);
            rest = behind;
            if size <= step {
                self.send(part, target)?;
            } else if !self.try_train(part, step, target)? {
                room = self.trains.room(step, target);
            }
        }
        Ok(())
    }

    /// Send it; false: datagram by datagram, since the kernel refused it as a train.
    fn try_train(&mut self, train: &[u8], step: usize, target: &Target) -> Result<bool> {
        // More than one datagram fits `train_bytes`, so that the size of one fits 16 bits.
        let number = self.call(train, target, Some(step as u16))?;
        let datagrams = train.len().div_ceil(step);
        if !is_too_large(number) && !is_unable(number) {
            self.count(number, train.len(), datagrams);
            return Ok(true);
        }
        let mut any_sent = false;
        for datagram in train.chunks(step) {
            any_sent |= self.send(datagram, target)?;
        }
        // Unless one was sent the fault was not the train's.
        if any_sent && self.trains.learn(number, step, datagrams, target) {
            self.stats.add(self.stats.slots.udp_gso_off, 1);
        }
        Ok(false)
    }

    fn send(&mut self, datagram: &[u8], target: &Target) -> Result<bool> {
        let number = self.call(datagram, target, None)?;
        self.count(number, datagram.len(), 1);
        Ok(number == 0)
    }

    fn count(&self, number: i32, bytes: usize, datagrams: usize) {
        let slots = &self.stats.slots;
        let slot = match number {
            0 => {
                let slot = slots.udp_tx_packets;
                return self.stats.add_traffic(slot, datagrams as u64, bytes as u64);
            }
            libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM => slots.udp_tx_dropped,
            libc::ENETUNREACH
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::EADDRNOTAVAIL
            | libc::EAFNOSUPPORT => slots.udp_drop_unreachable,
            libc::EMSGSIZE => slots.udp_drop_toobig,
            libc::EPERM => slots.udp_drop_eperm,
            _ => slots.udp_drop_other,
        };
        self.stats.add(slot, datagrams as u64);
    }

    /// The error number of why it was not sent, or 0. A fault when the socket is lost.
    fn call(&mut self, data: &[u8], target: &Target, segment: Option<u16>) -> Result<i32> {
        for is_last in [false, true] {
            match self.room.calls.send(data, &target.name, segment) {
                Ok(()) => return Ok(0),
                Err(libc::EAGAIN) => {
                    if is_last || !self.room.wait() {
                        break;
                    }
                }
                Err(number) if sys::is_lost(number) => return Err(Fault::Lost(number)),
                Err(number) if !is_icmp(number) || is_last => return Ok(number),
                Err(_) => self.stats.add(self.stats.slots.rx_icmp, 1),
            }
        }
        Ok(libc::EAGAIN)
    }
}

/// Why a packet was not written to the device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Full,
    NoMemory,
    Refused,
}

/// An `api.Drain` of an open ring, whose consumer goes on behind the entry in progress.
pub struct TunDrain<C: Calls = System> {
    /// For the lease.
    pub ring: Consumer,
    /// `api.Drain.given_up`.
    pub given_up: Option<&'static str>,
    resumed: u64,
    writer: Writer<C>,
}

impl TunDrain {
    /// As `Kernel.drain_tun`. The device stays open for as long as the drain lives.
    pub fn new(ring: Consumer, tun_fd: i32, stats: StatsPage, offloads: Offloads) -> Self {
        Self::with_calls(ring, System(tun_fd), stats, offloads)
    }
}

impl<C: Calls> TunDrain<C> {
    /// With other system calls.
    pub fn with_calls(ring: Consumer, calls: C, stats: StatsPage, offloads: Offloads) -> Self {
        Self {
            resumed: ring.resumed(),
            ring,
            given_up: None,
            writer: Writer {
                room: Patient {
                    calls,
                    limit_ms: TUN_WAIT_MS,
                    is_patient: true,
                },
                header_bytes: if offloads.tun_header() {
                    HEADER_BYTES
                } else {
                    0
                },
                refused: 0,
                part: Vec::new(),
                stats,
            },
        }
    }

    /// As `api.Drain.drain`.
    pub fn drain(&mut self, budget: usize) -> Result<usize> {
        self.writer.room.is_patient = true;
        let mut areas = 0;
        while areas < budget && self.ring.pending()? > 0 {
            let begun = self.ring.load()?;
            for number in begun..self.ring.len() {
                // Noted as begun before it is given out, and so never written twice.
                let (entry, data) = self.ring.entry(number);
                self.writer.write(data, entry.segment as usize)?;
            }
            let resumed = self.ring.resumed();
            if resumed != self.resumed {
                // A predecessor had begun them: whether they were written nobody knows.
                let stats = &self.writer.stats;
                stats.add(stats.slots.ring_resumed, resumed - self.resumed);
                self.resumed = resumed;
            }
            self.ring.release()?;
            areas += 1;
        }
        if self.writer.cuts_all() {
            self.given_up = Some("tso and uso towards the local stack");
        }
        Ok(areas)
    }
}

/// What an entry becomes on the device.
struct Writer<C> {
    room: Patient<C>,
    header_bytes: usize,
    /// Superpackets, one after the other, whose parts were taken.
    refused: u32,
    /// Room for one packet of a superpacket that has to be cut, made when the first one has to be.
    part: Vec<u8>,
    stats: StatsPage,
}

impl<C: Calls> Writer<C> {
    fn cuts_all(&self) -> bool {
        self.refused >= REFUSALS_MAX
    }

    fn write(&mut self, data: &[u8], packets: usize) -> Result<()> {
        let outcome = if packets > 1 && self.cuts_all() {
            Err(Refusal::Refused)
        } else {
            self.try_write(data)?
        };
        match outcome {
            Ok(()) => {
                self.count(data, packets);
                if packets > 1 {
                    self.refused = 0;
                }
            }
            Err(Refusal::Refused) if packets > 1 => self.write_parts(data, packets)?,
            Err(why) => self.drop(why, packets),
        }
        Ok(())
    }

    /// Write the packets of a superpacket that the device does not take, one by one.
    fn write_parts(&mut self, data: &[u8], packets: usize) -> Result<()> {
        let Some((cut, packet)) = cut_of(data, self.header_bytes, packets) else {
            self.drop(Refusal::Refused, packets); // no producer of ours made it
            return Ok(());
        };
        let mut part = std::mem::take(&mut self.part);
        // An empty header, and a packet of any size.
        part.resize(HEADER_BYTES + PACKET_BYTES_MAX, 0);
        let mut taken = false;
        for number in 0..packets {
            let size = cut.write_one(packet, number, &mut part[HEADER_BYTES..]);
            let single = &part[..HEADER_BYTES + size];
            match self.try_write(single)? {
                Ok(()) => {
                    self.count(single, 1);
                    taken = true;
                }
                Err(why) => self.drop(why, 1),
            }
        }
        self.part = part;
        // Where the parts are refused as well, as by a device that is down, it was not for their being joined.
        if taken {
            self.stats.add(self.stats.slots.tun_split, 1);
            self.refused = REFUSALS_MAX.min(self.refused + 1);
        }
        Ok(())
    }

    /// Count what was written, as if each of its packets had gone alone, with headers of its own.
    fn count(&self, data: &[u8], packets: usize) {
        let mut bytes = data.len().saturating_sub(self.header_bytes);
        if packets > 1 && self.header_bytes > 0 {
            if let Some(header) = data.first_chunk() {
                bytes += (packets - 1) * encoded_header_bytes(header);
            }
        }
        let slot = self.stats.slots.tun_tx_packets;
        self.stats.add_traffic(slot, packets as u64, bytes as u64);
    }

    fn drop(&self, why: Refusal, packets: usize) {
        let slots = &self.stats.slots;
        let slot = match why {
            Refusal::Full => slots.tun_drop_again,
            Refusal::NoMemory => slots.tun_drop_nobufs,
            Refusal::Refused => slots.tun_drop_refused,
        };
        self.stats.add(slot, packets as u64);
    }

    /// Why it was not written. A fault when the device is lost.
    fn try_write(&mut self, packet: &[u8]) -> Result<std::result::Result<(), Refusal>> {
        for is_last in [false, true] {
            match self.room.calls.write(packet) {
                // The device takes a packet whole or not at all.
                Ok(written) if written == packet.len() => return Ok(Ok(())),
                Ok(_) => return Ok(Err(Refusal::Refused)),
                Err(libc::EAGAIN) => {
                    self.stats.add(self.stats.slots.tun_again, 1);
                    if is_last || !self.room.wait() {
                        break;
                    }
                }
                Err(number) if sys::is_lost(number) => return Err(Fault::Lost(number)),
                Err(libc::ENOBUFS | libc::ENOMEM) => return Ok(Err(Refusal::NoMemory)),
                Err(_) => return Ok(Err(Refusal::Refused)),
            }
        }
        Ok(Err(Refusal::Full))
    }
}

/// How a superpacket with its virtio header is cut into so many packets; None if it is none of ours.
fn cut_of(data: &[u8], header_bytes: usize, packets: usize) -> Option<(Cut, &[u8])> {
    if header_bytes == 0 {
        return None;
    }
    let (header, packet) = data.split_first_chunk::<HEADER_BYTES>()?;
    let header = VirtioHeader::parse(header, packet, packet.len()).ok()?;
    if header.gso == Gso::None {
        return None;
    }
    let cut = Cut::new(&header, packet, packet.len())?;
    let fits = cut.segment_bytes <= PACKET_BYTES_MAX;
    (fits && cut.count == packets).then_some((cut, packet))
}
