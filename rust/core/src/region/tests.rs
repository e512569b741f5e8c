//! Headers, sizes, seals and rights, right and wrong; as `test_shm.py`.

use super::*;
use crate::testing::Memory;

const LAYOUT: Layout = Layout {
    name: "test",
    magic: b"nmp:test",
    version: 3,
};

fn memory() -> Memory {
    Memory::new(&LAYOUT, 2 * PAGE_BYTES, &[7, 8])
}

fn said(result: Result<Region>) -> String {
    match result {
        Err(fault) => fault.to_string(),
        Ok(_) => "attached".to_string(),
    }
}

#[test]
fn who_attaches_sees_zeros_behind_a_header_that_says_what_the_region_is() {
    let region = memory().writable();

    assert_eq!(region.generation(), 1);
    assert_eq!(region.size(), 2 * PAGE_BYTES);
    assert_eq!(region.parameters(), &[7, 8, 0, 0]);
    assert!(region.words()[8..]
        .iter()
        .all(|word| word.load(Ordering::Relaxed) == 0));
    assert_eq!(region.words().len(), 1024);
    region.check_generation().unwrap();
}

#[test]
fn a_store_is_seen_through_words_halves_and_bytes_alike() {
    let memory = memory();
    let (writer, reader) = (memory.writable(), memory.read_only());

    writer
        .word(600)
        .store(0x0102_0304_0506_0708, Ordering::Relaxed);

    assert_eq!(
        reader.word(600).load(Ordering::Relaxed),
        0x0102_0304_0506_0708
    );
    assert_eq!(reader.half(1200).load(Ordering::Relaxed), 0x0506_0708);
    assert_eq!(reader.byte(4807).load(Ordering::Relaxed), 1);
    let mut copied = [0; 8];
    reader.copy(4800, &mut copied);
    assert_eq!(copied, [8, 7, 6, 5, 4, 3, 2, 1]);
}

#[test]
fn any_bytes_can_be_stored_and_copied_wherever_they_begin_and_end() {
    let region = memory().writable();
    for at in 4096..4112 {
        for length in 0..40 {
            let bytes: Vec<u8> = (0..length).map(|each| (at + each) as u8 | 1).collect();
            region.store(at - 1, &vec![0xEE; length + 2]);
            region.store(at, &bytes);
            let mut copied = vec![0; length + 2];
            region.copy(at - 1, &mut copied);
            assert_eq!(copied[1..=length], bytes);
            assert_eq!((copied[0], copied[length + 1]), (0xEE, 0xEE));
        }
    }
}

#[test]
fn what_is_ours_alone_can_be_borrowed_as_bytes() {
    let mut region = memory().writable();
    // SAFETY: no other reference, no other process.
    unsafe { region.slice_mut(5000, 3) }.copy_from_slice(b"abc");
    // SAFETY: nobody writes.
    assert_eq!(unsafe { region.slice(4999, 5) }, b"\0abc\0");
}

#[test]
fn a_wrong_header_is_refused_and_the_error_names_region_field_and_value() {
    for (offset, patch, text) in [
        (
            0,
            &b"nmp:Test"[..],
            "magic is b'nmp:Test', expected b'nmp:test'",
        ),
        (8, &[4], "layout version is 4, expected 3"),
        (16, &[0; 8], "generation is 0, expected 1 or more"),
        (24, &[8], "size is 8200, expected 8192"),
    ] {
        let memory = memory();
        memory.patch(offset, patch);

        let result = Region::attach(memory.reader(), &LAYOUT, false, "a/0");

        assert_eq!(said(result), format!("shared memory 'test a/0': {text}"));
    }
}

#[test]
fn a_region_of_an_impossible_size_is_refused() {
    for size_bytes in [0, HEADER_BYTES - 8, HEADER_BYTES + 4] {
        let memory = Memory::bare(size_bytes, SIZE_SEALS);
        let text = said(Region::attach(memory.writer(), &LAYOUT, true, ""));
        assert_eq!(
            text,
            format!(
                "shared memory 'test': size is {size_bytes}, expected room for a header and whole words"
            )
        );
    }
}

#[test]
fn a_region_whose_size_may_change_is_refused() {
    for seals in [0, libc::F_SEAL_SHRINK, libc::F_SEAL_GROW] {
        let memory = Memory::bare(PAGE_BYTES, seals);
        let text = said(Region::attach(memory.writer(), &LAYOUT, true, ""));
        assert_eq!(
            text,
            format!("shared memory 'test': set of size seals is {seals}, expected 6")
        );
    }
}

#[test]
fn a_file_that_cannot_be_sealed_is_refused() {
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&zero);

    let text = said(Region::attach(descriptor, &LAYOUT, false, ""));

    assert_eq!(
        text,
        "shared memory 'test': set of size seals is 0, expected 6"
    );
}

#[test]
fn more_or_fewer_rights_than_are_asked_for_are_refused() {
    let memory = memory();
    for (descriptor, writable, text) in [
        (memory.writer(), false, "is read-write, expected read-only"),
        (memory.reader(), true, "is read-only, expected read-write"),
    ] {
        let found = said(Region::attach(descriptor, &LAYOUT, writable, ""));
        assert_eq!(
            found,
            format!("shared memory 'test': access of the descriptor {text}")
        );
    }
}

#[test]
fn a_descriptor_that_is_none_is_lost() {
    let fault = Region::attach(-1, &LAYOUT, true, "").err();
    assert_eq!(fault, Some(Fault::Lost(libc::EBADF)));
}

#[test]
fn memory_that_cannot_be_mapped_is_a_refusal_that_says_what_to_do() {
    let memory = Memory::sparse(&LAYOUT, 1 << 47);
    assert_eq!(
        said(Region::attach(memory.writer(), &LAYOUT, true, "big")),
        "shared memory 'test big' of 140737488355328 bytes: refused (ENOMEM): free memory, or lower the number of \
         workers"
    );
}

#[test]
fn a_renewed_region_has_a_new_generation_and_the_old_view_says_so() {
    let memory = memory();
    let old = memory.read_only();

    memory.patch(16, &2u64.to_le_bytes());

    assert_eq!(
        old.check_generation().unwrap_err().to_string(),
        "shared memory 'test': generation is 2, expected 1"
    );
    assert_eq!(memory.read_only().generation(), 2);
}

#[test]
fn memory_with_secrets_is_kept_out_of_dumps_and_of_forked_children() {
    let mut region = memory().writable();
    assert!(!flags(&region).contains("dd"));

    region.protect().unwrap();

    let found = flags(&region);
    assert!(found.contains("dd") && found.contains("dc"), "{found}");
}

/// `VmFlags` of the mapping in /proc/self/smaps.
fn flags(region: &Region) -> String {
    let begin = format!("{:x}-", region.base.as_ptr() as usize);
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let lines = maps.lines().skip_while(|line| !line.starts_with(&begin));
    let found = lines.into_iter().find(|line| line.starts_with("VmFlags:"));
    found.unwrap().to_string()
}

#[test]
fn a_region_is_unmapped_when_it_is_dropped() {
    // Of a size that no other test uses, so that none can have taken its place.
    let region = Memory::new(&LAYOUT, 37 * PAGE_BYTES, &[]).writable();
    let begin = region.base.as_ptr() as usize;
    let range = format!("{begin:x}-{:x}", begin + region.size());
    let is_mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().any(|line| line.starts_with(&range))
    };
    assert!(is_mapped());

    drop(region);

    assert!(!is_mapped());
}

#[test]
#[should_panic]
fn a_word_beyond_the_end_is_a_mistake_of_our_own() {
    memory().writable().word(1024);
}

#[test]
#[should_panic]
fn bytes_beyond_the_end_are_a_mistake_of_our_own() {
    memory().writable().copy(2 * PAGE_BYTES - 1, &mut [0; 2]);
}
