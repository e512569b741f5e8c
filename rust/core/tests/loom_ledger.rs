//! All orders in which two sealers and control can touch the words of a tunnel's counters, on loom's atomics:
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_ledger`.

#![cfg(loom)]

use std::sync::atomic::Ordering::{self, Relaxed, Release};

use loom::sync::atomic::AtomicU64;
use loom::sync::Arc;
use loom::thread;
use nebula_mp_core::layout::{LIVE, ROWS_AT_WORD, TOUCHED};
use nebula_mp_core::ledger::{Ledger, Refusal, Words, SPAN_MAX};
use nebula_mp_core::words::Word;

/// A table of two workers and one row, as it is once the row's first tunnel was opened.
struct Table {
    /// Counter, generation, sealers.
    send: [AtomicU64; 3],
    /// Generation, first, until, live, touched.
    spans: [[AtomicU64; 5]; 2],
    released: [AtomicU64; 2],
}

fn table() -> Arc<Table> {
    let word = AtomicU64::new;
    let span = || [word(0), word(0), word(0), word(1), word(1)];
    Arc::new(Table {
        send: [word(2), word(1), word(0)],
        spans: [span(), span()],
        released: [word(0), word(0)],
    })
}

impl Table {
    /// As `SendCounters.close` and `open` in Python.
    fn reopen(&self, generation: u64) {
        let [counter, current, sealers] = &self.send;
        current.store(0, Release);
        current.store(generation, Release);
        sealers.store(0, Release);
        counter.store(2, Release);
    }
}

struct Watched<'a>(&'a AtomicU64);

impl Word for Watched<'_> {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }

    fn compare_exchange(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        self.0.compare_exchange(current, new, success, failure)
    }

    fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.0.fetch_or(value, order)
    }
}

struct Seen(Arc<Table>);

impl Words for Seen {
    fn send(&self, index: usize) -> impl Word {
        Watched(&self.0.send[index - ROWS_AT_WORD])
    }

    fn span(&self, worker: usize, index: usize) -> impl Word {
        let place = match index {
            LIVE => 3,
            TOUCHED => 4,
            row => row - ROWS_AT_WORD,
        };
        Watched(&self.0.spans[worker][place])
    }

    fn released(&self, worker: usize) -> impl Word {
        Watched(&self.0.released[worker])
    }
}

/// A batch: generation, first counter, how many.
type Batch = (u64, u64, u64);

fn sealer(table: &Arc<Table>, worker: usize) -> Ledger<Seen> {
    Ledger::new(Seen(Arc::clone(table)), 1, 2, Some(worker), 0).unwrap()
}

fn model(check: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(check);
}

/// Runs sealers and `meanwhile` at once; gives what each sealer was given, in order.
fn at_once(
    table: &Arc<Table>,
    wanted: [&'static [(u64, u64)]; 2],
    meanwhile: impl FnOnce(&Table),
) -> [Vec<Batch>; 2] {
    let running = [0, 1].map(|worker| {
        let table = Arc::clone(table);
        let wanted = wanted[worker];
        thread::spawn(move || {
            let mut ledger = sealer(&table, worker);
            let mut given = Vec::new();
            for (area, &(generation, count)) in wanted.iter().enumerate() {
                let taken = ledger.reserve(0, generation, count, Some(area as u64), false);
                match taken.unwrap() {
                    Ok(first) => given.push((generation, first, count)),
                    Err(Refusal::Gone | Refusal::Span) => {}
                    Err(Refusal::Exhausted) => unreachable!(),
                }
            }
            given
        })
    });
    meanwhile(table);
    running.map(|each| each.join().unwrap())
}

fn assert_all_different(given: &[Vec<Batch>; 2]) {
    for &(generation, first, count) in &given[0] {
        for &(other, begin, size) in &given[1] {
            assert!(
                generation != other || first + count <= begin || begin + size <= first,
                "{given:?}"
            );
        }
    }
}

#[test]
fn two_sealers_never_take_the_same_counter_and_keep_the_span() {
    model(|| {
        let table = table();
        let given = at_once(&table, [&[(1, 300), (1, 300)], &[(1, 300)]], |_| {});
        assert_all_different(&given);
        // Nothing was released: all of it is in flight.
        for (worker, other) in [(0, 1), (1, 0)] {
            for (_, first, count) in &given[worker] {
                for (_, oldest, _) in &given[other] {
                    let last = first + count - 1;
                    assert!(oldest > first || last <= oldest + SPAN_MAX, "{given:?}");
                }
            }
        }
        let taken: u64 = given.iter().flatten().map(|batch| batch.2).sum();
        assert_eq!(table.send[0].load(Relaxed), 2 + taken);
    });
}

#[test]
fn while_the_row_is_given_to_another_tunnel_no_counter_is_taken_twice_for_either() {
    model(|| {
        let table = table();
        let given = at_once(&table, [&[(1, 10)], &[(1, 10), (2, 10)]], |table| {
            table.reopen(2);
        });
        assert_all_different(&given);
    });
}

#[test]
fn what_a_refused_sealer_took_back_holds_nobody_back() {
    model(|| {
        let table = table();
        let given = at_once(&table, [&[(1, 400)], &[(1, 400)]], |_| {});
        // One of them was first, and the other one would end beyond the span.
        assert_eq!(given[0].len() + given[1].len(), 1, "{given:?}");
        let winner = usize::from(given[0].is_empty());
        let mut again = sealer(&table, winner);
        let taken = again.reserve(0, 1, 4000, Some(1), false).unwrap();
        assert_eq!(taken, Ok(403));
    });
}
