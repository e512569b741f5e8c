//! What an opened datagram costs, in ns: `cargo run --release --example opener_cost`.
//!
//! Batches come over the loopback interface, and only the opener's pass is timed. What the system call and the
//! AEAD take of it is measured by itself, in turns with it, and what is left is ours. The fastest tenth of the
//! rounds is averaged, so that neighbours of the machine do not count.

#[allow(dead_code)]
#[path = "../tests/opener/host.rs"]
mod host;
#[path = "../tests/common/memory.rs"]
mod memory;
#[allow(dead_code)]
#[path = "../tests/opener/packets.rs"]
mod packets;

use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::time::Instant;

use host::{Host, Plan};
use nebula_mp_core::aead::{Cipher, Key};
use nebula_mp_core::header::{HEADER_BYTES, TAG_BYTES};
use nebula_mp_core::sys;
use packets::Flow;

const ROUNDS: usize = 2000;

/// The mean of the fastest tenth.
fn fastest(mut times: Vec<u128>) -> f64 {
    times.sort_unstable();
    times.truncate(times.len() / 10);
    times.iter().sum::<u128>() as f64 / times.len() as f64
}

fn measure(name: &str, flow_count: usize, count: usize, payload: usize) {
    let mut flows: Vec<_> = (0..flow_count as u16)
        .map(|each| Flow::new(false, true).on_port(5000 + each))
        .collect();
    let mut host = Host::new(Plan {
        poison: false,
        ..Plan::default()
    });
    flows
        .iter()
        .for_each(|each| host.allow(&each.clone().next(1)));
    let key = Key::new(Cipher::Aes, &[7; 32]);
    let (mut buffer, mut out) = (vec![0; 65_536], vec![0; payload + 52]);
    let (mut passes, mut calls, mut opens) = (Vec::new(), Vec::new(), Vec::new());
    let mut counter = 3;
    for _ in 0..ROUNDS {
        let datagrams: Vec<_> = (0..count)
            .map(|each| {
                counter += 1;
                host.seal(counter, &flows[each % flow_count].next(payload))
            })
            .collect();
        let send = |host: &Host| {
            if count > 1 {
                host.deliver_joined(&datagrams);
            } else {
                host.deliver(&datagrams);
            }
        };
        send(&host);
        let begun = Instant::now();
        let received = sys::receive(host.udp.as_raw_fd(), &mut buffer).expect("it was sent");
        let nothing = sys::receive(host.udp.as_raw_fd(), &mut buffer[received.bytes..]);
        calls.push(begun.elapsed().as_nanos());
        assert!(nothing.is_err());

        let mut sealed: Vec<_> = datagrams
            .iter()
            .map(|each| each[HEADER_BYTES..].to_vec())
            .collect();
        for each in &mut sealed {
            key.seal_in_place(1, &[0; HEADER_BYTES], each);
        }
        let begun = Instant::now();
        for each in &sealed {
            let bytes = each.len() - TAG_BYTES;
            let opened = key.open_separate(1, &[0; HEADER_BYTES], each, &mut out[..bytes]);
            black_box(opened).expect("it was sealed so");
        }
        opens.push(begun.elapsed().as_nanos());

        send(&host);
        host.poll(0).expect("memory is right");
        let begun = Instant::now();
        let taken = host.poll(count).expect("memory is right");
        assert_eq!(host.poll(1).expect("memory is right"), 0);
        passes.push(begun.elapsed().as_nanos());
        assert_eq!(taken, count);
        black_box(host.entries());
    }
    let each = |times: Vec<u128>| fastest(times) / count as f64;
    let (pass, call, open) = (each(passes), each(calls), each(opens));
    println!(
        "{name:28} {pass:8.1} = system call {call:7.1} + AEAD {open:6.1} + rest {:6.1}",
        pass - call - open
    );
}

fn main() {
    println!("ns per datagram");
    measure("48 of one flow, 1300 B", 1, 48, 1248);
    measure("48 of two flows, 1300 B", 2, 48, 1248);
    measure("64 of one flow, 64 B", 1, 64, 12);
    measure("alone, 1300 B", 1, 1, 1248);
    measure("alone, 64 B", 1, 1, 12);
}
