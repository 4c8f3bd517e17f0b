//! Vectors for the searches of `crate::kernels::search`, 8 lanes each, and those searches.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use super::{load, store_bytes, transpose};
use crate::kernels::search::lanes::{self, Lanes, Two, Vector, MOST};
use crate::kernels::search::{AffineSearch, Fit, Weigh, ROUNDER};

/// Proof that the processor has the instructions.
#[derive(Clone, Copy)]
struct Avx2(());

impl Avx2 {
    /// # Safety
    ///
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn new() -> Self {
        Avx2(())
    }
}

/// 8 numbers; made by [`Avx2`] only.
#[derive(Clone, Copy)]
struct F8(__m256);

impl Lanes for Avx2 {
    type Vector = F8;

    #[inline(always)]
    fn splat(self, value: f32) -> F8 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { F8(_mm256_set1_ps(value)) }
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> F8 {
        match values.first_chunk::<8>() {
            // SAFETY: as above; the reference is to 32 readable bytes, of any alignment.
            Some(values) => unsafe { F8(_mm256_loadu_ps(values.as_ptr())) },
            None => self.splat(0.0),
        }
    }

    #[inline(always)]
    fn transpose<const N: usize>(
        self,
        lanes: usize,
        runs: &[[f32; N]],
        columns: &mut [[f32; MOST]; N],
    ) {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { transpose(lanes, runs, columns) }
    }
}

impl Add for F8 {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_add_ps(self.0, other.0)) }
    }
}

impl Sub for F8 {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_sub_ps(self.0, other.0)) }
    }
}

impl Mul for F8 {
    type Output = Self;

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_mul_ps(self.0, other.0)) }
    }
}

impl Div for F8 {
    type Output = Self;

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_div_ps(self.0, other.0)) }
    }
}

impl Vector for F8 {
    const COUNT: usize = 8;
    type Mask = __m256;

    #[inline(always)]
    fn store(self, values: &mut [f32]) {
        if let Some(values) = values.first_chunk_mut::<8>() {
            // SAFETY: a vector exists only where the processor has the instructions; the reference is
            // to 32 writable bytes, of any alignment.
            unsafe { _mm256_storeu_ps(values.as_mut_ptr(), self.0) }
        }
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0)) }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_sqrt_ps(self.0)) }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_min_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_max_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Self::Mask {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn eq(self, other: Self) -> Self::Mask {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn and(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm256_and_ps(a, b) }
    }

    #[inline(always)]
    fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm256_or_ps(a, b) }
    }

    #[inline(always)]
    fn and_not(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm256_andnot_ps(b, a) }
    }

    #[inline(always)]
    fn any(mask: Self::Mask) -> bool {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm256_movemask_ps(mask) != 0 }
    }

    #[inline(always)]
    fn where_or(self, mask: Self::Mask, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F8(_mm256_blendv_ps(other.0, self.0, mask)) }
    }

    #[inline(always)]
    fn low_bits_above_two_to_23(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe {
            let bits = _mm256_and_ps(self.0, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f_ffff)));
            F8(_mm256_or_ps(bits, _mm256_set1_ps(8_388_608.0)))
        }
    }

    #[inline(always)]
    fn low_byte(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            F8(_mm256_cvtepi32_ps(_mm256_and_si256(
                bits,
                _mm256_set1_epi32(0xff),
            )))
        }
    }
}

// ---- searches

#[target_feature(enable = "avx2")]
pub(in super::super) fn fit_affine(
    size: usize,
    search: &AffineSearch,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) -> bool {
    // SAFETY: this function is called only where the processor has these features.
    let lanes = unsafe { Avx2::new() };
    // One vector computes while the other waits for its sums.
    let lanes = Two(lanes, lanes);
    match (size, search.absolute) {
        (16, true) => lanes::fit_affine::<_, 16, true>(lanes, search, weigh, weights, fits),
        (16, false) => lanes::fit_affine::<_, 16, false>(lanes, search, weigh, weights, fits),
        (32, false) => lanes::fit_affine::<_, 32, false>(lanes, search, weigh, weights, fits),
        _ => return false,
    }
    true
}

#[target_feature(enable = "avx2")]
pub(in super::super) fn fit_symmetric(
    size: usize,
    limit: u8,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) -> bool {
    // SAFETY: as above.
    let lanes = unsafe { Avx2::new() };
    // One vector computes while the other waits for its sums.
    let lanes = Two(lanes, lanes);
    match size {
        16 => lanes::fit_symmetric::<_, 16>(lanes, limit, weigh, weights, fits),
        32 => lanes::fit_symmetric::<_, 32>(lanes, limit, weigh, weights, fits),
        _ => return false,
    }
    true
}

#[target_feature(enable = "avx2")]
pub(in super::super) fn fit_descent(limit: u8, weights: &[f32], fits: &mut [Fit]) -> bool {
    // SAFETY: as above.
    let lanes = unsafe { Avx2::new() };
    // Each step of a descent waits for the one before: four vectors keep the processor busy.
    let four = Two(Two(lanes, lanes), Two(lanes, lanes));
    let many = fits.len() / 32 * 32;
    let (fits, rest) = fits.split_at_mut(many);
    lanes::fit_descent(four, limit, weights, fits);
    let weights = weights.get(16 * many..).unwrap_or_default();
    lanes::fit_descent(lanes, limit, weights, rest);
    true
}

#[target_feature(enable = "avx2")]
pub(in super::super) fn fit_positive(
    size: usize,
    limit: u8,
    scales: &[f32],
    counts: &[f32],
    steps: &mut [f32],
    codes: &mut [u8],
) -> bool {
    // SAFETY: as above.
    let lanes = unsafe { Avx2::new() };
    match size {
        8 => lanes::fit_positive::<_, 8>(lanes, limit, scales, counts, steps, codes),
        16 => lanes::fit_positive::<_, 16>(lanes, limit, scales, counts, steps, codes),
        _ => return false,
    }
    true
}

// ---- codes

/// Codes of sub-blocks of 16 or 32 weights.
#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn divided_codes(
    size: usize,
    low: i32,
    high: i32,
    weights: &[f32],
    mins: &[f32],
    steps: &[f32],
    codes: &mut [u8],
) -> bool {
    // The low 23 bits of a rounded sum are 2²² more than the integer.
    let (bottom, top) = (0x40_0000 + low, 0x40_0000 + high);
    let (bottom, top) = (_mm256_set1_epi32(bottom), _mm256_set1_epi32(top));
    let (rounder, mask) = (_mm256_set1_ps(ROUNDER), _mm256_set1_epi32(0x7f_ffff));
    let runs = weights.chunks_exact(size).zip(codes.chunks_exact_mut(size));
    for ((weights, codes), (min, step)) in runs.zip(mins.iter().zip(steps)) {
        let (min, step) = (_mm256_set1_ps(*min), _mm256_set1_ps(*step));
        let (weights, _) = weights.as_chunks::<16>();
        for (weights, codes) in weights.iter().zip(codes.as_chunks_mut().0) {
            let (weights, _) = weights.as_chunks();
            let mut halves = [_mm256_setzero_si256(); 2];
            for (half, weights) in halves.iter_mut().zip(weights) {
                let code = _mm256_div_ps(_mm256_add_ps(load(weights), min), step);
                let bits = _mm256_castps_si256(_mm256_add_ps(code, rounder));
                let code = _mm256_max_epi32(_mm256_and_si256(bits, mask), bottom);
                *half = _mm256_sub_epi32(_mm256_min_epi32(code, top), bottom);
            }
            // Packing works within halves.
            let words = _mm256_packus_epi32(halves[0], halves[1]);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let (words, more) = (
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            store_bytes(_mm_packus_epi16(words, more), codes);
        }
    }
    true
}
