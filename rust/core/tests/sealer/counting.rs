//! Counters and tunnels: none is used twice, who would be too far ahead waits, and who ends is followed.

use nebula_mp_core::aead::Cipher;
use nebula_mp_core::counters::SPAN_MAX;
use nebula_mp_core::header::COUNTER_LIMIT;

use crate::plans::{frame, plain, small, tcp, whole, Plan};
use crate::site::{open, Row, Shape, Site, FIRST_COUNTER, INDEX, PROVEN};
use crate::{poll_all, NO_TUNNEL};

#[test]
fn a_superpacket_needs_counters_for_all_its_packets_however_it_was_read() {
    let mut site = Site::new(Shape::default());
    let plan = tcp(1000, 10_000);
    site.allow(&plan.packet());
    site.allow(&small(1, 40));
    site.store_counter(COUNTER_LIMIT - 12);
    for _ in 0..2 {
        site.give(&frame(&plan));
    }
    site.give(&plain(1, 40));
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);
    site.give(&plain(1, 40));
    poll_all(&site, &mut sealer);

    let datagrams = site.wire(0);
    let mut expected = plan.packets();
    expected.push(small(1, 40));
    assert_eq!(site.opened(&datagrams, COUNTER_LIMIT - 11), expected);
    assert_eq!(site.drops(), [("drop.exhausted", 11)]);
    site.check_ledger(datagrams.len());
}

#[test]
fn a_tunnel_that_ends_before_its_counters_are_taken_gives_way_to_its_successor_with_one_store() {
    let mut site = Site::new(Shape::default());
    let plan = tcp(1000, 5000);
    site.allow(&plan.packet());
    let mut sealer = site.sealer(0);
    site.give(&frame(&plan));
    poll_all(&site, &mut sealer);
    let first = site.wire(0);
    let later = Row {
        index: INDEX + 1,
        remote_index: 0x0707_0001,
        key: [0x44; 32],
        ..PROVEN
    };
    site.open(later);
    site.set_tunnel(Some(later.index));
    site.give(&frame(&plan));
    poll_all(&site, &mut sealer);

    assert_eq!(site.opened(&first, FIRST_COUNTER), plan.packets());
    let found = site.sealed(0);
    assert_eq!(found[0].0.row, later.index & 0xFFFF);
    let opened = open(
        Cipher::Aes,
        &later.key,
        later.remote_index,
        &found[0].1,
        FIRST_COUNTER,
    );
    assert_eq!(opened, plan.packets());
}

#[test]
fn what_would_overtake_another_worker_is_held_for_a_millisecond_and_what_comes_behind_it_waits() {
    let plan = tcp(1248, 12_480);
    let (lone, super_) = (plain(2, 40), frame(&plan));
    // What is held: a packet, with a superpacket behind it; a superpacket that was read in one piece, or to pieces.
    for (warm, frames) in [
        (false, vec![&lone, &super_]),
        (false, vec![&super_]),
        (true, vec![&super_]),
        (true, vec![&lone, &super_]),
    ] {
        for waits in [false, true] {
            let mut site = Site::new(Shape {
                workers: 2,
                ..Shape::default()
            });
            site.allow(&plan.packet());
            site.allow(&small(1, 40));
            let (mut slow, mut fast) = (site.sealer(0), site.sealer(1));
            let mut expected = Vec::new();
            let mut first = FIRST_COUNTER;
            if warm {
                site.give(&super_);
                poll_all(&site, &mut fast);
                let datagrams = site.wire(1);
                assert_eq!(site.opened(&datagrams, first), plan.packets());
                first += plan.count() as u64;
            }
            site.give(&plain(1, 40));
            poll_all(&site, &mut slow); // published, not sent
            site.store_counter(first + SPAN_MAX);
            for frame in &frames {
                site.give(frame);
                expected.extend(if **frame == lone {
                    vec![small(2, 40)]
                } else {
                    plan.packets()
                });
            }

            let taken = fast.poll(1000, site.now_us).unwrap();
            assert_eq!(taken, expected.len());
            assert!(fast.is_holding());
            assert_eq!(fast.waiting().unwrap(), 0);
            site.give(&lone);
            expected.push(small(2, 40));
            assert_eq!(fast.poll(1000, site.now_us + 999).unwrap(), 0);
            assert!(fast.is_holding());
            if waits {
                // One run after the other goes regardless; time goes on with each.
                for _ in 0..4 {
                    site.now_us += 1000;
                    fast.poll(1000, site.now_us).unwrap();
                }
            } else {
                assert_eq!(site.wire(0).len(), 1);
                assert_eq!(fast.poll(1000, site.now_us + 999).unwrap(), 1);
            }

            assert!(!fast.is_holding());
            let datagrams = site.wire(1);
            assert_eq!(site.opened(&datagrams, first + SPAN_MAX + 1), expected);
            assert_eq!(site.stat("mp.counter.span") > 0, waits);
            let before = if warm { plan.count() } else { 0 };
            let left = if waits { site.wire(0).len() } else { 1 };
            site.check_ledger(before + left + datagrams.len());
        }
    }
}

#[test]
fn a_packet_for_another_peer_waits_behind_a_run_that_is_held() {
    let mut site = Site::new(Shape {
        workers: 2,
        ..Shape::default()
    });
    let other = tcp(1000, 500);
    site.allow(&small(1, 40));
    site.allow_other(&other.packet());
    let later = Row {
        index: INDEX + 1,
        remote_index: 0x0707_0001,
        key: [0x44; 32],
        ..PROVEN
    };
    site.open(later);
    site.set_other_tunnel(later.index);
    let (mut slow, mut fast) = (site.sealer(0), site.sealer(1));
    site.give(&plain(1, 40));
    poll_all(&site, &mut slow);
    site.store_counter(FIRST_COUNTER + SPAN_MAX);
    let theirs = whole(&other.packets().remove(0));
    for frame in [&plain(2, 40), &plain(3, 40), &theirs, &theirs] {
        site.give(frame);
    }

    assert_eq!(fast.poll(1000, site.now_us).unwrap(), 3);
    assert!(fast.is_holding());
    assert_eq!(site.wire(0).len(), 1); // it has sent
    assert_eq!(fast.poll(1000, site.now_us).unwrap(), 1);

    let found = site.sealed(1);
    let shape: Vec<_> = found
        .iter()
        .map(|(entry, all)| (entry.row, all.len()))
        .collect();
    assert_eq!(shape, [(3, 2), (4, 2)]);
    let ours = site.opened(&found[0].1, FIRST_COUNTER + SPAN_MAX + 1);
    assert_eq!(ours, [small(2, 40), small(3, 40)]);
    let opened = open(
        Cipher::Aes,
        &later.key,
        later.remote_index,
        &found[1].1,
        FIRST_COUNTER,
    );
    assert_eq!(opened, [other.packets(), other.packets()].concat());
    site.check_ledger(5);
}

#[test]
fn a_superpacket_that_loses_its_tunnel_while_it_is_held_goes_up() {
    for warm in [false, true] {
        let mut site = Site::new(Shape {
            workers: 2,
            ..Shape::default()
        });
        let plan = tcp(1248, 12_480);
        site.allow(&plan.packet());
        site.allow(&small(1, 40));
        let (mut slow, mut fast) = (site.sealer(1), site.sealer(0));
        if warm {
            site.give(&frame(&plan));
            poll_all(&site, &mut fast);
            assert_eq!(site.wire(0).len(), plan.count());
        }
        site.give(&plain(1, 40));
        poll_all(&site, &mut slow);
        site.store_counter(site.counter() + SPAN_MAX);
        site.give(&frame(&plan));
        poll_all(&site, &mut fast);
        assert!(fast.is_holding());
        site.close();
        poll_all(&site, &mut fast);

        let expected: Vec<_> = plan
            .packets()
            .into_iter()
            .map(|each| (NO_TUNNEL, each))
            .collect();
        assert_eq!(site.upcalls(), expected);
        assert!(!fast.is_holding());
    }
}

#[test]
fn who_attaches_again_goes_on_behind_the_counters_that_were_given_out() {
    let mut site = Site::new(Shape::default());
    let plan = tcp(1000, 10_000);
    site.allow(&plan.packet());
    let mut next = FIRST_COUNTER;
    for _ in 0..3 {
        let mut sealer = site.sealer(0);
        for _ in 0..2 {
            site.give(&frame(&plan));
            poll_all(&site, &mut sealer);
            let datagrams = site.wire(0);
            assert_eq!(site.opened(&datagrams, next), plan.packets());
            next += plan.count() as u64;
        }
    }
}

#[test]
fn packets_of_two_tunnels_have_entries_of_their_own() {
    let mut site = Site::new(Shape::default());
    let plan = tcp(1000, 5000);
    let other = Plan {
        ports: (1, 2),
        ..plan.clone()
    };
    site.allow(&plan.packet());
    site.allow_other(&other.packet());
    let later = Row {
        index: INDEX + 1,
        remote_index: 0x0707_0001,
        key: [0x44; 32],
        ..PROVEN
    };
    site.open(later);
    site.set_other_tunnel(later.index);
    let small = |plan: &Plan| whole(&plan.packets().remove(4));
    for frame in [
        frame(&plan),
        frame(&other),
        small(&plan),
        small(&other),
        small(&other),
    ] {
        site.give(&frame);
    }
    let mut sealer = site.sealer(0);
    poll_all(&site, &mut sealer);

    let found = site.sealed(0);
    let shape: Vec<_> = found
        .iter()
        .map(|(entry, all)| (entry.row, all.len()))
        .collect();
    assert_eq!(shape, [(3, 5), (4, 5), (3, 1), (4, 2)]);
    let ours = [&found[0].1[..], &found[2].1].concat();
    let last = plan.packets().remove(4);
    let opened = site.opened(&ours, FIRST_COUNTER);
    assert_eq!(opened, [plan.packets(), vec![last]].concat());
    let theirs = [&found[1].1[..], &found[3].1].concat();
    let opened = open(
        Cipher::Aes,
        &later.key,
        later.remote_index,
        &theirs,
        FIRST_COUNTER,
    );
    let last = other.packets().remove(4);
    assert_eq!(opened, [other.packets(), vec![last.clone(), last]].concat());
}
