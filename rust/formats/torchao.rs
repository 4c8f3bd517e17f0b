//! torchao's 8-bit weights with one scale per row: whole numbers, and E4M3.
//!
//! For a weight of shape \[N, K\] called `m.weight`:
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `m._weight_qdata` | I8 or F8_E4M3 \[N, K\] | q |
//! | `m._weight_scale` | F32 \[N, 1\] | s |
//! | `m._weight_zero_point` | I8 \[N, 1\] | int8 only: z, always 0 here |
//!
//! Encoding, per row, a being the largest |w| and "in the type of the weights" meaning one more rounding
//! to F16 or BF16 where the source is that:
//! - int8: s = a/127.5 in the type of the weights, at least 2⁻²³; q = w·(1/s) in `f32`, to nearest with
//!   ties to even, limited to −128 … 127. So the largest weight is stored as ±128 limited, or just below.
//! - float8: s = a/448 in the type of the weights; q = w/s in `f32`, limited to ±448, to the nearest
//!   E4M3 number with ties to even.
//!
//! Decoding: (q − z)·s, one rounding.
//!
//! Special cases:
//! - A row of zeros: int8 has s = 2⁻²³ and codes 0. float8 has codes 0 and the smallest normal number
//!   as s, as also where s is rounded to 0; the peer divides 0 by 0 there and stores NaN
//!   (pytorch/ao#4713).
//! - Weights that are not finite are refused.
//! - Sources of other types (F64, packed ones) are encoded as F32 is, unless the parameter `dtype`
//!   says F16 or BF16.
//!
//! Peer: torchao 0.18.0 on CPU (`Int8WeightOnlyConfig`, `Float8WeightOnlyConfig` version 2 with their
//! defaults, granularity `PerRow`).

use super::rows8::{self, Codes, Scaling};
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float8::E4M3_MOST;
use crate::kernels::{self, Level};
use crate::shape;

/// One of the two formats.
pub struct TorchAo {
    info: Info,
    codes: Codes,
}

pub static INT8: TorchAo = TorchAo::new("torchao:int8", Codes::Int8);
pub static FLOAT8: TorchAo = TorchAo::new("torchao:float8", Codes::E4m3);

/// Least scale of int8 rows: the distance of 1 and the next number in F32.
const LEAST_SCALE: f32 = f32::EPSILON;

impl TorchAo {
    const fn new(name: &'static str, codes: Codes) -> Self {
        TorchAo {
            info: Info {
                name,
                short: None,
                container: "safetensors",
                exactness: Exactness::Exact,
                peer: "torchao 0.18.0",
                reader: "torchao, transformers, diffusers",
                bits_per_weight: 8.0,
                encodes: Encodes::Always,
            },
            codes,
        }
    }
}

impl Format for TorchAo {
    fn info(&self) -> &'static Info {
        match self.codes {
            Codes::Int8 => &INT8.info,
            Codes::E4m3 => &FLOAT8.info,
        }
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        params.refuse_choices(self.info.name, None)?;
        let &[rows, row_weights] = shape else {
            return Err(Error::format(format!(
                "{}: takes 2 dimensions, got shape {shape:?}",
                self.info.name
            )));
        };
        if row_weights == 0 && rows > 0 {
            return Err(Error::format(format!("{}: rows are empty", self.info.name)));
        }
        let unit_weights = row_weights.max(1);
        let array = |suffix: &'static str, dtype, shape: &[u64], weights, bytes| Component {
            suffix: suffix.into(),
            naming: Naming::Flattened,
            dtype,
            shape: shape.to_vec(),
            span: Span::Blocks { weights, bytes },
        };
        let dtype = match self.codes {
            Codes::Int8 => Dtype::I8,
            Codes::E4m3 => Dtype::F8_E4M3,
        };
        let mut components = vec![
            array("qdata", dtype, shape, 1, 1),
            array("scale", Dtype::F32, &[rows, 1], unit_weights, 4),
        ];
        if self.codes == Codes::Int8 {
            components.push(array("zero_point", Dtype::I8, &[rows, 1], unit_weights, 1));
        }
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components,
            unit_weights,
            statistics: None,
        })
    }

    fn encode(
        &self,
        layout: &Layout,
        _first: u64,
        weights: &[f32],
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let row_weights = shape::to_usize(layout.unit_weights)?;
        let dtype = rows8::compute_type(layout.params.dtype);
        let [codes, scales, zeros, ..] = parts;
        zeros.fill(0);
        let rows = weights
            .chunks_exact(row_weights)
            .zip(codes.chunks_exact_mut(row_weights))
            .zip(scales.as_chunks_mut().0);
        for ((weights, codes), scale) in rows {
            let encoded = encode_row(kernels::level(), self.codes, dtype, weights, codes);
            *scale = encoded.to_le_bytes();
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
        let [codes, scales, zeros, ..] = parts;
        let rows = weights
            .chunks_exact_mut(row_weights)
            .zip(codes.chunks_exact(row_weights))
            .zip(scales.as_chunks().0);
        for (row, ((weights, codes), scale)) in rows.enumerate() {
            let scale = f32::from_le_bytes(*scale);
            let zero = zeros.get(row).copied().unwrap_or(0).cast_signed();
            rows8::decode(kernels::level(), self.codes, zero, scale, codes, weights);
        }
        Ok(())
    }
}

/// Encodes one row of weights of type `dtype` and gives its scale.
pub fn encode_row(
    level: Level,
    kind: Codes,
    dtype: Dtype,
    weights: &[f32],
    codes: &mut [u8],
) -> f32 {
    let largest = rows8::largest(level, weights);
    let (scale, scaling, factor) = match kind {
        Codes::Int8 => {
            let scale = rows8::round_to(dtype, largest / 127.5).max(LEAST_SCALE);
            (scale, Scaling::Product, 1.0 / scale)
        }
        Codes::E4m3 => {
            let scale = rows8::round_to(dtype, largest / E4M3_MOST);
            if scale == 0.0 {
                codes.fill(0);
                return f32::MIN_POSITIVE;
            }
            (scale, Scaling::Quotient(Dtype::F32), scale)
        }
    };
    rows8::encode(level, kind, scaling, factor, weights, codes);
    scale
}
