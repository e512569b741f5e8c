//! Rows as control writes them, and as it leaves them when it dies.

use std::borrow::Cow;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::error::Fault;
use crate::header::{HEADER_BYTES, TAG_BYTES};
use crate::layout::{KEYS, TUNNELS};
use crate::testing::Memory;

const ROWS: usize = 8;
const INDEX: u32 = 0xABCD_0005;
const ROW: usize = 5;

/// What control writes of a tunnel.
#[derive(Clone)]
struct Written {
    index: u32,
    state: u8,
    cipher: u8,
    generation: u64,
    word: [u8; 8],
    ipv6: [u8; 16],
    sources: (u8, u8, [u8; 48]),
    keys: [u8; 64],
}

fn written() -> Written {
    let mut keys = [1; 64];
    keys[32..].fill(2);
    Written {
        index: INDEX,
        state: 2,
        cipher: 1,
        generation: 3,
        word: [192, 0, 2, 7, 0x92, 0x10, 4, 0], // port 4242
        ipv6: [0; 16],
        sources: (255, 0, [0; 48]),
        keys,
    }
}

impl Written {
    fn bytes(&self, sequence: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(sequence.to_le_bytes());
        bytes.extend(self.index.to_le_bytes());
        bytes.extend(0x0102_0304_u32.to_le_bytes());
        bytes.extend(self.generation.to_le_bytes());
        bytes.extend((7_u64 << 32 | 1).to_le_bytes());
        bytes.extend(self.word);
        bytes.extend(self.ipv6);
        bytes.extend([
            self.state,
            self.cipher,
            6,
            0,
            self.sources.0,
            self.sources.1,
            0,
            0,
        ]);
        bytes.extend(self.sources.2);
        bytes.extend([0; 16]);
        assert_eq!(bytes.len(), size_of::<TunnelRow>());
        bytes
    }
}

struct Table {
    tunnels: Memory,
    keys: Memory,
    view: TunnelView,
}

fn table() -> Table {
    let tunnels = Memory::new(&TUNNELS, ROWS_AT + 128 * ROWS, &[ROWS as u64]);
    let keys = Memory::new(&KEYS, ROWS_AT + 64 * ROWS, &[ROWS as u64]);
    let view = TunnelView::new(tunnels.read_only(), keys.read_only()).unwrap();
    Table {
        tunnels,
        keys,
        view,
    }
}

impl Table {
    fn put(&self, written: &Written, sequence: u64) {
        let row = written.index as usize & 0xFFFF;
        self.keys.patch(ROWS_AT + 64 * row, &written.keys);
        self.tunnels
            .patch(ROWS_AT + 128 * row, &written.bytes(sequence));
    }

    fn set_sequence(&self, sequence: u64) {
        self.tunnels.patch_word(ROWS_AT_WORD + 16 * ROW, sequence);
    }

    fn close(&self, sequence: u64) {
        let row = ROWS_AT + 128 * ROW;
        let generation = self.tunnels.bytes(row + 16, 8);
        self.tunnels.patch(row, &[0; 128]);
        self.tunnels.patch(row + 16, &generation);
        self.keys.patch(ROWS_AT + 64 * ROW, &[0; 64]);
        self.set_sequence(sequence);
    }

    fn refusal(&mut self) -> (String, Cow<'static, str>) {
        match self.view.get(INDEX) {
            Err(Fault::Contradiction(it)) => (it.value, it.field),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("not refused"),
        }
    }
}

/// Whether two keys are the same key.
fn seals(key: &Key, cipher: Cipher, bytes: [u8; 32]) -> bool {
    let sealed = |key: &Key| {
        let mut data = [0; TAG_BYTES + 3];
        key.seal_in_place(9, &[0; HEADER_BYTES], &mut data);
        data
    };
    sealed(key) == sealed(&Key::new(cipher, &bytes))
}

#[test]
fn a_tunnel_is_found_by_the_whole_of_its_local_index() {
    let mut table = table();
    table.put(&written(), 2);

    let tunnel = table.view.get(INDEX).unwrap().unwrap();

    assert_eq!(
        (tunnel.local_index, tunnel.remote_index),
        (INDEX, 0x0102_0304)
    );
    assert_eq!((tunnel.state, tunnel.owner), (TunnelState::Proven, 6));
    assert_eq!((tunnel.peer, tunnel.row()), (7 << 32 | 1, ROW));
    assert_eq!((tunnel.generation, tunnel.sequence), (3, 2));
    assert!(seals(&tunnel.send, Cipher::Aes, [1; 32]));
    assert!(seals(&tunnel.receive, Cipher::Aes, [2; 32]));
    let mut ip = [0; 16];
    ip[..4].copy_from_slice(&[192, 0, 2, 7]);
    let underlay = UdpAddr {
        ip,
        family: 4,
        port: 4242,
        scope: 0,
    };
    assert_eq!(tunnel.underlay, Some(underlay));

    for other in [5, INDEX ^ 1 << 31, INDEX + 1, 0xABCD_0006, u32::MAX, 0] {
        assert!(table.view.get(other).unwrap().is_none(), "{other:#x}");
    }
}

#[test]
fn every_state_and_cipher_is_recognised() {
    let cases = [
        (1, TunnelState::Candidate, 2, Cipher::ChaCha),
        (2, TunnelState::Proven, 1, Cipher::Aes),
    ];
    for (state, expected, cipher, kind) in cases {
        let mut table = table();
        table.put(
            &Written {
                state,
                cipher,
                ..written()
            },
            2,
        );
        let tunnel = table.view.get(INDEX).unwrap().unwrap();
        assert_eq!(tunnel.state, expected);
        assert!(seals(&tunnel.send, kind, [1; 32]));
    }
}

#[test]
fn a_row_is_read_once_and_then_recognised() {
    let mut table = table();
    table.put(&written(), 2);
    let first: *const Tunnel = table.view.get(INDEX).unwrap().unwrap();
    // Not seen, since the sequence number is the same.
    table.tunnels.patch(ROWS_AT + 128 * ROW + 12, &[9; 4]);
    let again = table.view.get(INDEX).unwrap().unwrap();
    assert!(ptr::eq(first, again));
    assert_eq!(again.remote_index, 0x0102_0304);
}

#[test]
fn an_update_changes_all_but_the_ciphers() {
    let mut table = table();
    table.put(&written(), 2);
    table.view.get(INDEX).unwrap().unwrap();

    table.put(
        &Written {
            state: 1,
            keys: [7; 64],
            ..written()
        },
        4,
    );
    let tunnel = table.view.get(INDEX).unwrap().unwrap();

    assert_eq!((tunnel.state, tunnel.sequence), (TunnelState::Candidate, 4));
    assert!(seals(&tunnel.send, Cipher::Aes, [1; 32]));
    assert!(seals(&tunnel.receive, Cipher::Aes, [2; 32]));
}

#[test]
fn the_rows_next_tunnel_has_its_own_keys() {
    let mut table = table();
    table.put(&written(), 2);
    table.view.get(INDEX).unwrap().unwrap();
    let index = INDEX ^ 0x10_0000;
    table.put(
        &Written {
            index,
            generation: 4,
            keys: [7; 64],
            ..written()
        },
        6,
    );
    assert!(table.view.get(INDEX).unwrap().is_none());
    let tunnel = table.view.get(index).unwrap().unwrap();
    assert!(seals(&tunnel.send, Cipher::Aes, [7; 32]));
}

#[test]
fn a_tunnel_that_was_closed_is_gone() {
    let mut table = table();
    table.put(&written(), 2);
    table.view.get(INDEX).unwrap().unwrap();
    table.close(4);
    assert!(table.view.get(INDEX).unwrap().is_none());
    assert!(table.view.get(0).unwrap().is_none());
    assert!(table.view.get(5).unwrap().is_none());
    assert_eq!(table.view.sweep(), 0);
}

#[test]
fn while_a_row_is_being_written_the_tunnel_is_what_it_was() {
    let mut table = table();
    table.put(&written(), 2);
    table.view.get(INDEX).unwrap().unwrap();
    table.put(
        &Written {
            state: 1,
            ..written()
        },
        3,
    );

    let begun = Instant::now();
    let tunnel = table.view.get(INDEX).unwrap().unwrap();
    assert_eq!((tunnel.state, tunnel.sequence), (TunnelState::Proven, 2));
    assert!(begun.elapsed() >= RETRY);

    // It is waited for once.
    let begun = Instant::now();
    for _ in 0..100 {
        assert_eq!(table.view.get(INDEX).unwrap().unwrap().sequence, 2);
    }
    assert!(begun.elapsed() < 50 * RETRY);
    assert_eq!(table.view.sweep(), 0);

    table.set_sequence(4);
    let tunnel = table.view.get(INDEX).unwrap().unwrap();
    assert_eq!((tunnel.state, tunnel.sequence), (TunnelState::Candidate, 4));
}

#[test]
fn a_row_that_was_never_read_and_stays_odd_is_a_miss() {
    let mut table = table();
    table.put(&written(), 3);
    assert!(table.view.get(INDEX).unwrap().is_none());
    table.set_sequence(4);
    assert!(table.view.get(INDEX).unwrap().is_some());
}

#[test]
fn a_sweep_drops_what_was_made_of_rows_that_have_changed() {
    let mut table = table();
    table.put(&written(), 2);
    let other = Written {
        index: 0x0001_0006,
        ..written()
    };
    table.put(&other, 2);
    table.view.get(INDEX).unwrap().unwrap();
    table.view.get(other.index).unwrap().unwrap();
    assert_eq!(table.view.sweep(), 0);

    table.close(4);

    assert_eq!(table.view.sweep(), 1);
    assert!(table.view.snapshots[ROW].is_none());
    assert!(table.view.get(other.index).unwrap().is_some());
}

#[test]
fn a_row_that_no_process_of_ours_writes_is_a_contradiction() {
    let good = written;
    let cases = [
        (Written { state: 3, ..good() }, "3", "tunnel state"),
        (
            Written {
                cipher: 0,
                ..good()
            },
            "0",
            "cipher",
        ),
        (
            Written {
                cipher: 3,
                ..good()
            },
            "3",
            "cipher",
        ),
        (
            Written {
                sources: (4, 0, [0; 48]),
                ..good()
            },
            "4",
            "number of sources",
        ),
        (
            Written {
                sources: (254, 0, [0; 48]),
                ..good()
            },
            "254",
            "number of sources",
        ),
        (
            Written {
                word: [0, 0, 0, 0, 0, 0, 5, 0],
                ..good()
            },
            "5",
            "address family",
        ),
    ];
    for (written, value, field) in cases {
        let mut table = table();
        table.put(&written, 2);
        assert_eq!(table.refusal(), (value.to_owned(), field.into()));
    }
    // A free row is not looked at any further.
    let mut table = table();
    table.put(
        &Written {
            state: 0,
            cipher: 9,
            ..good()
        },
        2,
    );
    assert!(table.view.get(INDEX).unwrap().is_none());
}

#[test]
fn packets_may_come_from_the_addresses_in_the_row_alone() {
    let (mut v4, mut v6) = ([0; 16], [0; 16]);
    v4[..4].copy_from_slice(&[10, 42, 0, 2]);
    v6[..8].copy_from_slice(&[10, 42, 0, 2, 1, 1, 1, 1]);
    let mut listed = [0; 48];
    listed[..16].copy_from_slice(&v6); // rubbish behind an IPv4 address
    listed[16..32].copy_from_slice(&v6);
    let allowed = |count, families| {
        let mut table = table();
        table.put(
            &Written {
                sources: (count, families, listed),
                ..written()
            },
            2,
        );
        let sources = table.view.get(INDEX).unwrap().unwrap().sources;
        [(v4, false), (v4, true), (v6, true), (v6, false)]
            .map(|(ip, is_ipv6)| sources.allow(&ip, is_ipv6))
    };
    assert_eq!(allowed(0, 0), [false; 4]);
    assert_eq!(allowed(1, 0), [true, false, false, false]);
    assert_eq!(allowed(1, 2), [true, false, false, false]);
    assert_eq!(allowed(2, 2), [true, false, true, false]);
    assert_eq!(allowed(255, 0), [true; 4]);
}

#[test]
fn tables_of_different_sizes_are_refused() {
    let tunnels = Memory::new(&TUNNELS, ROWS_AT + 128 * 4, &[4]);
    let keys = Memory::new(&KEYS, ROWS_AT + 64 * 3, &[3]);
    let view = TunnelView::new(tunnels.read_only(), keys.read_only());
    let expected = "shared memory 'tunnel keys': number of rows is 3, expected 4";
    assert_eq!(view.err().unwrap().to_string(), expected);
}

#[test]
fn a_row_is_never_read_half_of_one_and_half_of_another() {
    let mut table = table();
    let of = |round: u8| Written {
        generation: u64::from(round) + 1,
        word: [round, round, round, round, round, round, 4, 0],
        keys: [round; 64],
        ..written()
    };
    table.put(&of(0), 2);
    let (tunnels, keys) = (table.tunnels.writer(), table.keys.writer());
    let done = AtomicBool::new(false);
    let mut read = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let tunnels = Region::attach(tunnels, &TUNNELS, true, "").unwrap();
            let keys = Region::attach(keys, &KEYS, true, "").unwrap();
            let sequence = tunnels.word(ROWS_AT_WORD + 16 * ROW);
            // Bounded for the case that the reader fails.
            for round in 0..20_000_000_u64 {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let written = of(round as u8);
                sequence.store(2 * round + 3, Ordering::Relaxed);
                fence(Ordering::Release);
                tunnels.store(ROWS_AT + 128 * ROW + 8, &written.bytes(0)[8..]);
                keys.store(ROWS_AT + 64 * ROW, &written.keys);
                sequence.store(2 * round + 4, Ordering::Release);
            }
        });
        while read < 2000 {
            if let Some(tunnel) = table.view.get(INDEX).unwrap() {
                let round = (tunnel.generation - 1) as u8;
                assert_eq!(tunnel.underlay.unwrap().ip[..4], [round; 4]);
                assert!(seals(&tunnel.send, Cipher::Aes, [round; 32]));
                assert!(seals(&tunnel.receive, Cipher::Aes, [round; 32]));
                read += 1;
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

fn address(ip: &[u8], port: u16) -> UdpAddr {
    let mut padded = [0; 16];
    padded[..ip.len()].copy_from_slice(ip);
    let family = if ip.len() == 4 { 4 } else { 6 };
    UdpAddr {
        ip: padded,
        family,
        port,
        scope: 0,
    }
}

fn ipv6(last: u8) -> Written {
    let mut ipv6 = [0x20; 16];
    ipv6[15] = last;
    Written {
        word: [0, 0, 0, 0, 0x92, 0x10, 6, 0],
        ipv6,
        ..written()
    }
}

#[test]
fn a_writer_finds_where_a_batch_goes_without_the_sequence_number_if_it_is_ipv4() {
    let table = table();
    let mut view = UnderlayView::new(table.tunnels.read_only()).unwrap();
    table.put(&written(), 3);
    assert_eq!(view.get(5).unwrap(), Some(address(&[192, 0, 2, 7], 4242)));
    table.put(
        &Written {
            word: [192, 0, 2, 8, 1, 0, 4, 0],
            ..written()
        },
        3,
    );
    assert_eq!(view.get(5).unwrap(), Some(address(&[192, 0, 2, 8], 1)));
}

#[test]
fn an_ipv6_address_is_the_one_before_while_it_is_being_written() {
    let table = table();
    let mut view = UnderlayView::new(table.tunnels.read_only()).unwrap();
    table.put(&ipv6(1), 3);
    assert_eq!(view.get(5).unwrap(), None);
    table.set_sequence(4);
    let first = view.get(5).unwrap();
    assert_eq!(first, Some(address(&ipv6(1).ipv6, 4242)));

    table.put(&ipv6(2), 5);
    assert_eq!(view.get(5).unwrap(), first);
    table.set_sequence(6);
    assert_eq!(view.get(5).unwrap(), Some(address(&ipv6(2).ipv6, 4242)));
}

#[test]
fn a_peer_that_changes_family_is_followed_both_ways() {
    let table = table();
    let mut view = UnderlayView::new(table.tunnels.read_only()).unwrap();
    for (sequence, written, expected) in [
        (2, written(), address(&[192, 0, 2, 7], 4242)),
        (4, ipv6(1), address(&ipv6(1).ipv6, 4242)),
        (6, written(), address(&[192, 0, 2, 7], 4242)),
        (8, ipv6(2), address(&ipv6(2).ipv6, 4242)),
    ] {
        table.put(&written, sequence);
        assert_eq!(view.get(5).unwrap(), Some(expected));
    }
}

#[test]
fn a_tunnel_without_an_address_has_none_for_writers_and_readers() {
    let mut table = table();
    let mut view = UnderlayView::new(table.tunnels.read_only()).unwrap();
    table.put(&written(), 2);
    assert!(view.get(5).unwrap().is_some());
    table.put(
        &Written {
            word: [0; 8],
            ..written()
        },
        4,
    );
    assert_eq!(view.get(5).unwrap(), None);
    table.put(
        &Written {
            word: [0; 8],
            ..written()
        },
        5,
    );
    assert_eq!(view.get(5).unwrap(), None);
    table.set_sequence(6);
    assert_eq!(table.view.get(INDEX).unwrap().unwrap().underlay, None);
}

#[test]
fn an_address_of_another_family_and_a_row_beyond_the_table_are_contradictions() {
    let table = table();
    let mut view = UnderlayView::new(table.tunnels.read_only()).unwrap();
    table.put(
        &Written {
            word: [0, 0, 0, 0, 0, 0, 5, 0],
            ..written()
        },
        2,
    );
    let said = view.get(5).unwrap_err().to_string();
    assert_eq!(
        said,
        "shared memory 'tunnels': address family is 5, expected 0, 4 or 6"
    );
    let said = view.get(8).unwrap_err().to_string();
    assert_eq!(
        said,
        "shared memory 'tunnels': tunnel row of a batch is 8, expected 0..7"
    );
    assert!(view.get(u32::MAX).is_err());
}

#[test]
fn the_copy_of_the_keys_is_wiped() {
    let table = table();
    table.put(&written(), 2);
    let mut place = std::mem::MaybeUninit::new(Secrets::copy(&table.view.keys, ROW));
    let at = place.as_ptr().cast::<u8>();
    // SAFETY: initialised above, dropped once, and only its integers are read afterwards.
    let (before, after) = unsafe {
        let before = std::slice::from_raw_parts(at, 64).to_vec();
        place.assume_init_drop();
        (before, std::slice::from_raw_parts(at, 64).to_vec())
    };
    assert_eq!(before, written().keys);
    assert_eq!(after, [0; 64]);
}
