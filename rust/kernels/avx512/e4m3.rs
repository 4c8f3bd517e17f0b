//! E4M3 codes that are looked up.

use std::arch::x86_64::*;

use super::orders::{bits_of, greatest_of};
use super::{load_64_bytes, store_32_bytes, store_64_bytes};
use crate::formats::significands::{tiny, Significands, COUNT, EXPONENTS, MX_BLOCKS, RUN};
use crate::kernels::avx2;

/// With permutations of bytes (VBMI), or as the level below does it.
#[target_feature(enable = "avx512f,avx512bw")]
pub(in crate::kernels) fn look_up_e4m3(
    tables: &[Significands],
    size: usize,
    weights: &[[u8; 2]],
    codes: &mut [u8],
    ahead: usize,
) -> u64 {
    if is_x86_feature_detected!("avx512vbmi") {
        // SAFETY: the processor has this feature too.
        return unsafe { look_up_bytes(tables, size, weights, codes, ahead) };
    }
    avx2::look_up_e4m3(tables, size, weights, codes, ahead)
}

/// With VBMI only.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(in crate::kernels) fn look_up_mxfp8(
    table: &[u8; COUNT],
    weights: &[[u8; 2]],
    codes: &mut [u8],
    scales: &mut [u8],
) -> u32 {
    if !is_x86_feature_detected!("avx512vbmi") {
        return u32::MAX;
    }
    // SAFETY: the processor has this feature too.
    unsafe { look_up_blocks(table, weights, codes, scales) }
}

/// # Safety
///
/// The processor has AVX-512 VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn look_up_bytes(
    tables: &[Significands],
    size: usize,
    weights: &[[u8; 2]],
    codes: &mut [u8],
    ahead: usize,
) -> u64 {
    let (mut missed, mut number) = (0, 0);
    let parts = weights.chunks(size).zip(codes.chunks_mut(size));
    for ((weights, codes), table) in parts.zip(tables) {
        let look_up = LookUp::new(&table.codes);
        let least = of_halves([table.least; 2]);
        let tiny = of_halves([tiny(table.least); 2]);
        let runs = weights.as_chunks::<RUN>().0;
        for (run, place) in runs.iter().zip(codes.as_chunks_mut::<RUN>().0) {
            crate::kernels::ahead(run, ahead);
            let is_missed = look_up.put(least, tiny, run, place);
            missed |= u64::from(is_missed) << number;
            number += 1;
        }
    }
    missed
}

/// # Safety
///
/// The processor has AVX-512 VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
unsafe fn look_up_blocks(
    table: &[u8; COUNT],
    weights: &[[u8; 2]],
    codes: &mut [u8],
    scales: &mut [u8],
) -> u32 {
    let mut most = [0u16; MX_BLOCKS];
    let blocks = weights.as_chunks().0;
    for (most, block) in most.iter_mut().zip(blocks) {
        *most = largest(block);
    }
    let (halves, _) = most.as_chunks();
    let mut found = [0; MX_BLOCKS];
    for (found, most) in found.as_chunks_mut().0.iter_mut().zip(halves) {
        store_32_bytes(mx_scales(most), found);
    }
    for (place, scale) in scales.iter_mut().zip(found) {
        *place = scale;
    }
    let look_up = LookUp::new(table);
    let ahead = std::mem::size_of_val(weights);
    let runs = weights.as_chunks::<RUN>().0;
    let runs = runs.iter().zip(codes.as_chunks_mut::<RUN>().0);
    let mut missed = 0;
    for (number, ((run, place), scales)) in runs.zip(found.as_chunks::<2>().0).enumerate() {
        crate::kernels::ahead(run, ahead);
        // The least normal number is 6 exponents below 1, which is the scale.
        let leasts = scales.map(|scale| scale.wrapping_sub(6));
        let (least, tiny) = (of_halves(leasts), of_halves(leasts.map(tiny)));
        let is_missed = look_up.put(least, tiny, run, place);
        // Below that scale there are exponents of less than 1.
        let is_small = scales.iter().any(|scale| *scale < 7);
        missed |= u32::from(is_missed || is_small) << number;
    }
    missed
}

/// A number in every byte of the lower half, and of the upper one.
#[inline]
#[target_feature(enable = "avx512f")]
fn of_halves([low, high]: [u8; 2]) -> __m512i {
    _mm512_inserti64x4::<1>(
        _mm512_castsi256_si512(_mm256_set1_epi8(low.cast_signed())),
        _mm256_set1_epi8(high.cast_signed()),
    )
}

/// Codes of the scales of blocks with these largest magnitudes, in BF16: of the least powers of two from 1/448 of
/// them on. 448 is 1.75·2⁸, so that is 8 exponents less, and one more from the next significand on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn mx_scales(most: &[u16; 32]) -> __m256i {
    /// What carries significands over 0x60 into the exponent.
    const CARRY: i16 = 0x7f - 0x60;
    // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
    let most = unsafe { _mm512_loadu_si512(most.as_ptr().cast()) };
    let exponents = _mm512_srli_epi16::<7>(_mm512_add_epi16(most, _mm512_set1_epi16(CARRY)));
    _mm512_cvtepi16_epi8(_mm512_subs_epu16(exponents, _mm512_set1_epi16(8)))
}

/// Bits of the largest magnitude.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn largest(weights: &[[u8; 2]; 32]) -> u16 {
    let sizes = _mm512_and_si512(bits_of(weights), _mm512_set1_epi16(i16::MAX));
    greatest_of(sizes).cast_unsigned()
}

/// A table of significands, and how weights are taken apart.
struct LookUp {
    table: [__m512i; 2],
    lower: __m512i,
    upper: __m512i,
}

impl LookUp {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(table: &[u8; COUNT]) -> Self {
        let (table, _) = table.as_chunks();
        let lower: [u8; 64] = std::array::from_fn(|index| 2 * index as u8);
        let lower = load_64_bytes(&lower);
        LookUp {
            table: [load_64_bytes(&table[0]), load_64_bytes(&table[1])],
            lower,
            upper: _mm512_or_si512(lower, _mm512_set1_epi8(1)),
        }
    }

    /// Codes of weights, the table being for these least exponents; below those of `tiny` codes are zero. Gives
    /// whether some could not be looked up.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn put(
        &self,
        least: __m512i,
        tiny: __m512i,
        run: &[[u8; 2]; RUN],
        place: &mut [u8; RUN],
    ) -> bool {
        let [low, high] = self.table;
        let (halves, _) = run.as_chunks();
        let (front, back) = (bits_of(&halves[0]), bits_of(&halves[1]));
        // Of each weight the last bit of its exponent and its significand; its sign and the exponent's other bits.
        let lower = _mm512_permutex2var_epi8(front, self.lower, back);
        let upper = _mm512_permutex2var_epi8(front, self.upper, back);
        // upper·2 | (lower >> 7 & 1)
        let exponent = _mm512_ternarylogic_epi32::<0xf8>(
            _mm512_add_epi8(upper, upper),
            _mm512_srli_epi16::<7>(lower),
            _mm512_set1_epi8(1),
        );
        let is_more = _mm512_cmpge_epu8_mask(exponent, tiny);
        let above = _mm512_maskz_sub_epi8(is_more, exponent, least);
        // Tables take the low seven bits.
        let code = _mm512_permutex2var_epi8(low, lower, high);
        // No step has more than four bits, so none goes over to the next byte.
        let code = _mm512_add_epi8(code, _mm512_slli_epi16::<3>(above));
        let code = _mm512_maskz_min_epu8(is_more, code, _mm512_set1_epi8(0x7e));
        // code | (upper & 0x80)
        let code = _mm512_ternarylogic_epi32::<0xf8>(code, upper, _mm512_set1_epi8(-0x80));
        store_64_bytes(code, place);
        let steps = _mm512_set1_epi8(EXPONENTS.cast_signed() - 1);
        _mm512_cmpgt_epu8_mask(above, steps) != 0
    }
}
