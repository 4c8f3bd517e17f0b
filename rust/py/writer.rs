//! Binding of the writer of arrays.

use std::path::PathBuf;
use std::sync::Mutex;

use numpy::PyReadonlyArray1;
use pyo3::prelude::*;

use super::errors::guarded;
use super::formats::dtype_of;
use crate::engine::array::Options;
use crate::engine::writer;
use crate::error::{Error, Result};
use crate::formats::Importance;
use crate::io::gguf::{self, Value};
use crate::io::{Container, Metadata, NewEntry, NewMetadata};

/// See `_rust.pyi`.
#[pyclass(frozen, module = "weightpack._rust")]
pub struct Writer(Mutex<Option<writer::Writer>>);

#[pymethods]
impl Writer {
    #[staticmethod]
    #[pyo3(signature = (path, tensors, metadata, carried, *, max_dimensions, overwrite))]
    fn create(
        py: Python<'_>,
        path: PathBuf,
        tensors: Vec<(String, String, Vec<u64>)>,
        metadata: &str,
        carried: Vec<(String, Bound<'_, super::engine::Checkpoint>)>,
        max_dimensions: usize,
        overwrite: bool,
    ) -> PyResult<Self> {
        let carried: Vec<_> = carried
            .into_iter()
            .map(|(key, checkpoint)| (key, checkpoint.get().inner()))
            .collect();
        guarded(py, || {
            let mut pairs = Vec::new();
            for (key, checkpoint) in &carried {
                let file = checkpoint.files.first();
                let Some((Metadata::Gguf(found), file)) =
                    file.map(|file| (&file.header.metadata, file))
                else {
                    return Err(Error::config(format!(
                        "no metadata \"{key}\" to carry over"
                    )));
                };
                pairs.push((key.clone(), found.carry(file.source.as_ref(), key)?));
            }
            pairs.extend(parse(metadata)?);
            let entries = tensors
                .into_iter()
                .map(|(name, dtype, shape)| entry(name, &dtype, shape, max_dimensions))
                .collect::<Result<Vec<_>>>()?;
            let metadata = NewMetadata::Gguf(pairs);
            writer::Writer::create(&path, Container::Gguf, entries, metadata, overwrite)
        })
        .map(|writer| Writer(Mutex::new(Some(writer))))
    }

    #[pyo3(signature = (index, data, dtype, importance, threads))]
    fn put(
        &self,
        py: Python<'_>,
        index: usize,
        data: PyReadonlyArray1<'_, u8>,
        dtype: Option<&str>,
        importance: Option<PyReadonlyArray1<'_, f32>>,
        threads: Option<usize>,
    ) -> PyResult<()> {
        let data = data.as_slice()?;
        let importance = match &importance {
            Some(importance) => Some(importance.as_slice()?.to_vec()),
            None => None,
        };
        guarded(py, || {
            let source = dtype.map(dtype_of).transpose()?;
            let importance = importance.map(Importance::new).transpose()?;
            let options = Options {
                threads,
                ..Options::default()
            };
            let mut held = self.lock()?;
            let writer = held.as_mut().ok_or_else(closed)?;
            writer.put(index, data, source, importance, options)
        })
    }

    fn commit(&self, py: Python<'_>) -> PyResult<u64> {
        guarded(py, || self.lock()?.take().ok_or_else(closed)?.commit())
    }

    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        guarded(py, || {
            if let Some(writer) = self.lock()?.take() {
                writer.discard();
            }
            Ok(())
        })
    }
}

impl Writer {
    fn lock(&self) -> Result<std::sync::MutexGuard<'_, Option<writer::Writer>>> {
        self.0
            .lock()
            .map_err(|_| Error::Internal(String::from("the writer panicked")))
    }
}

fn closed() -> Error {
    Error::config("the file is finished")
}

fn parse(metadata: &str) -> Result<Vec<(String, Value)>> {
    let triples: Vec<(String, String, serde_json::Value)> = serde_json::from_str(metadata)
        .map_err(|error| Error::config(format!("metadata: {error}")))?;
    triples
        .into_iter()
        .map(|(key, kind, value)| Ok((key, Value::from_json(&kind, &value)?)))
        .collect()
}

fn entry(name: String, dtype: &str, shape: Vec<u64>, max_dimensions: usize) -> Result<NewEntry> {
    if shape.len() > max_dimensions {
        return Err(Error::unsupported(format!(
            "{} dimensions, but at most {max_dimensions} are to be written",
            shape.len()
        ))
        .hint(format!(
            "ggml reads {}; for readers that take more, raise max_dimensions",
            gguf::GGML_DIMENSIONS
        ))
        .tensor(&name));
    }
    Ok(NewEntry {
        dtype: dtype_of(dtype)?,
        name,
        shape,
        late: false,
    })
}
