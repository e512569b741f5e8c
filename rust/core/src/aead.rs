//! Seal and open with the network's AEAD; the nonce is the 64-bit counter. As `nebula_mp.crypto.aead`.
//!
//! aws-lc-rs by default; the cargo feature `ring` takes ring instead. Source: Noise section 12, RFC 8439, NIST
//! SP 800-38D: 12 bytes of nonce, four zeros and the counter, big-endian for AES-256-GCM, little-endian for
//! ChaCha20-Poly1305.

use crate::header::{HEADER_BYTES, TAG_BYTES};

/// What both ends of a network have agreed on; the values are those of the tunnel table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Cipher {
    /// AES-256-GCM.
    Aes = 1,
    /// ChaCha20-Poly1305.
    ChaCha = 2,
}

/// A tag does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forged;

/// One key of one direction, expanded. Wiped when it is dropped, as far as the library does.
pub struct Key {
    _todo: Cipher,
}

impl Key {
    /// `key` is borrowed for the call.
    pub fn new(cipher: Cipher, key: &[u8; 32]) -> Self {
        todo!("{cipher:?} {}", key.len())
    }

    /// Seal what lies in `data`, but for its last `TAG_BYTES`, in place, and write the tag there. `counter` was
    /// never sealed with this key before.
    pub fn seal_in_place(&self, counter: u64, header: &[u8; HEADER_BYTES], data: &mut [u8]) {
        todo!("{counter} {header:?} {} {TAG_BYTES}", data.len())
    }

    /// Open ciphertext and tag into `out`, which has room for exactly the plaintext and does not overlap. If it
    /// is forged `out` is all zeros.
    pub fn open_separate(
        &self,
        counter: u64,
        header: &[u8; HEADER_BYTES],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), Forged> {
        todo!("{counter} {header:?} {} {}", sealed.len(), out.len())
    }
}
