//! Python bindings: convert arguments, detach from the interpreter, call, map the error. No logic.

mod errors;

use pyo3::prelude::*;

/// The native module `weightpack._rust`.
#[pymodule(gil_used = false)]
fn _rust(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    Ok(())
}
