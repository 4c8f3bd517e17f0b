//! bitsandbytes' LLM.int8 weights: one signed byte per weight, one scale per row.
//!
//! For a weight of shape \[N, K\] called `m.weight`:
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `m.weight` | I8 \[N, K\] | q |
//! | `m.SCB` | F32 \[N\] | largest magnitude of each row |
//! | `m.weight_format` | U8 \[\] | 0: row-major |
//!
//! Encoding, per row: every weight is first rounded to f16 (x); a is the largest |x|;
//! q = x·((1/a)·127) in `f32`, to nearest with ties to even; SCB = a. Decoding: (q·SCB)·(1/127) with
//! 1/127 rounded to `f32`, two roundings.
//!
//! Special cases:
//! - A row of zeros (also of weights that f16 rounds to zero): SCB 0, codes 0. The peer converts
//!   NaN to an integer there, which gives the same on x86.
//! - A weight that f16 cannot hold (from 65520 on) is refused. The peer stores SCB = infinity and a
//!   row of zeros, which decodes to NaN.
//! - Weights that are not finite are refused.
//!
//! Peer: bitsandbytes 0.50.2 on CPU (`Int8Params._quantize`, `int8_vectorwise_quant` with threshold
//! 0, `int8_vectorwise_dequant`). A 64-bit source is rounded to f16 once here; torch rounds it
//! twice.

use super::rows8::{self, Codes, Scaling};
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::{self, Level};
use crate::{float, shape};

/// Weights that are widened at a time.
const RUN: usize = 2048;

/// The format; it holds nothing.
pub struct Bnb8;

pub static INT8: Bnb8 = Bnb8;

static INFO: Info = Info {
    name: "bitsandbytes:int8",
    short: None,
    container: "safetensors",
    exactness: Exactness::Exact,
    peer: "bitsandbytes 0.50.2",
    reader: "bitsandbytes, transformers, diffusers",
    bits_per_weight: 8.0,
    encodes: Encodes::Always,
};

/// What a decoded product is multiplied with.
const ONE_127TH: f32 = 1.0 / 127.0;

impl Format for Bnb8 {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        params.refuse_choices(INFO.name, None)?;
        let &[rows, row_weights] = shape else {
            return Err(Error::format(format!(
                "{}: takes 2 dimensions, got shape {shape:?}",
                INFO.name
            )));
        };
        if row_weights == 0 && rows > 0 {
            return Err(Error::format(format!("{}: rows are empty", INFO.name)));
        }
        let unit_weights = row_weights.max(1);
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![
                Component {
                    suffix: "".into(),
                    naming: Naming::Appended,
                    dtype: Dtype::I8,
                    shape: shape.to_vec(),
                    span: Span::Blocks {
                        weights: 1,
                        bytes: 1,
                    },
                },
                Component {
                    suffix: "SCB".into(),
                    naming: Naming::Sibling,
                    dtype: Dtype::F32,
                    shape: vec![rows],
                    span: Span::Blocks {
                        weights: unit_weights,
                        bytes: 4,
                    },
                },
                Component {
                    suffix: "weight_format".into(),
                    naming: Naming::Sibling,
                    dtype: Dtype::U8,
                    shape: Vec::new(),
                    span: Span::Whole,
                },
            ],
            unit_weights,
            statistics: None,
        })
    }

    fn encode(
        &self,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let row_weights = shape::to_usize(layout.unit_weights)?;
        let [codes, scales, ..] = parts;
        let rows = weights
            .chunks_exact(row_weights)
            .zip(codes.chunks_exact_mut(row_weights))
            .zip(scales.as_chunks_mut().0);
        for (row, ((weights, codes), scale)) in rows.enumerate() {
            let most = encode_row(kernels::level(), weights, codes);
            *scale = most.to_le_bytes();
            if !most.is_finite() {
                return Err(overflow(first + (row * row_weights) as u64, weights));
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
        let row_weights = shape::to_usize(layout.unit_weights)?;
        let [codes, scales, ..] = parts;
        let rows = weights
            .chunks_exact_mut(row_weights)
            .zip(codes.chunks_exact(row_weights))
            .zip(scales.as_chunks().0);
        for ((weights, codes), scale) in rows {
            decode_row(kernels::level(), codes, f32::from_le_bytes(*scale), weights);
        }
        Ok(())
    }

    fn whole(&self, _layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        Ok(vec![(2, vec![0])])
    }

    fn rounds_to_16_bits(&self) -> bool {
        true
    }

    fn takes_stored(&self) -> bool {
        true
    }
}

/// Encodes one row and gives the largest magnitude after rounding to f16. If that is not finite,
/// the codes mean nothing.
pub fn encode_row(level: Level, weights: Weights<'_>, codes: &mut [u8]) -> f32 {
    let mut wide = [0f32; RUN];
    let most = match weights {
        Weights::F16(_) => rows8::largest(level, weights),
        // Bits of magnitudes have the order of their values, with infinity and NaN on top.
        _ => f32::from_bits(weights.chunks(RUN).fold(0, |most, run| {
            largest_bits(level, run.widened(level, &mut wide)).max(most)
        })),
    };
    // The peer divides 127 by a tensor, which torch does by way of the reciprocal.
    let scale = if most == 0.0 { 0.0 } else { 1.0 / most * 127.0 };
    if let Weights::F16(_) = weights {
        rows8::encode(level, Codes::Int8, Scaling::Product, scale, weights, codes);
        return most;
    }
    for (run, codes) in weights.chunks(RUN).zip(codes.chunks_mut(RUN)) {
        put_codes(level, scale, run.widened(level, &mut wide), codes);
    }
    most
}

/// The largest bits of magnitudes after rounding to f16.
fn largest_bits(level: Level, weights: &[f32]) -> u32 {
    let (done, most) = kernels::most_f16(level, weights);
    weights[done..].iter().fold(most, |most, &weight| {
        (float::through_f16(weight).to_bits() & 0x7fff_ffff).max(most)
    })
}

fn put_codes(level: Level, scale: f32, weights: &[f32], codes: &mut [u8]) {
    let done = kernels::encode_int8(level, scale, weights, codes);
    for (code, &weight) in codes[done..].iter_mut().zip(&weights[done..]) {
        let rounded = (float::through_f16(weight) * scale).round_ties_even();
        *code = (rounded as i8).cast_unsigned();
    }
}

/// Decodes one row.
pub fn decode_row(level: Level, codes: &[u8], scale: f32, weights: &mut [f32]) {
    let done = kernels::decode_int8(level, codes, scale, ONE_127TH, weights);
    for (weight, &code) in weights[done..].iter_mut().zip(&codes[done..]) {
        *weight = f32::from(code.cast_signed()) * scale * ONE_127TH;
    }
}

fn overflow(first: u64, weights: Weights<'_>) -> Error {
    let index = (0..weights.len())
        .find(|&index| !float::through_f16(weights.get(index)).is_finite())
        .unwrap_or(0);
    Error::format(format!(
        "{}: weight {} at index {} does not fit in f16, which this format rounds to first",
        INFO.name,
        weights.get(index),
        first + index as u64
    ))
    .hint("keep this tensor in source precision, or choose another format")
}
