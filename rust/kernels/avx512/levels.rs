//! Runs of 32 weights on a table of levels: a run per lane while sums are taken in order, sixteen weights per vector
//! where codes are packed. Scalar bodies and special cases: see `crate::formats::iq4_search`.

use std::arch::x86_64::*;

use super::{load, store, store_16_bytes};
use crate::codebook::Levels;
use crate::kernels::avx2::{transpose, WEIGHTS};

/// A search tree over the midpoints: where the search stands at i and steps by s, it compares with
/// midpoint i + s − 1.
struct Codes {
    root: __m512,
    depths: [(__m512, i32); 3],
}

impl Codes {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(levels: &Levels) -> Self {
        let depth = |step: usize| {
            let mut shifted = [0.0; 16];
            shifted[..16 - step].copy_from_slice(&levels.midpoints[step - 1..]);
            (load(&shifted), step as i32)
        };
        Codes {
            root: _mm512_set1_ps(levels.midpoints[7]),
            depths: [depth(4), depth(2), depth(1)],
        }
    }

    /// How many midpoints each number is not below; all of them for NaN.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn of(&self, y: __m512) -> __m512i {
        let passed = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(y, self.root);
        let mut code = _mm512_maskz_set1_epi32(passed, 8);
        for (midpoints, step) in self.depths {
            let midpoint = _mm512_permutexvar_ps(code, midpoints);
            let passed = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(y, midpoint);
            code = _mm512_mask_add_epi32(code, passed, code, _mm512_set1_epi32(step));
        }
        code
    }
}

#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn search_levels(
    levels: &Levels,
    epsilon: f32,
    tries: i8,
    weights: &[f32],
    shares: &[f32],
    scales: &mut [f32],
) -> usize {
    let codes = Codes::new(levels);
    let values = load(&levels.values);
    let (zero, epsilon) = (_mm512_setzero_ps(), _mm512_set1_ps(epsilon));
    let runs = weights.as_chunks().0;
    let mut x = [[0.0; 16]; WEIGHTS];
    let mut s = [[0.0; 16]; WEIGHTS];
    let batches = runs.chunks(16).zip(shares.as_chunks().0.chunks(16));
    for ((runs, shares), scales) in batches.zip(scales.chunks_mut(16)) {
        transpose(16, runs, &mut x);
        transpose(16, shares, &mut s);
        let (mut most, mut largest) = (zero, zero);
        for weights in &x {
            let weights = load(weights);
            let size = _mm512_abs_ps(weights);
            let is_larger = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(size, largest);
            most = _mm512_mask_mov_ps(most, is_larger, weights);
            largest = _mm512_mask_mov_ps(largest, is_larger, size);
        }
        let sums = |inverse: __m512| {
            let (mut cross, mut power) = (zero, zero);
            for (x, s) in x.iter().zip(&s) {
                let x = load(x);
                let code = codes.of(_mm512_mul_ps(x, inverse));
                let q = _mm512_permutexvar_ps(code, values);
                let part = _mm512_mul_ps(load(s), q);
                cross = _mm512_add_ps(cross, _mm512_mul_ps(part, x));
                power = _mm512_add_ps(power, _mm512_mul_ps(part, q));
            }
            (cross, power)
        };
        let first = _mm512_div_ps(most, _mm512_set1_ps(-levels.values[0]));
        let (cross, power) = sums(_mm512_div_ps(_mm512_set1_ps(1.0), first));
        let is_positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(power, zero);
        let mut scale = _mm512_maskz_div_ps(is_positive, cross, power);
        let mut mark = _mm512_mul_ps(scale, cross);
        for step in -tries..=tries {
            let (cross, power) = sums(_mm512_div_ps(
                _mm512_set1_ps(f32::from(step) + levels.values[0]),
                most,
            ));
            let is_better = _mm512_mask_cmp_ps_mask::<_CMP_GT_OQ>(
                _mm512_cmp_ps_mask::<_CMP_GT_OQ>(power, zero),
                _mm512_mul_ps(cross, cross),
                _mm512_mul_ps(mark, power),
            );
            scale = _mm512_mask_div_ps(scale, is_better, cross, power);
            mark = _mm512_mask_mul_ps(mark, is_better, scale, cross);
        }
        let is_zero = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(largest, epsilon);
        let mut found = [0.0; 16];
        store(_mm512_mask_mov_ps(scale, is_zero, zero), &mut found);
        scales.copy_from_slice(&found[..scales.len()]);
    }
    runs.len()
}

#[target_feature(enable = "avx512f")]
pub(in crate::kernels) fn pack_levels(
    levels: &Levels,
    weights: &[f32],
    inverses: &[f32],
    packed: &mut [u8],
) -> usize {
    let codes = Codes::new(levels);
    let runs = weights.as_chunks::<WEIGHTS>().0;
    for ((weights, inverse), packed) in runs
        .iter()
        .zip(inverses)
        .zip(packed.as_chunks_mut::<{ WEIGHTS / 2 }>().0)
    {
        let inverse = _mm512_set1_ps(*inverse);
        let [low, high] = [0, 1].map(|half| {
            let x = load(&weights.as_chunks().0[half]);
            codes.of(_mm512_mul_ps(x, inverse))
        });
        let bytes = _mm512_or_si512(low, _mm512_slli_epi32::<4>(high));
        store_16_bytes(_mm512_cvtepi32_epi8(bytes), packed);
    }
    runs.len()
}
