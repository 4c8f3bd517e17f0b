//! Bindings of the engine: checkpoints, plans, comparisons.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use numpy::{PyArray1, PyArrayMethods, PyReadwriteArray1};
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use serde_json::json;

use super::errors::guarded;
use super::metadata;
use crate::dtype::Dtype;
use crate::engine::recognise::Hints;
use crate::engine::{
    self, compare, fill, plan, read, report, verify, Keep, Progress, Request, RunChoices,
};
use crate::error::{Error, Result};
use crate::io::{gguf, Metadata, Source};

/// Shortest time between two calls of a progress callback.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);
/// Longest metadata array that is shown whole.
const MOST_SHOWN_ITEMS: u64 = 64;

/// Looks at signals, and calls the callback now and then; remembers what Python raised.
struct Watch<'py> {
    callback: Option<&'py Py<PyAny>>,
    last: Option<Instant>,
    raised: Option<PyErr>,
}

impl<'py> Watch<'py> {
    fn new(callback: Option<&'py Py<PyAny>>) -> Self {
        Watch {
            callback,
            last: None,
            raised: None,
        }
    }

    fn tick(&mut self, progress: &Progress) -> Result<()> {
        let outcome = Python::attach(|py| {
            py.check_signals()?;
            let due = self
                .last
                .is_none_or(|last| last.elapsed() >= REPORT_INTERVAL);
            if let (Some(callback), true) = (self.callback, due) {
                self.last = Some(Instant::now());
                let Progress {
                    read_bytes,
                    total_bytes,
                    written_bytes,
                    tensor,
                } = progress;
                callback.call1(
                    py,
                    (*read_bytes, *total_bytes, *written_bytes, tensor.as_str()),
                )?;
            }
            Ok(())
        });
        outcome.map_err(|raised| {
            self.raised = Some(raised);
            Error::Interrupted
        })
    }

    /// The result, with what Python raised in place of the interruption it led to.
    fn settle<T>(self, outcome: PyResult<T>) -> PyResult<T> {
        match self.raised {
            Some(raised) => Err(raised),
            None => outcome,
        }
    }
}

fn threads_or_all(threads: Option<usize>) -> usize {
    threads
        .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
        .unwrap_or(1)
        .max(1)
}

fn to_json(value: &impl serde::Serialize) -> PyResult<String> {
    serde_json::to_string(value).map_err(|error| Error::Internal(error.to_string()).into())
}

/// See `_rust.pyi`.
#[pyclass(frozen, module = "weightpack._rust")]
pub struct Checkpoint(Arc<engine::Checkpoint>);

#[pymethods]
impl Checkpoint {
    #[staticmethod]
    #[pyo3(signature = (path, lenient=false, quantization=None, dtype=None))]
    fn open(
        py: Python<'_>,
        path: PathBuf,
        lenient: bool,
        quantization: Option<&str>,
        dtype: Option<&str>,
    ) -> PyResult<Self> {
        let quantization = quantization
            .map(serde_json::from_str)
            .transpose()
            .map_err(|error| Error::config(format!("quantization config: {error}")))?;
        let hints = Hints {
            quantization,
            dtype: dtype.and_then(Dtype::from_name),
        };
        guarded(py, || engine::Checkpoint::open_with(&path, lenient, &hints))
            .map(|checkpoint| Checkpoint(Arc::new(checkpoint)))
    }

    #[staticmethod]
    fn from_bytes(py: Python<'_>, name: &str, data: &[u8]) -> PyResult<Self> {
        guarded(py, || engine::Checkpoint::from_bytes(name, data.to_vec()))
            .map(|checkpoint| Checkpoint(Arc::new(checkpoint)))
    }

    #[staticmethod]
    fn from_arrays(
        name: &str,
        tensors: Vec<(String, String, Vec<u64>)>,
        arrays: Vec<Bound<'_, PyAny>>,
        stamp: i64,
    ) -> PyResult<Self> {
        let checkpoint = super::arrays::checkpoint(name, tensors, arrays, stamp)?;
        Ok(Checkpoint(Arc::new(checkpoint)))
    }

    fn describe(&self, py: Python<'_>) -> PyResult<String> {
        let value = guarded(py, || Ok(describe(&self.0)))?;
        to_json(&value)
    }

    fn metadata(&self, py: Python<'_>) -> PyResult<String> {
        let value = guarded(py, || shown_metadata(&self.0))?;
        to_json(&value)
    }

    fn metadata_value(&self, py: Python<'_>, key: &str) -> PyResult<Py<PyAny>> {
        let Some(file) = self.0.files.first() else {
            return Err(PyKeyError::new_err(key.to_owned()));
        };
        let found = guarded(py, || match &file.header.metadata {
            Metadata::Text(text) => Ok(text.get(key).map(|text| json!(text))),
            Metadata::Gguf(pairs) if !pairs.contains(key) => Ok(None),
            Metadata::Gguf(pairs) => Ok(Some(pairs.value(file.source.as_ref(), key)?.to_json())),
        })?;
        match found {
            Some(value) => Ok(py
                .import("json")?
                .call_method1("loads", (to_json(&value)?,))?
                .unbind()),
            None => Err(PyKeyError::new_err(key.to_owned())),
        }
    }

    fn metadata_fields(&self) -> Vec<(String, String, Option<u64>)> {
        metadata::fields(&self.0)
    }

    fn metadata_item(&self, py: Python<'_>, key: &str) -> PyResult<Py<PyAny>> {
        metadata::item(py, &self.0, key)
    }

    #[pyo3(signature = (threads, on_progress))]
    fn verify(
        &self,
        py: Python<'_>,
        threads: Option<usize>,
        on_progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<(String, u64, &'static str)>> {
        let mut watch = Watch::new(on_progress.as_ref());
        let outcome = guarded(py, || {
            let mut tick = |progress: &Progress| watch.tick(progress);
            verify::verify(&self.0, threads_or_all(threads), &mut tick)
        });
        let problems = watch.settle(outcome)?;
        let rows = problems.into_iter();
        Ok(rows
            .map(|problem| (problem.tensor, problem.block, problem.fault))
            .collect())
    }

    #[pyo3(signature = (name, out, dtype, threads, rows=None))]
    fn read(
        &self,
        py: Python<'_>,
        name: &str,
        mut out: PyReadwriteArray1<'_, u8>,
        dtype: &str,
        threads: Option<usize>,
        rows: Option<(u64, u64)>,
    ) -> PyResult<()> {
        let out = out.as_slice_mut()?;
        let dtype = Dtype::from_name(dtype)
            .ok_or_else(|| Error::config(format!("unknown dtype \"{dtype}\"")))?;
        let mut watch = Watch::new(None);
        let outcome = guarded(py, || {
            let mut tick = || watch.tick(&Progress::default());
            let range = rows
                .map(|rows| weights_of(&self.0, name, rows))
                .transpose()?;
            read::read(
                &self.0,
                name,
                dtype,
                range,
                out,
                threads_or_all(threads),
                &mut tick,
            )
        });
        watch.settle(outcome)
    }

    #[pyo3(signature = (jobs, out, threads, on_progress))]
    fn fill(
        &self,
        py: Python<'_>,
        jobs: &str,
        out: Vec<Bound<'_, PyArray1<u8>>>,
        threads: Option<usize>,
        on_progress: Option<Py<PyAny>>,
    ) -> PyResult<Vec<Vec<u64>>> {
        let shared = |_| Error::config("an array is read-only, or shares memory with another one");
        let mut out = out
            .iter()
            .map(|array| array.try_readwrite().map_err(shared))
            .collect::<Result<Vec<_>>>()?;
        let out = out
            .iter_mut()
            .map(|array| array.as_slice_mut())
            .collect::<Result<Vec<&mut [u8]>, _>>()?;
        let mut watch = Watch::new(on_progress.as_ref());
        let outcome = guarded(py, || {
            let jobs: Vec<fill::Job> = serde_json::from_str(jobs)
                .map_err(|error| Error::config(format!("tensors to fill: {error}")))?;
            let mut tick = |progress: &Progress| watch.tick(progress);
            fill::fill(&self.0, &jobs, out, threads_or_all(threads), &mut tick)
        });
        watch.settle(outcome)
    }
}

impl Checkpoint {
    /// The checkpoint itself.
    pub fn inner(&self) -> Arc<engine::Checkpoint> {
        Arc::clone(&self.0)
    }
}

/// The weights of the rows from the first of `rows` up to the second.
fn weights_of(
    checkpoint: &engine::Checkpoint,
    name: &str,
    rows: (u64, u64),
) -> Result<std::ops::Range<u64>> {
    let length = crate::shape::row_weights(&checkpoint.tensor(name)?.shape);
    let at = |row| crate::shape::multiply(row, length, "first weight of a row");
    Ok(at(rows.0)?..at(rows.1)?)
}

fn describe(checkpoint: &engine::Checkpoint) -> serde_json::Value {
    let files = checkpoint.files.iter().map(|file| {
        let data: u64 = file.header.entries.iter().map(|entry| entry.bytes).sum();
        json!({
            "path": file.source.path(), "bytes": file.source.len(),
            "header_bytes": file.source.len().saturating_sub(data),
        })
    });
    let tensors = checkpoint.tensors.iter().map(|tensor| {
        let parts = tensor.stored().map(|part| {
            let entry = &part.entry;
            json!({"name": entry.name, "dtype": entry.dtype.name(), "shape": part.file_shape(), "bytes": entry.bytes, "offset": entry.offset})
        });
        json!({
            "name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype.name(),
            "format": tensor.packed.as_ref().map(|(format, _)| format.info().name),
            "weights": crate::shape::count_weights(&tensor.shape).ok(),
            "stored_bytes": tensor.stored_bytes(),
            "file": tensor.stored().next().map(|part| part.file),
            "parts": parts.collect::<Vec<_>>(),
        })
    });
    json!({
        "container": checkpoint.container().name(),
        "big_endian": checkpoint.files.iter().any(|file| file.header.big_endian),
        "warnings": checkpoint.warnings,
        "files": files.collect::<Vec<_>>(),
        "tensors": tensors.collect::<Vec<_>>(),
    })
}

fn shown_metadata(checkpoint: &engine::Checkpoint) -> Result<serde_json::Value> {
    let Some(file) = checkpoint.files.first() else {
        return Ok(json!({}));
    };
    match &file.header.metadata {
        // Each shard describes its own tensors; where two disagree, the first one counts.
        Metadata::Text(_) => {
            let texts = checkpoint.files.iter().rev();
            let merged: BTreeMap<_, _> = texts
                .filter_map(|file| match &file.header.metadata {
                    Metadata::Text(text) => Some(text),
                    Metadata::Gguf(_) => None,
                })
                .flatten()
                .collect();
            Ok(json!(merged))
        }
        Metadata::Gguf(pairs) => gguf_metadata(pairs, file.source.as_ref()),
    }
}

fn gguf_metadata(pairs: &gguf::Metadata, source: &dyn Source) -> Result<serde_json::Value> {
    let mut object = serde_json::Map::new();
    for key in pairs.keys() {
        let shown = match pairs.array(key) {
            Some((kind, count)) if count > MOST_SHOWN_ITEMS => {
                json!({"type": kind.name(), "count": count})
            }
            // A value that breaks its own type's rules is told as a warning, not an error.
            _ => match (pairs.value(source, key), pairs.field(key)) {
                (Err(Error::Checkpoint(_)), Some(field)) => {
                    json!({"type": field.kind.name(), "bytes": field.bytes})
                }
                (value, _) => value?.to_json(),
            },
        };
        object.insert(key.to_owned(), shown);
    }
    Ok(object.into())
}

/// See `_rust.pyi`.
#[pyclass(frozen, module = "weightpack._rust")]
pub struct Plan(plan::Plan);

#[pymethods]
impl Plan {
    #[staticmethod]
    fn build(
        py: Python<'_>,
        request: &str,
        checkpoints: Vec<Bound<'_, Checkpoint>>,
    ) -> PyResult<Self> {
        let checkpoints: Vec<Arc<engine::Checkpoint>> = checkpoints
            .iter()
            .map(|checkpoint| Arc::clone(&checkpoint.get().0))
            .collect();
        guarded(py, || {
            let request: Request = serde_json::from_str(request)
                .map_err(|error| Error::config(format!("conversion request: {error}")))?;
            plan::Plan::build(request, checkpoints)
        })
        .map(Plan)
    }

    fn describe(&self, py: Python<'_>) -> PyResult<String> {
        let value = guarded(py, || self.0.describe())?;
        to_json(&value)
    }

    #[pyo3(signature = (*, overwrite, resume, on_progress, keep=None))]
    fn run(
        &self,
        py: Python<'_>,
        overwrite: bool,
        resume: bool,
        on_progress: Option<Py<PyAny>>,
        keep: Option<Py<PyAny>>,
    ) -> PyResult<String> {
        let mut watch = Watch::new(on_progress.as_ref());
        let mut refusal = None;
        let outcome = guarded(py, || {
            let choices = RunChoices { overwrite, resume };
            let mut list = |folder: &Path| {
                let names = Python::attach(|py| match &keep {
                    Some(keep) => keep.call1(py, (folder,))?.extract(py),
                    None => Ok(Vec::new()),
                });
                names.map_err(|raised| {
                    refusal = Some(raised);
                    Error::Interrupted
                })
            };
            let list: Option<Keep<'_>> = match &keep {
                Some(_) => Some(&mut list),
                None => None,
            };
            engine::run_beside(&self.0, choices, list, &mut |progress| watch.tick(progress))
        });
        if let (Some(raised), Err(_)) = (refusal, &outcome) {
            return Err(raised);
        }
        to_json(&watch.settle(outcome)?)
    }
}

/// See `_rust.pyi`.
#[pyfunction]
#[pyo3(signature = (a, b, pairs, threads, on_progress))]
pub fn diff(
    py: Python<'_>,
    a: &Checkpoint,
    b: &Checkpoint,
    pairs: Vec<(String, String)>,
    threads: Option<usize>,
    on_progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let mut watch = Watch::new(on_progress.as_ref());
    let outcome = guarded(py, || {
        compare::compare(
            &a.0,
            &b.0,
            &pairs,
            threads_or_all(threads),
            &mut |progress| watch.tick(progress),
        )
    });
    let sums = watch.settle(outcome)?;
    let rows: Vec<serde_json::Value> = pairs
        .iter()
        .zip(&sums)
        .map(|((name_a, name_b), sums)| {
            let shape =
                a.0.tensor(name_a)
                    .map(|tensor| tensor.shape.clone())
                    .unwrap_or_default();
            let weights = crate::shape::count_weights(&shape).unwrap_or(0);
            json!({"a": name_a, "b": name_b, "error": report::error_json(sums, weights)})
        })
        .collect();
    to_json(&rows)
}
