//! Random plans of superpackets.

use proptest::prelude::*;
use proptest::sample::select;

use crate::packets::{Plan, ACK, CWR, DF, ECE, FIN, PSH, TCP, TIMESTAMPS, UDP};

/// As many cases as there is time for, and no files beside the tests.
pub fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases: if cfg!(miri) { 3 } else { cases },
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Pieces of `size` bytes, the last of `last` or fewer; in one case of four all are zeros.
fn payloads() -> impl Strategy<Value = (usize, Vec<u8>)> {
    let size_max: usize = if cfg!(miri) { 40 } else { 1400 };
    let sizes = prop_oneof![1..=size_max, select(vec![1_usize, 8, 24, 36])];
    let count = 1_usize..if cfg!(miri) { 4 } else { 40 };
    let filler = proptest::collection::vec(any::<u8>(), 8..64);
    (sizes, count, any::<prop::sample::Index>(), filler, 0..4).prop_map(
        |(size, count, last, filler, zeros)| {
            let length = (count - 1) * size + 1 + last.index(size);
            let length = length.min(64_000);
            let bytes = if zeros == 0 { vec![0] } else { filler };
            (size, bytes.into_iter().cycle().take(length).collect())
        },
    )
}

/// Superpackets whose packets `coalesce` joins again to just this one, if there are several.
pub fn joinable() -> impl Strategy<Value = Plan> {
    let ends = (select(vec![4, 6]), select(vec![TCP, UDP]));
    let options = select(vec![
        vec![],
        TIMESTAMPS.to_vec(),
        [TIMESTAMPS.as_slice(), &TIMESTAMPS, &TIMESTAMPS, &[0; 4]].concat(),
    ]);
    let flags = select(vec![ACK, ACK | PSH, ACK | ECE]);
    let sequence = prop_oneof![any::<u32>(), u32::MAX - 3000..];
    let identification = prop_oneof![any::<u16>(), u16::MAX - 20..];
    let others = (any::<u8>(), any::<u8>(), any::<u32>(), any::<u16>());
    (
        (ends, payloads(), options, flags),
        (sequence, identification, select(vec![0, DF]), others),
    )
        .prop_map(
            |(
                (ends, (size, payload), options, flags),
                (sequence, identification, fragment, others),
            )| {
                let mut plan = Plan::new(ends.0, ends.1, payload, size);
                plan.options = options;
                plan.flags = flags;
                plan.sequence = sequence;
                plan.identification = identification;
                plan.flags_and_offset = fragment;
                (plan.service, plan.ttl, plan.acknowledgement, plan.window) = others;
                plan
            },
        )
}

/// Any superpacket.
pub fn any_plan() -> impl Strategy<Value = Plan> {
    let flags = select(vec![
        ACK,
        ACK | PSH,
        ACK | FIN | PSH,
        ACK | CWR | ECE,
        ACK | CWR | FIN,
    ]);
    (joinable(), flags, any::<bool>(), 0_usize..60).prop_map(
        |(mut plan, flags, more, extension)| {
            plan.flags = flags;
            if more && plan.version == 4 {
                plan.ip_options = vec![0x94, 4, 0, 0];
            }
            if more && plan.version == 6 {
                plan.extension = vec![0; extension / 8 * 8 + 6];
            }
            plan
        },
    )
}
