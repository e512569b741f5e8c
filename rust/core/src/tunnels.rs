//! A reader's and a writer's side of the tunnel table; as `nebula_mp.shm_tunnels`.
//!
//! Knows which part of a row to trust when; knows nothing of packets, and of keys only where they lie. Control is the
//! only writer. A row is read under its sequence number: even, copy, the same number again. A row that stays odd is a
//! miss to whoever has no older snapshot of it; whoever has one goes on with that. Keys do not change while a row's
//! generation stays the same, so neither do the ciphers that were made of them.
//!
//! Source: docs/architecture.md, "Shared memory"; the sequence lock is that of Linux's seqlock.h.

use std::collections::HashMap;
use std::hint;
use std::mem::offset_of;
use std::ptr;
use std::sync::atomic::{compiler_fence, fence, Ordering};
use std::time::{Duration, Instant};

use crate::aead::{Cipher, Key};
use crate::error::Result;
use crate::layout::{copy_words, row_count, KeyRow, TunnelRow, ROWS_AT, ROWS_AT_WORD, ROWS_MAX};
use crate::region::Region;

/// For so long a reader tries again to read a row that is being written.
const RETRY: Duration = Duration::from_millis(1);
/// To read an IPv6 address that is being written.
const TRIES: usize = 100;

const SOURCES_MAX: u8 = 3;
/// Number of sources of a peer of which only control knows where its packets may come from.
const ASK: u8 = 255;
const FREE: u8 = 0;

const WORDS: usize = size_of::<TunnelRow>() / 8;
const UNDERLAY: usize = offset_of!(TunnelRow, ipv4) / 8;
const IPV6_WORD: usize = offset_of!(TunnelRow, ipv6) / 8;
const INDEX_HALF: usize = offset_of!(TunnelRow, local_index) / 4;

// Address, port and family are one word, in this order.
const _: () = assert!(
    offset_of!(TunnelRow, sequence) == 0
        && offset_of!(TunnelRow, ipv4) == 8 * UNDERLAY
        && offset_of!(TunnelRow, port) == 8 * UNDERLAY + 4
        && offset_of!(TunnelRow, family) == 8 * UNDERLAY + 6
        && offset_of!(TunnelRow, ipv6) == 8 * IPV6_WORD
);

/// Where a peer is reached: what `newtypes.UdpAddr` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UdpAddr {
    /// IPv4 in the first 4 bytes and zeros, or IPv6.
    pub ip: [u8; 16],
    /// 4 or 6.
    pub family: u8,
    /// In the machine's byte order.
    pub port: u16,
    /// Of a link-local IPv6 address; else 0. The tables have no room for it.
    pub scope: u32,
}

/// What a row is for; the values are the table's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum TunnelState {
    /// We answered a stage 1: receive, send nothing, tell control of the first packet.
    Candidate = 1,
    /// It carries data both ways.
    Proven = 2,
}

/// Up to three inner addresses that a peer may send from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sources {
    /// How many; 255: ask control, so anything may come from the flow table alone.
    pub count: u8,
    /// Bit n: source n is IPv6.
    pub families: u8,
    /// IPv4 padded with zeros.
    pub addresses: [[u8; 16]; 3],
}

impl Sources {
    /// Whether a peer may send from this address; true where control has to be asked.
    #[inline]
    pub fn allow(&self, address: &[u8; 16], is_ipv6: bool) -> bool {
        if self.count == ASK {
            return true;
        }
        self.addresses
            .iter()
            .take(usize::from(self.count))
            .enumerate()
            .any(|(number, each)| each == address && (self.families >> number & 1 != 0) == is_ipv6)
    }

    fn of(row: &TunnelRow, tunnels: &Region) -> Result<Self> {
        let mut sources = Self {
            count: row.source_count,
            families: row.source_families,
            addresses: row.sources,
        };
        if sources.count != ASK && sources.count > SOURCES_MAX {
            let expected = format!("0..{SOURCES_MAX}");
            return Err(tunnels.contradiction("number of sources", sources.count, expected));
        }
        for (number, address) in sources.addresses.iter_mut().enumerate() {
            if sources.families >> number & 1 == 0 {
                address[4..].fill(0);
            }
        }
        Ok(sources)
    }
}

/// A row as it was at `sequence`, with the keys expanded.
pub struct Tunnel {
    /// Ours.
    pub local_index: u32,
    /// The peer's.
    pub remote_index: u32,
    /// Whether it may carry data.
    pub state: TunnelState,
    /// The reader that has the replay window.
    pub owner: u16,
    /// `PeerRef`.
    pub peer: u64,
    /// Where the peer is reached; None if that is not known.
    pub underlay: Option<UdpAddr>,
    /// Local index of the path by which the peer is reached while `underlay` is None; 0 for none.
    pub relay: u32,
    /// What it may send from.
    pub sources: Sources,
    /// Of the row.
    pub generation: u64,
    /// Of the row's sequence lock.
    pub sequence: u64,
    /// Seals what we send.
    pub send: Key,
    /// Opens what we receive.
    pub receive: Key,
}

impl Tunnel {
    /// Number of the row.
    pub fn row(&self) -> usize {
        (self.local_index & 0xFFFF) as usize
    }
}

/// What a row says, keys apart.
struct Fields {
    row: TunnelRow,
    state: TunnelState,
    cipher: Cipher,
    underlay: Option<UdpAddr>,
    sources: Sources,
}

impl Fields {
    /// Those of a whole row; None for a free one.
    fn of(row: TunnelRow, tunnels: &Region) -> Result<Option<Self>> {
        let state = match row.state {
            FREE => return Ok(None),
            1 => TunnelState::Candidate,
            2 => TunnelState::Proven,
            other => return Err(tunnels.contradiction("tunnel state", other, "0..2")),
        };
        let cipher = match row.cipher {
            1 => Cipher::Aes,
            2 => Cipher::ChaCha,
            other => return Err(tunnels.contradiction("cipher", other, "1 or 2")),
        };
        let sources = Sources::of(&row, tunnels)?;
        let underlay = underlay(tunnels, row.ipv4, row.port, row.family, &row.ipv6)?;
        Ok(Some(Self {
            row,
            state,
            cipher,
            underlay,
            sources,
        }))
    }

    fn with(self, sequence: u64, (send, receive): (Key, Key)) -> Tunnel {
        Tunnel {
            local_index: self.row.local_index,
            remote_index: self.row.remote_index,
            state: self.state,
            owner: self.row.owner,
            peer: self.row.peer,
            underlay: self.underlay,
            relay: self.row.relay,
            sources: self.sources,
            generation: self.row.generation,
            sequence,
            send,
            receive,
        }
    }
}

/// Both keys of a tunnel, wiped when it is dropped.
struct Secrets(KeyRow);

impl Secrets {
    fn copy(keys: &Region, row: usize) -> Self {
        let mut secrets = Self(KeyRow {
            send: [0; 32],
            receive: [0; 32],
        });
        let at = ROWS_AT + row * size_of::<KeyRow>();
        keys.copy(at + offset_of!(KeyRow, send), &mut secrets.0.send);
        keys.copy(at + offset_of!(KeyRow, receive), &mut secrets.0.receive);
        secrets
    }

    fn expand(&self, cipher: Cipher) -> (Key, Key) {
        (
            Key::new(cipher, &self.0.send),
            Key::new(cipher, &self.0.receive),
        )
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        for byte in self.0.send.iter_mut().chain(&mut self.0.receive) {
            // SAFETY: a byte of ours, borrowed. Volatile, since nobody reads it any more.
            unsafe { ptr::write_volatile(byte, 0) };
        }
        compiler_fence(Ordering::SeqCst);
    }
}

/// Rows by local index: read once, then recognised by their sequence number, so that a packet costs one load. Keys
/// are wiped from the copies when the row changes generation, at the latest by `sweep`.
pub struct TunnelView {
    tunnels: Region,
    keys: Region,
    rows: usize,
    /// By row, as far as one was asked for.
    snapshots: Vec<Option<Box<Tunnel>>>,
    /// By row: the sequence number it was waited for in vain.
    given_up: HashMap<usize, u64>,
}

/// What was found in a row that has changed.
enum Read {
    Free,
    /// With the ciphers of before.
    Same(Fields),
    New(Fields, (Key, Key)),
}

impl TunnelView {
    /// Both regions are read-only. The keys are kept out of core dumps and forks.
    pub fn new(tunnels: Region, mut keys: Region) -> Result<Self> {
        let rows = row_count(&tunnels, size_of::<TunnelRow>(), ROWS_MAX)?;
        if row_count(&keys, size_of::<KeyRow>(), ROWS_MAX)? != rows {
            return Err(keys.contradiction("number of rows", keys.parameters()[0], rows));
        }
        keys.protect()?;
        Ok(Self {
            tunnels,
            keys,
            rows,
            snapshots: Vec::new(),
            given_up: HashMap::new(),
        })
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The tunnel with this local index, any u32; None if there is none. While a row is being written it tries
    /// again for 1 ms, then goes on with what it had.
    #[inline]
    pub fn get(&mut self, index: u32) -> Result<Option<&Tunnel>> {
        let row = (index & 0xFFFF) as usize;
        if row >= self.rows {
            return Ok(None);
        }
        let word = ROWS_AT_WORD + row * WORDS;
        let known = match self.snapshots.get(row) {
            Some(Some(snapshot)) => Some(snapshot.sequence),
            _ => None,
        };
        if known.is_none() {
            let there = self.tunnels.half(2 * word + INDEX_HALF);
            if there.load(Ordering::Relaxed) != index {
                return Ok(None); // a flood of made-up indexes costs no more than this
            }
        }
        let sequence = self.tunnels.word(word).load(Ordering::Acquire);
        if known != Some(sequence) {
            self.refresh(row, sequence)?;
        }
        let snapshot = self.snapshots.get(row).and_then(Option::as_deref);
        Ok(snapshot.filter(|it| it.local_index == index))
    }

    /// Drop what was made of rows that have changed; gives how many. About once a second: a tunnel that ended is not
    /// asked for any more.
    pub fn sweep(&mut self) -> usize {
        let mut gone = 0;
        for (row, place) in self.snapshots.iter_mut().enumerate() {
            if let Some(snapshot) = place {
                let word = self.tunnels.word(ROWS_AT_WORD + row * WORDS);
                let now = word.load(Ordering::Relaxed);
                if snapshot.sequence != now && now & 1 == 0 {
                    *place = None;
                    gone += 1;
                }
            }
        }
        gone
    }

    /// Read a row that has changed, or leave the snapshot as it was if that cannot be done in time.
    #[cold]
    fn refresh(&mut self, row: usize, sequence: u64) -> Result<()> {
        if self.given_up.get(&row) == Some(&sequence) {
            return Ok(());
        }
        let mut begun: Option<Instant> = None;
        loop {
            let word = self.tunnels.word(ROWS_AT_WORD + row * WORDS);
            let sequence = word.load(Ordering::Acquire);
            if sequence & 1 == 0 {
                if let Some(read) = self.read(row, sequence)? {
                    self.keep(row, sequence, read);
                    return Ok(());
                }
            }
            if begun.get_or_insert_with(Instant::now).elapsed() >= RETRY {
                self.given_up.insert(row, sequence);
                return Ok(());
            }
            hint::spin_loop();
        }
    }

    /// Read a row that had this even number; None if it has another one by now.
    fn read(&self, row: usize, sequence: u64) -> Result<Option<Read>> {
        let word = ROWS_AT_WORD + row * WORDS;
        let is_whole = || {
            fence(Ordering::Acquire);
            self.tunnels.word(word).load(Ordering::Relaxed) == sequence
        };
        let copied = TunnelRow::from_words(copy_words(&self.tunnels, word));
        if !is_whole() {
            return Ok(None);
        }
        let Some(fields) = Fields::of(copied, &self.tunnels)? else {
            return Ok(Some(Read::Free));
        };
        let old = self.snapshots.get(row).and_then(Option::as_ref);
        if old.is_some_and(|it| it.generation == copied.generation) {
            return Ok(Some(Read::Same(fields)));
        }
        let ciphers = Secrets::copy(&self.keys, row).expand(fields.cipher);
        // The keys of another tunnel, or half of each, are thrown away.
        Ok(is_whole().then_some(Read::New(fields, ciphers)))
    }

    fn keep(&mut self, row: usize, sequence: u64, read: Read) {
        if self.snapshots.len() <= row {
            self.snapshots.resize_with(row + 1, || None);
        }
        let place = &mut self.snapshots[row];
        let old = place.take();
        *place = match (read, old) {
            (Read::New(fields, ciphers), _) => Some(Box::new(fields.with(sequence, ciphers))),
            (Read::Same(fields), Some(old)) => {
                let Tunnel { send, receive, .. } = *old;
                Some(Box::new(fields.with(sequence, (send, receive))))
            }
            (Read::Same(_) | Read::Free, _) => None,
        };
    }
}

/// A writer's side: where to send a batch; it holds no key. The address is taken when the batch is sent, so that a
/// peer that moved meanwhile gets it.
pub struct UnderlayView {
    tunnels: Region,
    rows: usize,
    /// By row, as far as one was asked for.
    known: Vec<Option<Known>>,
}

/// The underlay word, for IPv6 the sequence number as well, and the address they stand for.
#[derive(Clone, Copy)]
struct Known {
    word: u64,
    sequence: u64,
    address: UdpAddr,
}

impl UnderlayView {
    /// Read-only.
    pub fn new(tunnels: Region) -> Result<Self> {
        let rows = row_count(&tunnels, size_of::<TunnelRow>(), ROWS_MAX)?;
        Ok(Self {
            tunnels,
            rows,
            known: Vec::new(),
        })
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Underlay address of the tunnel in `row`; None if it has none. As `shm_tunnels.UnderlayView.get`: while control
    /// is writing an IPv6 address it is the one before; None if that was never asked for.
    #[inline]
    pub fn get(&mut self, row: u32) -> Result<Option<UdpAddr>> {
        let number = row as usize;
        if number >= self.rows {
            let expected = format!("0..{}", self.rows - 1);
            let contradiction = self
                .tunnels
                .contradiction("tunnel row of a batch", row, expected);
            return Err(contradiction);
        }
        let first = ROWS_AT_WORD + number * WORDS;
        let known = self.known.get(number).copied().flatten();
        let word = self.tunnels.word(first + UNDERLAY).load(Ordering::Acquire);
        if let Some(known) = known.filter(|it| it.word == word) {
            // An IPv4 address is one word, which needs no sequence number.
            if word >> 48 == 4 || self.tunnels.word(first).load(Ordering::Acquire) == known.sequence
            {
                return Ok(Some(known.address));
            }
        }
        self.look(number, word, known)
    }

    #[cold]
    fn look(&mut self, row: usize, word: u64, known: Option<Known>) -> Result<Option<UdpAddr>> {
        if word >> 48 == 4 {
            return self.remember(row, word, 0, [0; 2]);
        }
        let first = ROWS_AT_WORD + row * WORDS;
        for _ in 0..TRIES {
            let sequence = self.tunnels.word(first).load(Ordering::Acquire);
            let word = self.tunnels.word(first + UNDERLAY).load(Ordering::Relaxed);
            let ipv6 = copy_words(&self.tunnels, first + IPV6_WORD);
            fence(Ordering::Acquire);
            let after = self.tunnels.word(first).load(Ordering::Relaxed);
            if sequence & 1 == 0 && after == sequence {
                return self.remember(row, word, sequence, ipv6);
            }
            hint::spin_loop();
        }
        Ok(known.map(|it| it.address))
    }

    fn remember(
        &mut self,
        row: usize,
        word: u64,
        sequence: u64,
        ipv6: [u64; 2],
    ) -> Result<Option<UdpAddr>> {
        let [a, b, c, d, low, high, family, _] = word.to_le_bytes();
        let port = u16::from_le_bytes([low, high]);
        let mut address = [0; 16];
        address[..8].copy_from_slice(&ipv6[0].to_le_bytes());
        address[8..].copy_from_slice(&ipv6[1].to_le_bytes());
        let address = underlay(&self.tunnels, [a, b, c, d], port, family, &address)?;
        if self.known.len() <= row {
            self.known.resize(row + 1, None);
        }
        self.known[row] = address.map(|address| Known {
            word,
            sequence,
            address,
        });
        Ok(address)
    }
}

fn underlay(
    tunnels: &Region,
    ipv4: [u8; 4],
    port: u16,
    family: u8,
    ipv6: &[u8; 16],
) -> Result<Option<UdpAddr>> {
    let ip = match family {
        0 => return Ok(None),
        4 => {
            let mut ip = [0; 16];
            ip[..4].copy_from_slice(&ipv4);
            ip
        }
        6 => *ipv6,
        other => return Err(tunnels.contradiction("address family", other, "0, 4 or 6")),
    };
    Ok(Some(UdpAddr {
        ip,
        family,
        port,
        scope: 0,
    }))
}

#[cfg(all(test, not(miri)))]
mod tests;
