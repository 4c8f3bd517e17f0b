//! 4-bit floats (E2M1) with a scale for every 16 or 32 weights of a row, in separate arrays, as ModelOpt and
//! compressed-tensors store them.
//!
//! | format | codes | `weight_scale` | scale of the tensor |
//! |---|---|---|---|
//! | `modelopt:nvfp4` | `weight` U8 [.., N, K/2] | F8_E4M3 [.., N, K/16], rows in order (not swizzled) | `weight_scale_2` F32 [] |
//! | `modelopt:mxfp4` | `weight` U8 [.., N, K/2] | U8 [.., N, K/32]: E8M0 | – |
//! | `compressed-tensors:nvfp4` | `weight_packed` U8 [N, K/2] | F8_E4M3 [N, K/16] | `weight_global_scale` F32 \[1\], divided by |
//! | `compressed-tensors:mxfp4` | `weight_packed` U8 [N, K/2] | U8 [N, K/32]: E8M0 | – |
//!
//! A byte holds the code of an even weight in bits 0-3 and of the odd one behind it in bits 4-7. A code
//! is a sign (bit 3) and a magnitude (bits 0-2) of 0, ½, 1, 1½, 2, 3, 4, 6.
//!
//! NVFP4, a being the largest magnitude of the tensor and m that of a block, each operation rounded to
//! `f32` by itself: g = a/2688 (2688 = 6·448); s = m/(6·g), 1 if that is 0, held to 2^−9..448, rounded to
//! E4M3; the code is the nearest to w/(s·g), ties to the even code; −0 is the code of 0. Decoding:
//! value·(s·g). compressed-tensors stores the number g that s is divided by: value·(s/g).
//!
//! MXFP4: the exponent is ⌈log₂(m/6)⌉, at least −127, where the quotient is rounded to `f32`, and so is
//! the logarithm (a quotient just above a power of two counts as that power); it is stored with 127
//! added. The code is the nearest to w/2^exponent, ties to the smaller magnitude. Zeros, also those that
//! the quotient rounds to, are stored as minus zero. Decoding: value·2^exponent.
//!
//! Special cases:
//! - NVFP4, g = 0 (a tensor of zeros, or of the least subnormals): g = 1 and codes of zero. ModelOpt
//!   stores NaN in the scales of such blocks.
//! - NVFP4, s·g = 0 (a < 10^−39): codes of zero. ModelOpt stores codes of 6, or of NaN as 7.
//! - MXFP4 blocks of zeros: exponent −127.
//! - Rows are multiples of 16 or 32; ModelOpt refuses others too.
//! - NVFP4 in blocks of 32 (ModelOpt's W4A8) is decoded, and not encoded, and so is all of compressed-tensors.
//! - Decoding gives code 8 the sign of zero that the peer gives it: none in ModelOpt's NVFP4, minus in others.
//!
//! Peer: ModelOpt 0.47 on CPU (unified export of a layer; `NVFP4QTensor`, `MXFP4QTensor`). The logarithm
//! of MXFP4 is that of a correctly rounded `log2f`; torch's may differ by a unit in the last place, which
//! no quotient was found for that it matters to. ModelOpt gives layers that run as one product (q, k and
//! v; gate and up) one g, made of the largest magnitude of them all; a conversion names such layers
//! (`shared_scale` of its request), and a weight encoded by itself has its own.

use super::fp4_blocks::{self, Rule, Scales};
use super::scaled::{join_magnitudes, most_measured, put_magnitudes, MAGNITUDES, RUN};
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels;
use crate::shape;

/// Blocks of 16 with E4M3 scales.
pub struct NvFp4 {
    info: &'static Info,
    /// Names of the codes and of the scale of the tensor.
    codes: &'static str,
    tensor_scale: &'static str,
    /// Whether the scale of the tensor is stored as what the others are divided by.
    divides: bool,
    /// Whether a code of -0 is decoded as that.
    keeps_sign: bool,
}
/// Blocks of 32 with powers of two.
pub struct MxFp4 {
    info: &'static Info,
    codes: &'static str,
}

pub static NVFP4: NvFp4 = NvFp4 {
    info: &info("modelopt:nvfp4", 4.5),
    codes: "",
    tensor_scale: "weight_scale_2",
    divides: false,
    keeps_sign: false,
};
pub static MXFP4: MxFp4 = MxFp4 {
    info: &info("modelopt:mxfp4", 4.25),
    codes: "",
};
pub static COMPRESSED_NVFP4: NvFp4 = NvFp4 {
    info: &compressed("compressed-tensors:nvfp4", 4.5),
    codes: "weight_packed",
    tensor_scale: "weight_global_scale",
    divides: true,
    keeps_sign: true,
};
pub static COMPRESSED_MXFP4: MxFp4 = MxFp4 {
    info: &compressed("compressed-tensors:mxfp4", 4.25),
    codes: "weight_packed",
};

const fn info(name: &'static str, bits_per_weight: f64) -> Info {
    Info {
        name,
        short: None,
        container: "safetensors",
        exactness: Exactness::Exact,
        peer: "ModelOpt 0.47",
        reader: "weightpack, vLLM, TensorRT-LLM, SGLang",
        bits_per_weight,
        encodes: Encodes::Always,
    }
}

const fn compressed(name: &'static str, bits_per_weight: f64) -> Info {
    Info {
        peer: "compressed-tensors 0.20",
        reader: "transformers, vLLM, SGLang",
        encodes: Encodes::Never,
        ..info(name, bits_per_weight)
    }
}

fn components(
    name: &str,
    codes: &'static str,
    shape: &[u64],
    block: u64,
    scales: Dtype,
) -> Result<Vec<Component>> {
    let [outer @ .., columns] = shape else {
        return Err(Error::format(format!("{name}: takes rows, got a scalar")));
    };
    if outer.is_empty() {
        return Err(Error::format(format!(
            "{name}: takes 2 dimensions or more, got shape {shape:?}"
        )));
    }
    if !columns.is_multiple_of(block) {
        return Err(Error::format(format!(
            "{name}: row of {columns} weights is not a multiple of block_size {block}"
        )));
    }
    let rows_of = |length: u64| [outer, &[length]].concat();
    Ok(vec![
        Component {
            suffix: codes.into(),
            naming: match codes {
                "" => Naming::Appended,
                _ => Naming::Sibling,
            },
            dtype: Dtype::U8,
            shape: rows_of(columns / 2),
            span: Span::Blocks {
                weights: 2,
                bytes: 1,
            },
        },
        Component {
            suffix: "weight_scale".into(),
            naming: Naming::Sibling,
            dtype: scales,
            shape: rows_of(columns / block),
            span: Span::Blocks {
                weights: block,
                bytes: 1,
            },
        },
    ])
}

impl Format for NvFp4 {
    fn info(&self) -> &'static Info {
        self.info
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let block = match params.block_size {
            Some(32) => 32,
            _ => 16,
        };
        params.refuse_choices(self.info.name, Some(block))?;
        let name = self.info.name;
        let mut components = components(name, self.codes, shape, block, Dtype::F8_E4M3)?;
        components.push(Component {
            suffix: self.tensor_scale.into(),
            naming: Naming::Sibling,
            dtype: Dtype::F32,
            shape: if self.divides { vec![1] } else { Vec::new() },
            span: Span::Whole,
        });
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components,
            unit_weights: RUN,
            statistics: Some(MAGNITUDES),
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
        layout.params.tensor_scale = fp4_blocks::tensor_scale(most_measured(statistics));
        Ok(())
    }

    fn join(&self, joined: &mut Vec<u8>, statistics: &[u8]) -> Result<()> {
        join_magnitudes(joined, statistics);
        Ok(())
    }

    fn check_encodes(&self, params: &Params) -> Result<()> {
        self.info.check_encodes(params)?;
        params.refuse_choices(self.info.name, Some(16))
    }

    fn encode(
        &self,
        layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        self.check_encodes(&layout.params)?;
        let tensor_scale = layout.params.tensor_scale;
        let [codes, scales, ..] = parts;
        let rule = Rule::ModelOptNvFp4 { tensor_scale };
        fp4_blocks::encode(kernels::level(), rule, weights, codes, scales);
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
        let size = match layout.params.block_size {
            Some(32) => 32,
            _ => 16,
        };
        let kind = match self.divides {
            false => Scales::Times(layout.params.tensor_scale),
            true => Scales::Over(layout.params.tensor_scale),
        };
        let (level, keeps_sign) = (kernels::level(), self.keeps_sign);
        fp4_blocks::decode(level, size, keeps_sign, kind, codes, scales, weights);
        Ok(())
    }

    fn finds_nonfinite(&self) -> bool {
        true
    }

    fn takes_stored(&self) -> bool {
        true
    }

    fn whole(&self, layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        Ok(vec![(2, layout.params.tensor_scale.to_le_bytes().to_vec())])
    }

    fn tensor_scale(&self) -> Option<usize> {
        Some(2)
    }
}

impl Format for MxFp4 {
    fn info(&self) -> &'static Info {
        self.info
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        params.refuse_choices(self.info.name, Some(32))?;
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: components(self.info.name, self.codes, shape, 32, Dtype::U8)?,
            unit_weights: 32,
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
        self.check_encodes(&layout.params)?;
        let [codes, scales, ..] = parts;
        let rule = Rule::ModelOptMxFp4;
        fp4_blocks::encode(kernels::level(), rule, weights, codes, scales);
        Ok(())
    }

    fn takes_stored(&self) -> bool {
        true
    }

    fn decode(
        &self,
        _layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let [codes, scales, ..] = parts;
        let (level, kind) = (kernels::level(), Scales::E8m0);
        fp4_blocks::decode(level, 32, true, kind, codes, scales, weights);
        Ok(())
    }
}
