//! The batch operations of the data path: what `nebula_mp.datapath.python` specifies, natively.
//!
//! ```text
//! TUN  -> sealer  -> ring::Producer -> ring::Consumer -> drains::UdpDrain -> UDP
//! UDP  -> opener  -> ring::Producer -> ring::Consumer -> drains::TunDrain -> TUN
//!         sealer | opener -> upcalls::Upcalls -> upcall ring -> control, which is Python
//! ```
//!
//! Bottom-up: `error`, `header`, `checksum`, `ip`, `virtio`, `segment`, `coalesce`, `aead`, `replay` (pure) -> `words`,
//! `region`, `layout` (memory) -> `cursors`, `ring`, `stats`, `tunnels`, `peers`, `relays`, `flow_rows`,
//! `admission`, `flows`, `ledger`, `counters`, `windows` (shared structures) -> `filler`, `upcalls` -> `sys`, `sources`
//! (system calls) -> `runs`, `outlet`, `tun_queue`, `sealer`, `delivery`, `opener`, `drains` -> `pass`.
//! Knows no policy, no process and nothing of Python; allocates nothing for a packet.

pub mod admission;
pub mod aead;
pub mod checksum;
pub mod coalesce;
pub mod counters;
pub mod cursors;
pub mod delivery;
pub mod drains;
pub mod error;
pub mod filler;
pub mod flow_rows;
pub mod flows;
pub mod header;
pub mod ip;
pub mod layout;
pub mod ledger;
pub mod opener;
mod outlet;
pub mod pass;
pub mod peers;
pub mod region;
pub mod relays;
pub mod replay;
pub mod ring;
pub mod runs;
pub mod sealer;
pub mod segment;
pub mod sources;
pub mod stats;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tun_queue;
pub mod tunnels;
pub mod upcalls;
pub mod virtio;
pub mod windows;
pub mod words;
