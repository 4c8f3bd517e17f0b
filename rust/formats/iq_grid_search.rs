//! Encoding of the IQ2 and IQ3 types: signs, points of a grid, and a search for the scale.
//!
//! A block of 256 weights has runs of 16 or 32 that share a scale, and a run has groups of 8 (IQ2) or
//! 4 (IQ3) weights that stand on a point of the grid together. A level l of a point stands for 2l + 1.
//! With importance i, a weight x has the share s = i·√(σ² + x²) in the loss of its run; without, the
//! share in the table. M is the mean of x² over the block.
//!
//! | type | run | levels | tries t | step | σ² | s without i | signs | refits | d is stored times |
//! |---|---|---|---|---|---|---|---|---|---|
//! | IQ2_XXS | 32 | 3 | −6..6 | 0.1 | M | – | even | every group | 1 |
//! | IQ2_XS | 16 | 3 | −9..9 | 0.1 | M | – | even | groups off the grid | 1 |
//! | IQ2_S | 16 | 3 | −9..9 | 0.1 | 2M | σ²/4 + x² | any | groups off the grid | 0.9875 |
//! | IQ3_XXS | 32 | 8 | −15..15 | 0.2 | 2M | x² | even | groups off the grid | 1.0125 |
//! | IQ3_S | 32 | 8 | −9..9 | 0.2 | 2M | x² | any | all, if one is off | 1.033 |
//!
//! 1. Signs are taken off. Where their number must be even in each eight weights and is not, the
//!    weight with the smallest s·x·x (the first such) keeps the wrong sign and becomes negative.
//! 2. m is the largest of what remains. If m < `least` the run is zeros: all its bits are 0.
//! 3. Each try takes the inverse scale v = (2·levels − 1 + t·step)/m (IQ2_XXS: m is the top level's
//!    value at the scale that [`fit_positive`] finds without the grid), rounds each weight to the level
//!    (x·v − 1)/2, and replaces the levels of a group that are off the grid by those of a near point:
//!    the first with the smallest Σ √s·(q/v − x)². With q = 2l + 1, A = Σ s·x·q and B = Σ s·q·q, the
//!    try is kept if B > 0 and A² > mark·B; the scale is then A/B and the mark A²/B.
//! 4. The groups named in the table are rounded once more with the scale found, and the scale is A/B
//!    of the result if B > 0. A negative scale is made positive, and all signs are turned over.
//! 5. D = (largest scale)/31; a run stores the whole number (scale/D − 1)/2 within 0 and 15, the block
//!    D times the last column. If no scale is above 0, D is 0 and the run scales are 0; IQ2_XXS, IQ2_XS
//!    and IQ3_XXS then have no other bits either.
//!
//! Numbers are rounded to whole ones with ties to even.
//!
//! Special cases:
//! - A run of IQ3_S that is zeros: ggml forgets to step over it, and puts the codes and signs of the
//!   runs behind it into the wrong places, so that the block decodes to something else. Here they are
//!   where they belong. The bytes are equal if no run with other weights stands behind such a run.
//! - Where squares leave the `f32` range, sums become infinite and scales NaN. Such a scale counts as
//!   0, and of near points that are all infinitely far the first is taken (ggml stops the process).
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`quantize_row_iq2_xxs_impl` and its neighbours), each
//! operation rounded by itself, sums in order.

use half::f16;

use super::ggml_search::{fit_positive, nearest, EPSILON};
use super::iq_neighbours::{self as neighbours, Grid, Place};
use crate::kernels::points::{self, Tried, MOST_TRIES};
use crate::kernels::{self, Level};

/// Weights of a block.
const BLOCK: usize = 256;
/// Most weights of a run.
const MOST: usize = 32;
/// Weights that share a byte of signs.
const EIGHT: usize = 8;

/// Which groups are rounded again with the scale that was found.
#[derive(Clone, Copy, PartialEq)]
enum Refit {
    Every,
    OffGrid,
    AllIfOneIsOff,
}

/// A row of the table above.
struct Kind {
    grid: fn() -> &'static Grid,
    run: usize,
    /// Weights of a group, and number of levels.
    group: usize,
    levels: i32,
    tries: i32,
    step: f32,
    variance: f32,
    even_signs: bool,
    least: f32,
    refit: Refit,
    stored: f32,
    /// Share without importance, of σ² and x.
    share: fn(f32, f32) -> f32,
    /// The scale to begin with is found by rounding without the grid.
    rounds_first: bool,
}

const IQ2_XXS: Kind = Kind {
    grid: neighbours::iq2_xxs,
    run: 32,
    group: 8,
    levels: 3,
    tries: 6,
    step: 0.1,
    variance: 1.0,
    even_signs: true,
    least: EPSILON,
    refit: Refit::Every,
    stored: 1.0,
    share: |_, _| 0.0,
    rounds_first: true,
};
const IQ2_XS: Kind = Kind {
    grid: neighbours::iq2_xs,
    run: 16,
    tries: 9,
    refit: Refit::OffGrid,
    rounds_first: false,
    ..IQ2_XXS
};
const IQ2_S: Kind = Kind {
    grid: neighbours::iq2_s,
    variance: 2.0,
    even_signs: false,
    least: 1e-8,
    stored: 0.9875,
    share: |variance, x| 0.25 * variance + x * x,
    ..IQ2_XS
};
const IQ3_XXS: Kind = Kind {
    grid: neighbours::iq3_xxs,
    run: 32,
    group: 4,
    levels: 8,
    tries: 15,
    step: 0.2,
    variance: 2.0,
    even_signs: true,
    least: 1e-8,
    refit: Refit::OffGrid,
    stored: 1.0125,
    share: |_, x| x * x,
    rounds_first: false,
};
const IQ3_S: Kind = Kind {
    grid: neighbours::iq3_s,
    tries: 9,
    even_signs: false,
    // The smallest number above 0.
    least: f32::from_bits(1),
    refit: Refit::AllIfOneIsOff,
    stored: 1.033,
    ..IQ3_XXS
};

/// What was found for a run. Its default is a run of zeros.
#[derive(Clone, Copy, Default)]
struct Run {
    scale: f32,
    codes: [u16; EIGHT],
    signs: [u8; MOST / EIGHT],
}

/// What was found for a block: the index in the grid of each group, signs of each eight weights, and
/// the scale numbers of the runs.
struct Found {
    d: [u8; 2],
    indices: [u16; BLOCK / 4],
    signs: [u8; BLOCK / EIGHT],
    scales: [u8; BLOCK / 16],
}

impl Found {
    /// Four sign codes of seven bits, and the scale on top, of run `run` of 32 weights.
    fn signs_and_scale(&self, run: usize) -> [u8; 4] {
        let signs = self.signs[4 * run..4 * run + 4].iter().rev();
        let signs = signs.fold(0, |signs, &byte| signs << 7 | u32::from(byte & 127));
        (signs | u32::from(self.scales[run]) << 28).to_le_bytes()
    }

    /// Byte `index` of the nibbles that hold the scales.
    fn scale_nibbles(&self, index: usize) -> u8 {
        self.scales[2 * index] | self.scales[2 * index + 1] << 4
    }
}

/// Encodes IQ2_XXS blocks.
pub fn encode_iq2_xxs(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
    encode(
        &IQ2_XXS,
        level,
        weights,
        Some(importance),
        blocks,
        |found, block: &mut [u8; 66]| {
            for (run, bytes) in block[2..].as_chunks_mut::<8>().0.iter_mut().enumerate() {
                for (byte, index) in bytes.iter_mut().zip(&found.indices[4 * run..4 * run + 4]) {
                    *byte = *index as u8;
                }
                bytes[4..].copy_from_slice(&found.signs_and_scale(run));
            }
        },
    );
}

/// Encodes IQ2_XS blocks.
pub fn encode_iq2_xs(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
    encode(
        &IQ2_XS,
        level,
        weights,
        Some(importance),
        blocks,
        |found, block: &mut [u8; 74]| {
            let groups = block[2..].as_chunks_mut().0.iter_mut();
            for ((bytes, index), signs) in groups.zip(found.indices).zip(found.signs) {
                *bytes = (index | u16::from(signs & 127) << 9).to_le_bytes();
            }
            for (index, byte) in block[66..].iter_mut().enumerate() {
                *byte = found.scale_nibbles(index);
            }
        },
    );
}

/// Encodes IQ2_S blocks.
pub fn encode_iq2_s(level: Level, weights: &[f32], importance: Option<&[f32]>, blocks: &mut [u8]) {
    encode(
        &IQ2_S,
        level,
        weights,
        importance,
        blocks,
        |found, block: &mut [u8; 82]| {
            for (byte, index) in block[2..34].iter_mut().zip(found.indices) {
                *byte = index as u8;
            }
            block[34..66].copy_from_slice(&found.signs);
            for (byte, indices) in block[66..74]
                .iter_mut()
                .zip(found.indices.as_chunks::<4>().0)
            {
                let high = indices.iter().rev();
                *byte = high.fold(0, |byte, index| byte << 2 | (index >> 8) as u8);
            }
            for (index, byte) in block[74..].iter_mut().enumerate() {
                *byte = found.scale_nibbles(index);
            }
        },
    );
}

/// Encodes IQ3_XXS blocks.
pub fn encode_iq3_xxs(
    level: Level,
    weights: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [u8],
) {
    encode(
        &IQ3_XXS,
        level,
        weights,
        importance,
        blocks,
        |found, block: &mut [u8; 98]| {
            for (byte, index) in block[2..66].iter_mut().zip(found.indices) {
                *byte = index as u8;
            }
            for (run, bytes) in block[66..].as_chunks_mut().0.iter_mut().enumerate() {
                *bytes = found.signs_and_scale(run);
            }
        },
    );
}

/// Encodes IQ3_S blocks.
pub fn encode_iq3_s(level: Level, weights: &[f32], importance: Option<&[f32]>, blocks: &mut [u8]) {
    encode(
        &IQ3_S,
        level,
        weights,
        importance,
        blocks,
        |found, block: &mut [u8; 110]| {
            for (byte, index) in block[2..66].iter_mut().zip(found.indices) {
                *byte = index as u8;
            }
            for (byte, indices) in block[66..74]
                .iter_mut()
                .zip(found.indices.as_chunks::<8>().0)
            {
                let high = indices.iter().rev();
                *byte = high.fold(0, |byte, index| byte << 1 | (index >> 8) as u8);
            }
            block[74..106].copy_from_slice(&found.signs);
            for (index, byte) in block[106..].iter_mut().enumerate() {
                *byte = found.scale_nibbles(index);
            }
        },
    );
}

/// Encodes blocks; `put` writes all but d.
fn encode<const BYTES: usize>(
    kind: &Kind,
    level: Level,
    weights: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [u8],
    put: impl Fn(&Found, &mut [u8; BYTES]),
) {
    let grid = (kind.grid)();
    let weights = weights.as_chunks().0.iter();
    for (index, (weights, block)) in weights.zip(blocks.as_chunks_mut().0).enumerate() {
        let importance = importance.and_then(|all| all.as_chunks().0.get(index));
        let found = search_block(kind, grid, level, weights, importance);
        block[..2].copy_from_slice(&found.d);
        put(&found, block);
    }
}

fn search_block(
    kind: &Kind,
    grid: &Grid,
    level: Level,
    weights: &[f32; BLOCK],
    importance: Option<&[f32; BLOCK]>,
) -> Found {
    let sum = weights.iter().fold(0.0, |sum, x| sum + x * x);
    let variance = kind.variance * sum / BLOCK as f32;
    let mut shares = [0.0; BLOCK];
    match importance {
        Some(importance) => {
            for ((share, x), i) in shares.iter_mut().zip(weights).zip(importance) {
                *share = i * (variance + x * x).sqrt();
            }
        }
        None => {
            for (share, x) in shares.iter_mut().zip(weights) {
                *share = (kind.share)(variance, *x);
            }
        }
    }
    let mut runs = [Run::default(); BLOCK / 16];
    let runs = &mut runs[..BLOCK / kind.run];
    let pieces = weights.chunks(kind.run).zip(shares.chunks(kind.run));
    for (run, (weights, shares)) in runs.iter_mut().zip(pieces) {
        *run = match kind.group {
            4 => search_run::<4>(kind, grid, level, weights, shares),
            _ => search_run::<8>(kind, grid, level, weights, shares),
        };
    }

    let most = runs.iter().fold(0.0f32, |most, run| most.max(run.scale));
    let mut found = Found {
        d: [0; 2],
        indices: [0; BLOCK / 4],
        signs: [0; BLOCK / EIGHT],
        scales: [0; BLOCK / 16],
    };
    if most > 0.0 {
        let d = most / 31.0;
        let inverse = 1.0 / d;
        found.d = f16::from_f32(d * kind.stored).to_le_bytes();
        for (scale, run) in found.scales.iter_mut().zip(&*runs) {
            *scale = level_of(inverse * run.scale, 15) as u8;
        }
    } else if kind.even_signs {
        return found;
    }
    let groups = kind.run / kind.group;
    for (indices, run) in found.indices.chunks_mut(groups).zip(&*runs) {
        for (index, code) in indices.iter_mut().zip(run.codes) {
            *index = grid.index(code);
        }
    }
    for (signs, run) in found.signs.chunks_mut(kind.run / EIGHT).zip(&*runs) {
        signs.copy_from_slice(&run.signs[..signs.len()]);
    }
    found
}

/// Searches one run; `G` is `kind.group`.
fn search_run<const G: usize>(
    kind: &Kind,
    grid: &Grid,
    level: Level,
    weights: &[f32],
    shares: &[f32],
) -> Run {
    let mut x = [0.0; MOST];
    let x = &mut x[..kind.run];
    let mut signs = [0; MOST / EIGHT];
    for ((signs, x), (weights, shares)) in signs
        .iter_mut()
        .zip(x.as_chunks_mut().0)
        .zip(weights.as_chunks().0.iter().zip(shares.as_chunks().0))
    {
        *signs = take_signs(kind.even_signs, weights, shares, x);
    }
    let largest = x.iter().fold(
        f32::NEG_INFINITY,
        |most, &x| if x > most { x } else { most },
    );
    if largest < kind.least {
        return Run::default();
    }
    let top = (2 * kind.levels - 1) as f32;
    let (mut scale, largest) = if kind.rounds_first {
        let scale = fit_without_grid(x, shares);
        (scale, scale * kind.levels as f32)
    } else {
        (largest / top, largest)
    };
    if kind.rounds_first && largest <= 0.0 {
        return Run::default();
    }
    let mut roots = [0.0; MOST];
    for (root, share) in roots.iter_mut().zip(shares) {
        *root = share.sqrt();
    }

    let points = Points::<G> {
        grid,
        level,
        run: points::Run {
            x,
            shares,
            roots: &roots[..kind.run],
            top: kind.levels - 1,
        },
    };
    let (mut inverses, mut scales) = ([0.0; MOST_TRIES], [0.0; MOST_TRIES]);
    let steps = -kind.tries..=kind.tries;
    let tries = steps.clone().count();
    for ((inverse, scale), step) in inverses.iter_mut().zip(&mut scales).zip(steps) {
        *inverse = (top + step as f32 * kind.step) / largest;
        *scale = 1.0 / *inverse;
    }
    let tried = points.at(&inverses[..tries], &scales[..tries]);
    let (mut mark, mut best) = (0.0, None);
    let sums = tried.crosses.iter().zip(&tried.powers).take(tries);
    for (index, (cross, power)) in sums.enumerate() {
        if *power > 0.0 && cross * cross > mark * power {
            scale = cross / power;
            mark = scale * cross;
            best = Some(index);
        }
    }
    let mut codes = [0; EIGHT];
    let mut off_grid = [kind.refit == Refit::AllIfOneIsOff; EIGHT];
    if let Some(best) = best {
        codes = tried.codes.map(|codes| codes[best] as u16);
        off_grid = tried.off_grid.map(|tries| tries >> best & 1 == 1);
    }
    let groups = kind.run / G;
    let refits = kind.refit == Refit::Every || off_grid[..groups].contains(&true);
    if refits && scale > 0.0 {
        let again = points.at(&[1.0 / scale], &[scale]).codes;
        for ((code, again), is_off) in codes.iter_mut().zip(again).zip(off_grid) {
            if is_off || kind.refit != Refit::OffGrid {
                *code = again[0] as u16;
            }
        }
        let (cross, power) = points.sums(&codes);
        if power > 0.0 {
            scale = cross / power;
        }
    }
    if scale < 0.0 {
        scale = -scale;
        signs = signs.map(|signs| !signs);
    }
    Run {
        scale,
        codes,
        signs,
    }
}

/// Takes the signs off eight weights; with `even`, an even number of them.
fn take_signs(
    even: bool,
    weights: &[f32; EIGHT],
    shares: &[f32; EIGHT],
    x: &mut [f32; EIGHT],
) -> u8 {
    let mut signs = 0;
    for (i, (x, &weight)) in x.iter_mut().zip(weights).enumerate() {
        let is_negative = weight < 0.0;
        *x = if is_negative { -weight } else { weight };
        signs |= u8::from(is_negative) << i;
    }
    if even && signs.count_ones() % 2 == 1 {
        let loss = |i: usize| shares[i] * weights[i] * weights[i];
        let least = (1..EIGHT).fold(0, |least, i| if loss(i) < loss(least) { i } else { least });
        x[least] = -x[least];
        signs ^= 1 << least;
    }
    signs
}

/// A run without signs, and the grid to put it on.
struct Points<'a, const G: usize> {
    grid: &'a Grid,
    level: Level,
    run: points::Run<'a>,
}

impl<const G: usize> Points<'_, G> {
    const BITS: usize = if G == 8 { 2 } else { 3 };
    const DIGIT: u16 = (1 << Self::BITS) - 1;

    /// Points for the run at these scales.
    fn at(&self, inverses: &[f32], scales: &[f32]) -> Tried {
        let mut tried = Tried::default();
        let lists = self.grid.lists();
        if kernels::try_points(self.level, lists, self.run, inverses, scales, &mut tried) {
            return tried;
        }
        for (index, (&inverse, &scale)) in inverses.iter().zip(scales).enumerate() {
            let (x, roots) = (self.run.x.as_chunks().0, self.run.roots.as_chunks().0);
            let mut found = [0; EIGHT];
            for (k, (x, roots)) in x.iter().zip(roots).enumerate() {
                found[k] = self.rounded(x, inverse);
                if let Place::Near(near) = self.grid.place(found[k]) {
                    tried.off_grid[k] |= 1 << index;
                    found[k] = Self::nearest(near, x, roots, scale);
                }
                tried.codes[k][index] = u32::from(found[k]);
            }
            (tried.crosses[index], tried.powers[index]) = self.sums(&found);
        }
        tried
    }

    /// The code of the levels that are nearest one by one.
    fn rounded(&self, x: &[f32; G], inverse: f32) -> u16 {
        let digits = x.iter().rev();
        digits.fold(0, |code, x| {
            code << Self::BITS | level_of(inverse * x, self.run.top) as u16
        })
    }

    /// The first of the points `near` with the smallest Σ √s·(scale·q − x)².
    fn nearest(near: &[u16], x: &[f32; G], roots: &[f32; G], scale: f32) -> u16 {
        let mut terms = [[0.0; 8]; G];
        for ((terms, x), root) in terms.iter_mut().zip(x).zip(roots) {
            for (l, term) in terms.iter_mut().enumerate() {
                let miss = scale * (2 * l + 1) as f32 - x;
                *term = root * miss * miss;
            }
        }
        let first = near.first().copied().unwrap_or(0);
        let (_, best) = near.iter().fold((f32::MAX, first), |(least, best), &code| {
            let terms = terms.iter().enumerate();
            let loss = terms.fold(0.0, |loss, (i, terms)| {
                loss + terms[usize::from(code >> (Self::BITS * i) & Self::DIGIT)]
            });
            if loss < least {
                (loss, code)
            } else {
                (least, best)
            }
        });
        best
    }

    /// Σ s·x·q and Σ s·q·q.
    fn sums(&self, codes: &[u16; EIGHT]) -> (f32, f32) {
        let (x, shares) = (
            self.run.x.as_chunks::<G>().0,
            self.run.shares.as_chunks::<G>().0,
        );
        let (mut cross, mut power) = (0.0, 0.0);
        for ((x, shares), code) in x.iter().zip(shares).zip(codes) {
            for (i, (x, share)) in x.iter().zip(shares).enumerate() {
                let level = code >> (Self::BITS * i) & Self::DIGIT;
                let q = f32::from(2 * level + 1);
                cross += share * x * q;
                power += share * q * q;
            }
        }
        (cross, power)
    }
}

/// IQ2_XXS: a scale that suits whole numbers up to 4.
fn fit_without_grid(x: &[f32], shares: &[f32]) -> f32 {
    match (x.as_chunks::<MOST>().0, shares.as_chunks().0) {
        ([x], [shares]) => fit_positive(4, x, shares).0,
        _ => 0.0,
    }
}

/// The level that stands nearest to y = 2l + 1.
fn level_of(y: f32, top: i32) -> i32 {
    nearest(0.5 * (y - 1.0)).clamp(0, top)
}
