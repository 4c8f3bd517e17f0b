//! Writing: where the data goes is known from types and shapes alone, the header's text is made
//! last.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{METADATA, MOST_DIMENSIONS, MOST_HEADER_BYTES};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::io::unique::first_double;
use crate::io::{Container, FileLayout, NewEntry, NewMetadata};
use crate::shape;

/// Plans a file. `metadata` must be text.
pub fn lay_out(entries: Vec<NewEntry>, metadata: NewMetadata) -> Result<FileLayout> {
    let texts = texts(&metadata)?;
    if let Some(name) = first_double(&entries, |entry| &entry.name) {
        return Err(Error::config("two tensors of one name").tensor(name));
    }
    let mut lengths = Vec::with_capacity(entries.len());
    for entry in &entries {
        lengths.push(checked_length(entry).map_err(|error| error.tensor(&entry.name))?);
    }
    let (begins, data_bytes) = place(&entries, &lengths)?;
    let longest = text(&entries, &begins, &lengths, texts)?;
    let header_bytes = shape::align_up(8 + longest.len() as u64, 8)?;
    if header_bytes - 8 > MOST_HEADER_BYTES {
        return Err(Error::unsupported(format!(
            "header of {} bytes is above the limit of {MOST_HEADER_BYTES}",
            header_bytes - 8
        )));
    }
    let mut offsets = Vec::with_capacity(begins.len());
    for begin in &begins {
        offsets.push(shape::add(header_bytes, *begin, "data offset")?);
    }
    // All late entries are told the place of the first: where the others go depends on its length.
    let late = || entries.iter().zip(0usize..).filter(|(entry, _)| entry.late);
    let first_late = late()
        .next()
        .and_then(|(_, first)| offsets.get(first).copied());
    if let Some(first) = first_late {
        for (_, index) in late() {
            if let Some(offset) = offsets.get_mut(index) {
                *offset = first;
            }
        }
    }
    Ok(FileLayout {
        container: Container::Safetensors,
        header_bytes,
        offsets,
        total_bytes: shape::add(header_bytes, data_bytes, "file length")?,
        entries,
        metadata,
    })
}

/// The header's bytes. `late_bytes`: the final length of each late entry.
pub fn header(layout: &FileLayout, late_bytes: &[u64]) -> Result<Vec<u8>> {
    let mut late = late_bytes.iter();
    let mut lengths = Vec::with_capacity(layout.entries.len());
    for entry in &layout.entries {
        let most = checked_length(entry)?;
        let length = match entry.late {
            true => *late
                .next()
                .ok_or_else(|| Error::Internal(String::from("a late length is missing")))?,
            false => most,
        };
        if length > most {
            return Err(Error::Internal(format!(
                "late entry \"{}\" has {length} bytes, planned were {most}",
                entry.name
            )));
        }
        lengths.push(length);
    }
    if late.next().is_some() {
        return Err(Error::Internal(String::from(
            "more late lengths than late entries",
        )));
    }
    let (begins, _) = place(&layout.entries, &lengths)?;
    let text = text(&layout.entries, &begins, &lengths, texts(&layout.metadata)?)?;
    let size = shape::to_usize(layout.header_bytes)?;
    let mut bytes = Vec::with_capacity(size);
    bytes.extend_from_slice(&(layout.header_bytes - 8).to_le_bytes());
    bytes.extend_from_slice(text.as_bytes());
    if bytes.len() > size {
        return Err(Error::Internal(format!(
            "header of {} bytes, planned were {size}",
            bytes.len()
        )));
    }
    bytes.resize(size, b' ');
    Ok(bytes)
}

fn texts(metadata: &NewMetadata) -> Result<&BTreeMap<String, String>> {
    match metadata {
        NewMetadata::Text(texts) => Ok(texts),
        NewMetadata::Gguf(_) => Err(Error::Internal(String::from(
            "GGUF metadata for a safetensors file",
        ))),
    }
}

/// Bytes of an entry (of a late one: at most), if the container can hold it.
fn checked_length(entry: &NewEntry) -> Result<u64> {
    if entry.name == METADATA {
        return Err(Error::config("safetensors keeps this name for itself"));
    }
    if !entry.dtype.in_safetensors() {
        return Err(Error::unsupported(format!(
            "a safetensors file cannot hold {}",
            entry.dtype
        )));
    }
    if entry.shape.len() > MOST_DIMENSIONS {
        return Err(Error::unsupported(format!(
            "{} dimensions, at most {MOST_DIMENSIONS} are written",
            entry.shape.len()
        )));
    }
    if entry.late && (entry.dtype != Dtype::U8 || entry.shape.len() != 1) {
        return Err(Error::Internal(String::from(
            "a late entry must be one-dimensional U8",
        )));
    }
    entry.dtype.byte_len(&entry.shape)
}

/// Indices of the entries in the order of their data: descending in the type table, then by name;
/// late ones last, as given.
fn order(entries: &[NewEntry]) -> Vec<usize> {
    let rank = |dtype: Dtype| Dtype::all().position(|other| other == dtype);
    let mut order: Vec<(usize, &NewEntry, Option<usize>)> = entries
        .iter()
        .enumerate()
        .map(|(index, entry)| (index, entry, rank(entry.dtype)))
        .collect();
    order.sort_by(|(_, a, rank_a), (_, b, rank_b)| {
        a.late.cmp(&b.late).then_with(|| match a.late {
            true => std::cmp::Ordering::Equal,
            false => rank_b.cmp(rank_a).then_with(|| a.name.cmp(&b.name)),
        })
    });
    order.into_iter().map(|(index, _, _)| index).collect()
}

/// Where each entry's data begins, counted from the start of the data, and the bytes in all.
fn place(entries: &[NewEntry], lengths: &[u64]) -> Result<(Vec<u64>, u64)> {
    let mut begins = vec![0; entries.len()];
    let mut end = 0;
    for index in order(entries) {
        if let (Some(begin), Some(length)) = (begins.get_mut(index), lengths.get(index)) {
            *begin = end;
            end = shape::add(end, *length, "file length")?;
        }
    }
    Ok((begins, end))
}

/// The header's text, without padding.
fn text(
    entries: &[NewEntry],
    begins: &[u64],
    lengths: &[u64],
    texts: &BTreeMap<String, String>,
) -> Result<String> {
    let mut text = String::from("{");
    if !texts.is_empty() {
        text.push_str("\"__metadata__\":");
        text.push_str(&quoted(texts)?);
    }
    for index in order(entries) {
        let (Some(entry), Some(&begin), Some(&length)) =
            (entries.get(index), begins.get(index), lengths.get(index))
        else {
            continue;
        };
        if text.len() > 1 {
            text.push(',');
        }
        let shape = match entry.late {
            true => quoted(&[length])?,
            false => quoted(&entry.shape)?,
        };
        let end = shape::add(begin, length, "data offset")?;
        write!(
            text,
            "{}:{{\"dtype\":\"{}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}",
            quoted(&entry.name)?,
            entry.dtype,
        )
        .map_err(|error| Error::Internal(error.to_string()))?;
    }
    text.push('}');
    Ok(text)
}

fn quoted<T: serde::Serialize + ?Sized>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::Internal(error.to_string()))
}
