//! A ring in loom's memory, the processes that use it, and what may be left out of their protocol.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt::Display;
use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release};

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;
use loom::sync::{Condvar, Mutex};

use nebula_mp_core::cursors::{Draining, Filling, Part, RingWords};
use nebula_mp_core::error::{Fault, Result as Checked};
use nebula_mp_core::words::Word;

pub const ENTRIES: usize = 2;

/// The protocol with one of its checks or orders removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
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
pub struct Shared {
    pub head: AtomicU64,
    pub tail: AtomicU64,
    pub lease: AtomicU64,
    progress: AtomicU64,
    areas: Vec<Area>,
    rung: Mutex<bool>,
    bell: Condvar,
    /// The reader has ended for good. Only the two that wait for the end look at it.
    pub ended: Mutex<bool>,
    /// Witness: what came out. Not loom's, so that it orders nothing.
    pub delivered: std::sync::Mutex<Vec<u64>>,
}

struct Area {
    count: AtomicU64,
    number: AtomicU64,
    data: [UnsafeCell<u64>; ENTRIES],
}

impl Shared {
    /// An empty ring.
    pub fn new(areas: usize) -> Self {
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

    pub fn is_empty(&self) -> bool {
        self.head.load(Acquire) == self.tail.load(Acquire)
    }

    /// `RingMemory.clear_dead`, and the ring that follows every death. Storing is a system call here.
    pub fn clear_dead(&self, holder: u64, without: Without) {
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

    pub fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.bell.notify_one();
    }
}

/// One process, until it dies.
pub struct Process<'a> {
    pub shared: &'a Shared,
    pub without: Without,
    pub holder: u64,
    pub recovery: Recovery,
    /// Steps that others can see and that it still takes; None: it lives on.
    pub life: Cell<Option<u32>>,
    pub is_dead: Cell<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    SendAgain,
    GoOnBehind,
}

pub struct Dead;

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

    /// `datapath.passes.Half.work`, once for each pass.
    pub fn read(&self, passes: &[Pass]) -> Result<(), Dead> {
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
    pub fn write(&self, budget: usize) -> Result<(), Dead> {
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
pub struct Pass {
    pub drains: bool,
    pub fills: bool,
    /// Areas that it does not drain, as if its system calls had no room.
    pub leaves: usize,
}
