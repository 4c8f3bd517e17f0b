//! Python bindings: convert arguments, detach from the interpreter, call, map the error. No logic.

mod arrays;
mod engine;
mod errors;
mod formats;
mod metadata;
mod writer;

use pyo3::prelude::*;

/// The native module `weightpack._rust`.
#[pymodule(gil_used = false)]
fn _rust(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<engine::Checkpoint>()?;
    module.add_class::<engine::Plan>()?;
    module.add_class::<writer::Writer>()?;
    module.add_function(wrap_pyfunction!(engine::diff, module)?)?;
    formats::register(module)
}
