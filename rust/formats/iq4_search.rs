//! Encoding of IQ4_NL and IQ4_XS: 4-bit codes of a table of 16 values, and a search for the scale.
//!
//! Both cut a row into runs of 32 weights x and look for the scale d of each run that loses least
//! where the weights count. A weight's share s in the loss is x² without an importance vector, and
//! i·√(σ² + x²) with importance i, where σ² is twice the mean of x² over the block.
//!
//! 1. m is the first weight with the largest magnitude; below 10⁻¹⁵ the scale is 0.
//! 2. Seventeen inverse scales are tried, in this order: 1/(m/127), then (t − 127)/m for t from −7
//!    to 7. Each gives values q = T\[code(x·inverse)\], and the sums A = Σ s·q·x, B = Σ s·q·q.
//! 3. The first try sets d = A/B (0 if B is not above 0) and the mark d·A; a later one takes both
//!    over if B > 0 and A² > mark·B.
//!
//! code(y) is the place of the nearest value of the table, the upper one when y is just between two.
//! In other words: the number of midpoints between neighbours that y is not below.
//!
//! IQ4_NL stores d as f16 and code(x·(1/d)), with the d that is not rounded. IQ4_XS has eight runs in
//! a block: D = −(the first scale with the largest magnitude)/32, each run stores the whole number
//! l = d·(1/D), ties to even, within −32 and 31, and code(x·(1/(D·l))). Where a scale is 0, 0 stands
//! in for its inverse, so the code is that of 0, which is 8.
//!
//! Special cases:
//! - A block of zeros stores d = +0 in IQ4_NL and D = −0 in IQ4_XS.
//! - Squares that leave the `f32` range make sums infinite and the scale NaN. IQ4_NL stores it as
//!   0xfe00, the NaN that x86 makes; in IQ4_XS it is never the largest, and l = 0.
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`quantize_iq4_nl`, `quantize_iq4_xs`), each operation
//! rounded by itself, sums in order.

use half::f16;

use super::ggml_iq::IQ4_LEVELS;
use super::ggml_search::{nearest, EPSILON};
use crate::codebook::Levels;
use crate::kernels::{self, Level};

/// Weights that share a scale.
const RUN: usize = 32;
/// Bytes of a run's codes: code j in the low, code j + 16 in the high half of byte j.
const PACKED: usize = RUN / 2;
/// Runs that are searched together. A multiple of every vector's lanes and of a block's runs.
const BATCH: usize = 64;

/// Bytes of an IQ4_NL block: d, codes.
const NL_BYTES: usize = 2 + PACKED;
/// Runs and bytes of an IQ4_XS block: d, high bits of l, low bits of l, codes.
const XS_RUNS: usize = 8;
const XS_BYTES: usize = 8 + XS_RUNS * PACKED;

/// What the codes stand for.
static LEVELS: Levels = Levels::new(&IQ4_LEVELS);
/// The NaN that x86 makes; 0xfe00 as f16.
const NAN: f32 = f32::from_bits(0xffc0_0000);
/// Tries to either side of the one that puts the largest weight on the outermost value.
const TRIES: i8 = 7;

/// Encodes IQ4_NL blocks.
pub fn encode_nl(level: Level, weights: &[f32], importance: Option<&[f32]>, blocks: &mut [u8]) {
    let mut codes = [0; BATCH * PACKED];
    for (batch, blocks) in blocks.chunks_mut(BATCH * NL_BYTES).enumerate() {
        let (weights, importance) = batch_of(batch, weights, importance);
        let scales = search(level, weights, importance, RUN);
        let inverses = scales.map(inverse);
        put_codes(level, weights, &inverses, &mut codes);
        let blocks = blocks.as_chunks_mut::<NL_BYTES>().0.iter_mut();
        for ((block, scale), codes) in blocks.zip(scales).zip(codes.as_chunks::<PACKED>().0) {
            block[..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            block[2..].copy_from_slice(codes);
        }
    }
}

/// Encodes IQ4_XS blocks.
pub fn encode_xs(level: Level, weights: &[f32], importance: Option<&[f32]>, blocks: &mut [u8]) {
    let mut codes = [0; BATCH * PACKED];
    for (batch, blocks) in blocks.chunks_mut(BATCH / XS_RUNS * XS_BYTES).enumerate() {
        let (weights, importance) = batch_of(batch, weights, importance);
        let scales = search(level, weights, importance, XS_RUNS * RUN);
        let mut inverses = [0.0; BATCH];
        let blocks = blocks.as_chunks_mut::<XS_BYTES>().0;
        for ((block, scales), inverses) in blocks
            .iter_mut()
            .zip(scales.as_chunks::<XS_RUNS>().0)
            .zip(inverses.as_chunks_mut().0)
        {
            let head = put_scales(scales, inverses);
            block[..head.len()].copy_from_slice(&head);
        }
        put_codes(level, weights, &inverses, &mut codes);
        for (block, codes) in blocks.iter_mut().zip(codes.chunks(XS_RUNS * PACKED)) {
            block[8..].copy_from_slice(codes);
        }
    }
}

/// The weights of a batch, and their importance.
fn batch_of<'a>(
    batch: usize,
    weights: &'a [f32],
    importance: Option<&'a [f32]>,
) -> (&'a [f32], Option<&'a [f32]>) {
    let of_batch = |all: &'a [f32]| all.chunks(BATCH * RUN).nth(batch).unwrap_or_default();
    (of_batch(weights), importance.map(of_batch))
}

/// Scales of the runs of a batch; σ² is taken over `block` weights.
fn search(level: Level, weights: &[f32], importance: Option<&[f32]>, block: usize) -> [f32; BATCH] {
    let mut shares = [0.0; BATCH * RUN];
    let shares = &mut shares[..weights.len()];
    match importance {
        None => {
            for (share, weight) in shares.iter_mut().zip(weights) {
                *share = weight * weight;
            }
        }
        Some(importance) => {
            let blocks = weights.chunks(block).zip(importance.chunks(block));
            for ((weights, importance), shares) in blocks.zip(shares.chunks_mut(block)) {
                let sum = weights.iter().fold(0.0, |sum, x| sum + x * x);
                let variance = sum * (2.0 / block as f32);
                for ((share, x), i) in shares.iter_mut().zip(weights).zip(importance) {
                    *share = i * (variance + x * x).sqrt();
                }
            }
        }
    }
    let mut scales = [0.0; BATCH];
    let done = kernels::search_levels(level, &LEVELS, EPSILON, TRIES, weights, shares, &mut scales);
    let runs = weights.as_chunks().0.iter().zip(shares.as_chunks().0);
    for ((weights, shares), scale) in runs.zip(&mut scales).skip(done) {
        *scale = search_run(weights, shares);
    }
    // One NaN for all: processors differ in the bits of those that they make.
    scales.map(|scale| if scale.is_nan() { NAN } else { scale })
}

/// The scale of one run.
fn search_run(weights: &[f32; RUN], shares: &[f32; RUN]) -> f32 {
    let most = weights.iter().fold(0.0f32, |most, &weight| {
        if weight.abs() > most.abs() {
            weight
        } else {
            most
        }
    });
    if most.abs() < EPSILON {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let terms = weights.iter().zip(shares);
        terms.fold((0.0, 0.0), |(cross, power), (&x, &share)| {
            let q = LEVELS.values[usize::from(LEVELS.code(x * inverse))];
            (cross + share * q * x, power + share * q * q)
        })
    };
    let (cross, power) = sums(1.0 / (most / -LEVELS.values[0]));
    let mut scale = if power > 0.0 { cross / power } else { 0.0 };
    let mut mark = scale * cross;
    for step in -TRIES..=TRIES {
        let (cross, power) = sums((f32::from(step) + LEVELS.values[0]) / most);
        if power > 0.0 && cross * cross > mark * power {
            scale = cross / power;
            mark = scale * cross;
        }
    }
    scale
}

/// Packed codes of the runs of a batch.
fn put_codes(level: Level, weights: &[f32], inverses: &[f32; BATCH], codes: &mut [u8]) {
    let done = kernels::pack_levels(level, &LEVELS, weights, inverses, codes);
    let runs = weights.as_chunks::<RUN>().0.iter().zip(inverses);
    for ((weights, inverse), codes) in runs.zip(codes.as_chunks_mut::<PACKED>().0).skip(done) {
        let (low, high) = weights.split_at(PACKED);
        for ((byte, low), high) in codes.iter_mut().zip(low).zip(high) {
            *byte = LEVELS.code(inverse * low) | LEVELS.code(inverse * high) << 4;
        }
    }
}

/// The first eight bytes of an IQ4_XS block; the inverse scales of its runs go to `inverses`.
fn put_scales(scales: &[f32; XS_RUNS], inverses: &mut [f32; XS_RUNS]) -> [u8; 8] {
    let most = scales.iter().fold(0.0f32, |most, &scale| {
        if scale.abs() > most.abs() {
            scale
        } else {
            most
        }
    });
    let d = -most / 32.0;
    let (mut high, mut low) = (0u16, 0u32);
    for (run, (scale, inverse_scale)) in scales.iter().zip(inverses).enumerate() {
        let l = nearest(inverse(d) * scale).clamp(-32, 31);
        *inverse_scale = inverse(d * l as f32);
        let l = (l + 32).cast_unsigned();
        low |= (l & 15) << (4 * run);
        high |= ((l >> 4) as u16) << (2 * run);
    }
    let mut head = [0; 8];
    head[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    head[2..4].copy_from_slice(&high.to_le_bytes());
    head[4..].copy_from_slice(&low.to_le_bytes());
    head
}

/// 1/d, or 0 where d is zero.
fn inverse(d: f32) -> f32 {
    if d == 0.0 {
        0.0
    } else {
        1.0 / d
    }
}
