//! A stored matrix with rows and columns exchanged, or a stack of them each by itself, read in any byte
//! range without holding it: some rows of the result are a strip of each row of the file. What is moved
//! as one is a number, or a block of packed weights.

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::shape;

use super::checkpoint::Stored;
use super::gather::Fetch;

/// Strips that are read before any is put in its place: so many neighbours are written together.
const STRIPS: u64 = 16;

/// Bytes between two strips that are read in vain rather than passed over by another call of the system.
const MOST_GAP_BYTES: u64 = 4 << 10;
/// Bytes of neighbouring strips that are read together.
const TOGETHER_BYTES: u64 = 64 << 10;

/// Shortest strip, in bytes, that is worth a call of the system.
const LEAST_STRIP_BYTES: u64 = 512;

/// How many times the usual size a slab has at most, where columns are long.
const MOST_USUAL_SLABS: u64 = 4;

/// Matrices, transposed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transposed {
    stored: Stored,
    shape: Vec<u64>,
    /// Rows and columns of a stored matrix.
    rows: u64,
    columns: u64,
    /// Bytes of what is moved as one.
    element: u64,
}

impl Transposed {
    /// The transpose of `stored`, which must have at least two dimensions, of which the last two are
    /// exchanged, and hold plain numbers of 2, 4 or 8 bytes.
    pub fn new(stored: Stored) -> Result<Self> {
        let entry = &stored.entry;
        let is_plain = matches!(
            entry.dtype,
            Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::I32
        );
        if !is_plain || entry.shape.len() < 2 {
            return Err(Error::unsupported(format!(
                "{} of shape {:?} is not transposed: only matrices of plain numbers are",
                entry.dtype, entry.shape
            )));
        }
        let element = entry.dtype.alignment();
        Self::of_elements(stored, element)
    }

    /// The transpose of `stored`, a matrix or a stack of them whose elements are runs of `element` bytes:
    /// single numbers, or what the last dimensions hold.
    pub fn of_elements(stored: Stored, element: u64) -> Result<Self> {
        let entry = &stored.entry;
        let (mut outer, mut bytes) = (entry.shape.as_slice(), entry.dtype.alignment());
        while let (true, Some((last, rest))) = (bytes < element, outer.split_last()) {
            bytes = shape::multiply(bytes, *last, "bytes of an element")?;
            outer = rest;
        }
        let (true, &[.., rows, columns]) = (bytes == element, outer) else {
            return Err(Error::unsupported(format!(
                "{} of shape {:?} is no matrix of elements of {element} bytes",
                entry.dtype, entry.shape
            )));
        };
        let mut shape = entry.shape.clone();
        shape.swap(outer.len() - 2, outer.len() - 1);
        Ok(Transposed {
            stored,
            shape,
            rows,
            columns,
            element,
        })
    }

    /// The shape that it is read in.
    pub fn shape(&self) -> Vec<u64> {
        self.shape.clone()
    }

    /// What is transposed.
    pub fn stored(&self) -> &Stored {
        &self.stored
    }

    /// Bytes of buffers that a read takes, besides strips that are shorter than what is read of them.
    pub fn buffer_bytes(&self) -> u64 {
        TOGETHER_BYTES + STRIPS * MOST_GAP_BYTES + self.stored.buffer_bytes()
    }

    /// Bytes of a slab for which strips are not too short: `usual`, or more.
    pub fn slab_bytes(&self, usual: u64) -> u64 {
        let wanted = self.rows.saturating_mul(LEAST_STRIP_BYTES);
        wanted.clamp(usual, usual.saturating_mul(MOST_USUAL_SLABS))
    }

    /// Fills `buffer` with the bytes from `offset` on. Both are whole numbers of elements.
    pub fn read(&self, offset: u64, buffer: &mut [u8], fetch: &Fetch<'_>) -> Result<()> {
        match self.element {
            1 => self.read_elements::<1>(offset, buffer, fetch),
            2 => self.read_elements::<2>(offset, buffer, fetch),
            4 => self.read_elements::<4>(offset, buffer, fetch),
            8 => self.read_elements::<8>(offset, buffer, fetch),
            16 => self.read_elements::<16>(offset, buffer, fetch),
            other => Err(Error::Internal(format!("elements of {other} bytes"))),
        }
    }

    fn read_elements<const BYTES: usize>(
        &self,
        offset: u64,
        buffer: &mut [u8],
        fetch: &Fetch<'_>,
    ) -> Result<()> {
        let (elements, torn) = buffer.as_chunks_mut::<BYTES>();
        if !torn.is_empty() || !offset.is_multiple_of(BYTES as u64) {
            return Err(Error::Internal(String::from("a read divides an element")));
        }
        let matrix = self.rows.saturating_mul(self.columns).max(1);
        let (mut first, mut rest) = (offset / BYTES as u64, elements);
        while !rest.is_empty() {
            let here = (matrix - first % matrix).min(rest.len() as u64);
            let (elements, later) = rest.split_at_mut(shape::to_usize(here)?);
            self.read_matrix(first / matrix * matrix, first % matrix, elements, fetch)?;
            (first, rest) = (first + here, later);
        }
        Ok(())
    }

    /// How many strips of `count` elements are read before they are put in their places, and whether one
    /// read takes them all with what lies between them.
    fn strips_at_once(&self, count: u64) -> (u64, bool) {
        let gap = self
            .columns
            .saturating_sub(count)
            .saturating_mul(self.element);
        // What is made on the way is not made in vain.
        let most = match self.stored.made {
            None => MOST_GAP_BYTES,
            Some(_) => 0,
        };
        if gap > most {
            return (STRIPS.min(self.rows).max(1), false);
        }
        let row = self.columns.saturating_mul(self.element).max(1);
        let fitting = (TOGETHER_BYTES / row).max(STRIPS);
        (fitting.min(self.rows).max(1), true)
    }

    /// Fills `elements` with those of one matrix from `first` on; `base` elements are stored before it.
    fn read_matrix<const BYTES: usize>(
        &self,
        base: u64,
        first: u64,
        elements: &mut [[u8; BYTES]],
        fetch: &Fetch<'_>,
    ) -> Result<()> {
        let end = first + elements.len() as u64;
        // Rows of the result, the first and the last of which may be there in part.
        let (top, bottom) = (first / self.rows, end.div_ceil(self.rows));
        let count = bottom - top;
        let (at_once, is_one_read) = self.strips_at_once(count);
        // Elements from the beginning of one strip to that of the next.
        let step = if is_one_read { self.columns } else { count };
        let pitch = shape::to_usize(step)?;
        let most = shape::multiply(at_once - 1, step, "elements of strips")? + count;
        let mut strips = vec![[0; BYTES]; shape::to_usize(most)?];
        for left in (0..self.rows).step_by(shape::to_usize(at_once)?) {
            let together = at_once.min(self.rows - left);
            let place = |column: u64| (base + column * self.columns + top) * BYTES as u64;
            if is_one_read {
                let wanted = shape::to_usize((together - 1) * step + count)?;
                let read = strips.get_mut(..wanted).unwrap_or_default();
                fetch(&self.stored, place(left), read.as_flattened_mut())?;
            } else {
                for (column, strip) in (left..)
                    .zip(strips.chunks_exact_mut(pitch))
                    .take(together as usize)
                {
                    fetch(&self.stored, place(column), strip.as_flattened_mut())?;
                }
            }
            for row in 0..count {
                let start = (top + row) * self.rows + left;
                let here = start.max(first)..(start + together).min(end);
                if here.is_empty() {
                    continue;
                }
                let skipped = shape::to_usize(here.start - start)?;
                let place =
                    shape::to_usize(here.start - first)?..shape::to_usize(here.end - first)?;
                let found = strips
                    .iter()
                    .skip(skipped * pitch + row as usize)
                    .step_by(pitch);
                for (element, found) in elements.get_mut(place).into_iter().flatten().zip(found) {
                    *element = *found;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::io::Entry;

    fn stored(dtype: Dtype, rows: u64, columns: u64) -> Stored {
        Stored {
            file: 0,
            entry: Entry {
                name: String::from("weight"),
                dtype,
                shape: vec![rows, columns],
                offset: 0,
                bytes: rows * columns * dtype.alignment(),
            },
            made: None,
        }
    }

    #[test]
    fn every_range_of_elements_is_what_the_columns_say() {
        for (rows, columns) in [(1, 9), (9, 1), (3, 5), (16, 4), (17, 3), (40, 2)] {
            for dtype in [Dtype::BF16, Dtype::F32, Dtype::F64] {
                let array = stored(dtype, rows, columns);
                let size = dtype.alignment();
                let content: Vec<u8> = (0..array.entry.bytes)
                    .map(|offset| (offset * 7 + offset / 256) as u8)
                    .collect();
                let mut expected: Vec<u8> = Vec::new();
                for column in 0..columns {
                    for row in 0..rows {
                        let place = ((row * columns + column) * size) as usize;
                        expected.extend(&content[place..place + size as usize]);
                    }
                }
                let fetch = |_: &Stored, offset: u64, buffer: &mut [u8]| {
                    buffer.copy_from_slice(&content[offset as usize..][..buffer.len()]);
                    Ok(())
                };
                let transposed = Transposed::new(array).unwrap();
                assert_eq!(transposed.shape(), [columns, rows]);
                let step = size as usize;
                for first in (0..=expected.len()).step_by(step) {
                    for end in (first..=expected.len()).step_by(step) {
                        let mut buffer = vec![0xA5; end - first];
                        transposed.read(first as u64, &mut buffer, &fetch).unwrap();
                        assert_eq!(
                            buffer,
                            expected[first..end],
                            "{rows} x {columns}: {first}..{end}"
                        );
                    }
                }
                assert!(transposed.read(1, &mut [0; 8], &fetch).is_err());
            }
        }
    }

    #[test]
    fn each_matrix_of_a_stack_is_transposed_by_itself() {
        let mut array = stored(Dtype::F32, 6, 5);
        array.entry.shape = vec![2, 3, 5];
        let fetch = |_: &Stored, offset: u64, buffer: &mut [u8]| {
            for (index, number) in (offset / 4..).zip(buffer.chunks_exact_mut(4)) {
                number.copy_from_slice(&(index as f32).to_le_bytes());
            }
            Ok(())
        };
        let place = |index: usize| (index / 15) * 15 + index % 3 * 5 + index / 3 % 5;
        let transposed = Transposed::new(array).unwrap();
        assert_eq!(transposed.shape(), [2, 5, 3]);
        for first in 0..30 {
            for end in first..=30 {
                let mut buffer = vec![0; (end - first) * 4];
                let offset = first as u64 * 4;
                transposed.read(offset, &mut buffer, &fetch).unwrap();
                let expected: Vec<u8> = (first..end)
                    .flat_map(|index| (place(index) as f32).to_le_bytes())
                    .collect();
                assert_eq!(buffer, expected, "{first}..{end}");
            }
        }
    }

    #[test]
    fn a_slab_is_read_strip_by_strip() {
        let reads = Cell::new(0);
        let fetch = |_: &Stored, _: u64, _: &mut [u8]| {
            reads.set(reads.get() + 1);
            Ok(())
        };
        let transposed = Transposed::new(stored(Dtype::F32, 768, 2304)).unwrap();
        let mut buffer = vec![0; 256 * 768 * 4];
        transposed.read(0, &mut buffer, &fetch).unwrap();
        assert_eq!(reads.take(), 768);
        assert_eq!(transposed.slab_bytes(1 << 20), 1 << 20);
        let long = Transposed::new(stored(Dtype::BF16, 1 << 20, 8)).unwrap();
        assert_eq!(long.slab_bytes(1 << 20), 4 << 20);
    }

    #[test]
    fn blocks_are_moved_as_one_and_neighbours_read_together() {
        for (shape, element) in [(vec![2, 5, 3, 16], 16u64), (vec![2, 5, 3], 1)] {
            let mut array = stored(Dtype::U8, 10, 3 * element);
            array.entry.shape.clone_from(&shape);
            let reads = Cell::new(0);
            let fetch = |array: &Stored, offset: u64, buffer: &mut [u8]| {
                assert!(offset + buffer.len() as u64 <= array.entry.bytes);
                reads.set(reads.get() + 1);
                for (index, byte) in (offset..).zip(buffer) {
                    *byte = index as u8;
                }
                Ok(())
            };
            let transposed = Transposed::of_elements(array, element).unwrap();
            let turned = [&[2, 3, 5], &shape[3..]].concat();
            assert_eq!(transposed.shape(), turned);
            let place = |index: u64| (index / 15) * 15 + index % 5 * 3 + index / 5 % 3;
            for first in 0..30 {
                for end in first..=30 {
                    let mut buffer = vec![0; ((end - first) * element) as usize];
                    transposed
                        .read(first * element, &mut buffer, &fetch)
                        .unwrap();
                    let expected: Vec<u8> = (first..end)
                        .flat_map(|index| {
                            (0..element).map(move |byte| (place(index) * element + byte) as u8)
                        })
                        .collect();
                    assert_eq!(buffer, expected, "{element}: {first}..{end}");
                }
            }
            reads.take();
            transposed
                .read(0, &mut vec![0; 30 * element as usize], &fetch)
                .unwrap();
            assert_eq!(reads.take(), 2, "one for each matrix");
            assert!(Transposed::of_elements(stored(Dtype::U8, 4, 24), 16).is_err());
        }
    }

    #[test]
    fn only_matrices_of_numbers_are_transposed() {
        assert!(Transposed::new(stored(Dtype::I8, 2, 2)).is_err());
        assert!(Transposed::new(stored(Dtype::Q8_0, 32, 32)).is_err());
        let mut vector = stored(Dtype::F32, 2, 2);
        vector.entry.shape = vec![4];
        assert!(Transposed::new(vector).is_err());
    }
}
