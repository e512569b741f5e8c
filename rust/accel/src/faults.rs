//! A `Fault` as the exception that Python's own kernel raises for it.

use nebula_mp_core::error::Fault;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyString;

/// To be mapped over every result of the core.
pub fn raise(fault: Fault) -> PyErr {
    Python::attach(|py| exception(py, fault).unwrap_or_else(|error| error))
}

fn exception(py: Python<'_>, fault: Fault) -> PyResult<PyErr> {
    let errors = || py.import("nebula_mp.errors");
    Ok(match fault {
        Fault::Contradiction(it) => {
            // For the log record: a number where it is one.
            let value = match it.value.parse::<u64>() {
                Ok(number) => number.into_pyobject(py)?.into_any(),
                Err(_) => PyString::new(py, &it.value).into_any(),
            };
            let error =
                errors()?
                    .getattr("RingError")?
                    .call1((it.memory, it.field, value, it.expected))?;
            PyErr::from_value(error)
        }
        // With the text that Python gives this number, and as the subclass it has for it.
        Fault::Lost(number) => {
            let text = py.import("os")?.call_method1("strerror", (number,))?;
            PyErr::from_value(py.get_type::<PyOSError>().call1((number, text))?)
        }
        Fault::Refused(why) => {
            PyErr::from_value(errors()?.getattr("SystemCallError")?.call1((why,))?)
        }
    })
}
