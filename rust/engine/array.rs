//! Whole arrays in memory: encoded into, and decoded from, buffers of the caller.
//!
//! The array is cut at multiples of the format's unit into one run per thread; a thread goes over
//! its run tile by tile, with one `f32` tile as scratch. The bytes depend neither on the number of
//! threads nor on the size of a tile.

use std::ops::Range;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float;
use crate::formats::quanto_groups::MAX_LANES;
use crate::formats::{self, Fold, Format, Layout, Span, Weights, MAX_PARTS};
use crate::shape;

use super::exchanged::{self, Exchanged};
use super::slab::{refuse_nonfinite, resize, Pass, TILE_WEIGHTS};

/// Fewer weights than this are not worth a thread of their own.
const LEAST_WEIGHTS_PER_THREAD: u64 = 256 * 1024;

/// How an array is encoded or decoded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Threads at most; `None` takes one per processor.
    pub threads: Option<usize>,
    /// Encode weights that are not finite, where the format defines how.
    pub keep_nonfinite: bool,
}

/// Encodes `data`, weights of type `dtype` in memory order, into one buffer per component of
/// `layout`, and gives the final length of each. A buffer is as long as the layout says; of a
/// component whose length is only known at the end, the first bytes are used.
///
/// Tensor-wide parameters are recorded in `layout`.
pub fn encode_array(
    format: &dyn Format,
    layout: &mut Layout,
    dtype: Dtype,
    data: &[u8],
    components: &mut [&mut [u8]],
    options: Options,
) -> Result<Vec<u64>> {
    format.check_encodes(&layout.params)?;
    check_length("array", dtype.byte_len(&layout.shape)?, data.len())?;
    check_components(layout, components.iter().map(|bytes| bytes.len()))?;
    let given = layout;
    let layout = &mut format.encoding(given)?;
    let source = Source {
        format,
        dtype,
        weight_bytes: dtype.alignment(),
        data,
        keep_nonfinite: options.keep_nonfinite,
    };
    let runs = cut(layout, options.threads);
    let mut statistics = Vec::new();
    if let Some(span) = layout.statistics {
        let bytes = span.range(0, layout.weights).end;
        statistics = vec![0; shape::to_usize(bytes)?];
    }
    match Pass::that_encodes(format, layout) {
        Pass::First => {
            source.encode_at_once(layout, &runs, &mut statistics, components)?;
            format.settle(layout, &mut statistics)?;
        }
        Pass::Second => {
            source.measure(layout, &runs, &mut statistics)?;
            format.settle(layout, &mut statistics)?;
            source.encode_measured(layout, &runs, &statistics, components)?;
        }
    }

    let mut lengths: Vec<u64> = components.iter().map(|bytes| bytes.len() as u64).collect();
    for (index, bytes) in format.whole(layout, &statistics)? {
        match components
            .get_mut(index)
            .and_then(|to| to.get_mut(..bytes.len()))
        {
            Some(to) => to.copy_from_slice(&bytes),
            None => return Err(Error::Internal(format!("component {index} is too short"))),
        }
        lengths[index] = bytes.len() as u64;
    }
    given.params.clone_from(&layout.params);
    Ok(lengths)
}

/// Decodes one buffer per component of `layout` into `out`, rounding each weight once to `dtype`.
/// Components that are not cut into tiles may be empty; a code table that is there must be the
/// format's own.
pub fn decode_array(
    format: &dyn Format,
    layout: &Layout,
    components: &[&[u8]],
    dtype: Dtype,
    out: &mut [u8],
    options: Options,
) -> Result<()> {
    if !dtype.is_float() {
        return Err(Error::config(format!("cannot decode to {dtype}")));
    }
    check_length("output", dtype.byte_len(&layout.shape)?, out.len())?;
    if components.len() != layout.components.len() {
        return Err(Error::config(format!(
            "expected {} components, got {}",
            layout.components.len(),
            components.len()
        )));
    }
    for (index, component) in layout.sliced() {
        let name = format!("component \"{}\"", component.suffix);
        check_length(
            &name,
            layout.component_bytes(index)?,
            components[index].len(),
        )?;
    }
    for (index, expected) in format.whole(layout, &[])? {
        let component = &layout.components[index];
        let given = components[index];
        if component.is_constant() && !given.is_empty() && given != expected {
            return Err(Error::unsupported(format!(
                "component \"{}\" differs from the table of {}",
                component.suffix,
                format.info().name
            )));
        }
    }
    let layout = &with_tensor_scale(format, layout, components)?;
    let exchanged = Exchanged::new(format, layout, components)?;
    let weight_bytes = dtype.alignment();
    let mut rest = out;
    let mut work = Vec::new();
    for run in cut(layout, options.threads) {
        let bytes = run.start * weight_bytes..run.end * weight_bytes;
        work.push((run, take(&mut rest, bytes)?));
    }
    in_threads(work, |(run, mut rest)| {
        let (mut scratch, mut ordered) = (Vec::new(), exchanged::Piece::default());
        let most = exchanged.piece_weights(layout.weights, layout.unit_weights);
        for piece in pieces(run, most, layout.unit_weights) {
            exchanged.read(piece.clone(), &mut ordered)?;
            for tile in output_tiles(layout, piece, dtype) {
                let mut parts: formats::Parts<'_> = Default::default();
                for (place, (part, sliced)) in parts.iter_mut().zip(layout.sliced()).enumerate() {
                    *part = match exchanged.part(&ordered, place, &tile) {
                        Some(part) => part?,
                        None => part_of(sliced.1.span, &tile, components[sliced.0])?,
                    };
                }
                let bytes = tile.start * weight_bytes..tile.end * weight_bytes;
                let target = take(&mut rest, bytes)?;
                decode_tile(format, layout, &tile, &parts, dtype, target, &mut scratch)?;
            }
        }
        Ok(())
    })
}

/// The bytes of `tile` in an array.
fn part_of<'a>(span: Span, tile: &Range<u64>, array: &'a [u8]) -> Result<&'a [u8]> {
    let mut range = span.range(tile.start, tile.end - tile.start);
    if let Some((period, _)) = span.turn() {
        let before = range.start / period * period;
        range = range.start - before..range.end - before;
    }
    get(array, range)
}

/// The layout with the scale of the whole tensor, where the format has one.
fn with_tensor_scale(format: &dyn Format, layout: &Layout, components: &[&[u8]]) -> Result<Layout> {
    let mut layout = layout.clone();
    if let Some(index) = format.tensor_scale() {
        let bytes = components.get(index).copied().unwrap_or_default();
        check_length("scale of the tensor", 4, bytes.len())?;
        layout.params.tensor_scale = bytes.try_into().map_or(1.0, f32::from_le_bytes);
    }
    Ok(layout)
}

/// Decodes one tile into `target`, as weights of type `dtype`: straight into its place where that
/// holds `f32`, by way of `scratch` elsewhere.
fn decode_tile(
    format: &dyn Format,
    layout: &Layout,
    tile: &Range<u64>,
    parts: &formats::Parts<'_>,
    dtype: Dtype,
    target: &mut [u8],
    scratch: &mut Vec<f32>,
) -> Result<()> {
    if dtype == Dtype::F32 && cfg!(target_endian = "little") {
        if let Ok(weights) = bytemuck::try_cast_slice_mut(target) {
            return format.decode(layout, tile.start, parts, weights);
        }
    }
    let weights = scratch_of(scratch, tile)?;
    if matches!(dtype, Dtype::F16 | Dtype::BF16) {
        format.decode_to_odd(layout, tile.start, parts, weights)?;
    } else {
        format.decode(layout, tile.start, parts, weights)?;
    }
    float::narrow(dtype, weights, target)
}

/// As [`decode_array`], for rows of `columns` weights that lie anywhere: `data` holds the blocks of
/// each row, `out` its weights.
pub fn decode_rows(
    format: &dyn Format,
    columns: u64,
    data: Vec<&[u8]>,
    dtype: Dtype,
    out: Vec<&mut [u8]>,
    threads: Option<usize>,
) -> Result<()> {
    if !dtype.is_float() {
        return Err(Error::config(format!("cannot decode to {dtype}")));
    }
    let layout = format.layout(&[columns], &formats::Params::default())?;
    let [component] = layout.components.as_slice() else {
        return Err(Error::unsupported(format!(
            "{}: is stored as several arrays, not as rows",
            format.info().name
        )));
    };
    if data.len() != out.len() {
        return Err(Error::format(format!(
            "{} rows of blocks for {} rows of weights",
            data.len(),
            out.len()
        )));
    }
    let (row_bytes, out_bytes) = (layout.component_bytes(0)?, dtype.byte_len(&[columns])?);
    let mut rows: Vec<(&[u8], &mut [u8])> = data.into_iter().zip(out).collect();
    for (packed, weights) in &rows {
        check_length("row of blocks", row_bytes, packed.len())?;
        check_length("row of weights", out_bytes, weights.len())?;
    }
    let weight_bytes = dtype.alignment();
    let all = shape::multiply(columns, rows.len() as u64, "number of weights")?;
    let each = rows
        .len()
        .div_ceil(shape::to_usize(worthwhile(all, threads))?)
        .max(1);
    in_threads(rows.chunks_mut(each).collect(), |rows| {
        let mut scratch = Vec::new();
        for (packed, weights) in rows {
            for tile in output_tiles(&layout, 0..columns, dtype) {
                let mut parts: formats::Parts<'_> = Default::default();
                let range = component.span.range(tile.start, tile.end - tile.start);
                parts[0] = get(packed, range)?;
                let (start, end) = (tile.start * weight_bytes, tile.end * weight_bytes);
                let place = shape::to_usize(start)?..shape::to_usize(end)?;
                match weights.get_mut(place) {
                    Some(target) => {
                        decode_tile(format, &layout, &tile, &parts, dtype, target, &mut scratch)?;
                    }
                    None => return Err(Error::Internal(String::from("a row is too short"))),
                }
            }
        }
        Ok(())
    })
}

/// The weights to encode.
struct Source<'a> {
    format: &'a dyn Format,
    dtype: Dtype,
    weight_bytes: u64,
    data: &'a [u8],
    keep_nonfinite: bool,
}

impl Source<'_> {
    /// The first pass of two: puts the statistics of all tiles to their place.
    fn measure(&self, layout: &Layout, runs: &[Range<u64>], statistics: &mut [u8]) -> Result<()> {
        let work = statistics_of(layout, runs, statistics)?;
        in_threads(runs.iter().zip(work).collect(), |(run, mut rest)| {
            self.for_each_tile(Pass::First, layout, run.clone(), |first, weights| {
                let place = self.statistics(layout, first, weights.len() as u64, &mut rest)?;
                let measured = self.format.measure(layout, first, weights, place);
                self.or_not_finite(measured, layout, first, weights)
            })
        })
    }

    /// The second pass of two.
    fn encode_measured(
        &self,
        layout: &Layout,
        runs: &[Range<u64>],
        statistics: &[u8],
        components: &mut [&mut [u8]],
    ) -> Result<()> {
        let work = components_of(layout, runs, components)?;
        in_threads(runs.iter().zip(work).collect(), |(run, mut rest)| {
            self.for_each_tile(Pass::Second, layout, run.clone(), |first, weights| {
                let mut parts = take_tile(layout, first, weights.len() as u64, &mut rest)?;
                let encoded = self
                    .format
                    .encode(layout, first, weights, statistics, &mut parts);
                self.or_not_finite(encoded, layout, first, weights)
            })
        })
    }

    /// The only pass of formats that have one.
    fn encode_at_once(
        &self,
        layout: &Layout,
        runs: &[Range<u64>],
        statistics: &mut [u8],
        components: &mut [&mut [u8]],
    ) -> Result<()> {
        let work = components_of(layout, runs, components)?
            .into_iter()
            .zip(statistics_of(layout, runs, statistics)?);
        in_threads(
            runs.iter().zip(work).collect(),
            |(run, (mut rest, mut measured))| {
                if let Some(fold) = self.format.fold(layout) {
                    return self.encode_folded(layout, fold, run, &mut rest, &mut measured);
                }
                self.for_each_tile(Pass::First, layout, run.clone(), |first, weights| {
                    let count = weights.len() as u64;
                    let place = self.statistics(layout, first, count, &mut measured)?;
                    let mut parts = take_tile(layout, first, count, &mut rest)?;
                    self.encode_tile(layout, first, weights, place, &mut parts)
                })
            },
        )
    }

    /// As [`Source::encode_at_once`], of rows that share bytes: as they lie in memory if the format takes them so,
    /// gathered if not.
    fn encode_folded(
        &self,
        layout: &Layout,
        fold: Fold,
        run: &Range<u64>,
        rest: &mut [&mut [u8]],
        measured: &mut &mut [u8],
    ) -> Result<()> {
        let (mut gathered, mut wide) = (Vec::new(), Vec::new());
        for tile in tiles(layout, run.clone()) {
            let count = tile.end - tile.start;
            let place = self.statistics(layout, tile.start, count, measured)?;
            let mut parts = take_tile(layout, tile.start, count, rest)?;
            if let Some(lanes) = self.lanes(fold, &tile)? {
                let done = self.format.encode_lanes(layout, lanes, place, &mut parts);
                if let Some(Ok(())) = done {
                    continue;
                }
            }
            let data = self.gather(fold, &tile, &mut gathered)?;
            let weights = self.weights(data, &tile, &mut wide)?;
            self.encode_tile(layout, tile.start, weights, place, &mut parts)?;
        }
        Ok(())
    }

    /// The rows of each part in a tile, if their type need not be changed.
    fn lanes(&self, fold: Fold, tile: &Range<u64>) -> Result<Option<[Weights<'_>; MAX_LANES]>> {
        let mut lanes = [Weights::F32(&[]); MAX_LANES];
        let (row_weights, parts) = (fold.row_weights(), fold.parts());
        let bytes = (tile.end - tile.start) / parts * self.weight_bytes;
        let firsts = fold.rows_from(tile.start / row_weights);
        if parts > MAX_LANES as u64
            || self.dtype != Dtype::F32 && !matches!(self.dtype, Dtype::F16 | Dtype::BF16)
        {
            return Ok(None);
        }
        for (lane, row) in lanes.iter_mut().zip(firsts.take(shape::to_usize(parts)?)) {
            let start = row * row_weights * self.weight_bytes;
            let data = get(self.data, start..start + bytes)?;
            *lane = match Weights::stored(self.dtype, data) {
                Some(weights) => weights,
                None => match bytemuck::try_cast_slice(data) {
                    Ok(weights) if cfg!(target_endian = "little") => Weights::F32(weights),
                    _ => return Ok(None),
                },
            };
        }
        Ok(Some(lanes))
    }

    fn encode_tile(
        &self,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
        place: &mut [u8],
        parts: &mut formats::PartsMut<'_>,
    ) -> Result<()> {
        let encoded = match layout.statistics {
            Some(_) => self
                .format
                .encode_at_once(layout, first, weights, place, parts),
            None => self.format.encode(layout, first, weights, &[], parts),
        };
        self.or_not_finite(encoded, layout, first, weights)
    }

    /// The place of the statistics of a tile, taken off the front of `rest`.
    fn statistics<'m>(
        &self,
        layout: &Layout,
        first: u64,
        count: u64,
        rest: &mut &'m mut [u8],
    ) -> Result<&'m mut [u8]> {
        match layout.statistics {
            Some(span) => take(rest, span.range(first, count)),
            None => Ok(&mut []),
        }
    }

    /// An error that may come of weights that are not finite names them, if there are any.
    fn or_not_finite(
        &self,
        done: Result<()>,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
    ) -> Result<()> {
        if done.is_err() {
            self.refuse_nonfinite(layout, first, weights)?;
        }
        done
    }

    /// Gives tile after tile of `run` to `work`, widened if it has to be, with the index of its first weight.
    /// The first pass refuses weights that are not finite.
    fn for_each_tile(
        &self,
        pass: Pass,
        layout: &Layout,
        run: Range<u64>,
        mut work: impl FnMut(u64, Weights<'_>) -> Result<()>,
    ) -> Result<()> {
        let (mut gathered, mut wide) = (Vec::new(), Vec::new());
        let fold = self.format.fold(layout);
        for tile in tiles(layout, run) {
            let range = tile.start * self.weight_bytes..tile.end * self.weight_bytes;
            let data = match fold {
                Some(fold) => self.gather(fold, &tile, &mut gathered)?,
                None => get(self.data, range)?,
            };
            let weights = self.weights(data, &tile, &mut wide)?;
            if pass == Pass::First && !self.format.finds_nonfinite() {
                self.refuse_nonfinite(layout, tile.start, weights)?;
            }
            work(tile.start, weights)?;
        }
        Ok(())
    }

    fn refuse_nonfinite(&self, layout: &Layout, first: u64, weights: Weights<'_>) -> Result<()> {
        refuse_nonfinite(self.format, layout, first, weights, self.keep_nonfinite)
    }

    /// The weights whose bytes are `data`.
    fn weights<'b>(
        &self,
        data: &'b [u8],
        tile: &Range<u64>,
        wide: &'b mut Vec<f32>,
    ) -> Result<Weights<'b>> {
        if let Some(weights) = Weights::stored(self.dtype, data) {
            if self.format.takes_stored() {
                return Ok(weights);
            }
        }
        match bytemuck::try_cast_slice(data) {
            Ok(weights) if self.dtype == Dtype::F32 && cfg!(target_endian = "little") => {
                Ok(Weights::F32(weights))
            }
            _ => {
                let weights = scratch_of(wide, tile)?;
                float::widen(self.dtype, data, weights, self.format.rounds_to_16_bits())?;
                Ok(Weights::F32(weights))
            }
        }
    }

    /// The bytes of the rows of a tile, which lie apart, one after the other.
    fn gather<'b>(
        &self,
        fold: Fold,
        tile: &Range<u64>,
        gathered: &'b mut Vec<u8>,
    ) -> Result<&'b [u8]> {
        let row_bytes = fold.row_weights() * self.weight_bytes;
        let bytes = resize(gathered, (tile.end - tile.start) * self.weight_bytes)?;
        let places = bytes.chunks_exact_mut(shape::to_usize(row_bytes)?);
        for (row, place) in fold.rows_from(tile.start / fold.row_weights()).zip(places) {
            place.copy_from_slice(get(self.data, row * row_bytes..(row + 1) * row_bytes)?);
        }
        Ok(bytes)
    }
}

/// One run of whole units per thread, in order, none of them empty.
fn cut(layout: &Layout, threads: Option<usize>) -> Vec<Range<u64>> {
    let threads = worthwhile(layout.weights, threads);
    pieces(
        0..layout.weights,
        layout.weights.div_ceil(threads),
        layout.unit_weights,
    )
    .collect()
}

/// As many of `threads` as `weights` weights keep busy.
fn worthwhile(weights: u64, threads: Option<usize>) -> u64 {
    let processors = || std::thread::available_parallelism().map_or(1, |count| count.get());
    let threads = threads.unwrap_or_else(processors).max(1) as u64;
    threads.min(weights / LEAST_WEIGHTS_PER_THREAD).max(1)
}

/// The tiles of `run`.
fn tiles(layout: &Layout, run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    pieces(run, TILE_WEIGHTS, layout.unit_weights)
}

/// The tiles of `run` when it is decoded to `dtype`. What is rounded on the way to its place goes in
/// tiles whose result the store buffer holds, so that it drains while the next one is decoded.
fn output_tiles(
    layout: &Layout,
    run: Range<u64>,
    dtype: Dtype,
) -> impl Iterator<Item = Range<u64>> {
    let weights = match dtype {
        Dtype::F32 => TILE_WEIGHTS,
        _ => TILE_WEIGHTS / 4,
    };
    // No tile goes on from the end of a repeated array to its start.
    let turns = layout.components.iter().filter_map(|part| part.span.turn());
    let turn = turns.map(|(_, weights)| weights).min();
    pieces(run, weights, layout.unit_weights).flat_map(move |tile| {
        let mut start = tile.start;
        std::iter::from_fn(move || {
            let end = turn.map_or(tile.end, |turn| (start / turn + 1).saturating_mul(turn));
            let piece = start..end.min(tile.end);
            start = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    })
}

/// `whole` in pieces of `weights`, rounded up to a multiple of `unit`.
fn pieces(whole: Range<u64>, weights: u64, unit: u64) -> impl Iterator<Item = Range<u64>> {
    let unit = unit.max(1);
    let weights = weights.div_ceil(unit).max(1).saturating_mul(unit);
    let mut start = whole.start;
    std::iter::from_fn(move || {
        let piece = start..start.saturating_add(weights).min(whole.end);
        start = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Runs `work` on every item, each in its own thread; the first failure in order wins.
fn in_threads<T: Send>(items: Vec<T>, work: impl Fn(T) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    let mut items = items.into_iter();
    let Some(first) = items.next() else {
        return Ok(());
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = items.map(|item| scope.spawn(move || work(item))).collect();
        let mut result = work(first);
        for other in others {
            let other = other
                .join()
                .unwrap_or_else(|_| Err(Error::Internal("a worker thread panicked".into())));
            result = result.and(other);
        }
        result
    })
}

/// The first bytes of `scratch` for a tile, grown if need be.
fn scratch_of<'a>(scratch: &'a mut Vec<f32>, tile: &Range<u64>) -> Result<&'a mut [f32]> {
    let count = shape::to_usize(tile.end - tile.start)?;
    if scratch.len() < count {
        scratch.resize(count, 0.0);
    }
    Ok(&mut scratch[..count])
}

/// Takes the bytes of the weights `run` off the front of each sliced component.
fn take_parts<'a>(
    layout: &Layout,
    rest: &mut [&'a mut [u8]],
    run: &Range<u64>,
) -> Result<Vec<&'a mut [u8]>> {
    layout
        .sliced()
        .zip(rest)
        .take(MAX_PARTS)
        .map(|((_, component), rest)| {
            take(rest, component.span.range(run.start, run.end - run.start))
        })
        .collect()
}

/// The bytes of a tile, taken off the front of the sliced components.
fn take_tile<'a>(
    layout: &Layout,
    first: u64,
    count: u64,
    rest: &mut [&'a mut [u8]],
) -> Result<formats::PartsMut<'a>> {
    let mut parts = formats::PartsMut::default();
    for ((part, rest), (_, component)) in parts.iter_mut().zip(rest).zip(layout.sliced()) {
        *part = take(rest, component.span.range(first, count))?;
    }
    Ok(parts)
}

/// The bytes of each run in the statistics.
fn statistics_of<'a>(
    layout: &Layout,
    runs: &[Range<u64>],
    mut rest: &'a mut [u8],
) -> Result<Vec<&'a mut [u8]>> {
    let of_run = |run: &Range<u64>| match layout.statistics {
        Some(span) => take(&mut rest, span.range(run.start, run.end - run.start)),
        None => Ok(&mut [][..]),
    };
    runs.iter().map(of_run).collect()
}

/// The bytes of each run in each sliced component.
fn components_of<'a>(
    layout: &Layout,
    runs: &[Range<u64>],
    components: &'a mut [&mut [u8]],
) -> Result<Vec<Vec<&'a mut [u8]>>> {
    let mut rest: Vec<&mut [u8]> = layout
        .components
        .iter()
        .zip(components.iter_mut())
        .filter(|(component, _)| component.span.is_sliced())
        .map(|(_, bytes)| &mut **bytes)
        .collect();
    runs.iter()
        .map(|run| take_parts(layout, &mut rest, run))
        .collect()
}

/// Takes as many bytes as `range` has off the front of `rest`.
fn take<'a>(rest: &mut &'a mut [u8], range: Range<u64>) -> Result<&'a mut [u8]> {
    let bytes = shape::to_usize(range.end - range.start)?;
    rest.split_off_mut(..bytes)
        .ok_or_else(|| Error::Internal(format!("{bytes} bytes run over the end of a component")))
}

fn get(bytes: &[u8], range: Range<u64>) -> Result<&[u8]> {
    let range = shape::to_usize(range.start)?..shape::to_usize(range.end)?;
    bytes
        .get(range.clone())
        .ok_or_else(|| Error::Internal(format!("bytes {range:?} run over the end of an array")))
}

fn check_components(layout: &Layout, lengths: impl ExactSizeIterator<Item = usize>) -> Result<()> {
    if lengths.len() != layout.components.len() {
        return Err(Error::config(format!(
            "expected {} components, got {}",
            layout.components.len(),
            lengths.len()
        )));
    }
    for (index, length) in lengths.enumerate() {
        let name = format!("component \"{}\"", layout.components[index].suffix);
        check_length(&name, layout.component_bytes(index)?, length)?;
    }
    Ok(())
}

fn check_length(what: &str, expected: u64, got: usize) -> Result<()> {
    if expected == got as u64 {
        return Ok(());
    }
    Err(Error::format(format!(
        "{what}: expected {expected} bytes, got {got}"
    )))
}
