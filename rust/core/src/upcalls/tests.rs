//! Records as control reads them, limits, and what is counted when there is no room.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

use super::*;
use crate::layout::{HEADER_WORDS, STATS};
use crate::region::PAGE_BYTES;
use crate::ring::{Consumer, Geometry, Recovery};
use crate::stats::COUNTED;
use crate::testing::{Memory, RingMemory};

const GEOMETRY: Geometry = Geometry {
    areas: 4,
    area_bytes: 1024,
    entries_max: 4,
};
/// 1024 - 64 - 4 * 16.
const ROOM: usize = 896;

const LIMITS: Limits = Limits {
    per_tunnel: (1000, 3),
    plain: (1000, 4),
    datagrams: (100, 2),
    unknown: (10, 1),
    relayed: (10, 3),
    moved: (20, 1),
};

const IPV4: UdpAddr = UdpAddr {
    ip: [192, 0, 2, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    family: 4,
    port: 4242,
    scope: 0,
};
const IPV6: UdpAddr = UdpAddr {
    ip: [0xFE, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7],
    family: 6,
    port: 65_535,
    scope: 3,
};

fn arrival(source: UdpAddr, at_ms: u64) -> Arrival {
    Arrival {
        source: Some(source),
        kind: 1,
        subtype: 2,
        at_ms,
    }
}

struct Page {
    names: Vec<String>,
    memory: Memory,
    stats: Rc<StatsPage>,
}

impl Page {
    fn new() -> Self {
        let mut names = Vec::new();
        for &name in COUNTED {
            names.push(name.to_owned());
            names.extend(
                name.strip_suffix("packets")
                    .map(|stem| format!("{stem}bytes")),
            );
        }
        let memory = Memory::new(&STATS, PAGE_BYTES, &[names.len() as u64, 7]);
        let stats = Rc::new(StatsPage::attach(memory.writer(), &names, 7).unwrap());
        Self {
            names,
            memory,
            stats,
        }
    }

    /// Every counter that is not 0.
    fn counted(&self) -> Vec<(&str, u64)> {
        let counters = self.names.iter().enumerate();
        counters
            .map(|(slot, name)| (name.as_str(), self.memory.word(HEADER_WORDS + slot)))
            .filter(|(_, value)| *value > 0)
            .collect()
    }
}

/// An eventfd that does not block.
struct Bell(File);

impl Bell {
    fn new() -> Self {
        // SAFETY: the descriptor is new and given to nobody else.
        Self(unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)) })
    }

    /// How often it was rung since the last time.
    fn rung(&mut self) -> u64 {
        let mut times = [0; 8];
        match self.0.read_exact(&mut times) {
            Ok(_) => u64::from_ne_bytes(times),
            Err(_) => 0,
        }
    }
}

struct Stand {
    page: Page,
    bell: Bell,
    upcalls: Upcalls,
    control: Consumer,
}

fn consumer(memory: &RingMemory) -> Consumer {
    let (data, state) = (memory.data.read_only(), memory.state.writable());
    Consumer::new(data, state, None, Recovery::SendAgain, false, 65_536).unwrap()
}

impl Stand {
    fn new() -> Self {
        let (page, bell, memory) = (Page::new(), Bell::new(), RingMemory::new(GEOMETRY));
        let producer = memory.producer(false);
        Self {
            upcalls: Upcalls::new(producer, bell.0.as_raw_fd(), Rc::clone(&page.stats), LIMITS),
            control: consumer(&memory),
            page,
            bell,
        }
    }

    /// Everything that went up: reason, row, record with its packet.
    fn taken(&mut self) -> Vec<(u32, u32, Vec<u8>)> {
        self.upcalls.flush();
        drain(&mut self.control)
    }
}

fn drain(consumer: &mut Consumer) -> Vec<(u32, u32, Vec<u8>)> {
    let mut taken = Vec::new();
    while consumer.pending().unwrap() > 0 {
        consumer.load().unwrap();
        for number in 0..consumer.len() {
            let (entry, data) = consumer.entry(number);
            taken.push((entry.segment, entry.row, data.to_vec()));
        }
        consumer.release().unwrap();
    }
    taken
}

#[test]
fn a_record_says_when_and_how_a_packet_came() {
    let mut stand = Stand::new();
    let came = arrival(IPV6, 0x0102_0304_0506_0708);

    stand
        .upcalls
        .opened(Reason::First, &came, 0xABCD_0005, b"packet")
        .unwrap();

    // As `struct.Struct("<QIHBBBBxxI16s")` packs it.
    let mut record = vec![8, 7, 6, 5, 4, 3, 2, 1];
    record.extend([5, 0, 0xCD, 0xAB]);
    record.extend([0xFF, 0xFF, 6, 0, 1, 2, 0, 0, 3, 0, 0, 0]);
    record.extend(IPV6.ip);
    assert_eq!(record.len(), RECORD_BYTES);
    record.extend(b"packet");
    assert_eq!(stand.taken(), [(5, 5, record)]);
    assert_eq!(stand.page.counted(), [("mp.upcalls", 1)]);
}

#[test]
fn a_packet_of_the_local_stacks_came_from_nowhere() {
    let mut stand = Stand::new();

    stand.upcalls.plain(Reason::NoTunnel, b"ip", 77).unwrap();

    let (reason, row, bytes) = stand.taken().remove(0);
    assert_eq!((reason, row), (2, 0));
    assert_eq!(bytes[..8], 77_u64.to_le_bytes());
    assert_eq!(bytes[8..RECORD_BYTES], [0; 32]);
    assert_eq!(parse_record(&bytes), Ok((0, None, &b"ip"[..])));
}

#[test]
fn a_datagram_goes_up_whole_and_says_where_it_came_from() {
    let mut stand = Stand::new();
    for source in [IPV4, IPV6] {
        let came = arrival(source, 5);
        stand
            .upcalls
            .raw(Reason::Datagram, &came, b"handshake")
            .unwrap();
    }

    let taken = stand.taken();

    assert_eq!(taken.len(), 2);
    for ((reason, row, bytes), source) in taken.into_iter().zip([IPV4, IPV6]) {
        assert_eq!((reason, row, bytes[8]), (7, 0, 0));
        assert_eq!(
            parse_record(&bytes),
            Ok((0, Some(source), &b"handshake"[..]))
        );
    }
}

#[test]
fn what_came_in_a_frame_says_by_which_path_and_each_tunnel_to_a_relay_has_its_limit() {
    let mut stand = Stand::new();
    let came = Arrival {
        source: None,
        ..arrival(IPV4, 5)
    };
    let path = |local_index, carrier| Path {
        local_index,
        carrier,
        leads: crate::relays::Leads::Here,
        next_index: 7,
    };
    let sent = [(1, 3), (2, 0x1_0003), (1, 3), (4, 3), (5, 6)];
    for (index, carrier) in sent {
        stand
            .upcalls
            .relayed(&came, &path(index, carrier), b"inside")
            .unwrap();
    }

    let found = stand.taken();

    assert_eq!(
        stand.page.counted(),
        [("mp.upcalls", 4), ("mp.upcalls.limited", 1)]
    );
    let paths = [1, 2, 1, 5];
    assert_eq!(found.len(), paths.len());
    for ((reason, row, bytes), path) in found.into_iter().zip(paths) {
        assert_eq!((reason, row), (9, 0));
        assert_eq!(parse_record(&bytes), Ok((path, None, &b"inside"[..])));
        assert_eq!(bytes[12..16], [0; 4]);
        assert_eq!(bytes[16..18], [1, 2], "type and subtype");
    }
}

#[test]
fn a_notice_is_empty_and_is_not_counted() {
    let mut stand = Stand::new();

    stand.upcalls.moved(&arrival(IPV4, 9), 0x0001_0002).unwrap();

    let taken = stand.taken();
    assert_eq!(
        (taken[0].0, taken[0].1, taken[0].2.len()),
        (6, 2, RECORD_BYTES)
    );
    assert!(stand.page.counted().is_empty());
    // The second of this tunnel within 50 ms is left out; another tunnel's is not.
    for (index, at_ms) in [(0x0001_0002, 10), (0x0001_0003, 10), (0x0001_0002, 59)] {
        stand.upcalls.moved(&arrival(IPV4, at_ms), index).unwrap();
    }
    let rows: Vec<u32> = stand.taken().iter().map(|(_, row, _)| *row).collect();
    assert_eq!(rows, [3, 2]);
    assert!(stand.page.counted().is_empty());
}

#[test]
fn each_tunnel_and_each_kind_has_a_burst_and_a_rate_of_its_own_and_the_rest_is_counted() {
    let mut stand = Stand::new();
    let upcalls = &mut stand.upcalls;
    for index in [1, 2] {
        for _ in 0..4 {
            upcalls
                .opened(Reason::Message, &arrival(IPV4, 100), index, b"m")
                .unwrap();
        }
    }
    upcalls
        .opened(Reason::Message, &arrival(IPV4, 101), 1, b"m")
        .unwrap();
    upcalls
        .opened(Reason::NewFlowIn, &arrival(IPV4, 101), 1, b"m")
        .unwrap();
    assert_eq!(stand.taken().len(), 7);
    let limited = "mp.upcalls.limited";
    assert_eq!(stand.page.counted(), [("mp.upcalls", 7), (limited, 3)]);

    for reason in [Reason::NewFlowOut, Reason::NoTunnel] {
        for _ in 0..5 {
            stand.upcalls.plain(reason, b"p", 100).unwrap();
        }
    }
    assert_eq!(stand.taken().len(), 8);
    assert_eq!(stand.page.counted(), [("mp.upcalls", 15), (limited, 5)]);

    for reason in [Reason::Datagram, Reason::UnknownIndex] {
        for at_ms in [100, 100, 100, 105, 109, 110] {
            stand
                .upcalls
                .raw(reason, &arrival(IPV4, at_ms), b"d")
                .unwrap();
        }
    }
    assert_eq!(stand.taken().len(), 4);
    assert_eq!(
        stand.page.counted(),
        [("mp.upcalls", 19), (limited, 8), ("drop.unknown_index", 5)]
    );
}

#[test]
fn a_bucket_fills_up_to_its_burst_and_a_clock_that_goes_back_takes_from_it() {
    let mut buckets = Buckets::new((20, 5), 2);
    let mut take = |now_ms| buckets.try_take(1, now_ms);
    assert_eq!([0; 6].map(&mut take), [true, true, true, true, true, false]);
    assert_eq!([49, 50, 99, 100].map(&mut take), [false, true, false, true]);
    assert_eq!(
        [u64::MAX / 2; 6].map(&mut take),
        [true, true, true, true, true, false]
    );
    assert!(!take(0));
    assert!(buckets.try_take(0, u64::MAX));
}

#[test]
fn what_fits_no_area_is_oversize_and_a_full_ring_is_counted() {
    let mut stand = Stand::new();
    let push = |upcalls: &mut Upcalls, at_ms, bytes| {
        let packet = vec![1; bytes];
        upcalls
            .opened(Reason::Message, &arrival(IPV4, at_ms), 9, &packet)
            .unwrap();
    };

    push(&mut stand.upcalls, 0, ROOM - RECORD_BYTES + 1);
    assert_eq!(stand.page.counted(), [("drop.oversize", 1)]);

    for at_ms in 1..8 {
        push(&mut stand.upcalls, at_ms, ROOM - RECORD_BYTES);
    }
    assert_eq!(
        stand.page.counted(),
        [
            ("mp.ring.full.upcall", 3),
            ("mp.upcalls", 4),
            ("drop.oversize", 1)
        ]
    );
    // A notice finds no room either, and nobody counts it.
    stand.upcalls.moved(&arrival(IPV4, 9), 9).unwrap();
    assert_eq!(stand.taken().len(), 4);
    assert_eq!(stand.page.counted().len(), 3);
}

#[test]
fn control_is_woken_once_for_a_pass_and_not_for_nothing() {
    let mut stand = Stand::new();
    stand.upcalls.flush();
    assert_eq!(stand.bell.rung(), 0);

    // Two areas: the first is published in the middle of the pass.
    for at_ms in 1..3 {
        let packet = [1; ROOM - RECORD_BYTES];
        stand
            .upcalls
            .opened(Reason::Message, &arrival(IPV4, at_ms), 9, &packet)
            .unwrap();
    }
    assert_eq!(stand.bell.rung(), 0);
    stand.upcalls.flush();
    assert_eq!(stand.bell.rung(), 1);
    stand.upcalls.flush();
    assert_eq!(stand.bell.rung(), 0);

    stand.upcalls.moved(&arrival(IPV4, 9), 9).unwrap();
    stand.upcalls.flush();
    assert_eq!(stand.bell.rung(), 1);
}

#[test]
fn a_stranger_goes_to_its_owner_and_wakes_nobody_else() {
    let page = Page::new();
    let (mut first, mut second) = (Bell::new(), Bell::new());
    let rings = [RingMemory::new(GEOMETRY), RingMemory::new(GEOMETRY)];
    let producers = vec![
        (3, rings[0].producer(false), first.0.as_raw_fd()),
        (64, rings[1].producer(false), second.0.as_raw_fd()),
    ];
    let mut strangers = Strangers::new(producers, Rc::clone(&page.stats));

    strangers
        .push(64, &arrival(IPV6, 5), b"datagram", 0)
        .unwrap();
    strangers
        .push(4, &arrival(IPV6, 5), b"of nobody", 0)
        .unwrap();
    strangers.push(3, &arrival(IPV6, 5), &[0; ROOM], 0).unwrap();
    strangers.flush();

    assert_eq!((first.rung(), second.rung()), (0, 1));
    assert!(drain(&mut consumer(&rings[0])).is_empty());
    let taken = drain(&mut consumer(&rings[1]));
    assert_eq!((taken.len(), taken[0].0, taken[0].1), (1, 0, 0));
    assert_eq!(
        parse_record(&taken[0].2),
        Ok((0, Some(IPV6), &b"datagram"[..]))
    );
    assert_eq!(
        page.counted(),
        [("mp.ring.full.stranger", 2), ("mp.strangers", 1)]
    );

    for _ in 0..5 {
        strangers
            .push(3, &arrival(IPV4, 5), &[0; ROOM - RECORD_BYTES], 0)
            .unwrap();
    }
    strangers.flush();
    assert_eq!((first.rung(), second.rung()), (1, 0));
    assert_eq!(
        page.counted(),
        [("mp.ring.full.stranger", 3), ("mp.strangers", 5)]
    );
}

#[test]
fn a_record_that_no_reader_writes_is_a_contradiction() {
    let said = |bytes: &[u8]| parse_record(bytes).unwrap_err().to_string();
    assert_eq!(
        said(&[0; 39]),
        "upcall ring: length of a record is 39, expected 40 or more"
    );
    let mut record = [0; 40];
    record[14] = 5;
    assert_eq!(
        said(&record),
        "upcall ring: address family is 5, expected 0, 4 or 6"
    );
}

#[test]
fn of_an_ipv4_source_nothing_but_its_address_and_port_is_taken() {
    let mut bytes = record(0, Some(&arrival(IPV4, 0)), 0);
    bytes[20] = 9;
    bytes[30] = 9;
    assert_eq!(parse_record(&bytes), Ok((0, Some(IPV4), &b""[..])));
}
