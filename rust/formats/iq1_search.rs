//! Encoding of IQ1_S and IQ1_M: three levels, shifted by an eighth up or down, on points of a grid.
//!
//! A block of 256 weights has runs of 32 (IQ1_S) or 16 (IQ1_M) that share a scale. A weight x with
//! importance i has the share s = i·√(σ² + x²) in the loss of its run, σ² being twice the mean of x²
//! over the block; without importance (IQ1_M only) it is x². The levels are −1, 0 and 1, all plus 1/8
//! or all minus 1/8: IQ1_S chooses once per run, IQ1_M for each half of a run.
//!
//! 1. A run whose largest magnitude is below `least` (10⁻¹², 10⁻⁷) is zeros: scale 0, all bits 0.
//! 2. Sorted, equal ones in order, the weights split in three: those below place a take the lowest
//!    level, those from place b on the highest. All a ≤ b are tried, a first, and with each all choices
//!    of shifts, plus before minus. From sums over the sorted weights come A = Σ s·x·q and B = Σ s·q·q;
//!    a try wins if B > 0 and A² > mark·B; the scale is then A/B and the mark A²/B. The first mark is
//!    the least number. If none wins, the run is zeros.
//! 3. If the scale is negative it, the levels and the shifts are turned over.
//! 4. Levels of eight weights that are off the grid are replaced by those of the near point with the
//!    smallest Σ s·(scale·q − x)², the first such. If any were, the scale becomes A/B of the result,
//!    provided that both are above 0.
//! 5. D = (largest scale)/15; a run stores the whole number l = (scale/D − 1)/2 within 0 and 7, ties to
//!    even. IQ1_S stores D·1.125. IQ1_M stores A/B·1.1125 of the whole block with q·(2l + 1) for q.
//!    If no scale is above 0, there is no D and no shift, and l = 0.
//!
//! Special cases: where squares leave the `f32` range, sums become infinite and scales NaN. Such a
//! scale counts as 0, and of near points that are all infinitely far the first is taken (ggml reads
//! outside of its arrays and stops the process).
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`quantize_row_iq1_s_impl`, `quantize_row_iq1_m_impl`), each
//! operation rounded by itself, sums in order. It sorts with the C library's `qsort`, which says nothing
//! about the order of equal weights; glibc's keeps it, as is done here.

use half::f16;

use super::ggml_search::nearest;
use super::iq_neighbours::{self as neighbours, Grid, Place};
use crate::kernels::splits::{Best, Shifted, RUN_M, RUN_S};
use crate::kernels::{self, Level};

/// Weights of a block.
const BLOCK: usize = 256;
/// Weights of a group: they stand on a point together.
const GROUP: usize = 8;
/// The levels, shifted up and down.
const SHIFTED: Shifted = [[-0.875, 0.125, 1.125], [-1.125, -0.125, 0.875]];

/// What was found for a run. Its default is a run of zeros.
#[derive(Clone, Copy, Default)]
struct Run {
    scale: f32,
    /// Index in the grid, per group.
    indices: [u16; RUN_S / GROUP],
    /// Which of the two lists of levels, per group.
    shifts: [usize; RUN_S / GROUP],
}

/// Encodes IQ1_S blocks.
pub fn encode_iq1_s(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
    let grid = neighbours::iq1();
    let weights = weights.as_chunks().0.iter().zip(importance.as_chunks().0);
    for ((weights, importance), block) in weights.zip(blocks.as_chunks_mut::<50>().0) {
        let shares = shares_of(weights, Some(importance));
        let mut runs = [Run::default(); BLOCK / RUN_S];
        let pieces = weights.as_chunks().0.iter().zip(shares.as_chunks().0);
        for (run, (weights, shares)) in runs.iter_mut().zip(pieces) {
            *run = search_s(grid, level, weights, shares);
        }
        let (d, scales) = scale_numbers(&runs);
        block[..2].copy_from_slice(&f16::from_f32(d * 1.125).to_le_bytes());
        for (bytes, run) in block[2..34].as_chunks_mut::<4>().0.iter_mut().zip(&runs) {
            *bytes = run.indices.map(|index| index as u8);
        }
        let heads = block[34..].as_chunks_mut().0.iter_mut();
        for ((head, run), scale) in heads.zip(&runs).zip(scales) {
            let high = run.indices.iter().rev();
            let high = high.fold(0, |high, index| high << 3 | index >> 8);
            let shift = if d > 0.0 { run.shifts[0] as u16 } else { 0 };
            *head = (high | u16::from(scale) << 12 | shift << 15).to_le_bytes();
        }
    }
}

/// Encodes IQ1_M blocks.
pub fn encode_iq1_m(level: Level, weights: &[f32], importance: Option<&[f32]>, blocks: &mut [u8]) {
    let grid = neighbours::iq1();
    let weights = weights.as_chunks().0.iter();
    for (index, (weights, block)) in weights.zip(blocks.as_chunks_mut::<56>().0).enumerate() {
        let importance = importance.and_then(|all| all.as_chunks().0.get(index));
        let shares = shares_of(weights, importance);
        let mut runs = [Run::default(); BLOCK / RUN_M];
        let pieces = weights.as_chunks().0.iter().zip(shares.as_chunks().0);
        for (run, (weights, shares)) in runs.iter_mut().zip(pieces) {
            *run = search_m(grid, level, weights, shares);
        }
        let (d, scales) = scale_numbers(&runs);
        for (bytes, run) in block[..32].as_chunks_mut::<2>().0.iter_mut().zip(&runs) {
            *bytes = [run.indices[0] as u8, run.indices[1] as u8];
        }
        let has_scale = d > 0.0;
        for (byte, run) in block[32..48].iter_mut().zip(&runs) {
            let nibble = |k: usize| {
                let shift = u8::from(has_scale && run.shifts[k] == 1);
                (run.indices[k] >> 8) as u8 | shift << 3
            };
            *byte = nibble(0) | nibble(1) << 4;
        }
        let d = if has_scale {
            let fitted = fit_block(weights, &shares, &runs, &scales).unwrap_or(d);
            f16::from_f32(fitted * 1.1125).to_bits()
        } else {
            0
        };
        let heads = block[48..].as_chunks_mut().0.iter_mut();
        for (k, (head, scales)) in heads.zip(scales.as_chunks::<4>().0).enumerate() {
            let three_bits = scales.iter().rev();
            let packed = three_bits.fold(0, |packed, &scale| packed << 3 | u16::from(scale));
            *head = (packed | (d >> (4 * k) & 15) << 12).to_le_bytes();
        }
    }
}

/// How much each weight of a block counts.
fn shares_of(weights: &[f32; BLOCK], importance: Option<&[f32; BLOCK]>) -> [f32; BLOCK] {
    let Some(importance) = importance else {
        return weights.map(|x| x * x);
    };
    let sum = weights.iter().fold(0.0, |sum, x| sum + x * x);
    let variance = 2.0 * sum / BLOCK as f32;
    let mut shares = [0.0; BLOCK];
    for ((share, x), i) in shares.iter_mut().zip(weights).zip(importance) {
        *share = i * (variance + x * x).sqrt();
    }
    shares
}

/// D, and the numbers that stand for the scales of the runs.
fn scale_numbers(runs: &[Run]) -> (f32, [u8; BLOCK / RUN_M]) {
    let most = runs.iter().fold(0.0f32, |most, run| most.max(run.scale));
    let mut numbers = [0; BLOCK / RUN_M];
    if most <= 0.0 {
        return (0.0, numbers);
    }
    let d = most / 15.0;
    let inverse = 1.0 / d;
    for (number, run) in numbers.iter_mut().zip(runs) {
        let steps = 0.5 * (inverse * run.scale - 1.0);
        *number = nearest(steps).clamp(0, 7) as u8;
    }
    (d, numbers)
}

/// Places of the weights, sorted by value; equal ones in order.
fn sorted<const N: usize>(weights: &[f32; N]) -> [usize; N] {
    let mut places = std::array::from_fn(|place| place);
    // Adding zero makes zeros of both signs equal in the total order, which NaN does not upset.
    places.sort_by(|&a, &b| (weights[a] + 0.0).total_cmp(&(weights[b] + 0.0)));
    places
}

fn is_zeros(weights: &[f32], least: f32) -> bool {
    let most = weights.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    most < least
}

fn search_s(grid: &Grid, level: Level, weights: &[f32; RUN_S], shares: &[f32; RUN_S]) -> Run {
    if is_zeros(weights, 1e-12) {
        return Run::default();
    }
    let places = sorted(weights);
    let (mut crosses, mut powers) = ([0.0; RUN_S + 1], [0.0; RUN_S + 1]);
    for (j, &place) in places.iter().enumerate() {
        crosses[j + 1] = crosses[j] + shares[place] * weights[place];
        powers[j + 1] = powers[j] + shares[place];
    }
    let mut best = Best::NONE;
    if !kernels::cut_s(level, &crosses, &powers, &SHIFTED, &mut best) {
        cut_s(&crosses, &powers, &mut best);
    }
    match best.cut {
        Some((a, b, shift)) => settle(
            grid,
            level,
            weights,
            shares,
            levels_of(&places, a, b),
            best.scale,
            [shift; RUN_S / GROUP],
        ),
        None => Run::default(),
    }
}

fn search_m(grid: &Grid, level: Level, weights: &[f32; RUN_M], shares: &[f32; RUN_M]) -> Run {
    if is_zeros(weights, 1e-7) {
        return Run::default();
    }
    let places = sorted(weights);
    // Sums over the sorted weights, of each half of the run by itself.
    let (mut crosses, mut powers) = ([[0.0; RUN_M + 1]; 2], [[0.0; RUN_M + 1]; 2]);
    for (j, &place) in places.iter().enumerate() {
        for half in 0..2 {
            crosses[half][j + 1] = crosses[half][j];
            powers[half][j + 1] = powers[half][j];
        }
        let half = place / GROUP;
        crosses[half][j + 1] += shares[place] * weights[place];
        powers[half][j + 1] += shares[place];
    }
    let mut best = Best::NONE;
    if !kernels::cut_m(level, &crosses, &powers, &SHIFTED, &mut best) {
        cut_m(&crosses, &powers, &mut best);
    }
    match best.cut {
        Some((a, b, choice)) => settle(
            grid,
            level,
            weights,
            shares,
            levels_of(&places, a, b),
            best.scale,
            [choice / 2, choice % 2, 0, 0],
        ),
        None => Run::default(),
    }
}

fn cut_s(crosses: &[f32; RUN_S + 1], powers: &[f32; RUN_S + 1], best: &mut Best) {
    for a in 0..=RUN_S {
        for b in a..=RUN_S {
            for (shift, [low, middle, high]) in SHIFTED.into_iter().enumerate() {
                let parts = |sums: &[f32; RUN_S + 1]| {
                    (sums[a] - sums[0], sums[b] - sums[a], sums[RUN_S] - sums[b])
                };
                let (below, between, above) = parts(crosses);
                let cross = below * low + between * middle + above * high;
                let (below, between, above) = parts(powers);
                let power = below * low * low + between * middle * middle + above * high * high;
                best.offer(cross, power, (a, b, shift));
            }
        }
    }
}

fn cut_m(crosses: &[[f32; RUN_M + 1]; 2], powers: &[[f32; RUN_M + 1]; 2], best: &mut Best) {
    for a in 0..=RUN_M {
        for b in a..=RUN_M {
            // By shift and half. The levels are 1 apart, so the sum over the three parts is that of
            // the highest level less one sum up to each border; likewise with squares of levels.
            let (mut cross, mut power) = ([[0.0; 2]; 2], [[0.0; 2]; 2]);
            for half in 0..2 {
                let (sums, counts) = (&crosses[half], &powers[half]);
                let below = sums[a] + sums[b];
                for (shift, [low, middle, high]) in SHIFTED.into_iter().enumerate() {
                    cross[shift][half] = sums[RUN_M] * high - below;
                    power[shift][half] = counts[RUN_M] * high * high
                        + counts[a] * (low * low - middle * middle)
                        + counts[b] * (middle * middle - high * high);
                }
            }
            for choice in 0..4 {
                let (first, second) = (choice / 2, choice % 2);
                best.offer(
                    cross[first][0] + cross[second][1],
                    power[first][0] + power[second][1],
                    (a, b, choice),
                );
            }
        }
    }
}

/// Level of each weight: 0 for the first `a` of the sorted ones, 2 from the `b`th on, 1 between.
fn levels_of<const N: usize>(places: &[usize; N], a: usize, b: usize) -> [u8; N] {
    let mut levels = [0; N];
    for (j, &place) in places.iter().enumerate() {
        levels[place] = u8::from(j >= a) + u8::from(j >= b);
    }
    levels
}

/// Steps 3 and 4 of a run.
fn settle<const N: usize>(
    grid: &Grid,
    level: Level,
    weights: &[f32; N],
    shares: &[f32; N],
    mut levels: [u8; N],
    mut scale: f32,
    mut shifts: [usize; RUN_S / GROUP],
) -> Run {
    if scale < 0.0 {
        scale = -scale;
        levels = levels.map(|level| 2 - level);
        shifts = shifts.map(|shift| 1 - shift);
    }
    let groups = || {
        weights
            .as_chunks::<GROUP>()
            .0
            .iter()
            .zip(shares.as_chunks::<GROUP>().0)
    };
    let mut codes = [0; RUN_S / GROUP];
    let mut all_on_grid = true;
    for (k, (levels, (x, shares))) in levels
        .as_chunks::<GROUP>()
        .0
        .iter()
        .zip(groups())
        .enumerate()
    {
        let digits = levels.iter().rev();
        codes[k] = digits.fold(0, |code, &level| code << 2 | u16::from(level));
        if let Place::Near(near) = grid.place(codes[k]) {
            all_on_grid = false;
            codes[k] = nearest_point(level, near, x, shares, scale, &SHIFTED[shifts[k]]);
        }
    }
    if !all_on_grid {
        let (mut cross, mut power) = (0.0, 0.0);
        for (k, (x, shares)) in groups().enumerate() {
            for (i, (x, share)) in x.iter().zip(shares).enumerate() {
                let q = SHIFTED[shifts[k]][level_at(codes[k], i)];
                cross += share * q * x;
                power += share * q * q;
            }
        }
        if cross > 0.0 && power > 0.0 {
            scale = cross / power;
        }
    }
    Run {
        scale,
        indices: codes.map(|code| grid.index(code)),
        shifts,
    }
}

/// Level of weight `i` in a code that is on the grid.
fn level_at(code: u16, i: usize) -> usize {
    usize::from(code >> (2 * i) & 3).min(2)
}

/// The first of the points `near` with the smallest Σ s·(scale·q − x)².
fn nearest_point(
    level: Level,
    near: &[u16],
    x: &[f32; GROUP],
    shares: &[f32; GROUP],
    scale: f32,
    values: &[f32; 3],
) -> u16 {
    let [low, middle, high] = values.map(|value| scale * value);
    let scaled = [low, middle, high, 0.0];
    if let Some(code) = kernels::nearest_point(level, near, x, shares, &scaled) {
        return code;
    }
    let mut terms = [[0.0; 4]; GROUP];
    for ((terms, x), share) in terms.iter_mut().zip(x).zip(shares) {
        for (term, scaled) in terms.iter_mut().zip(scaled) {
            let miss = scaled - x;
            *term = share * miss * miss;
        }
    }
    let first = near.first().copied().unwrap_or(0);
    let (_, best) = near.iter().fold((f32::MAX, first), |(least, best), &code| {
        let terms = terms.iter().enumerate();
        let loss = terms.fold(0.0, |loss, (i, terms)| {
            loss + terms[usize::from(code >> (2 * i) & 3)]
        });
        if loss < least {
            (loss, code)
        } else {
            (least, best)
        }
    });
    best
}

/// IQ1_M: the scale of the whole block, given the points and scales of its runs.
fn fit_block(
    weights: &[f32; BLOCK],
    shares: &[f32; BLOCK],
    runs: &[Run],
    scales: &[u8],
) -> Option<f32> {
    let points = &super::iq_grids::IQ1;
    let (mut cross, mut power) = (0.0, 0.0);
    let groups = weights
        .as_chunks::<GROUP>()
        .0
        .iter()
        .zip(shares.as_chunks::<GROUP>().0);
    for (group, (x, shares)) in groups.enumerate() {
        let (run, k) = (runs.get(group / 2)?, group % 2);
        let point = points.get(usize::from(run.indices[k]))?;
        let factor = f32::from(2 * scales.get(group / 2)? + 1);
        for ((x, share), level) in x.iter().zip(shares).zip(point) {
            let q = SHIFTED[run.shifts[k]][usize::from((level + 1).cast_unsigned())] * factor;
            cross += share * q * x;
            power += share * q * q;
        }
    }
    (power > 0.0).then(|| cross / power)
}
