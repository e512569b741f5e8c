//! Rings, tables and system calls as a drain sees them, for tests: real memory, and calls that can be refused.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::rc::Rc;

use nebula_mp_core::drains::{Calls, TunDrain, UdpDrain};
use nebula_mp_core::layout;
use nebula_mp_core::opener::Offloads;
use nebula_mp_core::region::Layout;
use nebula_mp_core::ring::{Consumer, Producer, Recovery};
use nebula_mp_core::stats::{StatsPage, COUNTED};
use nebula_mp_core::sys::{self, SockAddr};
use nebula_mp_core::testing::Memory;
use nebula_mp_core::tunnels::{UdpAddr, UnderlayView};

const PAGE: usize = 4096;
const AREAS: usize = 4;
const AREA_BYTES: usize = 80 * 1024;
const ENTRIES: usize = 64;
const ROWS: usize = 8;
const ROW_BYTES: usize = 128;
const DIGEST: u64 = 77;
/// Where the underlay word of a row lies, by `nebula_mp.shm_table`, and the IPv6 address.
const UNDERLAY_AT: usize = 32;
const IPV6_AT: usize = 40;
/// The word of the consumer's cursor.
const TAIL: usize = 8;

pub const NO_OFFLOADS: Offloads = Offloads {
    tso: false,
    uso: false,
    udp_gro: false,
    udp_segment: false,
};
pub const TRAINS: Offloads = Offloads {
    udp_segment: true,
    ..NO_OFFLOADS
};
pub const VIRTIO: Offloads = Offloads {
    tso: true,
    uso: true,
    ..NO_OFFLOADS
};

fn region(layout: &Layout, size: usize, parameters: &[u64]) -> Memory {
    Memory::new(layout, size, parameters)
}

/// One ring, one table of tunnels and one page of counters.
pub struct World {
    data: Memory,
    state: Memory,
    tunnels: Memory,
    page: Memory,
    names: Vec<String>,
    recovery: Recovery,
}

impl World {
    pub fn seal() -> Self {
        Self::new(Recovery::SendAgain)
    }

    pub fn open() -> Self {
        Self::new(Recovery::GoOnBehind)
    }

    fn new(recovery: Recovery) -> Self {
        let mut names = Vec::new();
        for name in COUNTED {
            names.push(name.to_string());
            if let Some(front) = name.strip_suffix(".packets") {
                names.push(format!("{front}.bytes"));
            }
        }
        let geometry = [AREAS as u64, AREA_BYTES as u64, ENTRIES as u64];
        Self {
            data: region(&layout::RING_DATA, PAGE + AREAS * AREA_BYTES, &geometry),
            state: region(&layout::RING_STATE, PAGE, &[]),
            tunnels: region(&layout::TUNNELS, PAGE + ROWS * ROW_BYTES, &[ROWS as u64]),
            page: region(&layout::STATS, PAGE, &[names.len() as u64, DIGEST]),
            names,
            recovery,
        }
    }

    /// Have the tunnel of this row reached there.
    pub fn reach(&self, row: u32, address: Option<UdpAddr>) {
        let at = PAGE + ROW_BYTES * row as usize;
        let mut word = [0; 8];
        if let Some(address) = address {
            if address.family == 4 {
                word[..4].copy_from_slice(&address.ip[..4]);
            } else {
                self.tunnels.patch(at + IPV6_AT, &address.ip);
            }
            word[4..6].copy_from_slice(&address.port.to_le_bytes());
            word[6] = address.family;
        }
        self.tunnels.patch(at + UNDERLAY_AT, &word);
        let sequence = u64::from_le_bytes(self.tunnels.bytes(at, 8).try_into().unwrap());
        self.tunnels.patch(at, &(sequence + 2).to_le_bytes());
    }

    /// Publish one area with these entries: bytes, segment and row.
    pub fn publish(&self, entries: &[(&[u8], u32, u32)]) {
        let (data, state) = (self.data.writable(), self.state.read_only());
        let mut producer = Producer::new(data, state, true).unwrap();
        assert!(producer.try_begin().unwrap());
        let mut at = 0;
        for (bytes, segment, row) in entries {
            producer.data()[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(producer.try_append(at, bytes.len(), *segment, *row));
            at += bytes.len();
        }
        producer.publish();
    }

    fn consumer(&self) -> Consumer {
        let (data, state) = (self.data.read_only(), self.state.writable());
        Consumer::new(data, state, None, self.recovery, true, ROWS).unwrap()
    }

    fn stats(&self) -> StatsPage {
        StatsPage::attach(self.page.writer(), &self.names, DIGEST).unwrap()
    }

    pub fn udp(&self, line: &Line, offloads: Offloads) -> UdpDrain<Spy> {
        let dual = sys::is_ipv6_socket(line.source.as_raw_fd()).unwrap();
        let underlay = UnderlayView::new(self.tunnels.read_only()).unwrap();
        let spy = line.script.spy(line.source.as_raw_fd());
        UdpDrain::with_calls(self.consumer(), spy, dual, underlay, self.stats(), offloads)
    }

    /// As the program makes it.
    pub fn real_udp(&self, descriptor: i32, offloads: Offloads) -> UdpDrain {
        let underlay = UnderlayView::new(self.tunnels.read_only()).unwrap();
        UdpDrain::new(
            self.consumer(),
            descriptor,
            underlay,
            self.stats(),
            offloads,
        )
        .unwrap()
    }

    pub fn tun(&self, device: &Device, offloads: Offloads) -> TunDrain<Spy> {
        let spy = device.script.spy(device.near.as_raw_fd());
        TunDrain::with_calls(self.consumer(), spy, self.stats(), offloads)
    }

    pub fn tail(&self) -> u64 {
        self.state.word(TAIL)
    }

    /// All counters that are not 0.
    pub fn counts(&self) -> BTreeMap<&str, u64> {
        let words = (0..self.names.len()).map(|slot| self.page.word(8 + slot));
        self.names
            .iter()
            .map(String::as_str)
            .zip(words)
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    pub fn count(&self, name: &str) -> u64 {
        self.counts().get(name).copied().unwrap_or(0)
    }

    /// Those that say why something went no further.
    pub fn drops(&self) -> BTreeMap<&str, u64> {
        let mut found = self.counts();
        found.retain(|name, _| name.contains(".drop") || *name == "udp.tx.dropped");
        found
    }
}

/// A call, as it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    pub bytes: usize,
    pub segment: Option<u16>,
}

/// What happens instead of a call.
pub enum Instead {
    /// It fails.
    Refuse(i32),
    /// It claims to have written so many bytes.
    Written(usize),
    /// The process dies before it.
    Die,
    /// The process dies after it.
    DieAfterwards,
}

type Rule = Box<dyn FnMut(usize, &Call) -> Option<Instead>>;

/// The calls that were made, and a rule for what happens to them.
#[derive(Clone, Default)]
pub struct Script(Rc<RefCell<Record>>);

#[derive(Default)]
struct Record {
    calls: Vec<Call>,
    waits: Vec<i32>,
    never_ready: bool,
    rule: Option<Rule>,
}

impl Script {
    fn spy(&self, descriptor: i32) -> Spy {
        Spy {
            descriptor,
            script: self.clone(),
        }
    }

    /// From now on, and with calls counted from 0.
    pub fn rule(&self, rule: impl FnMut(usize, &Call) -> Option<Instead> + 'static) {
        let mut record = self.0.borrow_mut();
        record.calls.clear();
        record.rule = Some(Box::new(rule));
    }

    /// Refuse call number `at`.
    pub fn refuse(&self, number: i32, at: usize) {
        self.rule(move |call, _| (call == at).then_some(Instead::Refuse(number)));
    }

    /// Let all through again.
    pub fn allow(&self) {
        self.rule(|_, _| None);
    }

    /// Let no wait for room succeed.
    pub fn never_ready(&self) {
        self.0.borrow_mut().never_ready = true;
    }

    pub fn waits(&self) -> Vec<i32> {
        self.0.borrow().waits.clone()
    }

    pub fn calls(&self) -> Vec<Call> {
        self.0.borrow().calls.clone()
    }

    fn make<T>(
        &self,
        call: Call,
        make: impl FnOnce() -> Result<T, i32>,
        claim: impl FnOnce(usize) -> T,
    ) -> Result<T, i32> {
        let (number, rule) = {
            let mut record = self.0.borrow_mut();
            record.calls.push(call.clone());
            (record.calls.len() - 1, record.rule.take())
        };
        let Some(mut rule) = rule else { return make() };
        let found = rule(number, &call);
        self.0.borrow_mut().rule = Some(rule);
        match found {
            None => make(),
            Some(Instead::Refuse(error)) => Err(error),
            Some(Instead::Written(bytes)) => Ok(claim(bytes)),
            Some(Instead::Die) => resume_unwind(Box::new("killed")),
            Some(Instead::DieAfterwards) => {
                let _ = make();
                resume_unwind(Box::new("killed"))
            }
        }
    }
}

/// The calls of a drain, by the script.
pub struct Spy {
    descriptor: i32,
    script: Script,
}

impl Calls for Spy {
    fn send(&mut self, data: &[u8], target: &SockAddr, segment: Option<u16>) -> Result<(), i32> {
        let bytes = data.len();
        let call = || sys::send(self.descriptor, data, target, segment);
        self.script.make(Call { bytes, segment }, call, |_| ())
    }

    fn write(&mut self, data: &[u8]) -> Result<usize, i32> {
        let call = Call {
            bytes: data.len(),
            segment: None,
        };
        let make = || sys::write(self.descriptor, data);
        self.script.make(call, make, |bytes| bytes)
    }

    fn wait(&mut self, limit_ms: i32) -> bool {
        self.script.0.borrow_mut().waits.push(limit_ms);
        !self.script.0.borrow().never_ready
    }
}

/// Whether `work` was killed by the script.
pub fn is_killed(work: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(()) => false,
        Err(why) if why.downcast_ref::<&str>() == Some(&"killed") => true,
        Err(why) => resume_unwind(why),
    }
}

/// The socket that a drain sends with and the one it sends to.
pub struct Line {
    pub source: UdpSocket,
    pub sink: UdpSocket,
    pub script: Script,
}

impl Line {
    /// `here` is the address of the sender: `0.0.0.0`, or `::` for a dual socket.
    pub fn new(here: &str, there: &str) -> Self {
        let source = UdpSocket::bind((here, 0)).unwrap();
        source.set_nonblocking(true).unwrap();
        Self {
            source,
            sink: sink(there),
            script: Script::default(),
        }
    }

    pub fn ipv4() -> Self {
        Self::new("0.0.0.0", "127.0.0.1")
    }

    pub fn far(&self) -> UdpAddr {
        address_of(&self.sink)
    }
}

pub fn sink(there: &str) -> UdpSocket {
    let sink = UdpSocket::bind((there, 0)).unwrap();
    sink.set_nonblocking(true).unwrap();
    let bytes: libc::c_int = 1 << 20;
    // SAFETY: an int, and its size. Without the right to do so the buffer stays as it is, which does as well.
    unsafe {
        libc::setsockopt(
            sink.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            4,
        )
    };
    sink
}

pub fn address_of(socket: &UdpSocket) -> UdpAddr {
    let local = socket.local_addr().unwrap();
    let mut ip = [0; 16];
    let family = match local.ip() {
        std::net::IpAddr::V4(it) => {
            ip[..4].copy_from_slice(&it.octets());
            4
        }
        std::net::IpAddr::V6(it) => {
            ip = it.octets();
            6
        }
    };
    UdpAddr {
        ip,
        family,
        port: local.port(),
        scope: 0,
    }
}

/// All datagrams that wait.
pub fn arrived(sink: &UdpSocket) -> Vec<Vec<u8>> {
    let mut room = vec![0; 65_536];
    let mut found = Vec::new();
    while let Ok(bytes) = sink.recv(&mut room) {
        found.push(room[..bytes].to_vec());
    }
    found
}

/// A pair of sockets that stands in for a TUN queue.
pub struct Device {
    near: std::os::unix::net::UnixDatagram,
    stack: std::os::unix::net::UnixDatagram,
    pub script: Script,
}

impl Device {
    pub fn new() -> Self {
        let (near, stack) = std::os::unix::net::UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        stack.set_nonblocking(true).unwrap();
        Self {
            near,
            stack,
            script: Script::default(),
        }
    }

    /// All packets that were written.
    pub fn received(&self) -> Vec<Vec<u8>> {
        let mut room = vec![0; 1 << 17];
        let mut found = Vec::new();
        while let Ok(bytes) = self.stack.recv(&mut room) {
            found.push(room[..bytes].to_vec());
        }
        found
    }
}
