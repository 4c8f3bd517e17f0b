//! torchao's weights of one byte each: whole numbers of 1 to 8 bits, and E4M3.
//!
//! For a weight of shape \[N, K\] called `m.weight`, of type T (F32, F16 or BF16), and groups of g weights of a
//! row:
//!
//! | format | `m._weight_qdata` \[N, K\] | `m._weight_scale` | `m._weight_zero_point` |
//! |---|---|---|---|
//! | `torchao:int8` | I8: q | F32 \[N, K/g\]: s | I8 \[N, K/g\]: z, always 0 here |
//! | `torchao:intx1` … `torchao:intx8` | I8: q, from −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1, not packed | T \[N, K/g\]: s | I8 \[N, K/g\]: z, always 0 here |
//! | `torchao:float8` | F8_E4M3: q | F32 \[N, K/g\]: s | – |
//! | `torchao:float8_tensor` | F8_E4M3: q | F32 \[1, 1\]: s | – |
//!
//! g is what `block_size` says, and divides K; without it, a group is a row.
//!
//! Encoding, a being the largest |w| of what shares a scale, and "in T" meaning one more rounding to T:
//! - int8: s = a/127.5 in T, at least 2⁻²³; q = w·(1/s) in `f32`, to nearest with ties to even, limited to
//!   −128 … 127. So the largest weight is stored as ±128 limited, or just below.
//! - intx of b bits: s = a/((2ᵇ − 1)/2) in T, at least the smallest normal number of T; 1/s in T; q = w·(1/s)
//!   in T, to nearest with ties to even, limited.
//! - float8: s = a/448 in T; q = w/s in `f32`, limited to ±448, to the nearest E4M3 number with ties to even.
//!
//! Decoding: (q − z)·s, one rounding.
//!
//! Special cases:
//! - Zeros only: integers have the least scale and codes 0. Groups of float8 have codes 0 and the smallest normal
//!   number as s, as also where s is rounded to 0; a float8 tensor has s = 1. The peer divides 0 by 0 there and
//!   stores NaN (pytorch/ao#4713).
//! - intx1 is decoded only: the peer's rule gives code 0 to all weights but some of the largest.
//! - Weights that are not finite are refused.
//! - Sources of other types (F64, packed ones) are encoded as F32 is, unless the parameter `dtype`
//!   says F16 or BF16.
//! - Stored scales of intx may also have another type than the weight.
//!
//! Peer: torchao 0.18.0 on CPU (`Int8WeightOnlyConfig`, `IntxWeightOnlyConfig`, `Float8WeightOnlyConfig`
//! version 2 with their defaults but for granularity: `PerRow` or `PerAxis(0)`, `PerGroup`, `PerTensor`).

use super::rows8::{self, Codes, Grouping, Scaling};
use super::{
    scaled, Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut,
    Span, Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float8::E4M3_MOST;
use crate::kernels::{self, Level};
use crate::shape;

/// One of the formats.
pub struct TorchAo {
    info: &'static Info,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Int8,
    /// Whole numbers of so many bits.
    Intx(u8),
    Float8,
    /// E4M3 with one scale for the tensor.
    Float8Tensor,
}

const fn format(info: &'static Info, kind: Kind) -> TorchAo {
    TorchAo { info, kind }
}

pub static INT8: TorchAo = format(&info("torchao:int8"), Kind::Int8);
pub static INTX: [TorchAo; 8] = [
    format(
        &Info {
            encodes: Encodes::Never,
            ..info("torchao:intx1")
        },
        Kind::Intx(1),
    ),
    format(&info("torchao:intx2"), Kind::Intx(2)),
    format(&info("torchao:intx3"), Kind::Intx(3)),
    format(&info("torchao:intx4"), Kind::Intx(4)),
    format(&info("torchao:intx5"), Kind::Intx(5)),
    format(&info("torchao:intx6"), Kind::Intx(6)),
    format(&info("torchao:intx7"), Kind::Intx(7)),
    format(&info("torchao:intx8"), Kind::Intx(8)),
];
pub static FLOAT8: TorchAo = format(&info("torchao:float8"), Kind::Float8);
pub static FLOAT8_TENSOR: TorchAo = format(&info("torchao:float8_tensor"), Kind::Float8Tensor);

/// Least scale of int8: the distance of 1 and the next number in F32.
const LEAST_SCALE: f32 = f32::EPSILON;

const fn info(name: &'static str) -> Info {
    Info {
        name,
        short: None,
        container: "safetensors",
        exactness: Exactness::Exact,
        peer: "torchao 0.18.0",
        reader: "torchao, transformers, diffusers",
        bits_per_weight: 8.0,
        encodes: Encodes::Always,
    }
}

impl TorchAo {
    /// How integers are encoded in groups of `size`, from weights of type `dtype`.
    fn grouping(&self, size: usize, dtype: Dtype) -> Option<Grouping> {
        let bits = match self.kind {
            Kind::Int8 => 8,
            Kind::Intx(bits) => bits,
            Kind::Float8 | Kind::Float8Tensor => return None,
        };
        let is_narrow = self.kind != Kind::Int8;
        let dtype = rows8::compute_type(dtype);
        let half = f32::from(1u8 << (bits - 1));
        Some(Grouping {
            size,
            dtype,
            is_narrow,
            divisor: half - 0.5,
            least: match is_narrow {
                true => scaled::least_normal(dtype),
                false => LEAST_SCALE,
            },
            low: -half,
            high: half - 1.0,
        })
    }
}

impl Format for TorchAo {
    fn info(&self) -> &'static Info {
        self.info
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let name = self.info.name;
        let &[rows, columns] = shape else {
            return Err(Error::format(format!(
                "{name}: takes 2 dimensions, got shape {shape:?}"
            )));
        };
        if columns == 0 && rows > 0 {
            return Err(Error::format(format!("{name}: rows are empty")));
        }
        let is_whole = self.kind == Kind::Float8Tensor;
        params.refuse_choices(name, params.block_size.filter(|_| !is_whole))?;
        let size = params.block_size.unwrap_or(columns.max(1));
        if size == 0 {
            return Err(Error::config(format!("{name}: block_size is 0")));
        }
        if !columns.is_multiple_of(size) {
            return Err(Error::format(format!(
                "{name}: row of {columns} weights is not a multiple of block_size {size}"
            )));
        }
        let array = |suffix: &'static str, dtype, shape: &[u64], span| Component {
            suffix: suffix.into(),
            naming: Naming::Flattened,
            dtype,
            shape: shape.to_vec(),
            span,
        };
        let blocks = |weights, bytes| Span::Blocks { weights, bytes };
        let groups = [rows, columns / size];
        let components = match self.grouping(0, params.dtype) {
            Some(grouping) => {
                let dtype = grouping.scale_type();
                let scales = blocks(size, dtype.byte_len(&[1])?);
                vec![
                    array("qdata", Dtype::I8, shape, blocks(1, 1)),
                    array("scale", dtype, &groups, scales),
                    array("zero_point", Dtype::I8, &groups, blocks(size, 1)),
                ]
            }
            None => {
                let (groups, scales) = match is_whole {
                    true => ([1, 1], Span::Whole),
                    false => (groups, blocks(size, 4)),
                };
                vec![
                    array("qdata", Dtype::F8_E4M3, shape, blocks(1, 1)),
                    array("scale", Dtype::F32, &groups, scales),
                ]
            }
        };
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: Params {
                block_size: params.block_size.filter(|&size| size != columns),
                ..params.clone()
            },
            components,
            unit_weights: match is_whole {
                true => scaled::RUN,
                false => columns.max(1),
            },
            statistics: is_whole.then_some(scaled::MAGNITUDES),
        })
    }

    fn measure(
        &self,
        _layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        statistics: &mut [u8],
    ) -> Result<()> {
        match scaled::put_magnitudes(weights, statistics) {
            true => Ok(()),
            false => Err(self.not_finite()),
        }
    }

    fn settle(&self, layout: &mut Layout, statistics: &mut [u8]) -> Result<()> {
        if self.kind == Kind::Float8Tensor {
            let dtype = rows8::compute_type(layout.params.dtype);
            let scale = rows8::round_to(dtype, scaled::most_measured(statistics) / E4M3_MOST);
            // Weights too small for a scale round to zero by themselves.
            layout.params.tensor_scale = if scale > 0.0 { scale } else { 1.0 };
        }
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
        let level = kernels::level();
        let [codes, scales, zeros, ..] = parts;
        if let Some(grouping) = self.grouping(group_weights(layout)?, layout.params.dtype) {
            zeros.fill(0);
            rows8::encode_groups(level, &grouping, weights, codes, scales);
        } else if self.kind == Kind::Float8Tensor {
            let scale = layout.params.tensor_scale;
            let scaling = Scaling::Quotient(Dtype::F32);
            rows8::encode(level, Codes::E4m3, scaling, scale, weights, codes);
        } else {
            let size = group_weights(layout)?;
            let dtype = rows8::compute_type(layout.params.dtype);
            let groups = weights
                .chunks_exact(size)
                .zip(codes.chunks_exact_mut(size))
                .zip(scales.as_chunks_mut().0);
            for ((weights, codes), scale) in groups {
                *scale = encode_e4m3(level, dtype, weights, codes).to_le_bytes();
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
        let level = kernels::level();
        let [codes, scales, zeros, ..] = parts;
        match self.kind {
            Kind::Int8 | Kind::Intx(_) => {
                let size = group_weights(layout)?;
                let dtype = layout.components.get(1).map_or(Dtype::F32, |one| one.dtype);
                rows8::decode_groups(level, size, dtype, codes, scales, zeros, weights);
            }
            Kind::Float8Tensor => {
                let scale = layout.params.tensor_scale;
                rows8::decode(level, Codes::E4m3, 0, scale, codes, weights);
            }
            Kind::Float8 => {
                let size = group_weights(layout)?;
                let groups = weights
                    .chunks_exact_mut(size)
                    .zip(codes.chunks_exact(size))
                    .zip(scales.as_chunks().0);
                for ((weights, codes), scale) in groups {
                    let scale = f32::from_le_bytes(*scale);
                    rows8::decode(level, Codes::E4m3, 0, scale, codes, weights);
                }
            }
        }
        Ok(())
    }

    fn whole(&self, layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        Ok(match self.kind {
            Kind::Float8Tensor => vec![(1, layout.params.tensor_scale.to_le_bytes().to_vec())],
            _ => Vec::new(),
        })
    }

    fn tensor_scale(&self) -> Option<usize> {
        (self.kind == Kind::Float8Tensor).then_some(1)
    }

    fn finds_nonfinite(&self) -> bool {
        self.kind == Kind::Float8Tensor
    }

    fn takes_stored(&self) -> bool {
        true
    }
}

/// Weights that share a scale, where those of the tensor do not.
fn group_weights(layout: &Layout) -> Result<usize> {
    shape::to_usize(layout.params.block_size.unwrap_or(layout.unit_weights))
}

/// Encodes weights of type `dtype` that share a scale as E4M3, and gives the scale.
fn encode_e4m3(level: Level, dtype: Dtype, weights: Weights<'_>, codes: &mut [u8]) -> f32 {
    let scale = rows8::round_to(dtype, rows8::largest(level, weights) / E4M3_MOST);
    if scale == 0.0 {
        codes.fill(0);
        return f32::MIN_POSITIVE;
    }
    let scaling = Scaling::Quotient(Dtype::F32);
    rows8::encode(level, Codes::E4m3, scaling, scale, weights, codes);
    scale
}
