//! The weights of a packed tensor as an array of `f32` that no file holds: whatever range is read is
//! decoded on the way. So a tensor that is stored as several arrays, or in blocks that a row does not
//! fill, is taken apart by rows, joined and transposed like any other.

use std::fmt;
use std::ops::Range;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::io::Entry;
use crate::shape;

use super::checkpoint::{Checkpoint, Made, Stored, Tensor};
use super::plan::source_name;
use super::read::SlabReader;
use super::slab::{self, Cut};

/// Weights whose packed bytes are read at a time.
const READ_WEIGHTS: u64 = 64 << 10;
/// Bytes of a weight.
const WEIGHT_BYTES: u64 = 4;

/// A tensor whose weights are read in place of its bytes.
pub struct Decoded {
    tensor: Tensor,
    cut: Cut,
    /// Weights at multiples of which decoding may begin inside of a unit.
    step: u64,
}

impl Decoded {
    /// The weights of `tensor`, which must be of a type that is decoded.
    pub fn new(tensor: Tensor) -> Result<Self> {
        let Some(packed) = tensor.as_packed() else {
            return Err(Error::unsupported(format!(
                "{} values cannot be decoded",
                tensor.dtype
            )));
        };
        let cut = Cut::new(
            &[packed.layout.unit_weights],
            packed.layout.weights,
            READ_WEIGHTS,
        );
        let step = packed.format.decode_step(packed.layout).max(1);
        Ok(Decoded { cut, step, tensor })
    }

    /// An array of the weights.
    pub fn stored(self) -> Result<Stored> {
        let main = self.tensor.main()?;
        let (file, offset) = (main.file, main.entry.offset);
        let shape = self.tensor.shape.clone();
        Ok(Stored {
            file,
            entry: Entry {
                name: self.tensor.name.clone(),
                dtype: Dtype::F32,
                bytes: Dtype::F32.byte_len(&shape)?,
                shape,
                offset,
            },
            made: Some(Made::Decoded(std::sync::Arc::new(self))),
        })
    }

    /// Bytes of weights that are decoded together; fewer cost as much.
    pub fn unit_bytes(&self) -> u64 {
        self.step.saturating_mul(WEIGHT_BYTES)
    }

    /// Bytes of buffers that a read takes.
    pub fn buffer_bytes(&self) -> u64 {
        let packed = self.tensor.as_packed().map_or(0, |packed| {
            let spans = packed.layout.sliced().map(|(_, component)| component.span);
            spans.map(|span| span.range(0, self.cut.slab).end).sum()
        });
        packed + self.cut.tile.saturating_mul(WEIGHT_BYTES)
    }

    /// Fills `buffer` with the bytes from `offset` on. Both are whole numbers of weights.
    pub fn read(&self, checkpoint: &Checkpoint, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (places, torn) = buffer.as_chunks_mut::<{ WEIGHT_BYTES as usize }>();
        if !torn.is_empty() || !offset.is_multiple_of(WEIGHT_BYTES) {
            return Err(Error::Internal(String::from("a read divides a weight")));
        }
        let first = offset / WEIGHT_BYTES;
        let wanted = first..first + places.len() as u64;
        let mut reader = SlabReader::default();
        let mut start = wanted.start;
        while start < wanted.end {
            let run = self.run(start, wanted.end)?;
            reader.fill(checkpoint, &self.tensor, &run)?;
            for tile in slab::tiles(&run, self.cut.tile) {
                let here = tile.start.max(wanted.start)..tile.end.min(wanted.end);
                if here.is_empty() {
                    continue;
                }
                let weights = reader.decode(&self.tensor, &run, &tile)?;
                let found = weights.get(within(&here, tile.start)?);
                let places = places.get_mut(within(&here, wanted.start)?);
                for (place, weight) in places
                    .into_iter()
                    .flatten()
                    .zip(found.into_iter().flatten())
                {
                    *place = weight.to_le_bytes();
                }
            }
            start = run.end;
        }
        Ok(())
    }

    /// What is decoded at once for the weights `start..end`: some whole units, or part of one.
    fn run(&self, start: u64, end: u64) -> Result<Range<u64>> {
        let layout = match self.tensor.as_packed() {
            Some(packed) => packed.layout,
            None => return Err(Error::Internal(String::from("nothing decodes it"))),
        };
        let unit = layout.unit_weights.max(1);
        let unit_start = start / unit * unit;
        let unit_end = unit_start.saturating_add(unit).min(layout.weights);
        let whole = start == unit_start && end >= unit_end;
        if whole {
            let units = (end - start) / unit * unit;
            let most = start.saturating_add(units.max(unit).min(self.cut.slab));
            return Ok(start..most.min(layout.weights));
        }
        let step = self.step.min(unit);
        let first = unit_start + (start - unit_start) / step * step;
        let last = end.min(unit_end) - unit_start;
        let last = unit_start.saturating_add(last.div_ceil(step).saturating_mul(step));
        Ok(first..last.min(unit_end))
    }
}

/// `range` counted from `base` on.
fn within(range: &Range<u64>, base: u64) -> Result<Range<usize>> {
    Ok(shape::to_usize(range.start - base)?..shape::to_usize(range.end - base)?)
}

impl fmt::Debug for Decoded {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "Decoded({:?}, {})",
            self.tensor.name,
            source_name(&self.tensor)
        )
    }
}

impl PartialEq for Decoded {
    fn eq(&self, other: &Self) -> bool {
        source_name(&self.tensor) == source_name(&other.tensor)
            && self.tensor.shape == other.tensor.shape
            && self.tensor.parts == other.tensor.parts
    }
}

impl Eq for Decoded {}
