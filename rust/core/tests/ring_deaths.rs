//! A ring between two processes that are killed at any time, many times: what comes out is what was published.
//!
//! The processes are this program again, told by its environment which one it is. A delivery is one write to a pipe, where
//! a killed process may also be asleep, since the pipe is small and its reader slow. Nobody sleeps with a time limit, so
//! a death after which nobody is woken ends in a failure of the test.

#![cfg(not(miri))]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebula_mp_core::layout::{HEAD, LEASE, RING_DATA, RING_STATE, TAIL};
use nebula_mp_core::region::Region;
use nebula_mp_core::ring::{Consumer, Producer, Recovery};
use nebula_mp_core::sys;
use nebula_mp_core::testing::{RingMemory, SMALL};

const ROLE: &str = "RING_DEATHS_ROLE";
const DEATHS: u64 = 60;

/// Everything a child inherits, by number.
#[derive(Clone, Copy)]
struct Descriptors([RawFd; 6]);

impl Descriptors {
    fn data(&self, writable: bool) -> Region {
        let descriptor = self.0[usize::from(!writable)];
        Region::attach(descriptor, &RING_DATA, writable, "").unwrap()
    }

    fn state(&self, writable: bool) -> Region {
        let descriptor = self.0[2 + usize::from(!writable)];
        Region::attach(descriptor, &RING_STATE, writable, "").unwrap()
    }

    fn bell(&self) -> RawFd {
        self.0[4]
    }

    fn pipe(&self) -> RawFd {
        self.0[5]
    }
}

/// Numbers from a seed; xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn entries_of(area: u64) -> u64 {
    1 + area % 4
}

/// Bytes that only this entry has, of a length that varies.
fn packet(number: u64) -> Vec<u8> {
    let mut random = Random(number.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut packet = number.to_le_bytes().to_vec();
    packet.extend((0..number % 53).map(|_| random.below(256) as u8));
    packet
}

/// One process.
struct Process {
    descriptors: Descriptors,
    consumer: Consumer,
}

impl Process {
    fn new(descriptors: Descriptors, recovery: Recovery, holder: u64) -> Self {
        let (data, state) = (descriptors.data(false), descriptors.state(true));
        let consumer = Consumer::new(data, state, Some(holder), recovery, true, 65_536).unwrap();
        Self {
            descriptors,
            consumer,
        }
    }

    fn drain(&mut self, budget: usize) {
        for _ in 0..budget {
            if self.consumer.pending().unwrap() == 0 {
                break;
            }
            let begun = self.consumer.load().unwrap();
            for number in begun..self.consumer.len() {
                let (_, data) = self.consumer.entry(number);
                let stated = u64::from_le_bytes(data[..8].try_into().unwrap());
                assert_eq!(data, packet(stated));
                // At most PIPE_BUF: all of it or nothing.
                let written = sys::write(self.descriptors.pipe(), &data[..8]);
                assert_eq!(written, Ok(8));
            }
            self.consumer.release().unwrap();
        }
    }

    /// As `datapath.passes.Half.work`, with both modes by turns; for ever.
    fn read(&mut self, seed: u64) {
        let (data, state) = (self.descriptors.data(true), self.descriptors.state(false));
        let mut producer = Producer::new(data, state, false).unwrap();
        let areas = producer.geometry().areas;
        let mut random = Random(seed);
        loop {
            let left = if random.below(2) == 0 && self.consumer.try_take() {
                self.drain(areas);
                fill(&mut producer, random.below(3));
                self.drain(random.below(areas as u64 + 1) as usize);
                self.consumer.drop_lease().unwrap()
            } else {
                fill(&mut producer, random.below(3));
                producer.waiting().unwrap() > 0
            };
            if left {
                sys::ring_bell(self.descriptors.bell());
            }
        }
    }

    /// As `workers.writer._Loop.run`; for ever.
    fn write(&mut self) {
        loop {
            while self.consumer.try_take() {
                self.drain(2);
                if !self.consumer.drop_lease().unwrap() {
                    break;
                }
            }
            // Blocks until it was rung, and empties it.
            sys::read(self.descriptors.bell(), &mut [0; 8]).unwrap();
        }
    }
}

fn fill(producer: &mut Producer, areas: u64) {
    for _ in 0..areas {
        if !producer.try_begin().unwrap() {
            return;
        }
        let area = producer.head();
        for entry in 0..entries_of(area) {
            assert!(producer.try_add(&packet(8 * area + entry), 1, 7));
        }
        producer.publish();
    }
}

/// A descriptor of our own.
fn made(descriptor: RawFd) -> OwnedFd {
    assert!(descriptor >= 0);
    // SAFETY: the descriptor is new and given to nobody else.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// A child, which does not outlive us.
struct Running {
    child: Child,
    generation: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The supervisor.
struct Supervisor {
    memory: RingMemory,
    recovery: Recovery,
    bell: OwnedFd,
    /// What children inherit stays open until the end.
    inherited: Vec<OwnedFd>,
    generation: u64,
}

impl Supervisor {
    fn new(recovery: Recovery) -> (Self, File) {
        let memory = RingMemory::new(SMALL);
        let mut ends = [-1; 2];
        // SAFETY: pipe2 stores two descriptors; fcntl with F_SETPIPE_SZ, eventfd and dup take no pointer.
        let (bell, inherited) = unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
            // It holds 512 deliveries.
            assert!(libc::fcntl(ends[1], libc::F_SETPIPE_SZ, 4096) >= 4096);
            let bell = libc::eventfd(0, libc::EFD_CLOEXEC);
            let (data, state) = (&memory.data, &memory.state);
            let own = [
                data.writer(),
                data.reader(),
                state.writer(),
                state.reader(),
                bell,
                ends[1],
            ];
            // Copies are not closed on exec.
            (bell, own.map(|descriptor| made(libc::dup(descriptor))))
        };
        drop(made(ends[1]));
        let supervisor = Self {
            memory,
            recovery,
            bell: made(bell),
            inherited: inherited.into(),
            generation: 0,
        };
        (supervisor, File::from(made(ends[0])))
    }

    fn start(&mut self, role: &str) -> Running {
        self.generation += 1;
        let descriptors: Vec<String> = self
            .inherited
            .iter()
            .map(|each| each.as_raw_fd().to_string())
            .collect();
        let recovery = self.recovery == Recovery::GoOnBehind;
        let said = format!(
            "{role} {} {} {recovery}",
            self.generation,
            descriptors.join(" ")
        );
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--ignored"])
            .env(ROLE, said)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        Running {
            child,
            generation: self.generation,
        }
    }

    /// Kill a process, and free what it held: `RingMemory.clear_dead`, and the ring that follows.
    fn kill(&self, mut running: Running) {
        let ended = running.child.try_wait().unwrap();
        assert_eq!(ended, None, "it has ended by itself");
        let holder = u64::from(running.child.id()) | running.generation << 32;
        drop(running);
        if self.memory.state.word(LEASE) == holder {
            self.memory.state.patch_word(LEASE, 0);
        }
        sys::ring_bell(self.bell.as_raw_fd());
    }

    /// Nobody fills any more, so the writer has to come to it.
    fn wait_until_empty(&self) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.memory.state.word(TAIL) != self.memory.data.word(HEAD) {
            assert!(
                Instant::now() < end,
                "lost wake-up: areas wait and nobody drains"
            );
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

#[test]
#[ignore = "what the other tests start"]
fn child() {
    let said = std::env::var(ROLE).unwrap();
    // SAFETY: asks to be killed when the thread that has started us ends.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let words: Vec<&str> = said.split(' ').collect();
    let generation: u64 = words[1].parse().unwrap();
    let descriptors = Descriptors(std::array::from_fn(|number| {
        words[2 + number].parse().unwrap()
    }));
    let recovery = if words[8] == "true" {
        Recovery::GoOnBehind
    } else {
        Recovery::SendAgain
    };
    let holder = u64::from(std::process::id()) | generation << 32;
    let mut process = Process::new(descriptors, recovery, holder);
    if words[0] == "reader" {
        process.read(generation | 1 << 40);
    } else {
        process.write();
    }
}

/// Numbers of what came out, in order, and how many areas were published.
fn run(recovery: Recovery) -> (Vec<u64>, u64) {
    let (mut supervisor, mut pipe) = Supervisor::new(recovery);
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let collector = std::thread::spawn(move || {
        let (mut delivered, mut number) = (Vec::new(), [0; 8]);
        while pipe.read_exact(&mut number).is_ok() {
            delivered.push(u64::from_le_bytes(number));
            if counted.fetch_add(1, Ordering::Relaxed) % 5000 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        delivered
    });
    let mut random = Random(0x2545_F491_4F6C_DD1D);
    let mut reader = supervisor.start("reader");
    let mut writer = supervisor.start("writer");
    for death in 0..DEATHS {
        // Not before something has come out since the last death.
        let (before, end) = (
            count.load(Ordering::Relaxed),
            Instant::now() + Duration::from_secs(30),
        );
        while count.load(Ordering::Relaxed) <= before {
            assert!(Instant::now() < end, "nothing comes out");
            std::thread::sleep(Duration::from_micros(100));
        }
        std::thread::sleep(Duration::from_micros(random.below(4000)));
        if death % 2 == 0 {
            supervisor.kill(reader);
            if random.below(2) == 0 {
                supervisor.wait_until_empty();
            }
            reader = supervisor.start("reader");
        } else {
            supervisor.kill(writer);
            writer = supervisor.start("writer");
        }
    }
    supervisor.kill(reader);
    supervisor.wait_until_empty();
    supervisor.kill(writer);
    let published = supervisor.memory.data.word(HEAD);
    drop(supervisor);
    (collector.join().unwrap(), published)
}

fn numbers_below(area: u64) -> Vec<u64> {
    (0..area)
        .flat_map(|area| (0..entries_of(area)).map(move |entry| 8 * area + entry))
        .collect()
}

#[test]
fn a_seal_ring_whose_processes_are_killed_loses_nothing_and_sends_one_area_again_for_a_death() {
    let (delivered, areas) = run(Recovery::SendAgain);

    let (mut fresh, mut again): (Vec<u64>, u64) = (Vec::new(), 0);
    for number in delivered {
        match fresh.last() {
            Some(last) if number <= *last => {
                assert_eq!(
                    number / 8,
                    last / 8,
                    "an area came again that had been released"
                );
                again += u64::from(number % 8 == 0);
            }
            _ => fresh.push(number),
        }
    }
    assert_eq!(fresh, numbers_below(areas));
    assert!(again <= DEATHS + 2, "{again}");
}

#[test]
fn an_open_ring_whose_processes_are_killed_delivers_nothing_twice_and_loses_one_entry_for_a_death()
{
    let (delivered, areas) = run(Recovery::GoOnBehind);

    assert!(
        delivered.windows(2).all(|pair| pair[0] < pair[1]),
        "out of order, or twice"
    );
    let expected = numbers_below(areas);
    assert!(delivered
        .iter()
        .all(|number| expected.binary_search(number).is_ok()));
    let missing = expected.len() - delivered.len();
    assert!(missing as u64 <= DEATHS + 2, "{missing}");
}
