//! 4-bit floats in pairs. Scalar bodies and special cases: see `crate::formats::e2m1`.

use std::arch::x86_64::*;

use super::ternary::largest_magnitude;
use super::{load, store};
use crate::formats::e2m1::{Rounding, Scaling, MOST, VALUES};
use crate::formats::rows8::Divisor;

/// A quotient becomes 0, and has no sign where zeros have none, if its dividend is not larger than 2^-150 of the
/// divisor. Vectors that do not divide compare both times 2^110, which no divisor that they serve leaves the
/// normal numbers by: the dividend times the first number, the divisor times the second.
pub(in crate::kernels) const RAISED: f32 = f32::from_bits((127 + 110) << 23);
pub(in crate::kernels) const NOTHING: f32 = f32::from_bits((127 - 40) << 23);

/// Codes of eight numbers; `is_signed` is all ones for those with a sign.
#[inline]
#[target_feature(enable = "avx2")]
fn codes(rounding: Rounding, x: __m256, is_signed: __m256i) -> __m256i {
    let sign = _mm256_set1_ps(-0.0);
    let size = _mm256_min_ps(_mm256_andnot_ps(sign, x), _mm256_set1_ps(MOST));
    let bits = _mm256_castps_si256(size);
    // From 1 on a step is bit 22: half of it is added, and one less for ties that go down.
    let last = match rounding {
        Rounding::Down => _mm256_setzero_si256(),
        Rounding::Even | Rounding::EvenUnsignedZero => {
            _mm256_and_si256(_mm256_srli_epi32::<22>(bits), _mm256_set1_epi32(1))
        }
    };
    let rounded = _mm256_add_epi32(
        bits,
        _mm256_add_epi32(last, _mm256_set1_epi32((1 << 21) - 1)),
    );
    let large = _mm256_sub_epi32(_mm256_srli_epi32::<22>(rounded), _mm256_set1_epi32(252));
    // Below 1 a step is a half.
    let beyond =
        |bound: f32| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(size, _mm256_set1_ps(bound)));
    let second = match rounding {
        Rounding::Down => beyond(0.75),
        Rounding::Even | Rounding::EvenUnsignedZero => {
            _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GE_OQ>(size, _mm256_set1_ps(0.75)))
        }
    };
    let small = _mm256_sub_epi32(
        _mm256_setzero_si256(),
        _mm256_add_epi32(beyond(0.25), second),
    );
    let is_small = _mm256_cmp_ps::<_CMP_LT_OQ>(size, _mm256_set1_ps(1.0));
    let code = _mm256_blendv_epi8(large, small, _mm256_castps_si256(is_small));
    _mm256_or_si256(code, _mm256_and_si256(is_signed, _mm256_set1_epi32(8)))
}

/// Which of scaled numbers have a sign.
#[inline]
#[target_feature(enable = "avx2")]
fn signed(rounding: Rounding, x: __m256) -> __m256i {
    let zero = _mm256_setzero_ps();
    match rounding {
        Rounding::Even => _mm256_srai_epi32::<31>(_mm256_castps_si256(x)),
        Rounding::EvenUnsignedZero => _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(x, zero)),
        Rounding::Down => _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LE_OQ>(x, zero)),
    }
}

/// Eight bytes of sixteen codes, each pair with the first in the low half.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs(first: __m256i, second: __m256i) -> [u8; 8] {
    let pair = |codes| _mm256_or_si256(codes, _mm256_srli_epi64::<28>(codes));
    // One byte of `first` and one of `second` in every eight.
    let low = _mm256_and_si256(pair(first), _mm256_set1_epi64x(0xff));
    let high = _mm256_slli_epi64::<32>(_mm256_and_si256(pair(second), _mm256_set1_epi64x(0xff)));
    let both = _mm256_or_si256(low, high);
    let together = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    // The lower half now holds the bytes of `first`, one in four, the upper those of `second`.
    let gather = _mm256_set1_epi32(0x0c08_0400);
    let packed = _mm256_shuffle_epi8(together, gather);
    let first = _mm256_extract_epi32::<0>(packed).to_le_bytes();
    let second = _mm256_extract_epi32::<4>(packed).to_le_bytes();
    let mut bytes = [0; 8];
    let (low, high) = bytes.split_at_mut(4);
    low.copy_from_slice(&first);
    high.copy_from_slice(&second);
    bytes
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn encode_all(
    rounding: Rounding,
    scale: impl Fn(__m256) -> (__m256, __m256i),
    weights: &[f32],
    packed: &mut [u8],
) -> usize {
    let mut done = 0;
    let steps = weights
        .as_chunks::<16>()
        .0
        .iter()
        .zip(packed.as_chunks_mut().0);
    for (weights, packed) in steps {
        if let [first, second] = weights.as_chunks().0 {
            let [first, second] = [first, second].map(|weights| {
                let (x, is_signed) = scale(load(weights));
                codes(rounding, x, is_signed)
            });
            *packed = pairs(first, second);
            done += 16;
        }
    }
    done
}

/// The largest magnitude of each block of `size` finite weights, a multiple of 8.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn most_of_blocks(size: usize, weights: &[f32], largest: &mut [f32]) {
    for (block, largest) in weights.chunks_exact(size).zip(largest) {
        *largest = largest_magnitude(block);
    }
}

/// Divided, where that cannot be done without.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn divided(rounding: Rounding, by: f32, weights: &[f32], packed: &mut [u8]) -> usize {
    let by = _mm256_set1_ps(by);
    let divide = |x| {
        let x = _mm256_div_ps(x, by);
        (x, signed(rounding, x))
    };
    encode_all(rounding, divide, weights, packed)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(in crate::kernels) fn encode_e2m1(
    rounding: Rounding,
    scaling: Scaling,
    weights: &[f32],
    packed: &mut [u8],
) -> usize {
    match scaling {
        Scaling::Product(factor) => {
            let factor = _mm256_set1_ps(factor);
            let multiply = |x| {
                let x = _mm256_mul_ps(x, factor);
                (x, signed(rounding, x))
            };
            encode_all(rounding, multiply, weights, packed)
        }
        // As `crate::formats::rows8::Divisor`. What is large may be off, infinite or NaN: its code is that of 6
        // all the same. What is next to nothing may be off as well, so that signs are those of the weights.
        Scaling::Quotient(by) if Divisor::serves(by) => {
            let inverse = _mm256_set1_ps(1.0 / by);
            let nothing = _mm256_set1_ps(by * NOTHING);
            let below = _mm256_set1_ps(by * -NOTHING);
            let by = _mm256_set1_ps(by);
            let divide = |x| {
                let about = _mm256_mul_ps(x, inverse);
                let left = _mm256_fnmadd_ps(about, by, x);
                let quotient = _mm256_fmadd_ps(left, inverse, about);
                let raised = _mm256_mul_ps(x, _mm256_set1_ps(RAISED));
                let is_signed = match rounding {
                    Rounding::Even => x,
                    Rounding::EvenUnsignedZero => _mm256_cmp_ps::<_CMP_LT_OQ>(raised, below),
                    Rounding::Down => _mm256_cmp_ps::<_CMP_LE_OQ>(raised, nothing),
                };
                let is_signed = _mm256_srai_epi32::<31>(_mm256_castps_si256(is_signed));
                (quotient, is_signed)
            };
            encode_all(rounding, divide, weights, packed)
        }
        Scaling::Quotient(by) => divided(rounding, by, weights, packed),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn decode_e2m1(
    keeps_sign: bool,
    scale: f32,
    packed: &[u8],
    weights: &mut [f32],
) -> usize {
    let magnitudes = load(&VALUES);
    let (scale, zero) = (_mm256_set1_ps(scale), _mm256_set1_ps(0.0));
    let nibble = _mm_set1_epi8(15);
    let mut done = 0;
    let steps = packed
        .as_chunks()
        .0
        .iter()
        .zip(weights.as_chunks_mut::<16>().0);
    for (packed, weights) in steps {
        let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(*packed));
        let low = _mm_and_si128(bytes, nibble);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
        let codes = _mm_unpacklo_epi8(low, high);
        let halves = [codes, _mm_srli_si128::<8>(codes)];
        for (half, weights) in halves.into_iter().zip(weights.as_chunks_mut().0) {
            let codes = _mm256_cvtepu8_epi32(half);
            let sign = _mm256_slli_epi32::<28>(_mm256_and_si256(codes, _mm256_set1_epi32(8)));
            // Of an index only three bits count.
            let size = _mm256_permutevar8x32_ps(magnitudes, codes);
            let value = _mm256_or_ps(size, _mm256_castsi256_ps(sign));
            let value = if keeps_sign {
                value
            } else {
                _mm256_add_ps(value, zero)
            };
            store(_mm256_mul_ps(value, scale), weights);
        }
        done += 16;
    }
    done
}
