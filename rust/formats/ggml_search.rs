//! The searches behind ggml's K types: scales that leave little error in a run of weights.
//!
//! A type says which search it uses, with how many tries. All work in `f32`, every operation rounded
//! by itself, every sum taken from the first weight to the last; a later try must be strictly better
//! to win. `nearest` rounds to an integer, halves to even; `l` below is a code before it is stored,
//! `w` how much a weight counts.
//!
//! | search | model | tries |
//! |---|---|---|
//! | [`fit_affine`] | x ≈ scale·l + least, l in 0..=limit, least ≤ 0 | step sizes around (most − least) / limit, each refined by least squares |
//! | [`fit_symmetric`] | x ≈ scale·l, l in −limit..limit | step sizes around −extreme / limit, likewise |
//! | [`fit_descent`] | the same, w = x² | one start, then up to five rounds over the codes, one at a time |
//! | [`fit_positive`] | x ≈ scale·l, l in 0..=limit | nine step sizes, then rounds as above |
//!
//! Two of them give no codes: those follow from what the fit records, and most are not needed.
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`make_qkx2_quants`, `make_qkx3_quants`, which agree wherever
//! both are used; `make_qx_quants`; `make_q3_quants`; `make_qp_quants`).

pub use crate::kernels::search::{AffineSearch, Fit, Weigh, EPSILON};

use crate::kernels::search::ROUNDER;
use crate::kernels::{self, Level};

/// The nearest integer, halves to even. Beyond ±2²² (and for NaN) the result is what the low 23 bits
/// of the sum say: ggml asks for no more, and the same bits must come out.
pub fn nearest(x: f32) -> i32 {
    ((x + ROUNDER).to_bits() & 0x7f_ffff).cast_signed() - 0x40_0000
}

impl Weigh<'_> {
    /// The numbers for run `index`, whose weights are `x`.
    fn of_run<const N: usize>(self, index: usize, x: &[f32; N]) -> [f32; N] {
        match self {
            Weigh::Magnitude => x.map(f32::abs),
            Weigh::RootMeanSquare => {
                let squares = x.iter().fold(0.0, |sum, x| sum + x * x);
                let root = (squares / N as f32).sqrt();
                x.map(|x| root + x.abs())
            }
            Weigh::Square => x.map(|x| x * x),
            Weigh::Given(given) => given.as_chunks().0.get(index).copied().unwrap_or([0.0; N]),
        }
    }
}

/// Step and minimum for one run. Every winner's minimum is the one that the tries after it start from.
pub fn fit_affine<const N: usize>(search: &AffineSearch, x: &[f32; N], w: &[f32; N]) -> Fit {
    let limit = i32::from(search.limit);
    let (mut least, mut most) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (w[0], w[0] * x[0]);
    for (&x, &w) in x.iter().zip(w).skip(1) {
        if x < least {
            least = x;
        }
        if x > most {
            most = x;
        }
        sum_w += w;
        sum_x += w * x;
    }
    if least > 0.0 {
        least = 0.0;
    }
    if most == least {
        return Fit {
            min: -least,
            counts: sum_w,
            ..Fit::default()
        };
    }
    let error = |scale: f32, least: f32, codes: &[f32; N]| {
        let terms = x.iter().zip(w).zip(codes);
        terms.fold(0.0, |sum, ((&x, &w), &l)| {
            let difference = scale * l + least - x;
            let difference = if search.absolute {
                difference.abs()
            } else {
                difference * difference
            };
            sum + w * difference
        })
    };
    let codes =
        |step: f32, least: f32| x.map(|x| nearest(step * (x - least)).clamp(0, limit) as f32);
    let step = limit as f32 / (most - least);
    let mut fit = Fit {
        scale: 1.0 / step,
        min: 0.0,
        code_scale: step,
        code_least: least,
        counts: sum_w,
    };
    let mut best = error(fit.scale, least, &codes(step, least));
    for index in 0..search.tries {
        let step = search.steps(index) / (most - least);
        let codes = codes(step, least);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0, 0.0, 0.0);
        for ((&x, &w), &l) in x.iter().zip(w).zip(&codes) {
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let mut this_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            if this_least > 0.0 {
                this_least = 0.0;
                this_scale = sum_xl / sum_l2;
            }
            let this = error(this_scale, this_least, &codes);
            if this < best {
                best = this;
                fit.scale = this_scale;
                (fit.code_scale, fit.code_least) = (step, least);
                least = this_least;
            }
        }
    }
    fit.min = -least;
    fit
}

/// Codes of an affine fit.
pub fn affine_codes<const N: usize>(limit: u8, x: &[f32; N], fit: &Fit) -> [u8; N] {
    x.map(|x| {
        let code = nearest(fit.code_scale * (x - fit.code_least));
        code.clamp(0, i32::from(limit)) as u8
    })
}

/// The first weight with the largest magnitude, and that magnitude.
fn extreme<const N: usize>(x: &[f32; N]) -> (f32, f32) {
    x.iter().fold((0.0, 0.0), |(extreme, most), &x| {
        if x.abs() > most {
            (x, x.abs())
        } else {
            (extreme, most)
        }
    })
}

/// Σ w·x·l and Σ w·l², l being `nearest(step·x)` in −limit..limit.
fn symmetric_sums<const N: usize>(limit: i32, step: f32, x: &[f32; N], w: &[f32; N]) -> (f32, f32) {
    let terms = x.iter().zip(w);
    terms.fold((0.0, 0.0), |(sum_xl, sum_l2), (&x, &w)| {
        let l = nearest(step * x).clamp(-limit, limit - 1) as f32;
        (sum_xl + w * x * l, sum_l2 + w * l * l)
    })
}

/// Step for one run of codes around zero; `limit` of them are negative.
pub fn fit_symmetric<const N: usize>(limit: u8, x: &[f32; N], w: &[f32; N]) -> Fit {
    let (extreme, most) = extreme(x);
    let counts = w.iter().fold(0.0, |sum, w| sum + w);
    if most < EPSILON {
        return Fit {
            counts,
            ..Fit::default()
        };
    }
    let codes = i32::from(limit);
    let mut code_scale = -f32::from(limit) / extreme;
    let (sum_xl, sum_l2) = symmetric_sums(codes, code_scale, x, w);
    let mut scale = if sum_l2 == 0.0 { 0.0 } else { sum_xl / sum_l2 };
    let mut best = scale * sum_xl;
    for index in (-9..=9i8).filter(|&index| index != 0) {
        let step = -(f32::from(limit) + 0.1 * f32::from(index)) / extreme;
        let (sum_xl, sum_l2) = symmetric_sums(codes, step, x, w);
        if sum_l2 > 0.0 && sum_xl * sum_xl > best * sum_l2 {
            scale = sum_xl / sum_l2;
            best = scale * sum_xl;
            code_scale = step;
        }
    }
    Fit {
        scale,
        code_scale,
        counts,
        ..Fit::default()
    }
}

/// Codes of a symmetric fit, moved up by `limit`. A run that counts as zero has codes of 0, which
/// are not the code of the weight 0.
pub fn symmetric_codes<const N: usize>(limit: u8, x: &[f32; N], fit: &Fit) -> [u8; N] {
    if extreme(x).1 < EPSILON {
        return [0; N];
    }
    let limit = i32::from(limit);
    x.map(|x| (nearest(fit.code_scale * x).clamp(-limit, limit - 1) + limit) as u8)
}

/// Step and codes (moved up by `limit`) for one run of codes around zero, w being x².
pub fn fit_descent<const N: usize>(limit: u8, x: &[f32; N]) -> (f32, [u8; N]) {
    let (extreme, most) = extreme(x);
    if most < EPSILON {
        return (0.0, [0; N]);
    }
    let limit = i32::from(limit);
    let step = -(limit as f32) / extreme;
    let mut codes = x.map(|x| nearest(step * x).clamp(-limit, limit - 1) as f32);
    let (mut sum_xl, mut sum_l2) = (0.0, 0.0);
    for (&x, &l) in x.iter().zip(&codes) {
        let w = x * x;
        sum_xl += w * x * l;
        sum_l2 += w * l * l;
    }
    for _ in 0..5 {
        let mut changed = false;
        for (&x, code) in x.iter().zip(&mut codes) {
            let w = x * x;
            let mut xl = sum_xl - w * x * *code;
            if xl > 0.0 {
                let mut l2 = sum_l2 - w * *code * *code;
                let l = nearest(x * l2 / xl).clamp(-limit, limit - 1) as f32;
                if l != *code {
                    xl += w * x * l;
                    l2 += w * l * l;
                    if l2 > 0.0 && xl * xl * sum_l2 > sum_xl * sum_xl * l2 {
                        (*code, sum_xl, sum_l2) = (l, xl, l2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    let scale = if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 };
    (scale, codes.map(|l| (l as i32 + limit) as u8))
}

/// Step and codes for a run of scales. Codes are stored in a byte as soon as they are chosen; a
/// negative one (of a negative scale) comes back as that byte.
pub fn fit_positive<const N: usize>(limit: u8, x: &[f32; N], w: &[f32; N]) -> (f32, [u8; N]) {
    let most = x
        .iter()
        .fold(0.0, |most, &x| if most > x { most } else { x });
    if most < EPSILON {
        return (0.0, [0; N]);
    }
    let codes = i32::from(limit);
    let error = |scale: f32, step: f32, limit: i32| {
        x.iter().zip(w).fold(0.0, |sum, (&x, &w)| {
            let difference = x - scale * nearest(step * x).min(limit) as f32;
            sum + w * difference * difference
        })
    };
    let mut step = f32::from(limit) / most;
    let first = 1.0 / step;
    let mut best = x.iter().zip(w).fold(0.0, |sum, (&x, &w)| {
        let difference = x - first * f32::from(nearest(step * x) as u8);
        sum + w * difference * difference
    });
    for index in (-4..=4i8).filter(|&index| index != 0) {
        let this_step = (0.1 * f32::from(index) + f32::from(limit)) / most;
        let this = error(1.0 / this_step, this_step, codes);
        if this < best {
            best = this;
            step = this_step;
        }
    }
    let mut stored = [0; N];
    let (mut sum_xl, mut sum_l2) = (0.0, 0.0);
    for ((&x, &w), stored) in x.iter().zip(w).zip(&mut stored) {
        let l = nearest(step * x).min(codes);
        *stored = l as u8;
        sum_xl += w * x * l as f32;
        sum_l2 += w * l as f32 * l as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for ((&x, &w), stored) in x.iter().zip(w).zip(&mut stored) {
            let old = f32::from(*stored);
            let mut xl = sum_xl - w * x * old;
            let mut l2 = sum_l2 - w * old * old;
            if xl > 0.0 && l2 > 0.0 {
                let l = nearest(x * l2 / xl).min(codes);
                if l != i32::from(*stored) {
                    xl += w * x * l as f32;
                    l2 += w * l as f32 * l as f32;
                    if xl * xl * sum_l2 > sum_xl * sum_xl * l2 {
                        (*stored, sum_xl, sum_l2) = (l as u8, xl, l2);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    (if sum_l2 > 0.0 { sum_xl / sum_l2 } else { 0.0 }, stored)
}

// ---- many runs

/// [`fit_affine`] of each run of `N` weights.
pub fn fit_affine_runs<const N: usize>(
    level: Level,
    search: &AffineSearch,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) {
    if kernels::fit_affine(level, N, search, weigh, weights, fits) {
        return;
    }
    for (index, (x, fit)) in weights.as_chunks::<N>().0.iter().zip(fits).enumerate() {
        *fit = fit_affine(search, x, &weigh.of_run(index, x));
    }
}

/// [`fit_symmetric`] of each run of `N` weights.
pub fn fit_symmetric_runs<const N: usize>(
    level: Level,
    limit: u8,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) {
    if kernels::fit_symmetric(level, N, limit, weigh, weights, fits) {
        return;
    }
    for (index, (x, fit)) in weights.as_chunks::<N>().0.iter().zip(fits).enumerate() {
        *fit = fit_symmetric(limit, x, &weigh.of_run(index, x));
    }
}

/// [`fit_descent`] of each run of 16 weights, the codes left out.
pub fn fit_descent_runs(level: Level, limit: u8, weights: &[f32], fits: &mut [Fit]) {
    if kernels::fit_descent(level, limit, weights, fits) {
        return;
    }
    for (x, fit) in weights.as_chunks::<16>().0.iter().zip(fits) {
        fit.scale = fit_descent(limit, x).0;
    }
}

/// [`fit_positive`] of each run of `N` scales: steps, and `N` codes for each.
pub fn fit_positive_runs<const N: usize>(
    level: Level,
    limit: u8,
    scales: &[f32],
    counts: &[f32],
    steps: &mut [f32],
    codes: &mut [u8],
) {
    if kernels::fit_positive(level, N, limit, scales, counts, steps, codes) {
        return;
    }
    let runs = scales.as_chunks().0.iter().zip(counts.as_chunks().0);
    let found = steps.iter_mut().zip(codes.as_chunks_mut::<N>().0);
    for ((x, w), (step, codes)) in runs.zip(found) {
        (*step, *codes) = fit_positive(limit, x, w);
    }
}

/// Codes of a block whose sub-blocks of `N` have these minimums and steps: `nearest((x + min) / step)`
/// limited to `low..=high`, moved up so that `low` becomes 0. Means nothing where the step is zero.
#[allow(clippy::too_many_arguments)]
pub fn divided_codes<const N: usize>(
    level: Level,
    low: i32,
    high: i32,
    weights: &[f32],
    mins: &[f32],
    steps: &[f32],
    codes: &mut [u8],
) {
    if kernels::divided_codes(level, N, low, high, weights, mins, steps, codes) {
        return;
    }
    let runs = weights
        .as_chunks::<N>()
        .0
        .iter()
        .zip(codes.as_chunks_mut::<N>().0);
    for ((x, codes), (min, step)) in runs.zip(mins.iter().zip(steps)) {
        *codes = x.map(|x| (nearest((x + min) / step).clamp(low, high) - low) as u8);
    }
}
