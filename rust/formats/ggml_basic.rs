//! GGML's basic block types: 32 weights share one scale (and, in the `_1` types, one minimum).
//!
//! A row is a whole number of blocks. All fields are little-endian, f16 is IEEE half. "Split
//! nibbles" below: byte j holds code j in bits 0-3 and code j + 16 in bits 4-7.
//!
//! | type | bytes | fields at | decodes to |
//! |---|---|---|---|
//! | Q4_0 | 18 | d f16 @0, 16 bytes of split nibbles @2 | (q − 8)·d |
//! | Q4_1 | 20 | d f16 @0, m f16 @2, split nibbles @4 | q·d + m |
//! | Q5_0 | 22 | d f16 @0, high bits u32 @2 (bit i is bit 4 of code i), split nibbles @6 | (q − 16)·d |
//! | Q5_1 | 24 | d f16 @0, m f16 @2, high bits u32 @4, split nibbles @8 | q·d + m |
//! | Q8_0 | 34 | d f16 @0, 32 signed bytes @2 | q·d |
//!
//! Encoding, in `f32`, each operation rounded by itself:
//! - Q4_0, Q5_0: v is the first weight with the largest magnitude, d = v / −8 (−16),
//!   q = min(15 (31), trunc(x·(1/d) + 8.5 (16.5))).
//! - Q4_1, Q5_1: m is the smallest weight, d = (largest − m) / 15 (31),
//!   q = min(15 (31), trunc((x − m)·(1/d) + 0.5)).
//! - Q8_0: d = largest magnitude / 127, q = x·(1/d), ties away from zero.
//!
//! With importance, scales are searched instead ([`super::ggml_search`]), each weight counting
//! importance·√(mean of x² over the row + x²): Q4_0 and Q5_0 by a symmetric fit with 8 (16) codes below
//! zero, Q4_1 and Q5_1 by an affine fit with codes to 15 (31). The codes are those of the search; d and m
//! are rounded for storage only. A block of zeros then has d = +0 and, in Q4_0 and Q5_0, codes of 0.
//! Q8_0 ignores importance.
//!
//! 1/d is taken of the unrounded d; d and m are rounded to f16 for storage only. Decoding rounds
//! the product, then the sum.
//!
//! Special cases:
//! - d = 0: 1/d is replaced by 0, so q is 8, 16 or 0. A block of zeros of either sign stores d = −0
//!   in Q4_0 and Q5_0 (0 / −8), +0 elsewhere.
//! - d so small (2⁻¹²⁸ and below) that 1/d is infinite: q as for d = 0, so the block decodes to
//!   zeros (to m in the `_1` types). The peers leave this case undefined.
//! - d or m beyond the f16 range is stored as infinity, as the peers do; a difference of extremes
//!   beyond the f32 range gives d infinite and codes of 0.
//! - Weights that are not finite are refused by the caller; what they would give is the same on
//!   every processor, and means nothing.
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`quantize_row_*_ref`, `quantize_row_*_impl`,
//! `dequantize_row_*`), built without fused multiply-add. gguf-py 0.19 gives the same bytes, except for a block of zeros that opens
//! with a negative one in Q4_0 and Q5_0, where its d is +0 and ggml's (followed here) is −0; and
//! except for the sign of m where m is a zero of either sign: the first one's here and in ggml.

use super::blocks::{
    for_each_decoded, for_each_encoded, half_at, put_half, Block, Blocks, Weighing, GGML,
};
use super::ggml_search::{
    affine_codes, fit_affine_runs, fit_symmetric_runs, symmetric_codes, AffineSearch, Fit, Weigh,
};
use super::Info;
use crate::dtype::Dtype;
use crate::kernels::{self, Level};

/// Weights per block.
const WEIGHTS: usize = 32;
/// Bytes of split nibbles.
const HALF: usize = WEIGHTS / 2;

/// 32 codes of 4 bits, symmetric.
pub struct Q4_0;
/// 32 codes of 4 bits above a minimum.
pub struct Q4_1;
/// 32 codes of 5 bits, symmetric.
pub struct Q5_0;
/// 32 codes of 5 bits above a minimum.
pub struct Q5_1;
/// 32 codes of 8 bits, symmetric.
pub struct Q8_0;

pub static Q4_0_FORMAT: Blocks<Q4_0> = Blocks::new();
pub static Q4_1_FORMAT: Blocks<Q4_1> = Blocks::new();
pub static Q5_0_FORMAT: Blocks<Q5_0> = Blocks::new();
pub static Q5_1_FORMAT: Blocks<Q5_1> = Blocks::new();
pub static Q8_0_FORMAT: Blocks<Q8_0> = Blocks::new();

const fn info(name: &'static str, short: &'static str, bytes: usize) -> Info {
    Info {
        name,
        short: Some(short),
        peer: "gguf-py 0.19, ggml 0.25.3",
        reader: "llama.cpp, gguf-py, diffusers, transformers",
        bits_per_weight: 8.0 * bytes as f64 / WEIGHTS as f64,
        ..GGML
    }
}

impl Block for Q4_0 {
    const INFO: Info = info("gguf:q4_0", "q4_0", Self::BYTES);
    const DTYPE: Dtype = Dtype::Q4_0;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 2 + HALF;
    const WEIGHING: Weighing = Weighing::ByRow;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_q4_0(level, weights, blocks);
        for_each_encoded::<WEIGHTS, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let d = extreme(weights) / -8.0;
            put_half(block, 0, d);
            let codes = codes(weights, 0.0, reciprocal(d), 8.5, 15);
            put_nibbles(block, 2, &codes);
        });
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        let search = |weigh: Weigh<'_>, weights: &[f32], fits: &mut [Fit]| {
            fit_symmetric_runs::<WEIGHTS>(level, 8, weigh, weights, fits);
        };
        encode_row::<{ Self::BYTES }>(
            weights,
            importance,
            blocks,
            search,
            |weights, fit, block| {
                put_half(block, 0, fit.scale);
                put_nibbles(block, 2, &symmetric_codes(8, weights, fit));
            },
        );
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q4_0(level, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            let codes = nibbles_at(block, 2);
            for (weight, code) in weights.iter_mut().zip(codes) {
                *weight = (f32::from(code) - 8.0) * d;
            }
        });
    }
}

impl Block for Q4_1 {
    const INFO: Info = info("gguf:q4_1", "q4_1", Self::BYTES);
    const DTYPE: Dtype = Dtype::Q4_1;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 4 + HALF;
    const WEIGHING: Weighing = Weighing::ByRow;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_q4_1(level, weights, blocks);
        for_each_encoded::<WEIGHTS, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let (least, most) = range(weights);
            let d = (most - least) / 15.0;
            put_half(block, 0, d);
            put_half(block, 2, least);
            let codes = codes(weights, least, reciprocal(d), 0.5, 15);
            put_nibbles(block, 4, &codes);
        });
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        let search = |weigh: Weigh<'_>, weights: &[f32], fits: &mut [Fit]| {
            let tries = AffineSearch::with_importance(15);
            fit_affine_runs::<WEIGHTS>(level, &tries, weigh, weights, fits);
        };
        encode_row::<{ Self::BYTES }>(
            weights,
            importance,
            blocks,
            search,
            |weights, fit, block| {
                put_half(block, 0, fit.scale);
                put_half(block, 2, -fit.min);
                put_nibbles(block, 4, &affine_codes(15, weights, fit));
            },
        );
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q4_1(level, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let (d, m) = (half_at(block, 0), half_at(block, 2));
            let codes = nibbles_at(block, 4);
            for (weight, code) in weights.iter_mut().zip(codes) {
                *weight = f32::from(code) * d + m;
            }
        });
    }
}

impl Block for Q5_0 {
    const INFO: Info = info("gguf:q5_0", "q5_0", Self::BYTES);
    const DTYPE: Dtype = Dtype::Q5_0;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 6 + HALF;
    const WEIGHING: Weighing = Weighing::ByRow;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_q5_0(level, weights, blocks);
        for_each_encoded::<WEIGHTS, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let d = extreme(weights) / -16.0;
            put_half(block, 0, d);
            let codes = codes(weights, 0.0, reciprocal(d), 16.5, 31);
            put_high_bits(block, 2, &codes);
            put_nibbles(block, 6, &codes);
        });
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        let search = |weigh: Weigh<'_>, weights: &[f32], fits: &mut [Fit]| {
            fit_symmetric_runs::<WEIGHTS>(level, 16, weigh, weights, fits);
        };
        encode_row::<{ Self::BYTES }>(
            weights,
            importance,
            blocks,
            search,
            |weights, fit, block| {
                let codes = symmetric_codes(16, weights, fit);
                put_half(block, 0, fit.scale);
                put_high_bits(block, 2, &codes);
                put_nibbles(block, 6, &codes);
            },
        );
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q5_0(level, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            let codes = with_high_bits(nibbles_at(block, 6), block, 2);
            for (weight, code) in weights.iter_mut().zip(codes) {
                *weight = (f32::from(code) - 16.0) * d;
            }
        });
    }
}

impl Block for Q5_1 {
    const INFO: Info = info("gguf:q5_1", "q5_1", Self::BYTES);
    const DTYPE: Dtype = Dtype::Q5_1;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 8 + HALF;
    const WEIGHING: Weighing = Weighing::ByRow;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_q5_1(level, weights, blocks);
        for_each_encoded::<WEIGHTS, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let (least, most) = range(weights);
            let d = (most - least) / 31.0;
            put_half(block, 0, d);
            put_half(block, 2, least);
            let codes = codes(weights, least, reciprocal(d), 0.5, 31);
            put_high_bits(block, 4, &codes);
            put_nibbles(block, 8, &codes);
        });
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        let search = |weigh: Weigh<'_>, weights: &[f32], fits: &mut [Fit]| {
            let tries = AffineSearch::with_importance(31);
            fit_affine_runs::<WEIGHTS>(level, &tries, weigh, weights, fits);
        };
        encode_row::<{ Self::BYTES }>(
            weights,
            importance,
            blocks,
            search,
            |weights, fit, block| {
                let codes = affine_codes(31, weights, fit);
                put_half(block, 0, fit.scale);
                put_half(block, 2, -fit.min);
                put_high_bits(block, 4, &codes);
                put_nibbles(block, 8, &codes);
            },
        );
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q5_1(level, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let (d, m) = (half_at(block, 0), half_at(block, 2));
            let codes = with_high_bits(nibbles_at(block, 8), block, 4);
            for (weight, code) in weights.iter_mut().zip(codes) {
                *weight = f32::from(code) * d + m;
            }
        });
    }
}

impl Block for Q8_0 {
    const INFO: Info = info("gguf:q8_0", "q8_0", Self::BYTES);
    const DTYPE: Dtype = Dtype::Q8_0;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 2 + WEIGHTS;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_q8_0(level, weights, blocks);
        for_each_encoded::<WEIGHTS, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let d = extreme(weights).abs() / 127.0;
            put_half(block, 0, d);
            let scale = reciprocal(d);
            for (byte, &weight) in block[2..].iter_mut().zip(weights) {
                // `f32::round` takes ties away from zero.
                *byte = ((weight * scale).round() as i8).cast_unsigned();
            }
        });
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q8_0(level, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (weight, &byte) in weights.iter_mut().zip(&block[2..]) {
                *weight = f32::from(byte.cast_signed()) * d;
            }
        });
    }
}

/// Blocks of a row whose searches run together.
const TOGETHER: usize = 128;

/// Encodes a row with importance: `search` finds scales for many blocks, `encode` writes one.
fn encode_row<const BYTES: usize>(
    row: &[f32],
    importance: &[f32],
    blocks: &mut [u8],
    search: impl Fn(Weigh<'_>, &[f32], &mut [Fit]),
    encode: impl Fn(&[f32; WEIGHTS], &Fit, &mut [u8; BYTES]),
) {
    let squares = row.iter().fold(0.0, |sum, x| sum + x * x);
    let variance = squares / row.len() as f32;
    let blocks = blocks.as_chunks_mut().0.chunks_mut(TOGETHER);
    let importance = importance.chunks(TOGETHER * WEIGHTS);
    for ((weights, importance), blocks) in
        row.chunks(TOGETHER * WEIGHTS).zip(importance).zip(blocks)
    {
        let mut counts = [0.0; TOGETHER * WEIGHTS];
        for ((count, importance), x) in counts.iter_mut().zip(importance).zip(weights) {
            *count = importance * (variance + x * x).sqrt();
        }
        let mut fits = [Fit::default(); TOGETHER];
        let fits = &mut fits[..blocks.len()];
        search(Weigh::Given(&counts), weights, fits);
        for ((weights, fit), block) in weights.as_chunks().0.iter().zip(fits).zip(blocks) {
            encode(weights, fit, block);
        }
    }
}

/// The first weight with the largest magnitude; +0 in a block of zeros. Magnitudes are compared as
/// bits, which have the same order and put NaN on top.
fn extreme(weights: &[f32; WEIGHTS]) -> f32 {
    let magnitude = |weight: f32| weight.to_bits() & 0x7fff_ffff;
    let most = weights
        .iter()
        .fold(0, |most, &weight| magnitude(weight).max(most));
    let first = weights.iter().find(|&&weight| magnitude(weight) == most);
    first.map_or(0.0, |&weight| if most == 0 { 0.0 } else { weight })
}

/// Smallest and largest weight; of two zeros, the first one.
fn range(weights: &[f32; WEIGHTS]) -> (f32, f32) {
    weights
        .iter()
        .fold((f32::MAX, -f32::MAX), |(least, most), &weight| {
            (
                if weight < least { weight } else { least },
                if weight > most { weight } else { most },
            )
        })
}

/// 1/d, or 0 where d is zero or 1/d is infinite.
fn reciprocal(d: f32) -> f32 {
    let reciprocal = 1.0 / d;
    if d == 0.0 || reciprocal.is_infinite() {
        0.0
    } else {
        reciprocal
    }
}

/// min(limit, trunc((x − least)·scale + bias)); NaN gives 0.
fn codes(weights: &[f32; WEIGHTS], least: f32, scale: f32, bias: f32, limit: u8) -> [u8; WEIGHTS] {
    weights.map(|weight| (((weight - least) * scale + bias) as u8).min(limit))
}

fn put_nibbles(block: &mut [u8], at: usize, codes: &[u8; WEIGHTS]) {
    for (j, byte) in block[at..at + HALF].iter_mut().enumerate() {
        *byte = codes[j] & 15 | codes[j + HALF] << 4;
    }
}

fn nibbles_at(block: &[u8], at: usize) -> [u8; WEIGHTS] {
    let mut codes = [0; WEIGHTS];
    for (j, byte) in block[at..at + HALF].iter().enumerate() {
        codes[j] = byte & 15;
        codes[j + HALF] = byte >> 4;
    }
    codes
}

fn put_high_bits(block: &mut [u8], at: usize, codes: &[u8; WEIGHTS]) {
    let bits = codes
        .iter()
        .enumerate()
        .fold(0u32, |bits, (i, &code)| bits | u32::from(code >> 4) << i);
    block[at..at + 4].copy_from_slice(&bits.to_le_bytes());
}

fn with_high_bits(mut codes: [u8; WEIGHTS], block: &[u8], at: usize) -> [u8; WEIGHTS] {
    let bits = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((bits >> i & 1) as u8) << 4;
    }
    codes
}
