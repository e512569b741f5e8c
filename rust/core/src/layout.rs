//! Where every word of the shared memory lies: `shm`, `shm_ring`, `shm_table` and `shm_stats` in Python, with
//! `#[repr(C)]`. `offsets` gives all of them by name, and a test compares them with Python's.

/// Every offset and size, as `("TUNNEL_ROW.peer", offset, size)`.
pub fn offsets() -> Vec<(String, usize, usize)> {
    todo!()
}
