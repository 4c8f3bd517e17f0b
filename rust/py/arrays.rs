//! Arrays of Python, or what makes their bytes, as something that is read like a file.

use std::path::{Path, PathBuf};

use numpy::{PyArray1, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::formats::dtype_of;
use crate::engine::Checkpoint;
use crate::error::{Error, Result};
use crate::io::file::FileSource;
use crate::io::{Entry, Source};
use crate::shape;

/// Bytes asked of a reader at a time: it makes an array of them, beside the buffer that they end in, and
/// what it frees the system's allocator does not give back at once.
const READER_BYTES: usize = 1 << 20;

/// Where the bytes of one array come from.
enum Bytes {
    /// An array of bytes.
    Array(Py<PyArray1<u8>>),
    /// `read(offset, count)`, which gives an array of as many bytes.
    Reader(Py<PyAny>),
}

/// Byte arrays, one after the other. The interpreter is only held while bytes are copied out of one.
struct Arrays {
    name: PathBuf,
    arrays: Vec<Bytes>,
    /// First byte of each array, and the end of the last.
    starts: Vec<u64>,
}

impl Source for Arrays {
    fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut rest = buffer;
        let mut position = offset;
        while !rest.is_empty() {
            // The last array that begins at or before the position; empty ones before it are passed over.
            let index = self.starts.partition_point(|&start| start <= position);
            let found = index.checked_sub(1).and_then(|index| {
                Some((
                    self.arrays.get(index)?,
                    *self.starts.get(index)?,
                    *self.starts.get(index + 1)?,
                ))
            });
            let Some((array, start, end)) = found else {
                return Err(Error::Internal(format!("no array holds byte {position}")));
            };
            let count = rest.len().min(shape::to_usize(end - position)?);
            let count = match array {
                Bytes::Array(_) => count,
                Bytes::Reader(_) => count.min(READER_BYTES),
            };
            let (here, later) = rest.split_at_mut(count);
            Python::attach(|py| array.read(py, position - start, here))?;
            position += count as u64;
            rest = later;
        }
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.name
    }
}

impl Bytes {
    /// Fills `buffer` with the bytes from `offset` on.
    fn read(&self, py: Python<'_>, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let made = match self {
            Bytes::Array(array) => return copy(array.bind(py), shape::to_usize(offset)?, buffer),
            Bytes::Reader(read) => read.bind(py).call1((offset, buffer.len())),
        };
        let made = made.map_err(|raised| Error::format(format!("cannot be read: {raised}")))?;
        match made.cast_into::<PyArray1<u8>>() {
            Ok(array) if PyUntypedArrayMethods::len(&array) == buffer.len() => {
                copy(&array, 0, buffer)
            }
            _ => Err(Error::Internal(format!(
                "a reader gave something else than {} bytes",
                buffer.len()
            ))),
        }
    }
}

/// Bytes of `array` from `first` on.
fn copy(array: &Bound<'_, PyArray1<u8>>, first: usize, buffer: &mut [u8]) -> Result<()> {
    let held = array.try_readonly().ok();
    let found = held
        .as_ref()
        .and_then(|held| held.as_slice().ok())
        .and_then(|bytes| bytes.get(first..)?.get(..buffer.len()));
    match found {
        Some(bytes) => {
            buffer.copy_from_slice(bytes);
            Ok(())
        }
        None => Err(Error::Internal(format!(
            "an array lacks bytes {first}.. or is being written to"
        ))),
    }
}

/// A checkpoint of arrays: name, stored type and shape of each, and its bytes or what reads them.
pub fn checkpoint(
    name: &str,
    tensors: Vec<(String, String, Vec<u64>)>,
    arrays: Vec<Bound<'_, PyAny>>,
    stamp: i64,
) -> Result<Checkpoint> {
    if tensors.len() != arrays.len() {
        return Err(Error::config(format!(
            "{} arrays for {} tensors",
            arrays.len(),
            tensors.len()
        )));
    }
    let mut starts = vec![0];
    let mut entries = Vec::with_capacity(tensors.len());
    let mut offset = 0;
    let mut held = Vec::with_capacity(tensors.len());
    for ((name, dtype, dimensions), array) in tensors.into_iter().zip(arrays) {
        let dtype = dtype_of(&dtype)?;
        let bytes = dtype.byte_len(&dimensions)?;
        held.push(match array.cast_into::<PyArray1<u8>>() {
            Ok(array) => {
                let given = PyUntypedArrayMethods::len(&array) as u64;
                if given != bytes {
                    let problem = format!("expected {bytes} bytes, got {given}");
                    return Err(Error::config(problem).tensor(&name));
                }
                Bytes::Array(array.unbind())
            }
            Err(other) => Bytes::Reader(other.into_inner().unbind()),
        });
        entries.push(Entry {
            name,
            dtype,
            shape: dimensions,
            offset,
            bytes,
        });
        offset = shape::add(offset, bytes, "bytes of arrays")?;
        starts.push(offset);
    }
    let source = Arrays {
        name: PathBuf::from(name),
        arrays: held,
        starts,
    };
    Checkpoint::from_arrays(FileSource::from_source(Box::new(source), stamp), entries)
}
