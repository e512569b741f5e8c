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

mod world;

use std::cell::Cell;
use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use loom::sync::Arc;
use loom::thread;

use world::{Pass, Process, Recovery, Shared, Without, ENTRIES};

const READER: u64 = 1;
const WRITER: u64 = 2;
const NEXT_READER: u64 = 3;
const NEXT_WRITER: u64 = 4;

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
