//! The searches of `crate::formats::ggml_search`, many at a time: what they are given and what they
//! find, and their bodies over vectors whose lanes are one run of weights each.
//!
//! Each lane does what the scalar body does, in its order; where that branches, the lanes whose
//! condition does not hold keep what they had. So the bits are the same, and no sum is split.

#[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
pub(super) mod lanes;

/// Below this largest magnitude, a run counts as zero.
pub const EPSILON: f32 = 1e-15;

/// Adding this number leaves an integer in the low bits of the sum.
pub const ROUNDER: f32 = 12_582_912.0;

/// The tries of `fit_affine`.
#[derive(Debug, Clone, Copy)]
pub struct AffineSearch {
    /// Largest code.
    pub limit: u8,
    /// Try i divides the range into `limit + first + i·step` steps.
    pub first: f32,
    /// See `first`.
    pub step: f32,
    /// How many tries.
    pub tries: u8,
    /// Whether the error is |difference|, not its square.
    pub absolute: bool,
}

impl AffineSearch {
    /// The search of every affine type when there is importance.
    pub const fn with_importance(limit: u8) -> Self {
        AffineSearch {
            limit,
            first: -0.9,
            step: 0.05,
            tries: 37,
            absolute: false,
        }
    }

    /// Steps of try `index`, added up in this order.
    #[inline(always)]
    pub fn steps(&self, index: u8) -> f32 {
        self.first + self.step * f32::from(index) + f32::from(self.limit)
    }
}

/// How much each weight counts.
#[derive(Debug, Clone, Copy)]
pub enum Weigh<'a> {
    /// |x|
    Magnitude,
    /// Root mean square of the run + |x|
    RootMeanSquare,
    /// x²
    Square,
    /// These numbers, one per weight.
    Given(&'a [f32]),
}

/// What a search found for one run.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Fit {
    /// Step between neighbouring codes.
    pub scale: f32,
    /// −least: what is subtracted from scale·l. 0 in symmetric fits.
    pub min: f32,
    /// The codes are `nearest(code_scale·(x − code_least))`, clamped: the last winner's step, and the
    /// minimum that was in force when it was tried.
    pub code_scale: f32,
    /// See `code_scale`. 0 in symmetric fits.
    pub code_least: f32,
    /// Sum of w.
    pub counts: f32,
}
