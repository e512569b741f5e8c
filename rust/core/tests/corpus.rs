//! Everything in the corpus of the fuzz targets (`rust/fuzz/corpus`) passes, without a fuzzer.
//!
//! Files `seed-*` are made here: with `WRITE_SEEDS=1` they are written, else they must be what they would be. All
//! others were found by the fuzzer, and are kept for what of the code they reach.

#[path = "../../fuzz/targets.rs"]
mod targets;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use targets::packets::{self, Plan, ACK, CWR, DF, ECE, FIN, PSH, TCP, TIMESTAMPS, UDP};
use targets::TARGETS;

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target)
}

fn corpus(target: &str) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder(target)).expect("a folder for each target");
    files
        .map(|file| {
            let file = file.expect("readable");
            let name = file.file_name().into_string().expect("a plain name");
            (name, fs::read(file.path()).expect("readable"))
        })
        .collect()
}

/// A few superpackets of every kind.
fn plans() -> Vec<(&'static str, Plan)> {
    let plan = |version, protocol, length: usize| {
        Plan::new(
            version,
            protocol,
            (0..length).map(|number| number as u8).collect(),
            40,
        )
    };
    let mut options = plan(4, TCP, 100);
    options.options = TIMESTAMPS.to_vec();
    options.flags = ACK | PSH;
    let mut flags = plan(6, TCP, 120);
    flags.flags = ACK | CWR | ECE | PSH | FIN;
    let mut wrapping = plan(4, TCP, 90);
    wrapping.sequence = u32::MAX - 10;
    wrapping.identification = u16::MAX;
    wrapping.flags_and_offset = 0;
    let mut ip_options = plan(4, UDP, 81);
    ip_options.ip_options = vec![0x94, 4, 0, 0];
    let mut extension = plan(6, UDP, 80);
    extension.extension = vec![1, 4, 0, 0, 0, 0];
    vec![
        ("options", options),
        ("flags", flags),
        ("wrapping", wrapping),
        ("ip-options", ip_options),
        ("extension", extension),
        ("udp4", plan(4, UDP, 100)),
        ("udp6", plan(6, UDP, 41)),
        ("empty", plan(6, TCP, 0)),
    ]
}

/// Name and content for each seed of a target.
fn seeds(target: &str) -> BTreeMap<String, Vec<u8>> {
    let mut seeds: Vec<(String, Vec<u8>)> = Vec::new();
    if target == "header" {
        for (first, subtype) in [
            (0x10, 0),
            (0x11, 0),
            (0x11, 1),
            (0x14, 1),
            (0x16, 0),
            (0x20, 0),
        ] {
            let header = [first, subtype, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 9];
            seeds.push((format!("{first:02x}{subtype:02x}"), header.to_vec()));
        }
    }
    for (name, plan) in plans() {
        let (raw, packet) = (plan.virtio(), plan.packet());
        let content = match target {
            "ip" => plan.one(0),
            "virtio" => [
                &raw,
                ((packet.len() / 2) as u16).to_le_bytes().as_slice(),
                &packet,
            ]
            .concat(),
            "segment" => [&raw, packet.as_slice()].concat(),
            "coalesce" => {
                let mut content = vec![3];
                for packet in plan.packets() {
                    content.extend([0, packet.len() as u8]);
                    content.extend(packet);
                }
                // And one that continues it.
                content.extend([7, 20]);
                content.extend([0xA5; 20]);
                content
            }
            _ => continue,
        };
        seeds.push((name.to_owned(), content));
    }
    if target == "ip" {
        let echo = [8, 0, 0, 0, 0xAB, 0xCD, 0, 1];
        let mut icmp = plans()[5].1.one(0)[..20].to_vec();
        icmp[9] = 1;
        icmp.extend(echo);
        let mut fragment = icmp.clone();
        packets::set_u16(&mut fragment, 6, DF >> 1 | 9);
        let ipv6 = plans()[6].1.one(0)[..40].to_vec();
        let behind = |protocol, behind: &[u8]| {
            let mut packet = [&ipv6, behind].concat();
            packet[6] = protocol;
            packet
        };
        let chain = [
            &[43, 0, 0, 0, 0, 0, 0, 0, 51, 0, 0, 0, 0, 0, 0, 0][..],
            &[60, 1],
            &[0; 10],
            &[58, 0],
            &[0; 6],
            &echo,
        ];
        seeds.push(("chain".to_owned(), behind(0, &chain.concat())));
        seeds.push(("echo6".to_owned(), behind(58, &[128, 0, 0, 0, 1, 2])));
        seeds.push((
            "fragment6".to_owned(),
            behind(44, &[17, 0, 0, 8, 0, 0, 0, 0]),
        ));
        seeds.push((
            "first-fragment6".to_owned(),
            behind(44, &[17, 0, 0, 1, 0, 0, 0, 0, 1, 2, 3, 4]),
        ));
        seeds.push(("icmp".to_owned(), icmp));
        seeds.push(("fragment".to_owned(), fragment));
    }
    seeds
        .into_iter()
        .map(|(name, content)| (format!("seed-{name}"), content))
        .collect()
}

#[test]
fn every_file_of_the_corpus_passes() {
    for (target, body) in TARGETS {
        let files = corpus(target);
        assert!(!files.is_empty());
        let step = if cfg!(miri) { 9 } else { 1 };
        for (name, content) in files.into_iter().step_by(step) {
            // Printed only if it fails.
            println!("{target}/{name}");
            body(&content);
        }
    }
}

#[test]
fn seeds_are_what_their_plans_make_of_them() {
    for (target, _) in TARGETS {
        let expected = seeds(target);
        if std::env::var_os("WRITE_SEEDS").is_some() {
            fs::create_dir_all(folder(target)).expect("writable");
            for (name, content) in &expected {
                fs::write(folder(target).join(name), content).expect("writable");
            }
        }
        let mut found = corpus(target);
        found.retain(|name, _| name.starts_with("seed-"));
        assert_eq!(found, expected);
    }
}

#[test]
fn every_seed_does_what_it_is_for() {
    for (name, content) in seeds("segment") {
        let (raw, packet) = content.split_first_chunk().expect("a header");
        let header = nebula_mp_core::virtio::VirtioHeader::parse(raw, packet, packet.len());
        assert!(header.is_ok(), "{name}");
    }
    for (name, content) in seeds("ip") {
        assert!(
            nebula_mp_core::ip::parse_flow(&content, true).is_ok(),
            "{name}"
        );
    }
}

#[test]
fn inputs_cut_short_or_changed_pass_too() {
    let step = if cfg!(miri) { 61 } else { 1 };
    for (target, body) in TARGETS {
        for content in seeds(target).values() {
            for length in (0..content.len()).step_by(step) {
                body(&content[..length]);
                let mut changed = content.clone();
                for bits in [0x01, 0x80, 0xFF] {
                    changed[length] = content[length] ^ bits;
                    body(&changed);
                }
            }
        }
    }
}
