//! Arrays of Python as something that is read like a file.

use std::path::{Path, PathBuf};

use numpy::{PyArray1, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::formats::dtype_of;
use crate::engine::Checkpoint;
use crate::error::{Error, Result};
use crate::io::file::FileSource;
use crate::io::{Entry, Source};
use crate::shape;

/// Byte arrays, one after the other. The interpreter is only held while bytes are copied out of one.
struct Arrays {
    name: PathBuf,
    arrays: Vec<Py<PyArray1<u8>>>,
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
            let found = index
                .checked_sub(1)
                .and_then(|index| Some((self.arrays.get(index)?, *self.starts.get(index)?)));
            let Some((array, start)) = found else {
                return Err(Error::Internal(format!("no array holds byte {position}")));
            };
            let inside = shape::to_usize(position - start)?;
            let copied = Python::attach(|py| {
                let held = array.bind(py).try_readonly().ok()?;
                let bytes = held.as_slice().ok()?.get(inside..)?;
                let count = bytes.len().min(rest.len());
                rest.get_mut(..count)?.copy_from_slice(bytes.get(..count)?);
                Some(count)
            });
            match copied {
                Some(count) if count > 0 => {
                    position += count as u64;
                    rest = rest.get_mut(count..).unwrap_or_default();
                }
                _ => return Err(Error::Internal(format!("no array holds byte {position}"))),
            }
        }
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.name
    }
}

/// A checkpoint of arrays: name, stored type and shape of each, and its bytes.
pub fn checkpoint(
    name: &str,
    tensors: Vec<(String, String, Vec<u64>)>,
    arrays: Vec<Bound<'_, PyArray1<u8>>>,
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
    for ((name, dtype, dimensions), array) in tensors.into_iter().zip(&arrays) {
        let dtype = dtype_of(&dtype)?;
        let bytes = dtype.byte_len(&dimensions)?;
        let held = PyUntypedArrayMethods::len(array) as u64;
        if held != bytes {
            return Err(Error::config(format!("expected {bytes} bytes, got {held}")).tensor(&name));
        }
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
        arrays: arrays.into_iter().map(Bound::unbind).collect(),
        starts,
    };
    Checkpoint::from_arrays(FileSource::from_source(Box::new(source), stamp), entries)
}
