//! The shared memory of a host with its readers, as the supervisor makes it, rows as control writes them, and a
//! socket pair in place of the TUN device.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::rc::Rc;

use nebula_mp_core::aead::{Cipher, Key};
use nebula_mp_core::counters::{SendCounters, Traffic};
use nebula_mp_core::filler::Filler;
use nebula_mp_core::flows::{flow_hash, FlowView};
use nebula_mp_core::ip::parse_flow;
use nebula_mp_core::peers::PeerView;
use nebula_mp_core::region::Region;
use nebula_mp_core::relays::RelayView;
use nebula_mp_core::ring::{Consumer, Entry, Recovery};
use nebula_mp_core::sealer::{Sealer, Shared};
use nebula_mp_core::stats::StatsPage;
use nebula_mp_core::testing::Memory;
use nebula_mp_core::tunnels::TunnelView;
use nebula_mp_core::upcalls::{Limits, Upcalls, RECORD_BYTES};

use crate::memory::{region, rows, store_word, word, Ring, NAMES, PAGE, ROWS};

/// Bits of the buckets that were written to.
const USED: usize = 2048;
const BUCKETS: usize = 256;
const DIGEST: u64 = 0x1234_5678_9ABC_DEF0;
const PEER_GENERATION: u64 = 5;
pub const NOW_US: u64 = 1_000_000_000;
pub const INDEX: u32 = 0xBEEF_0003;
pub const ROW: usize = 3;
pub const REMOTE_INDEX: u32 = 0xCAFE_0005;
pub const PEER: u64 = PEER_GENERATION << 32 | 7;
pub const KEY: [u8; 32] = [0x11; 32];
pub const FIRST_COUNTER: u64 = 3;
const GENERATION: u64 = 9;

/// Why a packet goes no further: what the ledger adds up.
const REASONS: [&str; 8] = [
    "mp.ring.full.seal",
    "mp.ring.full.upcall",
    "mp.upcalls.limited",
    "mp.tun.drop.offload",
    "drop.oversize",
    "drop.tun.inner_ip",
    "drop.firewall.outgoing.no_rule",
    "drop.exhausted",
];

/// What a site is made with.
pub struct Shape {
    pub workers: usize,
    pub areas: usize,
    pub area_bytes: usize,
    pub entries: usize,
    pub upcall_areas: usize,
    pub plain: (u64, u64),
    pub has_header: bool,
    pub cipher: Cipher,
    /// Overwrite areas that came back.
    pub poison: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            workers: 1,
            areas: 8,
            area_bytes: 72 * 1024,
            entries: 128,
            upcall_areas: 128,
            plain: (1_000_000, 1_000_000),
            has_header: true,
            cipher: Cipher::Aes,
            poison: true,
        }
    }
}

/// One host. `inside` is the local stack's end of the TUN device.
pub struct Site {
    pub inside: UnixDatagram,
    pub now_us: u64,
    shape: Shape,
    /// The readers' end.
    pub tun: UnixDatagram,
    tunnels: Memory,
    keys: Memory,
    peers: Memory,
    relays: Memory,
    flows: Memory,
    seen: Memory,
    /// The readers' own tables of flows, and when those last had a packet.
    own_flows: Vec<(Memory, Memory)>,
    send: Memory,
    spans: Vec<Memory>,
    traffic: Vec<Memory>,
    stats: Vec<Memory>,
    seal: Vec<Ring>,
    /// Of the seal rings.
    pub sealed: Vec<Consumer>,
    upcall: Vec<Ring>,
    ups: Vec<Consumer>,
    bell: OwnedFd,
}

/// What the row of a tunnel says.
#[derive(Clone, Copy)]
pub struct Row {
    pub index: u32,
    pub remote_index: u32,
    pub state: u8,
    pub has_underlay: bool,
    pub key: [u8; 32],
}

pub const PROVEN: Row = Row {
    index: INDEX,
    remote_index: REMOTE_INDEX,
    state: 2,
    has_underlay: true,
    key: KEY,
};

impl Site {
    /// With a tunnel to the one peer.
    pub fn new(shape: Shape) -> Self {
        let (inside, tun) = UnixDatagram::pair().unwrap();
        for socket in [&inside, &tun] {
            socket.set_nonblocking(true).unwrap();
            let bytes: libc::c_int = 8 << 20;
            for option in [libc::SO_SNDBUFFORCE, libc::SO_SNDBUF] {
                // SAFETY: an int, and its size. Refused without the right to, it stays smaller.
                unsafe {
                    libc::setsockopt(
                        socket.as_raw_fd(),
                        libc::SOL_SOCKET,
                        option,
                        (&raw const bytes).cast(),
                        size_of::<libc::c_int>() as libc::socklen_t,
                    );
                }
            }
        }
        let flows = rows(b"nmp:flow", 512, BUCKETS);
        store_word(&flows, 64, 1); // rules generation
        for each in 0..6 {
            store_word(&flows, 72 + 8 * each, seed(each));
        }
        let each_worker = 0..shape.workers;
        let own_flows = each_worker.clone().map(|_| {
            (
                rows(b"nmp:flow", 512, BUCKETS),
                rows(b"nmp:seen", 8, BUCKETS * 7),
            )
        });
        let own_flows = own_flows.collect();
        let seal: Vec<Ring> = each_worker
            .clone()
            .map(|_| Ring::new(shape.areas, shape.area_bytes, shape.entries))
            .collect();
        let upcall: Vec<Ring> = each_worker
            .clone()
            .map(|_| Ring::new(shape.upcall_areas, 16 * 1024, 32))
            .collect();
        let spans = each_worker.clone().map(|_| rows(b"nmp:span", 32, ROWS));
        let traffic = each_worker.clone().map(|_| rows(b"nmp:traf", 64, ROWS));
        let stats = each_worker.map(|_| region(b"nmp:coun", PAGE, &[NAMES.len() as u64, DIGEST]));
        // SAFETY: the result is checked.
        let bell = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        assert!(bell >= 0);
        let site = Self {
            inside,
            tun,
            now_us: NOW_US,
            tunnels: rows(b"nmp:tunl", 128, ROWS),
            keys: rows(b"nmp:keys", 64, ROWS),
            peers: rows(b"nmp:peer", 8, ROWS),
            relays: rows(b"nmp:rela", 32, ROWS),
            seen: rows(b"nmp:seen", 8, BUCKETS * 7),
            send: rows(b"nmp:send", 64, ROWS),
            flows,
            own_flows,
            spans: spans.collect(),
            traffic: traffic.collect(),
            stats: stats.collect(),
            sealed: seal
                .iter()
                .map(|each| each.consumer(Recovery::SendAgain, true))
                .collect(),
            seal,
            ups: upcall
                .iter()
                .map(|each| each.consumer(Recovery::SendAgain, false))
                .collect(),
            upcall,
            // SAFETY: new, and nobody else's.
            bell: unsafe { OwnedFd::from_raw_fd(bell) },
            shape,
        };
        for span in &site.spans {
            store_word(span, 64, 1); // live
        }
        site.open(PROVEN);
        site.set_tunnel(Some(INDEX));
        site
    }

    /// Attach, as a reader or its successor. All readers read the one socket.
    pub fn sealer(&self, worker: usize) -> Sealer {
        self.sealer_on(worker, self.tun.as_raw_fd())
    }

    /// Attach to another device.
    pub fn sealer_on(&self, worker: usize, tun_fd: i32) -> Sealer {
        let names = NAMES.map(String::from);
        let stats = &self.stats[worker];
        let stats = Rc::new(StatsPage::attach(stats.writer(), &names, DIGEST).unwrap());
        let limits = Limits {
            per_tunnel: self.shape.plain,
            plain: self.shape.plain,
            datagrams: self.shape.plain,
            unknown: self.shape.plain,
            relayed: self.shape.plain,
            moved: self.shape.plain,
        };
        let bell = self.bell.as_raw_fd();
        let upcalls = Upcalls::new(
            self.upcall[worker].producer(true),
            bell,
            Rc::clone(&stats),
            limits,
        );
        let (tunnels, keys) = (self.tunnels.read_only(), self.keys.read_only());
        let peers = || PeerView::new(self.peers.read_only()).unwrap();
        let (flows, seen) = self.flow_tables(worker);
        let shared = Shared {
            tunnels: TunnelView::new(tunnels, keys).unwrap(),
            flows: FlowView::new(flows, seen, worker, peers(), Rc::clone(&stats)).unwrap(),
            relays: RelayView::new(self.relays.read_only()).unwrap(),
            traffic: Traffic::new(self.traffic[worker].writable()).unwrap(),
            upcalls,
            stats,
        };
        let spans = self.spans.iter().enumerate();
        let spans = spans
            .map(|(number, span)| {
                if number == worker {
                    span.writable()
                } else {
                    span.read_only()
                }
            })
            .collect();
        let states = self
            .seal
            .iter()
            .map(|ring| ring.state.read_only())
            .collect();
        let published = word(&self.seal[worker].data, 64);
        let send = self.send.writable();
        let counters = SendCounters::new(send, spans, Some(worker), states, published).unwrap();
        let filler = Filler::new(self.seal[worker].producer(self.shape.poison));
        let shared = Rc::new(RefCell::new(shared));
        Sealer::new(
            tun_fd,
            filler,
            peers(),
            counters,
            shared,
            self.shape.has_header,
        )
    }

    /// As this reader has them: all readers' tables, and control's.
    fn flow_tables(&self, worker: usize) -> (Vec<Region>, Vec<Region>) {
        let rights = |(number, (flows, _)): (usize, &(Memory, Memory))| {
            if number == worker {
                flows.writable()
            } else {
                flows.read_only()
            }
        };
        let mut flows: Vec<Region> = self.own_flows.iter().enumerate().map(rights).collect();
        flows.push(self.flows.read_only());
        let seen = self.own_flows.iter().map(|(_, seen)| seen.writable());
        (flows, seen.chain([self.seen.writable()]).collect())
    }

    /// Let the local stack send this.
    pub fn give(&self, frame: &[u8]) {
        assert_eq!(self.inside.send(frame).unwrap(), frame.len());
    }

    /// Let control open a tunnel, or change its row.
    pub fn open(&self, row: Row) {
        let number = (row.index & 0xFFFF) as usize;
        let at = PAGE + 128 * number;
        let sequence = word(&self.tunnels, at) + 2;
        let mut data = Vec::new();
        data.extend(sequence.to_le_bytes());
        data.extend(row.index.to_le_bytes());
        data.extend(row.remote_index.to_le_bytes());
        data.extend(GENERATION.to_le_bytes());
        data.extend(PEER.to_le_bytes());
        data.extend(if row.has_underlay {
            [192, 0, 2, 7]
        } else {
            [0; 4]
        });
        data.extend(if row.has_underlay { 4242_u16 } else { 0 }.to_le_bytes());
        data.extend([if row.has_underlay { 4 } else { 0 }, 0]);
        data.extend([0; 16]);
        data.extend([row.state, self.shape.cipher as u8, 0, 0, 255, 0]);
        data.resize(128, 0);
        self.keys.patch(PAGE + 64 * number, &row.key);
        self.tunnels.patch(at, &data);
        let counter = PAGE + 64 * number;
        if word(&self.send, counter + 8) != GENERATION {
            store_word(&self.send, counter, FIRST_COUNTER - 1);
            store_word(&self.send, counter + 8, GENERATION);
        }
    }

    /// Let control close the tunnel.
    pub fn close(&self) {
        let at = PAGE + 128 * ROW;
        let sequence = word(&self.tunnels, at) + 2;
        let mut data = sequence.to_le_bytes().to_vec();
        data.resize(16, 0);
        data.extend(GENERATION.to_le_bytes());
        data.resize(128, 0);
        self.tunnels.patch(at, &data);
        store_word(&self.send, PAGE + 64 * ROW + 8, 0);
        self.keys.patch(PAGE + 64 * ROW, &[0; 64]);
    }

    /// Of the row's counters alone, as when the tunnel ends between look-up and reservation.
    pub fn end_counters(&self) {
        store_word(&self.send, PAGE + 64 * ROW + 8, GENERATION + 1);
    }

    /// Send to the peer through this tunnel.
    pub fn set_tunnel(&self, index: Option<u32>) {
        let at = PAGE + 8 * (PEER & 0xFFFF_FFFF) as usize;
        let word = PEER_GENERATION << 32 | u64::from(index.unwrap_or(0));
        store_word(&self.peers, at, word);
    }

    /// Send to the other peer through this tunnel.
    pub fn set_other_tunnel(&self, index: u32) {
        let at = PAGE + 8 * ((PEER + 1) & 0xFFFF_FFFF) as usize;
        store_word(&self.peers, at, PEER_GENERATION << 32 | u64::from(index));
    }

    /// Let this be the last counter that was given out.
    pub fn store_counter(&self, counter: u64) {
        store_word(&self.send, PAGE + 64 * ROW, counter);
    }

    /// The last counter that was given out.
    pub fn counter(&self) -> u64 {
        word(&self.send, PAGE + 64 * ROW)
    }

    /// Let control admit the flow of this packet.
    pub fn allow(&self, packet: &[u8]) {
        self.judge(packet, PEER, 0b0101);
    }

    /// Let control admit the flow of this packet, of another peer.
    pub fn allow_other(&self, packet: &[u8]) {
        self.judge(packet, PEER + 1, 0b0101);
    }

    /// Let control refuse it, outbound.
    pub fn refuse(&self, packet: &[u8]) {
        self.judge(packet, 0, 0b0010);
    }

    fn judge(&self, packet: &[u8], peer: u64, verdicts: u32) {
        let key = parse_flow(packet, false).unwrap();
        let hash = flow_hash(&[0, 1, 2, 3, 4, 5].map(seed), &key);
        let (bucket, tag) = (hash as usize >> 40 & (BUCKETS - 1), hash as u32 | 1);
        let at = PAGE + 512 * bucket;
        let free = (0..7).find(|row| {
            let tag_at = at + 8 + 4 * row;
            let found = self.flows.bytes(tag_at, 4).try_into().unwrap();
            let found = u32::from_le_bytes(found);
            found == 0 || found == tag
        });
        let row = free.unwrap();
        let mut data = Vec::new();
        data.extend(2_u32.to_le_bytes());
        data.extend(1_u32.to_le_bytes());
        data.extend(key.to_bytes());
        data.extend(peer.to_le_bytes());
        data.extend(1_000_000_u32.to_le_bytes());
        data.extend(verdicts.to_le_bytes());
        assert_eq!(data.len(), 64);
        self.flows.patch(USED + bucket / 8, &[0xFF]);
        store_word(
            &self.seen,
            PAGE + 8 * (bucket * 7 + row),
            self.now_us / 1000,
        );
        self.flows.patch(at + 64 + 64 * row, &data);
        self.flows.patch(at + 8 + 4 * row, &tag.to_le_bytes());
    }

    /// What waits in the seal ring, which is empty then: each entry and its datagrams.
    pub fn sealed(&mut self, worker: usize) -> Vec<(Entry, Vec<Vec<u8>>)> {
        let found = Ring::drain(&mut self.sealed[worker]).into_iter();
        found
            .map(|(entry, data)| {
                let datagrams = data.chunks(entry.segment as usize);
                (entry, datagrams.map(<[u8]>::to_vec).collect())
            })
            .collect()
    }

    /// Areas that wait in the seal ring.
    pub fn pending(&mut self, worker: usize) -> u64 {
        self.sealed[worker].pending().unwrap()
    }

    /// The datagrams that wait in the seal ring, which is empty then.
    pub fn wire(&mut self, worker: usize) -> Vec<Vec<u8>> {
        let found = self.sealed(worker).into_iter();
        found.flat_map(|(_, datagrams)| datagrams).collect()
    }

    /// What went up: reason and packet.
    pub fn upcalls(&mut self) -> Vec<(u32, Vec<u8>)> {
        let found = Ring::drain(&mut self.ups[0]).into_iter();
        found
            .map(|(entry, data)| (entry.segment, data[RECORD_BYTES..].to_vec()))
            .collect()
    }

    /// A counter, of all workers.
    pub fn stat(&self, name: &str) -> u64 {
        let slot = NAMES.iter().position(|each| *each == name).unwrap();
        let pages = self.stats.iter();
        pages.map(|page| word(page, 64 + 8 * slot)).sum()
    }

    /// Packets of which it was counted why they go no further.
    pub fn drops(&self) -> Vec<(&'static str, u64)> {
        let each = REASONS.iter().map(|name| (*name, self.stat(name)));
        each.filter(|(_, count)| *count > 0).collect()
    }

    /// Everything that was read was sealed, went up, or was counted under one reason.
    pub fn check_ledger(&self, sealed: usize) {
        let dropped: u64 = self.drops().iter().map(|(_, count)| count).sum();
        let went = sealed as u64 + self.stat("mp.upcalls") + dropped;
        assert_eq!(self.stat("mp.tun.rx.packets"), went, "{:?}", self.drops());
    }

    /// Packets and bytes that the tunnel's share says were sent.
    pub fn sent(&self, worker: usize) -> (u64, u64) {
        let at = PAGE + 64 * ROW;
        (
            word(&self.traffic[worker], at + 32),
            word(&self.traffic[worker], at + 40),
        )
    }

    /// What the peer makes of datagrams whose counters follow each other from `first` on.
    pub fn opened(&self, datagrams: &[Vec<u8>], first: u64) -> Vec<Vec<u8>> {
        open(self.shape.cipher, &KEY, REMOTE_INDEX, datagrams, first)
    }
}

/// What a peer with this key and index makes of datagrams whose counters follow each other from `first` on.
pub fn open(
    cipher: Cipher,
    key: &[u8; 32],
    index: u32,
    datagrams: &[Vec<u8>],
    first: u64,
) -> Vec<Vec<u8>> {
    let key = Key::new(cipher, key);
    let datagrams = datagrams.iter().zip(first..);
    datagrams
        .map(|(datagram, counter)| {
            let (header, sealed) = datagram.split_first_chunk::<16>().unwrap();
            let mut expected = [0; 16];
            expected[0] = 0x11;
            expected[4..8].copy_from_slice(&index.to_be_bytes());
            expected[8..].copy_from_slice(&counter.to_be_bytes());
            assert_eq!(*header, expected);
            let mut packet = vec![0; sealed.len() - 16];
            key.open_separate(counter, header, sealed, &mut packet)
                .unwrap();
            packet
        })
        .collect()
}

fn seed(number: usize) -> u64 {
    0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(number as u64 + 1)
}
