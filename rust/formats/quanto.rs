//! optimum-quanto's 8-bit weights with one scale per row: whole numbers, and E4M3.
//!
//! For a weight of shape \[N, …\] called `m.weight`, of type T (F32, F16 or BF16), a row being all that
//! shares the first index:
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `m.weight._data` | I8 or F8_E4M3, that of the weight | q |
//! | `m.weight._scale` | T \[N, 1, …\], \[\] where N is 1 | s |
//! | `m.input_scale`, `m.output_scale` | T \[\] | 1: activations are not quantized |
//!
//! Encoding, per row, a being the largest |w|, each step rounded to T: s = a/127 (int8) or a/448
//! (float8); q = w/s, to the nearest whole number limited to −128 … 127, or to the nearest E4M3 number
//! limited to ±448; both with ties to even. Decoding: q·s, one rounding.
//!
//! Special cases:
//! - A row of zeros: scale 0, codes 0. For float8 the peer divides 0 by 0 and stores NaN.
//! - Where s is rounded to 0 and a is not 0 (F16): weights get the largest code of their sign, zeros code
//!   0. The row decodes to zeros.
//! - Weights that are not finite are refused.
//! - Sources of other types (F64, packed ones) are encoded as F32 is, unless the parameter `dtype`
//!   says F16 or BF16.
//!
//! Peer: optimum-quanto 0.2.7 on CPU (`qint8`, `qfloat8`, axis 0). Its int4 and int2 are in `quanto_bits`.

use super::rows8::{self, Codes, Scaling};
use super::scaled::read_scale;
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float8::E4M3_MOST;
use crate::kernels::{self, Level};
use crate::shape;

/// One of the two formats.
pub struct Quanto {
    info: Info,
    codes: Codes,
}

pub static INT8: Quanto = Quanto::new("quanto:int8", Codes::Int8);
pub static FLOAT8: Quanto = Quanto::new("quanto:float8", Codes::E4m3);

impl Quanto {
    const fn new(name: &'static str, codes: Codes) -> Self {
        Quanto {
            info: Info {
                name,
                short: None,
                container: "safetensors",
                exactness: Exactness::Exact,
                peer: "optimum-quanto 0.2.7",
                reader: "optimum-quanto, diffusers",
                bits_per_weight: 8.0,
                encodes: Encodes::Always,
            },
            codes,
        }
    }
}

impl Format for Quanto {
    fn info(&self) -> &'static Info {
        match self.codes {
            Codes::Int8 => &INT8.info,
            Codes::E4m3 => &FLOAT8.info,
        }
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        params.refuse_choices(self.info.name, None)?;
        let [rows, inner @ ..] = shape else {
            return Err(Error::format(format!(
                "{}: is given no rows",
                self.info.name
            )));
        };
        let row_weights = shape::count_weights(inner)?;
        if inner.is_empty() || row_weights == 0 {
            return Err(Error::format(format!(
                "{}: takes rows of weights, got shape {shape:?}",
                self.info.name
            )));
        }
        let scale_type = rows8::compute_type(params.dtype);
        let scale_bytes = scale_type.byte_len(&[1])?;
        let scale_shape = match rows {
            1 => Vec::new(),
            rows => [*rows].into_iter().chain(inner.iter().map(|_| 1)).collect(),
        };
        let codes = match self.codes {
            Codes::Int8 => Dtype::I8,
            Codes::E4m3 => Dtype::F8_E4M3,
        };
        let activation = |suffix: &'static str| Component {
            suffix: suffix.into(),
            naming: Naming::Sibling,
            dtype: scale_type,
            shape: Vec::new(),
            span: Span::Whole,
        };
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![
                Component {
                    suffix: "_data".into(),
                    naming: Naming::Appended,
                    dtype: codes,
                    shape: shape.to_vec(),
                    span: Span::Blocks {
                        weights: 1,
                        bytes: 1,
                    },
                },
                Component {
                    suffix: "_scale".into(),
                    naming: Naming::Appended,
                    dtype: scale_type,
                    shape: scale_shape,
                    span: Span::Blocks {
                        weights: row_weights,
                        bytes: scale_bytes,
                    },
                },
                activation("input_scale"),
                activation("output_scale"),
            ],
            unit_weights: row_weights,
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
        let row_weights = shape::to_usize(layout.unit_weights)?;
        let dtype = rows8::compute_type(layout.params.dtype);
        let scale_bytes = shape::to_usize(dtype.byte_len(&[1])?)?;
        let [codes, scales, ..] = parts;
        let rows = weights
            .chunks_exact(row_weights)
            .zip(codes.chunks_exact_mut(row_weights))
            .zip(scales.chunks_exact_mut(scale_bytes));
        for ((weights, codes), place) in rows {
            let scale = encode_row(kernels::level(), self.codes, dtype, weights, codes);
            rows8::put_number(dtype, scale, place);
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
        let dtype = rows8::compute_type(layout.params.dtype);
        let scale_bytes = shape::to_usize(dtype.byte_len(&[1])?)?;
        let [codes, scales, ..] = parts;
        let rows = weights
            .chunks_exact_mut(row_weights)
            .zip(codes.chunks_exact(row_weights))
            .zip(scales.chunks_exact(scale_bytes));
        for ((weights, codes), place) in rows {
            let scale = read_scale(dtype, place);
            rows8::decode(kernels::level(), self.codes, 0, scale, codes, weights);
        }
        Ok(())
    }

    fn takes_stored(&self) -> bool {
        true
    }

    fn whole(&self, layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        let dtype = rows8::compute_type(layout.params.dtype);
        let mut one = vec![0; shape::to_usize(dtype.byte_len(&[1])?)?];
        rows8::put_number(dtype, 1.0, &mut one);
        Ok(vec![(2, one.clone()), (3, one)])
    }
}

/// Encodes one row of weights of type `dtype` and gives its scale.
pub fn encode_row(
    level: Level,
    kind: Codes,
    dtype: Dtype,
    weights: Weights<'_>,
    codes: &mut [u8],
) -> f32 {
    let most = match kind {
        Codes::Int8 => 127.0,
        Codes::E4m3 => E4M3_MOST,
    };
    let scale = rows8::round_to(dtype, rows8::largest(level, weights) / most);
    if scale == 0.0 {
        for (index, code) in codes.iter_mut().enumerate() {
            *code = code_without_scale(kind, weights.get(index));
        }
    } else {
        let scaling = Scaling::Quotient(dtype);
        rows8::encode(level, kind, scaling, scale, weights, codes);
    }
    scale
}

/// The code of `weight/0`, limited; 0 for zeros.
fn code_without_scale(kind: Codes, weight: f32) -> u8 {
    let (positive, negative) = match kind {
        Codes::Int8 => (0x7f, 0x80),
        Codes::E4m3 => (0x7e, 0xfe),
    };
    if weight > 0.0 {
        positive
    } else if weight < 0.0 {
        negative
    } else {
        0
    }
}
