//! Vectors for the searches of `crate::kernels::search`, 16 lanes each, and those searches.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use crate::kernels::avx2::transpose;
use crate::kernels::search::lanes::{self, Lanes, Two, Vector, MOST};
use crate::kernels::search::{AffineSearch, Fit, Weigh};

/// Proof that the processor has the instructions.
#[derive(Clone, Copy)]
struct Avx512(());

impl Avx512 {
    /// # Safety
    ///
    /// The processor has AVX-512 (F, BW, DQ, VL).
    #[inline(always)]
    unsafe fn new() -> Self {
        Avx512(())
    }
}

/// 16 numbers; made by [`Avx512`] only.
#[derive(Clone, Copy)]
struct F16(__m512);

impl Lanes for Avx512 {
    type Vector = F16;

    #[inline(always)]
    fn splat(self, value: f32) -> F16 {
        // SAFETY: `self` proves that the processor has the instructions.
        unsafe { F16(_mm512_set1_ps(value)) }
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> F16 {
        match values.first_chunk::<16>() {
            // SAFETY: as above; the reference is to 64 readable bytes, of any alignment.
            Some(values) => unsafe { F16(_mm512_loadu_ps(values.as_ptr())) },
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

impl Add for F16 {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_add_ps(self.0, other.0)) }
    }
}

impl Sub for F16 {
    type Output = Self;

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_sub_ps(self.0, other.0)) }
    }
}

impl Mul for F16 {
    type Output = Self;

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_mul_ps(self.0, other.0)) }
    }
}

impl Div for F16 {
    type Output = Self;

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_div_ps(self.0, other.0)) }
    }
}

impl Vector for F16 {
    const COUNT: usize = 16;
    type Mask = __mmask16;

    #[inline(always)]
    fn store(self, values: &mut [f32]) {
        if let Some(values) = values.first_chunk_mut::<16>() {
            // SAFETY: a vector exists only where the processor has the instructions; the reference is
            // to 64 writable bytes, of any alignment.
            unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) }
        }
    }

    #[inline(always)]
    fn abs(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_abs_ps(self.0)) }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_sqrt_ps(self.0)) }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_min_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_max_ps(self.0, other.0)) }
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Self::Mask {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn eq(self, other: Self) -> Self::Mask {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn and(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        a & b
    }

    #[inline(always)]
    fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        a | b
    }

    #[inline(always)]
    fn and_not(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        a & !b
    }

    #[inline(always)]
    fn any(mask: Self::Mask) -> bool {
        mask != 0
    }

    #[inline(always)]
    fn where_or(self, mask: Self::Mask, other: Self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe { F16(_mm512_mask_blend_ps(mask, other.0, self.0)) }
    }

    #[inline(always)]
    fn low_bits_above_two_to_23(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe {
            let low = _mm512_set1_epi32(0x7f_ffff);
            let exponent = _mm512_castps_si512(_mm512_set1_ps(8_388_608.0));
            // (bits & low) | exponent
            let bits = _mm512_castps_si512(self.0);
            F16(_mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xea>(
                bits, low, exponent,
            )))
        }
    }

    #[inline(always)]
    fn low_byte(self) -> Self {
        // SAFETY: a vector exists only where the processor has the instructions.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            F16(_mm512_cvtepi32_ps(_mm512_and_si512(
                bits,
                _mm512_set1_epi32(0xff),
            )))
        }
    }
}

// ---- searches

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn fit_affine(
    size: usize,
    search: &AffineSearch,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) -> bool {
    // SAFETY: this function is called only where the processor has these features.
    let lanes = unsafe { Avx512::new() };
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn fit_symmetric(
    size: usize,
    limit: u8,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) -> bool {
    // SAFETY: as above.
    let lanes = unsafe { Avx512::new() };
    // One vector computes while the other waits for its sums.
    let lanes = Two(lanes, lanes);
    match size {
        16 => lanes::fit_symmetric::<_, 16>(lanes, limit, weigh, weights, fits),
        32 => lanes::fit_symmetric::<_, 32>(lanes, limit, weigh, weights, fits),
        _ => return false,
    }
    true
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn fit_descent(limit: u8, weights: &[f32], fits: &mut [Fit]) -> bool {
    // SAFETY: as above.
    let lanes = unsafe { Avx512::new() };
    // Each step of a descent waits for the one before: four vectors keep the processor busy.
    let four = Two(Two(lanes, lanes), Two(lanes, lanes));
    let many = fits.len() / 64 * 64;
    let (fits, rest) = fits.split_at_mut(many);
    lanes::fit_descent(four, limit, weights, fits);
    let weights = weights.get(16 * many..).unwrap_or_default();
    lanes::fit_descent(lanes, limit, weights, rest);
    true
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in super::super) fn fit_positive(
    size: usize,
    limit: u8,
    scales: &[f32],
    counts: &[f32],
    steps: &mut [f32],
    codes: &mut [u8],
) -> bool {
    // SAFETY: as above.
    let lanes = unsafe { Avx512::new() };
    match size {
        8 => lanes::fit_positive::<_, 8>(lanes, limit, scales, counts, steps, codes),
        16 => lanes::fit_positive::<_, 16>(lanes, limit, scales, counts, steps, codes),
        _ => return false,
    }
    true
}
