//! What a reader sleeps on; as `nebula_mp.datapath.passes.Sources`.
//!
//! Knows descriptors by their place in a list, and nothing of what they are.
//! Source: poll(2).

use crate::error::{Fault, Result};
use crate::sys;

/// The most that a set of bits has room for.
const SOURCES_MAX: usize = 64;

/// Descriptors, which stay open for as long as it lives.
pub struct Sources {
    polled: Vec<libc::pollfd>,
}

impl Sources {
    /// # Panics
    ///
    /// With more than 64 of them.
    pub fn new(descriptors: &[i32]) -> Self {
        assert!(descriptors.len() <= SOURCES_MAX);
        let polled = descriptors
            .iter()
            .map(|&fd| libc::pollfd {
                fd,
                events: 0,
                revents: 0,
            })
            .collect();
        Self { polled }
    }

    /// Sleep until one of `heeded` (a bit for each, by its place) is readable, at most `limit_ms`; gives which are, and
    /// any that has failed. 0 after that time, or when a signal has come.
    pub fn wait(&mut self, limit_ms: i32, heeded: u64) -> Result<u64> {
        for (place, each) in self.polled.iter_mut().enumerate() {
            each.events = if heeded >> place & 1 == 1 {
                libc::POLLIN
            } else {
                0
            };
        }
        match sys::poll(&mut self.polled, limit_ms) {
            Ok(_) => {}
            Err(libc::EINTR) => return Ok(0),
            Err(number) => return Err(Fault::Lost(number)),
        }
        let ready = |(place, each): (usize, &libc::pollfd)| u64::from(each.revents != 0) << place;
        Ok(self.polled.iter().enumerate().map(ready).sum())
    }
}
