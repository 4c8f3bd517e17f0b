//! Blocks of small floats that share a scale: how ModelOpt and torchao find the scale of a block, and its
//! codes. Where scales and codes lie is the affair of [`super::fp4`] and [`super::torchao_blocks`], whose
//! descriptions have the formulas.
//!
//! A run of blocks is one call, whose loops `kernels` has compiled for every level.

use super::e2m1::{self, Rounding, Scaling};
use super::rows8::largest_body;
use super::significands;
use super::stored::{for_stored, Stored};
use super::weights::Weights;
use crate::codebook::ceil_log2;
use crate::float8::{of_e4m3, of_e8m0, to_e4m3, E4M3_MOST};
use crate::kernels::{self, Level};

/// How blocks are encoded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// 16 E2M1 numbers, E4M3 scales on top of one for the tensor; ModelOpt's.
    ModelOptNvFp4 { tensor_scale: f32 },
    /// 32 E2M1 numbers, powers of two; ModelOpt's.
    ModelOptMxFp4,
    /// 16 E2M1 numbers, E4M3 scales on top of one for the tensor; torchao's.
    TorchAoNvFp4 { tensor_scale: f32 },
    /// 32 E2M1 numbers, powers of two; torchao's.
    TorchAoMxFp4,
    /// 32 E4M3 numbers, powers of two; torchao's.
    TorchAoMxFp8,
}

impl Rule {
    /// Weights of a block, and bytes of their codes.
    fn sizes(self) -> (usize, usize) {
        match self {
            Rule::ModelOptNvFp4 { .. } | Rule::TorchAoNvFp4 { .. } => (16, 8),
            Rule::ModelOptMxFp4 | Rule::TorchAoMxFp4 => (32, 16),
            Rule::TorchAoMxFp8 => (32, 32),
        }
    }
}

/// Weights that are widened together: a multiple of what the loops take, that stays in the nearest cache.
const WIDENED: usize = 32 * significands::MX_BLOCKS;

/// What the scales of blocks are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scales {
    /// Powers of two.
    E8m0,
    /// Numbers times one of the tensor.
    Times(f32),
    /// Numbers divided by one of the tensor.
    Over(f32),
}

impl Scales {
    #[inline(always)]
    fn value(self, code: u8) -> f32 {
        match self {
            Scales::E8m0 => of_e8m0(code),
            Scales::Times(factor) => of_e4m3(code) * factor,
            Scales::Over(divisor) => of_e4m3(code) / divisor,
        }
    }
}

/// NVFP4's scale of a tensor whose largest magnitude is `most`: with it no scale of a block is beyond E4M3.
pub fn tensor_scale(most: f32) -> f32 {
    let scale = most / (e2m1::MOST * E4M3_MOST);
    if scale > 0.0 {
        scale
    } else {
        1.0
    }
}

/// Where weights are widened, if they have to be.
pub struct Room([f32; WIDENED]);

impl Default for Room {
    fn default() -> Self {
        Room([0.0; WIDENED])
    }
}

/// Codes and scales of whole blocks.
pub fn encode(level: Level, rule: Rule, weights: Weights<'_>, codes: &mut [u8], scales: &mut [u8]) {
    encode_runs(
        level,
        rule,
        &mut Room::default(),
        weights,
        codes,
        scales,
        |_| true,
    );
}

/// As [`encode`]; `goes_on` is asked before each run whether it is to be encoded, and its answer is given.
pub fn encode_runs(
    level: Level,
    rule: Rule,
    room: &mut Room,
    weights: Weights<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
    goes_on: impl Fn(Weights<'_>) -> bool,
) -> bool {
    let (block, bytes) = rule.sizes();
    let runs = weights
        .chunks(WIDENED)
        .zip(codes.chunks_mut(WIDENED / block * bytes))
        .zip(scales.chunks_mut(WIDENED / block));
    for ((weights, codes), scales) in runs {
        if !goes_on(weights) {
            return false;
        }
        let mut compute = |weights: Weights<'_>, codes: &mut [u8], scales: &mut [u8]| {
            kernels::encode_fp4_blocks(level, rule, room, weights, codes, scales);
        };
        match (rule, weights) {
            (Rule::TorchAoMxFp8, Weights::BF16(weights)) => {
                significands::encode_mxfp8(level, weights, codes, scales, compute);
            }
            _ => compute(weights, codes, scales),
        }
    }
    true
}

/// Weights of whole blocks of `size` (16 or 32) E2M1 codes; for `keeps_sign` see [`e2m1::decode`].
pub fn decode(
    level: Level,
    size: usize,
    keeps_sign: bool,
    kind: Scales,
    codes: &[u8],
    scales: &[u8],
    weights: &mut [f32],
) {
    kernels::decode_fp4_blocks(level, size, keeps_sign, kind, codes, scales, weights);
}

/// The largest magnitude of each block of `size` finite weights.
#[inline(always)]
pub(crate) fn most_of_blocks(size: usize, weights: &[f32], largest: &mut [f32]) {
    for (block, largest) in weights.chunks_exact(size).zip(largest) {
        *largest = largest_body(Weights::F32(block));
    }
}

/// `most` and `pack` are [`most_of_blocks`] and [`e2m1::encode`] at the level that this is compiled for.
#[inline(always)]
pub(crate) fn encode_body(
    rule: Rule,
    room: &mut Room,
    weights: Weights<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
    most: impl Fn(usize, &[f32], &mut [f32]),
    pack: impl Fn(Rounding, Scaling, &[f32], &mut [u8]),
) {
    for_stored!(weights, |weights: Type| encode_of::<Type>(
        rule, room, weights, codes, scales, most, pack
    ));
}

#[inline(always)]
fn encode_of<S: Stored>(
    rule: Rule,
    room: &mut Room,
    weights: &[S::Bytes],
    codes: &mut [u8],
    scales: &mut [u8],
    most: impl Fn(usize, &[f32], &mut [f32]),
    pack: impl Fn(Rounding, Scaling, &[f32], &mut [u8]),
) {
    match rule {
        Rule::ModelOptNvFp4 { tensor_scale } => {
            let find = |largest: f32| {
                let quotient = largest / (e2m1::MOST * tensor_scale);
                let quotient = if quotient == 0.0 { 1.0 } else { quotient };
                let scale = to_e4m3(quotient.clamp(1.0 / 512.0, E4M3_MOST));
                let by = of_e4m3(scale) * tensor_scale;
                // What is too small for a scale becomes zero.
                (scale, if by > 0.0 { by } else { f32::INFINITY })
            };
            let put = |by: f32, weights: &[f32; 16], codes: &mut [u8; 8]| {
                let scaling = Scaling::Quotient(by);
                pack(Rounding::EvenUnsignedZero, scaling, weights, codes);
            };
            each::<S, _, _>(room, weights, codes, scales, &most, find, put);
        }
        Rule::ModelOptMxFp4 => {
            let find = |largest: f32| {
                let quotient = largest / e2m1::MOST;
                let exponent = ceil_log2(quotient).max(-127);
                // 2^-exponent, which is a normal number: the quotient is less than 2^126.
                let factor = f32::from_bits(((127 - exponent).cast_unsigned() & 0xff) << 23);
                ((exponent + 127) as u8, factor)
            };
            let put = |factor: f32, weights: &[f32; 32], codes: &mut [u8; 16]| {
                pack(Rounding::Down, Scaling::Product(factor), weights, codes);
            };
            each::<S, _, _>(room, weights, codes, scales, &most, find, put);
        }
        Rule::TorchAoNvFp4 { tensor_scale } => {
            let inverse = 1.0 / tensor_scale;
            let find = |largest: f32| {
                let quotient = largest / e2m1::MOST / tensor_scale;
                let scale = to_e4m3(quotient.clamp(1.0 / 64.0, E4M3_MOST));
                let factor = inverse / of_e4m3(scale);
                // What is too small for a scale becomes zero.
                (scale, if factor.is_finite() { factor } else { 0.0 })
            };
            let put = |factor: f32, weights: &[f32; 16], codes: &mut [u8; 8]| {
                pack(Rounding::Even, Scaling::Product(factor), weights, codes);
            };
            each::<S, _, _>(room, weights, codes, scales, &most, find, put);
        }
        Rule::TorchAoMxFp4 => {
            let find = |largest: f32| power_of_two(largest / e2m1::MOST);
            let put = |factor: f32, weights: &[f32; 32], codes: &mut [u8; 16]| {
                pack(Rounding::Even, Scaling::Product(factor), weights, codes);
            };
            each::<S, _, _>(room, weights, codes, scales, &most, find, put);
        }
        Rule::TorchAoMxFp8 => {
            let find = |largest: f32| power_of_two(largest / E4M3_MOST);
            let put = |factor: f32, weights: &[f32; 32], codes: &mut [u8; 32]| {
                for (code, weight) in codes.iter_mut().zip(weights) {
                    *code = to_e4m3(weight * factor);
                }
            };
            each::<S, _, _>(room, weights, codes, scales, &most, find, put);
        }
    }
}

/// Blocks whose scales are looked for together.
const TOGETHER: usize = 64;

/// `find` gives the scale of a block, given its largest magnitude, and what `put` needs besides the weights.
#[inline(always)]
fn each<S: Stored, const SIZE: usize, const BYTES: usize>(
    room: &mut Room,
    weights: &[S::Bytes],
    codes: &mut [u8],
    scales: &mut [u8],
    most: impl Fn(usize, &[f32], &mut [f32]),
    find: impl Fn(f32) -> (u8, f32),
    put: impl Fn(f32, &[f32; SIZE], &mut [u8; BYTES]),
) {
    let (mut largest, mut factors) = ([0f32; TOGETHER], [0f32; TOGETHER]);
    let mut found = [0u8; TOGETHER];
    let runs = weights
        .chunks(SIZE * TOGETHER)
        .zip(codes.chunks_mut(BYTES * TOGETHER))
        .zip(scales.chunks_mut(TOGETHER));
    for ((weights, codes), scales) in runs {
        let wide = S::widened(weights, &mut room.0);
        let (stored, blocks) = (weights.as_chunks::<SIZE>().0, wide.as_chunks::<SIZE>().0);
        most(SIZE, wide, &mut largest);
        for ((scale, factor), &largest) in found.iter_mut().zip(&mut factors).zip(&largest) {
            (*scale, *factor) = find(largest);
        }
        for (place, scale) in scales.iter_mut().zip(&found) {
            *place = *scale;
        }
        let places = codes.as_chunks_mut::<BYTES>().0;
        let later = std::mem::size_of_val(weights);
        let blocks = blocks.iter().zip(stored);
        for (((block, stored), codes), &factor) in blocks.zip(places).zip(&factors) {
            // What comes next is asked for meanwhile.
            kernels::ahead(stored, later);
            put(factor, block, codes);
        }
    }
}

/// The least power of two that is not below `quotient`, as a code, and what weights are multiplied with.
#[inline(always)]
fn power_of_two(quotient: f32) -> (u8, f32) {
    let exponent = ceil_log2(quotient).clamp(-127, 127);
    let code = (exponent + 127) as u8;
    let factor = if code == 0 { 1.0 } else { of_e8m0(254 - code) };
    (code, factor)
}

/// `unpack` is [`e2m1::decode`] at the level that this is compiled for.
#[inline(always)]
pub(crate) fn decode_body(
    size: usize,
    kind: Scales,
    codes: &[u8],
    scales: &[u8],
    weights: &mut [f32],
    unpack: impl Fn(f32, &[u8], &mut [f32]),
) {
    let blocks = weights
        .chunks_exact_mut(size)
        .zip(codes.chunks_exact(size / 2));
    for ((weights, codes), &scale) in blocks.zip(scales) {
        unpack(kind.value(scale), codes, weights);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_exact() {
        for exponent in -126..=120 {
            let power = 2f64.powi(exponent) as f32;
            assert_eq!(power_of_two(power), ((exponent + 127) as u8, 1.0 / power));
            assert_eq!(power_of_two(power * 1.01).0, (exponent + 128) as u8);
        }
        assert_eq!(power_of_two(0.0), (0, 1.0));
        assert_eq!(power_of_two(f32::from_bits(1)), (0, 1.0));
    }
}
