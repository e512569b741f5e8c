//! One host as its opener sees it: shared memory as the supervisor makes it, rows as control writes them, a UDP
//! socket of the loopback interface, and the far ends of the rings.
//!
//! Offsets are spelled here once more, from `nebula_mp.shm_table` and `shm_ring`, so that the crate's own
//! layout is not tested with itself.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use nebula_mp_core::aead::{Cipher, Key};
use nebula_mp_core::counters::{SendCounters, Traffic};
use nebula_mp_core::error::Result;
use nebula_mp_core::filler::Filler;
use nebula_mp_core::flows::{flow_hash, FlowView};
use nebula_mp_core::header::{HEADER_BYTES, MESSAGE, TAG_BYTES, VERSION};
use nebula_mp_core::ip::parse_flow;
use nebula_mp_core::opener::{Network, Offloads, Opener};
use nebula_mp_core::peers::PeerView;
use nebula_mp_core::relays::RelayView;
use nebula_mp_core::ring::{Consumer, Entry, Recovery};
use nebula_mp_core::sealer::{Sealer, Shared};
use nebula_mp_core::segment::Cut;
use nebula_mp_core::stats::StatsPage;
use nebula_mp_core::sys::{self, SockAddr};
use nebula_mp_core::testing::Memory;
use nebula_mp_core::tunnels::{TunnelState, TunnelView, UdpAddr};
use nebula_mp_core::upcalls::{Limits, Reason, Strangers, Upcalls, RECORD_BYTES};
use nebula_mp_core::virtio::{Gso, VirtioHeader, HEADER_BYTES as VIRTIO_BYTES};
use nebula_mp_core::windows::ReceiveWindows;

use crate::memory::{region, rows, word, Ring, NAMES, PAGE, ROWS};
use crate::packets::{FAR4, FAR6};

/// Bits of the buckets that were written to.
const USED: usize = 2048;
const BUCKETS: usize = 256;
pub const INDEX: u32 = 0xBEEF_0003;
const ROW: usize = (INDEX & 0xFFFF) as usize;
pub const PEER: u64 = 1 << 32 | 7;
const GENERATION: u64 = 5;
pub const NOW_MS: u64 = 1_000_000;
const SEND_KEY: [u8; 32] = [0x11; 32];
const RECEIVE_KEY: [u8; 32] = [0x22; 32];
const DIGEST: u64 = 0x1234_5678_9ABC_DEF0;

/// Why a datagram goes no further: what the ledger adds up.
const REFUSALS: [&str; 5] = [
    "mp.ring.full.open",
    "mp.ring.full.upcall",
    "mp.ring.full.stranger",
    "mp.upcalls.limited",
    "mp.strangers",
];

/// An upcall as control reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upcall {
    pub reason: u32,
    pub index: u32,
    pub port: u16,
    pub kind: u8,
    pub subtype: u8,
    pub packet: Vec<u8>,
}

/// What a host is made with.
pub struct Plan {
    pub offloads: Offloads,
    pub areas: usize,
    pub area_bytes: usize,
    pub entries: usize,
    pub limits: Limits,
    pub overlay: Vec<Network>,
    pub cipher: Cipher,
    /// Overwrite areas that were released.
    pub poison: bool,
}

pub const ALL: Offloads = Offloads {
    tso: true,
    uso: true,
    udp_gro: true,
    udp_segment: true,
};
pub const NONE: Offloads = Offloads {
    tso: false,
    uso: false,
    udp_gro: false,
    udp_segment: false,
};
const UNLIMITED: (u64, u64) = (1_000_000, 1_000_000);

impl Default for Plan {
    fn default() -> Self {
        Self {
            offloads: ALL,
            areas: 8,
            area_bytes: 72 * 1024,
            entries: 128,
            limits: Limits {
                per_tunnel: UNLIMITED,
                plain: UNLIMITED,
                datagrams: UNLIMITED,
                unknown: UNLIMITED,
                relayed: UNLIMITED,
                moved: (20, 5),
            },
            overlay: vec![([10, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 4, 16)],
            cipher: Cipher::Aes,
            poison: true,
        }
    }
}

pub struct Host {
    tunnels: Memory,
    keys: Memory,
    flows: Memory,
    seen: Memory,
    own_flows: Memory,
    own_seen: Memory,
    peers: Memory,
    relays: Memory,
    send: Memory,
    span: Memory,
    windows: Memory,
    traffic: Memory,
    stats: Memory,
    pub open: Ring,
    seal: Ring,
    pub stranger_in: Ring,
    plan: Plan,
    upcall: Ring,
    stranger_out: Ring,
    opened: Consumer,
    ups: Consumer,
    others: Consumer,
    bell: OwnedFd,
    pub udp: UdpSocket,
    /// Plays the far host.
    pub far: UdpSocket,
    pub opener: Option<Opener>,
}

fn loopback() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let bytes: libc::c_int = 8 << 20;
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        set_option(&socket, libc::SOL_SOCKET, option, bytes);
    }
    socket
}

/// Without the right to, it stays as it was.
fn set_option(socket: &UdpSocket, level: i32, option: i32, value: libc::c_int) -> bool {
    let size = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: an int, and its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size,
        )
    };
    result == 0
}

impl Host {
    pub fn new(plan: Plan) -> Self {
        let open = Ring::new(plan.areas, plan.area_bytes, plan.entries);
        let (upcall, stranger_in, stranger_out) = (Ring::small(), Ring::small(), Ring::small());
        let flows = rows(b"nmp:flow", 512, BUCKETS);
        flows.patch(64, &1_u64.to_le_bytes()); // rules generation
        (0..6).for_each(|each| {
            let seed = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(each as u64 + 1);
            flows.patch(72 + 8 * each, &seed.to_le_bytes());
        });
        let stats = region(b"nmp:coun", PAGE, &[NAMES.len() as u64, DIGEST]);
        // SAFETY: the result is checked.
        let bell = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        assert!(bell >= 0);
        let udp = loopback();
        if plan.offloads.udp_gro {
            assert!(set_option(&udp, libc::SOL_UDP, libc::UDP_GRO, 1));
        }
        let host = Self {
            tunnels: rows(b"nmp:tunl", 128, ROWS),
            keys: rows(b"nmp:keys", 64, ROWS),
            seen: rows(b"nmp:seen", 8, BUCKETS * 7),
            own_flows: rows(b"nmp:flow", 512, BUCKETS),
            own_seen: rows(b"nmp:seen", 8, BUCKETS * 7),
            peers: rows(b"nmp:peer", 8, ROWS),
            relays: rows(b"nmp:rela", 32, ROWS),
            send: rows(b"nmp:send", 64, ROWS),
            span: rows(b"nmp:span", 32, ROWS),
            seal: Ring::small(),
            windows: rows(b"nmp:wind", 2112, ROWS),
            traffic: rows(b"nmp:traf", 64, ROWS),
            flows,
            stats,
            opened: open.consumer(Recovery::GoOnBehind, true),
            ups: upcall.consumer(Recovery::SendAgain, false),
            others: stranger_out.consumer(Recovery::SendAgain, false),
            open,
            upcall,
            stranger_in,
            stranger_out,
            // SAFETY: new, and nobody else's.
            bell: unsafe { OwnedFd::from_raw_fd(bell) },
            udp,
            far: loopback(),
            plan,
            opener: None,
        };
        host.connect(INDEX, 0, TunnelState::Proven);
        host
    }

    /// Let control open, or change, the tunnel with this index.
    pub fn connect(&self, index: u32, owner: u16, state: TunnelState) {
        let underlay = self.far.local_addr().unwrap().port();
        self.connect_at(index, owner, state, underlay, GENERATION);
    }

    pub fn connect_at(
        &self,
        index: u32,
        owner: u16,
        state: TunnelState,
        port: u16,
        generation: u64,
    ) {
        let number = (index & 0xFFFF) as usize;
        let at = PAGE + 128 * number;
        let sequence = word(&self.tunnels, at) + 2;
        let mut row = Vec::new();
        row.extend(sequence.to_le_bytes());
        row.extend(index.to_le_bytes());
        row.extend(0xCAFE_0005_u32.to_le_bytes());
        row.extend(generation.to_le_bytes());
        row.extend(PEER.to_le_bytes());
        row.extend([127, 0, 0, 1]);
        row.extend(port.to_le_bytes());
        row.extend([4, 0]);
        row.extend([0; 16]);
        row.extend([state as u8, self.plan.cipher as u8]);
        row.extend(owner.to_le_bytes());
        row.extend([2, 0b10, 0, 0]);
        row.extend(FAR4);
        row.extend([0; 12]);
        row.extend(FAR6);
        row.resize(128, 0);
        self.tunnels.patch(at, &row);
        let keys = PAGE + 64 * number;
        self.keys.patch(keys, &SEND_KEY);
        self.keys.patch(keys + 32, &RECEIVE_KEY);
    }

    /// Attach, as a reader or its successor.
    pub fn attach(&mut self) {
        let names: Vec<String> = NAMES.map(String::from).to_vec();
        let page = |memory: &Memory| StatsPage::attach(memory.writer(), &names, DIGEST).unwrap();
        let stats = Rc::new(page(&self.stats));
        let bell = self.bell.as_raw_fd();
        let Plan { limits, poison, .. } = self.plan;
        let flows = FlowView::new(
            vec![self.own_flows.writable(), self.flows.read_only()],
            vec![self.own_seen.writable(), self.seen.writable()],
            0,
            PeerView::new(self.peers.read_only()).unwrap(),
            Rc::clone(&stats),
        );
        let shared = Shared {
            tunnels: TunnelView::new(self.tunnels.read_only(), self.keys.read_only()).unwrap(),
            flows: flows.unwrap(),
            relays: RelayView::new(self.relays.read_only()).unwrap(),
            traffic: Traffic::new(self.traffic.writable()).unwrap(),
            upcalls: Upcalls::new(
                self.upcall.producer(poison),
                bell,
                Rc::clone(&stats),
                limits,
            ),
            stats: Rc::clone(&stats),
        };
        let counters = SendCounters::new(
            self.send.writable(),
            vec![self.span.writable()],
            Some(0),
            vec![self.seal.state.read_only()],
            0,
        );
        let outbound = Sealer::new(
            -1, // nothing comes from the local stack here
            Filler::new(self.seal.producer(poison)),
            PeerView::new(self.peers.read_only()).unwrap(),
            counters.unwrap(),
            Rc::new(RefCell::new(shared)),
            self.plan.offloads.tun_header(),
        );
        let strangers = vec![(1, self.stranger_out.producer(poison), bell)];
        self.opener = Some(Opener::new(
            self.udp.as_raw_fd(),
            0,
            Filler::new(self.open.producer(poison)),
            ReceiveWindows::new(self.windows.writable()).unwrap(),
            Strangers::new(strangers, stats),
            vec![self.stranger_in.consumer(Recovery::SendAgain, false)],
            self.plan.overlay.clone(),
            Rc::new(RefCell::new(outbound)),
            self.plan.offloads,
        ));
    }

    pub fn poll(&mut self, budget: usize) -> Result<usize> {
        if self.opener.is_none() {
            self.attach();
        }
        let opener = self.opener.as_mut().expect("attached");
        opener.poll(budget, NOW_MS * 1000 + 7)
    }

    pub fn poll_all(&mut self) -> usize {
        let mut all = 0;
        loop {
            let taken = self.poll(1000).unwrap();
            all += taken;
            if taken == 0 {
                return all;
            }
        }
    }

    /// What waits in the open ring, as it is.
    pub fn entries(&mut self) -> Vec<(Entry, Vec<u8>)> {
        Ring::drain(&mut self.opened)
    }

    /// What waits in the open ring, cut back to packets; and how many packets each entry had.
    pub fn received(&mut self) -> (Vec<Vec<u8>>, Vec<usize>) {
        let has_header = self.plan.offloads.tun_header();
        let (mut packets, mut sizes) = (Vec::new(), Vec::new());
        for (entry, data) in self.entries() {
            assert_eq!(entry.row, INDEX & 0xFFFF);
            let cut = if has_header {
                cut_back(&data)
            } else {
                vec![data]
            };
            assert_eq!(cut.len(), entry.segment as usize);
            sizes.push(cut.len());
            packets.extend(cut);
        }
        (packets, sizes)
    }

    pub fn upcalls(&mut self) -> Vec<Upcall> {
        let found = Ring::drain(&mut self.ups);
        found
            .iter()
            .map(|(entry, data)| upcall(entry, data))
            .collect()
    }

    /// What was handed to the other reader, with its records.
    pub fn strangers(&mut self) -> Vec<Vec<u8>> {
        let found = Ring::drain(&mut self.others);
        found.into_iter().map(|(_, data)| data).collect()
    }

    /// Counters that are not 0.
    pub fn stats(&self) -> BTreeMap<&'static str, u64> {
        let words = (0..).map(|each| word(&self.stats, 64 + 8 * each));
        let all = NAMES.into_iter().zip(words);
        all.filter(|(_, value)| *value > 0).collect()
    }

    pub fn count(&self, name: &str) -> u64 {
        assert!(NAMES.contains(&name));
        self.stats().get(name).copied().unwrap_or(0)
    }

    /// Why what came went no further.
    pub fn drops(&self) -> BTreeMap<&'static str, u64> {
        let all = self.stats();
        all.into_iter()
            .filter(|(name, _)| name.starts_with("drop.") || name.starts_with("mp.ring.full"))
            .collect()
    }

    /// Everything that came in was delivered, went up, was handed over, or counted under one reason.
    pub fn check_ledger(&self, delivered: usize, handed_in: usize) {
        let stats = self.stats();
        let of = |name: &str| stats.get(name).copied().unwrap_or(0);
        let dropped: u64 = stats
            .iter()
            .filter(|(name, _)| name.starts_with("drop.") || REFUSALS.contains(name))
            .map(|(_, value)| value)
            .sum();
        let came = of("mp.udp.rx.packets") + handed_in as u64;
        let went = delivered as u64 + of("mp.upcalls") + dropped;
        assert_eq!(came, went, "{stats:?}");
    }

    /// Packets, bytes and time of the tunnel's row of traffic.
    pub fn traffic(&self) -> [u64; 3] {
        let at = PAGE + 64 * ROW;
        assert_eq!(word(&self.traffic, at), GENERATION);
        [8, 16, 24].map(|offset| word(&self.traffic, at + offset))
    }

    /// The highest counter of the tunnel's window.
    pub fn window(&self) -> u64 {
        word(&self.windows, PAGE + 2112 * ROW + 56)
    }

    /// Let control say that the row's window is of a later tunnel.
    pub fn outdate_window(&self) {
        let at = PAGE + 2112 * ROW;
        self.windows.patch(at, &(GENERATION + 1).to_le_bytes());
    }

    /// Let control admit the flow of a packet.
    pub fn allow(&self, packet: &[u8]) {
        self.judge(packet, 0b0101);
    }

    /// Let control refuse it.
    pub fn refuse(&self, packet: &[u8]) {
        self.judge(packet, 0b1000);
    }

    fn judge(&self, packet: &[u8], verdicts: u32) {
        let key = parse_flow(packet, true).unwrap();
        let seeds: [u64; 6] = std::array::from_fn(|each| word(&self.flows, 72 + 8 * each));
        let hash = flow_hash(&seeds, &key);
        let (bucket, tag) = ((hash >> 40) as usize & (BUCKETS - 1), hash as u32 | 1);
        let at = PAGE + 512 * bucket;
        let tags: Vec<u32> = (0..7)
            .map(|each| word(&self.flows, at + 8 + 4 * each) as u32)
            .collect();
        let spelled: Vec<u8> = key.0.iter().flat_map(|each| each.to_le_bytes()).collect();
        let same = |number: usize| {
            let place = at + 64 + 64 * number + 8;
            self.flows.bytes(place, 40) == spelled
        };
        let number = (0..7)
            .find(|each| tags[*each] == 0 || same(*each))
            .expect("the bucket has room");
        let row_at = at + 64 + 64 * number;
        let mut row = Vec::new();
        row.extend((word(&self.flows, row_at) as u32 + 2).to_le_bytes());
        row.extend(1_u32.to_le_bytes());
        row.extend(spelled);
        row.extend(PEER.to_le_bytes());
        row.extend(60_000_u32.to_le_bytes());
        row.extend(verdicts.to_le_bytes());
        assert_eq!(row.len(), 64);
        self.flows.patch(USED + bucket / 8, &[0xFF]);
        self.flows.patch(row_at, &row);
        self.flows.patch(at + 8 + 4 * number, &tag.to_le_bytes());
        let seen = PAGE + 8 * (bucket * 7 + number);
        self.seen.patch(seen, &NOW_MS.to_le_bytes());
    }

    /// What the far host sends of a packet.
    pub fn seal(&self, counter: u64, packet: &[u8]) -> Vec<u8> {
        self.message(MESSAGE, 0, INDEX, counter, packet)
    }

    pub fn message(
        &self,
        kind: u8,
        subtype: u8,
        index: u32,
        counter: u64,
        content: &[u8],
    ) -> Vec<u8> {
        let mut header = [0; HEADER_BYTES];
        header[..2].copy_from_slice(&[VERSION << 4 | kind, subtype]);
        header[4..8].copy_from_slice(&index.to_be_bytes());
        header[8..].copy_from_slice(&counter.to_be_bytes());
        let mut sealed = content.to_vec();
        sealed.extend([0; TAG_BYTES]);
        Key::new(self.plan.cipher, &RECEIVE_KEY).seal_in_place(counter, &header, &mut sealed);
        [&header[..], &sealed].concat()
    }

    /// Put datagrams into the socket, one by one.
    pub fn deliver(&self, datagrams: &[Vec<u8>]) {
        self.deliver_from(&self.far, datagrams);
    }

    pub fn deliver_from(&self, far: &UdpSocket, datagrams: &[Vec<u8>]) {
        for datagram in datagrams {
            far.send_to(datagram, self.udp.local_addr().unwrap())
                .unwrap();
        }
    }

    /// Put datagrams of one size, of which the last may be shorter, into the socket in one call.
    pub fn deliver_joined(&self, datagrams: &[Vec<u8>]) {
        let (whole, segment) = (datagrams.concat(), datagrams[0].len() as u16);
        assert!(whole.len() <= 65_507 && datagrams.len() <= 64);
        let to = SockAddr::to(&self.address(), false).unwrap();
        sys::send(self.far.as_raw_fd(), &whole, &to, Some(segment)).unwrap();
    }

    /// Where the host is reached.
    pub fn address(&self) -> UdpAddr {
        loopback_address(self.udp.local_addr().unwrap().port())
    }

    pub fn far_port(&self) -> u16 {
        self.far.local_addr().unwrap().port()
    }
}

pub fn elsewhere() -> UdpSocket {
    loopback()
}

pub fn loopback_address(port: u16) -> UdpAddr {
    let mut ip = [0; 16];
    ip[..4].copy_from_slice(&[127, 0, 0, 1]);
    UdpAddr {
        ip,
        family: 4,
        port,
        scope: 0,
    }
}

/// What another reader puts in front of a datagram.
pub fn record(port: u16, datagram: &[u8]) -> Vec<u8> {
    let mut record = Vec::from(NOW_MS.to_le_bytes());
    record.extend(0_u32.to_le_bytes());
    record.extend(port.to_le_bytes());
    record.extend([4, 0, MESSAGE, 0, 0, 0]);
    record.extend(0_u32.to_le_bytes());
    record.extend([127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(record.len(), RECORD_BYTES);
    record.extend(datagram);
    record
}

fn upcall(entry: &Entry, data: &[u8]) -> Upcall {
    let half = |at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
    Upcall {
        reason: entry.segment,
        index: half(8),
        port: u16::from_le_bytes([data[12], data[13]]),
        kind: data[16],
        subtype: data[17],
        packet: data[RECORD_BYTES..].to_vec(),
    }
}

pub fn reasons(upcalls: &[Upcall]) -> Vec<u32> {
    upcalls.iter().map(|each| each.reason).collect()
}

pub fn code(reason: Reason) -> u32 {
    reason as u32
}

fn cut_back(data: &[u8]) -> Vec<Vec<u8>> {
    let (head, packet) = data.split_first_chunk::<VIRTIO_BYTES>().unwrap();
    let header = VirtioHeader::parse(head, packet, packet.len()).unwrap();
    if header.gso == Gso::None {
        assert!(!header.needs_checksum);
        return vec![packet.to_vec()];
    }
    let cut = Cut::new(&header, packet, packet.len()).unwrap();
    let stride = cut.segment_bytes;
    let mut out = vec![0; stride * cut.count];
    cut.place(packet, &mut out, stride, 0, cut.count);
    cut.stamp(&mut out, stride, 0, cut.count);
    (0..cut.count)
        .map(|each| out[each * stride..each * stride + cut.segment_size(each)].to_vec())
        .collect()
}
