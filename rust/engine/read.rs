//! Reads one logical tensor, decoded.

use std::ops::Range;
use std::sync::Mutex;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float;
use crate::formats::MAX_PARTS;
use crate::shape;

use super::checkpoint::{Checkpoint, Tensor};
use super::decoded::Decoded;
use super::pool::{self, lock, Stop};
use super::slab::{self, Cut};

/// Weights read at a time.
const SLAB_WEIGHTS: u64 = 1 << 20;

/// Reads slabs of packed tensors into buffers it keeps and decodes them tile by tile.
#[derive(Default)]
pub struct SlabReader {
    input: [Vec<u8>; MAX_PARTS],
    weights: Vec<f32>,
}

impl SlabReader {
    /// Reads the packed bytes of `slab`; gives their number.
    pub fn fill(
        &mut self,
        checkpoint: &Checkpoint,
        tensor: &Tensor,
        slab: &Range<u64>,
    ) -> Result<u64> {
        let packed = tensor.as_packed().ok_or_else(|| undecodable(tensor))?;
        let mut read = 0;
        for (buffer, (position, component)) in self.input.iter_mut().zip(packed.layout.sliced()) {
            let Some(Some(part)) = tensor.parts.get(position) else {
                return Err(Error::Internal(format!("no part {position}")));
            };
            let range = component.span.range(slab.start, slab.end - slab.start);
            let buffer = slab::resize(buffer, range.end - range.start)?;
            checkpoint.read_turns(part, range.start, buffer)?;
            read += range.end - range.start;
        }
        Ok(read)
    }

    /// The weights of `tile`, which lies in the slab that was read last.
    pub fn decode(
        &mut self,
        tensor: &Tensor,
        slab: &Range<u64>,
        tile: &Range<u64>,
    ) -> Result<&[f32]> {
        self.decode_for(tensor, slab, tile, false)
    }

    fn decode_for(
        &mut self,
        tensor: &Tensor,
        slab: &Range<u64>,
        tile: &Range<u64>,
        to_odd: bool,
    ) -> Result<&[f32]> {
        let packed = tensor.as_packed().ok_or_else(|| undecodable(tensor))?;
        let parts = slab::parts(packed.layout, slab::as_slices(&self.input), slab, tile)?;
        let weights = slab::resize_weights(&mut self.weights, tile.end - tile.start)?;
        packed.decode(tile.start, &parts, weights, to_odd)?;
        Ok(weights)
    }
}

fn undecodable(tensor: &Tensor) -> Error {
    Error::unsupported(format!("{} values cannot be decoded", tensor.dtype)).tensor(&tensor.name)
}

/// Decodes the weights from `first` on into `out`, rounded to `dtype`.
fn read_part(
    checkpoint: &Checkpoint,
    weights: &Decoded,
    dtype: Dtype,
    first: u64,
    out: &mut [u8],
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let weight_bytes = shape::to_usize(dtype.alignment())?;
    let most = (weights.unit_bytes() / 4).clamp(1, SLAB_WEIGHTS);
    let most = shape::to_usize(most)?.min(out.len() / weight_bytes).max(1);
    let (mut bytes, mut decoded) = (vec![0; most * 4], vec![0.0f32; most]);
    let mut start = first;
    for place in out.chunks_mut(most * weight_bytes) {
        tick()?;
        let count = place.len() / weight_bytes;
        let bytes = slab::resize(&mut bytes, count as u64 * 4)?;
        weights.read(checkpoint, start * 4, bytes)?;
        for (weight, bytes) in decoded.iter_mut().zip(bytes.as_chunks().0) {
            *weight = f32::from_le_bytes(*bytes);
        }
        float::narrow(dtype, decoded.get(..count).unwrap_or_default(), place)?;
        start += count as u64;
    }
    Ok(())
}

/// Decodes weights `range` of a tensor into `out`, rounded once to `dtype`; stored integers are
/// copied when `dtype` is their own type. `out` is little-endian and has exactly the weights' size.
pub fn read(
    checkpoint: &Checkpoint,
    name: &str,
    dtype: Dtype,
    range: Option<Range<u64>>,
    out: &mut [u8],
    threads: usize,
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let tensor = checkpoint.tensor(name)?;
    let all = shape::count_weights(&tensor.shape)?;
    let wanted = range.unwrap_or(0..all);
    if wanted.start > wanted.end || wanted.end > all {
        return Err(
            Error::config(format!("weights {wanted:?} of a tensor of {all} weights")).tensor(name),
        );
    }
    let expected = dtype.byte_len(&[wanted.end - wanted.start])?;
    if out.len() as u64 != expected {
        return Err(Error::config(format!(
            "output has {} bytes, the tensor needs {expected}",
            out.len()
        ))
        .tensor(name));
    }
    let stored = tensor.main()?;
    if tensor.parts.len() == 1 && stored.entry.dtype == dtype {
        let start = dtype.byte_len(&[wanted.start])?;
        return checkpoint.read(stored, start, out);
    }
    let packed = tensor.as_packed().ok_or_else(|| undecodable(tensor))?;
    if !dtype.is_float() || dtype == Dtype::F64 {
        return Err(Error::unsupported(format!(
            "{} weights are not turned into {dtype}",
            tensor.dtype
        ))
        .tensor(name));
    }
    let unit = packed.layout.unit_weights.max(1);
    // Units that are wanted in part are decoded by themselves.
    let first = wanted.start.next_multiple_of(unit).min(wanted.end);
    let last = match wanted.end {
        end if end == all => end,
        end => (end / unit * unit).max(first),
    };
    let size = |weights: u64| shape::to_usize(weights * dtype.alignment());
    let (head, rest) = out.split_at_mut(size(first - wanted.start)?);
    let (out, tail) = rest.split_at_mut(size(last - first)?);
    if !(head.is_empty() && tail.is_empty()) {
        let weights = Decoded::new(tensor.clone())?;
        read_part(checkpoint, &weights, dtype, wanted.start, head, tick)?;
        read_part(checkpoint, &weights, dtype, last, tail, tick)?;
    }
    let wanted = first..last;
    let weights = wanted.end - wanted.start;
    let cut = Cut::new(&[unit], weights, SLAB_WEIGHTS);
    let slab_bytes = shape::to_usize(shape::multiply(cut.slab, dtype.alignment(), "slab size")?)?;
    let chunks = Mutex::new(out.chunks_mut(slab_bytes.max(1)).enumerate());
    pool::run(
        threads,
        shape::to_usize(cut.slabs(weights))?,
        &Stop::default(),
        SlabReader::default,
        |reader, _, stop| {
            let Some((slab, chunk)) = lock(&chunks).next() else {
                return Ok(());
            };
            let range = cut.slab_range(slab as u64, weights);
            let range = wanted.start + range.start..wanted.start + range.end;
            reader.fill(checkpoint, tensor, &range)?;
            let mut rest = chunk;
            for tile in slab::tiles(&range, cut.tile) {
                stop.check()?;
                let bytes =
                    shape::to_usize((tile.end - tile.start) * dtype.alignment())?.min(rest.len());
                let (part, after) = rest.split_at_mut(bytes);
                float::narrow(
                    dtype,
                    reader.decode_for(tensor, &range, &tile, dtype != Dtype::F32)?,
                    part,
                )?;
                rest = after;
            }
            Ok(())
        },
        tick,
    )
}
