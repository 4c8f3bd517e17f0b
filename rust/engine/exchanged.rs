//! Arrays in memory that a format holds with rows and columns exchanged, put in the order of the rows piece
//! by piece.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::{Format, Layout, Span, MAX_PARTS};
use crate::io::Entry;
use crate::shape;

use super::checkpoint::Stored;
use super::slab;
use super::transpose::Transposed;

/// Weights whose bytes are exchanged at once: strips of arrays that are not too short.
const PIECE_WEIGHTS: u64 = 256 * 1024;

/// The sliced components of a tensor that are exchanged, by their place in [`crate::formats::Parts`].
pub struct Exchanged<'a> {
    arrays: [Option<(Transposed, Span, &'a [u8])>; MAX_PARTS],
}

/// Their bytes of one piece.
#[derive(Default)]
pub struct Piece {
    weights: Range<u64>,
    bytes: [Vec<u8>; MAX_PARTS],
}

impl<'a> Exchanged<'a> {
    /// `components` holds an array for each component of `layout`, as long as it says.
    pub fn new(format: &dyn Format, layout: &Layout, components: &[&'a [u8]]) -> Result<Self> {
        let mut arrays = [const { None }; MAX_PARTS];
        for (place, (index, component)) in arrays.iter_mut().zip(layout.sliced()) {
            let (Some(element), Some(array)) = (
                format.transposed_element(layout, index),
                components.get(index),
            ) else {
                continue;
            };
            let entry = Entry {
                name: component.suffix.to_string(),
                dtype: component.dtype,
                shape: component.shape.clone(),
                offset: 0,
                bytes: array.len() as u64,
            };
            let stored = Stored {
                file: 0,
                entry,
                made: None,
            };
            let matrix = Transposed::of_elements(stored, element)?;
            *place = Some((matrix, component.span, *array));
        }
        Ok(Exchanged { arrays })
    }

    /// Weights of a piece, at least a unit of `unit`; all `weights` where nothing is exchanged.
    pub fn piece_weights(&self, weights: u64, unit: u64) -> u64 {
        match self.arrays.iter().any(Option::is_some) {
            true => PIECE_WEIGHTS.max(unit),
            false => weights.max(1),
        }
    }

    /// Puts the bytes of `weights` in order.
    pub fn read(&self, weights: Range<u64>, piece: &mut Piece) -> Result<()> {
        for (array, buffer) in self.arrays.iter().zip(&mut piece.bytes) {
            if let Some((matrix, span, array)) = array {
                let range = span.range(weights.start, weights.end - weights.start);
                let buffer = slab::resize(buffer, range.end - range.start)?;
                matrix.read(range.start, buffer, &|_, offset, strip| {
                    strip.copy_from_slice(bytes_at(array, offset, strip.len() as u64)?);
                    Ok(())
                })?;
            }
        }
        piece.weights = weights;
        Ok(())
    }

    /// The bytes of `tile`, which lies in the piece, in component `place`; `None` where that is not exchanged.
    pub fn part<'p>(
        &self,
        piece: &'p Piece,
        place: usize,
        tile: &Range<u64>,
    ) -> Option<Result<&'p [u8]>> {
        let (_, span, _) = self.arrays.get(place)?.as_ref()?;
        let buffer = piece.bytes.get(place)?;
        let before = span.range(piece.weights.start, 0).start;
        let range = span.range(tile.start, tile.end - tile.start);
        Some(bytes_at(
            buffer,
            range.start.wrapping_sub(before),
            range.end - range.start,
        ))
    }
}

fn bytes_at(array: &[u8], first: u64, bytes: u64) -> Result<&[u8]> {
    let (first, bytes) = (shape::to_usize(first)?, shape::to_usize(bytes)?);
    let found = array.get(first..first.saturating_add(bytes));
    found.ok_or_else(|| Error::Internal(String::from("a read runs over the end of an array")))
}
