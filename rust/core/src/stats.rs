//! Counters in shared memory: one page for each process, written by it alone; as `nebula_mp.shm_stats`.
//!
//! The names and their order are Python's: `Slots::from_names` is given `shm_stats.NAMES` when a part is made, and
//! refuses if one that this crate counts is missing. A counter is one word and belongs to one process at a time, so
//! adding needs no read-modify-write instruction, and who reads sees it before or after.

use std::sync::atomic::Ordering;

use crate::error::{Fault, Result};
use crate::layout::{HEADER_WORDS, STATS};
use crate::region::{Region, PAGE_BYTES};

macro_rules! slots {
    ($($(#[$about:meta])* $field:ident = $name:literal,)*) => {
        /// Where each counter stands that this crate counts; one field for each name, dots and `mp.` left out.
        #[derive(Debug, Clone, Copy, Default)]
        #[allow(missing_docs)]
        pub struct Slots {
            $($(#[$about])* pub $field: usize,)*
        }

        impl Slots {
            /// Where these counters stand among all `names`.
            pub fn from_names<N: AsRef<str>>(names: &[N]) -> Result<Self> {
                Ok(Self { $($field: find(names, $name)?,)* })
            }
        }

        /// The names that this crate counts; of `*.packets` the bytes are the next slot.
        pub const COUNTED: &[&str] = &[$($name,)*];
    };
}

slots! {
    tun_rx_packets = "mp.tun.rx.packets", // bytes are the next slot, as for all `*_packets`
    tun_tx_packets = "mp.tun.tx.packets",
    udp_rx_packets = "mp.udp.rx.packets",
    udp_tx_packets = "mp.udp.tx.packets",
    lease_refused = "mp.lease.refused",
    ring_full_seal = "mp.ring.full.seal",
    ring_full_open = "mp.ring.full.open",
    ring_full_upcall = "mp.ring.full.upcall",
    ring_full_stranger = "mp.ring.full.stranger",
    ring_resumed = "mp.ring.resumed",
    upcalls = "mp.upcalls",
    upcalls_limited = "mp.upcalls.limited",
    strangers = "mp.strangers",
    relay_forwarded = "mp.relay.forwarded",
    flows_admitted = "mp.flows.admitted",
    flows_evicted = "mp.flows.evicted",
    counter_span = "mp.counter.span",
    tun_again = "mp.tun.again",
    tun_split = "mp.tun.split",
    tun_drop_nobufs = "mp.tun.drop.nobufs",
    tun_drop_refused = "mp.tun.drop.refused",
    tun_drop_again = "mp.tun.drop.again",
    tun_drop_offload = "mp.tun.drop.offload",
    udp_gso_off = "mp.udp.gso_off",
    udp_drop_unreachable = "mp.udp.drop.unreachable",
    udp_drop_toobig = "mp.udp.drop.toobig",
    udp_drop_eperm = "mp.udp.drop.eperm",
    udp_drop_other = "mp.udp.drop.other",
    udp_tx_dropped = "udp.tx.dropped",
    rx_icmp = "mp.rx.icmp",
    drop_oversize = "drop.oversize",
    drop_short = "drop.short",
    drop_version = "drop.version",
    drop_type = "drop.type",
    drop_looped = "drop.looped",
    drop_unknown_index = "drop.unknown_index",
    drop_truncated = "drop.truncated",
    drop_replay = "drop.replay",
    drop_old = "drop.old",
    drop_auth = "drop.auth",
    drop_relay_index = "drop.relay_index",
    drop_inner_ip = "drop.inner_ip",
    drop_source_addr = "drop.source_addr",
    drop_firewall_incoming_no_rule = "drop.firewall.incoming.no_rule",
    drop_firewall_outgoing_no_rule = "drop.firewall.outgoing.no_rule",
    drop_tun_inner_ip = "drop.tun.inner_ip",
    drop_exhausted = "drop.exhausted",
}

fn find<N: AsRef<str>>(names: &[N], name: &str) -> Result<usize> {
    let at = |name: &str| names.iter().position(|each| each.as_ref() == name);
    let missing = |name: &str| {
        Fault::contradiction(
            STATS.name,
            "set of names",
            format!("without {name}"),
            "with it",
        )
    };
    let slot = at(name).ok_or_else(|| missing(name))?;
    if let Some(stem) = name.strip_suffix("packets") {
        let bytes = format!("{stem}bytes");
        if at(&bytes) != Some(slot + 1) {
            return Err(missing(&format!("{bytes} behind {name}")));
        }
    }
    Ok(slot)
}

/// A process's page: `add` in the process itself. A successor goes on with what is there.
pub struct StatsPage {
    /// Where to count.
    pub slots: Slots,
    page: Region,
}

impl StatsPage {
    /// Attach to the page behind `descriptor`; `names` are `shm_stats.NAMES`, `digest` is that of the names.
    pub fn attach(descriptor: i32, names: &[String], digest: u64) -> Result<Self> {
        let slots = Slots::from_names(names)?;
        let page = Region::attach(descriptor, &STATS, true, "")?;
        let [count, made_for, ..] = *page.parameters();
        let ours = names.len() as u64;
        let fits = HEADER_WORDS + names.len() <= PAGE_BYTES / 8;
        if (count, made_for) != (ours, digest) || page.size() != PAGE_BYTES || !fits {
            let (found, expected) = ((count, made_for), (ours, digest));
            return Err(page.contradiction(
                "set of names",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        Ok(Self { slots, page })
    }

    /// Count `amount` at a slot.
    #[inline]
    pub fn add(&self, slot: usize, amount: u64) {
        // One writer. Wrapping: a predecessor that went mad may have left any value.
        let word = self.page.word(HEADER_WORDS + slot);
        word.store(
            word.load(Ordering::Relaxed).wrapping_add(amount),
            Ordering::Relaxed,
        );
    }

    /// Count packets at a `*_packets` slot and bytes at the one behind it.
    #[inline]
    pub fn add_traffic(&self, slot: usize, packets: u64, bytes: u64) {
        self.add(slot, packets);
        self.add(slot + 1, bytes);
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::testing::Memory;

    fn names() -> Vec<String> {
        let mut names = vec!["mp.passes".to_owned()];
        for &name in COUNTED {
            names.push(name.to_owned());
            names.extend(
                name.strip_suffix("packets")
                    .map(|stem| format!("{stem}bytes")),
            );
        }
        names
    }

    fn page(names: &[String], digest: u64) -> Memory {
        Memory::new(&STATS, PAGE_BYTES, &[names.len() as u64, digest])
    }

    fn refusal(memory: &Memory, names: &[String], digest: u64) -> String {
        let attached = StatsPage::attach(memory.writer(), names, digest);
        attached.err().unwrap().to_string()
    }

    #[test]
    fn what_is_counted_stands_where_the_names_say() {
        let names = names();
        let memory = page(&names, 77);
        let stats = StatsPage::attach(memory.writer(), &names, 77).unwrap();

        stats.add(stats.slots.drop_auth, 2);
        stats.add(stats.slots.drop_auth, 3);
        stats.add_traffic(stats.slots.udp_tx_packets, 64, 80_000);

        let value = |name: &str| {
            memory.word(HEADER_WORDS + names.iter().position(|each| each == name).unwrap())
        };
        assert_eq!(value("drop.auth"), 5);
        assert_eq!(value("mp.udp.tx.packets"), 64);
        assert_eq!(value("mp.udp.tx.bytes"), 80_000);
        let words = HEADER_WORDS..PAGE_BYTES / 8;
        assert_eq!(words.map(|index| memory.word(index)).sum::<u64>(), 80_069);
    }

    #[test]
    fn a_successor_goes_on_with_what_is_there() {
        let names = names();
        let memory = page(&names, 77);
        for _ in 0..2 {
            let stats = StatsPage::attach(memory.writer(), &names, 77).unwrap();
            stats.add(stats.slots.upcalls, 4);
            assert_eq!(memory.word(HEADER_WORDS + stats.slots.upcalls) % 4, 0);
        }
        let slots = Slots::from_names(&names).unwrap();
        assert_eq!(memory.word(HEADER_WORDS + slots.upcalls), 8);
    }

    #[test]
    fn any_value_that_a_mad_process_left_can_be_added_to() {
        let names = names();
        let memory = page(&names, 77);
        let stats = StatsPage::attach(memory.writer(), &names, 77).unwrap();
        memory.patch_word(HEADER_WORDS + stats.slots.drop_old, u64::MAX);
        stats.add(stats.slots.drop_old, 3);
        assert_eq!(memory.word(HEADER_WORDS + stats.slots.drop_old), 2);
    }

    #[test]
    fn a_page_for_other_names_is_refused() {
        let names = names();
        let count = names.len();
        assert_eq!(
            refusal(&page(&names, 78), &names, 77),
            format!("shared memory 'stats': set of names is ({count}, 78), expected ({count}, 77)")
        );
        assert!(refusal(&page(&names[1..], 77), &names, 77).contains("set of names"));
        let larger = Memory::new(&STATS, 2 * PAGE_BYTES, &[count as u64, 77]);
        assert!(refusal(&larger, &names, 77).contains("set of names"));
    }

    #[test]
    fn more_names_than_a_page_has_room_for_are_refused() {
        let mut names = names();
        names.resize(PAGE_BYTES / 8 - HEADER_WORDS + 1, "more".to_owned());
        assert!(refusal(&page(&names, 77), &names, 77).contains("set of names"));
        names.pop();
        assert!(StatsPage::attach(page(&names, 77).writer(), &names, 77).is_ok());
    }

    #[test]
    fn names_without_one_that_is_counted_here_are_refused() {
        let all = names();
        for &gone in COUNTED {
            let names: Vec<String> = all.iter().filter(|each| *each != gone).cloned().collect();
            assert!(
                refusal(&page(&names, 77), &names, 77).contains(gone),
                "{gone}"
            );
        }
    }

    #[test]
    fn packets_without_bytes_behind_them_are_refused() {
        let mut names = names();
        let bytes = names
            .iter()
            .position(|each| each == "mp.tun.rx.bytes")
            .unwrap();
        let moved = names.remove(bytes);
        names.push(moved);
        assert!(refusal(&page(&names, 77), &names, 77)
            .contains("mp.tun.rx.bytes behind mp.tun.rx.packets"));
    }
}
