//! Fuzz target `header`: see `targets`.
#![no_main]

#[path = "../targets.rs"]
#[allow(dead_code)] // each target uses one of them
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::fuzz_header(data));
