//! TUN queue -> flow, peer, tunnel -> sealed into the seal ring; as `nebula_mp.datapath.sealing` and `.runs`.
//!
//! ```text
//! TUN -> tun_queue -> virtio, ip, flows -> [Sealer] -> runs, segment, aead -> filler -> seal ring
//!                                                   -> upcalls -> upcall ring -> control
//! ```
//!
//! Packets for one peer that follow each other form a run, and so do the packets of a superpacket. Its counters are
//! reserved at once, before the first of it is sealed, and only when there is an area for all of it: so who dies here
//! leaves a gap, never a counter that another one would take again. A superpacket that does not fit an area becomes
//! several runs.
//! Knows which packets may share a batch of counters; decides nothing: what the tables do not answer goes up.

use std::cell::RefCell;
use std::rc::Rc;

use crate::counters::{SendCounters, Traffic};
use crate::error::{Fault, Result};
use crate::filler::Filler;
use crate::flows::{FlowView, Outbound};
use crate::header::OVERHEAD_BYTES;
use crate::ip::parse_flow;
use crate::outlet::{Need, Outcome, Outlet};
use crate::peers::PeerView;
use crate::relays::{Path, RelayView};
use crate::runs::{self, Payload, PlainRun};
use crate::segment::{complete, Cut};
use crate::stats::StatsPage;
use crate::tun_queue::{Read, Scatter, TunQueue};
use crate::tunnels::TunnelView;
use crate::upcalls::{Reason, Upcalls};
use crate::virtio::{self, Gso, VirtioHeader};

/// What a reader's two halves share; they take turns within one process.
pub struct Shared {
    /// Rows by local index, with keys.
    pub tunnels: TunnelView,
    /// Verdicts.
    pub flows: FlowView,
    /// Paths through relays.
    pub relays: RelayView,
    /// This reader's share.
    pub traffic: Traffic,
    /// To control.
    pub upcalls: Upcalls,
    /// This reader's page.
    pub stats: Rc<StatsPage>,
}

/// What was read behind a run that is held back; it lies in the arena.
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
enum Waiting {
    Plain { peer: u64, at: usize, len: usize },
    Super(Super),
}

/// A superpacket of which the packets before `first` are settled.
struct Super {
    peer: u64,
    at: usize,
    len: usize,
    first: usize,
    cut: Cut,
}

/// What has become of the run of plain packets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Settled {
    /// It is gone, or there was none: the arena is free.
    Free,
    /// As `Free`, but what was read behind it is in the arena now.
    Moved,
    /// It is to be held back.
    Held,
}

/// The outbound half of a reader.
pub struct Sealer {
    queue: TunQueue,
    outlet: Outlet,
    shared: Rc<RefCell<Shared>>,
    run: PlainRun,
    waiting: Option<Waiting>,
    single: Box<[u8]>,
    scattered: u64,
}

impl Sealer {
    /// `tun_header`: every packet of the queue has a virtio header in front.
    pub fn new(
        tun_fd: i32,
        filler: Filler,
        peers: PeerView,
        counters: SendCounters,
        shared: Rc<RefCell<Shared>>,
        tun_header: bool,
    ) -> Self {
        let packets_max = filler.entries_max().min(runs::PACKETS_MAX);
        Self {
            queue: TunQueue::new(tun_fd, tun_header),
            outlet: Outlet::new(filler, peers, counters),
            shared,
            run: PlainRun::new(packets_max),
            waiting: None,
            single: vec![0; virtio::PACKET_BYTES_MAX + 40].into_boxed_slice(),
            scattered: 0,
        }
    }

    /// As `api.Sealer.poll`; `now_us` is the monotonic clock.
    pub fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize> {
        let shared = Rc::clone(&self.shared);
        let shared = &mut *shared.borrow_mut();
        let (mut taken, mut size_bytes, mut lost) = (0, 0, None);
        if self.is_holding() {
            self.settle(shared, now_us)?;
        }
        while taken < budget && !self.is_holding() {
            if !self.queue.has_room() {
                self.seal_plain(shared, now_us)?;
                continue;
            }
            let mut header = virtio::PLAIN;
            let ahead = (self.run.size_bytes, self.run.entries);
            let read = self
                .queue
                .read(&mut header, &mut self.outlet.filler, ahead)?;
            let (packets, bytes) = match read {
                Read::Nothing => break,
                Read::Lost(number) => {
                    lost = Some(Fault::Lost(number));
                    break;
                }
                Read::Short => {
                    shared.stats.add(shared.stats.slots.tun_drop_offload, 1);
                    (1, 0)
                }
                Read::Linear(len) => self.take(shared, &header, len, now_us)?,
                Read::Scattered(it) => self.take_scattered(shared, &header, &it, now_us)?,
            };
            taken += packets;
            size_bytes += bytes;
        }
        if !self.is_holding() {
            self.seal_plain(shared, now_us)?;
        }
        self.outlet.filler.flush();
        shared.upcalls.flush();
        if taken > 0 {
            let slot = shared.stats.slots.tun_rx_packets;
            shared
                .stats
                .add_traffic(slot, taken as u64, size_bytes as u64);
        }
        lost.map_or(Ok(taken), Err)
    }

    /// As `api.Sealer.is_holding`.
    pub fn is_holding(&self) -> bool {
        self.outlet.is_holding()
    }

    /// As `api.Sealer.waiting`.
    pub fn waiting(&mut self) -> Result<u64> {
        self.outlet.filler.waiting()
    }

    /// What the two halves share.
    pub fn shared(&self) -> Rc<RefCell<Shared>> {
        Rc::clone(&self.shared)
    }

    /// As `Outlet::forward`, for the other half of the reader, which has `shared` in hand. Publish it at the end.
    pub fn forward(
        &mut self,
        shared: &mut Shared,
        path: &Path,
        next: u32,
        content: &[u8],
        now_ms: u64,
    ) -> Result<bool> {
        self.outlet.forward(shared, path, next, content, now_ms)
    }

    /// Publish what was forwarded.
    pub fn publish(&mut self) {
        self.outlet.filler.flush();
    }

    /// Superpackets that were sealed where they were read to, without a copy; only grows.
    pub fn scattered(&self) -> u64 {
        self.scattered
    }

    /// Seal, or send elsewhere, what the queue gave, which lies in the arena; gives the number of packets it stands
    /// for, and their bytes.
    fn take(
        &mut self,
        shared: &mut Shared,
        header: &[u8; virtio::HEADER_BYTES],
        len: usize,
        now_us: u64,
    ) -> Result<(usize, usize)> {
        let packet = self.queue.last(len);
        let Ok(header) = VirtioHeader::parse(header, packet, len) else {
            shared.stats.add(shared.stats.slots.tun_drop_offload, 1);
            return Ok((1, len));
        };
        if header.gso == Gso::None {
            self.take_plain(shared, &header, len, now_us)?;
            return Ok((1, len));
        }
        let Some(cut) = Cut::new(&header, packet, len) else {
            shared.stats.add(shared.stats.slots.tun_drop_offload, 1);
            return Ok((1, len));
        };
        let counts = counts(&cut, len);
        match find(shared, packet, cut.count, now_us) {
            Outbound::Refused => {}
            Outbound::Unknown => {
                self.send_up(
                    shared,
                    Reason::NewFlowOut,
                    (&cut, 0, cut.count),
                    len,
                    now_us,
                )?;
            }
            Outbound::To(_) if runs::stride(&cut) > self.outlet.filler.room_bytes() => {
                shared
                    .stats
                    .add(shared.stats.slots.drop_oversize, cut.count as u64);
            }
            Outbound::To(peer) => {
                self.queue.expect(&cut);
                let at = self.queue.at;
                self.take_super(
                    shared,
                    Super {
                        peer,
                        at,
                        len,
                        first: 0,
                        cut,
                    },
                    now_us,
                )?;
            }
        }
        Ok(counts)
    }

    /// Add a packet to the run it belongs to, or see to it that it goes elsewhere.
    fn take_plain(
        &mut self,
        shared: &mut Shared,
        header: &VirtioHeader,
        len: usize,
        now_us: u64,
    ) -> Result<()> {
        let room_bytes = self.outlet.filler.room_bytes();
        let packet = self.queue.last(len);
        let verdict = find(shared, packet, 1, now_us);
        if verdict == Outbound::Refused {
            return Ok(());
        }
        if header.needs_checksum {
            complete(header, packet);
        }
        let Outbound::To(peer) = verdict else {
            return shared
                .upcalls
                .plain(Reason::NewFlowOut, packet, now_us / 1000);
        };
        if len + OVERHEAD_BYTES > room_bytes {
            shared.stats.add(shared.stats.slots.drop_oversize, 1);
            return Ok(());
        }
        if !self.run.takes(peer, len, room_bytes) {
            let at = self.queue.at;
            // Above the run, which may be settled now, so that the memory from its start on is free.
            if self.seal_plain(shared, now_us)? {
                self.run.begin(peer, at);
            } else {
                self.waiting = Some(Waiting::Plain { peer, at, len });
                self.queue.at = at + len;
                return Ok(());
            }
            self.queue.at = at;
        }
        self.run.append(len);
        self.queue.at += len;
        Ok(())
    }

    /// Seal a superpacket in the arena behind what is before it, or keep it.
    fn take_super(&mut self, shared: &mut Shared, it: Super, now_us: u64) -> Result<()> {
        if self.seal_plain(shared, now_us)? {
            return self.seal_super(shared, it, now_us);
        }
        self.queue.at = it.at + it.len;
        self.waiting = Some(Waiting::Super(it));
        Ok(())
    }

    /// As `take`, of what was read to pieces.
    fn take_scattered(
        &mut self,
        shared: &mut Shared,
        header: &[u8; virtio::HEADER_BYTES],
        it: &Scatter,
        now_us: u64,
    ) -> Result<(usize, usize)> {
        let len = it.len;
        let head = &self.outlet.filler.data()[it.head()];
        let cut = VirtioHeader::parse(header, head, len)
            .ok()
            .filter(|header| header.gso != Gso::None)
            .and_then(|header| Cut::new(&header, head, len))
            .filter(|cut| it.fits(cut));
        let Some(cut) = cut else {
            self.queue.linearise(it, self.outlet.filler.data());
            self.queue.miss();
            return self.take(shared, header, len, now_us);
        };
        let counts = counts(&cut, len);
        let peer = match find(shared, head, cut.count, now_us) {
            Outbound::Refused => return Ok(counts),
            Outbound::Unknown => {
                self.queue.linearise(it, self.outlet.filler.data());
                self.send_up(
                    shared,
                    Reason::NewFlowOut,
                    (&cut, 0, cut.count),
                    len,
                    now_us,
                )?;
                return Ok(counts);
            }
            Outbound::To(peer) => peer,
        };
        self.queue.expect(&cut);
        let at = self.queue.at;
        // The run before it has its room in this area, in front of the places.
        let settled = self.seal_run(shared, Some(it), now_us)?;
        if settled == Settled::Moved {
            let moved = Super {
                peer,
                at,
                len,
                first: 0,
                cut,
            };
            self.take_super(shared, moved, now_us)?;
            return Ok(counts);
        }
        debug_assert_eq!(self.outlet.filler.area(), it.area);
        debug_assert!(self.outlet.filler.at <= it.base);
        self.queue.at = at;
        let mut outcome = Outcome::Held;
        if settled == Settled::Free {
            let before = std::mem::replace(&mut self.outlet.filler.at, it.base);
            let need = Need {
                peer,
                packets: cut.count,
                size_bytes: runs::sealed_bytes(&cut, 0, cut.count),
                entries: 1,
            };
            outcome = self
                .outlet
                .try_seal(shared, need, now_us, |filler, target| {
                    runs::seal_super(&cut, Payload::InPlace, 0, cut.count, filler, target);
                })?;
            if outcome == Outcome::Sealed {
                self.scattered += 1;
            } else {
                self.outlet.filler.at = before;
            }
        }
        match outcome {
            Outcome::Sealed | Outcome::Dropped => {}
            Outcome::Held => {
                self.queue.linearise(it, self.outlet.filler.data());
                self.queue.at = at + len;
                self.waiting = Some(Waiting::Super(Super {
                    peer,
                    at,
                    len,
                    first: 0,
                    cut,
                }));
                return Ok(counts);
            }
            Outcome::NoTunnel => {
                self.queue.linearise(it, self.outlet.filler.data());
                self.send_up(shared, Reason::NoTunnel, (&cut, 0, cut.count), len, now_us)?;
            }
            Outcome::Relayed => {
                self.queue.linearise(it, self.outlet.filler.data());
                self.queue.miss();
                self.seal_relayed(shared, peer, (&cut, 0, cut.count), len, now_us)?;
            }
        }
        self.queue.at = 0;
        Ok(counts)
    }

    /// Seal what was held back, as far as it may go now.
    fn settle(&mut self, shared: &mut Shared, now_us: u64) -> Result<()> {
        let at = self.queue.at;
        if !self.seal_plain(shared, now_us)? {
            return Ok(());
        }
        match self.waiting.take() {
            None => {}
            Some(Waiting::Plain {
                peer,
                at: begin,
                len,
            }) => {
                self.queue.at = at;
                self.run.begin(peer, begin);
                self.run.append(len);
            }
            Some(Waiting::Super(it)) => {
                self.queue.at = at;
                self.seal_super(shared, it, now_us)?;
            }
        }
        Ok(())
    }

    /// Seal the run of plain packets, if there is one; false when it is to be held back. Then the arena is as it was,
    /// else free.
    fn seal_plain(&mut self, shared: &mut Shared, now_us: u64) -> Result<bool> {
        Ok(self.seal_run(shared, None, now_us)? == Settled::Free)
    }

    /// As `seal_plain`. `behind` was read to its places behind the run's; if the run needs more room than it was
    /// thought to, that is moved to the arena first, behind the run there.
    fn seal_run(
        &mut self,
        shared: &mut Shared,
        behind: Option<&Scatter>,
        now_us: u64,
    ) -> Result<Settled> {
        let mut settled = Settled::Free;
        if !self.run.is_empty() {
            let Self {
                run, queue, outlet, ..
            } = self;
            let need = Need {
                peer: run.peer,
                packets: run.len(),
                size_bytes: run.size_bytes,
                entries: run.entries,
            };
            let outcome = outlet.try_seal(shared, need, now_us, |filler, target| {
                run.seal(queue.arena(), filler, target);
            })?;
            match outcome {
                Outcome::Held => return Ok(Settled::Held),
                Outcome::Sealed | Outcome::Dropped => {}
                Outcome::NoTunnel => {
                    for packet in run.packets(queue.arena()) {
                        shared
                            .upcalls
                            .plain(Reason::NoTunnel, packet, now_us / 1000)?;
                    }
                }
                Outcome::Relayed => {
                    if let Some(it) = behind {
                        queue.linearise(it, outlet.filler.data());
                        settled = Settled::Moved;
                    }
                    for packet in run.packets(queue.arena()) {
                        relay(outlet, shared, run.peer, packet, now_us)?;
                    }
                }
            }
            run.clear();
        }
        self.queue.at = 0;
        Ok(settled)
    }

    /// Seal a superpacket in the arena, or what is left of it, or keep it. Nothing is before it.
    fn seal_super(&mut self, shared: &mut Shared, mut it: Super, now_us: u64) -> Result<()> {
        let room_bytes = self.outlet.filler.room_bytes();
        while it.first < it.cut.count {
            let (cut, first) = (&it.cut, it.first);
            let count = runs::next_run(cut, first, room_bytes);
            let need = Need {
                peer: it.peer,
                packets: count,
                size_bytes: runs::sealed_bytes(cut, first, count),
                entries: 1,
            };
            let payload = Payload::Linear(&self.queue.arena()[it.at..it.at + it.len]);
            let outcome = self
                .outlet
                .try_seal(shared, need, now_us, |filler, target| {
                    runs::seal_super(cut, payload, first, count, filler, target);
                })?;
            match outcome {
                Outcome::Sealed | Outcome::Dropped => {}
                Outcome::Held => {
                    self.queue.at = it.at + it.len;
                    self.waiting = Some(Waiting::Super(it));
                    return Ok(());
                }
                Outcome::Relayed => {
                    self.queue.at = it.at;
                    self.seal_relayed(shared, it.peer, (cut, first, count), it.len, now_us)?;
                }
                Outcome::NoTunnel => {
                    self.queue.at = it.at;
                    self.send_up(
                        shared,
                        Reason::NoTunnel,
                        (cut, first, count),
                        it.len,
                        now_us,
                    )?;
                }
            }
            it.first += count;
        }
        self.queue.at = 0;
        Ok(())
    }

    /// Seal packets (from which on, how many) of the superpacket at `queue.at` for a peer behind a relay.
    fn seal_relayed(
        &mut self,
        shared: &mut Shared,
        peer: u64,
        (cut, first, count): (&Cut, usize, usize),
        len: usize,
        now_us: u64,
    ) -> Result<()> {
        let whole = self.queue.last(len);
        for number in first..first + count {
            let size = cut.write_one(whole, number, &mut self.single);
            relay(&mut self.outlet, shared, peer, &self.single[..size], now_us)?;
        }
        Ok(())
    }

    /// Hand packets (from which on, how many) of the superpacket at `queue.at` to control, each by itself.
    fn send_up(
        &mut self,
        shared: &mut Shared,
        reason: Reason,
        (cut, first, count): (&Cut, usize, usize),
        len: usize,
        now_us: u64,
    ) -> Result<()> {
        let whole = self.queue.last(len);
        for number in first..first + count {
            let size = cut.write_one(whole, number, &mut self.single);
            let packet = &self.single[..size];
            shared.upcalls.plain(reason, packet, now_us / 1000)?;
        }
        Ok(())
    }
}

/// Seal a packet for a peer behind a relay, or see to it that it goes elsewhere.
fn relay(
    outlet: &mut Outlet,
    shared: &mut Shared,
    peer: u64,
    packet: &[u8],
    now_us: u64,
) -> Result<()> {
    let now_ms = now_us / 1000;
    if outlet.seal_relayed(shared, peer, packet, now_ms)? == Outcome::NoTunnel {
        shared.upcalls.plain(Reason::NoTunnel, packet, now_ms)?;
    }
    Ok(())
}

/// How many packets a superpacket of `len` bytes stands for, and their bytes.
fn counts(cut: &Cut, len: usize) -> (usize, usize) {
    (cut.count, len + (cut.count - 1) * cut.header_bytes)
}

/// Whom a packet, or a superpacket of `packets`, goes to. Refused: it was counted.
#[inline]
fn find(shared: &mut Shared, packet: &[u8], packets: usize, now_us: u64) -> Outbound {
    let stats = &shared.stats;
    let Ok(key) = parse_flow(packet, false) else {
        stats.add(stats.slots.drop_tun_inner_ip, packets as u64);
        return Outbound::Refused;
    };
    let verdict = shared.flows.outbound(&key, now_us / 1000);
    if verdict == Outbound::Refused {
        stats.add(stats.slots.drop_firewall_outgoing_no_rule, packets as u64);
    }
    verdict
}
