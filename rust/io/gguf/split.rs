//! Models split into several GGUF files, `PREFIX-00001-of-00003.gguf`.
//!
//! Each part is a whole GGUF file. Its pairs `split.no` (from 0), `split.count` and
//! `split.tensors.count` (of the whole model) say where it belongs; the pairs about the model stand
//! in the first part only.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::Metadata;
use crate::error::{Error, Result};
use crate::io::file::FileSource;
use crate::io::index::{open_file, shard_name, shard_number};
use crate::io::{self, Container, Header};

/// Most parts: the number is stored as u16.
const MOST_PARTS: u64 = 65_535;

/// A file and its header.
type Part = (Arc<FileSource>, Header);

/// Opens all parts of the model that `path` is one part of, first part first, and checks that they
/// belong together; gives warnings as well. `lenient` as for [`super::read_header_leniently`]. A file that is not a part of a split model comes alone.
pub fn open_parts(path: &Path, lenient: bool) -> Result<(Vec<Part>, Vec<String>)> {
    let given = open_file(Container::Gguf, path, lenient)?;
    let told = pairs(&given.1)
        .and_then(|pairs| pairs.get_u64("split.count"))
        .unwrap_or(1);
    let named = shard_number(path, ".gguf");
    let (stem, number, count) = match named {
        None if told <= 1 => return Ok((vec![given], Vec::new())),
        None => {
            return Err(Error::checkpoint(format!(
                "part of a model split into {told} files, but its name does not say which"
            ))
            .file(path)
            .hint("expected a name that ends as in -00001-of-00003.gguf"))
        }
        Some((_, number, count)) if told <= 1 => {
            let mut warnings = Vec::new();
            if count > 1 {
                warnings.push(format!(
                    "the file name says part {number} of {count}, the file itself says nothing of it"
                ));
            }
            return Ok((vec![given], warnings));
        }
        Some(named) => named,
    };
    if count != told || number == 0 || number > count || count > MOST_PARTS {
        return Err(Error::checkpoint(format!(
            "the file name says part {number} of {count}, the file says one of {told}"
        ))
        .file(path));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut given = Some(given);
    let mut parts = Vec::new();
    for position in 0..count {
        let opened = match given.take_if(|_| position + 1 == number) {
            Some(given) => given,
            None => {
                let (position, count) = (position as usize, count as usize);
                let name = shard_name(stem, Container::Gguf, position, count);
                open_other(&folder.join(name), lenient)?
            }
        };
        check_part(&opened, position, count)?;
        parts.push(opened);
    }
    check_whole(&parts)?;
    Ok((parts, Vec::new()))
}

fn open_other(path: &Path, lenient: bool) -> Result<Part> {
    open_file(Container::Gguf, path, lenient).map_err(|error| match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Error::checkpoint("a part of the split model is missing").file(path)
        }
        other => other,
    })
}

fn pairs(header: &Header) -> Option<&Metadata> {
    match &header.metadata {
        io::Metadata::Gguf(pairs) => Some(pairs),
        io::Metadata::Text(_) => None,
    }
}

/// The part says of itself that it stands at `position` of `count`.
fn check_part((source, header): &Part, position: u64, count: u64) -> Result<()> {
    for (key, expected) in [("split.no", position), ("split.count", count)] {
        let found = pairs(header).and_then(|pairs| pairs.get_u64(key));
        if found != Some(expected) {
            let found = found.map_or(String::from("missing"), |found| found.to_string());
            return Err(
                Error::checkpoint(format!("{key} is {found}, expected {expected}"))
                    .file(io::Source::path(source.as_ref())),
            );
        }
    }
    Ok(())
}

/// The parts have one byte order, no name twice, and as many tensors as they say.
fn check_whole(parts: &[Part]) -> Result<()> {
    let Some((first_source, first)) = parts.first() else {
        return Ok(());
    };
    let mut holders: HashMap<&str, usize> = HashMap::new();
    for (number, (source, header)) in (1..).zip(parts) {
        let path = io::Source::path(source.as_ref());
        if header.big_endian != first.big_endian {
            return Err(Error::checkpoint("byte order differs from the first part's").file(path));
        }
        for entry in &header.entries {
            if let Some(other) = holders.insert(&entry.name, number) {
                return Err(
                    Error::checkpoint(format!("stored in parts {other} and {number}"))
                        .tensor(&entry.name)
                        .file(path),
                );
            }
        }
    }
    let told = pairs(first).and_then(|pairs| pairs.get_u64("split.tensors.count"));
    if let Some(told) = told.filter(|told| *told != holders.len() as u64) {
        return Err(Error::checkpoint(format!(
            "split.tensors.count is {told}, but the parts hold {} tensors",
            holders.len()
        ))
        .file(io::Source::path(first_source.as_ref())));
    }
    Ok(())
}
