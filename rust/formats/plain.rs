//! Weights stored as plain floats: F32, F16, BF16; F64 is decoded only.
//!
//! Layout: one little-endian element per weight, rows in order. Encoding rounds once, to nearest
//! with ties to even; F16 overflows to infinity; NaN stays NaN (quiet). Decoding is exact, but for
//! F64, which is narrowed to `f32` (to odd on the way to 16 bits, so that there is one rounding in
//! effect). The bytes are those of safetensors and of the GGUF types of the same name.
//!
//! Peers: torch 2.13 (`Tensor.to`), gguf-py 0.19 (`quants.py`: `BF16`). A signalling NaN is the one
//! difference: it becomes quiet here.

use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, NonFinite, Params, Parts,
    PartsMut, Span, Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::{float, shape};

/// A storage type as a format.
pub struct Plain {
    info: Info,
    dtype: Dtype,
    bytes: u64,
}

pub static F32: Plain = Plain::new("f32", Dtype::F32, 4);
pub static F16: Plain = Plain::new("f16", Dtype::F16, 2);
pub static BF16: Plain = Plain::new("bf16", Dtype::BF16, 2);
/// Not in the table of formats: read, never written.
pub static F64: Plain = Plain::new("f64", Dtype::F64, 8);

impl Plain {
    const fn new(name: &'static str, dtype: Dtype, bytes: u64) -> Self {
        Plain {
            info: Info {
                name,
                short: None,
                container: "any",
                exactness: Exactness::Exact,
                peer: "torch 2.13",
                reader: "everything",
                bits_per_weight: 8.0 * bytes as f64,
                encodes: Encodes::Always,
            },
            dtype,
            bytes,
        }
    }
}

impl Format for Plain {
    fn info(&self) -> &'static Info {
        match self.dtype {
            Dtype::F32 => &F32.info,
            Dtype::F16 => &F16.info,
            Dtype::BF16 => &BF16.info,
            _ => &F64.info,
        }
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        params.refuse_choices(self.info.name, None)?;
        self.dtype.byte_len(shape)?;
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![Component {
                suffix: "".into(),
                naming: Naming::Appended,
                dtype: self.dtype,
                shape: shape.to_vec(),
                span: Span::Blocks {
                    weights: 1,
                    bytes: self.bytes,
                },
            }],
            unit_weights: 1,
            statistics: None,
        })
    }

    fn encode(
        &self,
        _layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        if self.dtype == Dtype::F64 {
            return Err(Error::unsupported("f64 is read and never written"));
        }
        float::narrow(self.dtype, weights.floats()?, parts[0])
    }

    fn decode(
        &self,
        _layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        float::widen(self.dtype, parts[0], weights, false)
    }

    fn decode_to_odd(
        &self,
        _layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        float::widen(self.dtype, parts[0], weights, true)
    }

    fn rounds_to_16_bits(&self) -> bool {
        matches!(self.dtype, Dtype::F16 | Dtype::BF16)
    }

    fn plain(&self) -> Option<Dtype> {
        Some(self.dtype)
    }

    fn nonfinite(&self) -> NonFinite {
        NonFinite::Stored
    }
}
