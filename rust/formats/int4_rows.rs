//! ModelOpt's exported INT4: two's complement codes of two rows in one byte, a scale for every 128
//! weights of a row.
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `weight` | U8 [N/2, K] | row 2i in bits 0-3 and row 2i + 1 in bits 4-7 of row i |
//! | `weight_scale` | F32 [N, K/b] | a/7, a being the largest magnitude of the b weights |
//!
//! The code is w/scale, rounded to `f32` and then to the nearest integer from −8 to 7, ties to even.
//! Decoding is one product in `f32`. b is 128, or what `block_size` says; it divides K, and N is even:
//! ModelOpt refuses other shapes too.
//!
//! Special cases: weights that are all zero have scale 1 and codes 0; below the least normal number of
//! `f32`, a is that number. ModelOpt does the same.
//!
//! Peer: ModelOpt 0.47 on CPU (unified export of a layer packed as INT4 in blocks).

use super::rows8::Divisor;
use super::shared_bytes::put;
use super::stored::{for_stored, Stored};
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::{kernels, shape};

/// The format; it holds nothing.
pub struct Int4Rows;

pub static INT4: Int4Rows = Int4Rows;

static INFO: Info = Info {
    name: "modelopt:int4",
    short: None,
    container: "safetensors",
    exactness: Exactness::Exact,
    peer: "ModelOpt 0.47",
    reader: "weightpack, vLLM, TensorRT-LLM",
    bits_per_weight: 4.25,
    encodes: Encodes::Always,
};

const BLOCK: u64 = 128;

impl Format for Int4Rows {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let block = params.block_size.unwrap_or(BLOCK);
        params.refuse_choices(INFO.name, params.block_size)?;
        let &[rows, columns] = shape else {
            return Err(Error::format(format!(
                "{}: takes 2 dimensions, got shape {shape:?}",
                INFO.name
            )));
        };
        if block == 0 || columns == 0 || !columns.is_multiple_of(block) {
            return Err(Error::format(format!(
                "{}: row of {columns} weights is not a multiple of block_size {block}",
                INFO.name
            )));
        }
        if !rows.is_multiple_of(2) {
            return Err(Error::format(format!(
                "{}: {rows} rows, and two go into one",
                INFO.name
            )));
        }
        let unit_weights = shape::multiply(columns, 2, "weights of two rows")?;
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![
                Component {
                    suffix: "".into(),
                    naming: Naming::Appended,
                    dtype: Dtype::U8,
                    shape: vec![rows / 2, columns],
                    span: Span::Blocks {
                        weights: unit_weights,
                        bytes: columns,
                    },
                },
                Component {
                    suffix: "weight_scale".into(),
                    naming: Naming::Sibling,
                    dtype: Dtype::F32,
                    shape: vec![rows, columns / block],
                    span: Span::Blocks {
                        weights: block,
                        bytes: 4,
                    },
                },
            ],
            unit_weights,
            statistics: None,
        })
    }

    fn encode(
        &self,
        layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let (block, columns) = sizes(layout)?;
        let [codes, scales, ..] = parts;
        let level = kernels::level();
        let pairs = weights
            .chunks_exact(2 * columns)
            .zip(codes.chunks_exact_mut(columns))
            .zip(scales.chunks_exact_mut(2 * columns / block * 4));
        for ((weights, codes), scales) in pairs {
            kernels::encode_int4_rows(level, block, weights, codes, scales);
        }
        Ok(())
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
        let (block, columns) = sizes(layout)?;
        let [codes, scales, ..] = parts;
        let pairs = weights
            .chunks_exact_mut(2 * columns)
            .zip(codes.chunks_exact(columns))
            .zip(scales.chunks_exact(2 * columns / block * 4));
        for ((weights, codes), scales) in pairs {
            let rows = weights.chunks_exact_mut(columns);
            let scales = scales.chunks_exact(columns / block * 4);
            // A code is moved to the top of a byte, and back with its sign.
            for (shift, (row, scales)) in [4, 0].into_iter().zip(rows.zip(scales)) {
                let runs = row
                    .chunks_exact_mut(block)
                    .zip(codes.chunks_exact(block))
                    .zip(scales.as_chunks().0);
                for ((weights, codes), scale) in runs {
                    let scale = f32::from_le_bytes(*scale);
                    for (weight, &code) in weights.iter_mut().zip(codes) {
                        *weight = f32::from((code << shift).cast_signed() >> 4) * scale;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Weights of a block and of a row.
fn sizes(layout: &Layout) -> Result<(usize, usize)> {
    let block = shape::to_usize(layout.params.block_size.unwrap_or(BLOCK))?;
    Ok((block, shape::to_usize(layout.unit_weights / 2)?))
}

fn scale_for(most: f32) -> f32 {
    match most == 0.0 {
        true => 1.0,
        false => most.max(f32::MIN_POSITIVE) / 7.0,
    }
}

/// Codes and scales of two rows in blocks of `block`. With `FMA` as [`super::rows8::encode_body`].
#[inline(always)]
pub(crate) fn encode_body<const FMA: bool>(
    block: usize,
    weights: Weights<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    for_stored!(weights, |weights: Type| encode_of::<Type, FMA>(
        block, weights, codes, scales
    ));
}

#[inline(always)]
fn encode_of<S: Stored, const FMA: bool>(
    block: usize,
    weights: &[S::Bytes],
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let ahead = Some(std::mem::size_of_val(weights));
    let bit = |row: usize| 4 * row as u32;
    let (upper, lower) = weights.split_at(weights.len() / 2);
    let places = scales.as_chunks_mut().0;
    let (above, below) = places.split_at_mut(places.len() / 2);
    let rows = upper.chunks_exact(block).zip(lower.chunks_exact(block));
    let places = codes
        .chunks_exact_mut(block)
        .zip(above.iter_mut().zip(below));
    for ((upper, lower), (codes, (above, below))) in rows.zip(places) {
        let scales = [upper, lower].map(|weights| scale_for(S::largest(weights)));
        (*above, *below) = (scales[0].to_le_bytes(), scales[1].to_le_bytes());
        if FMA && scales.iter().all(|&scale| Divisor::serves(scale)) {
            let divisors = scales.map(Divisor::new);
            put::<S, false, 2>([upper, lower], codes, ahead, bit, |row, weight| {
                to_int4(divisors[row].divide(weight))
            });
        } else {
            put::<S, false, 2>([upper, lower], codes, ahead, bit, |row, weight| {
                to_int4(weight / scales[row])
            });
        }
    }
}

/// The nearest integer from -8 to 7, ties to even, in four bits.
#[inline(always)]
fn to_int4(x: f32) -> u8 {
    /// In its neighbourhood the step between numbers is 1, and it is a multiple of 16.
    const SHIFT: f32 = 12_582_912.0;
    (x.clamp(-8.0, 7.0) + SHIFT).to_bits() as u8 & 15
}
