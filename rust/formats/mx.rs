//! Microscaling formats: 4-bit floats (E2M1) that share an 8-bit scale, in the block layouts of GGUF.
//!
//! | type | weights | bytes | fields at |
//! |---|---|---|---|
//! | MXFP4 | 32 | 17 | scale E8M0 @0; 16 bytes of split nibbles @1: byte j holds code j in bits 0-3, code j + 16 in bits 4-7 |
//! | NVFP4 | 64 | 36 | four scales UE4M3 @0, one per 16 weights; 32 bytes @4: byte 8s + j holds code 16s + j in bits 0-3 and code 16s + j + 8 in bits 4-7 |
//!
//! A code is a sign (bit 3) and a magnitude (bits 0-2) of 0, ½, 1, 1½, 2, 3, 4, 6. Both types count in
//! half units, t = 0 1 2 3 4 6 8 12 and the negatives, times half the scale, s:
//! y = t·s. E8M0 byte e is 2^(e − 127), so s = 2^(e − 128) (a subnormal number for e < 2; 255 is no NaN
//! here). UE4M3 has four exponent bits of bias 7 and three bits of mantissa; 0x7f counts as 0, bit 7 is
//! not looked at otherwise.
//!
//! Encoding, in `f32`, each operation rounded by itself, m being the largest magnitude:
//! - MXFP4: e = ⌊log₂ m⌋ + 125, the logarithm rounded to `f32` first (so that a number just below a
//!   power of two counts as one); 0 if m = 0. Only the low byte is kept.
//! - NVFP4: the scale is m / 6 in UE4M3, at most 448, mantissa rounded half up; 0 if that is less than
//!   half of the least step.
//! - The code is the first of 16 with the least |t·s − x|, so ties go to the smaller magnitude and
//!   what rounds to zero has no sign.
//!
//! Special cases:
//! - m < 2^−125 (MXFP4): e wraps to 232 and above, all codes are 0 and the block decodes to zeros.
//! - s = 0 (NVFP4): all codes are 0.
//! - m far above 448·6 (NVFP4): once x is so large that subtracting t·s does not change it, the first
//!   code wins, which is 0. Tensors of that kind need a scale of their own, which GGUF keeps in a
//!   second tensor.
//! - Weights that are not finite are refused by the caller; what they would give is the same on
//!   every processor, and means nothing.
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`quantize_row_mxfp4_ref`, `quantize_row_nvfp4_ref`,
//! `dequantize_row_*`), `ggml-impl.h` (`ggml_e8m0_to_fp32_half`, `ggml_ue4m3_to_fp32`). gguf-py 0.19
//! decodes both to the same numbers.

use super::blocks::{for_each_decoded, for_each_encoded, Block, Blocks, GGML};
use super::Info;
use crate::codebook::{
    floor_log2, half_of_e8m0, half_of_ue4m3, nearest_e2m1, to_ue4m3, E2M1_DOUBLED, HALVES_OF_E8M0,
    HALVES_OF_UE4M3,
};
use crate::dtype::Dtype;
use crate::kernels::{self, Level};

/// Blocks of 32 with a power of two.
pub struct MxFp4;
/// Blocks of 64 with four 8-bit floats.
pub struct NvFp4;

pub static MXFP4_FORMAT: Blocks<MxFp4> = Blocks::new();
pub static NVFP4_FORMAT: Blocks<NvFp4> = Blocks::new();

const fn info(name: &'static str, bits_per_weight: f64) -> Info {
    Info {
        name,
        // No short name: other backends have formats of these names.
        reader: "llama.cpp, gguf-py",
        bits_per_weight,
        ..GGML
    }
}

impl Block for MxFp4 {
    const INFO: Info = info("gguf:mxfp4", 4.25);
    const DTYPE: Dtype = Dtype::MXFP4;
    const WEIGHTS: usize = 32;
    const BYTES: usize = 17;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_mxfp4(level, weights, blocks);
        for_each_encoded::<32, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let most = largest_magnitude(weights);
            block[0] = if most > 0.0 {
                (floor_log2(most) + 125) as u8
            } else {
                0
            };
            put_codes::<16>(weights, half_of_e8m0(block[0]), &mut block[1..]);
        });
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_mxfp4(level, &HALVES_OF_E8M0, blocks, weights);
        for_each_decoded::<32, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            put_weights::<16>(&block[1..], half_of_e8m0(block[0]), weights);
        });
    }
}

impl Block for NvFp4 {
    const INFO: Info = info("gguf:nvfp4", 4.5);
    const DTYPE: Dtype = Dtype::NVFP4;
    const WEIGHTS: usize = 64;
    const BYTES: usize = 36;

    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let done = kernels::encode_nvfp4(level, weights, blocks);
        for_each_encoded::<64, { Self::BYTES }>(done, weights, blocks, |weights, block| {
            let (scales, codes) = block.split_at_mut(4);
            let groups = weights.as_chunks::<16>().0.iter();
            for ((weights, scale), codes) in groups.zip(scales).zip(codes.chunks_exact_mut(8)) {
                *scale = to_ue4m3(largest_magnitude(weights) / 6.0);
                put_codes::<8>(weights, half_of_ue4m3(*scale), codes);
            }
        });
    }

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_nvfp4(level, &HALVES_OF_UE4M3, blocks, weights);
        for_each_decoded::<64, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            let (scales, codes) = block.split_at(4);
            let groups = weights.as_chunks_mut::<16>().0.iter_mut();
            for ((weights, scale), codes) in groups.zip(scales).zip(codes.chunks_exact(8)) {
                put_weights::<8>(codes, half_of_ue4m3(*scale), weights);
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

/// Codes of 2·`HALF` weights as split nibbles.
fn put_codes<const HALF: usize>(weights: &[f32], scale: f32, bytes: &mut [u8]) {
    let (low, high) = weights.split_at(HALF);
    for ((byte, &low), &high) in bytes.iter_mut().zip(low).zip(high) {
        *byte = nearest_e2m1(low, scale) | nearest_e2m1(high, scale) << 4;
    }
}

/// Weights of 2·`HALF` codes in split nibbles.
fn put_weights<const HALF: usize>(bytes: &[u8], scale: f32, weights: &mut [f32]) {
    let (low, high) = weights.split_at_mut(HALF);
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = E2M1_DOUBLED[usize::from(byte & 15)] * scale;
        *high = E2M1_DOUBLED[usize::from(byte >> 4)] * scale;
    }
}
