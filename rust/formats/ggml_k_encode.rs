//! Encoding GGML's K types: searches over many sub-blocks at once, then scales, codes and packing block
//! by block. Layouts and special cases: [`super::ggml_k`]; searches: [`super::ggml_search`].
//!
//! `P` is the number of sub-blocks in a block, `N` the number of weights in a sub-block.

use super::blocks::{half_at, put_half, Block};
use super::ggml_k::{
    put_bits, put_nibbles, put_pairs, put_six_bits_of_16, put_six_bits_of_8, six_bits_of_16,
    six_bits_of_8, Q2K, Q3K, Q4K, Q5K, Q6K, WEIGHTS,
};
use super::ggml_search::{
    affine_codes, divided_codes, fit_affine_runs, fit_descent, fit_descent_runs, fit_positive_runs,
    fit_symmetric_runs, nearest, symmetric_codes, AffineSearch, Fit, Weigh, EPSILON,
};
use crate::kernels::Level;

/// Stores `value` as f16, and gives what it decodes to.
fn store_half(block: &mut [u8], at: usize, value: f32) -> f32 {
    put_half(block, at, value);
    half_at(block, at)
}

/// Blocks whose searches run together.
const TOGETHER: usize = 16;

/// Sub-blocks of that many blocks, at most.
const RUNS: usize = 16 * TOGETHER;

/// A type whose sub-blocks have a scale and a min.
pub trait Affine<const P: usize>: Block {
    /// The search without importance.
    const SEARCH: AffineSearch;
    /// How much each weight counts in it.
    const WEIGH: Weigh<'static>;
    /// Largest scale and min.
    const LIMIT: u8;
    /// Whether a negative scale or min, which wraps round in its byte, is then limited: without
    /// importance, and with it. The peer does so here and there.
    const LIMITED: [bool; 2];
    /// What the mean square of the block is multiplied by, where there is importance.
    const SPREAD: f32;

    /// Stores scales and mins. Gives the steps and minimums that the sub-blocks now have.
    fn put_scales(block: &mut [u8], scales: Rounded<P>, mins: Rounded<P>) -> Steps<P>;

    /// Stores the codes.
    fn put_codes(block: &mut [u8], codes: &[u8; WEIGHTS]);
}

/// The scales (or mins) of a block: integers, and the step between them.
#[derive(Debug, Clone, Copy)]
pub struct Rounded<const P: usize> {
    d: f32,
    codes: [u8; P],
}

/// Step and minimum of each sub-block, as they decode.
#[derive(Debug, Clone, Copy)]
pub struct Steps<const P: usize> {
    steps: [f32; P],
    mins: [f32; P],
}

impl Affine<16> for Q2K {
    const SEARCH: AffineSearch = AffineSearch {
        limit: 3,
        first: -0.5,
        step: 0.1,
        tries: 16,
        absolute: true,
    };
    const WEIGH: Weigh<'static> = Weigh::Magnitude;
    const LIMIT: u8 = 15;
    const LIMITED: [bool; 2] = [false, false];
    const SPREAD: f32 = 1.0;

    fn put_scales(block: &mut [u8], scales: Rounded<16>, mins: Rounded<16>) -> Steps<16> {
        for (k, (scale, min)) in scales.codes.iter().zip(mins.codes).enumerate() {
            block[k] = scale | min << 4;
        }
        let d = store_half(block, 80, scales.d);
        let dmin = store_half(block, 82, mins.d);
        Steps {
            steps: std::array::from_fn(|k| d * f32::from(block[k] & 15)),
            mins: std::array::from_fn(|k| dmin * f32::from(block[k] >> 4)),
        }
    }

    fn put_codes(block: &mut [u8], codes: &[u8; WEIGHTS]) {
        put_pairs(&mut block[16..80], 0, codes);
    }
}

/// The scales of Q4_K and Q5_K.
fn put_scales_of_8(block: &mut [u8], scales: Rounded<8>, mins: Rounded<8>) -> Steps<8> {
    let d = store_half(block, 0, scales.d);
    let dmin = store_half(block, 2, mins.d);
    put_six_bits_of_8(&mut block[4..16], &scales.codes, &mins.codes);
    let (scales, mins) = six_bits_of_8(&block[4..16]);
    Steps {
        steps: scales.map(|scale| d * f32::from(scale)),
        mins: mins.map(|min| dmin * f32::from(min)),
    }
}

impl Affine<8> for Q4K {
    const SEARCH: AffineSearch = AffineSearch {
        limit: 15,
        first: -1.0,
        step: 0.1,
        tries: 21,
        absolute: false,
    };
    const WEIGH: Weigh<'static> = Weigh::RootMeanSquare;
    const LIMIT: u8 = 63;
    const LIMITED: [bool; 2] = [true, false];
    const SPREAD: f32 = 2.0;

    fn put_scales(block: &mut [u8], scales: Rounded<8>, mins: Rounded<8>) -> Steps<8> {
        put_scales_of_8(block, scales, mins)
    }

    fn put_codes(block: &mut [u8], codes: &[u8; WEIGHTS]) {
        put_nibbles::<64>(&mut block[16..], codes);
    }
}

impl Affine<8> for Q5K {
    const SEARCH: AffineSearch = AffineSearch {
        limit: 31,
        first: -0.5,
        step: 0.1,
        tries: 16,
        absolute: false,
    };
    const WEIGH: Weigh<'static> = Weigh::RootMeanSquare;
    const LIMIT: u8 = 63;
    const LIMITED: [bool; 2] = [true, true];
    const SPREAD: f32 = 2.0;

    fn put_scales(block: &mut [u8], scales: Rounded<8>, mins: Rounded<8>) -> Steps<8> {
        put_scales_of_8(block, scales, mins)
    }

    fn put_codes(block: &mut [u8], codes: &[u8; WEIGHTS]) {
        put_bits(&mut block[16..48], 4, codes);
        put_nibbles::<64>(&mut block[48..], codes);
    }
}

/// Rounds scales so that the largest takes the whole range.
fn round_plainly<const P: usize>(limit: u8, scales: &[f32; P]) -> Rounded<P> {
    let larger = |most: f32, &scale: &f32| if scale > most { scale } else { most };
    let most = scales.iter().fold(0.0, larger);
    let inverse = if most > 0.0 {
        f32::from(limit) / most
    } else {
        0.0
    };
    Rounded {
        d: most / f32::from(limit),
        codes: scales.map(|scale| nearest(inverse * scale) as u8),
    }
}

/// importance·√(spread·mean of x² + x²), the mean being over each block.
fn counts(spread: f32, weights: &[f32], importance: &[f32], counts: &mut [f32]) {
    /// Blocks whose sums, each in order, are added up side by side.
    const ABREAST: usize = 4;
    let blocks = weights.as_chunks::<WEIGHTS>().0.chunks(ABREAST);
    let importance = importance.as_chunks::<WEIGHTS>().0.chunks(ABREAST);
    let counts = counts.as_chunks_mut::<WEIGHTS>().0.chunks_mut(ABREAST);
    for ((blocks, importance), counts) in blocks.zip(importance).zip(counts) {
        let mut squares = [0.0; ABREAST];
        if let [a, b, c, d] = blocks {
            for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
                squares[0] += a * a;
                squares[1] += b * b;
                squares[2] += c * c;
                squares[3] += d * d;
            }
        } else {
            for (squares, block) in squares.iter_mut().zip(blocks) {
                *squares = block.iter().fold(0.0, |sum, x| sum + x * x);
            }
        }
        let blocks = blocks.iter().zip(importance).zip(counts);
        for (((weights, importance), counts), squares) in blocks.zip(squares) {
            let variance = spread * squares / WEIGHTS as f32;
            for ((count, importance), x) in counts.iter_mut().zip(importance).zip(weights) {
                *count = importance * (variance + x * x).sqrt();
            }
        }
    }
}

/// Calls `encode` with the weights, the importance (where there is any) and the blocks of as many blocks
/// as are searched together.
fn for_each_group<const BYTES: usize>(
    weights: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [u8],
    mut encode: impl FnMut(&[f32], Option<&[f32]>, &mut [[u8; BYTES]]),
) {
    let weights = weights.chunks(TOGETHER * WEIGHTS);
    let blocks = blocks.as_chunks_mut().0.chunks_mut(TOGETHER);
    for (index, (weights, blocks)) in weights.zip(blocks).enumerate() {
        let first = index * TOGETHER * WEIGHTS;
        let importance = importance.and_then(|all| all.get(first..first + weights.len()));
        encode(weights, importance, blocks);
    }
}

/// Encodes blocks of an affine type.
pub fn encode_affine<B: Affine<P>, const P: usize, const N: usize, const BYTES: usize>(
    level: Level,
    weights: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [u8],
) {
    for_each_group::<BYTES>(
        weights,
        importance,
        blocks,
        |weights, importance, blocks| {
            let mut fits = [Fit::default(); RUNS];
            let fits = &mut fits[..weights.len() / N];
            let mut scales = [[Rounded::<P> {
                d: 0.0,
                codes: [0; P],
            }; 2]; TOGETHER];
            if let Some(importance) = importance {
                let mut given = [0.0; TOGETHER * WEIGHTS];
                counts(B::SPREAD, weights, importance, &mut given);
                let search = AffineSearch::with_importance(B::SEARCH.limit);
                fit_affine_runs::<N>(level, &search, Weigh::Given(&given), weights, fits);
                round_fits(level, B::LIMIT, fits, &mut scales);
            } else {
                fit_affine_runs::<N>(level, &B::SEARCH, B::WEIGH, weights, fits);
                for (fits, scales) in fits.as_chunks::<P>().0.iter().zip(&mut scales) {
                    *scales = [
                        round_plainly(B::LIMIT, &fits.map(|fit| fit.scale)),
                        round_plainly(B::LIMIT, &fits.map(|fit| fit.min)),
                    ];
                }
            }
            let weights = weights.as_chunks::<WEIGHTS>().0.iter();
            let fits = fits.as_chunks::<P>().0;
            if B::LIMITED[usize::from(importance.is_some())] {
                for rounded in scales.iter_mut().flatten() {
                    rounded.codes = rounded.codes.map(|code| code.min(B::LIMIT));
                }
            }
            for (((weights, fits), [scales, mins]), block) in
                weights.zip(fits).zip(scales).zip(blocks)
            {
                let Steps { steps, mins } = B::put_scales(block, scales, mins);
                let mut codes = [0; WEIGHTS];
                let limit = B::SEARCH.limit;
                divided_codes::<N>(
                    level,
                    0,
                    i32::from(limit),
                    weights,
                    &mins,
                    &steps,
                    &mut codes,
                );
                let runs = weights
                    .as_chunks::<N>()
                    .0
                    .iter()
                    .zip(codes.as_chunks_mut::<N>().0);
                for ((weights, codes), (fit, step)) in runs.zip(fits.iter().zip(steps)) {
                    if step == 0.0 {
                        *codes = affine_codes(limit, weights, fit);
                    }
                }
                B::put_codes(block, &codes);
            }
        },
    );
}

/// Rounds the scales and the mins of blocks by a search of their own.
fn round_fits<const P: usize>(
    level: Level,
    limit: u8,
    fits: &[Fit],
    rounded: &mut [[Rounded<P>; 2]; TOGETHER],
) {
    let (mut scales, mut mins) = ([0.0; RUNS], [0.0; RUNS]);
    let mut counts = [0.0; RUNS];
    for (index, fit) in fits.iter().enumerate() {
        scales[index] = fit.scale;
        mins[index] = fit.min;
        counts[index] = fit.counts;
    }
    let runs = fits.len();
    for (which, values) in [scales, mins].into_iter().enumerate() {
        let (mut steps, mut codes) = ([0.0; TOGETHER], [0; RUNS]);
        fit_positive_runs::<P>(
            level,
            limit,
            &values[..runs],
            &counts[..runs],
            &mut steps[..runs / P],
            &mut codes[..runs],
        );
        let found = steps.into_iter().zip(codes.as_chunks().0);
        for (rounded, (d, &codes)) in rounded.iter_mut().zip(found) {
            rounded[which] = Rounded { d, codes };
        }
    }
}

/// A type whose sub-blocks of 16 have a signed scale.
pub trait Symmetric: Block {
    /// Codes below zero.
    const LIMIT: u8;

    /// Searches all sub-blocks.
    fn search(level: Level, weights: &[f32], importance: Option<&[f32]>, fits: &mut [Fit]);

    /// Whether scales are rounded by a search of their own, where there is importance.
    const SEARCHES_SCALES: bool;

    /// Rounds and stores the scales; `of_scales` is what the search of their own found. Gives the steps that the sub-blocks now have, or nothing for a
    /// block that is all zero bytes.
    fn put_scales(block: &mut [u8], fits: &[Fit; 16], of_scales: Option<&Fit>)
        -> Option<[f32; 16]>;

    /// The codes that the search of one sub-block chose.
    fn searched_codes(weights: &[f32; 16], fit: &Fit, weighted: bool) -> [u8; 16];

    /// Stores the codes.
    fn put_codes(block: &mut [u8], codes: &[u8; WEIGHTS]);
}

/// The scale with the largest magnitude, the first of several.
fn largest(fits: &[Fit; 16]) -> f32 {
    let larger = |most: f32, fit: &Fit| {
        if fit.scale.abs() > most.abs() {
            fit.scale
        } else {
            most
        }
    };
    fits.iter().fold(0.0, larger)
}

/// Scales of Q3_K that are negative.
const SCALES_BELOW_ZERO: u8 = 32;

impl Symmetric for Q3K {
    const LIMIT: u8 = 4;
    const SEARCHES_SCALES: bool = true;

    fn search(level: Level, weights: &[f32], importance: Option<&[f32]>, fits: &mut [Fit]) {
        if let Some(importance) = importance {
            let mut given = [0.0; TOGETHER * WEIGHTS];
            counts(2.0, weights, importance, &mut given);
            fit_symmetric_runs::<16>(level, Self::LIMIT, Weigh::Given(&given), weights, fits);
        } else {
            fit_descent_runs(level, Self::LIMIT, weights, fits);
        }
    }

    fn put_scales(
        block: &mut [u8],
        fits: &[Fit; 16],
        of_scales: Option<&Fit>,
    ) -> Option<[f32; 16]> {
        let mut scales = [0; 16];
        let mut d = 0.0;
        if let Some(fit) = of_scales {
            scales = symmetric_codes(SCALES_BELOW_ZERO, &fits.map(|fit| fit.scale), fit);
            d = fit.scale;
        } else {
            let largest = largest(fits);
            if largest != 0.0 {
                let inverse = -32.0 / largest;
                scales = fits.map(|fit| {
                    let code = nearest(inverse * fit.scale) as i8;
                    (code.clamp(-32, 31) + 32).cast_unsigned()
                });
                d = 1.0 / inverse;
            }
        }
        put_six_bits_of_16(&mut block[96..108], &scales);
        let d = store_half(block, 108, d);
        Some(six_bits_of_16(&block[96..108]).map(|scale| d * (f32::from(scale) - 32.0)))
    }

    fn searched_codes(weights: &[f32; 16], fit: &Fit, weighted: bool) -> [u8; 16] {
        if weighted {
            symmetric_codes(Self::LIMIT, weights, fit)
        } else {
            fit_descent(Self::LIMIT, weights).1
        }
    }

    fn put_codes(block: &mut [u8], codes: &[u8; WEIGHTS]) {
        put_bits(&mut block[..32], 2, codes);
        put_pairs(&mut block[32..96], 0, codes);
    }
}

impl Symmetric for Q6K {
    const LIMIT: u8 = 32;
    const SEARCHES_SCALES: bool = false;

    fn search(level: Level, weights: &[f32], importance: Option<&[f32]>, fits: &mut [Fit]) {
        let weigh = importance.map_or(Weigh::Square, Weigh::Given);
        fit_symmetric_runs::<16>(level, Self::LIMIT, weigh, weights, fits);
    }

    fn put_scales(
        block: &mut [u8],
        fits: &[Fit; 16],
        _of_scales: Option<&Fit>,
    ) -> Option<[f32; 16]> {
        let largest = largest(fits);
        if largest.abs() < EPSILON {
            return None;
        }
        let inverse = -128.0 / largest;
        let d = store_half(block, 208, 1.0 / inverse);
        let scales = fits.map(|fit| nearest(inverse * fit.scale).min(127) as i8);
        for (byte, scale) in block[192..208].iter_mut().zip(scales) {
            *byte = scale.cast_unsigned();
        }
        Some(scales.map(|scale| d * f32::from(scale)))
    }

    fn searched_codes(weights: &[f32; 16], fit: &Fit, _weighted: bool) -> [u8; 16] {
        symmetric_codes(Self::LIMIT, weights, fit)
    }

    fn put_codes(block: &mut [u8], codes: &[u8; WEIGHTS]) {
        put_nibbles::<128>(&mut block[..128], codes);
        put_pairs(&mut block[128..192], 4, codes);
    }
}

/// Encodes blocks of a symmetric type.
pub fn encode_symmetric<B: Symmetric, const BYTES: usize>(
    level: Level,
    weights: &[f32],
    importance: Option<&[f32]>,
    blocks: &mut [u8],
) {
    for_each_group::<BYTES>(
        weights,
        importance,
        blocks,
        |weights, importance, blocks| {
            let mut fits = [Fit::default(); RUNS];
            let fits = &mut fits[..weights.len() / 16];
            B::search(level, weights, importance, fits);
            let weighted = importance.is_some();
            let mut of_scales = [Fit::default(); TOGETHER];
            if weighted && B::SEARCHES_SCALES {
                let (mut scales, mut counts) = ([0.0; RUNS], [0.0; RUNS]);
                for (index, fit) in fits.iter().enumerate() {
                    (scales[index], counts[index]) = (fit.scale, fit.counts);
                }
                fit_symmetric_runs::<16>(
                    level,
                    SCALES_BELOW_ZERO,
                    Weigh::Given(&counts),
                    &scales[..fits.len()],
                    &mut of_scales[..blocks.len()],
                );
            }
            let weights = weights.as_chunks::<WEIGHTS>().0.iter();
            let fits = fits.as_chunks().0.iter().zip(&of_scales);
            for ((weights, (fits, of_scales)), block) in weights.zip(fits).zip(blocks) {
                let of_scales = weighted.then_some(of_scales);
                let Some(steps) = B::put_scales(block, fits, of_scales) else {
                    block.fill(0);
                    continue;
                };
                let mut codes = [0; WEIGHTS];
                let limit = i32::from(B::LIMIT);
                divided_codes::<16>(
                    level,
                    -limit,
                    limit - 1,
                    weights,
                    &[0.0; 16],
                    &steps,
                    &mut codes,
                );
                let runs = weights
                    .as_chunks::<16>()
                    .0
                    .iter()
                    .zip(codes.as_chunks_mut::<16>().0);
                for ((weights, codes), (fit, step)) in runs.zip(fits.iter().zip(steps)) {
                    if step == 0.0 {
                        *codes = B::searched_codes(weights, fit, weighted);
                    }
                }
                B::put_codes(block, &codes);
            }
        },
    );
}
