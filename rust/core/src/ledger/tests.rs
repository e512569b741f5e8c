//! Counters on plain words: one sealer after the other, one between the steps of another, and deaths at each store.

use std::cell::{Cell, RefCell};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

const ROWS: usize = 8;
const ROW: usize = 5;

/// The words of all regions. Their maker marks every worker as live.
struct Table {
    send: Vec<AtomicU64>,
    spans: Vec<Vec<AtomicU64>>,
    released: Vec<AtomicU64>,
}

fn zeros(words: usize) -> Vec<AtomicU64> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

fn table_of(workers: usize, rows: usize) -> Rc<Table> {
    let table = Table {
        send: zeros(ROWS_AT_WORD + rows * SEND_WORDS),
        spans: (0..workers)
            .map(|_| zeros(ROWS_AT_WORD + rows * SPAN_WORDS))
            .collect(),
        released: zeros(workers),
    };
    for span in &table.spans {
        span[LIVE].store(1, Relaxed);
    }
    Rc::new(table)
}

fn table(workers: usize) -> Rc<Table> {
    table_of(workers, ROWS)
}

impl Table {
    /// As `SendCounters.open` in Python.
    fn open(&self, row: usize, generation: u64) {
        let word = ROWS_AT_WORD + row * SEND_WORDS;
        self.send[word + GENERATION].store(generation, Release);
        self.send[word + SEALERS].store(0, Release);
        self.send[word + COUNTER].store(2, Release);
    }

    fn last(&self, row: usize) -> u64 {
        self.send[ROWS_AT_WORD + row * SEND_WORDS + COUNTER].load(Relaxed)
    }

    fn release(&self, worker: usize, areas: u64) {
        self.released[worker].store(areas, Relaxed);
    }

    fn rows(&self) -> usize {
        (self.send.len() - ROWS_AT_WORD) / SEND_WORDS
    }
}

/// What happens to a sealer at its stores.
#[derive(Default)]
struct Fate {
    /// How many more stores it lives for.
    stores: Option<Cell<usize>>,
    /// What others do before its next swap.
    before_swap: RefCell<Vec<Box<dyn FnOnce()>>>,
}

struct Killed;

impl Fate {
    fn step(&self) {
        if let Some(left) = &self.stores {
            if left.get() == 0 {
                resume_unwind(Box::new(Killed));
            }
            left.set(left.get() - 1);
        }
    }
}

struct Watched<'a>(&'a AtomicU64, &'a Fate);

impl Word for Watched<'_> {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.1.step();
        self.0.store(value, order);
    }

    fn compare_exchange(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        let next = self.1.before_swap.borrow_mut().pop();
        if let Some(others) = next {
            others();
        }
        self.1.step();
        self.0.compare_exchange(current, new, success, failure)
    }

    fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.1.step();
        self.0.fetch_or(value, order)
    }
}

struct Seen {
    table: Rc<Table>,
    fate: Rc<Fate>,
}

impl Words for Seen {
    fn send(&self, index: usize) -> impl Word {
        Watched(&self.table.send[index], &self.fate)
    }

    fn span(&self, worker: usize, index: usize) -> impl Word {
        Watched(&self.table.spans[worker][index], &self.fate)
    }

    fn released(&self, worker: usize) -> impl Word {
        Watched(&self.table.released[worker], &self.fate)
    }
}

fn fated(table: &Rc<Table>, worker: Option<usize>, published: u64, fate: Rc<Fate>) -> Ledger<Seen> {
    let (rows, workers) = (table.rows(), table.spans.len());
    let table = Rc::clone(table);
    Ledger::new(Seen { table, fate }, rows, workers, worker, published).unwrap()
}

fn sealer(table: &Rc<Table>, worker: usize, published: u64) -> Ledger<Seen> {
    fated(table, Some(worker), published, Rc::default())
}

fn control(table: &Rc<Table>) -> Ledger<Seen> {
    fated(table, None, 0, Rc::default())
}

type Taken = Result<u64, Refusal>;

impl Ledger<Seen> {
    fn take(&mut self, generation: u64, count: u64, area: u64) -> Taken {
        self.reserve(ROW, generation, count, Some(area), false)
            .unwrap()
    }

    fn take_regardless(&mut self, count: u64, area: u64) -> Taken {
        self.reserve(ROW, 1, count, Some(area), true).unwrap()
    }
}

const SPAN: Taken = Err(Refusal::Span);

#[test]
fn counters_go_on_behind_the_handshakes_whoever_takes_them() {
    let table = table(3);
    let (mut first, mut second) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    let by_control = control(&table).reserve(ROW, 1, 1, None, false);
    let taken = [
        first.take(1, 50, 0),
        second.take(1, 1, 0),
        first.take(1, 2, 0),
        second.take(1, 1, 0),
    ];
    assert_eq!(by_control, Ok(Ok(3)));
    assert_eq!(taken, [Ok(4), Ok(54), Ok(55), Ok(57)]);
    assert_eq!(table.last(ROW), 57);
    assert_eq!(first.take(2, 1, 0), Err(Refusal::Gone));
}

#[test]
fn no_counter_at_or_beyond_the_limit_is_given_out() {
    let cases = [
        (COUNTER_LIMIT - 2, 1, true),
        (COUNTER_LIMIT - 1, 1, false),
        (COUNTER_LIMIT - 53, 52, true),
        (COUNTER_LIMIT - 52, 52, false),
        (u64::MAX, 52, false),
    ];
    for (last, count, allowed) in cases {
        let table = table(2);
        table.open(ROW, 1);
        table.send[ROWS_AT_WORD + ROW * SEND_WORDS + COUNTER].store(last, Relaxed);
        let expected = if allowed {
            Ok(last + 1)
        } else {
            Err(Refusal::Exhausted)
        };
        assert_eq!(sealer(&table, 0, 0).take(1, count, 0), expected);
        assert_eq!(table.last(ROW), if allowed { last + count } else { last });
    }
}

#[test]
fn a_row_beyond_the_table_has_no_tunnel() {
    let table = table(2);
    let taken = sealer(&table, 0, 0).reserve(ROWS, 0, 1, Some(0), false);
    assert_eq!(taken, Ok(Err(Refusal::Gone)));
}

#[test]
#[should_panic(expected = "no counters are no batch")]
fn nobody_takes_no_counter() {
    let table = table(1);
    table.open(ROW, 1);
    let _ = sealer(&table, 0, 0).take(1, 0, 0);
}

#[test]
fn a_batch_may_end_512_above_what_another_worker_has_not_sent_and_no_further() {
    let table = table(3);
    let (mut slow, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    assert_eq!(slow.take(1, 10, 0), Ok(3));

    assert_eq!(fast.take(1, SPAN_MAX - 9, 0), Ok(13)); // ends at 515
    assert_eq!(fast.take(1, 1, 0), SPAN);
    assert_eq!(fast.beyond_span, 0);

    table.release(0, 1);
    assert_eq!(fast.take(1, 400, 0), Ok(516));
}

#[test]
fn a_single_worker_has_nobody_to_tell_what_it_has_in_flight() {
    let table = table(1);
    table.open(ROW, 1);
    assert_eq!(sealer(&table, 0, 0).take(1, SPAN_MAX, 0), Ok(3));
    let by_control = control(&table).reserve(ROW, 1, SPAN_MAX, None, false);
    assert_eq!(by_control, Ok(Ok(3 + SPAN_MAX)));
    assert!(table.spans[0]
        .iter()
        .skip(LIVE + 1)
        .all(|word| word.load(Relaxed) == 0));
}

#[test]
fn a_worker_may_run_ahead_of_itself_and_of_workers_that_seal_for_other_tunnels() {
    let table = table(3);
    let (mut one, mut other) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    table.open(ROW + 1, 1);
    assert_eq!(other.reserve(ROW + 1, 1, 10, Some(0), false), Ok(Ok(3)));
    for area in 0..10 {
        assert_eq!(one.take(1, 400, area), Ok(3 + 400 * area));
    }
}

#[test]
fn the_packets_of_a_worker_that_was_given_up_hold_nobody_back() {
    let table = table(3);
    let (mut lost, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    assert_eq!(lost.take(1, 1, 0), Ok(3));
    assert_eq!(fast.take(1, 1000, 0), SPAN);
    table.spans[0][LIVE].store(0, Relaxed);
    assert_eq!(fast.take(1, 1000, 0), Ok(4));
    assert_eq!(fast.beyond_span, 0);
}

#[test]
fn after_a_millisecond_a_batch_goes_on_regardless_and_is_counted() {
    let table = table(3);
    let (mut slow, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    assert_eq!(slow.take(1, 1, 0), Ok(3));
    assert_eq!(fast.take_regardless(1000, 0), Ok(4));
    table.release(0, 1);
    assert_eq!(fast.take_regardless(10, 0), Ok(1004));
    assert_eq!(fast.beyond_span, 1);
}

#[test]
fn controls_own_messages_keep_the_span_too() {
    let table = table(3);
    let mut only = sealer(&table, 0, 0);
    table.open(ROW, 1);
    for area in 0..20 {
        assert!(only.take(1, 50, area).is_ok());
    }
    assert_eq!(control(&table).reserve(ROW, 1, 1, None, false), Ok(SPAN));
    table.release(0, 20);
    assert_eq!(
        control(&table).reserve(ROW, 1, 1, None, false),
        Ok(Ok(1003))
    );
}

#[test]
fn what_a_former_tunnel_of_the_row_still_has_in_the_ring_holds_nobody_back() {
    let table = table(3);
    let (mut slow, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    assert_eq!(slow.take(1, 1, 0), Ok(3));
    table.open(ROW, 2);
    assert_eq!(fast.take(2, 1000, 0), Ok(3));
}

#[test]
fn what_a_former_tunnel_of_the_row_still_has_in_the_ring_does_not_hide_what_comes_after() {
    for restarted in [false, true] {
        let table = table(3);
        let (mut slow, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
        table.open(ROW, 1);
        assert_eq!(fast.take(1, 2000, 0), Ok(3));
        assert_eq!(slow.take_regardless(1, 0), Ok(2003));
        if restarted {
            slow = sealer(&table, 0, 1);
        }
        table.open(ROW, 2);
        assert_eq!(slow.take(2, 1, 1), Ok(3));
        assert_eq!(fast.take(2, SPAN_MAX + 1, 1), SPAN);
    }
}

#[test]
fn many_batches_in_one_area_are_remembered_as_one() {
    let table = table(2);
    let mut worker = sealer(&table, 0, 0);
    table.open(ROW, 1);
    for _ in 0..100 {
        assert!(worker.take(1, 1, 0).is_ok());
    }
    assert_eq!(worker.in_flight(ROW), [(0, 3)]);
}

#[test]
fn the_oldest_unsent_counter_follows_the_ring_without_the_worker() {
    let table = table(3);
    let (mut slow, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    for area in 0..3 {
        assert_eq!(slow.take(1, 100, area), Ok(3 + 100 * area));
    }
    table.release(0, 2);
    // What slow published is from when it sealed last, so fast has to take 3 for its oldest ...
    assert_eq!(fast.take(1, SPAN_MAX - 298, 0), SPAN);
    // ... until slow seals again, when it is 203.
    assert_eq!(slow.take(1, 100, 3), Ok(303));
    assert_eq!(fast.take(1, SPAN_MAX - 198, 0), SPAN);
    assert_eq!(fast.take(1, SPAN_MAX - 199, 0), Ok(403));
    table.release(0, 4);
    assert_eq!(fast.take(1, 1000, 1), Ok(716));
}

#[test]
fn a_successor_counts_what_its_predecessor_published_and_forgets_the_rest() {
    let table = table(3);
    let (mut doomed, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    assert_eq!(doomed.take(1, 10, 0), Ok(3)); // published
    assert_eq!(doomed.take(1, 10, 1), Ok(13)); // lost with it
    drop(doomed);

    let mut successor = sealer(&table, 0, 1);
    assert_eq!(fast.take(1, SPAN_MAX, 0), SPAN);
    assert_eq!(successor.take(1, 10, 1), Ok(23));
    assert_eq!(fast.take(1, SPAN_MAX - 28, 0), SPAN); // would end at 516
                                                      // Now only what the successor sealed is in flight, but it has to say so.
    table.release(0, 1);
    assert_eq!(successor.take(1, 10, 2), Ok(33));
    assert_eq!(fast.take(1, SPAN_MAX - 19, 0), Ok(43));
    assert_eq!(fast.take(1, 1, 0), SPAN);
}

#[test]
fn a_batch_lost_with_a_worker_that_has_nothing_more_to_send_holds_nobody_back() {
    let table = table(3);
    let (mut doomed, mut fast) = (sealer(&table, 0, 0), sealer(&table, 1, 0));
    table.open(ROW, 1);
    assert_eq!(doomed.take(1, 10, 0), Ok(3));
    assert_eq!(fast.take(1, 1000, 0), SPAN);
    sealer(&table, 0, 0);
    assert_eq!(fast.take(1, 1000, 0), Ok(13));
}

#[test]
#[cfg_attr(miri, ignore = "many tunnels")]
fn a_worker_that_sealed_for_very_many_tunnels_remembers_only_some() {
    let table = table_of(2, 3000);
    let mut worker = sealer(&table, 0, 0);
    for row in 0..3000 {
        table.open(row, 1);
        assert_eq!(
            worker.reserve(row, 1, 1, Some(row as u64), false),
            Ok(Ok(3))
        );
        table.release(0, row as u64);
    }
    assert!(worker.flights() <= FLIGHTS_MAX);
    let mut other = sealer(&table, 1, 0);
    assert_eq!(other.reserve(2999, 1, 1000, Some(0), false), Ok(SPAN));
    assert_eq!(other.reserve(2000, 1, 1000, Some(0), false), Ok(Ok(4)));
}

#[test]
fn what_no_process_of_ours_writes_is_impossible() {
    let table = table(3);
    table.open(ROW, 1);
    table.send[ROWS_AT_WORD + ROW * SEND_WORDS + SEALERS].store(1 << 40, Relaxed);
    let taken = sealer(&table, 0, 0).reserve(ROW, 1, 1, Some(0), false);
    assert_eq!(taken, Err(Impossible::Sealer(40)));
    assert_eq!(table.last(ROW), 2);

    table.spans[0][TOUCHED].store(ROWS as u64 + 1, Relaxed);
    let (words, fate) = (Rc::clone(&table), Rc::default());
    let attached = Ledger::new(Seen { table: words, fate }, ROWS, 3, Some(0), 0);
    assert_eq!(attached.err(), Some(Impossible::Touched(9)));
}

// ---- between the steps of another one

/// A sealer before whose next swap this happens.
fn interrupted(table: &Rc<Table>, worker: usize, others: impl FnOnce() + 'static) -> Ledger<Seen> {
    let fate = Fate::default();
    fate.before_swap.borrow_mut().push(Box::new(others));
    fated(table, Some(worker), 0, Rc::new(fate))
}

#[test]
fn who_loses_the_race_takes_the_counters_behind() {
    let table = table(2);
    table.open(ROW, 1);
    let mut winner = sealer(&table, 1, 0);
    let mut loser = interrupted(&table, 0, move || assert_eq!(winner.take(1, 7, 0), Ok(3)));
    assert_eq!(loser.take(1, 5, 0), Ok(10));
    assert_eq!(table.last(ROW), 14);
    // A lower bound, which stays true.
    assert_eq!(loser.in_flight(ROW), [(0, 3)]);
}

#[test]
fn equal_counters_of_the_rows_next_tunnel_are_no_counters_of_the_former_one() {
    let table = table(2);
    table.open(ROW, 1);
    assert_eq!(sealer(&table, 1, 0).take(1, 20, 0), Ok(3)); // 3..=22
    let there = Rc::clone(&table);
    let mut late = interrupted(&table, 0, move || {
        let mut other = sealer(&there, 1, 0);
        assert_eq!(other.take(1, 10, 0), Ok(23)); // of the former tunnel, what the late one is about to take
        there.open(ROW, 2);
        assert_eq!(other.take(2, 20, 0), Ok(3)); // of the new one, up to what the late one has loaded
    });
    assert_eq!(late.take(1, 10, 0), Err(Refusal::Gone));
    assert_eq!(table.last(ROW), 32); // 23..=32 are a gap
                                     // And nobody waits for a batch that there will never be.
    assert_eq!(late.in_flight(ROW), []);
    table.release(1, 1);
    assert_eq!(sealer(&table, 1, 1).take(2, 1000, 1), Ok(33));
}

#[test]
fn who_is_refused_after_it_has_published_takes_that_back() {
    for already_in_flight in [false, true] {
        let table = table(2);
        table.open(ROW, 1);
        let mut winner = sealer(&table, 1, 0);
        let fate = Rc::new(Fate::default());
        let mut loser = fated(&table, Some(0), 0, Rc::clone(&fate));
        if already_in_flight {
            assert_eq!(loser.take(1, 1, 0), Ok(3));
        }
        let before = table.last(ROW);
        let expected: Vec<_> = loser.in_flight(ROW);
        fate.before_swap.borrow_mut().push(Box::new(move || {
            assert_eq!(winner.take(1, 300, 0), Ok(before + 1));
        }));

        assert_eq!(loser.take(1, 300, 7), SPAN);

        assert_eq!(loser.in_flight(ROW), expected);
        let cell = &table.spans[0][ROWS_AT_WORD + ROW * SPAN_WORDS..];
        assert_eq!(cell[UNTIL].load(Relaxed), u64::from(already_in_flight));
        // What others see is what is in flight, if anything.
        table.release(0, 1);
        let mut winner = sealer(&table, 1, 1);
        assert_eq!(winner.take(1, 1000, 1), Ok(before + 301));
    }
}

#[test]
fn a_batch_that_was_there_before_is_not_taken_back() {
    let table = table(2);
    table.open(ROW, 1);
    let mut winner = sealer(&table, 1, 0);
    let fate = Rc::new(Fate::default());
    let mut loser = fated(&table, Some(0), 0, Rc::clone(&fate));
    assert_eq!(loser.take(1, 1, 4), Ok(3));
    fate.before_swap.borrow_mut().push(Box::new(move || {
        assert_eq!(winner.take(1, 300, 0), Ok(4));
    }));
    assert_eq!(loser.take(1, 300, 4), SPAN);
    assert_eq!(loser.in_flight(ROW), [(4, 3)]);
    assert_eq!(sealer(&table, 1, 1).take(1, 300, 1), SPAN);
}

// ---- at any moment

/// Run until the fate of the sealer strikes; None then.
fn alive<T>(work: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Some(done),
        Err(cause) if cause.is::<Killed>() => None,
        Err(cause) => resume_unwind(cause),
    }
}

fn doomed(table: &Rc<Table>, stores: usize, published: u64) -> Option<Ledger<Seen>> {
    let stores = Some(Cell::new(stores));
    let fate = Rc::new(Fate {
        stores,
        ..Fate::default()
    });
    alive(|| fated(table, Some(0), published, fate))
}

#[test]
fn a_sealer_killed_at_any_store_leaves_a_gap_at_most_and_never_lowers_its_guard() {
    let mut deaths = 0;
    for stores in 0.. {
        let table = table(2);
        let mut other = sealer(&table, 1, 0);
        table.open(ROW, 4);
        assert_eq!(sealer(&table, 0, 0).take(4, 7, 0), Ok(3)); // of a former tunnel
        table.open(ROW, 5);
        assert_eq!(sealer(&table, 0, 0).take(5, 10, 0), Ok(3));
        let mut taken = vec![(3, 10)];

        // Its predecessor has published one area.
        let last = doomed(&table, stores, 1).and_then(|mut it| alive(move || it.take(5, 5, 1)));
        taken.extend(last.map(|first| (first.unwrap(), 5)));
        deaths += usize::from(last.is_none());

        // Between the death and its successor, and after: 3..12 are in the ring, not sent.
        assert_eq!(other.take(5, SPAN_MAX, 0), SPAN);
        let mut successor = sealer(&table, 0, 1);
        assert_eq!(other.take(5, SPAN_MAX, 0), SPAN);
        taken.push((successor.take(5, 4, 1).unwrap(), 4));
        taken.push((other.take(5, 6, 0).unwrap(), 6));
        taken.push((successor.take(5, 1, 1).unwrap(), 1));
        assert_eq!(other.take(5, SPAN_MAX, 0), SPAN);
        let mut every: Vec<u64> = taken
            .iter()
            .flat_map(|&(first, count)| first..first + count)
            .collect();
        let before = every.len();
        every.sort_unstable();
        every.dedup();
        assert_eq!(every.len(), before);
        table.release(0, 2);
        assert!(other.take(5, SPAN_MAX, 0).is_ok());
        if last.is_some() {
            break;
        }
    }
    assert!(deaths > 2, "{deaths}");
}

#[test]
fn a_sealer_killed_at_any_store_of_a_tunnels_first_batch_does_not_hide_its_successors() {
    let mut deaths = 0;
    for stores in 0.. {
        let table = table(2);
        let mut other = sealer(&table, 1, 0);
        table.open(ROW, 4);
        assert_eq!(
            control(&table).reserve(ROW, 4, 2000, None, false),
            Ok(Ok(3))
        );
        assert_eq!(sealer(&table, 0, 0).take(4, 7, 0), Ok(2003));
        table.open(ROW, 5);
        let last = doomed(&table, stores, 1).and_then(|mut it| alive(move || it.take(5, 5, 1)));
        deaths += usize::from(last.is_none());

        let first = sealer(&table, 0, 1).take(5, 1, 1).unwrap();
        assert_eq!(first, if last.is_some() { 8 } else { 3 });
        assert_eq!(other.take(5, SPAN_MAX + 1, 0), SPAN);
        if last.is_some() {
            break;
        }
    }
    assert!(deaths > 4, "{deaths}");
}

#[test]
fn a_sealer_killed_while_it_takes_back_holds_others_back_until_its_successor_at_most() {
    let mut deaths = 0;
    for stores in 0.. {
        let table = table(2);
        table.open(ROW, 1);
        let mut winner = sealer(&table, 1, 0);
        let fate = Fate {
            stores: Some(Cell::new(stores)),
            ..Fate::default()
        };
        fate.before_swap.borrow_mut().push(Box::new(move || {
            assert_eq!(winner.take(1, 300, 0), Ok(3));
        }));
        let fate = Rc::new(fate);
        let last = alive(|| fated(&table, Some(0), 0, fate).take(1, 300, 0));
        deaths += usize::from(last.is_none());

        sealer(&table, 0, 0);
        assert!(sealer(&table, 1, 1).take(1, 1000, 1).is_ok());
        if let Some(last) = last {
            assert_eq!(last, SPAN);
            break;
        }
    }
    assert!(deaths > 4, "{deaths}");
}
