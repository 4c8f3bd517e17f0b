//! E4M3 codes that are looked up.

use std::arch::x86_64::*;

use super::store_64_bytes;
use crate::formats::significands::{Significands, EXPONENTS, RUN};

/// For processors with AVX-512 VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(in crate::kernels) fn look_up_e4m3(
    tables: &[Significands],
    size: usize,
    weights: &[[u8; 2]],
    codes: &mut [u8],
    ahead: usize,
) -> u64 {
    let steps = _mm512_set1_epi8(EXPONENTS.cast_signed() - 1);
    let first: [u8; 64] = std::array::from_fn(|index| 2 * index as u8);
    let first = load_64_bytes(&first);
    let second = _mm512_or_si512(first, _mm512_set1_epi8(1));
    let (mut missed, mut number) = (0, 0);
    let parts = weights.chunks(size).zip(codes.chunks_mut(size));
    for ((weights, codes), table) in parts.zip(tables) {
        let (low, _) = table.codes.as_chunks();
        let (low, high) = (load_64_bytes(&low[0]), load_64_bytes(&low[1]));
        let least = _mm512_set1_epi8(table.least.cast_signed());
        let runs = weights.as_chunks::<RUN>().0;
        for (run, place) in runs.iter().zip(codes.as_chunks_mut::<RUN>().0) {
            crate::kernels::ahead(run, ahead);
            let [front, back] = halves(run);
            // Of each weight the last bit of its exponent and its significand; its sign and the exponent's other
            // bits.
            let lower = _mm512_permutex2var_epi8(front, first, back);
            let upper = _mm512_permutex2var_epi8(front, second, back);
            // upper·2 | (lower >> 7 & 1)
            let exponent = _mm512_ternarylogic_epi32::<0xf8>(
                _mm512_add_epi8(upper, upper),
                _mm512_srli_epi16::<7>(lower),
                _mm512_set1_epi8(1),
            );
            let above = _mm512_sub_epi8(exponent, least);
            let is_beyond = _mm512_cmpgt_epu8_mask(above, steps) != 0;
            missed |= u64::from(is_beyond) << number;
            number += 1;
            // Tables take the low seven bits.
            let code = _mm512_permutex2var_epi8(low, lower, high);
            // No step has more than four bits, so none goes over to the next byte.
            let code = _mm512_add_epi8(code, _mm512_slli_epi16::<3>(above));
            let code = _mm512_min_epu8(code, _mm512_set1_epi8(0x7e));
            // code | (upper & 0x80)
            let code = _mm512_ternarylogic_epi32::<0xf8>(code, upper, _mm512_set1_epi8(-0x80));
            store_64_bytes(code, place);
        }
    }
    missed
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_64_bytes(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn halves(run: &[[u8; 2]; RUN]) -> [__m512i; 2] {
    let (halves, _) = run.as_flattened().as_chunks();
    [load_64_bytes(&halves[0]), load_64_bytes(&halves[1])]
}
