//! `nebula_mp._accel`: the native kernel as a Python module.
//!
//! Data flow: nebula_mp.datapath.accelerated -> [this] -> nebula_mp_core
//! Knows how Python spells descriptors, limits and errors; decides nothing. `nebula_mp/_accel.pyi` has the types.
//!
//! Every class belongs to the thread that made it. A `Fault` becomes the exception that the Python kernel raises;
//! a panic becomes `PanicException`, with which the process ends and is replaced. The interpreter's lock is kept:
//! a process of the data path has one thread.

use pyo3::prelude::*;

mod attach;
mod counters;
mod drains;
mod faults;
mod half;
mod packets;
mod reader;

/// What `accelerated.ABI` must be: changes with every name, argument or meaning of this module.
const ABI: u32 = 6;

/// What this build and this processor use: `aead` is the library's name.
fn features(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyDict>> {
    let found = pyo3::types::PyDict::new(py);
    let aead = if cfg!(feature = "aws-lc") {
        "aws-lc"
    } else {
        "ring"
    };
    found.set_item("aead", aead)?;
    found.set_item("avx2", has_avx2())?;
    Ok(found)
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

/// The module.
#[pymodule]
fn _accel(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("ABI", ABI)?;
    module.add("FEATURES", features(module.py())?)?;
    module.add_class::<reader::Reader>()?;
    module.add_class::<half::Half>()?;
    module.add_class::<half::Sources>()?;
    module.add_class::<drains::UdpDrain>()?;
    module.add_class::<drains::TunDrain>()?;
    module.add_class::<counters::SendCounters>()?;
    packets::add_functions(module)
}
