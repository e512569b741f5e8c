//! Seal ring to UDP.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use nebula_mp_core::error::Fault;
use nebula_mp_core::tunnels::UdpAddr;
use proptest::prelude::*;

use crate::world::{
    address_of, arrived, is_killed, sink, Call, Instead, Line, World, NO_OFFLOADS, TRAINS,
};

const STEP: usize = 1332;

fn contents() -> Vec<Vec<u8>> {
    (0..9)
        .map(|number| vec![number; 30 + usize::from(number)])
        .collect()
}

fn publish(world: &World, contents: &[Vec<u8>]) {
    let entries: Vec<_> = contents.iter().map(|each| (&each[..], 0, 3)).collect();
    world.publish(&entries);
}

/// So many datagrams of `step` bytes, and one of `last`.
fn train(datagrams: usize, step: usize, last: usize) -> Vec<u8> {
    (0..datagrams * step + last)
        .map(|at| (at * 7 + at / 251) as u8)
        .collect()
}

fn cut(data: &[u8], step: usize) -> Vec<Vec<u8>> {
    data.chunks(step).map(<[u8]>::to_vec).collect()
}

/// A world whose tunnel 3 leads to the sink of a line.
fn joined(line: &Line) -> World {
    let world = World::seal();
    world.reach(3, Some(line.far()));
    world
}

fn call(bytes: usize, segment: usize) -> Call {
    Call {
        bytes,
        segment: (segment > 0).then_some(segment as u16),
    }
}

/// Does a train fail, and a datagram not?
fn refuse_trains(line: &Line, number: i32) {
    line.script
        .rule(move |_, call| call.segment.map(|_| Instead::Refuse(number)));
}

#[test]
fn each_entry_is_one_datagram_to_the_address_that_the_tunnel_has_now() {
    let line = Line::ipv4();
    let world = joined(&line);
    publish(&world, &contents()[..2]);
    publish(&world, &contents()[2..4]);
    let mut drain = world.real_udp(line.source.as_raw_fd(), NO_OFFLOADS);

    assert_eq!(drain.drain(1), Ok(1));
    assert_eq!(arrived(&line.sink), &contents()[..2]);
    let elsewhere = sink("127.0.0.1");
    world.reach(3, Some(address_of(&elsewhere)));
    assert_eq!(drain.drain(10), Ok(1));
    assert_eq!(arrived(&elsewhere), &contents()[2..4]);

    assert_eq!(drain.drain(10), Ok(0));
    assert_eq!(world.count("mp.udp.tx.packets"), 4);
    assert_eq!(world.count("mp.udp.tx.bytes"), 30 + 31 + 32 + 33);
}

#[test]
fn entries_of_several_tunnels_go_each_to_its_own_peer() {
    let (line, other) = (Line::ipv4(), sink("127.0.0.1"));
    let world = joined(&line);
    world.reach(5, Some(address_of(&other)));
    world.publish(&[(b"one", 0, 3), (b"two", 0, 5), (b"three", 0, 3)]);

    assert_eq!(world.udp(&line, TRAINS).drain(1), Ok(1));

    assert_eq!(arrived(&line.sink), [&b"one"[..], b"three"]);
    assert_eq!(arrived(&other), [b"two"]);
}

#[test]
fn without_trains_an_entry_of_several_datagrams_is_cut_at_its_segment() {
    let line = Line::ipv4();
    let world = joined(&line);
    let data = train(2, 30, 10);
    world.publish(&[(&data, 30, 3)]);

    assert_eq!(world.udp(&line, NO_OFFLOADS).drain(1), Ok(1));

    assert_eq!(arrived(&line.sink), cut(&data, 30));
    assert_eq!(line.script.calls(), [call(30, 0), call(30, 0), call(10, 0)]);
    assert_eq!(world.count("mp.udp.tx.packets"), 3);
}

#[test]
fn a_train_is_one_call_and_arrives_as_its_datagrams_over_either_version() {
    for (here, there) in [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::", "127.0.0.1")] {
        let line = Line::new(here, there);
        let world = joined(&line);
        let data = train(48, STEP, 700);
        world.publish(&[(&data, STEP as u32, 3)]);

        assert_eq!(world.udp(&line, TRAINS).drain(1), Ok(1));

        assert_eq!(arrived(&line.sink), cut(&data, STEP), "{there}");
        assert_eq!(line.script.calls(), [call(data.len(), STEP)]);
        assert_eq!(world.count("mp.udp.tx.packets"), 49);
        assert_eq!(world.count("mp.udp.tx.bytes"), data.len() as u64);
    }
}

#[test]
fn a_train_has_as_many_bytes_as_a_datagram_may_have_and_as_many_datagrams_as_the_kernel_cuts() {
    // 65,507 and 65,487 bytes at most: of IPv6 one byte less than the second.
    for (here, there, most) in [
        ("0.0.0.0", "127.0.0.1", 65_507),
        ("::", "127.0.0.1", 65_507),
        ("::", "::1", 65_487),
    ] {
        let line = Line::new(here, there);
        let world = joined(&line);
        let mut drain = world.udp(&line, TRAINS);
        let exact = train(1, most - 1000, 1000);
        world.publish(&[(&exact, (most - 1000) as u32, 3)]);
        drain.drain(1).unwrap();
        assert_eq!(arrived(&line.sink), cut(&exact, most - 1000));

        let longer = train(49, 1337, 1); // 65,514 bytes: 48 of them fit
        world.publish(&[(&longer, 1337, 3)]);
        drain.drain(1).unwrap();
        assert_eq!(arrived(&line.sink), cut(&longer, 1337));

        let many = train(300, 40, 3);
        world.publish(&[(&many, 40, 3)]);
        drain.drain(1).unwrap();
        assert_eq!(arrived(&line.sink), cut(&many, 40));

        let calls = line.script.calls();
        let expected = [
            call(most, most - 1000),
            call(48 * 1337, 1337),
            call(1338, 1337),
            call(128 * 40, 40),
            call(128 * 40, 40),
            call(44 * 40 + 3, 40),
        ];
        assert_eq!(calls, expected);
        assert!(world.drops().is_empty());
    }
}

#[test]
fn a_datagram_refused_at_any_call_is_counted_and_all_others_go() {
    for (number, reason) in [
        (libc::ENOBUFS, "udp.tx.dropped"),
        (libc::ENOMEM, "udp.tx.dropped"),
        (libc::ENETUNREACH, "mp.udp.drop.unreachable"),
        (libc::EHOSTUNREACH, "mp.udp.drop.unreachable"),
        (libc::ENETDOWN, "mp.udp.drop.unreachable"),
        (libc::EADDRNOTAVAIL, "mp.udp.drop.unreachable"),
        (libc::EAFNOSUPPORT, "mp.udp.drop.unreachable"),
        (libc::EMSGSIZE, "mp.udp.drop.toobig"),
        (libc::EPERM, "mp.udp.drop.eperm"),
        (libc::EIO, "mp.udp.drop.other"),
        (libc::EINVAL, "mp.udp.drop.other"),
    ] {
        let line = Line::ipv4();
        let world = joined(&line);
        for at in 0..9 {
            publish(&world, &contents()[..5]);
            publish(&world, &contents()[5..]);
            line.script.refuse(number, at);

            assert_eq!(world.udp(&line, TRAINS).drain(10), Ok(2));

            let mut expected = contents();
            expected.remove(at);
            assert_eq!(arrived(&line.sink), expected);
        }
        assert_eq!(world.drops().into_iter().collect::<Vec<_>>(), [(reason, 9)]);
        assert_eq!(world.count("mp.udp.tx.packets"), 72);
    }
}

#[test]
fn the_answer_to_an_earlier_datagram_costs_none() {
    for number in [
        libc::ECONNREFUSED,
        libc::EPROTO,
        libc::ENOPROTOOPT,
        libc::EHOSTDOWN,
        libc::ENONET,
    ] {
        let line = Line::ipv4();
        let world = joined(&line);
        for at in 0..9 {
            publish(&world, &contents());
            line.script.refuse(number, at);
            world.udp(&line, TRAINS).drain(10).unwrap();
            assert_eq!(arrived(&line.sink), contents());
        }
        assert_eq!(world.count("mp.rx.icmp"), 9);
        assert!(world.drops().is_empty());
    }
}

#[test]
fn an_answer_at_both_tries_drops_the_datagram() {
    let line = Line::ipv4();
    let world = joined(&line);
    publish(&world, &contents()[..2]);
    line.script
        .rule(|call, _| (call < 2).then_some(Instead::Refuse(libc::ECONNREFUSED)));

    world.udp(&line, TRAINS).drain(10).unwrap();

    assert_eq!(arrived(&line.sink), &contents()[1..2]);
    assert_eq!(world.count("mp.rx.icmp"), 1);
    assert_eq!(world.count("mp.udp.drop.other"), 1);
}

#[test]
fn a_socket_that_is_full_for_a_moment_loses_nothing() {
    let line = Line::ipv4();
    let world = joined(&line);
    for at in 0..9 {
        publish(&world, &contents());
        line.script.refuse(libc::EAGAIN, at);
        world.udp(&line, TRAINS).drain(10).unwrap();
        assert_eq!(arrived(&line.sink), contents());
    }
    assert!(world.drops().is_empty());
    assert_eq!(line.script.waits(), [1; 9]);
}

#[test]
fn a_socket_that_stays_full_is_waited_for_once_in_a_call() {
    let line = Line::ipv4();
    let world = joined(&line);
    publish(&world, &contents());
    let mut drain = world.udp(&line, TRAINS);
    line.script.rule(|_, _| Some(Instead::Refuse(libc::EAGAIN)));
    line.script.never_ready();

    assert_eq!(drain.drain(10), Ok(1));

    assert_eq!(line.script.waits(), [1]);
    publish(&world, &contents());
    drain.drain(10).unwrap();
    assert_eq!(line.script.waits(), [1, 1]);
    assert_eq!(world.count("udp.tx.dropped"), 18);
}

#[test]
fn a_train_there_is_no_room_for_is_dropped_as_a_whole() {
    let line = Line::ipv4();
    let world = joined(&line);
    world.publish(&[(&train(20, STEP, 5), STEP as u32, 3), (b"next", 0, 3)]);
    line.script.refuse(libc::ENOBUFS, 0);

    world.udp(&line, TRAINS).drain(10).unwrap();

    assert_eq!(arrived(&line.sink), [b"next"]);
    assert_eq!(world.count("udp.tx.dropped"), 21);
}

#[test]
fn a_tunnel_without_an_address_this_socket_can_send_to_is_unreachable() {
    let line = Line::ipv4();
    let world = joined(&line);
    let mut ip = [0; 16];
    ip[..4].copy_from_slice(&[0x20, 1, 0x0D, 0xB8]);
    let other = UdpAddr {
        ip,
        family: 6,
        port: 4242,
        scope: 0,
    };
    for address in [None, Some(other)] {
        world.reach(3, address);
        world.publish(&[(&train(7, 30, 1), 30, 3), (b"alone", 0, 3)]);
        assert_eq!(world.udp(&line, TRAINS).drain(10), Ok(1));
    }

    assert_eq!(world.count("mp.udp.drop.unreachable"), 18);
    assert!(line.script.calls().is_empty());
}

#[test]
fn where_a_train_is_too_large_for_the_path_datagrams_go_singly_for_a_while() {
    for number in [libc::EMSGSIZE, libc::EINVAL] {
        let line = Line::ipv4();
        let world = joined(&line);
        let mut drain = world.udp(&line, TRAINS);
        let data = train(3, STEP, 9);
        let push = |drain: &mut nebula_mp_core::drains::UdpDrain<_>, step: usize| {
            line.script.allow();
            if step >= STEP {
                refuse_trains(&line, number);
            }
            let data = train(3, step, 9);
            world.publish(&[(&data, step as u32, 3)]);
            drain.drain(1).unwrap();
            assert_eq!(arrived(&line.sink), cut(&data, step));
            line.script.calls().len()
        };

        assert_eq!(push(&mut drain, STEP), 5); // in vain, and then each
        for _ in 1..256 {
            assert_eq!(push(&mut drain, STEP), 4);
        }
        assert_eq!(push(&mut drain, 1200), 1); // shorter datagrams are not concerned
        assert_eq!(push(&mut drain, STEP), 5); // is it wider now?
        assert_eq!(push(&mut drain, STEP + 1), 4);
        assert_eq!(drain.given_up, None);

        let other = sink("127.0.0.1");
        world.reach(5, Some(address_of(&other)));
        line.script.allow();
        world.publish(&[(&data, STEP as u32, 5)]);
        drain.drain(1).unwrap();
        assert_eq!(line.script.calls(), [call(data.len(), STEP)]);
        assert_eq!(arrived(&other), cut(&data, STEP));
        assert!(world.drops().is_empty());
    }
}

#[test]
fn a_kernel_that_cuts_fewer_datagrams_gets_shorter_trains() {
    for limit in [127, 64, 63] {
        let line = Line::ipv4();
        let world = joined(&line);
        let mut drain = world.udp(&line, TRAINS);
        let refuse = move |_: usize, call: &Call| {
            let datagrams = call.bytes.div_ceil(usize::from(call.segment?));
            (datagrams > limit).then_some(Instead::Refuse(libc::EINVAL))
        };
        let data = train(128, 100, 0);
        for _ in 0..4 {
            line.script.rule(refuse);
            world.publish(&[(&data, 100, 3)]);
            drain.drain(1).unwrap();
            assert_eq!(arrived(&line.sink), cut(&data, 100));
        }

        let lengths: Vec<_> = line
            .script
            .calls()
            .iter()
            .map(|it| it.bytes / 100)
            .collect();
        let mut expected = vec![limit; 128 / limit];
        expected.extend((128 % limit > 0).then_some(128 % limit));
        assert_eq!(lengths, expected);
        assert_eq!(drain.given_up, None);
        assert!(world.drops().is_empty());
    }
}

#[test]
fn where_the_device_cannot_cut_there_are_no_trains_any_more() {
    for number in [libc::EIO, libc::EOPNOTSUPP] {
        let line = Line::ipv4();
        let world = joined(&line);
        let mut drain = world.udp(&line, TRAINS);
        let data = train(70, 100, 1);
        world.publish(&[(&data, 100, 3), (&data, 100, 3)]);
        refuse_trains(&line, number);

        drain.drain(1).unwrap();

        assert_eq!(
            arrived(&line.sink),
            [cut(&data, 100), cut(&data, 100)].concat()
        );
        let trains = line
            .script
            .calls()
            .iter()
            .filter(|it| it.segment.is_some())
            .count();
        assert_eq!(trains, 1);
        assert_eq!(drain.given_up, Some("udp_segment"));
        assert_eq!(world.count("mp.udp.gso_off"), 1);
        assert!(world.drops().is_empty());
    }
}

#[test]
fn a_fault_that_single_datagrams_have_as_well_teaches_nothing() {
    for (number, reason) in [
        (libc::EMSGSIZE, "mp.udp.drop.toobig"),
        (libc::EINVAL, "mp.udp.drop.other"),
        (libc::EIO, "mp.udp.drop.other"),
    ] {
        let line = Line::ipv4();
        let world = joined(&line);
        let mut drain = world.udp(&line, TRAINS);
        let data = train(3, STEP, 0);
        world.publish(&[(&data, STEP as u32, 3)]);
        line.script.rule(move |_, _| Some(Instead::Refuse(number)));
        drain.drain(1).unwrap();
        assert_eq!(world.count(reason), 3);

        line.script.allow();
        world.publish(&[(&data, STEP as u32, 3)]);
        drain.drain(1).unwrap();

        assert_eq!(line.script.calls(), [call(3 * STEP, STEP)]);
        assert_eq!(arrived(&line.sink), cut(&data, STEP));
        assert_eq!(drain.given_up, None);
    }
}

#[test]
fn a_lost_socket_is_a_fault_and_a_successor_sends_the_area_again() {
    for number in [libc::EBADF, libc::EBADFD, libc::ENOTSOCK, libc::EFAULT] {
        let line = Line::ipv4();
        let world = joined(&line);
        publish(&world, &contents());
        line.script.refuse(number, 4);

        assert_eq!(world.udp(&line, TRAINS).drain(10), Err(Fault::Lost(number)));
        assert_eq!(world.tail(), 0);
        assert_eq!(world.udp(&line, TRAINS).drain(10), Ok(1));

        let expected = [&contents()[..4], &contents()].concat();
        assert_eq!(arrived(&line.sink), expected);
    }
}

#[test]
fn what_is_no_socket_is_lost_at_once() {
    let world = World::seal();
    let file = std::fs::File::open("/dev/null").unwrap();
    let line = Line::ipv4();
    drop(world.real_udp(line.source.as_raw_fd(), TRAINS));

    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        world.real_udp(file.as_raw_fd(), TRAINS)
    }));

    assert!(found.is_err());
}

#[test]
fn whoever_dies_in_a_send_has_the_whole_area_sent_again() {
    for after in [false, true] {
        let line = Line::ipv4();
        let world = joined(&line);
        for at in 0..9 {
            publish(&world, &contents());
            line.script.rule(move |call, _| {
                let death = if after {
                    Instead::DieAfterwards
                } else {
                    Instead::Die
                };
                (call == at).then_some(death)
            });
            let mut drain = world.udp(&line, TRAINS);
            assert!(is_killed(|| drop(drain.drain(10))));
            line.script.allow();

            assert_eq!(world.udp(&line, TRAINS).drain(10), Ok(1));

            let sent = at + usize::from(after);
            let expected = [&contents()[..sent], &contents()].concat();
            assert_eq!(arrived(&line.sink), expected);
        }
    }
}

#[test]
fn an_area_is_released_behind_its_last_call() {
    let line = Line::ipv4();
    let world = std::rc::Rc::new(joined(&line));
    for areas in [0..4, 4..9, 2..7] {
        publish(&world, &contents()[areas]);
    }
    let seen = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    let (notes, ring) = (seen.clone(), world.clone());
    line.script.rule(move |_, _| {
        notes.borrow_mut().push(ring.tail());
        None
    });

    assert_eq!(world.udp(&line, TRAINS).drain(3), Ok(3));

    assert_eq!(*seen.borrow(), [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]);
    assert_eq!(world.tail(), 3);
}

#[test]
fn a_drains_end_leaves_the_socket_open() {
    let line = Line::ipv4();
    let world = joined(&line);
    publish(&world, &contents()[..1]);
    let mut drain = world.real_udp(line.source.as_raw_fd(), TRAINS);
    drain.drain(1).unwrap();

    drop(drain);

    let again: &UdpSocket = &line.source;
    assert!(again.local_addr().is_ok());
    assert_eq!(arrived(&line.sink), &contents()[..1]);
}

const NUMBERS: [i32; 12] = [
    0,
    0,
    libc::EAGAIN,
    libc::ENOBUFS,
    libc::EMSGSIZE,
    libc::EINVAL,
    libc::EIO,
    libc::EOPNOTSUPP,
    libc::EPERM,
    libc::ECONNREFUSED,
    libc::ENETUNREACH,
    0,
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_refused_every_datagram_is_sent_or_counted_and_in_order(
        entries in prop::collection::vec((1_usize..40, 1_usize..600, 0_usize..50), 1..6),
        refusals in prop::collection::vec(prop::sample::select(&NUMBERS), 1..40),
    ) {
        let line = Line::ipv4();
        let world = joined(&line);
        let mut drain = world.udp(&line, TRAINS);
        let mut expected = Vec::new();
        let mut sent = Vec::new();
        line.script.never_ready();
        line.script.rule(move |call, _| {
            let number = refusals[call % refusals.len()];
            (number != 0).then_some(Instead::Refuse(number))
        });
        for (datagrams, step, last) in entries {
            let data = train(datagrams, step, last.min(step));
            world.publish(&[(&data, step as u32, 3)]);
            expected.extend(cut(&data, step));
            drain.drain(1).unwrap();
            sent.extend(arrived(&line.sink));
        }

        let dropped: u64 = world.drops().values().sum();
        prop_assert_eq!(sent.len() as u64 + dropped, expected.len() as u64);
        prop_assert_eq!(world.count("mp.udp.tx.packets"), sent.len() as u64);
        let mut left = expected.iter();
        for datagram in &sent {
            prop_assert!(left.any(|each| each == datagram));
        }
    }
}
