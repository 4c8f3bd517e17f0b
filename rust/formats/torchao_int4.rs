//! torchao's packed 4-bit weights: whole numbers of four bits, two in a byte, with a scale and a float zero
//! point for every group of a row.
//!
//! A weight of shape \[N, K\] called `m.weight`, of type T (F32, F16 or BF16), in groups of g weights of a row;
//! g is 128, or what `block_size` says, even, and divides K:
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `m._weight_qdata` | I8 \[N, K/2\] | q of column 2j in bits 0-3 and of column 2j + 1 in bits 4-7 of byte j, two's complement |
//! | `m._weight_scale` | T \[K/g, N\] | s |
//! | `m._weight_zero_point` | T \[K/g, N\] | z, the weight that code 0 stands for |
//!
//! Encoding, per group, in `f32`: r = max(max − min, 10⁻⁶), s = r/15, z = min + 8s; q = (w − min)/s to the nearest
//! whole number with ties to even, limited to 0 … 15, less 8. Codes are those of s as it is in `f32`; s and z
//! are rounded to T when they are stored.
//!
//! Decoding: q·s + z, the product and the sum rounded to `f32`. torchao has no decoder of such a weight by
//! itself; this is what the kernels say that multiply with it (`mslk/gemm/triton/int4_gemm.py` in
//! meta-pytorch/MSLK; CUTLASS' mixed input, which computes it in BF16).
//!
//! Special cases:
//! - Groups of zeros: z is eight times the stored s, so that they decode to zeros. In F16 the peer rounds
//!   both, and they decode to 2⁻²⁴.
//! - Groups of one other number, and those whose numbers differ by less than 10⁻⁶: s is 10⁻⁶/15.
//! - A group whose range `f32` does not hold is refused: its scale would be infinite. So are weights that are
//!   not finite.
//! - F64 and packed sources are encoded as F32 is, unless the parameter `dtype` says F16 or BF16. The kernels
//!   take scales of BF16 and F32, and none of F16.
//! - Odd sizes of groups are refused; torchao's config has 32, 64, 128 and 256.
//!
//! Scales of neighbours in a row lie apart, those of neighbours in a column together. So encoding collects
//! s and z of all groups, 2 numbers of T for each, and they are written with rows and columns exchanged once all
//! codes are. Arrays that are decoded are read exchanged back.
//!
//! Peer: torchao 0.18.0 (`Int4WeightOnlyConfig`, packing format PLAIN) on CPU, with the functions that it takes
//! from MSLK, which are those of fbgemm-gpu-genai 1.9.0 too.

use super::rows8::{self, Divisor, TO_WHOLE};
use super::scaled::read_scale;
use super::stored::{for_computed, for_stored, Stored};
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::{self, Level};
use crate::shape;

/// The format; it holds nothing.
pub struct Int4;

pub static INT4: Int4 = Int4;

static INFO: Info = Info {
    name: "torchao:int4",
    short: None,
    container: "safetensors",
    exactness: Exactness::Exact,
    peer: "torchao 0.18.0",
    reader: "torchao, transformers, diffusers",
    bits_per_weight: 4.25,
    encodes: Encodes::Always,
};

/// Weights of a group, unless something else is asked for.
const GROUP: u64 = 128;
/// Least range of a group.
const LEAST_RANGE: f32 = 1e-6;
/// The largest code, counted from the least.
const MOST: f32 = 15.0;
/// The code that stands for the zero point, counted likewise.
const MIDDLE: f32 = 8.0;

/// How a weight is divided.
struct Sizes {
    /// Weights of a group.
    group: usize,
    rows: usize,
    /// Groups of a row.
    across: usize,
    /// Type of scales and zero points, and bytes of one.
    dtype: Dtype,
    bytes: usize,
}

impl Sizes {
    fn of(layout: &Layout) -> Result<Self> {
        let &[rows, columns] = layout.shape.as_slice() else {
            return Err(Error::Internal(format!("{}: no matrix", INFO.name)));
        };
        let group = layout.params.block_size.unwrap_or(GROUP).max(1);
        let dtype = rows8::compute_type(layout.params.dtype);
        Ok(Sizes {
            group: shape::to_usize(group)?,
            rows: shape::to_usize(rows)?,
            across: shape::to_usize(columns / group)?,
            dtype,
            bytes: shape::to_usize(dtype.alignment())?,
        })
    }

    /// Bytes of a scale and a zero point.
    fn pair_bytes(&self) -> usize {
        2 * self.bytes
    }
}

/// What the codes of one group are counted from, and the distance of two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps {
    pub(crate) least: f32,
    pub(crate) step: f32,
    is_zero: bool,
}

impl Steps {
    /// Those of weights in this range. Their step is infinite where `f32` does not hold the range, or weights are not finite.
    #[inline(always)]
    pub(crate) fn between((least, greatest): (f32, f32)) -> Self {
        let range = greatest - least;
        let range = match range.is_finite() {
            true => range.max(LEAST_RANGE),
            false => f32::INFINITY,
        };
        Steps {
            least,
            step: range / MOST,
            is_zero: least == 0.0 && greatest == 0.0,
        }
    }

    /// Puts scale and zero point to `pair`, in the type `C`.
    #[inline(always)]
    pub(crate) fn store<C: Stored>(self, pair: &mut [u8]) {
        let (scale_place, zero_place) = pair.split_at_mut(C::BYTES);
        let scale = C::write(self.step, scale_place);
        let zero = match self.is_zero {
            true => MIDDLE * scale,
            false => self.least + MIDDLE * self.step,
        };
        C::write(zero, zero_place);
    }
}

impl Format for Int4 {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let name = INFO.name;
        params.refuse_choices(name, params.block_size)?;
        let group = params.block_size.unwrap_or(GROUP);
        let &[rows, columns] = shape else {
            return Err(Error::format(format!(
                "{name}: takes 2 dimensions, got shape {shape:?}"
            )));
        };
        if group == 0 || !group.is_multiple_of(2) {
            return Err(Error::config(format!(
                "{name}: block_size is {group}, expected an even number"
            )));
        }
        if columns == 0 || !columns.is_multiple_of(group) {
            return Err(Error::format(format!(
                "{name}: row of {columns} weights is not a multiple of block_size {group}"
            )));
        }
        let dtype = rows8::compute_type(params.dtype);
        let array = |suffix: &'static str, dtype, shape: [u64; 2], weights, bytes| Component {
            suffix: suffix.into(),
            naming: Naming::Flattened,
            dtype,
            shape: shape.to_vec(),
            span: Span::Blocks { weights, bytes },
        };
        let scales = |suffix| {
            let shape = [columns / group, rows];
            array(suffix, dtype, shape, group, dtype.alignment())
        };
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![
                array("qdata", Dtype::I8, [rows, columns / 2], 2, 1),
                scales("scale"),
                scales("zero_point"),
            ],
            unit_weights: columns,
            statistics: None,
        })
    }

    fn encoding(&self, layout: &Layout) -> Result<Layout> {
        let sizes = Sizes::of(layout)?;
        let mut layout = layout.clone();
        for component in layout.components.iter_mut().skip(1) {
            component.span = Span::Whole;
        }
        layout.statistics = Some(Span::Blocks {
            weights: sizes.group as u64,
            bytes: sizes.pair_bytes() as u64,
        });
        Ok(layout)
    }

    fn transposed_element(&self, layout: &Layout, component: usize) -> Option<u64> {
        let array = layout.components.get(component)?;
        (component > 0 && array.span.is_sliced()).then(|| array.dtype.alignment())
    }

    fn encode_at_once(
        &self,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
        statistics: &mut [u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let Sizes { group, dtype, .. } = Sizes::of(layout)?;
        let [codes, ..] = parts;
        let level = kernels::level();
        let done = encode(level, group, dtype, weights, statistics, codes);
        if done * group >= weights.len() {
            return Ok(());
        }
        let (_, rest) = weights.split_at(done * group);
        let (least, greatest) = rest.split_at(group).0.range();
        let index = first + (done * group) as u64;
        Err(Error::format(format!(
            "{}: weights {index}..{} are from {least:e} to {greatest:e}, a range that F32 does not hold",
            INFO.name,
            index + group as u64,
        )))
    }

    fn measures_at_once(&self) -> bool {
        true
    }

    fn finds_nonfinite(&self) -> bool {
        true
    }

    fn takes_stored(&self) -> bool {
        true
    }

    fn decode(
        &self,
        layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let sizes = Sizes::of(layout)?;
        let [codes, scales, zeros, ..] = *parts;
        let pairs = scales
            .chunks_exact(sizes.bytes)
            .zip(zeros.chunks_exact(sizes.bytes));
        take_groups(&sizes, codes, pairs, weights);
        Ok(())
    }

    fn decode_encoded(
        &self,
        layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        statistics: &[u8],
        weights: &mut [f32],
    ) -> Result<()> {
        let sizes = Sizes::of(layout)?;
        let [codes, ..] = *parts;
        let pairs = statistics
            .chunks_exact(sizes.pair_bytes())
            .map(|pair| pair.split_at(sizes.bytes));
        take_groups(&sizes, codes, pairs, weights);
        Ok(())
    }

    fn whole(&self, layout: &Layout, statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        if statistics.is_empty() {
            return Ok(Vec::new());
        }
        let sizes = Sizes::of(layout)?;
        let found = match sizes.bytes {
            2 => turned::<2>(&sizes, statistics),
            _ => turned::<4>(&sizes, statistics),
        };
        Ok((1..).zip(found).collect())
    }
}

/// Scales and zero points, column by column, of the pairs of all groups.
fn turned<const BYTES: usize>(sizes: &Sizes, pairs: &[u8]) -> [Vec<u8>; 2] {
    let (numbers, _) = pairs.as_chunks::<BYTES>();
    let (pairs, _) = numbers.as_chunks::<2>();
    let column = |group: usize, which: usize| {
        let places = pairs.iter().skip(group).step_by(sizes.across);
        places.take(sizes.rows).flat_map(move |pair| pair[which])
    };
    [0, 1].map(|which| {
        let mut array = Vec::with_capacity(pairs.len() * BYTES);
        for group in 0..sizes.across {
            array.extend(column(group, which));
        }
        array
    })
}

/// Weights of whole groups, `pairs` being the bytes of their scales and zero points.
fn take_groups<'p>(
    sizes: &Sizes,
    codes: &[u8],
    pairs: impl Iterator<Item = (&'p [u8], &'p [u8])>,
    weights: &mut [f32],
) {
    let level = kernels::level();
    let groups = weights
        .chunks_exact_mut(sizes.group)
        .zip(codes.chunks_exact(sizes.group / 2));
    for ((weights, codes), (scale, zero)) in groups.zip(pairs) {
        let (scale, zero) = (
            read_scale(sizes.dtype, scale),
            read_scale(sizes.dtype, zero),
        );
        kernels::take_pairs(level, scale, zero, codes, weights);
    }
}

/// Codes of whole groups of `size` weights (at least 2, even), two to a byte, and `pairs` of scale and zero point in
/// the type `dtype`. Gives the number of groups; it ends where a scale would not be finite.
pub fn encode(
    level: Level,
    size: usize,
    dtype: Dtype,
    weights: Weights<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    let Weights::BF16(weights) = weights else {
        return kernels::encode_pairs(level, size, dtype, weights, pairs, codes);
    };
    let pair = 2 * for_computed!(dtype, |Computed| Computed::BYTES);
    let count = weights.len() / size;
    let mut first = 0;
    while first < count {
        let weights = &weights[first * size..];
        let (pairs, codes) = (&mut pairs[first * pair..], &mut codes[first * size / 2..]);
        let mut next = count - first;
        if size.is_multiple_of(kernels::GROUP_STEP) {
            let done = kernels::encode_bf16_pairs(level, size, dtype, weights, pairs, codes);
            if done > 0 {
                first += done;
                continue;
            }
            // Where one of these needs care, and then others may be done so.
            next = next.min(kernels::GROUPS);
        }
        let weights = Weights::BF16(&weights[..next * size]);
        let done = kernels::encode_pairs(level, size, dtype, weights, pairs, codes);
        first += done;
        if done < next {
            break;
        }
    }
    first
}

/// As [`encode`]; with `FMA` as [`rows8::encode_body`].
#[inline(always)]
pub(crate) fn encode_body<const FMA: bool>(
    size: usize,
    dtype: Dtype,
    weights: Weights<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    for_stored!(weights, |weights: Type| for_computed!(dtype, |Computed| {
        encode_of::<Type, Computed, FMA>(size, weights, pairs, codes)
    }))
}

#[inline(always)]
fn encode_of<S: Stored, C: Stored, const FMA: bool>(
    size: usize,
    weights: &[S::Bytes],
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    let groups = weights
        .chunks_exact(size)
        .zip(codes.chunks_exact_mut(size / 2))
        .zip(pairs.chunks_exact_mut(2 * C::BYTES));
    let mut done = 0;
    for ((weights, codes), pair) in groups {
        let steps = Steps::between(S::range(weights));
        let Steps { least, step, .. } = steps;
        if !step.is_finite() {
            break;
        }
        steps.store::<C>(pair);
        if FMA && Divisor::serves(step) {
            let divisor = Divisor::new(step);
            put_pairs::<S>(weights, codes, |weight| divisor.divide(weight - least));
        } else {
            put_pairs::<S>(weights, codes, |weight| (weight - least) / step);
        }
        done += 1;
    }
    done
}

/// Packed codes of weights, given their quotients.
#[inline(always)]
pub(crate) fn put_pairs<S: Stored>(
    weights: &[S::Bytes],
    codes: &mut [u8],
    quotient: impl Fn(f32) -> f32,
) {
    let code = |pair: [S::Bytes; 2]| {
        let [low, high] = S::pair(pair).map(|weight| nearest(quotient(weight)));
        // Codes are counted from 0; less 8 is the highest bit turned round.
        ((low | high << 4) ^ 0x88) as u8
    };
    // Runs of a fixed length, so that bytes are put together from whole vectors.
    let (pairs, _) = weights.as_chunks::<2>();
    let (runs, rest) = pairs.as_chunks::<32>();
    let (places, last) = codes.as_chunks_mut::<32>();
    for (pairs, places) in runs.iter().zip(places) {
        for (place, pair) in places.iter_mut().zip(pairs) {
            *place = code(*pair);
        }
    }
    for (place, pair) in last.iter_mut().zip(rest) {
        *place = code(*pair);
    }
}

/// The nearest whole number, ties to even. It is one from 0 to 15: no weight is less than the least, or further
/// from it than 15 steps and what rounding the step took from it.
#[inline(always)]
fn nearest(quotient: f32) -> u32 {
    (quotient + TO_WHOLE).to_bits() & 15
}

/// Weights of one group.
#[inline(always)]
pub(crate) fn take_body(scale: f32, zero: f32, codes: &[u8], weights: &mut [f32]) {
    let weight = |code: u8| f32::from(code.cast_signed() >> 4) * scale + zero;
    for (pair, &byte) in weights.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
        *pair = [weight(byte << 4), weight(byte)];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_two_signed_numbers() {
        let codes: Vec<u8> = (0..=255).collect();
        let mut weights = vec![0.0; 512];
        take_body(1.0, 0.0, &codes, &mut weights);
        let signed = |nibble: u8| f32::from(nibble) - if nibble > 7 { 16.0 } else { 0.0 };
        for (byte, pair) in codes.iter().zip(weights.chunks(2)) {
            assert_eq!(pair, [signed(byte & 15), signed(byte >> 4)]);
        }
        // Whole numbers from -8 to 7 are their own codes.
        for level in Level::available() {
            let (mut again, mut pair) = (vec![0; 256], [0; 8]);
            let given = Weights::F32(&weights);
            encode(level, 512, Dtype::F32, given, &mut pair, &mut again);
            assert_eq!(again, codes);
        }
    }

    #[test]
    fn levels_give_the_same_bytes() {
        for (size, count) in [(2, 6), (32, 128), (66, 132), (128, 384)] {
            let weights: Vec<f32> = (0..count)
                .map(|index| ((index * 7919) % 1013) as f32 * 1e-3 - 0.4)
                .collect();
            let wide: Vec<[u8; 2]> = weights
                .iter()
                .map(|&weight| half::bf16::from_f32(weight).to_le_bytes())
                .collect();
            let narrow: Vec<f32> = wide
                .iter()
                .map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32())
                .collect();
            for given in [
                Weights::F32(&weights),
                Weights::F32(&narrow),
                Weights::BF16(&wide),
            ] {
                let made = |level| {
                    let (mut codes, mut pairs) = (vec![0; count / 2], vec![0; count / size * 4]);
                    let dtype = Dtype::BF16;
                    let done = encode(level, size, dtype, given, &mut pairs, &mut codes);
                    assert_eq!(done, count / size);
                    let mut decoded = vec![0.0; count];
                    kernels::take_pairs(level, 0.3, -0.1, &codes, &mut decoded);
                    (codes, pairs, decoded)
                };
                let first = made(Level::SCALAR);
                for level in Level::available() {
                    assert_eq!(made(level), first);
                }
            }
        }
    }

    #[test]
    fn a_range_that_is_infinite_is_not_encoded() {
        let weights = [0.0, 1.0, 3e38, -3e38, 1.0, 2.0];
        for level in Level::available() {
            let (mut pairs, mut codes) = ([0; 24], [0; 3]);
            let given = Weights::F32(&weights);
            let done = encode(level, 2, Dtype::F32, given, &mut pairs, &mut codes);
            assert_eq!(done, 1);
        }
    }

    #[test]
    fn hostile_sizes_are_errors() {
        let sized = |shape: &[u64], block_size| {
            let params = Params {
                block_size,
                ..Params::default()
            };
            INT4.layout(shape, &params)
        };
        assert!(sized(&[3, 256], None).is_ok());
        for (shape, block_size) in [
            (&[3, 200][..], None),
            (&[3, 0], None),
            (&[256], None),
            (&[2, 3, 256], None),
            (&[3, 256], Some(0)),
            (&[3, 255], Some(5)),
            (&[3, 256], Some(u64::MAX)),
            (&[u64::MAX, u64::MAX - 1], Some(2)),
        ] {
            assert!(sized(shape, block_size).is_err(), "{shape:?}");
        }
    }
}
