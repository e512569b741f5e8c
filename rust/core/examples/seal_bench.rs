//! What it costs to seal what a TUN queue gives: `cargo run --release --example seal_bench`.
//!
//! A socket pair stands in for the device. Each line is the median over many polls, with all of it: read, look-ups,
//! counters, headers, checksums, seals and the publishing of the area. The first column is the read alone, to one
//! piece of memory.

#[path = "../tests/common/memory.rs"]
mod memory;
#[path = "../tests/common/packets.rs"]
mod packets;
#[path = "../tests/sealer/plans.rs"]
#[allow(dead_code, unused_imports)]
mod plans;
#[path = "../tests/sealer/site.rs"]
#[allow(dead_code)]
mod site;

use std::time::Instant;

use nebula_mp_core::aead::{Cipher, Key};

use plans::{frame, plain, small, tcp, udp, TIMESTAMPS};
use site::{Shape, Site};

const ROUNDS: usize = 3000;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Microseconds of one call, with all that `frames` are read in.
fn time(mut each: impl FnMut(usize) -> f64) -> f64 {
    (0..ROUNDS / 10).for_each(|number| {
        each(number);
    });
    median((0..ROUNDS).map(each).collect())
}

fn micros(work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_nanos() as f64 / 1000.0
}

fn main() {
    let mut options = tcp(1248, 49 * 1248);
    options.options = TIMESTAMPS.to_vec();
    let bulk = frame(&options);
    let short = frame(&tcp(1248, 10 * 1248));
    let datagrams = frame(&udp(1200, 50 * 1200));
    let small_segments = frame(&tcp(536, 60_000));
    let cases: [(&str, Vec<Vec<u8>>); 9] = [
        ("superpacket, 49 x 1248, TCP", vec![bulk.clone()]),
        ("superpacket, 10 x 1248, TCP", vec![short]),
        ("superpacket, 50 x 1200, UDP", vec![datagrams]),
        ("superpacket, 112 x 536, TCP", vec![small_segments]),
        ("superpacket and a small packet", vec![bulk, plain(1, 64)]),
        ("one packet of 64 bytes", vec![plain(1, 64)]),
        ("one packet of 1200 bytes", vec![plain(1, 1200)]),
        ("8 packets of 64 bytes", vec![plain(1, 64); 8]),
        ("8 packets of 1200 bytes", vec![plain(1, 1200); 8]),
    ];
    println!(
        "{:32} {:>9} {:>9} {:>9} {:>6}",
        "us", "read", "all", "seal", "placed"
    );
    for (name, frames) in &cases {
        run(name, frames);
    }
}

fn run(name: &str, frames: &[Vec<u8>]) {
    let mut site = Site::new(Shape {
        areas: 32,
        poison: false,
        ..Shape::default()
    });
    for plan in [tcp(1, 1), udp(1, 1)] {
        site.allow(&plan.packet());
    }
    site.allow(&small(1, 64));
    let mut buffer = vec![0; 70_000];
    let give = |site: &Site| frames.iter().for_each(|frame| site.give(frame));
    let read = time(|_| {
        give(&site);
        micros(|| {
            frames.iter().for_each(|_| {
                site.tun.recv(&mut buffer).unwrap();
            });
            site.tun.recv(&mut buffer).unwrap_err();
        })
    });
    let mut sealer = site.sealer(0);
    let mut datagrams = 0;
    let all = time(|_| {
        give(&site);
        let spent = micros(|| {
            datagrams = sealer.poll(1000, site.now_us).unwrap();
        });
        let consumer = &mut site.sealed[0];
        while consumer.pending().unwrap() > 0 {
            for number in consumer.load().unwrap()..consumer.len() {
                consumer.entry(number);
            }
            consumer.release().unwrap();
        }
        spent
    });
    // The seals alone, of memory that is at hand.
    give(&site);
    sealer.poll(1000, site.now_us).unwrap();
    let mut wire = site.wire(0);
    let key = Key::new(Cipher::Aes, &site::KEY);
    let seal = time(|number| {
        micros(|| {
            for (each, datagram) in wire.iter_mut().enumerate() {
                if let Some((header, rest)) = datagram.split_first_chunk_mut::<16>() {
                    key.seal_in_place((number * 1000 + each) as u64, header, rest);
                }
            }
        })
    });
    let polls = ROUNDS + ROUNDS / 10 + 1;
    let placed = sealer.scattered() * 100 / polls as u64;
    println!("{name:32} {read:9.2} {all:9.2} {seal:9.2} {placed:5}%");
}
