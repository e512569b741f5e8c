//! Authentic packets of a tunnel are judged by the tables, joined if they are one flow's, and published; as
//! `nebula_mp.datapath.delivery`, but opened packet by packet where the payload of a superpacket belongs.
//!
//! ```text
//! opener -> [Delivery] -> open ring -> drains::TunDrain
//!                      -> upcall ring -> control
//! ```
//!
//! Knows where in the open ring a packet is to be opened, and what an entry looks like; knows nothing of
//! datagrams, keys and windows. What it takes over was authentic and is marked in the window.
//!
//! `try_place` says where the next packet is to be opened, `take` takes it over, `give_back` forgets it. While a
//! superpacket grows, that place begins so far before its end that the packet's payload comes to lie behind the
//! payload before it; the bytes under the packet's headers are kept meanwhile. A packet that does not join is
//! moved behind the superpacket, which ends there. Room for that is seen to beforehand, so that nothing that
//! was taken over is lost for want of it.

use crate::coalesce::{Run, JOINT_HEADERS_MAX};
use crate::error::Result;
use crate::filler::Filler;
use crate::flows::{FlowView, Inbound};
use crate::ip::parse_flow;
use crate::opener::Offloads;
use crate::stats::StatsPage;
use crate::tunnels::{Tunnel, UdpAddr};
use crate::upcalls::{Arrival, Reason, Upcalls};
use crate::virtio::{Gso, HEADER_BYTES as VIRTIO_BYTES, PACKET_BYTES_MAX, PLAIN};

/// Linux joins no more UDP packets than this itself (UDP_GRO_CNT_MAX), which programs that ask for joined ones know.
const UDP_PACKETS_MAX: usize = 64;

/// What is asked, and told, about a packet.
pub struct Desk<'a> {
    /// Verdicts.
    pub flows: &'a mut FlowView,
    /// For what only control knows.
    pub upcalls: &'a mut Upcalls,
    /// For what is refused.
    pub stats: &'a StatsPage,
}

/// Whose packets those of a superpacket are: none joins across a change of this.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sender {
    local_index: u32,
    generation: u64,
    sequence: u64,
    source: Option<UdpAddr>,
}

/// Where the packet in hand is opened.
#[derive(Clone, Copy, Default)]
struct Place {
    at: usize,
    bytes: usize,
    /// Bytes under its beginning that belong to the superpacket; 0 if it stands for itself.
    covered: usize,
}

/// The inbound half behind the seal: a filler of the open ring, and what the tables say.
pub struct Delivery {
    filler: Filler,
    head_bytes: usize,
    takes_tcp: bool,
    takes_udp: bool,
    sender: Option<Sender>,
    /// The superpacket in hand, all of which may pass; it begins at `filler.at` and is not described.
    run: Option<Run>,
    /// Where in the area it ends.
    end: usize,
    place: Place,
    covered: [u8; JOINT_HEADERS_MAX],
}

impl Delivery {
    /// Takes the filler over.
    pub fn new(filler: Filler, offloads: Offloads) -> Self {
        Self {
            filler,
            head_bytes: if offloads.tun_header() {
                VIRTIO_BYTES
            } else {
                0
            },
            takes_tcp: offloads.tso,
            takes_udp: offloads.uso,
            sender: None,
            run: None,
            end: 0,
            place: Place::default(),
            covered: [0; JOINT_HEADERS_MAX],
        }
    }

    /// Areas that were published and not released.
    pub fn waiting(&mut self) -> Result<u64> {
        self.filler.waiting()
    }

    /// Whether a packet of so many bytes fits an area at all.
    #[inline]
    pub fn fits(&self, bytes: usize) -> bool {
        bytes + self.head_bytes <= self.filler.room_bytes()
    }

    /// The next packets are of this tunnel and come from `source`, or in frames.
    pub fn enter(&mut self, tunnel: &Tunnel, source: Option<UdpAddr>) {
        let sender = Sender {
            local_index: tunnel.local_index,
            generation: tunnel.generation,
            sequence: tunnel.sequence,
            source,
        };
        if self.sender != Some(sender) {
            self.settle();
            self.sender = Some(sender);
        }
    }

    /// Where to open a packet that `fits`; None with a full ring. `left`: so many, with this one, came together.
    #[inline]
    pub fn try_place(&mut self, bytes: usize, left: usize) -> Result<Option<&mut [u8]>> {
        if let Some(run) = &self.run {
            let covered = run.shape.header_bytes;
            let used = self.end - self.filler.at;
            if !run.is_closed
                && covered < bytes
                && bytes <= run.size
                && bytes + run.payload_bytes <= PACKET_BYTES_MAX
                && (run.shape.gso != Gso::Udp || run.packets < UDP_PACKETS_MAX)
                // Two entries, since it may not join.
                && self.filler.fits(used + self.head_bytes + bytes, 2)
            {
                let at = self.end - covered;
                self.place = Place { at, bytes, covered };
                let data = self.filler.data();
                self.covered[..covered].copy_from_slice(&data[at..self.end]);
                return Ok(Some(&mut data[at..at + bytes]));
            }
            self.settle();
        }
        let needed = self.head_bytes + bytes;
        if left > 1 && self.head_bytes > 0 {
            self.prefer_one_area(bytes, left)?;
        }
        if !self.filler.try_room(needed, 1, 1)? {
            return Ok(None);
        }
        let at = self.filler.at + self.head_bytes;
        self.place = Place {
            at,
            bytes,
            covered: 0,
        };
        Ok(Some(&mut self.filler.data()[at..at + bytes]))
    }

    /// Go on to the next area, if there is one, where what came together does not fit this one: a superpacket
    /// is not to be cut in two by the end of an area.
    fn prefer_one_area(&mut self, bytes: usize, left: usize) -> Result<()> {
        let whole = (bytes * left).min(PACKET_BYTES_MAX) + self.head_bytes;
        let whole = whole.min(self.filler.room_bytes());
        if !self.filler.fits(whole, 1) && self.filler.has_spare()? {
            self.filler.flush();
        }
        Ok(())
    }

    /// The packet that was opened in the last place given.
    pub fn placed(&mut self) -> &[u8] {
        let Place { at, bytes, .. } = self.place;
        &self.filler.data()[at..at + bytes]
    }

    /// Forget the last place given, whatever is there now.
    #[inline]
    pub fn give_back(&mut self) {
        let Place { at, covered, .. } = self.place;
        self.filler.data()[at..at + covered].copy_from_slice(&self.covered[..covered]);
    }

    /// Take over the packet that was opened in the last place given.
    #[inline]
    pub fn take(&mut self, tunnel: &Tunnel, arrival: &Arrival, desk: &mut Desk<'_>) -> Result<()> {
        let Place { at, bytes, covered } = self.place;
        if covered > 0 {
            let joins = match &mut self.run {
                Some(run) => run.try_add(&self.filler.data()[at..at + bytes]),
                None => false,
            };
            let behind = self.end + self.head_bytes;
            if !joins {
                self.filler.data().copy_within(at..at + bytes, behind);
            }
            self.give_back();
            if joins {
                self.end = at + bytes;
                return Ok(());
            }
            self.settle();
            self.place.at = behind;
        }
        self.begin(tunnel, arrival, desk)
    }

    /// Judge a packet that follows no other; it lies where it is to stay.
    fn begin(&mut self, tunnel: &Tunnel, arrival: &Arrival, desk: &mut Desk<'_>) -> Result<()> {
        let Place { at, bytes, .. } = self.place;
        let begin = self.filler.at;
        let data = self.filler.data();
        let packet = &data[at..at + bytes];
        let Ok(flow) = parse_flow(packet, true) else {
            desk.stats.add(desk.stats.slots.drop_inner_ip, 1);
            return Ok(());
        };
        let (remote, is_ipv6) = flow.remote();
        if !tunnel.sources.allow(&remote, is_ipv6) {
            desk.stats.add(desk.stats.slots.drop_source_addr, 1);
            return Ok(());
        }
        match desk.flows.inbound(&flow, tunnel.peer, arrival.at_ms) {
            Inbound::Allowed => {}
            Inbound::Refused => {
                let slot = desk.stats.slots.drop_firewall_incoming_no_rule;
                desk.stats.add(slot, 1);
                return Ok(());
            }
            Inbound::Unknown => {
                let index = tunnel.local_index;
                return desk
                    .upcalls
                    .opened(Reason::NewFlowIn, arrival, index, packet);
            }
        }
        if self.takes_tcp || self.takes_udp {
            self.run = Run::begin(packet).filter(|run| match run.shape.gso {
                Gso::Tcp4 | Gso::Tcp6 => self.takes_tcp,
                Gso::Udp => self.takes_udp,
                Gso::None => false,
            });
            if self.run.is_some() {
                self.end = at + bytes;
                return Ok(());
            }
        }
        data[begin..at].copy_from_slice(&PLAIN[..self.head_bytes]);
        let row = tunnel.local_index & 0xFFFF;
        self.filler.describe(self.head_bytes + bytes, 1, row);
        Ok(())
    }

    /// Describe the superpacket in hand; before the filler is used for anything else.
    #[inline]
    pub fn settle(&mut self) {
        if let Some(run) = self.run.take() {
            self.describe(&run);
        }
    }

    fn describe(&mut self, run: &Run) {
        let begin = self.filler.at;
        let payload_at = begin + VIRTIO_BYTES + run.shape.header_bytes;
        let data = self.filler.data();
        if run.packets == 1 {
            data[begin..begin + VIRTIO_BYTES].copy_from_slice(&PLAIN);
        } else {
            run.write_head(&mut data[begin..payload_at]);
        }
        let row = self.sender.map_or(0, |sender| sender.local_index & 0xFFFF);
        let length = self.end - begin;
        self.filler.describe(length, run.packets as u32, row);
    }

    /// Publish what was taken over: at the end of a pass.
    pub fn flush(&mut self) {
        self.settle();
        self.sender = None;
        self.filler.flush();
    }
}
