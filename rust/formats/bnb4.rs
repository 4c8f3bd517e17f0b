//! bitsandbytes' 4-bit weights: NF4 and FP4, one scale per block of the flattened tensor.
//!
//! For a tensor `w` of n weights in blocks of B (32 … 4096, 64 by default), nb = ⌈n / B⌉:
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `w` | U8 \[⌈n/2⌉, 1\] | two codes per byte, **the first in bits 4-7** |
//! | `w.absmax` | F32 \[nb\], with double quantization U8 \[nb\] | largest magnitude of each block |
//! | `w.nested_absmax` | F32 \[⌈nb/256⌉\] | double quantization: scale of 256 absmax |
//! | `w.nested_quant_map` | F32 \[256\] | double quantization: the dynamic map |
//! | `w.quant_map` | F32 \[16\] | value of each code |
//! | `w.quant_state.bitsandbytes__nf4` | U8 | JSON, as Python's `json.dumps` writes it |
//!
//! Blocks ignore rows; the last one may be short. Codes and tables: [`crate::codebook`].
//!
//! Encoding, in `f32`: a = largest |x| of the block; y = x·(1/max(a, 1e-38)) in whole blocks,
//! y = x / max(a, 1e-38) in a short one; the code is that of the nearest value, a tie taking the
//! lower value. Stored absmax: a in whole blocks, max(a, 1e-38) in a short one. An odd n leaves
//! half a byte, which holds the code of 0. Decoding: value·a, one rounding.
//!
//! Double quantization: o = mean of all absmax, summed in `f64` in order and rounded to `f32`;
//! z = absmax − o; per 256 of them c = largest |z|, y = z·(1/c) limited to ±1, and the code is entry
//! ⌊(y + 1)/2·65535 + ½⌋ (product and sum rounded once) of a table that maps 65536 equal steps of
//! −1 … 1 to the nearest value of the dynamic map. All z zero: codes 0. Decoding: absmax =
//! map\[code\]·c + o, two roundings.
//!
//! Special cases:
//! - A block of zeros: codes of 0 (7 in NF4, 0 in FP4), absmax 0 (1e-38 in a short block).
//! - FP4 has two zeros; (0, 1/384] takes code 8 and (−1/384, 0] code 0, both decode to +0.
//! - Weights that are not finite, if the caller asks for them: with a NaN in a block, absmax is NaN
//!   and every code is the last one in order; with an infinity, absmax is infinite, infinite weights
//!   take the last code and finite ones the code of 0. Either way the block decodes to NaN.
//!   Double quantization refuses them: the mean would make a NaN of every weight.
//!
//! Peer: bitsandbytes 0.50.2 on CPU: `backends/default/ops.py` (`quantize_4bit`), `cpu_ops.cpp`
//! (`quantize_cpu_impl`), `functional.py` (`QuantState`). Differences:
//! - The peer's mean is torch's, whose last bits depend on the number of threads: codes and scales
//!   are equal *given that offset*.
//! - The peer's AVX-512 decoder finds scales by row, which is wrong unless the row is a multiple of
//!   the block size; scales are found by position here, as its other decoders do.
//! - Its CUDA encoder divides differently in short blocks, signs the zeros of FP4 differently and
//!   uses rounded thresholds; the values differ in about one of four million weights.

use std::sync::LazyLock;

use super::{
    bnb4_state, Component, Encodes, Exactness, Format, Info, Layout, Naming, NonFinite, Params,
    Parts, PartsMut, Span, Weights,
};
use crate::codebook::{self, Codebook};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::{self, Level};
use crate::shape;

/// One 4-bit code as a format.
pub struct Bnb4 {
    info: Info,
    codebook: &'static Codebook,
    /// `nf4` or `fp4`, as the JSON has it.
    quant_type: &'static str,
}

pub static NF4: Bnb4 = Bnb4::new("bitsandbytes:nf4", "nf4", &codebook::NF4);
pub static FP4: Bnb4 = Bnb4::new("bitsandbytes:fp4", "fp4", &codebook::FP4);

/// Block sizes that the peer takes.
pub const BLOCK_SIZES: [u64; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];
const DEFAULT_BLOCK_SIZE: u64 = 64;
/// absmax values that share a nested scale.
pub const NESTED_BLOCK: usize = 256;
/// Least absmax that is divided by.
const LEAST_ABSMAX: f32 = 1e-38;
/// Weights that are measured and then coded while they are in the nearest cache; a multiple of
/// every block size.
const RUN: usize = 4096;

impl Bnb4 {
    const fn new(
        name: &'static str,
        quant_type: &'static str,
        codebook: &'static Codebook,
    ) -> Self {
        Bnb4 {
            info: Info {
                name,
                short: Some(quant_type),
                container: "safetensors",
                exactness: Exactness::ExactGiven("nested_offset"),
                peer: "bitsandbytes 0.50.2",
                reader: "bitsandbytes, transformers, diffusers",
                bits_per_weight: 4.5,
                encodes: Encodes::Always,
            },
            codebook,
            quant_type,
        }
    }

    fn state_name(&self) -> String {
        format!("quant_state.bitsandbytes__{}", self.quant_type)
    }
}

fn block_size(layout: &Layout) -> u64 {
    layout.params.block_size.unwrap_or(DEFAULT_BLOCK_SIZE)
}

fn array(suffix: &'static str, dtype: Dtype, shape: Vec<u64>, span: Span) -> Component {
    Component {
        suffix: suffix.into(),
        naming: Naming::Appended,
        dtype,
        shape,
        span,
    }
}

fn run(weights: u64, bytes: u64) -> Span {
    Span::Blocks { weights, bytes }
}

impl Format for Bnb4 {
    fn info(&self) -> &'static Info {
        match self.quant_type {
            "nf4" => &NF4.info,
            _ => &FP4.info,
        }
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let size = params.block_size.unwrap_or(DEFAULT_BLOCK_SIZE);
        if !BLOCK_SIZES.contains(&size) {
            return Err(Error::config(format!(
                "{}: block_size {size} is not one of {BLOCK_SIZES:?}",
                self.info.name
            )));
        }
        let weights = shape::count_weights(shape)?;
        let mut layout = Layout {
            shape: shape.to_vec(),
            weights,
            params: Params {
                block_size: Some(size),
                ..params.clone()
            },
            components: Vec::new(),
            unit_weights: size,
            statistics: None,
        };
        // The peer decodes to these three only.
        if !matches!(params.dtype, Dtype::F16 | Dtype::BF16) {
            layout.params.dtype = Dtype::F32;
        }
        let blocks = weights.div_ceil(size);
        let codes = array("", Dtype::U8, vec![weights.div_ceil(2), 1], run(2, 1));
        layout.components.push(codes);
        if params.double_quant {
            let nested = size * NESTED_BLOCK as u64;
            let nested_blocks = blocks.div_ceil(NESTED_BLOCK as u64);
            layout.unit_weights = nested;
            layout.statistics = Some(run(size, 4));
            layout.components.extend([
                array("absmax", Dtype::U8, vec![blocks], run(size, 1)),
                array(
                    "nested_absmax",
                    Dtype::F32,
                    vec![nested_blocks],
                    run(nested, 4),
                ),
                array("nested_quant_map", Dtype::F32, vec![256], Span::Whole),
            ]);
        } else {
            let absmax = array("absmax", Dtype::F32, vec![blocks], run(size, 4));
            layout.components.push(absmax);
        }
        let state_bytes = bnb4_state::most_bytes(self.quant_type, &layout);
        layout.components.extend([
            array("quant_map", Dtype::F32, vec![16], Span::Whole),
            Component {
                suffix: self.state_name().into(),
                naming: Naming::Appended,
                dtype: Dtype::U8,
                shape: vec![state_bytes as u64],
                span: if params.double_quant {
                    Span::WholeAtMost
                } else {
                    Span::Whole
                },
            },
        ]);
        Ok(layout)
    }

    fn measure(
        &self,
        layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        statistics: &mut [u8],
    ) -> Result<()> {
        let weights = weights.floats()?;
        let size = shape::to_usize(block_size(layout))?;
        measure(
            kernels::level(),
            size,
            weights,
            statistics.as_chunks_mut().0,
        );
        Ok(())
    }

    fn settle(&self, layout: &mut Layout, statistics: &mut [u8]) -> Result<()> {
        if !layout.params.double_quant {
            return Ok(());
        }
        let absmax = statistics.as_chunks().0;
        // From 0: the sum of no numbers is -0.
        let sum = absmax.iter().fold(0.0, |sum, bytes| {
            sum + f64::from(f32::from_le_bytes(*bytes))
        });
        let mean = (sum / absmax.len().max(1) as f64) as f32;
        if !mean.is_finite() {
            return Err(Error::format(format!(
                "{}: double_quant takes finite weights only",
                self.info.name
            ))
            .hint("without double_quant, only the blocks concerned decode to NaN"));
        }
        layout.params.nested_offset = mean;
        Ok(())
    }

    fn encode(
        &self,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
        statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let weights = weights.floats()?;
        let level = kernels::level();
        let size = shape::to_usize(block_size(layout))?;
        let [codes, absmax, nested, ..] = parts;
        if !layout.params.double_quant {
            let runs = weights.chunks(RUN).zip(codes.chunks_mut(RUN / 2));
            let absmax = absmax.as_chunks_mut().0.chunks_mut(RUN / size);
            for ((weights, codes), absmax) in runs.zip(absmax) {
                measure(level, size, weights, absmax);
                encode(level, self.codebook, size, weights, absmax, codes);
            }
            return Ok(());
        }
        let start = shape::to_usize(first / block_size(layout))?;
        let measured = statistics
            .as_chunks()
            .0
            .get(start..start + weights.len().div_ceil(size))
            .ok_or_else(|| Error::config("statistics do not cover the tile"))?;
        encode(level, self.codebook, size, weights, measured, codes);
        let groups = measured
            .chunks(NESTED_BLOCK)
            .zip(absmax.chunks_mut(NESTED_BLOCK))
            .zip(nested.as_chunks_mut().0);
        for ((measured, codes), scale) in groups {
            *scale = encode_absmax(layout.params.nested_offset, measured, codes).to_le_bytes();
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
        let size = shape::to_usize(block_size(layout))?;
        let [codes, absmax, nested, ..] = *parts;
        if !layout.params.double_quant {
            let absmax = absmax.as_chunks().0;
            decode(level, self.codebook, size, codes, absmax, weights);
            return Ok(());
        }
        let groups = weights
            .chunks_mut(size * NESTED_BLOCK)
            .zip(codes.chunks(size * NESTED_BLOCK / 2))
            .zip(absmax.chunks(NESTED_BLOCK))
            .zip(nested.as_chunks().0);
        for (((weights, codes), absmax), scale) in groups {
            let scale = f32::from_le_bytes(*scale);
            let mut decoded = [[0; 4]; NESTED_BLOCK];
            for (decoded, &code) in decoded.iter_mut().zip(absmax) {
                let value = codebook::DYNAMIC[usize::from(code)] * scale;
                *decoded = (value + layout.params.nested_offset).to_le_bytes();
            }
            decode(level, self.codebook, size, codes, &decoded, weights);
        }
        Ok(())
    }

    fn whole(&self, layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        let bytes = |table: &[f32]| table.iter().flat_map(|value| value.to_le_bytes()).collect();
        let state = bnb4_state::write(self.quant_type, layout).into_bytes();
        let map = bytes(&self.codebook.values);
        Ok(if layout.params.double_quant {
            vec![(3, bytes(&codebook::DYNAMIC)), (4, map), (5, state)]
        } else {
            vec![(2, map), (3, state)]
        })
    }

    fn nonfinite(&self) -> NonFinite {
        NonFinite::OnRequest
    }
}

/// absmax of each block of `weights`, as stored. Bits of magnitudes have the order of their values,
/// with infinity and NaN on top.
pub fn measure(level: Level, size: usize, weights: &[f32], absmax: &mut [[u8; 4]]) {
    let done = kernels::measure_4bit(level, size, weights, absmax);
    let blocks = weights[done * size..].chunks(size);
    for (block, absmax) in blocks.zip(&mut absmax[done..]) {
        let most = block
            .iter()
            .fold(0, |most, weight| (weight.to_bits() & 0x7fff_ffff).max(most));
        let mut most = f32::from_bits(most);
        if block.len() < size {
            most = at_least(most);
        }
        *absmax = most.to_le_bytes();
    }
}

/// Codes of `weights`, given absmax as [`measure`] stores it.
pub fn encode(
    level: Level,
    codebook: &Codebook,
    size: usize,
    weights: &[f32],
    absmax: &[[u8; 4]],
    codes: &mut [u8],
) {
    let done = kernels::encode_4bit(level, codebook, LEAST_ABSMAX, size, weights, absmax, codes);
    let blocks = weights[done * size..].chunks(size);
    let codes = codes[done * size / 2..].chunks_mut(size / 2);
    for ((block, codes), absmax) in blocks.zip(codes).zip(&absmax[done..]) {
        let absmax = at_least(f32::from_le_bytes(*absmax));
        let scale = 1.0 / absmax;
        let short = block.len() < size;
        let code = |weight: f32| {
            codebook.code(if short {
                weight / absmax
            } else {
                weight * scale
            })
        };
        for (byte, pair) in codes.iter_mut().zip(block.chunks(2)) {
            let second = pair
                .get(1)
                .map_or_else(|| codebook.code(0.0), |&weight| code(weight));
            *byte = code(pair[0]) << 4 | second;
        }
    }
}

/// Weights of `codes`, given the absmax of each block.
pub fn decode(
    level: Level,
    codebook: &Codebook,
    size: usize,
    codes: &[u8],
    absmax: &[[u8; 4]],
    weights: &mut [f32],
) {
    let done = kernels::decode_4bit(level, &codebook.values, size, codes, absmax, weights);
    let blocks = weights[done * size..].chunks_mut(size);
    let codes = codes[done * size / 2..].chunks(size / 2);
    for ((block, codes), absmax) in blocks.zip(codes).zip(&absmax[done..]) {
        let absmax = f32::from_le_bytes(*absmax);
        for (pair, byte) in block.chunks_mut(2).zip(codes) {
            for (weight, code) in pair.iter_mut().zip([byte >> 4, byte & 15]) {
                *weight = codebook.values[usize::from(code)] * absmax;
            }
        }
    }
}

/// `absmax`, at least the least that is divided by; NaN stays.
fn at_least(absmax: f32) -> f32 {
    if absmax < LEAST_ABSMAX {
        LEAST_ABSMAX
    } else {
        absmax
    }
}

/// Quantizes up to 256 absmax again, and gives their scale.
fn encode_absmax(offset: f32, absmax: &[[u8; 4]], codes: &mut [u8]) -> f32 {
    let centred = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes) - offset;
    let scale = absmax
        .iter()
        .map(centred)
        .fold(0.0f32, |most, z| most.max(z.abs()));
    let inverse = 1.0 / scale;
    for (code, bytes) in codes.iter_mut().zip(absmax) {
        *code = if scale == 0.0 {
            0
        } else {
            NEAREST[nearest_step(centred(bytes) * inverse)]
        };
    }
    scale
}

/// Step of −1 … 1 that `y` falls on. A scale below 2⁻¹²⁸ has an infinite inverse, which may make a
/// NaN of `y`; it takes step 0.
fn nearest_step(y: f32) -> usize {
    let half = (y.clamp(-1.0, 1.0) + 1.0) * 0.5;
    // 24 and 16 bits: exact in `f64`, so that this rounds once, like a fused multiply-add.
    (f64::from(half) * 65535.0 + 0.5) as f32 as usize
}

/// Code of the dynamic map that is nearest to each of 65536 steps from −1 to 1; a step exactly
/// between two values takes the lower.
static NEAREST: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let middle = |code: usize| 0.5 * (codebook::DYNAMIC[code] + codebook::DYNAMIC[code + 1]);
    let mut code = 0;
    (0..=u16::MAX)
        .map(|step| {
            let value = -1.0 + 2.0 * f32::from(step) / 65535.0;
            while code < 255 && middle(code) < value {
                code += 1;
            }
            code as u8
        })
        .collect()
});
