//! Cuts of sorted runs: eight beginnings of the third part side by side. Where any of them wins, it and
//! those behind it are offered one by one, because each winner raises the mark. Scalar bodies and
//! special cases: see `crate::formats::iq1_search`.

use std::arch::x86_64::*;

use super::{load, store};
use crate::kernels::splits::{Best, Shifted, RUN_M, RUN_S};

/// Room for vectors that begin at any place of a run.
const PADDED: usize = 48;

#[inline]
#[target_feature(enable = "avx2")]
fn padded(sums: &[f32]) -> [f32; PADDED] {
    let mut padded = [0.0; PADDED];
    padded[..sums.len()].copy_from_slice(sums);
    padded
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_at(sums: &[f32; PADDED], at: usize) -> __m256 {
    sums[at..]
        .first_chunk()
        .map_or(_mm256_setzero_ps(), |sums| load(sums))
}

/// Offers A and B of eight cuts (`count` of them real), in each of which all choices come in turn.
#[inline]
#[target_feature(enable = "avx2")]
fn offer<const CHOICES: usize>(
    best: &mut Best,
    sums: [(__m256, __m256); CHOICES],
    (a, b): (usize, usize),
    count: usize,
) {
    let (zero, mark) = (_mm256_setzero_ps(), _mm256_set1_ps(best.mark()));
    let mut wins = zero;
    for (cross, power) in sums {
        let is_higher =
            _mm256_cmp_ps::<_CMP_GT_OQ>(_mm256_mul_ps(cross, cross), _mm256_mul_ps(mark, power));
        let is_positive = _mm256_cmp_ps::<_CMP_GT_OQ>(power, zero);
        wins = _mm256_or_ps(wins, _mm256_and_ps(is_positive, is_higher));
    }
    let first = _mm256_movemask_ps(wins).trailing_zeros() as usize;
    if first >= count {
        return;
    }
    let mut lanes = [[[0.0; 8]; 2]; CHOICES];
    for ([crosses, powers], (cross, power)) in lanes.iter_mut().zip(sums) {
        store(cross, crosses);
        store(power, powers);
    }
    for lane in first..count {
        for (choice, [crosses, powers]) in lanes.iter().enumerate() {
            best.offer(crosses[lane], powers[lane], (a, b + lane, choice));
        }
    }
}

#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn cut_s(
    crosses: &[f32; RUN_S + 1],
    powers: &[f32; RUN_S + 1],
    shifted: &Shifted,
    best: &mut Best,
) -> bool {
    let all = [padded(crosses), padded(powers)];
    let totals = [crosses[RUN_S], powers[RUN_S]];
    for a in 0..=RUN_S {
        let starts = [crosses[a], powers[a]];
        let below = [crosses[a] - crosses[0], powers[a] - powers[0]];
        for b in (a..=RUN_S).step_by(8) {
            let parts = [0, 1].map(|i| {
                let sums = load_at(&all[i], b);
                (
                    _mm256_sub_ps(sums, _mm256_set1_ps(starts[i])),
                    _mm256_sub_ps(_mm256_set1_ps(totals[i]), sums),
                )
            });
            let sums = shifted.map(|[low, middle, high]| {
                let (between, above) = parts[0];
                let cross = _mm256_add_ps(
                    _mm256_set1_ps(below[0] * low),
                    _mm256_mul_ps(between, _mm256_set1_ps(middle)),
                );
                let cross = _mm256_add_ps(cross, _mm256_mul_ps(above, _mm256_set1_ps(high)));
                let (between, above) = parts[1];
                let squared = |part, level| {
                    let level = _mm256_set1_ps(level);
                    _mm256_mul_ps(_mm256_mul_ps(part, level), level)
                };
                let power = _mm256_add_ps(
                    _mm256_set1_ps(below[1] * low * low),
                    squared(between, middle),
                );
                (cross, _mm256_add_ps(power, squared(above, high)))
            });
            offer(best, sums, (a, b), (RUN_S + 1 - b).min(8));
        }
    }
    true
}

#[target_feature(enable = "avx2")]
pub(in crate::kernels) fn cut_m(
    crosses: &[[f32; RUN_M + 1]; 2],
    powers: &[[f32; RUN_M + 1]; 2],
    shifted: &Shifted,
    best: &mut Best,
) -> bool {
    let (all_crosses, all_powers) = (
        [padded(&crosses[0]), padded(&crosses[1])],
        [padded(&powers[0]), padded(&powers[1])],
    );
    for a in 0..=RUN_M {
        for b in (a..=RUN_M).step_by(8) {
            // By shift and half.
            let halves = shifted.map(|[low, middle, high]| {
                [0, 1].map(|half| {
                    let (sums, counts) = (&crosses[half], &powers[half]);
                    let below =
                        _mm256_add_ps(_mm256_set1_ps(sums[a]), load_at(&all_crosses[half], b));
                    let cross = _mm256_sub_ps(_mm256_set1_ps(sums[RUN_M] * high), below);
                    let start =
                        counts[RUN_M] * high * high + counts[a] * (low * low - middle * middle);
                    let rest = _mm256_mul_ps(
                        load_at(&all_powers[half], b),
                        _mm256_set1_ps(middle * middle - high * high),
                    );
                    (cross, _mm256_add_ps(_mm256_set1_ps(start), rest))
                })
            });
            let sums = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(first, second): (usize, usize)| {
                let ((cross, power), (more_cross, more_power)) =
                    (halves[first][0], halves[second][1]);
                (
                    _mm256_add_ps(cross, more_cross),
                    _mm256_add_ps(power, more_power),
                )
            });
            offer(best, sums, (a, b), (RUN_M + 1 - b).min(8));
        }
    }
    true
}
