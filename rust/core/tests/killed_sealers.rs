//! Sealers that are processes, killed with SIGKILL at any moment: no counter is ever taken twice.

#![cfg(all(not(miri), not(loom)))]

use std::env;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::thread;
use std::time::{Duration, Instant};

use nebula_mp_core::counters::SendCounters;
use nebula_mp_core::layout::{
    LIVE, RING_STATE, ROWS_AT, ROWS_AT_WORD, SEND, SPAN, STATS, TAIL, TOUCHED,
};
use nebula_mp_core::region::{Layout, Region, PAGE_BYTES};
use nebula_mp_core::testing::Memory;

const WORKERS: usize = 2;
const ROWS: usize = 4;
const ROW: usize = 1;
const LIVES: usize = 40;
/// Batches that a worker notes in its log, at most.
const NOTES: usize = 500_000;
/// In a log: how many batches it has.
const NOTED: usize = 8;

/// How a sealer is told which worker it is, and where the regions are.
const WORKER: &str = "NEBULA_MP_TEST_WORKER";
const MEMORY: &str = "NEBULA_MP_TEST_MEMORY";

struct Tables {
    send: Memory,
    spans: [Memory; WORKERS],
    states: [Memory; WORKERS],
    /// What each worker has taken, noted as soon as it has it: first counter, how many.
    logs: [Memory; WORKERS],
}

fn tables() -> Tables {
    let rows = &[ROWS as u64];
    let tables = Tables {
        send: Memory::new(&SEND, ROWS_AT + 64 * ROWS, rows),
        spans: [(); WORKERS].map(|()| Memory::new(&SPAN, ROWS_AT + 32 * ROWS, rows)),
        states: [(); WORKERS].map(|()| Memory::new(&RING_STATE, PAGE_BYTES, &[])),
        logs: [(); WORKERS].map(|()| Memory::new(&STATS, ROWS_AT + 16 * NOTES, &[])),
    };
    for span in &tables.spans {
        span.patch_word(LIVE, 1);
    }
    for (word, value) in [(1, 7), (0, 2)] {
        tables.send.patch_word(ROWS_AT_WORD + 8 * ROW + word, value);
    }
    tables
}

/// A process that seals until it is killed, at the latest when this is dropped.
struct Sealer(Child);

impl Drop for Sealer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Tables {
    fn start(&self, worker: usize) -> Sealer {
        let each = self.spans.iter().chain(&self.states).chain(&self.logs);
        let places: Vec<String> = std::iter::once(&self.send)
            .chain(each)
            .map(|memory| format!("/proc/{}/fd/{}", process::id(), memory.writer()))
            .collect();
        let child = Command::new(env::current_exe().unwrap())
            .args(["--ignored", "--exact", "a_sealer"])
            .env(WORKER, worker.to_string())
            .env(MEMORY, places.join(" "))
            .stdout(Stdio::null())
            .spawn();
        Sealer(child.unwrap())
    }

    fn noted(&self, worker: usize) -> u64 {
        self.logs[worker].word(NOTED)
    }
}

fn attach(place: &str, layout: &Layout, writable: bool) -> Region {
    let file: File = OpenOptions::new()
        .read(true)
        .write(writable)
        .open(place)
        .unwrap();
    Region::attach(file.as_raw_fd(), layout, writable, "").unwrap()
}

#[test]
#[ignore = "the process that the other test starts and kills"]
fn a_sealer() {
    let worker: usize = env::var(WORKER).unwrap().parse().unwrap();
    let places = env::var(MEMORY).unwrap();
    let places: Vec<&str> = places.split(' ').collect();
    let (spans, rest) = places[1..].split_at(WORKERS);
    let (states, logs) = rest.split_at(WORKERS);
    let own = attach(states[worker], &RING_STATE, true);
    let log = attach(logs[worker], &STATS, true);
    let mut area = own.word(TAIL).load(Acquire);
    let mut counters = SendCounters::new(
        attach(places[0], &SEND, true),
        spans
            .iter()
            .enumerate()
            .map(|(number, place)| attach(place, &SPAN, number == worker))
            .collect(),
        Some(worker),
        states
            .iter()
            .map(|place| attach(place, &RING_STATE, false))
            .collect(),
        area,
    )
    .unwrap();
    loop {
        let noted = log.word(NOTED).load(Relaxed);
        if noted as usize == NOTES {
            thread::sleep(Duration::from_secs(60)); // until it is killed
            return; // nobody is there any more who would
        }
        let count = 1 + noted % 64;
        let first = counters
            .reserve(ROW, 7, count, Some(area), true)
            .unwrap()
            .unwrap();
        let note = ROWS_AT_WORD + 2 * noted as usize;
        log.word(note).store(first, Relaxed);
        log.word(note + 1).store(count, Relaxed);
        log.word(NOTED).store(noted + 1, Release);
        if noted % 8 == 0 {
            area += 1;
            own.word(TAIL).store(area, Release);
        }
    }
}

#[test]
fn whenever_sealers_are_killed_no_counter_is_taken_twice() {
    let tables = tables();
    let mut running = [0, 1].map(|worker| tables.start(worker));
    for life in 0..LIVES {
        let worker = life % WORKERS;
        let (before, begun) = (tables.noted(worker), Instant::now());
        // It has begun to seal, and is anywhere in it.
        while tables.noted(worker) == before && begun.elapsed() < Duration::from_secs(20) {
            thread::sleep(Duration::from_micros(100));
        }
        assert!(tables.noted(worker) > before || before as usize == NOTES);
        thread::sleep(Duration::from_micros(37 * life as u64 % 1000));
        let killed = &mut running[worker].0;
        killed.kill().unwrap();
        killed.wait().unwrap();
        running[worker] = tables.start(worker);
    }
    drop(running);

    let mut taken = Vec::new();
    for (worker, log) in tables.logs.iter().enumerate() {
        for note in 0..tables.noted(worker) as usize {
            let word = ROWS_AT_WORD + 2 * note;
            taken.push((log.word(word), log.word(word + 1)));
        }
    }
    taken.sort_unstable();
    assert!(taken.len() > LIVES);
    for pair in taken.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
    }
    let (first, count) = taken[taken.len() - 1];
    assert!(first + count - 1 <= tables.send.word(ROWS_AT_WORD + 8 * ROW));
    assert_eq!(tables.spans[0].word(TOUCHED), ROW as u64 + 1);
}
