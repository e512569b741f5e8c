//! Open ring to a TUN queue.

use nebula_mp_core::error::Fault;

use crate::packets::{Plan, TCP, TIMESTAMPS, UDP};
use crate::world::{is_killed, Device, Instead, World, NO_OFFLOADS, VIRTIO};

fn contents() -> Vec<Vec<u8>> {
    (0..9)
        .map(|number| vec![number; 30 + usize::from(number)])
        .collect()
}

fn publish(world: &World, contents: &[Vec<u8>]) {
    let entries: Vec<_> = contents.iter().map(|each| (&each[..], 1, 3)).collect();
    world.publish(&entries);
}

fn plan() -> Plan {
    let payload = (0..10_000).map(|at| (at % 251) as u8).collect();
    let mut plan = Plan::new(4, TCP, payload, 1248);
    plan.options = TIMESTAMPS.to_vec();
    plan
}

/// A superpacket as the device wants it.
fn frame(plan: &Plan) -> Vec<u8> {
    [&plan.virtio()[..], &plan.packet()].concat()
}

fn publish_frames(world: &World, plan: &Plan, count: usize) {
    let frame = frame(plan);
    for _ in 0..count {
        world.publish(&[(&frame, plan.count() as u32, 3)]);
    }
}

/// Its packets, each behind an empty header.
fn singles(plan: &Plan) -> Vec<Vec<u8>> {
    plan.packets()
        .into_iter()
        .map(|packet| [vec![0; 10], packet].concat())
        .collect()
}

/// Let every write of more than one packet fail.
fn refuse_superpackets(device: &Device, number: i32) {
    device
        .script
        .rule(move |_, call| (call.bytes > 2000).then_some(Instead::Refuse(number)));
}

#[test]
fn each_entry_is_one_packet_of_the_device() {
    let (world, device) = (World::open(), Device::new());
    publish(&world, &contents()[..3]);
    publish(&world, &contents()[3..]);
    let mut drain = world.tun(&device, NO_OFFLOADS);

    assert_eq!(drain.drain(1), Ok(1));
    assert_eq!(device.received(), &contents()[..3]);
    assert_eq!(drain.drain(10), Ok(1));

    assert_eq!(device.received(), &contents()[3..]);
    assert_eq!(world.count("mp.tun.tx.packets"), 9);
    assert_eq!(world.count("mp.tun.tx.bytes"), (30..39).sum::<u64>());
}

#[test]
fn a_packet_refused_at_any_call_is_counted_and_all_others_are_written() {
    for (number, reason) in [
        (libc::ENOBUFS, "mp.tun.drop.nobufs"),
        (libc::ENOMEM, "mp.tun.drop.nobufs"),
        (libc::EINVAL, "mp.tun.drop.refused"),
        (libc::EIO, "mp.tun.drop.refused"),
        (libc::ENETDOWN, "mp.tun.drop.refused"),
    ] {
        let (world, device) = (World::open(), Device::new());
        for at in 0..9 {
            publish(&world, &contents()[..5]);
            publish(&world, &contents()[5..]);
            device.script.refuse(number, at);

            assert_eq!(world.tun(&device, NO_OFFLOADS).drain(10), Ok(2));

            let mut expected = contents();
            expected.remove(at);
            assert_eq!(device.received(), expected);
        }
        assert_eq!(world.drops().into_iter().collect::<Vec<_>>(), [(reason, 9)]);
        assert_eq!(world.count("mp.tun.tx.packets"), 72);
    }
}

#[test]
fn a_partial_write_counts_as_refused() {
    let (world, device) = (World::open(), Device::new());
    publish(&world, &contents());
    device
        .script
        .rule(|_, call| Some(Instead::Written(call.bytes - 1)));

    world.tun(&device, NO_OFFLOADS).drain(10).unwrap();

    assert_eq!(world.count("mp.tun.drop.refused"), 9);
    assert_eq!(world.count("mp.tun.tx.packets"), 0);
}

#[test]
fn a_device_that_is_full_for_a_moment_loses_nothing() {
    let (world, device) = (World::open(), Device::new());
    for at in 0..9 {
        publish(&world, &contents());
        device.script.refuse(libc::EAGAIN, at);
        world.tun(&device, NO_OFFLOADS).drain(10).unwrap();
        assert_eq!(device.received(), contents());
    }
    assert_eq!(world.count("mp.tun.again"), 9);
    assert!(world.drops().is_empty());
}

#[test]
fn a_device_that_stays_full_is_waited_for_once_in_a_call() {
    let (world, device) = (World::open(), Device::new());
    publish(&world, &contents());
    let mut drain = world.tun(&device, NO_OFFLOADS);
    device
        .script
        .rule(|_, _| Some(Instead::Refuse(libc::EAGAIN)));
    device.script.never_ready();

    assert_eq!(drain.drain(10), Ok(1));

    assert_eq!(device.script.waits(), [10]);
    publish(&world, &contents());
    drain.drain(10).unwrap();
    assert_eq!(device.script.waits(), [10, 10]);
    assert_eq!(world.count("mp.tun.drop.again"), 18);
}

#[test]
fn a_superpacket_is_written_whole_and_counts_as_what_its_packets_would_have_been() {
    let (world, device) = (World::open(), Device::new());
    let payload: Vec<u8> = (0..5000).map(|at| at as u8).collect();
    let plans = [plan(), Plan::new(6, UDP, payload, 600)];
    let single = [vec![0; 10], contents().remove(3)].concat();
    publish(&world, std::slice::from_ref(&single));
    for each in &plans {
        publish_frames(&world, each, 1);
    }

    assert_eq!(world.tun(&device, VIRTIO).drain(10), Ok(3));

    assert_eq!(
        device.received(),
        [single, frame(&plans[0]), frame(&plans[1])]
    );
    let packets: Vec<_> = plans.iter().flat_map(Plan::packets).collect();
    let bytes: usize = packets.iter().map(Vec::len).sum();
    assert_eq!(world.count("mp.tun.tx.packets"), 1 + packets.len() as u64);
    assert_eq!(world.count("mp.tun.tx.bytes"), 33 + bytes as u64);
}

#[test]
fn the_packets_of_a_superpacket_there_is_no_room_for_are_all_counted() {
    for (number, reason) in [
        (libc::ENOBUFS, "mp.tun.drop.nobufs"),
        (libc::ENOMEM, "mp.tun.drop.nobufs"),
        (libc::EAGAIN, "mp.tun.drop.again"),
    ] {
        let (world, device) = (World::open(), Device::new());
        publish_frames(&world, &plan(), 1);
        let single = [vec![0; 10], contents().remove(0)].concat();
        publish(&world, std::slice::from_ref(&single));
        device.script.never_ready();
        device.script.refuse(number, 0);

        assert_eq!(world.tun(&device, VIRTIO).drain(10), Ok(2));

        assert_eq!(device.received(), [single]);
        let drops: Vec<_> = world.drops().into_iter().collect();
        assert_eq!(drops, [(reason, plan().count() as u64)]);
        assert_eq!(world.count("mp.tun.tx.packets"), 1);
    }
}

#[test]
fn a_superpacket_that_is_refused_is_written_packet_by_packet() {
    let payload: Vec<u8> = (0..5000).map(|at| at as u8).collect();
    for each in [
        plan(),
        Plan::new(4, UDP, payload.clone(), 600),
        Plan::new(6, UDP, payload.clone(), 600),
        Plan::new(6, TCP, payload, 600),
    ] {
        for number in [libc::EIO, libc::EINVAL] {
            let (world, device) = (World::open(), Device::new());
            publish_frames(&world, &each, 1);
            device.script.refuse(number, 0);

            assert_eq!(world.tun(&device, VIRTIO).drain(10), Ok(1));

            assert_eq!(device.received(), singles(&each));
            assert!(world.drops().is_empty());
            let bytes: usize = each.packets().iter().map(Vec::len).sum();
            assert_eq!(world.count("mp.tun.tx.packets"), each.count() as u64);
            assert_eq!(world.count("mp.tun.tx.bytes"), bytes as u64);
            assert_eq!(world.count("mp.tun.split"), 1);
        }
    }
}

#[test]
fn after_three_refusals_in_a_row_no_superpacket_is_tried_any_more() {
    let (world, device) = (World::open(), Device::new());
    let mut drain = world.tun(&device, VIRTIO);
    refuse_superpackets(&device, libc::EINVAL);
    for number in 1..=5 {
        publish_frames(&world, &plan(), 1);
        drain.drain(10).unwrap();
        let gone = drain.given_up.is_some();
        assert_eq!(gone, number >= 3);
    }

    let tried = device
        .script
        .calls()
        .iter()
        .filter(|it| it.bytes > 2000)
        .count();
    assert_eq!(tried, 3);
    assert_eq!(device.received(), vec![singles(&plan()); 5].concat());
    assert_eq!(drain.given_up, Some("tso and uso towards the local stack"));
    assert_eq!(world.count("mp.tun.split"), 5);
}

#[test]
fn one_that_is_taken_between_them_begins_the_count_anew() {
    let (world, device) = (World::open(), Device::new());
    let mut drain = world.tun(&device, VIRTIO);
    for taken in [false, false, true, false, false, true] {
        refuse_superpackets(&device, libc::EIO);
        if taken {
            device.script.allow();
        }
        publish_frames(&world, &plan(), 1);
        drain.drain(10).unwrap();
    }

    assert_eq!(drain.given_up, None);
    assert_eq!(world.count("mp.tun.split"), 4);
}

#[test]
fn a_device_that_takes_nothing_at_all_is_still_offered_superpackets_later() {
    let (world, device) = (World::open(), Device::new());
    let mut drain = world.tun(&device, VIRTIO);
    let count = plan().count();
    publish_frames(&world, &plan(), 4);
    device.script.rule(|_, _| Some(Instead::Refuse(libc::EIO)));
    drain.drain(10).unwrap();
    assert_eq!(world.count("mp.tun.drop.refused"), 4 * count as u64);
    assert_eq!(device.script.calls().len(), 4 + 4 * count); // each as a whole first
    device.script.allow();
    publish_frames(&world, &plan(), 1);

    drain.drain(10).unwrap();

    assert_eq!(device.received(), [frame(&plan())]);
    assert_eq!(world.count("mp.tun.split"), 0);
}

#[test]
fn what_no_producer_of_ours_made_is_refused_as_a_whole() {
    let plan = plan();
    let mut bad_header = frame(&plan);
    bad_header[1] = 99;
    let mut single = frame(&plan);
    single[..10].fill(0);
    let shorter = frame(&plan)[..30].to_vec();
    let (good, tiny) = (frame(&plan), vec![1; 4]);
    for (data, packets) in [
        (&bad_header, plan.count()),
        (&single, plan.count()),
        (&shorter, plan.count()),
        (&good, plan.count() + 1),
        (&good, 2),
        (&tiny, 3),
    ] {
        let (world, device) = (World::open(), Device::new());
        world.publish(&[(data, packets as u32, 3)]);
        device.script.refuse(libc::EINVAL, 0);

        assert_eq!(world.tun(&device, VIRTIO).drain(10), Ok(1));

        assert!(device.received().is_empty());
        assert_eq!(world.count("mp.tun.drop.refused"), packets as u64);
    }
}

#[test]
fn without_headers_nothing_is_cut() {
    let (world, device) = (World::open(), Device::new());
    publish_frames(&world, &plan(), 1);
    device.script.refuse(libc::EINVAL, 0);

    world.tun(&device, NO_OFFLOADS).drain(10).unwrap();

    assert!(device.received().is_empty());
    assert_eq!(world.count("mp.tun.drop.refused"), plan().count() as u64);
}

#[test]
fn a_lost_device_is_a_fault_and_a_successor_passes_over_what_was_in_progress() {
    for number in [libc::EBADF, libc::EBADFD, libc::EFAULT] {
        let (world, device) = (World::open(), Device::new());
        publish(&world, &contents());
        device.script.refuse(number, 4);
        let found = world.tun(&device, NO_OFFLOADS).drain(10);
        assert_eq!(found, Err(Fault::Lost(number)));
        assert_eq!(world.tail(), 0);

        assert_eq!(world.tun(&device, NO_OFFLOADS).drain(10), Ok(1));

        let expected = [&contents()[..4], &contents()[5..]].concat();
        assert_eq!(device.received(), expected);
        assert_eq!(world.count("mp.ring.resumed"), 1);
    }
}

#[test]
fn whoever_dies_in_a_write_costs_one_packet_at_most_and_none_comes_twice() {
    for after in [false, true] {
        let (world, device) = (World::open(), Device::new());
        for at in 0..9 {
            publish(&world, &contents());
            device.script.rule(move |call, _| {
                let death = if after {
                    Instead::DieAfterwards
                } else {
                    Instead::Die
                };
                (call == at).then_some(death)
            });
            let mut drain = world.tun(&device, NO_OFFLOADS);
            assert!(is_killed(|| drop(drain.drain(10))));
            device.script.allow();

            assert_eq!(world.tun(&device, NO_OFFLOADS).drain(10), Ok(1));

            let mut expected = contents();
            if !after {
                expected.remove(at);
            }
            assert_eq!(device.received(), expected);
        }
        assert_eq!(world.count("mp.ring.resumed"), 9);
    }
}

#[test]
fn the_packets_of_a_superpacket_in_progress_are_all_counted_as_passed_over() {
    let (world, device) = (World::open(), Device::new());
    publish_frames(&world, &plan(), 3);
    device
        .script
        .rule(|call, _| (call == 1).then_some(Instead::Die));
    let mut drain = world.tun(&device, VIRTIO);
    assert!(is_killed(|| drop(drain.drain(10))));
    device.script.allow();

    world.tun(&device, VIRTIO).drain(10).unwrap();

    assert_eq!(device.received(), [frame(&plan()), frame(&plan())]);
    let count = plan().count() as u64;
    assert_eq!(world.count("mp.ring.resumed"), count);
    assert_eq!(world.count("mp.tun.tx.packets"), 2 * count);
}

#[test]
fn whoever_dies_between_the_parts_of_a_superpacket_writes_none_of_them_twice() {
    let (world, device) = (World::open(), Device::new());
    publish_frames(&world, &plan(), 1);
    publish(&world, &contents()[..1]);
    device.script.rule(|call, _| match call {
        0 => Some(Instead::Refuse(libc::EINVAL)),
        4 => Some(Instead::Die),
        _ => None,
    });
    let mut drain = world.tun(&device, VIRTIO);
    assert!(is_killed(|| drop(drain.drain(10))));
    device.script.allow();

    world.tun(&device, VIRTIO).drain(10).unwrap();

    let expected = [&singles(&plan())[..3], &contents()[..1]].concat();
    assert_eq!(device.received(), expected);
}

#[test]
fn an_area_is_released_behind_its_last_call() {
    let device = Device::new();
    let world = std::rc::Rc::new(World::open());
    for areas in [0..4, 4..9, 2..7] {
        publish(&world, &contents()[areas]);
    }
    let seen = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
    let (notes, ring) = (seen.clone(), world.clone());
    device.script.rule(move |_, _| {
        notes.borrow_mut().push(ring.tail());
        None
    });

    assert_eq!(world.tun(&device, NO_OFFLOADS).drain(3), Ok(3));

    assert_eq!(*seen.borrow(), [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]);
    assert_eq!(world.tail(), 3);
}
