//! E4M3 codes that are looked up, a table being three: codes rise by one at a time, so sixteen neighbours are known
//! by the first code and the places of two steps.

use std::arch::x86_64::*;

use super::{load_32_bytes, load_bytes, store_32_bytes};
use crate::formats::significands::{tiny, Significands, COUNT, EXPONENTS, RUN};

#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn look_up_e4m3(
    tables: &[Significands],
    size: usize,
    weights: &[[u8; 2]],
    codes: &mut [u8],
    ahead: usize,
) -> u64 {
    let (mut missed, mut number) = (0, 0);
    let parts = weights.chunks(size).zip(codes.chunks_mut(size));
    for ((weights, codes), table) in parts.zip(tables) {
        let Some(look_up) = LookUp::new(&table.codes) else {
            return u64::MAX;
        };
        let runs = weights.as_chunks::<RUN>().0;
        for (run, place) in runs.iter().zip(codes.as_chunks_mut::<RUN>().0) {
            crate::kernels::ahead(run, ahead);
            let (halves, _) = run.as_chunks();
            let (places, _) = place.as_chunks_mut();
            let beyond = _mm256_or_si256(
                look_up.put(table.least, &halves[0], &mut places[0]),
                look_up.put(table.least, &halves[1], &mut places[1]),
            );
            let is_missed = _mm256_testz_si256(beyond, beyond) == 0;
            missed |= u64::from(is_missed) << number;
            number += 1;
        }
    }
    missed
}

/// A table of significands.
struct LookUp {
    /// By the upper three bits of a significand: its code if the others are 0.
    first: __m256i,
    /// Up to which of the lower bits that is so, and up to which the code is one more.
    steps: [__m256i; 2],
}

impl LookUp {
    /// `None` if codes rise more than twice within sixteen.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(table: &[u8; COUNT]) -> Option<Self> {
        let mut first = [0; 16];
        let mut steps = [[0; 16]; 2];
        for (index, block) in table.as_chunks::<16>().0.iter().enumerate() {
            let [least, .., most] = *block;
            if most > least + 2 {
                return None;
            }
            let codes = load_bytes(block);
            first[index] = least;
            for (above, steps) in (0..).zip(&mut steps) {
                let is_more = _mm_cmpgt_epi8(codes, _mm_set1_epi8((least + above).cast_signed()));
                let count = _mm_movemask_epi8(is_more).count_ones();
                steps[index] = 15 - count as u8;
            }
        }
        let [one, two] = steps;
        Some(LookUp {
            first: twice(&first),
            steps: [twice(&one), twice(&two)],
        })
    }

    /// Codes of weights; zeros where they could all be looked up.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn put(&self, least: u8, run: &[[u8; 2]; 32], place: &mut [u8; 32]) -> __m256i {
        let (quarters, _) = run.as_flattened().as_chunks();
        let (front, back) = (load_32_bytes(&quarters[0]), load_32_bytes(&quarters[1]));
        // Of each weight the last bit of its exponent and its significand; its sign and the exponent's other bits.
        // Packing works within halves.
        let byte = _mm256_set1_epi16(0xff);
        let lower =
            _mm256_packus_epi16(_mm256_and_si256(front, byte), _mm256_and_si256(back, byte));
        let upper =
            _mm256_packus_epi16(_mm256_srli_epi16::<8>(front), _mm256_srli_epi16::<8>(back));
        let last = _mm256_and_si256(_mm256_srli_epi16::<7>(lower), _mm256_set1_epi8(1));
        let exponent = _mm256_or_si256(_mm256_add_epi8(upper, upper), last);
        let tiny = _mm256_set1_epi8(tiny(least).cast_signed());
        let is_more = _mm256_cmpeq_epi8(_mm256_max_epu8(exponent, tiny), exponent);
        let least = _mm256_set1_epi8(least.cast_signed());
        let above = _mm256_and_si256(_mm256_sub_epi8(exponent, least), is_more);
        let sixteenth = _mm256_and_si256(_mm256_srli_epi16::<4>(lower), _mm256_set1_epi8(7));
        let rest = _mm256_and_si256(lower, _mm256_set1_epi8(15));
        let mut code = _mm256_shuffle_epi8(self.first, sixteenth);
        for steps in self.steps {
            // One more is less −1.
            let step = _mm256_shuffle_epi8(steps, sixteenth);
            code = _mm256_sub_epi8(code, _mm256_cmpgt_epi8(rest, step));
        }
        // No number of exponents has more than four bits, so none goes over to the next byte.
        let code = _mm256_add_epi8(code, _mm256_slli_epi16::<3>(above));
        let code = _mm256_min_epu8(code, _mm256_set1_epi8(0x7e));
        let sign = _mm256_and_si256(upper, _mm256_set1_epi8(-0x80));
        let code = _mm256_or_si256(_mm256_and_si256(code, is_more), sign);
        store_32_bytes(_mm256_permute4x64_epi64::<0xd8>(code), place);
        _mm256_subs_epu8(above, _mm256_set1_epi8(EXPONENTS.cast_signed() - 1))
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn twice(bytes: &[u8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(load_bytes(bytes))
}
