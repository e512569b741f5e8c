//! Which counters of a tunnel were already received; the state and rules of `nebula_mp.crypto.replay`.
//! Source: RFC 6479. Works on memory that outlives its process: see `windows`.

/// Counters a window accepts behind the highest one.
pub const WIDTH: u64 = 8192;

/// Why a counter is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Behind the window.
    Old,
    /// It was received before.
    Seen,
}
