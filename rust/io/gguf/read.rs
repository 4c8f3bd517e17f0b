//! Reading a header: pairs, then tensors, then the tensors against each other and the file.

use super::scan::Scan;
use super::{
    is_alignment, Kind, Metadata, Value, ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GGML_NAME_BYTES, MAGIC,
    MOST_ALIGNMENT, MOST_DIMENSIONS, MOST_TENSORS,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::io::unique::first_double;
use crate::io::warnings::Warnings;
use crate::io::{self, Container, Entry, Header, Source};
use crate::shape;

/// Fewest bytes of a tensor's description: name length, dimension count, type, offset.
const LEAST_TENSOR_BYTES: u64 = 24;

/// Reads and checks a header. Entries come in the order of their data.
pub fn read_header(source: &dyn Source) -> Result<Header> {
    read(source, false)
}

/// As [`read_header`], for files of careless writers: an empty key and data that is not aligned are
/// warnings. What would be read wrongly is refused all the same.
pub fn read_header_leniently(source: &dyn Source) -> Result<Header> {
    read(source, true)
}

fn read(source: &dyn Source, lenient: bool) -> Result<Header> {
    let mut warnings = Warnings::default();
    let (mut scan, version) = open(source)?;
    scan.lenient = lenient;
    let tensor_count = scan.u64("tensor count")?;
    let pair_count = scan.u64("metadata count")?;
    let mut metadata = Metadata::scan(&mut scan, version, pair_count, &mut |text| {
        warnings.add(|| text);
    })?;
    let alignment = alignment(&metadata)?;
    metadata.set_alignment(alignment);
    let mut entries = scan_tensors(&mut scan, tensor_count, alignment, &mut warnings)?;
    if let Some(name) = first_double(&entries, |entry| &entry.name) {
        return Err(Error::checkpoint("name appears twice").tensor(name));
    }
    let header_end = scan.position();
    let data_start = shape::align_up(header_end, alignment)?;
    for entry in &mut entries {
        entry.offset = shape::add(data_start, entry.offset, "data offset")
            .map_err(|error| error.tensor(&entry.name))?;
    }
    // Stable: empty tensors at one offset stay in the header's order.
    entries.sort_by_key(|entry| entry.offset);
    check_places(
        &mut entries,
        data_start,
        alignment,
        source.len(),
        &mut warnings,
    )?;
    Ok(Header {
        container: Container::Gguf,
        big_endian: scan.big_endian,
        entries,
        metadata: io::Metadata::Gguf(metadata),
        // A file without tensors may end before the padding.
        header_bytes: data_start.min(source.len()).max(header_end),
        warnings: warnings.into_texts(),
    })
}

/// Magic, byte order and version.
fn open(source: &dyn Source) -> Result<(Scan<'_>, u32)> {
    let mut scan = Scan::new(source, 0, source.len(), false);
    if scan.left() < 8 {
        return Err(Error::checkpoint(format!(
            "file of {} bytes is too short for a GGUF header",
            scan.left()
        )));
    }
    let magic: [u8; 4] = scan.fixed("magic")?;
    if magic != MAGIC {
        let error = Error::checkpoint(format!(
            "file begins with \"{}\", expected \"GGUF\"",
            magic.escape_ascii()
        ))
        .at(0);
        return Err(match &magic {
            [0, 0, 0, 0] => error.hint("the writing of this file was interrupted"),
            b"vers" => {
                error.hint("this may be a git-lfs pointer: fetch the file with git lfs pull")
            }
            b"ggml" | b"ggjt" | b"ggmf" | b"ggla" => {
                error.hint("files older than GGUF are not read: convert the model anew")
            }
            _ => error,
        });
    }
    let stored = scan.u32("version")?;
    // Versions are small: the half that is zero tells the byte order.
    if stored & 0xffff == 0 {
        scan.big_endian = true;
    }
    let version = match scan.big_endian {
        true => stored.swap_bytes(),
        false => stored,
    };
    match version {
        2 | 3 => Ok((scan, version)),
        1 => Err(
            Error::unsupported("GGUF version 1 is not read, expected 2 or 3")
                .at(4)
                .hint(
                    "files of version 1 were written in August 2023 only: convert the model anew",
                ),
        ),
        _ => Err(Error::checkpoint(format!(
            "GGUF version {version} is not known, expected 2 or 3"
        ))
        .at(4)),
    }
}

/// Alignment of the data, as the pairs give it.
fn alignment(metadata: &Metadata) -> Result<u64> {
    let Some(field) = metadata.field(ALIGNMENT_KEY) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match field.value {
        Some(Value::U32(alignment)) if is_alignment(alignment.into()) => Ok(alignment.into()),
        Some(Value::U32(alignment)) => Err(Error::checkpoint(format!(
            "general.alignment is {alignment}, expected a power of two from 8 to {MOST_ALIGNMENT}"
        ))
        .at(field.offset)),
        _ => Err(Error::checkpoint(format!(
            "general.alignment is of type {}, expected {}",
            field.kind.name(),
            Kind::U32.name()
        ))
        .at(field.offset)),
    }
}

/// The tensors' descriptions; offsets are still counted from the start of the data.
fn scan_tensors(
    scan: &mut Scan<'_>,
    count: u64,
    alignment: u64,
    warnings: &mut Warnings,
) -> Result<Vec<Entry>> {
    if count > scan.left() / LEAST_TENSOR_BYTES {
        return Err(Error::checkpoint(format!(
            "{count} tensors do not fit into the {} bytes that are left",
            scan.left()
        ))
        .at(scan.position()));
    }
    if count > MOST_TENSORS {
        return Err(Error::checkpoint(format!(
            "{count} tensors are above the limit of {MOST_TENSORS}"
        ))
        .at(scan.position()));
    }
    let mut entries = Vec::new();
    for _ in 0..count {
        let name = scan.name("tensor name")?;
        if name.len() >= GGML_NAME_BYTES {
            warnings.add(|| {
                format!(
                    "tensor \"{name}\": name of {} bytes, ggml reads names below {GGML_NAME_BYTES}",
                    name.len()
                )
            });
        }
        let place = scan.position();
        let entry = scan_tensor(scan, &name, alignment, warnings)
            .map_err(|error| as_checkpoint(error).tensor(&name).at(place))?;
        entries
            .try_reserve(1)
            .map_err(|_| Error::checkpoint("the tensor list does not fit in memory"))?;
        entries.push(entry);
    }
    Ok(entries)
}

fn scan_tensor(
    scan: &mut Scan<'_>,
    name: &str,
    alignment: u64,
    warnings: &mut Warnings,
) -> Result<Entry> {
    let dimensions = scan.u32("dimension count")?;
    if dimensions as usize > MOST_DIMENSIONS {
        return Err(Error::checkpoint(format!(
            "{dimensions} dimensions, at most {MOST_DIMENSIONS} are read"
        )));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(scan.u64("dimension")?);
    }
    // Stored fastest first.
    shape.reverse();
    let dtype = Dtype::from_ggml(scan.u32("tensor type")?);
    let offset = scan.u64("data offset")?;
    if !offset.is_multiple_of(alignment) {
        let text = format!("data offset {offset} is not a multiple of the alignment {alignment}");
        if !scan.lenient {
            return Err(Error::checkpoint(text));
        }
        warnings.add(|| format!("tensor \"{name}\": {text}"));
    }
    let bytes = match dtype {
        Dtype::Unknown(_) => {
            shape::count_weights(&shape)?;
            0
        }
        known => known.byte_len(&shape)?,
    };
    Ok(Entry {
        name: name.to_owned(),
        dtype,
        shape,
        offset,
        bytes,
    })
}

/// A type table's complaint is a fault of the file here.
fn as_checkpoint(error: Error) -> Error {
    match error {
        Error::Format(fault) => Error::Checkpoint(fault),
        other => other,
    }
}

/// Tensors, sorted by offset, lie inside the file and apart from each other; those of unknown type
/// get the bytes up to the next.
fn check_places(
    entries: &mut [Entry],
    data_start: u64,
    alignment: u64,
    file_bytes: u64,
    warnings: &mut Warnings,
) -> Result<()> {
    let mut limit = file_bytes;
    for entry in entries.iter_mut().rev() {
        if matches!(entry.dtype, Dtype::Unknown(_)) {
            entry.bytes = limit.saturating_sub(entry.offset);
        }
        limit = limit.min(entry.offset);
    }
    let mut end = data_start;
    let mut before: Option<&str> = None;
    for entry in entries.iter() {
        if entry.offset < end && entry.bytes > 0 {
            return Err(Error::checkpoint(format!(
                "data begins at byte {}, inside that of tensor \"{}\", which ends at byte {end}",
                entry.offset,
                before.unwrap_or_default()
            ))
            .tensor(&entry.name)
            .at(entry.offset));
        }
        let padded = shape::align_up(end, alignment)?;
        if entry.offset > padded {
            let gap = entry.offset - padded;
            let name = &entry.name;
            warnings.add(|| format!("tensor \"{name}\": {gap} unused bytes before its data"));
        }
        let entry_end = shape::add(entry.offset, entry.bytes, "end of data")
            .map_err(|error| error.tensor(&entry.name))?;
        let inside = match entry.bytes {
            // Nothing is read of an empty tensor, and a writer may leave out the last padding.
            0 => entry.offset <= shape::align_up(file_bytes, alignment)?,
            _ => entry_end <= file_bytes,
        };
        if !inside {
            return Err(Error::checkpoint(format!(
                "data ends at byte {entry_end}, but the file has {file_bytes} bytes"
            ))
            .tensor(&entry.name)
            .at(entry.offset));
        }
        if entry.bytes > 0 {
            before = Some(&entry.name);
        }
        end = end.max(entry_end);
    }
    let unused = file_bytes.saturating_sub(shape::align_up(end, alignment)?);
    if unused > 0 {
        warnings.add(|| format!("{unused} unused bytes after the data of the last tensor"));
    }
    Ok(())
}
