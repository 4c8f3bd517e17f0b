//! 4-bit floats in pairs, 16 lanes each. Scalar bodies and special cases: see `crate::formats::e2m1` and
//! `crate::formats::fp4_blocks`.

use std::arch::x86_64::*;

use super::{load, magnitude, store};
use crate::formats::e2m1::{Rounding, Scaling, MOST};
use crate::formats::rows8::Divisor;
use crate::kernels::avx2::{NOTHING, RAISED};

/// Lowest of two magnitudes, and without a sign: as `_mm512_range_ps` counts. A number wins over NaN.
const LEAST_MAGNITUDE: i32 = 0b1010;
const UP: i32 = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;

/// What is added to magnitudes from 2^e on (e = 0, 1, 2; what is below 1 counts as 1), by the last four bits of
/// their exponent. The sum's last bit is one step of the codes there, 2^(e − 1), and its last byte the code, for
/// the codes of 2^e and of what is below count from 2·e.
const TO_CODE: [f32; 16] = {
    let mut table = [0.0; 16];
    let mut e = 0;
    while e < 3 {
        // 1½·2^(e + 22), and the code.
        let (power, code) = (127 + 22 + e, 2 * e);
        table[(127 + e) % 16] = f32::from_bits((power << 23 | 1 << 22 | code) as u32);
        e += 1;
    }
    table
};

/// Half a step, by the same bits.
const HALF_STEP: [f32; 16] = {
    let mut table = [0.0; 16];
    let mut e = 0;
    while e < 3 {
        table[(127 + e) % 16] = f32::from_bits(((127 + e - 2) << 23) as u32);
        e += 1;
    }
    table
};

/// Codes of 16 numbers, each in the last byte of its lane; `is_signed` are those with a sign.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn codes(rounding: Rounding, x: __m512, is_signed: __mmask16) -> __m512i {
    let size = _mm512_range_ps::<LEAST_MAGNITUDE>(x, _mm512_set1_ps(MOST));
    // As whole numbers magnitudes have the same order.
    let at_least_1 = _mm512_max_epi32(
        _mm512_castps_si512(size),
        _mm512_castps_si512(_mm512_set1_ps(1.0)),
    );
    let exponent = _mm512_srli_epi32::<23>(at_least_1);
    let to_code = _mm512_permutexvar_ps(exponent, load(&TO_CODE));
    let sum = match rounding {
        Rounding::Even | Rounding::EvenUnsignedZero => _mm512_add_ps(size, to_code),
        // Up from half a step less, so that ties go down. Rounding up twice is rounding up once.
        Rounding::Down => {
            let half_step = _mm512_permutexvar_ps(exponent, load(&HALF_STEP));
            let less = _mm512_sub_round_ps::<UP>(size, half_step);
            _mm512_add_round_ps::<UP>(less, to_code)
        }
    };
    let code = _mm512_castps_si512(sum);
    _mm512_mask_or_epi32(code, is_signed, code, _mm512_set1_epi32(8))
}

/// Eight bytes of sixteen codes, each pair with the first in the low half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pairs(codes: __m512i) -> [u8; 8] {
    // The first code of two times 1, the second times 16.
    let pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(codes), _mm_set1_epi16(0x1001));
    _mm_cvtsi128_si64(_mm_cvtepi16_epi8(pairs)).to_le_bytes()
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn encode_all(
    rounding: Rounding,
    scale: impl Fn(__m512) -> (__m512, __mmask16),
    weights: &[f32],
    packed: &mut [u8],
) -> usize {
    let mut done = 0;
    let steps = weights.as_chunks().0.iter().zip(packed.as_chunks_mut().0);
    for (weights, packed) in steps {
        let (x, is_signed) = scale(load(weights));
        *packed = pairs(codes(rounding, x, is_signed));
        done += 16;
    }
    done
}

/// Which of scaled numbers have a sign.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn signed(rounding: Rounding, x: __m512) -> __mmask16 {
    let zero = _mm512_setzero_ps();
    match rounding {
        Rounding::Even => _mm512_movepi32_mask(_mm512_castps_si512(x)),
        Rounding::EvenUnsignedZero => _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, zero),
        Rounding::Down => _mm512_cmp_ps_mask::<_CMP_LE_OQ>(x, zero),
    }
}

/// Divided, where that cannot be done without.
#[cold]
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn divided(rounding: Rounding, by: f32, weights: &[f32], packed: &mut [u8]) -> usize {
    let by = _mm512_set1_ps(by);
    let divide = |x| {
        let x = _mm512_div_ps(x, by);
        (x, signed(rounding, x))
    };
    encode_all(rounding, divide, weights, packed)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in crate::kernels) fn encode_e2m1(
    rounding: Rounding,
    scaling: Scaling,
    weights: &[f32],
    packed: &mut [u8],
) -> usize {
    match scaling {
        Scaling::Product(factor) => {
            let factor = _mm512_set1_ps(factor);
            let multiply = |x| {
                let x = _mm512_mul_ps(x, factor);
                (x, signed(rounding, x))
            };
            encode_all(rounding, multiply, weights, packed)
        }
        // As `crate::formats::rows8::Divisor`. What is large may be off, infinite or NaN: its code is that of 6
        // all the same. What is next to nothing may be off as well, so that signs are those of the weights.
        Scaling::Quotient(by) if Divisor::serves(by) => {
            let inverse = _mm512_set1_ps(1.0 / by);
            let nothing = _mm512_set1_ps(by * NOTHING);
            let below = _mm512_set1_ps(by * -NOTHING);
            let by = _mm512_set1_ps(by);
            let divide = |x| {
                let about = _mm512_mul_ps(x, inverse);
                let left = _mm512_fnmadd_ps(about, by, x);
                let quotient = _mm512_fmadd_ps(left, inverse, about);
                let raised = _mm512_mul_ps(x, _mm512_set1_ps(RAISED));
                let is_signed = match rounding {
                    Rounding::Even => _mm512_movepi32_mask(_mm512_castps_si512(x)),
                    Rounding::EvenUnsignedZero => _mm512_cmp_ps_mask::<_CMP_LT_OQ>(raised, below),
                    Rounding::Down => _mm512_cmp_ps_mask::<_CMP_LE_OQ>(raised, nothing),
                };
                (quotient, is_signed)
            };
            encode_all(rounding, divide, weights, packed)
        }
        Scaling::Quotient(by) => divided(rounding, by, weights, packed),
    }
}

/// The largest magnitude of each block of `size` finite weights, 16 or 32.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn most_of_blocks(size: usize, weights: &[f32], largest: &mut [f32]) {
    match size {
        16 => most_of::<16, 256>(weights, largest),
        _ => most_of::<32, 512>(weights, largest),
    }
}

/// As [`most_of_blocks`]; `GROUP` weights are 16 blocks.
#[inline]
#[target_feature(enable = "avx512f")]
fn most_of<const SIZE: usize, const GROUP: usize>(weights: &[f32], largest: &mut [f32]) {
    let (groups, rest) = weights.as_chunks::<GROUP>();
    for (group, largest) in groups.iter().zip(largest.as_chunks_mut().0) {
        let (blocks, _) = group.as_chunks::<SIZE>();
        let vectors = std::array::from_fn(|block| lanes_of(&blocks[block]));
        store(_mm512_castsi512_ps(largest_lanes(vectors)), largest);
    }
    let blocks = rest.as_chunks::<SIZE>().0.iter();
    for (block, largest) in blocks.zip(largest.iter_mut().skip(16 * groups.len())) {
        *largest = f32::from_bits(_mm512_reduce_max_epu32(lanes_of(block)));
    }
}

/// The largest magnitudes of a block, lane by lane. As whole numbers they have the same order.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes_of<const SIZE: usize>(block: &[f32; SIZE]) -> __m512i {
    let mut most = _mm512_setzero_si512();
    for weights in block.as_chunks().0 {
        most = _mm512_max_epi32(most, magnitude(load(weights)));
    }
    most
}

/// The largest lane of each of 16 vectors of numbers, in the order of the vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn largest_lanes(vectors: [__m512i; 16]) -> __m512i {
    // Eight lanes are from one vector, then four.
    let eights: [__m512i; 8] = std::array::from_fn(|i| {
        let (a, b) = (vectors[2 * i], vectors[2 * i + 1]);
        _mm512_max_epi32(
            _mm512_shuffle_i32x4::<0x44>(a, b),
            _mm512_shuffle_i32x4::<0xee>(a, b),
        )
    });
    let fours: [__m512i; 4] = std::array::from_fn(|i| {
        let (a, b) = (eights[2 * i], eights[2 * i + 1]);
        _mm512_max_epi32(
            _mm512_shuffle_i32x4::<0x88>(a, b),
            _mm512_shuffle_i32x4::<0xdd>(a, b),
        )
    });
    // Within a quarter two lanes are from one vector, then one.
    let twos: [__m512i; 2] = std::array::from_fn(|i| {
        let (a, b) = (fours[2 * i], fours[2 * i + 1]);
        _mm512_max_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
    });
    let [a, b] = twos;
    let most = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    // Quarter k has vectors k, 4 + k, 8 + k, 12 + k.
    let in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(in_order, most)
}
