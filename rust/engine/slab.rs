//! One slab: a run of a tensor's weights that a worker reads, decodes, encodes and measures in
//! buffers it keeps. Slabs are a few megabytes (the unit of reading and writing); inside, the work
//! goes tile by tile, so that the widened weights stay in cache between the steps.

use std::ops::Range;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float;
use crate::formats::{
    self, ErrorSums, Format, Layout, NonFinite, Parts, PartsMut, Recode, Span, Weights, MAX_PARTS,
};
use crate::{kernels, shape};

/// Weights per tile, before rounding to whole units: as `f32` they and their decoded copy take
/// 32 KiB, which a first-level cache holds. Four times as many were a tenth slower.
pub const TILE_WEIGHTS: u64 = 4 * 1024;

/// A format with the layout of one tensor in it.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    /// How the numbers are laid out.
    pub format: &'static dyn Format,
    /// Where they are.
    pub layout: &'a Layout,
}

impl Packed<'_> {
    /// Decodes the tile that begins at weight `first`; with `to_odd` as [`Format::decode_to_odd`].
    pub fn decode(
        &self,
        first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
        to_odd: bool,
    ) -> Result<()> {
        if to_odd {
            self.format
                .decode_to_odd(self.layout, first, parts, weights)?;
        } else {
            self.format.decode(self.layout, first, parts, weights)?;
        }
        if let Some(factors) = &self.layout.params.column_factors {
            let start = shape::to_usize(first % (factors.len() as u64).max(1))?;
            let columns = factors.iter().cycle().skip(start);
            for (weight, factor) in weights.iter_mut().zip(columns) {
                *weight *= factor;
            }
        }
        Ok(())
    }
}

/// How a tensor is cut: `slab` and `tile` are weights, both multiples of what the two formats
/// allow (or the whole tensor).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Weights per slab.
    pub slab: u64,
    /// Weights per tile.
    pub tile: u64,
}

impl Cut {
    /// The cut for work whose tiles begin at multiples of every one of `units`, of at most
    /// `weights` weights, with slabs of about `slab_weights`.
    pub fn new(units: &[u64], weights: u64, slab_weights: u64) -> Self {
        let whole = weights.max(1);
        let unit = units.iter().fold(1u64, |unit, &next| {
            least_common_multiple(unit, next.max(1), whole)
        });
        let tile = round_to(TILE_WEIGHTS, unit).min(whole);
        Cut {
            slab: round_to(slab_weights, tile).min(whole),
            tile,
        }
    }

    /// Number of slabs of a tensor of `weights` weights.
    pub fn slabs(&self, weights: u64) -> u64 {
        weights.div_ceil(self.slab)
    }

    /// Weights of slab `index`.
    pub fn slab_range(&self, index: u64, weights: u64) -> Range<u64> {
        let first = index.saturating_mul(self.slab).min(weights);
        first..first.saturating_add(self.slab).min(weights)
    }
}

/// Least common multiple, or `most` where it would be larger (then the whole tensor is one unit).
fn least_common_multiple(a: u64, b: u64, most: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    (a / x)
        .checked_mul(b)
        .map_or(most, |multiple| multiple.min(most))
}

/// The largest multiple of `unit` that is at most `about`, and at least one unit.
fn round_to(about: u64, unit: u64) -> u64 {
    (about / unit).max(1).saturating_mul(unit)
}

/// Buffers of one worker, allocated once.
#[derive(Default)]
pub struct Scratch {
    /// Packed source bytes of the slab, one buffer per sliced component.
    pub input: [Vec<u8>; MAX_PARTS],
    /// Packed target bytes of the slab, where they are not encoded straight into their place.
    pub output: [Vec<u8>; MAX_PARTS],
    /// First-pass statistics of the slab.
    pub statistics: Vec<u8>,
    tile: TileScratch,
    decoded: Vec<f32>,
    wide: Vec<f32>,
}

/// Buffers for the weights of a tile.
#[derive(Default)]
struct TileScratch {
    weights: Vec<f32>,
    rounded: Vec<u8>,
}

/// What to do with each slab of a tensor.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// Where the weights come from.
    pub source: Packed<'a>,
    /// What they become.
    pub target: Packed<'a>,
    /// The cut both sides agreed on.
    pub cut: Cut,
    /// Added to every decoded weight.
    pub add: Option<f32>,
    /// The type that weights are rounded to before they are encoded.
    pub through: Option<Dtype>,
    /// Measure the error of what was encoded.
    pub verify: bool,
    /// Let weights through that are not finite.
    pub keep_nonfinite: bool,
}

/// Grows `buffer` to `bytes` without touching it twice; a worker's buffers reach their final size
/// within its first slabs.
pub fn resize(buffer: &mut Vec<u8>, bytes: u64) -> Result<&mut [u8]> {
    let bytes = shape::to_usize(bytes)?;
    if buffer.len() < bytes {
        buffer
            .try_reserve_exact(bytes - buffer.len())
            .map_err(|_| Error::config(format!("no memory for a buffer of {bytes} bytes")))?;
        buffer.resize(bytes, 0);
    }
    Ok(&mut buffer[..bytes])
}

/// As [`resize`], for weights.
pub fn resize_weights(buffer: &mut Vec<f32>, count: u64) -> Result<&mut [f32]> {
    let count = shape::to_usize(count)?;
    if buffer.len() < count {
        buffer
            .try_reserve_exact(count - buffer.len())
            .map_err(|_| Error::config(format!("no memory for a tile of {count} weights")))?;
        buffer.resize(count, 0.0);
    }
    Ok(&mut buffer[..count])
}

/// Byte range of `tile` inside a buffer that holds `slab` of a component.
fn within(span: Span, slab: &Range<u64>, tile: &Range<u64>) -> Result<Range<usize>> {
    let base = span.range(slab.start, 0).start;
    let bytes = span.range(tile.start, tile.end - tile.start);
    Ok(shape::to_usize(bytes.start - base)?..shape::to_usize(bytes.end - base)?)
}

/// A buffer for the statistics of `slab`.
fn measured<'b>(span: Span, slab: &Range<u64>, buffer: &'b mut Vec<u8>) -> Result<&'b mut [u8]> {
    let bytes = span.range(slab.start, slab.end - slab.start);
    resize(buffer, bytes.end - bytes.start)
}

/// Bytes of `slab` in a buffer that begins where the component does.
pub fn span_bytes(span: Span, slab: &Range<u64>) -> Result<Range<usize>> {
    let bytes = span.range(slab.start, slab.end - slab.start);
    Ok(shape::to_usize(bytes.start)?..shape::to_usize(bytes.end)?)
}

fn outside(range: &Range<usize>) -> Error {
    Error::config(format!(
        "component buffer does not cover bytes {}..{}",
        range.start, range.end
    ))
}

/// The bytes of `tile` in each sliced component.
pub fn parts<'b>(
    layout: &Layout,
    buffers: [&'b [u8]; MAX_PARTS],
    slab: &Range<u64>,
    tile: &Range<u64>,
) -> Result<Parts<'b>> {
    let mut parts: Parts<'b> = [&[]; MAX_PARTS];
    for ((part, buffer), (_, component)) in parts.iter_mut().zip(buffers).zip(layout.sliced()) {
        let range = within(component.span, slab, tile)?;
        *part = buffer.get(range.clone()).ok_or_else(|| outside(&range))?;
    }
    Ok(parts)
}

fn parts_mut<'b>(
    layout: &Layout,
    buffers: &'b mut PartsMut<'_>,
    slab: &Range<u64>,
    tile: &Range<u64>,
) -> Result<PartsMut<'b>> {
    let mut parts: PartsMut<'b> = [&mut [], &mut [], &mut [], &mut []];
    for ((part, buffer), (_, component)) in parts
        .iter_mut()
        .zip(buffers.iter_mut())
        .zip(layout.sliced())
    {
        let range = within(component.span, slab, tile)?;
        *part = buffer
            .get_mut(range.clone())
            .ok_or_else(|| outside(&range))?;
    }
    Ok(parts)
}

/// Borrows a set of buffers as slices.
pub fn as_slices(buffers: &[Vec<u8>; MAX_PARTS]) -> [&[u8]; MAX_PARTS] {
    let [a, b, c, d] = buffers;
    [a, b, c, d]
}

/// Buffers for the bytes of `slab` in each sliced component.
pub fn output<'b>(
    layout: &Layout,
    buffers: &'b mut [Vec<u8>; MAX_PARTS],
    slab: &Range<u64>,
) -> Result<PartsMut<'b>> {
    let mut output = PartsMut::default();
    for ((place, buffer), (_, component)) in output.iter_mut().zip(buffers).zip(layout.sliced()) {
        let bytes = component.span.range(slab.start, slab.end - slab.start);
        *place = resize(buffer, bytes.end - bytes.start)?;
    }
    Ok(output)
}

/// The tiles of `slab`.
pub fn tiles(slab: &Range<u64>, tile: u64) -> impl Iterator<Item = Range<u64>> {
    let end = slab.end;
    (slab.start..end)
        .step_by(usize::try_from(tile.max(1)).unwrap_or(usize::MAX))
        .map(move |first| first..first.saturating_add(tile).min(end))
}

impl Task<'_> {
    /// How the bytes of the one become those of the other without being decoded, where nothing is done to
    /// the weights.
    fn recoding(&self) -> Option<Recode> {
        let factors = &self.source.layout.params.column_factors;
        if self.add.is_some() || self.through.is_some() || factors.is_some() {
            return None;
        }
        let (from, to) = (self.source.format.info(), self.target.format.info());
        formats::recoding(from.name, to.name)
    }

    /// The weights of a tile, if they can be encoded as they are stored.
    fn stored<'b>(&self, parts: &Parts<'b>) -> Option<Weights<'b>> {
        let dtype = self.source.format.plain()?;
        let is_changed = self.add.is_some()
            || self.source.layout.params.column_factors.is_some()
            || self.through.is_some_and(|through| through != dtype);
        if is_changed || !self.target.format.takes_stored() {
            return None;
        }
        Weights::stored(dtype, parts[0])
    }

    /// The weights of one tile of `input`, decoded if they have to be. The first pass over them refuses those
    /// that are not finite.
    fn tile_weights<'s>(
        &self,
        pass: Pass,
        input: [&'s [u8]; MAX_PARTS],
        scratch: &'s mut TileScratch,
        slab: &Range<u64>,
        tile: &Range<u64>,
    ) -> Result<Weights<'s>> {
        let parts = parts(self.source.layout, input, slab, tile)?;
        let weights = match self.stored(&parts) {
            Some(weights) => weights,
            None => Weights::F32(self.decode_tile(&parts, scratch, tile)?),
        };
        let is_looked_for = !self.target.format.finds_nonfinite() || self.recoding().is_some();
        if pass == Pass::First && is_looked_for {
            self.refuse_nonfinite(tile.start, weights)?;
        }
        Ok(weights)
    }

    fn refuse_nonfinite(&self, first: u64, weights: Weights<'_>) -> Result<()> {
        let Packed { format, layout } = self.target;
        refuse_nonfinite(format, layout, first, weights, self.keep_nonfinite)
    }

    fn decode_tile<'s>(
        &self,
        parts: &Parts<'_>,
        scratch: &'s mut TileScratch,
        tile: &Range<u64>,
    ) -> Result<&'s [f32]> {
        let x = resize_weights(&mut scratch.weights, tile.end - tile.start)?;
        let once_more = match self.through {
            Some(dtype) => dtype != Dtype::F32,
            None => self.target.format.rounds_to_16_bits(),
        };
        // A 64-bit weight is rounded to odd where it is rounded to 16 bits next.
        let to_odd = once_more && self.add.is_none();
        self.source.decode(tile.start, parts, x, to_odd)?;
        if let Some(add) = self.add {
            x.iter_mut().for_each(|weight| *weight += add);
        }
        if let Some(dtype) = self.through {
            let bytes = dtype.byte_len(&[x.len() as u64])?;
            let rounded = resize(&mut scratch.rounded, bytes)?;
            float::narrow(dtype, x, rounded)?;
            float::widen(dtype, rounded, x, false)?;
        }
        Ok(x)
    }

    /// First pass over a slab whose bytes are in `scratch.input`: fills `scratch.statistics`.
    pub fn measure(
        &self,
        slab: &Range<u64>,
        scratch: &mut Scratch,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let Some(span) = self.target.layout.statistics else {
            return Ok(());
        };
        let measured = measured(span, slab, &mut scratch.statistics)?;
        let Packed { format, layout } = self.target;
        for tile in tiles(slab, self.cut.tile) {
            stop()?;
            let input = as_slices(&scratch.input);
            let x = self.tile_weights(Pass::First, input, &mut scratch.tile, slab, &tile)?;
            let place = part_of(measured, span, slab, &tile)?;
            let done = format.measure(layout, tile.start, x, place);
            self.or_not_finite(done, tile.start, x)?;
        }
        Ok(())
    }

    /// Encodes the slab whose bytes are in `scratch.input` into `output`, the slab's bytes of each
    /// sliced component. Formats that measure at once fill `scratch.statistics`.
    pub fn encode(
        &self,
        slab: &Range<u64>,
        statistics: &[u8],
        scratch: &mut Scratch,
        output: &mut PartsMut<'_>,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<ErrorSums> {
        let mut sums = ErrorSums::default();
        let Packed { format, layout } = self.target;
        let pass = Pass::that_encodes(format, layout);
        let at_once = layout.statistics.filter(|_| pass == Pass::First);
        let measured = match at_once {
            Some(span) => measured(span, slab, &mut scratch.statistics)?,
            None => &mut [],
        };
        for tile in tiles(slab, self.cut.tile) {
            stop()?;
            let input = as_slices(&scratch.input);
            let x = self.tile_weights(pass, input, &mut scratch.tile, slab, &tile)?;
            let mut out = parts_mut(layout, output, slab, &tile)?;
            let mut of_tile: &[u8] = statistics;
            let done = match (self.recoding(), at_once) {
                (Some(recode), _) => {
                    recode(&parts(self.source.layout, input, slab, &tile)?, &mut out);
                    Ok(())
                }
                (None, Some(span)) => {
                    let place = part_of(measured, span, slab, &tile)?;
                    let done = format.encode_at_once(layout, tile.start, x, place, &mut out);
                    of_tile = place;
                    done
                }
                (None, None) => format.encode(layout, tile.start, x, statistics, &mut out),
            };
            self.or_not_finite(done, tile.start, x)?;
            if self.verify {
                let y = resize_weights(&mut scratch.decoded, tile.end - tile.start)?;
                let encoded = output.each_ref().map(|part| &**part);
                let packed = parts(layout, encoded, slab, &tile)?;
                format.decode_encoded(layout, tile.start, &packed, of_tile, y)?;
                let wide = resize_weights(&mut scratch.wide, tile.end - tile.start)?;
                sums.merge(&formats::error_sums(x.widened(kernels::level(), wide), y));
            }
        }
        Ok(sums)
    }

    /// An error that may come of weights that are not finite names them, if there are any.
    fn or_not_finite(&self, done: Result<()>, first: u64, weights: Weights<'_>) -> Result<()> {
        if done.is_err() {
            self.refuse_nonfinite(first, weights)?;
        }
        done
    }
}

/// The bytes of a tile in the statistics of its slab.
fn part_of<'m>(
    measured: &'m mut [u8],
    span: Span,
    slab: &Range<u64>,
    tile: &Range<u64>,
) -> Result<&'m mut [u8]> {
    let range = within(span, slab, tile)?;
    measured
        .get_mut(range.clone())
        .ok_or_else(|| outside(&range))
}

/// Which time it is that somebody looks at weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    First,
    Second,
}

impl Pass {
    /// The pass that encodes.
    pub fn that_encodes(format: &dyn Format, layout: &Layout) -> Self {
        match layout.statistics {
            Some(_) if !format.measures_at_once() => Pass::Second,
            _ => Pass::First,
        }
    }
}

/// Refuses weights that are not finite, unless `format` stores them as they are, or has a way to and
/// the caller asks for it with `keep`. `first` is the index of the first weight in the order of tiles.
pub fn refuse_nonfinite(
    format: &dyn Format,
    layout: &Layout,
    first: u64,
    weights: Weights<'_>,
    keep: bool,
) -> Result<()> {
    match format.nonfinite() {
        NonFinite::Stored => return Ok(()),
        NonFinite::OnRequest if keep => return Ok(()),
        NonFinite::OnRequest | NonFinite::Refused => {}
    }
    let Some(index) = formats::first_nonfinite(weights) else {
        return Ok(());
    };
    let value = weights.get(index);
    let index = first + index as u64;
    let refusal = Error::format(format!(
        "{}: weight {} is {value}, which cannot be quantized",
        format.info().name,
        format.fold(layout).map_or(index, |fold| fold.weight(index))
    ));
    Err(refusal.hint("keep the tensor in source precision (--keep), or pass it through where the format can (--on-nonfinite keep)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_keep_to_whole_units_or_the_whole_tensor() {
        let cut = Cut::new(&[32, 64], 1 << 20, 100_000);
        assert_eq!((cut.tile % 64, cut.slab % cut.tile), (0, 0));
        let rows = Cut::new(&[1, 4304], 4304 * 10, 1 << 20);
        assert_eq!(rows.tile % 4304, 0);
        assert_eq!(rows.slab, 4304 * 10);
        let odd = Cut::new(&[u64::MAX - 1, u64::MAX - 2], 77, 16);
        assert_eq!((odd.tile, odd.slab), (77, 77));
        assert_eq!(Cut::new(&[64], 0, 16).slabs(0), 0);
    }

    #[test]
    fn slabs_and_tiles_cover_every_weight_once() {
        let cut = Cut::new(&[64], 1_000_003, 300_000);
        let mut next = 0;
        for index in 0..cut.slabs(1_000_003) {
            for tile in tiles(&cut.slab_range(index, 1_000_003), cut.tile) {
                assert_eq!(tile.start, next);
                next = tile.end;
            }
        }
        assert_eq!(next, 1_000_003);
    }
}
