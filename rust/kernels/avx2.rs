//! Versions for AVX2, with F16C and FMA. Scalar bodies and special cases: see the function that offers
//! the work.
//!
//! Every function here may be called only on a processor that has all three features.

mod blocks;
mod bodies;
mod decode_iq;
mod decode_k;
mod e2m1;
mod e4m3;
mod ggml;
mod lanes;
mod levels;
mod mx;
mod points;
mod splits;
mod ternary;

pub(super) use bodies::*;
pub(super) use decode_iq::*;
pub(super) use decode_k::*;
pub(super) use e2m1::*;
pub(super) use e4m3::*;
pub(super) use ggml::*;
pub(super) use lanes::*;
pub(super) use levels::*;
pub(super) use mx::*;
pub(super) use points::*;
pub(super) use splits::*;
pub(super) use ternary::*;

use std::arch::x86_64::*;

use super::sums::{RunLanes, RUN};
use crate::codebook::Codebook;

/// Bits of a magnitude; bits of infinity.
const MAGNITUDE: i32 = 0x7fff_ffff;
const INFINITY: i32 = 0x7f80_0000;

// ---- memory

#[inline]
#[target_feature(enable = "avx2")]
fn load(values: &[f32; 8]) -> __m256 {
    // SAFETY: the reference is to 32 readable bytes; the load takes any alignment.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(vector: __m256, values: &mut [f32; 8]) {
    // SAFETY: the reference is to 32 writable bytes; the store takes any alignment.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_bytes(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load takes any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_bytes(vector: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the reference is to 16 writable bytes; the store takes any alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_32_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load takes any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_32_bytes(vector: __m256i, bytes: &mut [u8; 32]) {
    // SAFETY: the reference is to 32 writable bytes; the store takes any alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}

/// 32 weights as four vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn load_block(weights: &[f32; 32]) -> [__m256; 4] {
    let (vectors, _) = weights.as_chunks();
    [
        load(&vectors[0]),
        load(&vectors[1]),
        load(&vectors[2]),
        load(&vectors[3]),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_block(vectors: [__m256; 4], weights: &mut [f32; 32]) {
    for (vector, weights) in vectors.into_iter().zip(weights.as_chunks_mut().0) {
        store(vector, weights);
    }
}

// ---- casts

#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_f16(bytes: &[u8], weights: &mut [f32]) -> usize {
    let (weights, _) = weights.as_chunks_mut();
    let (halves, _) = bytes.as_chunks();
    for (weights, halves) in weights.iter_mut().zip(halves) {
        store(_mm256_cvtph_ps(load_bytes(halves)), weights);
    }
    8 * weights.len()
}

#[target_feature(enable = "avx2")]
pub(super) fn widen_bf16(bytes: &[u8], weights: &mut [f32]) -> usize {
    let (weights, _) = weights.as_chunks_mut();
    let (brains, _) = bytes.as_chunks();
    for (weights, brains) in weights.iter_mut().zip(brains) {
        let bits = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load_bytes(brains)));
        store(_mm256_castsi256_ps(bits), weights);
    }
    8 * weights.len()
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn narrow_f16(weights: &[f32], bytes: &mut [u8]) -> usize {
    let (weights, _) = weights.as_chunks();
    let (halves, _) = bytes.as_chunks_mut();
    for (weights, halves) in weights.iter().zip(halves) {
        store_bytes(
            _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load(weights)),
            halves,
        );
    }
    8 * weights.len()
}

#[target_feature(enable = "avx2")]
pub(super) fn narrow_bf16(weights: &[f32], bytes: &mut [u8]) -> usize {
    let (weights, _) = weights.as_chunks::<16>();
    let (brains, _) = bytes.as_chunks_mut();
    for (weights, brains) in weights.iter().zip(brains) {
        let (weights, _) = weights.as_chunks();
        let (low, high) = (round_bf16(load(&weights[0])), round_bf16(load(&weights[1])));
        let packed = _mm256_packus_epi32(low, high);
        store_32_bytes(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed), brains);
    }
    16 * weights.len()
}

/// Bits of BF16, to nearest even, a NaN made quiet.
#[inline]
#[target_feature(enable = "avx2")]
fn round_bf16(weights: __m256) -> __m256i {
    let bits = _mm256_castps_si256(weights);
    let high = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
    let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(weights, weights));
    _mm256_blendv_epi8(rounded, quiet, is_nan)
}

/// Rounded to F16 and back.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn through_f16(weights: __m256) -> __m256 {
    _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(weights))
}

// ---- scans

#[target_feature(enable = "avx2")]
pub(super) fn finite_prefix(weights: &[f32]) -> usize {
    let infinity = _mm256_set1_epi32(INFINITY);
    let (blocks, _) = weights.as_chunks();
    let stop = blocks.iter().position(|block| {
        let is_special = load_block(block).map(|weights| {
            let exponent = _mm256_and_si256(_mm256_castps_si256(weights), infinity);
            _mm256_cmpeq_epi32(exponent, infinity)
        });
        let any = is_special.into_iter().reduce(|a, b| _mm256_or_si256(a, b));
        any.is_some_and(|any| _mm256_movemask_epi8(any) != 0)
    });
    32 * stop.unwrap_or(blocks.len())
}

#[target_feature(enable = "avx2")]
pub(super) fn error_run(x: &[f32; RUN], y: &[f32; RUN], lanes: &mut RunLanes) -> bool {
    let sign = _mm256_set1_ps(-0.0);
    // Lanes 0-7, then 8-15, of each sum.
    for half in 0..2 {
        let [mut signal, mut noise, mut cross, mut power, mut most] = [_mm256_setzero_ps(); 5];
        let (x, y) = (x.as_chunks::<8>().0, y.as_chunks::<8>().0);
        for (x, y) in x.iter().zip(y).skip(half).step_by(2) {
            let (x, y) = (load(x), load(y));
            let error = _mm256_sub_ps(x, y);
            signal = _mm256_add_ps(signal, _mm256_mul_ps(x, x));
            noise = _mm256_add_ps(noise, _mm256_mul_ps(error, error));
            cross = _mm256_add_ps(cross, _mm256_mul_ps(x, y));
            power = _mm256_add_ps(power, _mm256_mul_ps(y, y));
            // The second operand stays where the comparison does not hold.
            most = _mm256_max_ps(_mm256_andnot_ps(sign, error), most);
        }
        for (lanes, sum) in lanes.iter_mut().zip([signal, noise, cross, power, most]) {
            store(sum, &mut lanes.as_chunks_mut::<8>().0[half]);
        }
    }
    true
}

/// Bits of the magnitudes.
#[inline]
#[target_feature(enable = "avx2")]
fn magnitude(weights: __m256) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(weights), _mm256_set1_epi32(MAGNITUDE))
}

/// The largest of eight unsigned numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn largest(values: __m256i) -> u32 {
    let values = _mm_max_epu32(
        _mm256_castsi256_si128(values),
        _mm256_extracti128_si256::<1>(values),
    );
    let values = _mm_max_epu32(values, _mm_shuffle_epi32::<0b01_00_11_10>(values));
    let values = _mm_max_epu32(values, _mm_shuffle_epi32::<0b10_11_00_01>(values));
    _mm_cvtsi128_si32(values).cast_unsigned()
}

// ---- bitsandbytes, 4 bits

#[target_feature(enable = "avx2")]
pub(super) fn measure_4bit(size: usize, weights: &[f32], absmax: &mut [[u8; 4]]) -> usize {
    let blocks = weights.chunks_exact(size).zip(absmax);
    let done = blocks.len();
    for (block, absmax) in blocks {
        let mut most = _mm256_setzero_si256();
        for weights in block.as_chunks().0 {
            most = _mm256_max_epu32(most, magnitude(load(weights)));
        }
        *absmax = largest(most).to_le_bytes();
    }
    done
}

#[target_feature(enable = "avx2")]
pub(super) fn encode_4bit(
    codebook: &Codebook,
    least: f32,
    size: usize,
    weights: &[f32],
    absmax: &[[u8; 4]],
    codes: &mut [u8],
) -> usize {
    // A search tree of thresholds, one table per depth, indexed by the comparisons so far.
    let t = &codebook.thresholds;
    let root = _mm256_set1_ps(t[7]);
    let depths = [
        _mm256_setr_ps(t[3], t[11], 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        _mm256_setr_ps(t[1], t[5], t[9], t[13], 0.0, 0.0, 0.0, 0.0),
        _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14]),
    ];
    let order = _mm256_broadcastsi128_si256(load_bytes(&codebook.order));
    let first_high = _mm256_set1_epi16(0x0110);
    // After packing, 16-bit units of the lower and of the upper half of each vector alternate.
    let interleave = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);

    let blocks = weights
        .chunks_exact(size)
        .zip(codes.chunks_exact_mut(size / 2))
        .zip(absmax);
    let done = blocks.len();
    for ((block, codes), absmax) in blocks {
        let absmax = f32::from_le_bytes(*absmax);
        let scale = _mm256_set1_ps(1.0 / if absmax < least { least } else { absmax });
        for (weights, codes) in block.as_chunks().0.iter().zip(codes.as_chunks_mut().0) {
            let [a, b, c, d] = load_block(weights).map(|weights| {
                let y = _mm256_mul_ps(weights, scale);
                // Not below or equal, so that NaN goes up.
                let above =
                    |threshold| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLE_UQ>(y, threshold));
                let mut index = _mm256_sub_epi32(_mm256_setzero_si256(), above(root));
                for thresholds in depths {
                    let threshold = _mm256_permutevar8x32_ps(thresholds, index);
                    let doubled = _mm256_add_epi32(index, index);
                    index = _mm256_sub_epi32(doubled, above(threshold));
                }
                index
            });
            let packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
            let ordered = _mm256_shuffle_epi8(order, packed);
            let pairs = _mm256_maddubs_epi16(ordered, first_high);
            let bytes = _mm_packus_epi16(
                _mm256_castsi256_si128(pairs),
                _mm256_extracti128_si256::<1>(pairs),
            );
            store_bytes(_mm_shuffle_epi8(bytes, interleave), codes);
        }
    }
    done
}

#[target_feature(enable = "avx2")]
pub(super) fn decode_4bit(
    values: &[f32; 16],
    size: usize,
    codes: &[u8],
    absmax: &[[u8; 4]],
    weights: &mut [f32],
) -> usize {
    let (halves, _) = values.as_chunks();
    let (low, high) = (load(&halves[0]), load(&halves[1]));
    let nibbles = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    let blocks = weights
        .chunks_exact_mut(size)
        .zip(codes.chunks_exact(size / 2))
        .zip(absmax);
    let done = blocks.len();
    for ((block, codes), absmax) in blocks {
        let absmax = _mm256_set1_ps(f32::from_le_bytes(*absmax));
        for (weights, codes) in block.as_chunks_mut().0.iter_mut().zip(codes.as_chunks().0) {
            let codes = _mm256_srlv_epi32(_mm256_set1_epi32(i32::from_le_bytes(*codes)), nibbles);
            // Lookups take the low three bits; the fourth, moved to the sign, selects the half.
            let fourth = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let value = _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(low, codes),
                _mm256_permutevar8x32_ps(high, codes),
                fourth,
            );
            store(_mm256_mul_ps(value, absmax), weights);
        }
    }
    done
}

// ---- bitsandbytes, int8

#[target_feature(enable = "avx2,f16c")]
pub(super) fn most_f16(weights: &[f32]) -> (usize, u32) {
    let (vectors, _) = weights.as_chunks();
    let mut most = _mm256_setzero_si256();
    for weights in vectors {
        most = _mm256_max_epu32(most, magnitude(through_f16(load(weights))));
    }
    (8 * vectors.len(), largest(most))
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn encode_int8(scale: f32, weights: &[f32], codes: &mut [u8]) -> usize {
    let scale = _mm256_set1_ps(scale);
    let (blocks, _) = weights.as_chunks();
    for (weights, codes) in blocks.iter().zip(codes.as_chunks_mut().0) {
        let rounded = load_block(weights).map(|weights| {
            // Conversion rounds to nearest even; NaN is made zero.
            _mm256_cvtps_epi32(zero_nan(_mm256_mul_ps(through_f16(weights), scale)))
        });
        store_32_bytes(pack_signed(rounded), codes);
    }
    32 * blocks.len()
}

#[target_feature(enable = "avx2")]
pub(super) fn decode_int8(codes: &[u8], scale: f32, factor: f32, weights: &mut [f32]) -> usize {
    let (scale, factor) = (_mm256_set1_ps(scale), _mm256_set1_ps(factor));
    let (vectors, _) = weights.as_chunks_mut();
    for (weights, codes) in vectors.iter_mut().zip(codes.as_chunks().0) {
        let product = _mm256_mul_ps(signed_to_float(*codes), scale);
        store(_mm256_mul_ps(product, factor), weights);
    }
    8 * vectors.len()
}

#[inline]
#[target_feature(enable = "avx2")]
fn zero_nan(values: __m256) -> __m256 {
    _mm256_and_ps(values, _mm256_cmp_ps::<_CMP_ORD_Q>(values, values))
}

#[inline]
#[target_feature(enable = "avx2")]
fn signed_to_float(codes: [u8; 8]) -> __m256 {
    let codes = _mm_cvtsi64_si128(i64::from_le_bytes(codes));
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))
}

/// 32 numbers in order as signed bytes, saturated.
#[inline]
#[target_feature(enable = "avx2")]
fn pack_signed([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    // Packing works within halves: fours of bytes of the lower halves come first.
    _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}
