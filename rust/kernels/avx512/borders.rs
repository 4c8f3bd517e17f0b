//! Borders of codes: the orders of the least weights of each, and codes by search among them.

use std::arch::x86_64::*;

use super::orders::ordered;
use crate::kernels::GROUPS;

/// The orders of the least BF16 numbers that are at least `numbers`, or more where a lane of `strict` is 1 (0
/// otherwise). The last is the largest order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn borders_at(numbers: __m512, strict: __m512i, borders: &mut [i16; GROUPS]) {
    let bits = _mm512_castps_si512(numbers);
    let sign = _mm512_srai_epi32::<31>(bits);
    // bits ^ (sign & 0x7fffffff)
    let order = _mm512_ternarylogic_epi32::<0x78>(bits, sign, _mm512_set1_epi32(i32::MAX));
    // The last bits of a BF16 number are 0, and those of the order of a negative one are 1.
    let rest = _mm512_andnot_si512(sign, _mm512_set1_epi32(0xffff));
    let above = _mm512_add_epi32(order, _mm512_add_epi32(strict, rest));
    let least = _mm512_cvtepi32_epi16(_mm512_srai_epi32::<16>(above));
    let least = _mm256_mask_set1_epi16(least, 1 << 15, i16::MAX);
    // SAFETY: the reference is to 32 writable bytes; the store takes any alignment.
    unsafe { _mm256_storeu_si256(borders.as_mut_ptr().cast(), least) }
}

/// How weights of a group get their codes, of `BITS` bits.
#[derive(Clone, Copy)]
pub(super) struct Search<const BITS: u32> {
    /// For 2 bits the borders of codes 1, 2 and 3, each for itself. For 4 all borders; and, as numbers, what weights
    /// are multiplied with and what is added then, to have a code that is right or one too small.
    parts: [__m512i; 3],
}

impl<const BITS: u32> Search<BITS> {
    /// To be replaced.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn none() -> Self {
        Search {
            parts: [_mm512_setzero_si512(); 3],
        }
    }

    /// `borders` are as [`borders_at`] has them. No border is further than 0.1 from the middle between the numbers
    /// whose quotients by the scale are whole; `least` is the least weight, `inverse` about 1/scale.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn new(borders: &[i16; GROUPS], least: f32, inverse: f32) -> Self {
        /// Above it numbers have eight bits for a fraction.
        const WHOLE: f32 = 32768.0;
        if BITS == 2 {
            let [first, second, third, ..] = *borders;
            return Search {
                parts: [
                    _mm512_set1_epi16(first),
                    _mm512_set1_epi16(second),
                    _mm512_set1_epi16(third),
                ],
            };
        }
        // SAFETY: the reference is to 32 readable bytes; the load takes any alignment.
        let all = unsafe { _mm256_loadu_si256(borders.as_ptr().cast()) };
        let start = WHOLE + 0.1 - least * inverse;
        Search {
            parts: [
                _mm512_castsi256_si512(all),
                _mm512_castps_si512(_mm512_set1_ps(inverse)),
                _mm512_castps_si512(_mm512_set1_ps(start)),
            ],
        }
    }

    /// Codes of 32 weights, each in 16 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn codes(&self, bits: __m512i) -> __m512i {
        let order = ordered(bits);
        let reached = |border| _mm512_cmpge_epi16_mask(order, border);
        let one = _mm512_set1_epi16(1);
        if BITS == 2 {
            let [first, second, third] = self.parts;
            let is_upper = reached(second);
            let code = _mm512_maskz_set1_epi16(is_upper, 2);
            let border = _mm512_mask_blend_epi16(is_upper, first, third);
            return _mm512_mask_add_epi16(code, reached(border), code, one);
        }
        let [borders, inverse, start] = self.parts;
        let scaled = |bits| {
            let (inverse, start) = (_mm512_castsi512_ps(inverse), _mm512_castsi512_ps(start));
            let sum = _mm512_fmadd_ps(_mm512_castsi512_ps(bits), inverse, start);
            _mm512_castps_si512(sum)
        };
        // The first and the second of each two weights. What is whole comes to lie in their 16 bits.
        let first = _mm512_srli_epi32::<8>(scaled(_mm512_slli_epi32::<16>(bits)));
        let upper = _mm512_and_si512(bits, _mm512_set1_epi32(-0x1_0000));
        let second = _mm512_slli_epi32::<8>(scaled(upper));
        let code = _mm512_mask_blend_epi16(0xaaaa_aaaa, first, second);
        let border = _mm512_permutexvar_epi16(code, borders);
        _mm512_mask_add_epi16(code, reached(border), code, one)
    }
}
