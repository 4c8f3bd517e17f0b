//! BF16 weights as whole numbers of 16 bits that are ordered as they are (`Stored::order`), and the range of many.

use std::arch::x86_64::*;

use crate::kernels::GROUPS;

/// The bits of 32 weights.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn bits_of(weights: &[[u8; 2]; 32]) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
    unsafe { _mm512_loadu_si512(weights.as_ptr().cast()) }
}

/// The orders of weights, given their bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn ordered(bits: __m512i) -> __m512i {
    // bits ^ (sign & 0x7fff)
    let sign = _mm512_srai_epi16::<15>(bits);
    _mm512_ternarylogic_epi32::<0x78>(bits, sign, _mm512_set1_epi16(i16::MAX))
}

/// The least and the greatest orders of as many groups, of a multiple of 32 weights each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn ranges<'a>(group: impl Fn(usize) -> &'a [[u8; 2]]) -> [[i16; GROUPS]; 2] {
    let (mut least, mut greatest) = ([0; GROUPS], [0; GROUPS]);
    for (index, (least, greatest)) in least.iter_mut().zip(&mut greatest).enumerate() {
        [*least, *greatest] = range(group(index));
    }
    [least, greatest]
}

/// The least and the greatest of the orders of weights, of which there are a multiple of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn range(weights: &[[u8; 2]]) -> [i16; 2] {
    let mut least = _mm512_set1_epi16(i16::MAX);
    let mut greatest = _mm512_set1_epi16(i16::MIN);
    for weights in weights.as_chunks().0 {
        let order = ordered(bits_of(weights));
        least = _mm512_min_epi16(least, order);
        greatest = _mm512_max_epi16(greatest, order);
    }
    [least_of(least), greatest_of(greatest)]
}

/// The greatest of 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn greatest_of(orders: __m512i) -> i16 {
    !least_of(_mm512_xor_si512(orders, _mm512_set1_epi16(-1)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn least_of(orders: __m512i) -> i16 {
    let (low, high) = (
        _mm512_castsi512_si256(orders),
        _mm512_extracti64x4_epi64::<1>(orders),
    );
    let least = _mm256_min_epi16(low, high);
    let (low, high) = (
        _mm256_castsi256_si128(least),
        _mm256_extracti128_si256::<1>(least),
    );
    let least = _mm_min_epi16(low, high);
    // The instruction takes them without sign.
    let least = _mm_minpos_epu16(_mm_xor_si128(least, _mm_set1_epi16(i16::MIN)));
    _mm_cvtsi128_si32(least) as i16 ^ i16::MIN
}

/// The values of 16 orders.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn values(orders: &[i16; 16]) -> __m512 {
    // SAFETY: the reference is to 32 readable bytes; the load takes any alignment.
    let order = unsafe { _mm256_loadu_si256(orders.as_ptr().cast()) };
    let sign = _mm256_srai_epi16::<15>(order);
    let bits = _mm256_ternarylogic_epi32::<0x78>(order, sign, _mm256_set1_epi16(i16::MAX));
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

/// Rounded to BF16, to nearest with ties to even; no NaN.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn rounded(values: __m512) -> __m512 {
    let bits = _mm512_castps_si512(values);
    let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let sum = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32(-0x1_0000)))
}
