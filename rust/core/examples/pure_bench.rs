//! What the pure parts of the data path cost for each packet: `cargo run --release --example pure_bench`.
//!
//! Each figure is the best of several rounds, in nanoseconds for a packet that lies in the nearest cache.

use std::hint::black_box;
use std::time::Instant;

use nebula_mp_core::checksum::sum;
use nebula_mp_core::coalesce::Run;
use nebula_mp_core::ip::parse_flow;
use nebula_mp_core::segment::Cut;
use nebula_mp_core::virtio::VirtioHeader;

const ROUNDS: usize = 15;
const REPEATS: usize = 2_000;

/// Nanoseconds that one packet takes of `packets` in each call.
fn best(packets: usize, mut call: impl FnMut()) -> f64 {
    let round = |_| {
        let begin = Instant::now();
        for _ in 0..REPEATS {
            call();
        }
        begin.elapsed().as_nanos() as f64 / (REPEATS * packets) as f64
    };
    (0..ROUNDS).map(round).fold(f64::INFINITY, f64::min)
}

/// A superpacket of TCP over IPv4 with timestamps, of `count` packets of `size` bytes.
fn superpacket(count: usize, size: usize) -> (VirtioHeader, Vec<u8>) {
    const HEADER_BYTES: usize = 52;
    let payload = size - HEADER_BYTES;
    let mut packet = vec![0x5A; HEADER_BYTES + count * payload];
    packet[..HEADER_BYTES].fill(0);
    let length = packet.len() as u16;
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet[6] = 0x40;
    packet[8] = 64;
    packet[9] = 6;
    packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    packet[20..24].copy_from_slice(&[0x9C, 0x40, 0xC3, 0x50]);
    packet[32] = 8 << 4;
    packet[33] = 0x10;
    let pseudo = u64::from(sum(&packet[12..20])) + 6 + u64::from(length) - 20;
    let seed = nebula_mp_core::checksum::fold(pseudo);
    packet[36..38].copy_from_slice(&seed.to_be_bytes());
    let mut header = [1, 1, 0, 0, 0, 0, 20, 0, 16, 0];
    header[4..6].copy_from_slice(&(payload as u16).to_ne_bytes());
    let parsed = VirtioHeader::parse(&header, &packet, packet.len());
    (parsed.expect("a right superpacket"), packet)
}

fn main() {
    for size in [1300, 64] {
        let count = 48;
        let (header, packet) = superpacket(count, size);
        let cut = Cut::new(&header, &packet, packet.len()).expect("a superpacket");
        let mut out = vec![0; count * size];
        let one = vec![0xA5; size];
        cut.place(&packet, &mut out, size, 0, count);
        cut.stamp(&mut out, size, 0, count);
        let sent = out.clone();

        let sums = best(1, || {
            black_box(sum(black_box(&one)));
        });
        let flows = best(1, || {
            let _ = black_box(parse_flow(black_box(&sent[..size]), true));
        });
        let stamps = best(count, || cut.stamp(black_box(&mut out), size, 0, count));
        let writes = best(count, || {
            for number in 0..count {
                cut.write_one(black_box(&packet), number, black_box(&mut out[..size]));
            }
        });
        let joins = best(count, || {
            let mut run = Run::begin(black_box(&sent[..size])).expect("a first packet");
            for packet in sent.chunks_exact(size).skip(1) {
                assert!(run.try_add(black_box(packet)));
            }
        });
        println!(
            "{size:5} bytes: sum {sums:.1}, parse_flow {flows:.1}, stamp {stamps:.1}, \
             write_one {writes:.1}, try_add {joins:.1} ns"
        );
    }
}
