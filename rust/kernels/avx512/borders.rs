//! BF16 weights as whole numbers of 16 bits that are ordered as they are (`Stored::order`), the range of many of
//! them, and their codes by search among the least weights of each.

use std::arch::x86_64::*;

use crate::formats::borders::TOGETHER;

/// 32 weights, ordered.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn ordered(weights: &[[u8; 2]; 32]) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
    let bits = unsafe { _mm512_loadu_si512(weights.as_ptr().cast()) };
    // bits ^ (sign & 0x7fff)
    let sign = _mm512_srai_epi16::<15>(bits);
    _mm512_ternarylogic_epi32::<0x78>(bits, sign, _mm512_set1_epi16(i16::MAX))
}

/// The least and the greatest orders of as many groups, of a multiple of 32 weights each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn ranges<'a>(group: impl Fn(usize) -> &'a [[u8; 2]]) -> [[i16; TOGETHER]; 2] {
    let (mut least, mut greatest) = ([0; TOGETHER], [0; TOGETHER]);
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
        let order = ordered(weights);
        least = _mm512_min_epi16(least, order);
        greatest = _mm512_max_epi16(greatest, order);
    }
    [
        least_of(least),
        !least_of(_mm512_xor_si512(greatest, _mm512_set1_epi16(-1))),
    ]
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

/// Bits of numbers in the order of these, or the other way round, and the signs.
#[inline]
#[target_feature(enable = "avx512f")]
fn ordered_32(bits: __m512i) -> (__m512i, __m512i) {
    let sign = _mm512_srai_epi32::<31>(bits);
    // bits ^ (sign & 0x7fffffff)
    let order = _mm512_ternarylogic_epi32::<0x78>(bits, sign, _mm512_set1_epi32(i32::MAX));
    (order, sign)
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

/// The least orders with codes 1, 2, … 15 (for two bits: 1, 2, 3).
#[derive(Clone, Copy)]
pub(super) struct Borders {
    /// Borders 8 (2), and from 4 (1), from 2 and from 1 on.
    tables: [__m512i; 4],
}

impl Borders {
    /// Those with these orders, 32 bits each.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn of<const BITS: u32>(orders: __m512i) -> Self {
        let from_1 = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(orders));
        let place: [i16; 32] = std::array::from_fn(|index| index as i16);
        // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
        let place = unsafe { _mm512_loadu_si512(place.as_ptr().cast()) };
        let from = |number: i16| {
            let place = _mm512_add_epi16(place, _mm512_set1_epi16(number - 1));
            _mm512_permutexvar_epi16(place, from_1)
        };
        let only = |number: i16| _mm512_permutexvar_epi16(_mm512_set1_epi16(number - 1), from_1);
        Borders {
            tables: match BITS {
                2 => [only(2), only(1), only(3), from_1],
                _ => [only(8), from(4), from(2), from_1],
            },
        }
    }

    /// The orders of the least BF16 numbers that are at least `numbers`, or more where a lane of `strict` is 1 (0
    /// otherwise).
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn from(numbers: __m512, strict: __m512i) -> __m512i {
        let (order, sign) = ordered_32(_mm512_castps_si512(numbers));
        // The last bits of a BF16 number are 0, and those of the order of a negative one are 1.
        let rest = _mm512_andnot_si512(sign, _mm512_set1_epi32(0xffff));
        _mm512_srai_epi32::<16>(_mm512_add_epi32(order, _mm512_add_epi32(strict, rest)))
    }

    /// What a search for codes goes on by. The compiler is not told what these numbers are: it would make more than a
    /// sum of each step, as they have no bit in common.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn steps() -> [__m512i; 3] {
        [4, 2, 1].map(|step| _mm512_set1_epi16(std::hint::black_box(step)))
    }

    /// Codes of 32 weights, each in 16 bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn codes<const BITS: u32>(&self, steps: &[__m512i; 3], order: __m512i) -> __m512i {
        let reached = |border| _mm512_cmpge_epi16_mask(order, border);
        let [first, tables @ ..] = self.tables;
        let is_upper = reached(first);
        if BITS == 2 {
            let code = _mm512_maskz_set1_epi16(is_upper, 2);
            let border = _mm512_mask_blend_epi16(is_upper, tables[0], tables[1]);
            return _mm512_mask_add_epi16(code, reached(border), code, steps[2]);
        }
        let mut code = _mm512_maskz_set1_epi16(is_upper, 8);
        for (table, &step) in tables.into_iter().zip(steps) {
            let border = _mm512_permutexvar_epi16(code, table);
            code = _mm512_mask_add_epi16(code, reached(border), code, step);
        }
        code
    }
}
