//! Containers: where stored arrays lie in files.
//!
//! Reading gives [`Header`]s, checked once at the edge: every offset lies inside the file, no two
//! arrays overlap, every size agrees with type and shape. Writing is planned before the first
//! byte: [`Container::lay_out`] gives the offset of every array, the engine fills them in any
//! order, and [`FileLayout::header`] comes last, so that an interrupted file never passes for a
//! model.

#![forbid(unsafe_code)]

pub mod file;
pub mod gguf;
pub mod index;
mod json;
pub mod memory;
pub mod safetensors;
mod unique;
mod warnings;

use std::collections::BTreeMap;
use std::path::Path;

use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Anything with a length that can be read at an offset.
pub trait Source: Send + Sync {
    /// Bytes in all.
    fn len(&self) -> u64;

    /// Whether there are no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset`; a source that ends before is an error naming the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// The name that messages use.
    fn path(&self) -> &Path;
}

/// One stored array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name in the file.
    pub name: String,
    /// Storage type.
    pub dtype: Dtype,
    /// Shape, slowest dimension first (GGUF lists them the other way round).
    pub shape: Vec<u64>,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// What a file says about itself.
#[derive(Debug, Clone)]
pub enum Metadata {
    /// safetensors `__metadata__`.
    Text(BTreeMap<String, String>),
    /// GGUF key-value pairs; values are decoded when asked for.
    Gguf(gguf::Metadata),
}

/// A checked file header.
#[derive(Debug, Clone)]
pub struct Header {
    /// File type.
    pub container: Container,
    /// Arrays in file order.
    pub entries: Vec<Entry>,
    /// What the file says about itself.
    pub metadata: Metadata,
    /// Whether multi-byte values are stored big-endian (GGUF only).
    pub big_endian: bool,
    /// Bytes before the data, padding included.
    pub header_bytes: u64,
    /// Peculiarities that are tolerated but worth telling.
    pub warnings: Vec<String>,
}

/// One array to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEntry {
    /// Name in the file.
    pub name: String,
    /// Storage type.
    pub dtype: Dtype,
    /// Shape, slowest dimension first; for a late entry the largest possible.
    pub shape: Vec<u64>,
    /// The length is only known once the data is (one-dimensional U8 only). Late entries lie at
    /// the end of the file, in the order given.
    pub late: bool,
}

/// Where everything goes in a file that is about to be written.
#[derive(Debug, Clone)]
pub struct FileLayout {
    /// File type.
    pub container: Container,
    /// Bytes before the data, padding included.
    pub header_bytes: u64,
    /// First byte of each entry from the start of the file, in the order the entries were given.
    /// For late entries: of the first of them; the others follow without gaps.
    pub offsets: Vec<u64>,
    /// File length, late entries at their largest.
    pub total_bytes: u64,
    entries: Vec<NewEntry>,
    metadata: NewMetadata,
}

/// What a new file shall say about itself.
#[derive(Debug, Clone)]
pub enum NewMetadata {
    /// safetensors `__metadata__`.
    Text(BTreeMap<String, String>),
    /// GGUF key-value pairs, in order.
    Gguf(Vec<(String, gguf::Value)>),
}

/// A file type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Container {
    /// `.safetensors`
    Safetensors,
    /// `.gguf`
    Gguf,
}

/// One row of the container table.
struct Row {
    container: Container,
    name: &'static str,
    extension: &'static str,
    read: fn(&dyn Source) -> Result<Header>,
    lay_out: fn(Vec<NewEntry>, NewMetadata) -> Result<FileLayout>,
    header: fn(&FileLayout, &[u64]) -> Result<Vec<u8>>,
}

const CONTAINERS: &[Row] = &[
    Row {
        container: Container::Safetensors,
        name: "safetensors",
        extension: "safetensors",
        read: safetensors::read_header,
        lay_out: safetensors::lay_out,
        header: safetensors::header,
    },
    Row {
        container: Container::Gguf,
        name: "gguf",
        extension: "gguf",
        read: gguf::read_header,
        lay_out: gguf::lay_out,
        header: gguf::header,
    },
];

impl Container {
    fn row(self) -> &'static Row {
        match self {
            Container::Safetensors => &CONTAINERS[0],
            Container::Gguf => &CONTAINERS[1],
        }
    }

    /// The container's name, as in `safetensors`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The container that a file name's extension stands for.
    pub fn from_path(path: &Path) -> Result<Self> {
        let extension = path
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or("");
        CONTAINERS
            .iter()
            .find(|row| row.extension.eq_ignore_ascii_case(extension))
            .map(|row| row.container)
            .ok_or_else(|| {
                Error::unsupported("not a .safetensors or .gguf file")
                    .file(path)
                    .hint("pickle files (.bin, .pt) are not read: save them as safetensors first")
            })
    }

    /// Reads and checks the header of an open file. Reads no weights.
    pub fn read_header(self, source: &dyn Source) -> Result<Header> {
        (self.row().read)(source).map_err(|error| error.file(source.path()))
    }

    /// As [`Container::read_header`], for files of careless writers, where the container has such.
    pub fn read_header_leniently(self, source: &dyn Source) -> Result<Header> {
        match self {
            Container::Gguf => {
                gguf::read_header_leniently(source).map_err(|error| error.file(source.path()))
            }
            Container::Safetensors => self.read_header(source),
        }
    }

    /// Plans a file that holds `entries`. Entries are placed in the order the container prefers;
    /// offsets come back in the order given.
    pub fn lay_out(self, entries: Vec<NewEntry>, metadata: NewMetadata) -> Result<FileLayout> {
        (self.row().lay_out)(entries, metadata)
    }
}

impl FileLayout {
    /// The header's bytes, exactly `header_bytes` of them. `late_bytes` gives the final length of
    /// each late entry, in order.
    pub fn header(&self, late_bytes: &[u64]) -> Result<Vec<u8>> {
        (self.container.row().header)(self, late_bytes)
    }

    /// The entries, in the order given.
    pub fn entries(&self) -> &[NewEntry] {
        &self.entries
    }
}
