//! Runs of 32 weights on a table of levels: a run per lane while sums are taken in order, eight weights per vector
//! where codes are packed. Scalar bodies and special cases: see `crate::formats::iq4_search`.

use std::arch::x86_64::*;

use super::{load, load_block, magnitude, split_nibbles, store};
use crate::codebook::Levels;

/// Weights of a run.
pub(in crate::kernels) const WEIGHTS: usize = 32;

/// Turns up to `lanes` runs (a multiple of eight, `LANES` at most) into one vector per place in a run;
/// runs that are missing are zeros. `N` is a multiple of eight.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn transpose<const LANES: usize, const N: usize>(
    lanes: usize,
    runs: &[[f32; N]],
    places: &mut [[f32; LANES]; N],
) {
    for first in (0..lanes.min(LANES)).step_by(8) {
        for place in (0..N).step_by(8) {
            let mut rows = [_mm256_setzero_ps(); 8];
            for (row, run) in rows.iter_mut().zip(runs.iter().skip(first)) {
                *row = load(&run.as_chunks().0[place / 8]);
            }
            let columns = transpose_8(rows);
            for (column, place) in columns.into_iter().zip(&mut places[place..]) {
                store(column, &mut place.as_chunks_mut().0[first / 8]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn transpose_8(rows: [__m256; 8]) -> [__m256; 8] {
    let [a, b, c, d, e, f, g, h] = rows;
    // Pairs, then fours, within halves; then the halves.
    let pairs = |a, b, c, d| {
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        [
            _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
            _mm256_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high),
        ]
    };
    let (left, right) = (pairs(a, b, c, d), pairs(e, f, g, h));
    let low = |i: usize| _mm256_permute2f128_ps::<0x20>(left[i], right[i]);
    let high = |i: usize| _mm256_permute2f128_ps::<0x31>(left[i], right[i]);
    [
        low(0),
        low(1),
        low(2),
        low(3),
        high(0),
        high(1),
        high(2),
        high(3),
    ]
}

/// A search tree over the midpoints: at each depth the midpoints that may be next, in order.
struct Codes {
    depths: [__m256; 4],
}

impl Codes {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(levels: &Levels) -> Self {
        let depth = |first: usize, step: usize| {
            let mut next = [0.0; 8];
            for (next, midpoint) in next
                .iter_mut()
                .zip(levels.midpoints[first..].iter().step_by(step))
            {
                *next = *midpoint;
            }
            load(&next)
        };
        Codes {
            depths: [depth(7, 16), depth(3, 8), depth(1, 4), depth(0, 2)],
        }
    }

    /// How many midpoints each number is not below; all of them for NaN.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn of(&self, y: __m256) -> __m256i {
        let mut code = _mm256_setzero_si256();
        for midpoints in self.depths {
            let midpoint = _mm256_permutevar8x32_ps(midpoints, code);
            let passed = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLT_UQ>(y, midpoint));
            // A lane that passed holds −1.
            code = _mm256_sub_epi32(_mm256_add_epi32(code, code), passed);
        }
        code
    }
}

#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn search_levels(
    levels: &Levels,
    epsilon: f32,
    tries: i8,
    weights: &[f32],
    shares: &[f32],
    scales: &mut [f32],
) -> usize {
    let codes = Codes::new(levels);
    let (values, _) = levels.values.as_chunks();
    let (low, high) = (load(&values[0]), load(&values[1]));
    let (zero, epsilon) = (_mm256_setzero_ps(), _mm256_set1_ps(epsilon));
    let runs = weights.as_chunks().0;
    let mut x = [[0.0; 8]; WEIGHTS];
    let mut s = [[0.0; 8]; WEIGHTS];
    let batches = runs.chunks(8).zip(shares.as_chunks().0.chunks(8));
    for ((runs, shares), scales) in batches.zip(scales.chunks_mut(8)) {
        transpose(8, runs, &mut x);
        transpose(8, shares, &mut s);
        let (mut most, mut largest) = (zero, zero);
        for weights in &x {
            let weights = load(weights);
            let size = _mm256_castsi256_ps(magnitude(weights));
            let is_larger = _mm256_cmp_ps::<_CMP_GT_OQ>(size, largest);
            most = _mm256_blendv_ps(most, weights, is_larger);
            largest = _mm256_blendv_ps(largest, size, is_larger);
        }
        let sums = |inverse: __m256| {
            let (mut cross, mut power) = (zero, zero);
            for (x, s) in x.iter().zip(&s) {
                let x = load(x);
                let code = codes.of(_mm256_mul_ps(x, inverse));
                // The fourth bit chooses the half of the table; the permutations ignore it.
                let q = _mm256_blendv_ps(
                    _mm256_permutevar8x32_ps(low, code),
                    _mm256_permutevar8x32_ps(high, code),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code)),
                );
                let part = _mm256_mul_ps(load(s), q);
                cross = _mm256_add_ps(cross, _mm256_mul_ps(part, x));
                power = _mm256_add_ps(power, _mm256_mul_ps(part, q));
            }
            (cross, power)
        };
        let first = _mm256_div_ps(most, _mm256_set1_ps(-levels.values[0]));
        let (cross, power) = sums(_mm256_div_ps(_mm256_set1_ps(1.0), first));
        let is_positive = _mm256_cmp_ps::<_CMP_GT_OQ>(power, zero);
        let mut scale = _mm256_and_ps(_mm256_div_ps(cross, power), is_positive);
        let mut mark = _mm256_mul_ps(scale, cross);
        for step in -tries..=tries {
            let (cross, power) = sums(_mm256_div_ps(
                _mm256_set1_ps(f32::from(step) + levels.values[0]),
                most,
            ));
            let is_better = _mm256_and_ps(
                _mm256_cmp_ps::<_CMP_GT_OQ>(power, zero),
                _mm256_cmp_ps::<_CMP_GT_OQ>(
                    _mm256_mul_ps(cross, cross),
                    _mm256_mul_ps(mark, power),
                ),
            );
            let quotient = _mm256_div_ps(cross, power);
            scale = _mm256_blendv_ps(scale, quotient, is_better);
            mark = _mm256_blendv_ps(mark, _mm256_mul_ps(quotient, cross), is_better);
        }
        let is_zero = _mm256_cmp_ps::<_CMP_LT_OQ>(largest, epsilon);
        let mut found = [0.0; 8];
        store(_mm256_andnot_ps(is_zero, scale), &mut found);
        scales.copy_from_slice(&found[..scales.len()]);
    }
    runs.len()
}

#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn pack_levels(
    levels: &Levels,
    weights: &[f32],
    inverses: &[f32],
    packed: &mut [u8],
) -> usize {
    let codes = Codes::new(levels);
    let runs = weights.as_chunks().0;
    for ((weights, inverse), packed) in runs
        .iter()
        .zip(inverses)
        .zip(packed.as_chunks_mut::<{ WEIGHTS / 2 }>().0)
    {
        let inverse = _mm256_set1_ps(*inverse);
        let nibbles = load_block(weights).map(|x| codes.of(_mm256_mul_ps(x, inverse)));
        super::store_bytes(split_nibbles(nibbles), packed);
    }
    runs.len()
}
