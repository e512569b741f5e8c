//! Seal and open with the network's AEAD; the nonce is the 64-bit counter. As `nebula_mp.crypto.aead`.
//!
//! Knows where the counter sits in the nonce; does not know whether a counter was used before. aws-lc-rs by
//! default; the cargo feature `ring`, without the default ones, takes ring instead, which opens in two steps.
//! Source: Noise section 12, RFC 8439, NIST SP 800-38D: 12 bytes of nonce, four zeros and the counter, big-endian
//! for AES-256-GCM, little-endian for ChaCha20-Poly1305.

#[cfg(not(feature = "aws-lc"))]
use ::ring::aead as library;
#[cfg(feature = "aws-lc")]
use aws_lc_rs::aead as library;
use library::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM, CHACHA20_POLY1305, NONCE_LEN};

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

/// One key of one direction, expanded. Wiped when it is dropped, as far as the library does. Has no state: callers
/// see to it that no counter is sealed twice.
pub struct Key {
    cipher: Cipher,
    key: LessSafeKey,
}

impl Key {
    /// `key` is borrowed for the call.
    pub fn new(cipher: Cipher, key: &[u8; 32]) -> Self {
        let algorithm = match cipher {
            Cipher::Aes => &AES_256_GCM,
            Cipher::ChaCha => &CHACHA20_POLY1305,
        };
        let unbound = UnboundKey::new(algorithm, key).expect("both ciphers take keys of 32 bytes");
        Self {
            cipher,
            key: LessSafeKey::new(unbound),
        }
    }

    /// Seal what lies in `data`, but for its last `TAG_BYTES`, in place, and write the tag there. `counter` was
    /// never sealed with this key before.
    ///
    /// # Panics
    ///
    /// If there is no room for the tag, before anything was changed.
    #[inline]
    pub fn seal_in_place(&self, counter: u64, header: &[u8; HEADER_BYTES], data: &mut [u8]) {
        self.seal(counter, header, data);
    }

    /// Open ciphertext and tag into `out`, which has room for exactly the plaintext and does not overlap. If it
    /// is forged, or the lengths do not fit, `out` is all zeros.
    #[inline]
    pub fn open_separate(
        &self,
        counter: u64,
        header: &[u8; HEADER_BYTES],
        sealed: &[u8],
        out: &mut [u8],
    ) -> Result<(), Forged> {
        let opened = match sealed.split_last_chunk::<TAG_BYTES>() {
            Some((ciphertext, tag)) if ciphertext.len() == out.len() => {
                self.open(counter, header, ciphertext, tag, out)
            }
            _ => Err(Forged),
        };
        if opened.is_err() {
            // Nobody can take what was not authentic for a plaintext.
            out.fill(0);
        }
        opened
    }

    /// Write the tag over all of `frame` but its last `TAG_BYTES` there; nothing is encrypted. `counter` is as for
    /// `seal_in_place`.
    ///
    /// # Panics
    ///
    /// If there is no room for the tag, before anything was changed.
    #[inline]
    pub fn seal_frame(&self, counter: u64, frame: &mut [u8]) {
        let at = frame.len().checked_sub(TAG_BYTES).expect("room for a tag");
        let (data, room) = frame.split_at_mut(at);
        self.seal(counter, data, room);
    }

    /// Whether the last `TAG_BYTES` of `frame` are the tag over all that is before them.
    #[inline]
    pub fn open_frame(&self, counter: u64, frame: &[u8]) -> Result<(), Forged> {
        let (data, tag) = frame.split_last_chunk::<TAG_BYTES>().ok_or(Forged)?;
        self.open(counter, data, &[], tag, &mut [])
    }

    fn seal(&self, counter: u64, associated_data: &[u8], data: &mut [u8]) {
        let (plaintext, room) = data
            .split_last_chunk_mut::<TAG_BYTES>()
            .expect("room for a tag");
        let tag = self
            .key
            .seal_in_place_separate_tag(self.nonce(counter), Aad::from(associated_data), plaintext)
            .expect("an IP packet is shorter than what a nonce is good for");
        room.copy_from_slice(tag.as_ref());
    }

    #[cfg(feature = "aws-lc")]
    #[inline]
    fn open(
        &self,
        counter: u64,
        associated_data: &[u8],
        ciphertext: &[u8],
        tag: &[u8; TAG_BYTES],
        out: &mut [u8],
    ) -> Result<(), Forged> {
        self.key
            .open_separate_gather(
                self.nonce(counter),
                Aad::from(associated_data),
                ciphertext,
                tag,
                out,
            )
            .map_err(|_| Forged)
    }

    #[cfg(not(feature = "aws-lc"))]
    fn open(
        &self,
        counter: u64,
        associated_data: &[u8],
        ciphertext: &[u8],
        tag: &[u8; TAG_BYTES],
        out: &mut [u8],
    ) -> Result<(), Forged> {
        out.copy_from_slice(ciphertext);
        self.key
            .open_in_place_separate_tag(
                self.nonce(counter),
                Aad::from(associated_data),
                library::Tag::from(*tag),
                out,
                0..,
            )
            .map(|_| ())
            .map_err(|_| Forged)
    }

    #[inline]
    fn nonce(&self, counter: u64) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[4..].copy_from_slice(&match self.cipher {
            Cipher::Aes => counter.to_be_bytes(),
            Cipher::ChaCha => counter.to_le_bytes(),
        });
        Nonce::assume_unique_for_key(nonce)
    }
}

// The libraries are foreign code, which miri cannot run.
#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    const BOTH: [Cipher; 2] = [Cipher::Aes, Cipher::ChaCha];

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex
            .chars()
            .filter_map(|digit| digit.to_digit(16).map(|value| value as u8))
            .collect();
        digits
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect()
    }

    fn key(cipher: Cipher, hex: &str) -> Key {
        Key::new(cipher, &bytes(hex).try_into().unwrap())
    }

    #[test]
    fn the_tag_of_a_frame_is_over_all_that_is_before_it_and_nothing_is_encrypted() {
        for cipher in BOTH {
            let key = Key::new(cipher, &[7; 32]);
            let content: Vec<u8> = (0..100).collect();
            let mut frame = [content.as_slice(), &[0; TAG_BYTES]].concat();
            key.seal_frame(9, &mut frame);

            assert_eq!(frame[..100], content);
            assert_eq!(frame[100..], sealed(&key, 9, &content, b""));
            assert_eq!(key.open_frame(9, &frame), Ok(()));
            assert_eq!(key.open_frame(10, &frame), Err(Forged));
            for at in [0, 50, 99, 100, 115] {
                let mut forged = frame.clone();
                forged[at] ^= 1;
                assert_eq!(key.open_frame(9, &forged), Err(Forged), "{at}");
            }
            for short in [0, 15, 16, 115] {
                assert_eq!(key.open_frame(9, &frame[..short]), Err(Forged), "{short}");
            }
        }
    }

    fn sealed(key: &Key, counter: u64, associated_data: &[u8], plaintext: &[u8]) -> Vec<u8> {
        let mut data = [plaintext, &[0; TAG_BYTES]].concat();
        key.seal(counter, associated_data, &mut data);
        data
    }

    #[test]
    fn chacha20_poly1305_gives_the_tag_and_text_of_rfc_8439_appendix_a_5() {
        let key = key(
            Cipher::ChaCha,
            "1c9240a5eb55d38af333888604f6b5f0473917c1402b80099dca5cbc207075c0",
        );
        let plaintext = "Internet-Drafts are draft documents valid for a maximum of six months and may be updated, \
            replaced, or obsoleted by other documents at any time. It is inappropriate to use Internet-Drafts as \
            reference material or to cite them other than as /\u{201c}work in progress./\u{201d}";
        let expected = bytes(
            "64a0861575861af460f062c79be643bd5e805cfd345cf389f108670ac76c8cb24c6cfc18755d43eea09ee94e382d26b0bdb7b7\
            3c321b0100d4f03b7f355894cf332f830e710b97ce98c8a84abd0b948114ad176e008d33bd60f982b1ff37c8559797a06ef4f0e\
            f61c186324e2b3506383606907b6a7c02b0f9f6157b53c867e4b9166c767b804d46a59b5216cde7a4e99040c5a40433225ee282\
            a1b0a06c523eaf4534d7f83fa1155b0047718cbc546a0d072b04b3564eea1b422273f548271a0bb2316053fa76991955ebd6315\
            9434ecebb4e466dae5a1073a6727627097a1049e617d91d361094fa68f0ff77987130305beaba2eda04df997b714d6c6f2c29a6\
            ad5cb4022b02709beead9d67890cbb22392336fea1851f38",
        );
        let associated_data = bytes("f33388860000000000004e91");

        let data = sealed(
            &key,
            0x0807_0605_0403_0201,
            &associated_data,
            plaintext.as_bytes(),
        );

        assert_eq!(data, expected);
    }

    #[test]
    fn aes_256_gcm_gives_the_tag_and_text_of_the_gcm_specifications_test_case_14() {
        let key = key(Cipher::Aes, &"00".repeat(32));

        let data = sealed(&key, 0, &[], &[0; 16]);

        let expected = "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919";
        assert_eq!(data, bytes(expected));
    }

    /// Of tests/vectors/handshake.json: cipher, key, counter, datagram.
    const OF_NEBULA: [(Cipher, &str, u64, &str); 3] = [
        (
            Cipher::Aes,
            "d1e22807696911d92f57954309218820c8824551646f627f62f86cf92febf3c7",
            3,
            "11000000a1b2c3d400000000000000032d1c5cfdb5f565558e5b7cf7ca0fe23e6591043d40562de0c50731be8d57543ee1c5873b\
            d36f1f4117720a7f",
        ),
        (
            Cipher::ChaCha,
            "e1c56e9c1a6ed0676acf58d91c2591b16272f87d51a3828f0e0008aab8ea25dc",
            3,
            "11000000a1b2c3d400000000000000038192ed4101ce08cf93624a895f3520cc82b0c6d72eceb134a7cacc744cb7e4277015ee6b\
            ca38ed99348dea72",
        ),
        (
            Cipher::Aes,
            "4b640ef8940ad18f5b220e90539f097fd316580b1ff140055ef8170847281e3c",
            3,
            "11000000112233440000000000000003052ba097afafa517095d54ac7eba87f1f8f6f365a6843e7df008686e7e99c1531b6ca689\
            c3377b3e33aa206f",
        ),
    ];

    #[test]
    fn data_packets_of_nebula_are_sealed_and_opened_byte_for_byte() {
        let plaintext = bytes("4500001c000100004001649b0a2a00010a2a00020800f7fd00010001");
        for (cipher, hex, counter, datagram) in OF_NEBULA {
            let key = key(cipher, hex);
            let datagram = bytes(datagram);
            let (header, rest) = datagram.split_first_chunk::<HEADER_BYTES>().unwrap();

            let mut data = [&plaintext[..], &[0; TAG_BYTES]].concat();
            key.seal_in_place(counter, header, &mut data);
            assert_eq!(data, rest);

            let mut out = vec![1; plaintext.len()];
            assert_eq!(key.open_separate(counter, header, rest, &mut out), Ok(()));
            assert_eq!(out, plaintext);
        }
    }

    #[test]
    fn every_length_comes_back_as_it_was() {
        let header = [7; HEADER_BYTES];
        for cipher in BOTH {
            let key = Key::new(cipher, &[3; 32]);
            for length in (0..70).chain([1300, 8972]) {
                let plaintext: Vec<u8> = (0..length).map(|each| each as u8).collect();
                let mut data = [&plaintext[..], &[0; TAG_BYTES]].concat();
                key.seal_in_place(u64::MAX, &header, &mut data);
                let mut out = vec![0xEE; length];
                assert_eq!(
                    key.open_separate(u64::MAX, &header, &data, &mut out),
                    Ok(())
                );
                assert_eq!(out, plaintext);
            }
        }
    }

    #[test]
    fn whatever_was_changed_is_noticed_and_leaves_zeros() {
        for cipher in BOTH {
            let key = Key::new(cipher, &[3; 32]);
            let header = [7; HEADER_BYTES];
            let mut data = vec![9; 100 + TAG_BYTES];
            key.seal_in_place(5, &header, &mut data);
            let mut other_header = header;
            other_header[15] ^= 1;
            let mut cases = vec![(6, header, data.clone()), (5, other_header, data.clone())];
            for at in [0, 50, 99, 100, 115] {
                let mut changed = data.clone();
                changed[at] ^= 0x80;
                cases.push((5, header, changed));
            }
            for (counter, header, sealed) in cases {
                let mut out = vec![1; 100];
                let opened = key.open_separate(counter, &header, &sealed, &mut out);
                assert_eq!(opened, Err(Forged));
                assert_eq!(out, vec![0; 100]);
            }
            let other = Key::new(cipher, &[4; 32]);
            let mut out = vec![1; 100];
            assert_eq!(
                other.open_separate(5, &header, &data, &mut out),
                Err(Forged)
            );
            assert_eq!(out, vec![0; 100]);
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_forgeries() {
        for cipher in BOTH {
            let key = Key::new(cipher, &[3; 32]);
            let header = [7; HEADER_BYTES];
            let mut data = vec![9; 40 + TAG_BYTES];
            key.seal_in_place(5, &header, &mut data);
            for (sealed, room) in [
                (&data[..], 39),
                (&data, 41),
                (&data[..15], 0),
                (&data[..0], 0),
            ] {
                let mut out = vec![1; room];
                assert_eq!(key.open_separate(5, &header, sealed, &mut out), Err(Forged));
                assert!(out.iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn the_tag_of_nothing_is_checked_too() {
        for cipher in BOTH {
            let key = Key::new(cipher, &[3; 32]);
            let header = [7; HEADER_BYTES];
            let mut tag = [0; TAG_BYTES];
            key.seal_in_place(4, &header, &mut tag);
            assert_eq!(key.open_separate(4, &header, &tag, &mut []), Ok(()));
            tag[0] ^= 1;
            assert_eq!(key.open_separate(4, &header, &tag, &mut []), Err(Forged));
        }
    }

    #[test]
    #[should_panic(expected = "room for a tag")]
    fn nothing_is_left_unsealed_in_silence() {
        Key::new(Cipher::Aes, &[3; 32]).seal_in_place(
            4,
            &[0; HEADER_BYTES],
            &mut [0; TAG_BYTES - 1],
        );
    }
}
