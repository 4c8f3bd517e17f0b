//! The safetensors container.
//!
//! | bytes | hold |
//! |---|---|
//! | 0..8 | `n`: length of the header, u64 little-endian, at most 100,000,000 |
//! | 8..8+n | the header: one JSON object, first byte `{`, padded at the end with spaces |
//! | 8+n.. | the data: every byte belongs to one tensor |
//!
//! Header: `{"__metadata__": {text: text}, NAME: {"dtype": T, "shape": [..], "data_offsets": [begin,
//! end]}, ..}`, offsets counted from the start of the data, shape slowest dimension first.
//!
//! Reading is stricter than safetensors 0.8 in what its own text forbids: names, fields and metadata
//! keys may not appear twice (compared after JSON escapes are undone), and nothing may stand before
//! the `{`. Fields that the text does not know are told as warnings.
//!
//! Writing follows safetensors 0.8 (`tensor.rs`): compact JSON; data in descending order of the type
//! table, then by name; the header padded to 8 bytes. A file without late entries and with at most
//! one metadata key has the same bytes as one of `safetensors.torch.save_file`. Two differences:
//! metadata keys are sorted here (the peer writes them in the order of a randomly seeded hash map),
//! and no `__metadata__` is written for empty metadata (the peer writes invalid JSON for an empty
//! model with empty metadata). Late entries come last, whatever their place in the order, and the
//! header is padded to its longest possible length.
//!
//! Sources: safetensors 0.8.0, its README and `safetensors/src/tensor.rs`.

#![forbid(unsafe_code)]

mod json;
mod read;
mod write;

pub use read::read_header;
pub use write::{header, lay_out};

/// Longest header, as in safetensors 0.8.
pub const MOST_HEADER_BYTES: u64 = 100_000_000;

/// Most dimensions of a tensor that is read or written.
pub const MOST_DIMENSIONS: usize = 64;

/// Name that the format keeps for itself.
const METADATA: &str = "__metadata__";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::error::Result;
    use crate::io::memory::MemorySource;
    use crate::io::{FileLayout, Header, Metadata, NewEntry, NewMetadata};

    fn new(name: &str, dtype: Dtype, shape: &[u64], late: bool) -> NewEntry {
        NewEntry {
            name: name.into(),
            dtype,
            shape: shape.into(),
            late,
        }
    }

    fn read(bytes: &[u8]) -> Result<Header> {
        read_header(&MemorySource::new("a.safetensors", bytes))
    }

    /// A file whose data bytes are all 7.
    fn file(layout: &FileLayout, late: &[u64]) -> Vec<u8> {
        let mut bytes = layout.header(late).unwrap();
        assert_eq!(bytes.len() as u64, layout.header_bytes);
        let most: u64 = layout
            .entries()
            .iter()
            .filter(|e| e.late)
            .map(|e| e.shape[0])
            .sum();
        let size = layout.total_bytes - most + late.iter().sum::<u64>();
        bytes.resize(size as usize, 7);
        bytes
    }

    #[test]
    fn late_entries_shrink_without_moving_the_header() {
        let entries = vec![
            new("late.b", Dtype::U8, &[1000], true),
            new("w", Dtype::BF16, &[3, 2], false),
            new("late.a", Dtype::U8, &[100_000], true),
            new("flag", Dtype::Bool, &[2], false),
        ];
        let layout = lay_out(
            entries,
            NewMetadata::Text([("format".into(), "pt".into())].into()),
        )
        .unwrap();
        assert_eq!(layout.header_bytes % 8, 0);
        let start = layout.header_bytes;
        assert_eq!(layout.offsets, [start + 14, start, start + 14, start + 12]);
        assert_eq!(layout.total_bytes, start + 14 + 101_000);
        for late in [[1000, 100_000], [0, 0], [7, 99_999]] {
            let header = read(&file(&layout, &late)).unwrap();
            let found: Vec<_> = header
                .entries
                .iter()
                .map(|e| (e.name.as_str(), e.offset, e.bytes))
                .collect();
            let b_end = start + 14 + late[0];
            let mut expected = vec![
                ("w", start, 12),
                ("flag", start + 12, 2),
                ("late.b", start + 14, late[0]),
                ("late.a", b_end, late[1]),
            ];
            expected.sort_by_key(|(_, offset, bytes)| (*offset, *bytes));
            assert_eq!(found, expected);
            assert_eq!(header.header_bytes, start);
            let Metadata::Text(texts) = header.metadata else {
                panic!()
            };
            assert_eq!(texts["format"], "pt");
        }
        assert!(layout.header(&[1001, 0]).is_err());
        assert!(layout.header(&[1]).is_err());
        assert!(layout.header(&[1, 1, 1]).is_err());
    }

    #[test]
    fn what_the_container_cannot_hold_is_refused_at_the_plan() {
        let none = || NewMetadata::Text(Default::default());
        for (entry, text) in [
            (
                new("__metadata__", Dtype::U8, &[1], false),
                "keeps this name",
            ),
            (new("w", Dtype::Q4_0, &[32], false), "cannot hold Q4_0"),
            (new("w", Dtype::U8, &[1; 65], false), "65 dimensions"),
            (new("w", Dtype::U8, &[1, 1], true), "one-dimensional"),
            (new("w", Dtype::F4, &[3], false), "whole byte"),
            (new("w", Dtype::F32, &[1 << 62], false), "does not fit"),
        ] {
            let error = lay_out(vec![entry], none()).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        let twice = vec![
            new("w", Dtype::U8, &[1], false),
            new("w", Dtype::U8, &[1], true),
        ];
        assert!(lay_out(twice, none())
            .unwrap_err()
            .to_string()
            .contains("two tensors of one name"));
        assert!(lay_out(Vec::new(), NewMetadata::Gguf(Vec::new())).is_err());
    }

    #[test]
    fn truncation_at_every_byte_is_an_error() {
        let entries = vec![
            new("é\"\\\n", Dtype::F32, &[2], false),
            new("empty", Dtype::F16, &[0, 3], false),
            new("scalar", Dtype::I64, &[], false),
        ];
        let layout = lay_out(
            entries,
            NewMetadata::Text([("a".into(), "b".into())].into()),
        )
        .unwrap();
        let bytes = file(&layout, &[]);
        let header = read(&bytes).unwrap();
        assert_eq!(header.entries.len(), 3);
        for length in 0..bytes.len() {
            assert!(read(&bytes[..length]).is_err(), "{length} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        let error = read(&longer).unwrap_err().to_string();
        assert!(
            error.starts_with("1 bytes after the data of the last tensor"),
            "{error}"
        );
    }

    #[test]
    fn an_unfinished_file_is_refused_and_says_so() {
        let error = read(&[0; 64]).unwrap_err().to_string();
        assert!(
            error.contains("hint: the writing of this file was interrupted"),
            "{error}"
        );
    }
}
