//! GGML's IQ types: weights stand on points of a grid ([`iq_grids`]), eight or four together, or on
//! a table of 16 uneven levels.
//!
//! All fields are little-endian, f16 is IEEE half. i is the index of a weight in its block; k = i/8
//! is its run of eight, g = i/32 its group of 32. "Split nibbles" over 32 weights: byte j holds code
//! j in bits 0-3 and code j + 16 in bits 4-7.
//!
//! | type | weights | bytes | fields at |
//! |---|---|---|---|
//! | IQ2_XXS | 256 | 66 | d f16 @0; per g 8 bytes @2: four grid indices, u32 B |
//! | IQ2_XS | 256 | 74 | d @0; per k u16 @2: index in bits 0-8, signs in bits 9-15; scales, one nibble per 16 weights, 8 bytes @66 |
//! | IQ2_S | 256 | 82 | d @0; index bits 0-7 per k, 32 bytes @2; sign byte per k @34; index bits 8-9, two bits per k, 8 bytes @66; scales as IQ2_XS @74 |
//! | IQ3_XXS | 256 | 98 | d @0; grid index per 4 weights, 64 bytes @2; per g u32 B @66 |
//! | IQ3_S | 256 | 110 | d @0; index bits 0-7 per 4 weights, 64 bytes @2; index bit 8, one bit per 4 weights, 8 bytes @66; sign byte per k @74; scales, one nibble per g, 4 bytes @106 |
//! | IQ1_S | 256 | 50 | d @0; index bits 0-7 per k, 32 bytes @2; per g u16 @34: index bits 8-10 of four k in bits 0-11, scale in bits 12-14, sign of the shift in bit 15 |
//! | IQ1_M | 256 | 56 | index bits 0-7 per k, 32 bytes @0; per k a nibble @32: index bits 8-10, sign of the shift in bit 3; four u16 @48: four scales of three bits (per 16 weights) and a nibble of d each, the lowest nibble first |
//! | IQ4_NL | 32 | 18 | d @0; split nibbles @2 |
//! | IQ4_XS | 256 | 136 | d @0; bits 4-5 of scales, two per g, u16 @2; bits 0-3, a nibble per g, 4 bytes @4; split nibbles per g, 128 bytes @8 |
//!
//! B: four sign codes of seven bits, then a scale of four bits. A sign code becomes a sign byte by
//! its parity in bit 7, so that the number of minus signs is even; bit j of a sign byte is the sign of
//! weight j of the run.
//!
//! Decoding, in `f32`, each operation rounded by itself, s being the scale:
//!
//! | type | weight |
//! |---|---|
//! | IQ2_XXS, IQ2_XS, IQ2_S | ±((d·(0.5 + s))·0.25)·point |
//! | IQ3_XXS | ±((d·(0.5 + s))·0.5)·point |
//! | IQ3_S | ±(d·(2s + 1))·point |
//! | IQ1_S, IQ1_M | (d·(2s + 1))·(point ± 0.125) |
//! | IQ4_NL | d·level |
//! | IQ4_XS | (d·(s − 32))·level |
//!
//! Encoding is a search for scales and codes: `iq_grid_search` for IQ2 and IQ3, `iq1_search` for IQ1,
//! `iq4_search` for IQ4.
//!
//! Special cases: none; every byte pattern decodes. A d that is infinite or NaN gives what the
//! formulas give.
//!
//! Source: ggml 0.25.3, `ggml-common.h`, `ggml-quants.c` (`dequantize_row_iq*`). gguf-py 0.19 decodes
//! to the same numbers.

use half::f16;

use super::blocks::{for_each_decoded, half_at, u16_at, u32_at, Block, Blocks, Weighing, GGML};
use super::{iq1_search, iq4_search, iq_grid_search, iq_grids};
use super::{Encodes, Exactness, Info};
use crate::dtype::Dtype;
use crate::kernels::{self, Level};

/// Weights per super-block.
const WEIGHTS: usize = 256;
/// Weights per group, in super-blocks.
const GROUP: usize = 32;
/// Weights per run: they share a sign byte.
const RUN: usize = 8;

/// Levels of IQ4_NL and IQ4_XS.
pub const IQ4_LEVELS: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// 2.0625 bits: runs of eight on a grid of 256 points.
pub struct Iq2Xxs;
/// 2.3125 bits: runs of eight on a grid of 512 points.
pub struct Iq2Xs;
/// 2.5625 bits: runs of eight on a grid of 1024 points, any signs.
pub struct Iq2S;
/// 3.0625 bits: fours on a grid of 256 points.
pub struct Iq3Xxs;
/// 3.4375 bits: fours on a grid of 512 points, any signs.
pub struct Iq3S;
/// 1.5625 bits: runs of eight on a grid of 2048 points, shifted by an eighth.
pub struct Iq1S;
/// 1.75 bits: as IQ1_S with more scales.
pub struct Iq1M;
/// 32 codes of 4 bits on uneven levels.
pub struct Iq4Nl;
/// 256 codes of 4 bits on uneven levels, eight scales.
pub struct Iq4Xs;

pub static IQ2_XXS_FORMAT: Blocks<Iq2Xxs> = Blocks::new();
pub static IQ2_XS_FORMAT: Blocks<Iq2Xs> = Blocks::new();
pub static IQ2_S_FORMAT: Blocks<Iq2S> = Blocks::new();
pub static IQ3_XXS_FORMAT: Blocks<Iq3Xxs> = Blocks::new();
pub static IQ3_S_FORMAT: Blocks<Iq3S> = Blocks::new();
pub static IQ1_S_FORMAT: Blocks<Iq1S> = Blocks::new();
pub static IQ1_M_FORMAT: Blocks<Iq1M> = Blocks::new();
pub static IQ4_NL_FORMAT: Blocks<Iq4Nl> = Blocks::new();
pub static IQ4_XS_FORMAT: Blocks<Iq4Xs> = Blocks::new();

const fn info(
    name: &'static str,
    short: &'static str,
    bits_per_weight: f64,
    reader: &'static str,
    encodes: Encodes,
) -> Info {
    Info {
        name,
        short: Some(short),
        reader,
        bits_per_weight,
        encodes,
        ..GGML
    }
}

/// Readers of the types with a grid, and of those with a table.
const GRID_READERS: &str = "llama.cpp, gguf-py, transformers";
const TABLE_READERS: &str = "llama.cpp, gguf-py, diffusers, transformers";

impl Block for Iq2Xxs {
    const INFO: Info = info(
        "gguf:iq2_xxs",
        "iq2_xxs",
        2.0625,
        GRID_READERS,
        Encodes::WithImportance,
    );
    const DTYPE: Dtype = Dtype::IQ2_XXS;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 66;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq2_xxs(level, weights, importance, blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq2_xxs(level, &iq_grids::IQ2_XXS_CODES, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (group, weights) in weights.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                let at = 2 + 8 * group;
                let signs = u32_at(block, at + 4);
                let scale = d * (0.5 + (signs >> 28) as f32) * 0.25;
                for (run, weights) in runs(weights) {
                    let point = iq_grids::IQ2_XXS[usize::from(block[at + run])];
                    put_signed(weights, scale, point, even_signs(signs >> (7 * run)));
                }
            }
        });
    }
}

impl Block for Iq2Xs {
    const INFO: Info = info(
        "gguf:iq2_xs",
        "iq2_xs",
        2.3125,
        GRID_READERS,
        Encodes::WithImportance,
    );
    const DTYPE: Dtype = Dtype::IQ2_XS;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 74;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq2_xs(level, weights, importance, blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq2_xs(level, &iq_grids::IQ2_XS_CODES, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (run, weights) in runs(weights) {
                let scale = d * (0.5 + f32::from(nibble(&block[66..], run / 2))) * 0.25;
                let both = u16_at(block, 2 + 2 * run);
                let point = iq_grids::IQ2_XS[usize::from(both & 511)];
                put_signed(weights, scale, point, even_signs(u32::from(both >> 9)));
            }
        });
    }
}

impl Block for Iq2S {
    const INFO: Info = info("gguf:iq2_s", "iq2_s", 2.5625, GRID_READERS, Encodes::Always);
    const DTYPE: Dtype = Dtype::IQ2_S;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 82;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq2_s(level, weights, None, blocks);
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq2_s(level, weights, Some(importance), blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq2_s(level, &iq_grids::IQ2_S_CODES, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (run, weights) in runs(weights) {
                let scale = d * (0.5 + f32::from(nibble(&block[74..], run / 2))) * 0.25;
                let high = block[66 + run / 4] >> (2 * (run % 4)) & 3;
                let index = usize::from(block[2 + run]) | usize::from(high) << 8;
                put_signed(weights, scale, iq_grids::IQ2_S[index], block[34 + run]);
            }
        });
    }
}

impl Block for Iq3Xxs {
    const INFO: Info = info(
        "gguf:iq3_xxs",
        "iq3_xxs",
        3.0625,
        GRID_READERS,
        Encodes::Always,
    );
    const DTYPE: Dtype = Dtype::IQ3_XXS;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 98;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq3_xxs(level, weights, None, blocks);
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq3_xxs(level, weights, Some(importance), blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq3_xxs(level, &iq_grids::IQ3_XXS_CODES, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (group, weights) in weights.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                let signs = u32_at(block, 66 + 4 * group);
                let scale = d * (0.5 + (signs >> 28) as f32) * 0.5;
                for (run, weights) in runs(weights) {
                    let at = 2 + 8 * group + 2 * run;
                    let point = [block[at], block[at + 1]]
                        .map(|index| iq_grids::IQ3_XXS[usize::from(index)]);
                    put_signed(
                        weights,
                        scale,
                        joined(point),
                        even_signs(signs >> (7 * run)),
                    );
                }
            }
        });
    }
}

impl Block for Iq3S {
    const INFO: Info = Info {
        // ggml loses the weights behind such a run.
        exactness: Exactness::ExactGiven("no run of 32 zeros"),
        ..info("gguf:iq3_s", "iq3_s", 3.4375, GRID_READERS, Encodes::Always)
    };
    const DTYPE: Dtype = Dtype::IQ3_S;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 110;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq3_s(level, weights, None, blocks);
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq_grid_search::encode_iq3_s(level, weights, Some(importance), blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq3_s(level, &iq_grids::IQ3_S_CODES, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (run, weights) in runs(weights) {
                let scale = d * f32::from(1 + 2 * nibble(&block[106..], run / 4));
                let high = block[66 + run / 4] >> (2 * (run % 4));
                let point = [0, 1].map(|half| {
                    let index = usize::from(block[2 + 2 * run + half]);
                    iq_grids::IQ3_S[index | usize::from(high >> half & 1) << 8]
                });
                put_signed(weights, scale, joined(point), block[74 + run]);
            }
        });
    }
}

impl Block for Iq1S {
    const INFO: Info = info(
        "gguf:iq1_s",
        "iq1_s",
        1.5625,
        GRID_READERS,
        Encodes::WithImportance,
    );
    const DTYPE: Dtype = Dtype::IQ1_S;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 50;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq1_search::encode_iq1_s(level, weights, importance, blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq1_s(level, &iq_grids::IQ1_CODES, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (run, weights) in runs(weights) {
                let high = u16_at(block, 34 + run / 4 * 2);
                let scale = d * f32::from(2 * (high >> 12 & 7) + 1);
                let index = u16::from(block[2 + run]) | (high >> (3 * (run % 4)) & 7) << 8;
                put_shifted(weights, scale, index, high >> 15 == 1);
            }
        });
    }
}

impl Block for Iq1M {
    const INFO: Info = info("gguf:iq1_m", "iq1_m", 1.75, GRID_READERS, Encodes::Always);
    const DTYPE: Dtype = Dtype::IQ1_M;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 56;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        iq1_search::encode_iq1_m(level, weights, None, blocks);
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq1_search::encode_iq1_m(level, weights, Some(importance), blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq1_m(level, &iq_grids::IQ1_CODES, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let scales = [48, 50, 52, 54].map(|at| u16_at(block, at));
            let d = scales
                .iter()
                .rev()
                .fold(0, |bits, scales| bits << 4 | scales >> 12);
            let d = f16::from_bits(d).to_f32();
            for (run, weights) in runs(weights) {
                let scale = scales[run / 8] >> (3 * (run / 2 % 4)) & 7;
                let scale = d * f32::from(2 * scale + 1);
                let high = nibble(&block[32..], run);
                let index = u16::from(block[run]) | u16::from(high & 7) << 8;
                put_shifted(weights, scale, index, high >> 3 == 1);
            }
        });
    }
}

impl Block for Iq4Nl {
    const INFO: Info = info("gguf:iq4_nl", "iq4_nl", 4.5, TABLE_READERS, Encodes::Always);
    const DTYPE: Dtype = Dtype::IQ4_NL;
    const WEIGHTS: usize = GROUP;
    const BYTES: usize = 18;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        iq4_search::encode_nl(level, weights, None, blocks);
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq4_search::encode_nl(level, weights, Some(importance), blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq4_nl(level, &IQ4_LEVELS, blocks, weights);
        for_each_decoded::<GROUP, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            put_levels(weights, half_at(block, 0), &block[2..]);
        });
    }
}

impl Block for Iq4Xs {
    const INFO: Info = info(
        "gguf:iq4_xs",
        "iq4_xs",
        4.25,
        TABLE_READERS,
        Encodes::Always,
    );
    const DTYPE: Dtype = Dtype::IQ4_XS;
    const WEIGHTS: usize = WEIGHTS;
    const BYTES: usize = 136;
    const WEIGHING: Weighing = Weighing::ByBlock;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        iq4_search::encode_xs(level, weights, None, blocks);
    }

    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        iq4_search::encode_xs(level, weights, Some(importance), blocks);
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_iq4_xs(level, &IQ4_LEVELS, blocks, weights);
        for_each_decoded::<WEIGHTS, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            let high = u16_at(block, 2);
            for (group, weights) in weights.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
                let high = (high >> (2 * group) & 3) << 4;
                let scale = u16::from(nibble(&block[4..], group)) | high;
                let scale = d * (f32::from(scale) - 32.0);
                put_levels(weights, scale, &block[8 + 16 * group..]);
            }
        });
    }
}

/// Runs of eight weights with their index.
fn runs(weights: &mut [f32]) -> impl Iterator<Item = (usize, &mut [f32; RUN])> {
    weights.as_chunks_mut().0.iter_mut().enumerate()
}

/// Nibble `index`, the low one of a byte first.
fn nibble(bytes: &[u8], index: usize) -> u8 {
    bytes[index / 2] >> (4 * (index % 2)) & 15
}

/// The sign byte of a code in bits 0-6 (the others are ignored): an even number of minus signs.
pub(super) fn even_signs(code: u32) -> u8 {
    let code = code as u8 & 127;
    code | (code.count_ones() as u8 & 1) << 7
}

/// Two points of four as one of eight.
fn joined([first, second]: [[u8; 4]; 2]) -> [u8; RUN] {
    let mut point = [0; RUN];
    point[..4].copy_from_slice(&first);
    point[4..].copy_from_slice(&second);
    point
}

/// Weight j is scale·point, negated where bit j of `signs` is set.
fn put_signed(weights: &mut [f32; RUN], scale: f32, point: [u8; RUN], signs: u8) {
    for (j, (weight, level)) in weights.iter_mut().zip(point).enumerate() {
        let magnitude = scale * f32::from(level);
        *weight = if signs >> j & 1 == 1 {
            -magnitude
        } else {
            magnitude
        };
    }
}

/// Weight j is scale·(point ± 0.125).
fn put_shifted(weights: &mut [f32; RUN], scale: f32, index: u16, is_down: bool) {
    let shift = if is_down { -0.125 } else { 0.125 };
    let point = iq_grids::IQ1[usize::from(index)];
    for (weight, level) in weights.iter_mut().zip(point) {
        *weight = scale * (f32::from(level) + shift);
    }
}

/// Weight j is scale·level, of the split nibbles that open `codes`.
fn put_levels(weights: &mut [f32; GROUP], scale: f32, codes: &[u8]) {
    let (low, high) = weights.split_at_mut(GROUP / 2);
    for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
        *low = scale * f32::from(IQ4_LEVELS[usize::from(code & 15)]);
        *high = scale * f32::from(IQ4_LEVELS[usize::from(code >> 4)]);
    }
}
