//! 8-bit codes with `f32` scales: y = code·scale.
//!
//! | format | codes | a scale for | stored as | encoding |
//! |---|---|---|---|---|
//! | `fp8:block` | E4M3 [N, K] | 128 × 128 weights, less at the edges | `weight_scale_inv` [⌈N/128⌉, ⌈K/128⌉] | reciprocal |
//! | `fp8:row` | E4M3 [N, K] | a row | `weight_scale` [N, 1] | – |
//! | `fp8:tensor` | E4M3 | the tensor | `weight_scale` [] | – |
//! | `modelopt:fp8` | E4M3 | the tensor | `weight_scale` [] | quotient, through the type of the weight |
//! | `modelopt:fp8_row` | E4M3 [N, K] | a row | `weight_scale` [N] | quotient |
//! | `modelopt:fp8_block` | E4M3 [N, K] | 128 × 128 weights | `weight_scale` [⌈N/128⌉, 1, ⌈K/128⌉, 1], or [] for one block | quotient |
//! | `modelopt:int8` | I8 [N, K] | a row | `weight_scale` [N] | quotient |
//!
//! The scale stands in a sibling of the weight; despite its name `weight_scale_inv` is multiplied with.
//! With a the largest magnitude of the weights that share a scale and M = 448 or 127:
//! - quotient: scale = a/M, code of w/scale, each rounded to `f32`; through the type of the weight, the
//!   quotient is rounded to that type before it is rounded to a code.
//! - reciprocal: r = (1/a)·448, scale = 1/r, code of w·r.
//!
//! E4M3 codes are rounded to nearest with ties to even and end at ±448; those of I8 likewise, from −128
//! to 127. Decoding is one product in `f32`.
//!
//! Special cases:
//! - Weights sharing a scale that are all zero: scale 1, codes of zero. ModelOpt does the same for all but
//!   `modelopt:fp8`, where it stores scale 0 and NaN.
//! - A largest magnitude whose scale would be 0, or its reciprocal infinite: likewise. The peers store
//!   NaN or codes of ±448 there, with a scale of 0.
//! - ModelOpt takes a largest magnitude below the least normal number of the weight's type for that
//!   number (but for `modelopt:fp8`), and so is done here.
//! - Scales of sources may also be BF16, F16 or E8M0, and in other shapes of as many numbers.
//!
//! Peers: transformers 5.23 (`Fp8Quantize`, `Fp8Dequantize`) for `fp8:block`, where it takes multiples of
//! 128 only; ModelOpt 0.47 on CPU (unified export of a layer) for `modelopt:*`. `fp8:row` and
//! `fp8:tensor` are what compressed-tensors and others store, and are decoded only.

use super::rows8::{self, Codes, Scaling};
use super::significands::{self, Significands};
use super::stored::{for_stored, Stored};
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float8::{of_e8m0, E4M3_MOST};
use crate::kernels::{self, Level};
use crate::shape;

/// Rows and columns that share a scale, where blocks do.
const BLOCK: u64 = 128;
/// Weights that have a place for a largest magnitude, in formats with one scale.
pub(super) const RUN: u64 = 256;
/// What such formats collect in their first pass, by [`put_magnitudes`].
pub(super) const MAGNITUDES: Span = Span::Blocks {
    weights: RUN,
    bytes: 4,
};

/// A format of this family.
pub struct Scaled {
    info: &'static Info,
    codes: Codes,
    share: Share,
    suffix: &'static str,
    recipe: Recipe,
}

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Share {
    Tensor,
    /// The rows of a matrix; the scales are one column of it, or a vector.
    Row {
        column: bool,
    },
    /// Squares of a matrix; the scales have dimensions of 1 between, or not.
    Block {
        spaced: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Recipe {
    Quotient,
    Reciprocal,
}

pub static FP8_BLOCK: Scaled = Scaled {
    info: &Info {
        peer: "transformers 5.23",
        reader: "transformers, vLLM, SGLang",
        ..info("fp8:block")
    },
    codes: Codes::E4m3,
    share: Share::Block { spaced: false },
    suffix: "weight_scale_inv",
    recipe: Recipe::Reciprocal,
};

pub static FP8_ROW: Scaled = Scaled {
    info: &decoded("fp8:row"),
    codes: Codes::E4m3,
    share: Share::Row { column: true },
    suffix: "weight_scale",
    recipe: Recipe::Quotient,
};

pub static FP8_TENSOR: Scaled = Scaled {
    info: &decoded("fp8:tensor"),
    codes: Codes::E4m3,
    share: Share::Tensor,
    suffix: "weight_scale",
    recipe: Recipe::Quotient,
};

pub static MODELOPT_FP8: Scaled = Scaled {
    info: &info("modelopt:fp8"),
    codes: Codes::E4m3,
    share: Share::Tensor,
    suffix: "weight_scale",
    recipe: Recipe::Quotient,
};

pub static MODELOPT_FP8_ROW: Scaled = Scaled {
    info: &info("modelopt:fp8_row"),
    codes: Codes::E4m3,
    share: Share::Row { column: false },
    suffix: "weight_scale",
    recipe: Recipe::Quotient,
};

pub static MODELOPT_FP8_BLOCK: Scaled = Scaled {
    info: &info("modelopt:fp8_block"),
    codes: Codes::E4m3,
    share: Share::Block { spaced: true },
    suffix: "weight_scale",
    recipe: Recipe::Quotient,
};

pub static MODELOPT_INT8: Scaled = Scaled {
    info: &info("modelopt:int8"),
    codes: Codes::Int8,
    share: Share::Row { column: false },
    suffix: "weight_scale",
    recipe: Recipe::Quotient,
};

const fn info(name: &'static str) -> Info {
    Info {
        name,
        short: None,
        container: "safetensors",
        exactness: Exactness::Exact,
        peer: "ModelOpt 0.47",
        reader: "weightpack, vLLM, TensorRT-LLM, SGLang",
        bits_per_weight: 8.0,
        encodes: Encodes::Always,
    }
}

const fn decoded(name: &'static str) -> Info {
    Info {
        peer: "torch 2.13",
        reader: "vLLM, SGLang",
        encodes: Encodes::Never,
        ..info(name)
    }
}

impl Scaled {
    fn block(&self, layout: &Layout) -> Result<usize> {
        shape::to_usize(layout.params.block_size.unwrap_or(BLOCK))
    }

    fn most_code(&self) -> f32 {
        match self.codes {
            Codes::E4m3 => E4M3_MOST,
            Codes::Int8 => 127.0,
        }
    }

    /// The scale for weights of this largest magnitude, and what the weights are divided by or, for
    /// reciprocals, multiplied with.
    fn scale(&self, most: f32, dtype: Dtype) -> (f32, f32) {
        if self.recipe == Recipe::Reciprocal {
            // The peer divides a number by a tensor, which torch does by way of the reciprocal.
            let factor = 1.0 / most * E4M3_MOST;
            return match factor.is_finite() {
                true => (1.0 / factor, factor),
                false => (1.0, 1.0),
            };
        }
        let most = match self.share {
            _ if most == 0.0 => most,
            Share::Tensor => most,
            Share::Row { .. } | Share::Block { .. } => most.max(least_normal(dtype)),
        };
        let scale = most / self.most_code();
        match scale > 0.0 {
            true => (scale, scale),
            // Weights too small for a scale round to zero by themselves.
            false => (1.0, 1.0),
        }
    }

    fn scaling(&self, dtype: Dtype) -> Scaling {
        match (self.recipe, self.codes, self.share) {
            (Recipe::Reciprocal, ..) => Scaling::Product,
            // One scale for a tensor divides in the type of the weights.
            (Recipe::Quotient, Codes::E4m3, Share::Tensor) => Scaling::Quotient(dtype),
            (Recipe::Quotient, ..) => Scaling::Quotient(Dtype::F32),
        }
    }

    /// Codes of weights that share a scale; `by` is the second part of [`Scaled::scale`].
    fn encode_run(&self, dtype: Dtype, by: f32, weights: Weights<'_>, codes: &mut [u8]) {
        let (level, scaling) = (kernels::level(), self.scaling(dtype));
        rows8::encode(level, self.codes, scaling, by, weights, codes);
    }

    fn decode_run(&self, scale: f32, codes: &[u8], weights: &mut [f32]) {
        rows8::decode(kernels::level(), self.codes, 0, scale, codes, weights);
    }
}

/// Squares are taken side by side up to this width, so that what is read at a time stays in a cache.
const STRIP: usize = 4096;

/// Squares of a matrix that share a scale each.
#[derive(Debug, Clone, Copy)]
pub struct Squares {
    /// The type of the weights.
    pub dtype: Dtype,
    /// Rows and columns of a square, but for those at the edges.
    pub size: usize,
    /// Columns of the matrix.
    pub columns: usize,
}

/// Codes and scales of a row of squares; whether all weights are finite.
pub(crate) fn encode_squares(
    level: Level,
    format: &Scaled,
    squares: Squares,
    weights: Weights<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) -> bool {
    let Squares { size, columns, .. } = squares;
    let (kind, scaling) = (format.codes, format.scaling(squares.dtype));
    let width = size.max(STRIP / size * size).min(columns).max(1);
    let ahead = weights.split_at(width).0.bytes();
    let rows = weights.len() / columns.max(1);
    let across = width.div_ceil(size);
    let (mut factors, mut significands) = (vec![0f32; across], Vec::with_capacity(across));
    let mut places = scales.as_chunks_mut().0.iter_mut();
    let mut is_finite = true;
    for start in (0..columns).step_by(width) {
        let end = columns.min(start + width);
        let factors = &mut factors[..(end - start).div_ceil(size)];
        kernels::measure_squares(level, squares, start, end, weights, factors);
        significands.clear();
        for (factor, place) in factors.iter_mut().zip(&mut places) {
            is_finite &= factor.is_finite();
            let scale;
            (scale, *factor) = format.scale(*factor, squares.dtype);
            *place = scale.to_le_bytes();
            if size.is_multiple_of(significands::RUN) {
                significands.extend(Significands::new(
                    level,
                    kind,
                    scaling,
                    *factor,
                    weights,
                    rows * size,
                ));
            }
        }
        if significands.len() < factors.len() {
            significands.clear();
        }
        let encoder = rows8::Encoder {
            level,
            kind,
            scaling,
            size,
            factors,
            significands: &significands,
        };
        let lines = weights
            .chunks_exact(columns)
            .zip(codes.chunks_exact_mut(columns));
        for (weights, codes) in lines {
            let (_, weights) = weights.split_at(start);
            let (weights, _) = weights.split_at(end - start);
            encoder.encode(weights, &mut codes[start..end], ahead);
        }
    }
    is_finite
}

/// The largest magnitudes of squares that lie side by side, from column `start` to `end`.
#[inline(always)]
pub(crate) fn measure_squares_body(
    squares: Squares,
    start: usize,
    end: usize,
    weights: Weights<'_>,
    largest: &mut [f32],
) {
    for_stored!(weights, |weights: Type| measure_squares_of::<Type>(
        squares, start, end, weights, largest
    ));
}

#[inline(always)]
fn measure_squares_of<S: Stored>(
    squares: Squares,
    start: usize,
    end: usize,
    weights: &[S::Bytes],
    largest: &mut [f32],
) {
    let Squares { size, columns, .. } = squares;
    let mut sizes = vec![S::Size::default(); end - start];
    for row in weights.chunks_exact(columns) {
        let row = row.get(start..end).unwrap_or_default();
        for (most, &weight) in sizes.iter_mut().zip(row) {
            *most = S::size(weight).max(*most);
        }
    }
    for (sizes, largest) in sizes.chunks(size).zip(largest) {
        let most = sizes.iter().copied().fold(S::Size::default(), Ord::max);
        *largest = S::of_size(most);
    }
}

impl Format for Scaled {
    fn info(&self) -> &'static Info {
        self.info
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let name = self.info.name;
        let is_block = matches!(self.share, Share::Block { .. });
        if params.block_size.is_some() && !is_block {
            params.refuse_choices(name, None)?;
        }
        if params.block_size == Some(0) {
            return Err(Error::config(format!("{name}: block_size is 0")));
        }
        Params {
            block_size: None,
            ..params.clone()
        }
        .refuse_choices(name, None)?;
        let weights = shape::count_weights(shape)?;
        let (unit_weights, scales, span) = match self.share {
            Share::Tensor => (RUN, Vec::new(), Span::Whole),
            Share::Row { column } => {
                let (rows, columns) = matrix(name, shape)?;
                let scales = if column { vec![rows, 1] } else { vec![rows] };
                let span = Span::Blocks {
                    weights: columns,
                    bytes: 4,
                };
                (columns, scales, span)
            }
            Share::Block { spaced } => {
                let (rows, columns) = matrix(name, shape)?;
                let size = params.block_size.unwrap_or(BLOCK);
                let (down, across) = (rows.div_ceil(size), columns.div_ceil(size));
                let unit = shape::multiply(size, columns, "weights of a row of blocks")?;
                let span = Span::Blocks {
                    weights: unit,
                    bytes: shape::multiply(across, 4, "bytes of scales")?,
                };
                let scales = match (spaced, down, across) {
                    (true, 1, 1) => Vec::new(),
                    (true, ..) => vec![down, 1, across, 1],
                    (false, ..) => vec![down, across],
                };
                (unit, scales, span)
            }
        };
        Ok(Layout {
            shape: shape.to_vec(),
            weights,
            params: params.clone(),
            components: vec![
                Component {
                    suffix: "".into(),
                    naming: Naming::Appended,
                    dtype: match self.codes {
                        Codes::E4m3 => Dtype::F8_E4M3,
                        Codes::Int8 => Dtype::I8,
                    },
                    shape: shape.to_vec(),
                    span: Span::Blocks {
                        weights: 1,
                        bytes: 1,
                    },
                },
                Component {
                    suffix: self.suffix.into(),
                    naming: Naming::Sibling,
                    dtype: Dtype::F32,
                    shape: scales,
                    span,
                },
            ],
            unit_weights,
            statistics: (self.share == Share::Tensor).then_some(MAGNITUDES),
        })
    }

    fn measure(
        &self,
        _layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        statistics: &mut [u8],
    ) -> Result<()> {
        match put_magnitudes(weights, statistics) {
            true => Ok(()),
            false => Err(self.not_finite()),
        }
    }

    fn settle(&self, layout: &mut Layout, statistics: &mut [u8]) -> Result<()> {
        let most = most_measured(statistics);
        layout.params.tensor_scale = self.scale(most, layout.params.dtype).0;
        Ok(())
    }

    fn encode(
        &self,
        layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let dtype = layout.params.dtype;
        let [codes, scales, ..] = parts;
        match self.share {
            Share::Tensor => {
                self.encode_run(dtype, layout.params.tensor_scale, weights, codes);
            }
            Share::Row { .. } => {
                let columns = shape::to_usize(layout.unit_weights)?.max(1);
                let rows = weights.chunks(columns).zip(codes.chunks_mut(columns));
                for ((weights, codes), place) in rows.zip(scales.as_chunks_mut().0) {
                    let (scale, by) = self.scale(rows8::largest(kernels::level(), weights), dtype);
                    self.encode_run(dtype, by, weights, codes);
                    *place = scale.to_le_bytes();
                }
            }
            Share::Block { .. } => {
                let size = self.block(layout)?;
                let unit = shape::to_usize(layout.unit_weights)?.max(1);
                let columns = unit / size;
                let squares = Squares {
                    dtype,
                    size,
                    columns,
                };
                let units = weights.chunks(unit).zip(codes.chunks_mut(unit));
                let scales = scales.chunks_exact_mut(columns.div_ceil(size) * 4);
                for ((weights, codes), scales) in units.zip(scales) {
                    let level = kernels::level();
                    if !encode_squares(level, self, squares, weights, codes, scales) {
                        return Err(self.not_finite());
                    }
                }
            }
        }
        Ok(())
    }

    fn decode(
        &self,
        layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let [codes, scales, ..] = parts;
        let stored = layout.components.get(1).map_or(Dtype::F32, |one| one.dtype);
        let width = scale_bytes(stored)?;
        match self.share {
            Share::Tensor => self.decode_run(layout.params.tensor_scale, codes, weights),
            Share::Row { .. } => {
                let columns = shape::to_usize(layout.unit_weights)?.max(1);
                let rows = weights.chunks_mut(columns).zip(codes.chunks(columns));
                for ((weights, codes), scale) in rows.zip(scales.chunks_exact(width)) {
                    self.decode_run(read_scale(stored, scale), codes, weights);
                }
            }
            Share::Block { .. } => {
                let size = self.block(layout)?;
                let unit = shape::to_usize(layout.unit_weights)?.max(1);
                let (columns, across) = (unit / size, (unit / size).div_ceil(size));
                let units = weights.chunks_mut(unit).zip(codes.chunks(unit));
                for ((weights, codes), scales) in units.zip(scales.chunks_exact(across * width)) {
                    let rows = weights
                        .chunks_exact_mut(columns)
                        .zip(codes.chunks_exact(columns));
                    for (weights, codes) in rows {
                        let runs = weights.chunks_mut(size).zip(codes.chunks(size));
                        for ((weights, codes), scale) in runs.zip(scales.chunks_exact(width)) {
                            self.decode_run(read_scale(stored, scale), codes, weights);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn decode_step(&self, layout: &Layout) -> u64 {
        match self.share {
            Share::Tensor | Share::Row { .. } => layout.unit_weights,
            Share::Block { .. } => shape::row_weights(&layout.shape),
        }
    }

    fn whole(&self, layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        Ok(match self.share {
            Share::Tensor => vec![(1, layout.params.tensor_scale.to_le_bytes().to_vec())],
            Share::Row { .. } | Share::Block { .. } => Vec::new(),
        })
    }

    fn finds_nonfinite(&self) -> bool {
        !matches!(self.share, Share::Row { .. })
    }

    fn takes_stored(&self) -> bool {
        true
    }

    fn tensor_scale(&self) -> Option<usize> {
        (self.share == Share::Tensor).then_some(1)
    }
}

/// `layout` with scales that are stored as `dtype`, in the shape `scales`; they are as many.
pub fn with_scales(mut layout: Layout, dtype: Dtype, scales: &[u64]) -> Result<Layout> {
    let width = scale_bytes(dtype)? as u64;
    if let Some(component) = layout.components.get_mut(1) {
        if shape::count_weights(scales)? != shape::count_weights(&component.shape)? {
            return Err(Error::checkpoint(format!(
                "\"{}\" has shape {scales:?}, expected {:?}",
                component.suffix, component.shape
            )));
        }
        if let Span::Blocks { bytes, .. } = &mut component.span {
            *bytes = *bytes / scale_bytes(component.dtype)? as u64 * width;
        }
        component.dtype = dtype;
        component.shape = scales.to_vec();
    }
    Ok(layout)
}

/// Bytes of a scale that is stored as `dtype`; whole numbers are powers of two (E8M0).
pub(super) fn scale_bytes(dtype: Dtype) -> Result<usize> {
    match dtype {
        Dtype::F32 => Ok(4),
        Dtype::BF16 | Dtype::F16 => Ok(2),
        Dtype::F8_E8M0 | Dtype::U8 => Ok(1),
        _ => Err(Error::unsupported(format!("scales are {dtype}"))),
    }
}

pub(super) fn read_scale(dtype: Dtype, bytes: &[u8]) -> f32 {
    match (dtype, bytes) {
        (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (Dtype::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
        (Dtype::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
        (Dtype::F8_E8M0 | Dtype::U8, &[code]) => of_e8m0(code),
        _ => f32::NAN,
    }
}

fn matrix(name: &str, shape: &[u64]) -> Result<(u64, u64)> {
    match shape {
        &[rows, columns] if columns > 0 => Ok((rows, columns)),
        [_, _] => Err(Error::format(format!("{name}: rows are empty"))),
        _ => Err(Error::format(format!(
            "{name}: takes 2 dimensions, got shape {shape:?}"
        ))),
    }
}

/// The least normal number of a weight's type.
pub(super) fn least_normal(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => f32::from_bits((127 - 14) << 23),
        _ => f32::MIN_POSITIVE,
    }
}

/// Largest magnitude of the weights, as the first of as many numbers as they have runs; the others are 0.
/// Gives whether it is finite.
pub(super) fn put_magnitudes(weights: Weights<'_>, statistics: &mut [u8]) -> bool {
    let largest = rows8::largest(kernels::level(), weights);
    let (first, others) = statistics.split_at_mut(statistics.len().min(4));
    others.fill(0);
    if let Some(place) = first.first_chunk_mut() {
        *place = largest.to_le_bytes();
    }
    largest.is_finite()
}

/// The largest of what [`put_magnitudes`] wrote for one more tensor and of what `joined` holds, in its place.
pub(super) fn join_magnitudes(joined: &mut Vec<u8>, statistics: &[u8]) {
    let most = most_measured(joined).max(most_measured(statistics));
    joined.clear();
    joined.extend_from_slice(&most.to_le_bytes());
}

/// The largest of what [`put_magnitudes`] wrote.
pub(super) fn most_measured(statistics: &[u8]) -> f32 {
    let measured = statistics.as_chunks().0.iter();
    measured.fold(0.0, |most, bytes| f32::from_le_bytes(*bytes).max(most))
}
