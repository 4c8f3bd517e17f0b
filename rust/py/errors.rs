//! The one map from the crate's errors to Python's. Classes are defined in `weightpack.errors`, so
//! that they can be imported and documented without the native module.

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError};
use pyo3::prelude::*;

use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::error::{escape, Error, Result};

/// The Python exception for `error`: a class of `weightpack.errors`, `OSError` with errno and file
/// name, or `KeyboardInterrupt`.
pub fn to_python(error: &Error) -> PyErr {
    let class = match error {
        Error::Checkpoint(_) => "CheckpointError",
        Error::Format(_) => "FormatError",
        Error::Config(_) => "ConfigError",
        Error::Unsupported(_) => "UnsupportedError",
        Error::Internal(_) => "WeightpackError",
        Error::Io {
            action,
            path,
            source,
        } => {
            let path = escape(&path.to_string_lossy());
            let full = source.kind() == std::io::ErrorKind::StorageFull;
            let known = full.then(|| rustix::io::Errno::NOSPC.raw_os_error());
            let reason = source.to_string();
            let reason = reason.split(" (os error").next().unwrap_or_default();
            return match source.raw_os_error().or(known) {
                Some(errno) => PyOSError::new_err((errno, format!("{action}: {reason}"), path)),
                None => PyOSError::new_err(format!("{action} {path}: {reason}")),
            };
        }
        Error::Interrupted => return PyKeyboardInterrupt::new_err(()),
    };
    Python::attach(|py| {
        let made = py
            .import("weightpack.errors")
            .and_then(|module| module.getattr(class))
            .and_then(|class| class.call1((error.to_string(),)));
        match made {
            Ok(exception) => PyErr::from_value(exception),
            Err(failure) => failure,
        }
    })
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        to_python(&error)
    }
}

/// Runs `work` with the interpreter released; a panic inside becomes an ordinary error instead of
/// unwinding through Python.
pub fn guarded<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    match outcome {
        Ok(result) => result.map_err(|error| to_python(&error)),
        Err(_) => Err(to_python(&Error::Internal(String::from(
            "the native code panicked",
        )))),
    }
}
