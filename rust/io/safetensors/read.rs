//! Reading a header: the text, then the facts against each other and against the file.

use super::json::{self, Described};
use super::MOST_HEADER_BYTES;
use crate::error::{Error, Result};
use crate::io::unique::first_double;
use crate::io::{Container, Entry, Header, Metadata, Source};
use crate::shape;

/// Reads and checks a header. Entries come in the order of their data.
pub fn read_header(source: &dyn Source) -> Result<Header> {
    let text = read_text(source)?;
    let data_start = 8 + text.len() as u64;
    let parsed = json::parse(&text, 8)?;
    drop(text);
    let mut entries = Vec::new();
    entries
        .try_reserve_exact(parsed.tensors.len())
        .map_err(|_| Error::checkpoint("the header does not fit in memory"))?;
    for tensor in parsed.tensors {
        let name = tensor.name.clone();
        entries.push(entry(tensor, data_start).map_err(|error| error.tensor(&name))?);
    }
    if let Some(name) = first_double(&entries, |entry| &entry.name) {
        return Err(Error::checkpoint("name appears twice").tensor(name));
    }
    // Stable: empty tensors at one offset stay in the header's order.
    entries.sort_by_key(|entry| (entry.offset, entry.bytes));
    check_cover(&entries, data_start, source.len())?;
    Ok(Header {
        container: Container::Safetensors,
        entries,
        metadata: Metadata::Text(parsed.metadata),
        big_endian: false,
        header_bytes: data_start,
        warnings: parsed.warnings.into_texts(),
    })
}

/// The header's text, its length checked against the file before memory is taken for it.
fn read_text(source: &dyn Source) -> Result<String> {
    let file_bytes = source.len();
    if file_bytes < 8 {
        return Err(Error::checkpoint(format!(
            "file of {file_bytes} bytes is too short for a safetensors header"
        )));
    }
    let mut prefix = [0; 8];
    source.read_at(0, &mut prefix)?;
    let length = u64::from_le_bytes(prefix);
    let fault = if length == 0 {
        Some(format!(
            "header length is 0 in a file of {file_bytes} bytes"
        ))
    } else if length > MOST_HEADER_BYTES {
        Some(format!(
            "header length {length} is above the limit of {MOST_HEADER_BYTES}"
        ))
    } else if length > file_bytes - 8 {
        Some(format!(
            "header length {length} exceeds the {} bytes that follow it",
            file_bytes - 8
        ))
    } else {
        None
    };
    if let Some(fault) = fault {
        let error = Error::checkpoint(fault).at(0);
        return Err(match &prefix {
            [0, 0, 0, 0, 0, 0, 0, 0] => error.hint("the writing of this file was interrupted"),
            // A pointer file begins "version https://git-lfs.github.com/spec/v1".
            b"version " => {
                error.hint("this is a git-lfs pointer: fetch the file with git lfs pull")
            }
            [b'P', b'K', 3, 4, ..] => error.hint("this is a zip archive, perhaps a torch pickle"),
            _ => error,
        });
    }
    // Before memory is taken for the rest.
    let mut first = [0];
    source.read_at(8, &mut first)?;
    if first != [b'{'] {
        return Err(Error::checkpoint("header does not begin with \"{\"").at(8));
    }
    let mut bytes = Vec::new();
    let count = shape::to_usize(length)?;
    bytes.try_reserve_exact(count).map_err(|_| {
        Error::checkpoint(format!("header of {length} bytes does not fit in memory"))
    })?;
    bytes.resize(count, 0);
    source.read_at(8, &mut bytes)?;
    String::from_utf8(bytes).map_err(|error| {
        let place = 8 + error.utf8_error().valid_up_to() as u64;
        Error::checkpoint("header is not valid UTF-8").at(place)
    })
}

/// One checked entry; offsets become places in the file.
fn entry(tensor: Described, data_start: u64) -> Result<Entry> {
    let Described {
        name,
        dtype,
        shape,
        begin,
        end,
    } = tensor;
    let bytes = end.checked_sub(begin).ok_or_else(|| {
        Error::checkpoint(format!(
            "data_offsets [{begin}, {end}] end before they begin"
        ))
    })?;
    let expected = dtype.byte_len(&shape)?;
    let offset = shape::add(data_start, begin, "data offset")?;
    shape::add(data_start, end, "data offset")?;
    if bytes != expected {
        return Err(Error::checkpoint(format!(
            "{dtype} of shape {shape:?} takes {expected} bytes, but data_offsets [{begin}, {end}] \
             span {bytes}"
        ))
        .at(offset));
    }
    Ok(Entry {
        name,
        dtype,
        shape,
        offset,
        bytes,
    })
}

/// Every byte of the data belongs to exactly one entry.
fn check_cover(entries: &[Entry], data_start: u64, file_bytes: u64) -> Result<()> {
    let mut end = data_start;
    for entry in entries {
        if entry.offset != end {
            let fault = if entry.offset > end {
                "a hole"
            } else {
                "an overlap"
            };
            return Err(Error::checkpoint(format!(
                "data begins at byte {}, expected {end}: {fault} of {} bytes",
                entry.offset,
                entry.offset.abs_diff(end)
            ))
            .tensor(&entry.name)
            .at(entry.offset));
        }
        end = shape::add(end, entry.bytes, "data offset")?;
        if end > file_bytes {
            return Err(Error::checkpoint(format!(
                "data ends at byte {end}, but the file has {file_bytes} bytes"
            ))
            .tensor(&entry.name)
            .at(entry.offset));
        }
    }
    if end != file_bytes {
        return Err(Error::checkpoint(format!(
            "{} bytes after the data of the last tensor",
            file_bytes - end
        ))
        .at(end));
    }
    Ok(())
}
