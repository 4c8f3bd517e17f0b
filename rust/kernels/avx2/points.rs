//! Points of IQ grids: eight scales side by side where weights are rounded and sums are taken, eight
//! near points side by side where one is chosen. Scalar bodies and special cases: see
//! `crate::formats::iq_grid_search`.

use std::arch::x86_64::*;

use super::{load, store};
use crate::kernels::points::{Lists, Run, Tried, ON_GRID, STEP};

/// Adding this number leaves a whole number in the low bits of the sum.
const ROUNDER: f32 = 12_582_912.0;

#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn try_points(
    lists: &Lists,
    run: Run<'_>,
    inverses: &[f32],
    scales: &[f32],
    tried: &mut Tried,
) -> bool {
    match lists.bits {
        2 => try_all::<2, 8>(lists, run, inverses, scales, tried),
        _ => try_all::<3, 4>(lists, run, inverses, scales, tried),
    }
    true
}

/// Eight numbers, the missing ones at the end being zeros.
#[inline]
#[target_feature(enable = "avx2")]
fn load_some(values: &[f32]) -> __m256 {
    match values.first_chunk() {
        Some(values) => load(values),
        None => {
            let mut filled = [0.0; 8];
            filled[..values.len()].copy_from_slice(values);
            load(&filled)
        }
    }
}

/// Eight codes.
#[inline]
#[target_feature(enable = "avx2")]
fn load_codes(codes: &[u32; 8]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load takes any alignment.
    unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
}

/// Entries of a table, chosen by the lowest digit of each code. Tables of two-bit digits hold their
/// four entries twice.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up<const BITS: u32>(table: __m256, codes: __m256i) -> __m256 {
    if BITS == 2 {
        _mm256_permutevar_ps(table, codes)
    } else {
        _mm256_permutevar8x32_ps(table, codes)
    }
}

/// Codes without their lowest digit.
#[inline]
#[target_feature(enable = "avx2")]
fn next_digit<const BITS: u32>(codes: __m256i) -> __m256i {
    if BITS == 2 {
        _mm256_srli_epi32::<2>(codes)
    } else {
        _mm256_srli_epi32::<3>(codes)
    }
}

/// What the levels stand for.
#[inline]
#[target_feature(enable = "avx2")]
fn values<const BITS: u32>() -> __m256 {
    if BITS == 2 {
        _mm256_setr_ps(1.0, 3.0, 5.0, 7.0, 1.0, 3.0, 5.0, 7.0)
    } else {
        _mm256_setr_ps(1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn try_all<const BITS: u32, const G: usize>(
    lists: &Lists,
    run: Run<'_>,
    inverses: &[f32],
    scales: &[f32],
    tried: &mut Tried,
) {
    let groups = run
        .x
        .as_chunks::<G>()
        .0
        .iter()
        .zip(run.roots.as_chunks::<G>().0);
    for ((codes, off_grid), (x, roots)) in
        tried.codes.iter_mut().zip(&mut tried.off_grid).zip(groups)
    {
        for (codes, inverses) in codes
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(inverses.chunks(8))
        {
            let found = round::<BITS, G>(x, load_some(inverses), run.top);
            // SAFETY: the reference is to 32 writable bytes; the store takes any alignment.
            unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), found) }
        }
        *off_grid = 0;
        for (index, (code, scale)) in codes.iter_mut().zip(scales).enumerate() {
            let place = lists
                .places
                .get(*code as usize)
                .map_or(ON_GRID, |place| *place);
            if place & ON_GRID == 0 {
                *off_grid |= 1 << index;
                let list = &lists.near[place as usize..];
                let scaled = _mm256_mul_ps(_mm256_set1_ps(*scale), values::<BITS>());
                let near = &list[1..][..STEP * usize::from(list[0])];
                *code = u32::from(nearest::<BITS, G>(near, x, roots, scaled));
            }
        }
    }

    let values = values::<BITS>();
    for first in (0..scales.len()).step_by(8) {
        let (mut cross, mut power) = (_mm256_setzero_ps(), _mm256_setzero_ps());
        let groups = run
            .x
            .as_chunks::<G>()
            .0
            .iter()
            .zip(run.shares.as_chunks::<G>().0);
        for (codes, (x, shares)) in tried.codes.iter().zip(groups) {
            let mut codes = load_codes(&codes.as_chunks().0[first / 8]);
            for (x, share) in x.iter().zip(shares) {
                let q = look_up::<BITS>(values, codes);
                codes = next_digit::<BITS>(codes);
                cross = _mm256_add_ps(cross, _mm256_mul_ps(_mm256_set1_ps(share * x), q));
                let part = _mm256_mul_ps(_mm256_set1_ps(*share), q);
                power = _mm256_add_ps(power, _mm256_mul_ps(part, q));
            }
        }
        store(cross, &mut tried.crosses.as_chunks_mut().0[first / 8]);
        store(power, &mut tried.powers.as_chunks_mut().0[first / 8]);
    }
}

/// Codes of one group at eight scales.
#[inline]
#[target_feature(enable = "avx2")]
fn round<const BITS: u32, const G: usize>(x: &[f32; G], inverse: __m256, top: i32) -> __m256i {
    let (one, half) = (_mm256_set1_ps(1.0), _mm256_set1_ps(0.5));
    let (rounder, top) = (_mm256_set1_ps(ROUNDER), _mm256_set1_epi32(top));
    let mut codes = _mm256_setzero_si256();
    for x in x.iter().rev() {
        let y = _mm256_mul_ps(inverse, _mm256_set1_ps(*x));
        let y = _mm256_mul_ps(half, _mm256_sub_ps(y, one));
        let bits = _mm256_castps_si256(_mm256_add_ps(y, rounder));
        let whole = _mm256_sub_epi32(
            _mm256_and_si256(bits, _mm256_set1_epi32(0x7f_ffff)),
            _mm256_set1_epi32(0x40_0000),
        );
        let level = _mm256_min_epi32(_mm256_max_epi32(whole, _mm256_setzero_si256()), top);
        codes = if BITS == 2 {
            _mm256_or_si256(_mm256_slli_epi32::<2>(codes), level)
        } else {
            _mm256_or_si256(_mm256_slli_epi32::<3>(codes), level)
        };
    }
    codes
}

/// As in the format, given what the levels stand for times the scale.
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn nearest_point(
    near: &[u16],
    x: &[f32; 8],
    shares: &[f32; 8],
    scaled: &[f32; 4],
) -> Option<u16> {
    let [a, b, c, d] = *scaled;
    let scaled = _mm256_setr_ps(a, b, c, d, a, b, c, d);
    Some(nearest::<2, 8>(near, x, shares, scaled))
}

/// The first code of a list with the smallest Σ root·(scaled − x)².
#[inline]
#[target_feature(enable = "avx2")]
fn nearest<const BITS: u32, const G: usize>(
    near: &[u16],
    x: &[f32; G],
    roots: &[f32; G],
    scaled: __m256,
) -> u16 {
    let mut terms = [_mm256_setzero_ps(); G];
    for ((terms, x), root) in terms.iter_mut().zip(x).zip(roots) {
        let miss = _mm256_sub_ps(scaled, _mm256_set1_ps(*x));
        *terms = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(*root), miss), miss);
    }
    let mut least = _mm256_set1_ps(f32::MAX);
    let mut at = _mm256_setzero_si256();
    let mut here = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for step in near.as_chunks::<STEP>().0 {
        let mut digits = load_step(step);
        let mut loss = look_up::<BITS>(terms[0], digits);
        for terms in &terms[1..] {
            digits = next_digit::<BITS>(digits);
            loss = _mm256_add_ps(loss, look_up::<BITS>(*terms, digits));
        }
        let is_less = _mm256_cmp_ps::<_CMP_LT_OQ>(loss, least);
        least = _mm256_blendv_ps(least, loss, is_less);
        at = _mm256_castps_si256(_mm256_blendv_ps(
            _mm256_castsi256_ps(at),
            _mm256_castsi256_ps(here),
            is_less,
        ));
        here = _mm256_add_epi32(here, _mm256_set1_epi32(STEP as i32));
    }
    // The smallest of all lanes, and the first place that has it.
    let folded = _mm_min_ps(
        _mm256_castps256_ps128(least),
        _mm256_extractf128_ps::<1>(least),
    );
    let folded = _mm_min_ps(folded, _mm_movehl_ps(folded, folded));
    let folded = _mm_min_ss(folded, _mm_movehdup_ps(folded));
    let is_least = _mm256_cmp_ps::<_CMP_EQ_OQ>(least, _mm256_broadcastss_ps(folded));
    let places = _mm256_or_si256(
        at,
        _mm256_xor_si256(_mm256_castps_si256(is_least), _mm256_set1_epi32(-1)),
    );
    let folded = _mm_min_epu32(
        _mm256_castsi256_si128(places),
        _mm256_extracti128_si256::<1>(places),
    );
    let folded = _mm_min_epu32(folded, _mm_unpackhi_epi64(folded, folded));
    let folded = _mm_min_epu32(folded, _mm_shuffle_epi32::<0b01>(folded));
    let first = _mm_cvtsi128_si32(folded).cast_unsigned();
    near.get(first as usize).copied().unwrap_or(0)
}

/// The codes of a step.
#[inline]
#[target_feature(enable = "avx2")]
fn load_step(step: &[u16; STEP]) -> __m256i {
    // SAFETY: the reference is to 16 readable bytes; the load takes any alignment.
    let codes = unsafe { _mm_loadu_si128(step.as_ptr().cast()) };
    _mm256_cvtepu16_epi32(codes)
}
