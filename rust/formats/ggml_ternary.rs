//! GGML's types of one, one and a half and two bits: a sign or a small whole number times one scale.
//! They suit weights that were trained for them.
//!
//! All fields are little-endian, f16 is IEEE half. i is the index of a weight in its block.
//!
//! | type | weights | bytes | fields at | decodes to |
//! |---|---|---|---|---|
//! | TQ1_0 | 256 | 54 | 48 bytes @0, 4 bytes @48, d f16 @52 | (q − 1)·d |
//! | TQ2_0 | 256 | 66 | 64 bytes @0, d f16 @64 | (q − 1)·d |
//! | Q1_0 | 128 | 18 | d f16 @0, 16 bytes @2: bit i % 8 of byte i / 8 | d where the bit is set, −d elsewhere |
//! | Q2_0 | 64 | 18 | d f16 @0, 16 bytes @2: bits 2(i % 4) of byte i / 4 | (q − 1)·d |
//!
//! TQ2_0: weight 128h + 32l + m has bits 2l and 2l + 1 of byte 32h + m.
//! TQ1_0: a byte holds five codes of 0, 1, 2 as a fraction of 256: with v = 81·q₀ + 27·q₁ + 9·q₂ +
//! 3·q₃ + q₄ it is ⌈256·v / 243⌉, and code n is ⌊3·(byte·3ⁿ mod 256) / 256⌋. Code n of byte m < 32 is
//! weight 32n + m; of byte 32 + m it is weight 160 + 16n + m; the last four bytes hold four codes
//! each (q₄ = 0), code n of byte m being weight 240 + 4n + m.
//!
//! Encoding, in `f32`, each operation rounded by itself:
//! - TQ1_0, TQ2_0, Q2_0: d is the largest magnitude, q = 1 + x·(1/d) rounded, ties away from zero.
//!   (Q2_0 decodes a code of 3 to 2d, and never writes one.)
//! - Q1_0: d = (sum of the magnitudes, added in order) / 128; the bit is set where x ≥ 0, for −0 too.
//!
//! Special cases:
//! - d = 0, or so small that 1/d is infinite: 1/d is replaced by 0, so q is 1 and the block decodes to
//!   zeros. The peers leave the second case undefined.
//! - d beyond the f16 range is stored as infinity, as the peers do.
//! - Weights that are not finite are refused by the caller; what they would give is the same on
//!   every processor, and means nothing.
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`quantize_row_*_ref`, `dequantize_row_*`). gguf-py 0.19 has
//! TQ1_0 and TQ2_0 and gives the same bytes.

use super::blocks::{for_each_decoded, for_each_encoded, half_at, put_half, Block, Blocks, GGML};
use super::Info;
use crate::dtype::Dtype;
use crate::kernels::{self, Level};

/// Weights per block of the TQ types.
const SUPER: usize = 256;

/// Ternary codes, five to a byte.
pub struct Tq1_0;
/// Ternary codes, four to a byte.
pub struct Tq2_0;
/// Signs.
pub struct Q1_0;
/// Codes of two bits.
pub struct Q2_0;

pub static TQ1_0_FORMAT: Blocks<Tq1_0> = Blocks::new();
pub static TQ2_0_FORMAT: Blocks<Tq2_0> = Blocks::new();
pub static Q1_0_FORMAT: Blocks<Q1_0> = Blocks::new();
pub static Q2_0_FORMAT: Blocks<Q2_0> = Blocks::new();

const fn info(
    name: &'static str,
    short: &'static str,
    bits_per_weight: f64,
    reader: &'static str,
) -> Info {
    Info {
        name,
        short: Some(short),
        reader,
        bits_per_weight,
        ..GGML
    }
}

impl Block for Tq1_0 {
    const INFO: Info = info("gguf:tq1_0", "tq1_0", 1.6875, "llama.cpp, gguf-py");
    const DTYPE: Dtype = Dtype::TQ1_0;
    const WEIGHTS: usize = SUPER;
    const BYTES: usize = 54;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_tq1_0(level, weights, blocks);
        for_each_encoded::<SUPER, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let d = largest_magnitude(weights);
            put_half(block, 52, d);
            let codes = codes(weights, d);
            for (first, bytes, step) in TRITS {
                for (m, byte) in block[bytes].iter_mut().enumerate() {
                    // Where a byte has only four codes, the fifth is 0.
                    let value = (0..5).fold(0, |value, n| {
                        let code = codes.get(first + n * step + m);
                        value * 3 + code.copied().map_or(0, u16::from)
                    });
                    *byte = (value * 256).div_ceil(243) as u8;
                }
            }
        });
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_tq1_0(level, blocks, weights);
        for_each_decoded::<SUPER, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 52);
            for (first, bytes, step) in TRITS {
                for (m, byte) in block[bytes].iter().enumerate() {
                    let weights = weights[first..].iter_mut().skip(m).step_by(step);
                    for (weight, power) in weights.zip([1u8, 3, 9, 27, 81]) {
                        let code = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
                        *weight = (f32::from(code) - 1.0) * d;
                    }
                }
            }
        });
    }
}

/// Runs of bytes in a TQ1_0 block: the first weight, the bytes, and the distance between weights that
/// share a byte.
const TRITS: [(usize, std::ops::Range<usize>, usize); 3] =
    [(0, 0..32, 32), (160, 32..48, 16), (240, 48..52, 4)];

impl Block for Tq2_0 {
    const INFO: Info = info("gguf:tq2_0", "tq2_0", 2.0625, "llama.cpp, gguf-py");
    const DTYPE: Dtype = Dtype::TQ2_0;
    const WEIGHTS: usize = SUPER;
    const BYTES: usize = 66;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_tq2_0(level, weights, blocks);
        for_each_encoded::<SUPER, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let d = largest_magnitude(weights);
            put_half(block, 64, d);
            let codes = codes(weights, d);
            for (i, byte) in block[..64].iter_mut().enumerate() {
                let first = i / 32 * 128 + i % 32;
                *byte = (0..4).fold(0, |byte, l| byte | codes[first + 32 * l] << (2 * l));
            }
        });
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_tq2_0(level, blocks, weights);
        for_each_decoded::<SUPER, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 64);
            for (i, weight) in weights.iter_mut().enumerate() {
                let code = block[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
                *weight = (f32::from(code) - 1.0) * d;
            }
        });
    }
}

impl Block for Q1_0 {
    const INFO: Info = info("gguf:q1_0", "q1_0", 1.125, "llama.cpp");
    const DTYPE: Dtype = Dtype::Q1_0;
    const WEIGHTS: usize = 128;
    const BYTES: usize = 18;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_q1_0(level, weights, blocks);
        for_each_encoded::<128, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let sum = weights.iter().fold(0.0, |sum, weight| sum + weight.abs());
            let d: f32 = sum / 128.0;
            // A NaN without its payload, which depends on the processor.
            put_half(block, 0, if d.is_nan() { f32::NAN } else { d });
            for (byte, weights) in block[2..].iter_mut().zip(weights.as_chunks::<8>().0) {
                *byte = (0..8).fold(0, |byte, i| byte | u8::from(weights[i] >= 0.0) << i);
            }
        });
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q1_0(level, blocks, weights);
        for_each_decoded::<128, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (i, weight) in weights.iter_mut().enumerate() {
                let is_set = block[2 + i / 8] >> (i % 8) & 1 == 1;
                *weight = if is_set { d } else { -d };
            }
        });
    }
}

impl Block for Q2_0 {
    const INFO: Info = info("gguf:q2_0", "q2_0", 2.25, "llama.cpp");
    const DTYPE: Dtype = Dtype::Q2_0;
    const WEIGHTS: usize = 64;
    const BYTES: usize = 18;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_q2_0(level, weights, blocks);
        for_each_encoded::<64, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let d = largest_magnitude(weights);
            put_half(block, 0, d);
            let codes = codes(weights, d);
            for (byte, codes) in block[2..].iter_mut().zip(codes.as_chunks::<4>().0) {
                *byte = (0..4).fold(0, |byte, i| byte | codes[i] << (2 * i));
            }
        });
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q2_0(level, blocks, weights);
        for_each_decoded::<64, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let d = half_at(block, 0);
            for (i, weight) in weights.iter_mut().enumerate() {
                let code = block[2 + i / 4] >> (2 * (i % 4)) & 3;
                *weight = (f32::from(code) - 1.0) * d;
            }
        });
    }
}

/// The largest magnitude, NaN aside.
fn largest_magnitude(weights: &[f32]) -> f32 {
    weights
        .iter()
        .fold(0.0, |most, weight| weight.abs().max(most))
}

/// 1 + x·(1/d) rounded, ties away from zero: 0, 1 or 2, as d is the largest magnitude. 1 for NaN, and
/// everywhere if 1/d is infinite.
fn codes<const N: usize>(weights: &[f32; N], d: f32) -> [u8; N] {
    let reciprocal = 1.0 / d;
    let scale = if reciprocal.is_finite() {
        reciprocal
    } else {
        0.0
    };
    weights.map(|weight| {
        let value = weight * scale;
        1 + u8::from(value >= 0.5) - u8::from(value <= -0.5)
    })
}
