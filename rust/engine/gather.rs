//! Rows of stored arrays, joined: where the bytes lie of an array that no file holds as it is.
//!
//! A [`Gather`] is a list of segments, each a run of equally long rows of one stored array. A read
//! of any byte range of the joined array becomes reads of the stored ones: one per segment, or,
//! where a segment interleaves its rows, one per part and group of rows. Where a row comes from is
//! computed, never listed.

use crate::error::{Error, Result};
use crate::shape;

use super::checkpoint::Stored;

/// Rows that lie together in the file and apart in the result are read through a buffer of this
/// size; longer rows are read one by one, straight to their place.
pub const SCRATCH_BYTES: u64 = 64 << 10;

/// Reads bytes of a stored array that begin at an offset in it.
pub type Fetch<'f> = dyn Fn(&Stored, u64, &mut [u8]) -> Result<()> + 'f;

/// The order of a segment's rows: within each of `groups` equal groups, row `part * size + i` of
/// the file is row `i * parts + part` of the result, `size` being the rows of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    groups: u64,
    parts: u64,
}

/// A run of rows of one stored array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    stored: Stored,
    /// First byte in the stored array.
    first: u64,
    row_bytes: u64,
    rows: u64,
    order: Option<Order>,
    /// First byte in the result.
    start: u64,
}

/// An array that consists of rows of others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Gather {
    segments: Vec<Segment>,
    bytes: u64,
}

impl Order {
    /// Checked: `rows` rows divide into `groups` groups of `parts` parts.
    pub fn new(rows: u64, groups: u64, parts: u64) -> Result<Self> {
        let divides = groups
            .checked_mul(parts)
            .is_some_and(|pieces| pieces > 0 && rows.is_multiple_of(pieces));
        if divides {
            return Ok(Order { groups, parts });
        }
        Err(Error::config(format!(
            "{rows} rows do not divide into {groups} groups of {parts} parts"
        )))
    }
}

impl Gather {
    /// Adds `rows` rows of `row_bytes` bytes of `stored`, from row `first_row` on.
    pub fn add(
        &mut self,
        stored: &Stored,
        row_bytes: u64,
        first_row: u64,
        rows: u64,
        order: Option<Order>,
    ) -> Result<()> {
        let bytes = shape::multiply(rows, row_bytes, "bytes of rows")?;
        let first = shape::multiply(first_row, row_bytes, "first byte of rows")?;
        if shape::add(first, bytes, "end of rows")? > stored.entry.bytes {
            return Err(Error::Internal(format!(
                "rows {first_row}.. run over the end of \"{}\"",
                stored.entry.name
            )));
        }
        if bytes == 0 {
            return Ok(());
        }
        self.segments.push(Segment {
            stored: stored.clone(),
            first,
            row_bytes,
            rows,
            order,
            start: self.bytes,
        });
        self.bytes = shape::add(self.bytes, bytes, "bytes of joined rows")?;
        Ok(())
    }

    /// Bytes of the joined rows.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of buffers that a read takes.
    pub fn buffer_bytes(&self) -> u64 {
        let of = |segment: &Segment| match segment.order {
            Some(_) => segment.rows_at_once() * segment.row_bytes + segment.stored.buffer_bytes(),
            None => segment.stored.buffer_bytes(),
        };
        self.segments.iter().map(of).max().unwrap_or(0)
    }

    /// Fills `buffer` with the bytes from `offset` on, which must be there.
    pub fn read(&self, offset: u64, buffer: &mut [u8], fetch: &Fetch<'_>) -> Result<()> {
        let after = self
            .segments
            .partition_point(|segment| segment.start <= offset);
        let (mut offset, mut rest) = (offset, buffer);
        for segment in self.segments.iter().skip(after.saturating_sub(1)) {
            if rest.is_empty() {
                break;
            }
            let within = offset - segment.start;
            let left = segment.rows * segment.row_bytes - within;
            let (here, later) = split(rest, left)?;
            offset += here.len() as u64;
            segment.read(within, here, fetch)?;
            rest = later;
        }
        if rest.is_empty() {
            return Ok(());
        }
        Err(Error::Internal(String::from(
            "a read runs over the end of the joined rows",
        )))
    }
}

/// The first `bytes` of `buffer`, or all of it, and the rest.
fn split(buffer: &mut [u8], bytes: u64) -> Result<(&mut [u8], &mut [u8])> {
    let bytes = shape::to_usize(bytes.min(buffer.len() as u64))?;
    Ok(buffer.split_at_mut(bytes))
}

impl Segment {
    fn read(&self, within: u64, buffer: &mut [u8], fetch: &Fetch<'_>) -> Result<()> {
        let Some(order) = self.order.filter(|order| order.parts > 1) else {
            return fetch(&self.stored, self.first + within, buffer);
        };
        let group_rows = self.rows / order.groups;
        let mut scratch = Vec::new();
        let (mut position, mut rest) = (within, buffer);
        while !rest.is_empty() {
            let (row, into) = (position / self.row_bytes, position % self.row_bytes);
            let (group, first) = (row / group_rows, row % group_rows);
            let whole = (rest.len() as u64 / self.row_bytes).min(group_rows - first);
            let bytes = match (into, whole) {
                (0, 1..) => whole * self.row_bytes,
                // A slab may begin or end within a row.
                _ => self.row_bytes - into,
            };
            let (here, later) = split(rest, bytes)?;
            position += here.len() as u64;
            if into == 0 && whole > 0 {
                let base = group * group_rows;
                self.read_rows(order, base, first..first + whole, here, &mut scratch, fetch)?;
            } else {
                let source = group * group_rows + order.source(first, group_rows);
                fetch(
                    &self.stored,
                    self.first + source * self.row_bytes + into,
                    here,
                )?;
            }
            rest = later;
        }
        Ok(())
    }

    /// Rows that are read into a buffer together.
    fn rows_at_once(&self) -> u64 {
        let bytes = SCRATCH_BYTES.max(self.stored.unit_bytes());
        (bytes / self.row_bytes).clamp(1, self.rows.max(1))
    }

    /// Rows `rows` of the group whose first row is `base`. Those of one part lie together in the
    /// file, and in the result each is a whole round of the parts behind the one before.
    fn read_rows(
        &self,
        order: Order,
        base: u64,
        rows: std::ops::Range<u64>,
        buffer: &mut [u8],
        scratch: &mut Vec<u8>,
        fetch: &Fetch<'_>,
    ) -> Result<()> {
        let group_rows = self.rows / order.groups;
        let row = shape::to_usize(self.row_bytes)?;
        let at_once = self.rows_at_once();
        let stride = shape::to_usize(order.parts)?.saturating_mul(row);
        for part in 0..order.parts.min(rows.end - rows.start) {
            let first = rows.start + part;
            let mut source = base + order.source(first, group_rows);
            let mut left = (rows.end - first).div_ceil(order.parts);
            let mut place = shape::to_usize(part)?.saturating_mul(row);
            while left > 0 {
                let count = left.min(at_once);
                let bytes = shape::to_usize(count * self.row_bytes)?;
                let offset = self.first + source * self.row_bytes;
                if count == 1 {
                    fetch(&self.stored, offset, row_at(buffer, place, row)?)?;
                    place = place.saturating_add(stride);
                } else {
                    scratch.resize(bytes, 0);
                    fetch(&self.stored, offset, scratch)?;
                    for found in scratch.chunks_exact(row) {
                        row_at(buffer, place, row)?.copy_from_slice(found);
                        place = place.saturating_add(stride);
                    }
                }
                source += count;
                left -= count;
            }
        }
        Ok(())
    }
}

impl Order {
    /// Row of the file that is row `row` of the result, both counted within a group.
    fn source(self, row: u64, group_rows: u64) -> u64 {
        (row % self.parts) * (group_rows / self.parts) + row / self.parts
    }
}

fn row_at(buffer: &mut [u8], place: usize, row: usize) -> Result<&mut [u8]> {
    buffer
        .get_mut(place..place.saturating_add(row))
        .ok_or_else(|| Error::Internal(String::from("a row outside of its buffer")))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::dtype::Dtype;
    use crate::io::Entry;

    fn stored(rows: u64, row_bytes: u64, file: usize) -> Stored {
        Stored {
            file,
            entry: Entry {
                name: format!("array {file}"),
                dtype: Dtype::U8,
                shape: vec![rows, row_bytes],
                offset: 0,
                bytes: rows * row_bytes,
            },
            made: None,
        }
    }

    /// The byte at `offset` of array `file`.
    fn content(file: usize, offset: u64) -> u8 {
        (offset * 7 + offset / 256 + file as u64 * 91) as u8
    }

    #[test]
    fn every_byte_range_of_joined_and_interleaved_rows_is_what_the_rows_say() {
        for row_bytes in [1, 3, 40] {
            let (a, b) = (stored(24, row_bytes, 0), stored(9, row_bytes, 1));
            let mut gather = Gather::default();
            gather.add(&b, row_bytes, 4, 5, None).unwrap();
            let order = Order::new(18, 3, 2).unwrap();
            gather.add(&a, row_bytes, 6, 18, Some(order)).unwrap();
            gather.add(&b, row_bytes, 0, 0, None).unwrap();
            gather.add(&b, row_bytes, 0, 4, None).unwrap();
            let mut rows: Vec<(usize, u64)> = (4..9).map(|row| (1, row)).collect();
            for group in 0..3 {
                for i in 0..3 {
                    rows.extend((0..2).map(|part| (0, 6 + group * 6 + part * 3 + i)));
                }
            }
            rows.extend((0..4).map(|row| (1, row)));
            let expected: Vec<u8> = rows
                .iter()
                .flat_map(|(file, row)| {
                    (0..row_bytes).map(move |byte| content(*file, row * row_bytes + byte))
                })
                .collect();
            assert_eq!(gather.bytes(), expected.len() as u64);
            let fetch = |part: &Stored, offset: u64, buffer: &mut [u8]| {
                for (index, byte) in buffer.iter_mut().enumerate() {
                    assert!(offset + (index as u64) < part.entry.bytes);
                    *byte = content(part.file, offset + index as u64);
                }
                Ok(())
            };
            for first in 0..expected.len() {
                for end in first..=expected.len() {
                    let mut buffer = vec![0; end - first];
                    gather.read(first as u64, &mut buffer, &fetch).unwrap();
                    assert_eq!(buffer, expected[first..end], "{row_bytes}: {first}..{end}");
                }
            }
            let mut over = vec![0; expected.len() + 1];
            assert!(gather.read(0, &mut over, &fetch).is_err());
        }
    }

    #[test]
    fn rows_that_lie_together_are_read_together() {
        let reads = Cell::new(0);
        let fetch = |_: &Stored, _: u64, _: &mut [u8]| {
            reads.set(reads.get() + 1);
            Ok(())
        };
        let mut buffer = vec![0; 4096 * 64];
        let mut joined = Gather::default();
        joined.add(&stored(4096, 64, 0), 64, 0, 4096, None).unwrap();
        joined.read(0, &mut buffer, &fetch).unwrap();
        assert_eq!(reads.take(), 1);
        let mut heads = Gather::default();
        let order = Order::new(4096, 32, 2).unwrap();
        let array = stored(4096, 64, 0);
        heads.add(&array, 64, 0, 4096, Some(order)).unwrap();
        heads.read(0, &mut buffer, &fetch).unwrap();
        assert_eq!(reads.take(), 64, "two halves of 32 heads");
    }

    #[test]
    fn uneven_groups_are_refused() {
        assert!(Order::new(10, 2, 2).is_err());
        assert!(Order::new(10, 0, 2).is_err());
        assert!(Order::new(10, 1, 0).is_err());
        assert!(Order::new(0, u64::MAX, 2).is_err());
        assert!(Order::new(0, 4, 2).is_ok());
    }
}
