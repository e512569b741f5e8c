//! Tables in which anything may stand.

use super::*;

/// Numbers that nobody can foretell, and always the same.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[(self.next() >> 20) as usize % values.len()]
    }

    fn row(&mut self) -> Put {
        Put {
            number: self.one_of(&[0, 1, 2, 3, 4, 5, 6]),
            sequence: self.one_of(&[0, 2, 2, 2, 3, u32::MAX, u32::MAX - 1]),
            rules: self.one_of(&[RULES, RULES, RULES, RULES_BEFORE, 0, u32::MAX]),
            peer: self.one_of(&[PEER, OTHER, GONE, 0, u64::MAX, 3 << 32 | 16, 0xFFFF]),
            timeout_ms: self.one_of(&[0, 1, 16_000, u32::MAX]),
            verdicts: self.next() as u32,
            seen_ms: self.one_of(&[0, NOW - 1, NOW, NOW + 1, u64::MAX, 1 << 63]),
        }
    }
}

#[test]
fn whatever_others_write_only_the_own_table_is_written() {
    let mut noise = Noise(0x9E37_79B9_7F4A_7C15);
    let mut admitted = 0;
    for _ in 0..500 {
        let mut tables = Tables::new();
        for table in 0..TABLES {
            for _ in 0..12 {
                let number = noise.next() % 4;
                let row = noise.row();
                let mut key = key(number);
                if number == 0 {
                    key = key.pair();
                }
                tables.put(table, &key, row);
            }
        }
        let row = noise.row();
        let pair = Put {
            verdicts: BOTH,
            ..PAIR
        };
        tables.put_pair(noise.one_of(&[row, pair]));
        let rules = noise.one_of(&[u64::from(RULES), u64::from(RULES), 0, u64::MAX]);
        tables.flows[CONTROL].patch_word(RULES_GENERATION, rules);
        for number in 0..3 {
            let timeout_ms = noise.one_of(&[0, 16_000, u64::MAX]);
            tables.flows[CONTROL].patch_word(TIMEOUTS + number, timeout_ms);
        }
        let untouchable = tables.untouchable();
        for _ in 0..8 {
            let key = key(noise.next() % 6);
            let now_ms = noise.one_of(&[NOW, NOW, 0, u64::MAX]);
            let peer = noise.one_of(&[PEER, OTHER, 0, u64::MAX]);
            tables.view.outbound(&key, now_ms);
            tables.view.inbound(&key, peer, now_ms);
        }
        assert_eq!(tables.untouchable(), untouchable);
        admitted += tables.counts().0;
    }
    assert!(admitted > 100, "{admitted}");
}
