//! `nebula_mp._accel`: the native kernel as a Python module.
use pyo3::prelude::*;

/// The module.
#[pymodule]
fn _accel(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("ABI", 1)?;
    Ok(())
}
