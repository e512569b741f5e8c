//! Counters and traffic in regions, also of several threads at once.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;
use crate::layout::{RING_STATE, ROWS_AT, SEND, SPAN, TOUCHED, TRAFFIC};
use crate::testing::Memory;

const ROWS: usize = 4;
const ROW: usize = 2;

struct Tables {
    send: Memory,
    spans: Vec<Memory>,
    states: Vec<Memory>,
}

fn tables(workers: usize) -> Tables {
    let tables = Tables {
        send: Memory::new(&SEND, ROWS_AT + 64 * ROWS, &[ROWS as u64]),
        spans: (0..workers)
            .map(|_| Memory::new(&SPAN, ROWS_AT + 32 * ROWS, &[ROWS as u64]))
            .collect(),
        states: (0..workers)
            .map(|_| Memory::new(&RING_STATE, PAGE_BYTES, &[]))
            .collect(),
    };
    for span in &tables.spans {
        span.patch_word(crate::layout::LIVE, 1);
    }
    tables
}

fn open(send: &Region, row: usize, generation: u64) {
    let words = &send.words()[ROWS_AT_WORD + 8 * row..];
    words[1].store(generation, Ordering::Release);
    words[2].store(0, Ordering::Release);
    words[0].store(2, Ordering::Release);
}

/// Descriptors, which may go to another thread.
#[derive(Clone)]
struct Fds {
    send: RawFd,
    spans: Vec<(RawFd, RawFd)>,
    states: Vec<RawFd>,
}

impl Tables {
    fn fds(&self) -> Fds {
        Fds {
            send: self.send.writer(),
            spans: self
                .spans
                .iter()
                .map(|it| (it.writer(), it.reader()))
                .collect(),
            states: self.states.iter().map(Memory::reader).collect(),
        }
    }
}

impl Fds {
    fn sealer(&self, worker: Option<usize>, published: u64) -> Result<SendCounters> {
        let span = |(number, &(writer, reader)): (usize, &(RawFd, RawFd))| {
            let own = worker == Some(number);
            Region::attach(
                if own { writer } else { reader },
                &SPAN,
                own,
                &number.to_string(),
            )
        };
        let state = |(number, &state): (usize, &RawFd)| {
            Region::attach(state, &RING_STATE, false, &format!("seal/{number}"))
        };
        SendCounters::new(
            Region::attach(self.send, &SEND, true, "")?,
            self.spans
                .iter()
                .enumerate()
                .map(span)
                .collect::<Result<_>>()?,
            worker,
            self.states
                .iter()
                .enumerate()
                .map(state)
                .collect::<Result<_>>()?,
            published,
        )
    }
}

#[test]
fn counters_and_spans_are_where_python_looks_for_them() {
    let tables = tables(2);
    open(&tables.send.writable(), ROW, 9);
    let mut first = tables.fds().sealer(Some(0), 0).unwrap();
    let mut second = tables.fds().sealer(Some(1), 0).unwrap();

    assert_eq!(first.reserve(ROW, 9, 10, Some(4), false), Ok(Ok(3)));
    assert_eq!(
        second.reserve(ROW, 9, 512, Some(0), false),
        Ok(Err(Refusal::Span))
    );
    assert_eq!(second.reserve(ROW, 9, 512, Some(0), true), Ok(Ok(13)));

    assert_eq!(second.beyond_span(), 1);
    let send: Vec<u64> = (0..4)
        .map(|word| tables.send.word(ROWS_AT_WORD + 8 * ROW + word))
        .collect();
    assert_eq!(send, [524, 9, 0b11, 0]);
    let span: Vec<u64> = (0..4)
        .map(|word| tables.spans[0].word(ROWS_AT_WORD + 4 * ROW + word))
        .collect();
    assert_eq!(span, [9, 3, 5, 0]);
    assert_eq!(tables.spans[0].word(TOUCHED), ROW as u64 + 1);

    // The fifth area was released.
    tables.states[0].patch_word(TAIL, 5);
    assert_eq!(second.reserve(ROW, 9, 1000, Some(0), false), Ok(Ok(525)));
}

#[test]
fn regions_that_contradict_each_other_or_themselves_are_refused() {
    let said = |tables: &Tables| tables.fds().sealer(Some(0), 0).err().unwrap().to_string();

    let mut odd = tables(2);
    odd.spans[1] = Memory::new(&SPAN, ROWS_AT + 32 * 3, &[3]);
    assert_eq!(
        said(&odd),
        "shared memory 'span 1': number of rows is 3, expected 4"
    );

    let mut odd = tables(2);
    odd.states[1] = Memory::new(&RING_STATE, 64, &[]);
    assert_eq!(
        said(&odd),
        "shared memory 'ring state seal/1': size is 64, expected 4096"
    );

    let odd = tables(2);
    odd.spans[0].patch_word(TOUCHED, 5);
    assert_eq!(
        said(&odd),
        "shared memory 'send counters': rows touched is 5, expected at most 4"
    );

    let odd = tables(2);
    open(&odd.send.writable(), ROW, 1);
    odd.send.patch_word(ROWS_AT_WORD + 8 * ROW + 2, 1 << 40);
    let taken = odd
        .fds()
        .sealer(Some(0), 0)
        .unwrap()
        .reserve(ROW, 1, 1, Some(0), false);
    let expected = "shared memory 'send counters': sealer is 40, expected less than 2";
    assert_eq!(taken.unwrap_err().to_string(), expected);
}

/// What a thread has taken: generation, first counter, how many.
type Taken = Vec<(u64, u64, u64)>;

fn assert_all_different(mut taken: Taken) {
    taken.sort_unstable();
    for pair in taken.windows(2) {
        let [(generation, first, count), (next, behind, _)] = *pair else {
            unreachable!()
        };
        assert!(generation != next || first + count <= behind, "{pair:?}");
    }
}

#[test]
fn sealers_that_run_at_once_never_take_the_same_counter() {
    let tables = tables(3);
    open(&tables.send.writable(), ROW, 1);
    let fds = tables.fds();
    let run = |worker: Option<usize>| {
        let fds = fds.clone();
        move || {
            let mut counters = fds.sealer(worker, 0).unwrap();
            let mut taken = Taken::new();
            for number in 0..20_000_u64 {
                let count = 1 + number % 64;
                // Some batches are given up, as by a sealer that was killed.
                match counters
                    .reserve(ROW, 1, count, worker.map(|_| number / 50), true)
                    .unwrap()
                {
                    Ok(first) if number % 7 != 0 => taken.push((1, first, count)),
                    Ok(_) => {}
                    Err(refused) => panic!("{refused:?}"),
                }
            }
            taken
        }
    };
    let taken: Taken = std::thread::scope(|scope| {
        let workers = [Some(0), Some(1), Some(2), None];
        let running: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(run(worker)))
            .collect();
        running
            .into_iter()
            .flat_map(|each| each.join().unwrap())
            .collect()
    });
    let each: u64 = (0..20_000).map(|number| 1 + number % 64).sum();
    assert_eq!(tables.send.word(ROWS_AT_WORD + 8 * ROW), 2 + 4 * each);
    assert_all_different(taken);
}

#[test]
fn while_the_row_goes_from_tunnel_to_tunnel_no_counter_is_taken_twice_for_one_of_them() {
    let tables = tables(2);
    let fds = tables.fds();
    open(&tables.send.writable(), ROW, 1);
    let done = AtomicBool::new(false);
    let generation = AtomicU64::new(1);
    let taken = AtomicU64::new(0);
    let run = |worker: usize| {
        let (fds, done, generation, count) = (fds.clone(), &done, &generation, &taken);
        move || {
            let mut counters = fds.sealer(Some(worker), 0).unwrap();
            let mut taken = Taken::new();
            let mut area = 0;
            while !done.load(Ordering::Acquire) {
                // As read from the tunnel's row: perhaps of a tunnel that is gone by now.
                let now = generation.load(Ordering::Acquire);
                for _ in 0..20 {
                    area += 1;
                    if let Ok(first) = counters.reserve(ROW, now, 1, Some(area), false).unwrap() {
                        taken.push((now, first, 1));
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            taken
        }
    };
    let all: Taken = std::thread::scope(|scope| {
        let running = [0, 1].map(|worker| scope.spawn(run(worker)));
        let send = tables.send.writable();
        let mut next = 1;
        // A busy machine may run the workers late, and then it goes on until they had their part.
        while next < 20_000 || taken.load(Ordering::Relaxed) <= 100 {
            next += 1;
            send.word(ROWS_AT_WORD + 8 * ROW + 1)
                .store(0, Ordering::Release);
            open(&send, ROW, next);
            generation.store(next, Ordering::Release);
            if next % 64 == 0 {
                std::thread::yield_now();
            }
        }
        done.store(true, Ordering::Release);
        running
            .into_iter()
            .flat_map(|each| each.join().unwrap())
            .collect()
    });
    assert!(all.len() > 100);
    assert_all_different(all);
}

#[test]
fn a_fast_worker_waits_for_a_slow_one_and_is_never_too_far_ahead() {
    let tables = tables(2);
    open(&tables.send.writable(), ROW, 1);
    let fds = tables.fds();
    let slow_state = tables.states[0].writer();
    // The counter that the slow one holds and has not sent.
    let held = AtomicU64::new(u64::MAX);
    let done = AtomicBool::new(false);
    let slow = || {
        let mut counters = fds.sealer(Some(0), 0).unwrap();
        let state = Region::attach(slow_state, &RING_STATE, true, "").unwrap();
        for area in 0..150 {
            // Regardless of the fast one, which sends nothing.
            let first = counters.reserve(ROW, 1, 60, Some(area), true).unwrap();
            held.store(first.unwrap(), Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_micros(100));
            held.store(u64::MAX, Ordering::SeqCst);
            state.word(TAIL).store(area + 1, Ordering::Release);
        }
        done.store(true, Ordering::Release);
    };
    let (mut refused, mut worst, mut area) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(slow);
        let mut counters = fds.sealer(Some(1), 0).unwrap();
        while !done.load(Ordering::Acquire) {
            match counters.reserve(ROW, 1, 60, Some(area), false).unwrap() {
                Ok(first) => {
                    let other = held.load(Ordering::SeqCst);
                    worst = worst.max((first + 59).saturating_sub(other));
                    area += 1;
                }
                Err(Refusal::Span) => refused += 1,
                Err(other) => panic!("{other:?}"),
            }
        }
    });
    assert!(worst <= SPAN_MAX, "{worst}");
    assert!(refused > 100 && area > 100, "{refused} {area}");
}

fn traffic() -> (Memory, Traffic) {
    let memory = Memory::new(&TRAFFIC, ROWS_AT + 64 * ROWS, &[ROWS as u64]);
    let traffic = Traffic::new(memory.writable()).unwrap();
    (memory, traffic)
}

fn share(memory: &Memory) -> Vec<u64> {
    (0..8)
        .map(|word| memory.word(ROWS_AT_WORD + 8 * ROW + word))
        .collect()
}

#[test]
fn traffic_is_summed_by_direction_with_the_time_of_the_last() {
    let (memory, traffic) = traffic();
    traffic.received(ROW, 3, 2, 300, 1000);
    traffic.sent(ROW, 3, 10, 15_000, 1001);
    traffic.received(ROW, 3, 1, 100, 1002);
    assert_eq!(share(&memory), [3, 3, 400, 1002, 10, 15_000, 1001, 0]);
}

#[test]
fn the_rows_next_tunnel_has_no_traffic_yet() {
    let (memory, traffic) = traffic();
    traffic.received(ROW, 3, 2, 300, 1000);
    traffic.sent(ROW, 3, 2, 300, 1000);
    traffic.sent(ROW, 4, 1, 90, 2000);
    assert_eq!(share(&memory), [4, 0, 0, 0, 1, 90, 2000, 0]);
}

#[test]
fn any_count_that_a_mad_process_left_can_be_added_to_and_rows_end_where_the_table_does() {
    let (memory, traffic) = traffic();
    traffic.sent(ROW, 3, 1, 1, 1);
    memory.patch_word(ROWS_AT_WORD + 8 * ROW + PACKETS_OUT, u64::MAX);
    traffic.sent(ROW, 3, 2, 1, 1);
    assert_eq!(share(&memory)[PACKETS_OUT], 1);
    traffic.sent(ROWS, 3, 1, 1, 1);
}
