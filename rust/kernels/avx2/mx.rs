//! Encoding of 4-bit floats that share a scale. Scalar bodies and special cases: see `crate::formats::mx`.

use std::arch::x86_64::*;

use super::blocks::{encode_blocks, pack_unsigned};
use super::ggml::split_nibbles;
use super::ternary::largest_magnitude;
use super::{load, store_32_bytes, store_bytes};
use crate::codebook::{
    floor_log2, half_of_e8m0, half_of_ue4m3, nearest_e2m1, to_ue4m3, E2M1_THRESHOLDS,
};

/// Codes of eight weights: how many thresholds the magnitude exceeds, and the sign of what is not zero.
#[inline]
#[target_feature(enable = "avx2")]
fn codes(weights: &[f32; 8], thresholds: &[__m256; 7]) -> __m256i {
    let weights = load(weights);
    let sign = _mm256_set1_ps(-0.0);
    let magnitude = _mm256_andnot_ps(sign, weights);
    let mut code = _mm256_setzero_si256();
    for threshold in thresholds {
        let is_above = _mm256_cmp_ps::<_CMP_GT_OQ>(magnitude, *threshold);
        code = _mm256_sub_epi32(code, _mm256_castps_si256(is_above));
    }
    let is_negative = _mm256_castps_si256(_mm256_and_ps(weights, sign));
    let sign = _mm256_srli_epi32::<28>(is_negative);
    let is_zero = _mm256_cmpeq_epi32(code, _mm256_setzero_si256());
    _mm256_or_si256(code, _mm256_andnot_si256(is_zero, sign))
}

/// Codes of weights of at most `most` in magnitude.
#[inline]
#[target_feature(enable = "avx2")]
fn codes_of<const VECTORS: usize>(
    weights: &[[f32; 8]; VECTORS],
    most: f32,
    scale: f32,
) -> [__m256i; VECTORS] {
    // Within these bounds the differences that the search compares are exact where it matters, and the
    // first of the least is the one that the thresholds, which are exact as well, lead to.
    let largest = 2f32.powi(124);
    if scale > 0.0 && scale <= largest && most < scale * (1 << 20) as f32 {
        let thresholds = E2M1_THRESHOLDS.map(|threshold| _mm256_set1_ps(threshold * scale));
        return std::array::from_fn(|k| codes(&weights[k], &thresholds));
    }
    std::array::from_fn(|k| {
        let codes = weights[k].map(|weight| i32::from(nearest_e2m1(weight, scale)));
        let [a, b, c, d, e, f, g, h] = codes;
        _mm256_setr_epi32(a, b, c, d, e, f, g, h)
    })
}

encode_blocks!(encode_mxfp4, 32 to 17, |weights, block| {
    let most = largest_magnitude(weights);
    let [scale, codes @ ..] = block;
    *scale = if most > 0.0 { (floor_log2(most) + 125) as u8 } else { 0 };
    let (vectors, _) = weights.as_chunks();
    if let Some(vectors) = vectors.first_chunk() {
        let packed = codes_of(vectors, most, half_of_e8m0(*scale));
        store_bytes(split_nibbles(packed), codes);
    }
});

encode_blocks!(encode_nvfp4, 64 to 36, |weights, block| {
    let [a, b, c, d, codes @ ..] = block;
    let (groups, _) = weights.as_chunks::<16>();
    let mut packed = [_mm256_setzero_si256(); 4];
    for ((packed, scale), weights) in packed.iter_mut().zip([a, b, c, d]).zip(groups) {
        let most = largest_magnitude(weights);
        *scale = to_ue4m3(most / 6.0);
        if let Some(vectors) = weights.as_chunks().0.first_chunk() {
            let [low, high] = codes_of(vectors, most, half_of_ue4m3(*scale));
            *packed = _mm256_or_si256(low, _mm256_slli_epi32::<4>(high));
        }
    }
    store_32_bytes(pack_unsigned(packed), codes);
});
