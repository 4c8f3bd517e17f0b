//! Writing: version 3, little-endian, tensors in the order given.

use super::{
    is_alignment, Kind, Value, ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MOST_ALIGNMENT,
    MOST_DIMENSIONS, MOST_NAME_BYTES, VERSION,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::io::unique::first_double;
use crate::io::{Container, FileLayout, NewEntry, NewMetadata};
use crate::shape;

/// Plans a file. `metadata` must be pairs; `general.alignment` among them is followed.
pub fn lay_out(entries: Vec<NewEntry>, metadata: NewMetadata) -> Result<FileLayout> {
    let pairs = pairs(&metadata)?;
    let alignment = check_pairs(pairs)?;
    if let Some(name) = first_double(&entries, |entry| &entry.name) {
        return Err(Error::config("two tensors of one name").tensor(name));
    }
    let mut begins = Vec::with_capacity(entries.len());
    let mut end = 0;
    for entry in &entries {
        let length = checked_length(entry).map_err(|error| error.tensor(&entry.name))?;
        begins.push(end);
        end = shape::align_up(shape::add(end, length, "file length")?, alignment)?;
    }
    let stored = store(pairs, &entries, &begins)?;
    let header_bytes = shape::align_up(stored.len() as u64, alignment)?;
    let mut offsets = Vec::with_capacity(begins.len());
    for begin in begins {
        offsets.push(shape::add(header_bytes, begin, "data offset")?);
    }
    Ok(FileLayout {
        container: Container::Gguf,
        header_bytes,
        offsets,
        total_bytes: shape::add(header_bytes, end, "file length")?,
        entries,
        metadata,
    })
}

/// The header's bytes. GGUF files have no late entries.
pub fn header(layout: &FileLayout, late_bytes: &[u64]) -> Result<Vec<u8>> {
    if !late_bytes.is_empty() {
        return Err(Error::Internal(String::from(
            "late lengths for a GGUF file",
        )));
    }
    let begins: Vec<u64> = layout
        .offsets
        .iter()
        .map(|offset| offset.saturating_sub(layout.header_bytes))
        .collect();
    let mut stored = store(pairs(&layout.metadata)?, &layout.entries, &begins)?;
    let size = shape::to_usize(layout.header_bytes)?;
    if stored.len() > size {
        return Err(Error::Internal(format!(
            "header of {} bytes, planned were {size}",
            stored.len()
        )));
    }
    stored.resize(size, 0);
    Ok(stored)
}

fn pairs(metadata: &NewMetadata) -> Result<&[(String, Value)]> {
    match metadata {
        NewMetadata::Gguf(pairs) => Ok(pairs),
        NewMetadata::Text(_) => Err(Error::Internal(String::from(
            "safetensors metadata for a GGUF file",
        ))),
    }
}

/// Checks the keys; gives the alignment.
fn check_pairs(pairs: &[(String, Value)]) -> Result<u64> {
    if let Some(key) = first_double(pairs, |(key, _)| key) {
        return Err(Error::config(format!("two metadata values for \"{key}\"")));
    }
    for (key, _) in pairs {
        if key.is_empty() || key.len() as u64 > MOST_NAME_BYTES {
            return Err(Error::config(format!(
                "metadata key of {} bytes, expected 1 to {MOST_NAME_BYTES}",
                key.len()
            )));
        }
    }
    let Some((_, value)) = pairs.iter().find(|(key, _)| key == ALIGNMENT_KEY) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let alignment = match value {
        Value::U32(alignment) => Some(*alignment),
        Value::Raw {
            kind: Kind::U32,
            bytes,
        } => bytes.as_slice().try_into().ok().map(u32::from_le_bytes),
        _ => None,
    };
    alignment
        .map(u64::from)
        .filter(|alignment| is_alignment(*alignment))
        .ok_or_else(|| {
            Error::config(format!(
                "general.alignment: expected a u32 that is a power of two from 8 to {MOST_ALIGNMENT}"
            ))
        })
}

/// Bytes of an entry, if the container can hold it.
fn checked_length(entry: &NewEntry) -> Result<u64> {
    if entry.late {
        return Err(Error::Internal(String::from("a late entry in a GGUF file")));
    }
    if entry.name.is_empty() || entry.name.len() as u64 > MOST_NAME_BYTES {
        return Err(Error::config(format!(
            "tensor name of {} bytes, expected 1 to {MOST_NAME_BYTES}",
            entry.name.len()
        )));
    }
    if entry.shape.len() > MOST_DIMENSIONS {
        return Err(Error::unsupported(format!(
            "{} dimensions, a GGUF file holds at most {MOST_DIMENSIONS}",
            entry.shape.len()
        )));
    }
    type_id(entry.dtype)?;
    entry.dtype.byte_len(&entry.shape)
}

fn type_id(dtype: Dtype) -> Result<u32> {
    dtype
        .ggml_id()
        .ok_or_else(|| Error::unsupported(format!("a GGUF file cannot hold {dtype}")))
}

/// The header without padding.
fn store(pairs: &[(String, Value)], entries: &[NewEntry], begins: &[u64]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    out.extend_from_slice(&(pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        store_name(key, &mut out);
        out.extend_from_slice(&value.kind().id().to_le_bytes());
        value.store(&mut out);
    }
    for (entry, begin) in entries.iter().zip(begins) {
        store_name(&entry.name, &mut out);
        out.extend_from_slice(&(entry.shape.len() as u32).to_le_bytes());
        for dim in entry.shape.iter().rev() {
            out.extend_from_slice(&dim.to_le_bytes());
        }
        out.extend_from_slice(&type_id(entry.dtype)?.to_le_bytes());
        out.extend_from_slice(&begin.to_le_bytes());
    }
    Ok(out)
}

fn store_name(name: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(name.len() as u64).to_le_bytes());
    out.extend_from_slice(name.as_bytes());
}
