//! The ring's protocol under loom: every order in which two processes' loads and stores can take effect, and a death at
//! each of their steps. What runs is the program's own `cursors`, on loom's atomics; the loops around it are those of
//! `nebula_mp.workers.reader` and `writer`, the areas' bytes are cells that loom guards, and the bell is a flag that one
//! can sleep on, without a time limit.
//!
//! A death takes everything from a process but its finished steps: its later stores, calls and rings do not happen.
//! Then the supervisor frees its lease and rings, and a successor goes on.
//!
//! That the model can fail is shown by taking away one order or one check at a time.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release --test loom_ring
//! ```
#![cfg(loom)]

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Display;
use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{self, Relaxed, Release};

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use nebula_mp_core::cursors::{Draining, Filling, Part, RingWords};
use nebula_mp_core::error::{Fault, Result as Checked};
use nebula_mp_core::words::Word;

const ENTRIES: usize = 2;
const READER: u64 = 1;
const WRITER: u64 = 2;
const NEXT_READER: u64 = 3;
const NEXT_WRITER: u64 = 4;

/// The protocol with one of its checks or orders removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Nothing,
    /// The order of an area's bytes and head.
    HeadReleased,
    HeadAcquired,
    /// The order of the reading of an area and tail.
    TailReleased,
    TailAcquired,
    /// The order of tail and the lease.
    LeaseReleased,
    LeaseAcquired,
    /// Comparing the lease before it is taken.
    LeaseTest,
    /// That comparing and taking are one step.
    LeaseAtOnce,
    /// The check that an area is free before it is filled.
    FullCheck,
    /// Waiting for the system calls' return before the area is released.
    ReturnBeforeTail,
    /// Storing progress before the system call.
    ProgressBeforeCall,
    /// Looking at progress.
    Progress,
    /// The area's number in progress.
    ProgressNumber,
    /// Freeing a dead holder's lease.
    LeaseCleared,
    /// Comparing before that.
    ClearedIfHolder,
    /// Ringing after a death.
    RingAfterDeath,
    /// Ringing after a pass without the lease after which areas wait.
    RingAfterPass,
    /// Ringing after a drop that leaves areas.
    RingAfterDrop,
    /// The writer's coming back for what it left.
    ComingBack,
    /// Emptying the bell before looking.
    EmptyBeforeLook,
}

/// What two processes and the supervisor share.
struct Shared {
    head: AtomicU64,
    tail: AtomicU64,
    lease: AtomicU64,
    progress: AtomicU64,
    areas: Vec<Area>,
    rung: Mutex<bool>,
    bell: Condvar,
    /// The reader has ended for good. Only the two that wait for the end look at it.
    ended: Mutex<bool>,
    /// Witness: what came out. Not loom's, so that it orders nothing.
    delivered: std::sync::Mutex<Vec<u64>>,
}

struct Area {
    count: AtomicU64,
    number: AtomicU64,
    data: [UnsafeCell<u64>; ENTRIES],
}

impl Shared {
    fn new(areas: usize) -> Self {
        let area = |_| Area {
            count: AtomicU64::new(0),
            number: AtomicU64::new(0),
            data: std::array::from_fn(|_| UnsafeCell::new(u64::MAX)),
        };
        Self {
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            lease: AtomicU64::new(0),
            progress: AtomicU64::new(0),
            areas: (0..areas).map(area).collect(),
            rung: Mutex::new(false),
            bell: Condvar::new(),
            ended: Mutex::new(false),
            delivered: std::sync::Mutex::new(Vec::new()),
        }
    }

    /// Also for who thinks that there is one area more.
    fn area(&self, place: usize) -> &Area {
        &self.areas[place % self.areas.len()]
    }

    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.bell.notify_one();
    }
}

/// One process, until it dies.
struct Process<'a> {
    shared: &'a Shared,
    without: Without,
    holder: u64,
    recovery: Recovery,
    /// Steps that others can see and that it still takes; None: it lives on.
    life: Cell<Option<u32>>,
    is_dead: Cell<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recovery {
    SendAgain,
    GoOnBehind,
}

struct Dead;

impl Process<'_> {
    /// Whether a step that others can see still happens.
    fn lives(&self) -> bool {
        match self.life.get() {
            None => true,
            Some(0) => {
                self.is_dead.set(true);
                false
            }
            Some(steps) => {
                self.life.set(Some(steps - 1));
                true
            }
        }
    }

    /// What a living process found.
    fn found<T>(&self, result: Checked<T>) -> Result<T, Dead> {
        if self.is_dead.get() {
            return Err(Dead);
        }
        match result {
            Ok(it) => Ok(it),
            Err(fault) => panic!("witness: {fault}"),
        }
    }

    fn ring(&self) -> Result<(), Dead> {
        if !self.lives() {
            return Err(Dead);
        }
        self.shared.ring();
        Ok(())
    }

    fn sleep(&self) -> Result<(), Dead> {
        let mut rung = self.shared.rung.lock().unwrap();
        while !*rung {
            rung = self.shared.bell.wait(rung).unwrap();
        }
        if self.without != Without::EmptyBeforeLook {
            if !self.lives() {
                return Err(Dead);
            }
            *rung = false;
        }
        Ok(())
    }

    /// Fill one area and publish it, if there is a free one.
    fn fill(&self, filling: &mut Filling) -> Result<(), Dead> {
        let area = filling.head();
        if !self.found(filling.try_begin(self))? {
            return Ok(());
        }
        for (entry, cell) in self
            .shared
            .area(filling.place(area))
            .data
            .iter()
            .enumerate()
        {
            if !self.lives() {
                return Err(Dead);
            }
            // SAFETY: loom fails if anybody else has it.
            cell.with_mut(|it| unsafe { *it = area * ENTRIES as u64 + entry as u64 });
        }
        filling.publish(self, ENTRIES);
        self.found(Ok(()))
    }

    /// Empty at most `budget` areas.
    fn drain(&self, draining: &mut Draining, budget: usize) -> Result<(), Dead> {
        for _ in 0..budget {
            if self.found(draining.pending(self))? == 0 {
                break;
            }
            let count = self.found(draining.entries(self, ENTRIES))?;
            let begun = self.found(draining.begun(self, count))?;
            let cells = &self.shared.areas[draining.place()].data[..count];
            let borrowed: Vec<_> = cells.iter().map(|cell| cell.get()).collect();
            for (entry, cell) in borrowed.iter().enumerate().skip(begun) {
                let late = self.without == Without::ProgressBeforeCall;
                if !late {
                    draining.begin(self, entry);
                    self.found(Ok(()))?;
                }
                if !self.lives() {
                    return Err(Dead);
                }
                // SAFETY: loom fails if anybody writes it meanwhile.
                let bytes = unsafe { *cell.deref() };
                self.shared.delivered.lock().unwrap().push(bytes);
                if late {
                    draining.begin(self, entry);
                    self.found(Ok(()))?;
                }
            }
            if self.without == Without::ReturnBeforeTail {
                self.found(draining.release(self))?;
                self.shared.tail.load(Relaxed); // whatever it does next
                drop(borrowed);
            } else {
                drop(borrowed);
                self.found(draining.release(self))?;
            }
        }
        Ok(())
    }

    fn attach(&self) -> Result<Draining, Dead> {
        let goes_on = self.recovery == Recovery::GoOnBehind;
        let areas = self.shared.areas.len();
        self.found(Draining::attach(self, areas, Some(self.holder), goes_on))
    }

    /// `workers.reader._Half.work`, once for each pass.
    fn read(&self, passes: &[Pass]) -> Result<(), Dead> {
        let areas = self.shared.areas.len();
        let one_more = usize::from(self.without == Without::FullCheck);
        let mut filling = self.found(Filling::attach(self, areas + one_more))?;
        let mut draining = self.attach()?;
        for pass in passes {
            let takes = pass.drains && draining.try_take(self);
            self.found(Ok(()))?;
            let rings = if takes {
                self.drain(&mut draining, areas)?;
                if pass.fills {
                    self.fill(&mut filling)?;
                }
                self.drain(&mut draining, areas - pass.leaves)?;
                let left = self.found(draining.drop_lease(self))?;
                left && self.without != Without::RingAfterDrop
            } else {
                if pass.fills {
                    self.fill(&mut filling)?;
                }
                let waiting = self.found(filling.waiting(self))?;
                waiting > 0 && self.without != Without::RingAfterPass
            };
            if rings {
                self.ring()?;
            }
        }
        Ok(())
    }

    /// `workers.writer._Loop.run`, until the reader has ended and nothing is left.
    fn write(&self, budget: usize) -> Result<(), Dead> {
        let mut draining = self.attach()?;
        loop {
            let mut goes_on = true;
            while goes_on {
                goes_on = draining.try_take(self);
                self.found(Ok(()))?;
                if goes_on {
                    self.drain(&mut draining, budget)?;
                    goes_on = self.found(draining.drop_lease(self))?;
                    goes_on &= self.without != Without::ComingBack;
                }
            }
            if self.without == Without::EmptyBeforeLook {
                *self.shared.rung.lock().unwrap() = false;
            }
            if *self.shared.ended.lock().unwrap() && self.shared.is_empty() {
                return Ok(());
            }
            self.sleep()?;
        }
    }
}

impl Shared {
    fn is_empty(&self) -> bool {
        self.head.load(Ordering::Acquire) == self.tail.load(Ordering::Acquire)
    }

    /// `RingMemory.clear_dead`, and the ring that follows every death. Storing is a system call here.
    fn clear_dead(&self, holder: u64, without: Without) {
        let found = self.lease.load(Relaxed);
        if without != Without::LeaseCleared
            && (found == holder || without == Without::ClearedIfHolder)
        {
            self.lease.store(0, Release);
        }
        if without != Without::RingAfterDeath {
            self.ring();
        }
    }
}

/// A word as one process uses it.
struct Seen<'a> {
    process: &'a Process<'a>,
    word: &'a AtomicU64,
    name: Name,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Head,
    Tail,
    Lease,
    Progress,
    OfArea,
}

impl Word for Seen<'_> {
    fn load(&self, order: Ordering) -> u64 {
        let without = self.process.without;
        match (self.name, without) {
            (Name::Head, Without::HeadAcquired) | (Name::Tail, Without::TailAcquired) => {
                self.word.load(Relaxed)
            }
            (Name::Lease, Without::LeaseTest) => 0,
            (Name::Progress, Without::Progress) => 0,
            (Name::Progress, Without::ProgressNumber) => {
                let tail = self.process.shared.tail.load(Relaxed);
                tail << 12 | self.word.load(order) & 0xFFF
            }
            _ => self.word.load(order),
        }
    }

    fn store(&self, value: u64, order: Ordering) {
        if self.process.lives() {
            let order = match (self.name, self.process.without) {
                (Name::Head, Without::HeadReleased) | (Name::Tail, Without::TailReleased) => {
                    Relaxed
                }
                _ => order,
            };
            self.word.store(value, order);
        }
    }

    fn compare_exchange(
        &self,
        current: u64,
        new: u64,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u64, u64> {
        if !self.process.lives() {
            return Err(u64::MAX);
        }
        let takes = new != 0;
        match self.process.without {
            Without::LeaseTest if takes => Ok(self.word.swap(new, success)),
            Without::LeaseAtOnce if takes => match self.word.load(success) {
                found if found == current => {
                    self.word.store(new, Relaxed);
                    Ok(found)
                }
                found => Err(found),
            },
            Without::LeaseAcquired if takes => {
                self.word.compare_exchange(current, new, Relaxed, failure)
            }
            Without::LeaseReleased if !takes => {
                self.word.compare_exchange(current, new, Relaxed, failure)
            }
            _ => self.word.compare_exchange(current, new, success, failure),
        }
    }

    fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
        self.word.fetch_or(value, order)
    }
}

impl Process<'_> {
    fn seen<'a>(&'a self, word: &'a AtomicU64, name: Name) -> Seen<'a> {
        Seen {
            process: self,
            word,
            name,
        }
    }
}

impl RingWords for Process<'_> {
    fn head(&self) -> impl Word {
        self.seen(&self.shared.head, Name::Head)
    }

    fn tail(&self) -> impl Word {
        self.seen(&self.shared.tail, Name::Tail)
    }

    fn lease(&self) -> impl Word {
        self.seen(&self.shared.lease, Name::Lease)
    }

    fn progress(&self) -> impl Word {
        self.seen(&self.shared.progress, Name::Progress)
    }

    fn count(&self, place: usize) -> impl Word {
        self.seen(&self.shared.area(place).count, Name::OfArea)
    }

    fn number(&self, place: usize) -> impl Word {
        self.seen(&self.shared.area(place).number, Name::OfArea)
    }

    fn contradiction(
        &self,
        of: Part,
        field: impl Into<Cow<'static, str>>,
        value: impl Display,
        expected: impl Display,
    ) -> Fault {
        Fault::contradiction(&format!("{of:?}"), field, value, expected)
    }
}

/// One pass of the reader.
#[derive(Debug, Clone, Copy)]
struct Pass {
    drains: bool,
    fills: bool,
    /// Areas that it does not drain, as if its system calls had no room.
    leaves: usize,
}

const fn pass(drains: bool, fills: bool, leaves: usize) -> Pass {
    Pass {
        drains,
        fills,
        leaves,
    }
}

/// Mode `reader`: it takes the lease before it polls.
const DRAINING: &[Pass] = &[pass(true, true, 0), pass(true, true, 0)];
/// Mode `writer`: it leaves the lease alone.
const FILLING: &[Pass] = &[pass(false, true, 0), pass(false, true, 0)];
/// From one to the other, and an end that leaves an area to the writer.
const CHANGING: &[Pass] = &[pass(false, true, 0), pass(true, true, 1)];
/// What a successor does: it looks what its predecessor left, and fills once more.
const AGAIN: &[Pass] = &[pass(true, false, 0), pass(false, true, 0)];
/// Nothing comes for a successor, or there is none.
const NEVER: &[Pass] = &[];

/// Who dies, and after how many steps that others can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Nobody,
    Reader(u32),
    Writer(u32),
}

#[derive(Debug, Clone, Copy)]
struct Scenario {
    areas: usize,
    passes: &'static [Pass],
    /// Of the reader's successor.
    successor: &'static [Pass],
    recovery: Recovery,
    victim: Victim,
    without: Without,
    preemptions: usize,
}

impl Scenario {
    fn process<'a>(&self, shared: &'a Shared, holder: u64) -> Process<'a> {
        let life = match (self.victim, holder) {
            (Victim::Reader(steps), READER) | (Victim::Writer(steps), WRITER) => Some(steps),
            _ => None,
        };
        Process {
            shared,
            without: self.without,
            holder,
            recovery: self.recovery,
            life: Cell::new(life),
            is_dead: Cell::new(false),
        }
    }

    /// One execution. Gives whether the victim died.
    fn run(self) -> bool {
        let shared = Arc::new(Shared::new(self.areas));
        let writer = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let has_died = self.process(&shared, WRITER).write(1).is_err();
                if has_died {
                    shared.clear_dead(WRITER, self.without);
                    let _ = self.process(&shared, NEXT_WRITER).write(1);
                }
                has_died
            })
        };
        // This thread is the reader.
        let mut has_died = self.process(&shared, READER).read(self.passes).is_err();
        if has_died {
            shared.clear_dead(READER, self.without);
            let _ = self.process(&shared, NEXT_READER).read(self.successor);
        }
        *shared.ended.lock().unwrap() = true;
        if shared.is_empty() {
            shared.ring();
        }
        // Else it is awake, or will be woken by what was done before: if not, everybody sleeps, and loom says so.
        has_died |= writer.join().unwrap();
        self.check(&shared, has_died);
        has_died
    }

    fn check(&self, shared: &Shared, has_died: bool) {
        let head = shared.head.load(Relaxed);
        let (tail, lease) = (shared.tail.load(Relaxed), shared.lease.load(Relaxed));
        assert_eq!((tail, lease), (head, 0), "witness: not all was released");
        let delivered = shared.delivered.lock().unwrap().clone();
        let expected: Vec<u64> = (0..head * ENTRIES as u64).collect();
        let deaths = usize::from(has_died);
        if self.recovery == Recovery::GoOnBehind {
            let in_order = delivered.windows(2).all(|pair| pair[0] < pair[1]);
            assert!(in_order, "witness: out of order, or twice: {delivered:?}");
            let is_known = delivered.iter().all(|number| expected.contains(number));
            assert!(is_known, "witness: never published: {delivered:?}");
            let missing = expected.len() - delivered.len();
            assert!(missing <= deaths, "witness: lost: {delivered:?}");
            return;
        }
        let (mut fresh, mut again): (Vec<u64>, usize) = (Vec::new(), 0);
        for number in delivered {
            match fresh.last() {
                Some(last) if number <= *last => {
                    let (area, of_last) = (number / ENTRIES as u64, last / ENTRIES as u64);
                    assert_eq!(area, of_last, "witness: an area that had been released");
                    again += usize::from(number % ENTRIES as u64 == 0);
                }
                _ => fresh.push(number),
            }
        }
        assert_eq!(fresh, expected, "witness: out of order, or lost");
        assert!(again <= deaths, "witness: sent again without a death");
    }

    /// All executions; gives how many there were, and in how many the victim died.
    fn explore(self) -> (usize, usize) {
        let counts = std::sync::Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let counted = std::sync::Arc::clone(&counts);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(self.preemptions);
        builder.check(move || {
            counted.0.fetch_add(1, Relaxed);
            counted.1.fetch_add(usize::from(self.run()), Relaxed);
        });
        (counts.0.load(Relaxed), counts.1.load(Relaxed))
    }

    /// All executions, with the victim dying at each of its steps in turn; gives how many executions had a death.
    fn explore_deaths(self, victim: impl Fn(u32) -> Victim) -> (usize, u32) {
        let mut deaths = 0;
        for steps in 0.. {
            let (_, died) = Scenario {
                victim: victim(steps),
                ..self
            }
            .explore();
            if died == 0 {
                return (deaths, steps);
            }
            deaths += died;
        }
        unreachable!()
    }
}

const SCENARIO: Scenario = Scenario {
    areas: 1,
    passes: DRAINING,
    successor: AGAIN,
    recovery: Recovery::SendAgain,
    victim: Victim::Nobody,
    without: Without::Nothing,
    preemptions: 3,
};

const RECOVERIES: [Recovery; 2] = [Recovery::SendAgain, Recovery::GoOnBehind];

#[test]
fn what_is_published_comes_out_once_in_order_with_its_bytes_and_no_wake_up_is_lost() {
    for passes in [DRAINING, FILLING, CHANGING] {
        for recovery in RECOVERIES {
            for areas in [1, 2] {
                let scenario = Scenario {
                    areas,
                    passes,
                    recovery,
                    ..SCENARIO
                };
                let (executions, _) = scenario.explore();
                println!("{executions} executions: {scenario:?}");
                assert!(executions > 100);
            }
        }
    }
}

#[test]
fn a_death_of_the_reader_at_any_step_costs_no_more_than_its_recovery_allows() {
    each_death(Victim::Reader, AGAIN);
}

#[test]
fn the_writer_drains_what_a_dead_reader_left_although_nothing_more_comes() {
    each_death(Victim::Reader, NEVER);
}

#[test]
fn a_death_of_the_writer_at_any_step_costs_no_more_than_its_recovery_allows() {
    each_death(Victim::Writer, AGAIN);
}

fn each_death(victim: impl Fn(u32) -> Victim + Copy, successor: &'static [Pass]) {
    for passes in [DRAINING, FILLING, CHANGING] {
        for recovery in RECOVERIES {
            let scenario = Scenario {
                passes,
                successor,
                recovery,
                preemptions: 2,
                ..SCENARIO
            };
            let (deaths, steps) = scenario.explore_deaths(victim);
            println!("{deaths} deaths at {steps} steps: {scenario:?}");
            assert!(steps >= 8);
        }
    }
}

/// What the model says of a protocol that lacks something.
///
/// Said by a process of its own: when loom fails while a cell is borrowed, it ends the process.
fn complaint(test: &str, without: Without, victim: Option<fn(u32) -> Victim>) -> String {
    if std::env::var_os(INSIDE).is_some() {
        explore_without(without, victim);
        return "none".to_owned();
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8_lossy(&said).into_owned()
}

/// Says in a child process that it is one.
const INSIDE: &str = "LOOM_RING_INSIDE";

fn explore_without(without: Without, victim: Option<fn(u32) -> Victim>) {
    for passes in [DRAINING, FILLING, CHANGING] {
        for recovery in RECOVERIES {
            for (areas, successor) in [(1, AGAIN), (2, AGAIN), (1, NEVER)] {
                let scenario = Scenario {
                    areas,
                    passes,
                    successor,
                    recovery,
                    without,
                    preemptions: 2,
                    ..SCENARIO
                };
                match victim {
                    None => drop(scenario.explore()),
                    Some(victim) => drop(scenario.explore_deaths(victim)),
                }
            }
        }
    }
}

macro_rules! needed {
    ($($name:ident: $without:ident, $victim:expr, $complaint:literal;)*) => {$(
        #[test]
        fn $name() {
            let said = complaint(stringify!($name), Without::$without, $victim);
            assert!(said.contains($complaint), "{said}");
        }
    )*};
}

needed! {
    head_is_stored_after_the_bytes: HeadReleased, None, "it changed hands";
    head_is_loaded_before_the_bytes: HeadAcquired, None, "it changed hands";
    tail_is_stored_after_the_reading: TailReleased, None, "Causality violation";
    tail_is_loaded_before_the_filling: TailAcquired, None, "Causality violation";
    the_lease_is_dropped_after_tail_is_stored: LeaseReleased, None, "Causality violation";
    the_lease_is_taken_before_tail_is_loaded: LeaseAcquired, None, "witness";
    the_lease_is_taken_only_from_nobody: LeaseTest, None, "lease is";
    the_lease_is_compared_and_taken_at_once: LeaseAtOnce, None, "lease is";
    an_area_is_filled_only_when_it_is_free: FullCheck, None, "head is 2, expected 0..1";
    an_area_is_released_after_the_calls_have_returned: ReturnBeforeTail, None, "Causality violation";
    the_bell_is_rung_after_a_pass_without_the_lease: RingAfterPass, None, "deadlock";
    the_bell_is_rung_after_a_drop_that_leaves_areas: RingAfterDrop, None, "deadlock";
    the_writer_comes_back_for_what_it_left: ComingBack, None, "deadlock";
    the_bell_is_emptied_before_looking: EmptyBeforeLook, None, "deadlock";
    the_bell_is_rung_after_a_death: RingAfterDeath, Some(Victim::Reader), "deadlock";
    a_dead_holders_lease_is_freed: LeaseCleared, Some(Victim::Writer), "not all was released";
    a_lease_is_freed_only_if_the_dead_had_it: ClearedIfHolder, Some(Victim::Writer), "witness";
    progress_is_stored_before_the_call: ProgressBeforeCall, Some(Victim::Writer), "or twice";
    progress_is_looked_at_by_a_successor: Progress, Some(Victim::Writer), "or twice";
    progress_has_the_areas_number: ProgressNumber, None, "lost";
}
