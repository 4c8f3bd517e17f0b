//! The GGUF container, versions 2 and 3.
//!
//! | field | is |
//! |---|---|
//! | `GGUF` | four bytes |
//! | version | u32: 2 or 3; a big-endian file shows it with the low half zero |
//! | tensor count, pair count | u64 each |
//! | pairs | key (u64 length, UTF-8), type id (u32), value; see [`Kind`] |
//! | tensors | name, u32 dimension count, u64 dimensions fastest first, u32 type id, u64 offset |
//! | padding | zeros up to a multiple of `general.alignment` (u32, default 32) |
//! | data | each tensor at its offset from here, a multiple of the alignment, padded to one |
//!
//! A value is a number, a bool (one byte, 0 or 1), a text (u64 length, UTF-8), or an array (item
//! type id u32, count u64, items). Big-endian files (version 3) have every number swapped, those of
//! the data included; the four first bytes are not.
//!
//! Reading walks the header once, in pieces of 64 KiB; arrays of numbers are stepped over, arrays
//! stay in the file until somebody asks for them. Accepted and told as a warning: gaps between
//! tensors, bytes after the last one, names of 64 bytes or more (ggml refuses them). Tensors of a
//! type that this version does not know are listed with the bytes up to the next tensor. Up to 8
//! dimensions are read and can be written; ggml itself reads 4.
//!
//! Writing gives version 3, little-endian, tensors in the order given without gaps, the last one
//! padded as well, as ggml and gguf-py do. A model split into several files: see [`split`].
//!
//! Sources: ggml 0.25.3 (`gguf.cpp`, `docs/gguf.md`), gguf-py 0.19.0.

#![forbid(unsafe_code)]

mod json;
mod metadata;
mod read;
mod scan;
pub mod split;
mod value;
mod write;

pub use metadata::{Field, Metadata};
pub use read::{read_header, read_header_leniently};
pub use value::{Array, Kind, Value};
pub use write::{header, lay_out};

/// First bytes of every file.
const MAGIC: [u8; 4] = *b"GGUF";

/// Version that is written.
const VERSION: u32 = 3;

/// Key of the alignment of the data.
const ALIGNMENT_KEY: &str = "general.alignment";

/// Alignment of the data where the file does not say.
pub const DEFAULT_ALIGNMENT: u64 = 32;

/// Largest alignment that is read or written.
pub const MOST_ALIGNMENT: u64 = 1 << 20;

/// Names of this many bytes or more are refused by ggml, which keeps 64 bytes for a name and its
/// end. They are read and written here.
pub const GGML_NAME_BYTES: usize = 64;

/// Longest key or name, as the format's description says of keys.
pub const MOST_NAME_BYTES: u64 = 65_535;

/// Most pairs of a file; real ones have some dozens.
const MOST_PAIRS: u64 = 1 << 20;

/// Most tensors of a file; real ones have some thousands.
const MOST_TENSORS: u64 = 1 << 20;

/// Deepest array within arrays.
const MOST_DEPTH: usize = 4;

/// Most dimensions that are read or written: video models store 5-D convolutions.
const MOST_DIMENSIONS: usize = 8;

/// Most dimensions that ggml reads.
pub const GGML_DIMENSIONS: usize = 4;

/// Whether data may be aligned to `alignment`.
fn is_alignment(alignment: u64) -> bool {
    alignment.is_power_of_two() && (8..=MOST_ALIGNMENT).contains(&alignment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::error::{Error, Result};
    use crate::io::memory::MemorySource;
    use crate::io::{self, FileLayout, Header, NewEntry, NewMetadata, Source};
    use std::path::Path;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn new(name: &str, dtype: Dtype, shape: &[u64]) -> NewEntry {
        NewEntry {
            name: name.into(),
            dtype,
            shape: shape.into(),
            late: false,
        }
    }

    fn source(bytes: &[u8]) -> MemorySource<&[u8]> {
        MemorySource::new("a.gguf", bytes)
    }

    fn read(bytes: &[u8]) -> Result<Header> {
        read_header(&source(bytes))
    }

    fn pairs(header: &Header) -> &Metadata {
        match &header.metadata {
            io::Metadata::Gguf(pairs) => pairs,
            io::Metadata::Text(_) => panic!("not pairs"),
        }
    }

    /// A file whose data bytes are all 7.
    fn file(layout: &FileLayout) -> Vec<u8> {
        let mut bytes = layout.header(&[]).unwrap();
        assert_eq!(bytes.len() as u64, layout.header_bytes);
        bytes.resize(layout.total_bytes as usize, 7);
        bytes
    }

    fn values() -> Vec<(String, Value)> {
        let nested = Array::Array(vec![Array::U8(vec![1]), Array::Text(vec![])]);
        [
            ("general.architecture", Value::Text("llama".into())),
            ("u8", Value::U8(255)),
            ("i8", Value::I8(-1)),
            ("u16", Value::U16(1)),
            ("i16", Value::I16(-2)),
            ("u32", Value::U32(3)),
            ("i32", Value::I32(-4)),
            ("f32", Value::F32(0.5)),
            ("u64", Value::U64(u64::MAX)),
            ("i64", Value::I64(i64::MIN)),
            ("f64", Value::F64(-0.25)),
            ("bool", Value::Bool(true)),
            ("empty", Value::Text(String::new())),
            ("long", Value::Text("x".repeat(70_000))),
            (
                "texts",
                Value::Array(Array::Text(vec!["a".into(), "é".into(), String::new()])),
            ),
            ("numbers", Value::Array(Array::I32(vec![1, -2, 3]))),
            ("truths", Value::Array(Array::Bool(vec![true, false]))),
            ("none", Value::Array(Array::F64(vec![]))),
            ("nested", Value::Array(nested)),
        ]
        .map(|(key, value)| (key.into(), value))
        .into()
    }

    fn layout() -> FileLayout {
        let entries = vec![
            new("q", Dtype::Q4_0, &[3, 32]),
            new("a", Dtype::F32, &[2, 1, 5]),
            new("scalar", Dtype::F16, &[]),
            new("last", Dtype::I8, &[1, 1, 1, 3]),
        ];
        lay_out(entries, NewMetadata::Gguf(values())).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let layout = layout();
        let start = layout.header_bytes;
        assert_eq!(
            layout.offsets,
            [start, start + 64, start + 128, start + 160]
        );
        assert_eq!(layout.total_bytes, start + 192);
        let bytes = file(&layout);
        let header = read(&bytes).unwrap();
        assert!(header.warnings.is_empty() && !header.big_endian && header.header_bytes == start);
        for ((entry, wanted), offset) in header
            .entries
            .iter()
            .zip(layout.entries())
            .zip(&layout.offsets)
        {
            assert_eq!(
                (&entry.name, entry.dtype, &entry.shape),
                (&wanted.name, wanted.dtype, &wanted.shape)
            );
            assert_eq!(
                (entry.offset, entry.bytes),
                (*offset, wanted.dtype.byte_len(&wanted.shape).unwrap())
            );
        }
        let found = pairs(&header);
        assert_eq!(found.version(), 3);
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            values()
                .iter()
                .map(|(key, _)| key.as_str())
                .collect::<Vec<_>>()
        );
        for (key, value) in values() {
            assert_eq!(found.value(&source(&bytes), &key).unwrap(), value, "{key}");
        }
        assert_eq!(found.get_str("general.architecture"), Some("llama"));
        assert_eq!(found.get("long"), None, "long texts stay in the file");
        assert_eq!(
            (found.get_u64("i8"), found.get_u64("u64")),
            (None, Some(u64::MAX))
        );
        assert_eq!(
            (found.get_f64("f32"), found.get_bool("bool")),
            (Some(0.5), Some(true))
        );
        assert_eq!(found.array("texts"), Some((Kind::Text, 3)));
        assert!(found.value(&source(&bytes), "absent").is_err());
    }

    #[test]
    fn carried_values_give_the_same_header() {
        let bytes = file(&layout());
        let header = read(&bytes).unwrap();
        let found = pairs(&header);
        let carried = found
            .keys()
            .map(|key| (key.to_owned(), found.carry(&source(&bytes), key).unwrap()))
            .collect();
        let again = lay_out(layout().entries().to_vec(), NewMetadata::Gguf(carried)).unwrap();
        assert_eq!(file(&again), bytes);
    }

    #[test]
    fn careless_files_are_read_on_request() {
        let mut bytes = file(&layout());
        let key = bytes.windows(2).position(|pair| pair == b"u8").unwrap();
        // The key loses its letters; a filler takes their place before the next key's length.
        bytes.drain(key..key + 2);
        bytes[key - 8] = 0;
        let before = layout().offsets[0] as usize - 2;
        bytes.splice(before..before, [0; 2]);
        assert!(read(&bytes).is_err());
        let header = read_header_leniently(&source(&bytes)).unwrap();
        assert_eq!(header.warnings, ["a metadata key is empty"]);
        let found = pairs(&header);
        assert_eq!(found.get_u64(""), Some(255));

        let mut bytes = file(&layout());
        let name = bytes
            .windows(1 + 4)
            .rposition(|part| part == b"a\x03\0\0\0");
        let place = name.unwrap() + 1 + 4 + 3 * 8 + 4;
        assert_eq!(bytes[place], 64);
        bytes[place] = 72;
        assert!(read(&bytes).is_err());
        let header = read_header_leniently(&source(&bytes)).unwrap();
        assert!(header.warnings[0].contains("not a multiple of the alignment"));
        // Never overlapping.
        bytes[place] = 40;
        assert!(read_header_leniently(&source(&bytes)).is_err());
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        let layout = layout();
        let bytes = file(&layout);
        // The last three bytes of data, then padding that may be missing.
        let end = (layout.offsets[3] + 3) as usize;
        for length in (0..1000).chain(bytes.len() - 2000..end) {
            assert!(read(&bytes[..length]).is_err(), "{length} bytes");
        }
        for length in end..bytes.len() {
            assert!(read(&bytes[..length]).unwrap().warnings.is_empty());
        }
        let mut longer = bytes;
        longer.resize(longer.len() + 50, 0);
        let warnings = read(&longer).unwrap().warnings;
        assert_eq!(
            warnings,
            ["50 unused bytes after the data of the last tensor"]
        );
    }

    #[test]
    fn what_the_container_cannot_hold_is_refused_at_the_plan() {
        for (entry, text) in [
            (new("w", Dtype::Bool, &[1]), "cannot hold BOOL"),
            (new("w", Dtype::U8, &[1; 9]), "9 dimensions"),
            (new("", Dtype::F32, &[1]), "name of 0 bytes"),
            (new("w", Dtype::Q8_0, &[33]), "row of 33 weights"),
            (
                new("w", Dtype::Unknown(99), &[1]),
                "not a known tensor type",
            ),
        ] {
            let error = lay_out(vec![entry], NewMetadata::Gguf(vec![]))
                .unwrap_err()
                .to_string();
            assert!(error.contains(text), "{error}");
        }
        for (pairs, text) in [
            (
                vec![("a", Value::U8(1)), ("a", Value::U8(2))],
                "two metadata values",
            ),
            (vec![("", Value::U8(1))], "key of 0 bytes"),
            (vec![(ALIGNMENT_KEY, Value::U64(32))], "expected a u32"),
            (vec![(ALIGNMENT_KEY, Value::U32(24))], "power of two"),
        ] {
            let pairs = pairs
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect();
            let error = lay_out(vec![], NewMetadata::Gguf(pairs))
                .unwrap_err()
                .to_string();
            assert!(error.contains(text), "{error}");
        }
        let aligned = vec![(ALIGNMENT_KEY.to_owned(), Value::U32(4096))];
        let layout = lay_out(vec![new("w", Dtype::F32, &[1])], NewMetadata::Gguf(aligned)).unwrap();
        assert_eq!((layout.header_bytes, layout.total_bytes), (4096, 8192));
        assert_eq!(pairs(&read(&file(&layout)).unwrap()).alignment(), 4096);
    }

    /// Counts what is read of a file that is not there beyond its header.
    struct Counting {
        header: Vec<u8>,
        bytes: u64,
        reads: AtomicU64,
        read_bytes: AtomicU64,
    }

    impl Source for Counting {
        fn len(&self) -> u64 {
            self.bytes
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.read_bytes
                .fetch_add(buffer.len() as u64, Ordering::Relaxed);
            let start = usize::try_from(offset).map_err(|_| Error::checkpoint("far"))?;
            for (index, byte) in buffer.iter_mut().enumerate() {
                *byte = self.header.get(start + index).copied().unwrap_or(0);
            }
            Ok(())
        }

        fn path(&self) -> &Path {
            Path::new("counting.gguf")
        }
    }

    #[test]
    fn a_large_vocabulary_is_walked_once_and_numbers_are_stepped_over() {
        let tokens = (0..150_000).map(|i| format!("token{i}")).collect();
        let merges = (0..150_000).map(|i| format!("to ken{i}")).collect();
        let metadata = vec![
            (
                "scores".to_owned(),
                Value::Array(Array::F32(vec![0.5; 4_000_000])),
            ),
            ("tokens".to_owned(), Value::Array(Array::Text(tokens))),
            ("merges".to_owned(), Value::Array(Array::Text(merges))),
        ];
        let layout = lay_out(
            vec![new("w", Dtype::F32, &[1 << 30])],
            NewMetadata::Gguf(metadata),
        )
        .unwrap();
        let counting = Counting {
            header: layout.header(&[]).unwrap(),
            bytes: layout.total_bytes,
            reads: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
        };
        let header = read_header(&counting).unwrap();
        assert_eq!(pairs(&header).array("tokens"), Some((Kind::Text, 150_000)));
        let texts = layout.header_bytes - 16_000_000;
        let reads = counting.reads.load(Ordering::Relaxed);
        let read_bytes = counting.read_bytes.load(Ordering::Relaxed);
        assert!(
            read_bytes < texts + texts / 100 + 2 * 65_536,
            "{read_bytes} of {texts}"
        );
        assert!(reads < texts / 65_000 + 4, "{reads} reads");
    }
}
