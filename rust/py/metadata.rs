//! Metadata values as Python objects: numbers, `str`, numpy arrays, lists.

use numpy::IntoPyArray;
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::IntoPyObjectExt;

use super::errors::guarded;
use crate::engine::Checkpoint;
use crate::io::gguf::{Array, Value};
use crate::io::Metadata;

/// Key, type (`u32`, `str`, `[f32]`) and, for arrays, number of items, in file order.
pub fn fields(checkpoint: &Checkpoint) -> Vec<(String, String, Option<u64>)> {
    let Some(file) = checkpoint.files.first() else {
        return Vec::new();
    };
    match &file.header.metadata {
        Metadata::Text(text) => text
            .keys()
            .map(|key| (key.clone(), String::from("str"), None))
            .collect(),
        Metadata::Gguf(pairs) => pairs
            .fields()
            .iter()
            .map(|field| match field.array {
                Some((kind, count)) => {
                    (field.key.clone(), format!("[{}]", kind.name()), Some(count))
                }
                None => (field.key.clone(), field.kind.name().to_owned(), None),
            })
            .collect(),
    }
}

/// One value, whole. `KeyError` if there is none.
pub fn item(py: Python<'_>, checkpoint: &Checkpoint, key: &str) -> PyResult<Py<PyAny>> {
    let missing = || PyKeyError::new_err(key.to_owned());
    let file = checkpoint.files.first().ok_or_else(missing)?;
    match &file.header.metadata {
        Metadata::Text(text) => text.get(key).ok_or_else(missing)?.into_py_any(py),
        Metadata::Gguf(pairs) if !pairs.contains(key) => Err(missing()),
        Metadata::Gguf(pairs) => {
            let value = guarded(py, || pairs.value(file.source.as_ref(), key))?;
            object(py, value)
        }
    }
}

fn object(py: Python<'_>, value: Value) -> PyResult<Py<PyAny>> {
    match value {
        Value::U8(number) => number.into_py_any(py),
        Value::I8(number) => number.into_py_any(py),
        Value::U16(number) => number.into_py_any(py),
        Value::I16(number) => number.into_py_any(py),
        Value::U32(number) => number.into_py_any(py),
        Value::I32(number) => number.into_py_any(py),
        Value::F32(number) => number.into_py_any(py),
        Value::U64(number) => number.into_py_any(py),
        Value::I64(number) => number.into_py_any(py),
        Value::F64(number) => number.into_py_any(py),
        Value::Bool(truth) => truth.into_py_any(py),
        Value::Text(text) => text.into_py_any(py),
        Value::Array(items) => array(py, items),
        Value::Raw { bytes, .. } => bytes.into_py_any(py),
    }
}

fn array(py: Python<'_>, items: Array) -> PyResult<Py<PyAny>> {
    macro_rules! numpy {
        ($items:expr) => {
            $items.into_pyarray(py).into_py_any(py)
        };
    }
    match items {
        Array::U8(items) => numpy!(items),
        Array::I8(items) => numpy!(items),
        Array::U16(items) => numpy!(items),
        Array::I16(items) => numpy!(items),
        Array::U32(items) => numpy!(items),
        Array::I32(items) => numpy!(items),
        Array::F32(items) => numpy!(items),
        Array::U64(items) => numpy!(items),
        Array::I64(items) => numpy!(items),
        Array::F64(items) => numpy!(items),
        Array::Bool(items) => numpy!(items),
        Array::Text(items) => items.into_py_any(py),
        Array::Array(items) => {
            let parts = items
                .into_iter()
                .map(|inner| array(py, inner))
                .collect::<PyResult<Vec<_>>>()?;
            PyList::new(py, parts)?.into_py_any(py)
        }
    }
}
