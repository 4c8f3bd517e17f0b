//! One byte per weight and one scale per row or group: the arithmetic that torchao and quanto share.
//!
//! A row is encoded from the quotients of its weights and its scale. Where a library divides in the
//! type of the weights, each quotient is rounded to that type; as none of the quotients that decide
//! a code is subnormal there, that is dropping bits of the fraction.
//!
//! E4M3 (no infinity, 448 is the largest): sign, 4 bits of exponent with bias 7, 3 bits of fraction.
//! Conversion is to nearest, ties to even; magnitudes beyond 448 become 448.
//!
//! The loops have no branches and no calls, so that the compiler makes vectors of them; `kernels` has
//! them compiled once more for wider ones. None adds up anything, so that the bits stay the same.

use half::{bf16, f16};

use super::significands::{self, Significands};
use super::stored::{for_computed, for_stored, Brain, Half, Stored};
use super::weights::Weights;
use crate::dtype::Dtype;
use crate::float8::{of_e4m3, to_e4m3};
use crate::kernels::{self, Level};

/// What a code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codes {
    /// A whole number, −128 … 127.
    Int8,
    /// An E4M3 number.
    E4m3,
}

/// What a weight is turned into before its code is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scaling {
    /// `weight·factor`.
    Product,
    /// `weight/factor`, rounded to a type.
    Quotient(Dtype),
}

/// How groups of weights get a scale each, and whole numbers as codes: the scale is a/`divisor` in the type
/// `dtype` of the weights, a being the largest magnitude, and `least` at least; the code is w·(1/scale), rounded and limited to `low` … `high`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grouping {
    /// Weights of a group.
    pub size: usize,
    /// Type of the weights: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Whether scales are stored in that type, and reciprocals and products rounded to it; in F32 otherwise.
    pub is_narrow: bool,
    /// What the largest magnitude is divided by.
    pub divisor: f32,
    /// The least scale.
    pub least: f32,
    /// The least code.
    pub low: f32,
    /// The largest code.
    pub high: f32,
}

impl Grouping {
    /// Type of scales, reciprocals and products.
    pub fn scale_type(&self) -> Dtype {
        match self.is_narrow {
            true => self.dtype,
            false => Dtype::F32,
        }
    }

    #[inline(always)]
    fn scale(&self, largest: f32) -> f32 {
        round_to(self.dtype, largest / self.divisor).max(self.least)
    }
}

/// 1.5·2²³: added to a number of magnitude below 2²², it rounds that to a whole number, ties to even,
/// whose last bits are then those of the sum.
pub(super) const TO_WHOLE: f32 = 12_582_912.0;

/// The type that a library computes in for weights that decode to `dtype`: that one, or F32 for those
/// that it has no kernels for.
pub fn compute_type(dtype: Dtype) -> Dtype {
    match dtype {
        Dtype::F16 | Dtype::BF16 => dtype,
        _ => Dtype::F32,
    }
}

/// `value` rounded to `dtype` (F32, F16 or BF16).
pub fn round_to(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// A number of type `dtype` (F32, F16 or BF16), to the bytes of `place`, which are as many.
pub fn put_number(dtype: Dtype, value: f32, place: &mut [u8]) {
    match dtype {
        Dtype::F16 => place.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        Dtype::BF16 => place.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        _ => place.copy_from_slice(&value.to_le_bytes()),
    }
}

/// Largest magnitude of finite weights.
pub fn largest(level: Level, weights: Weights<'_>) -> f32 {
    kernels::largest_weight(level, weights)
}

/// Codes of `weights`, each multiplied with or divided by `factor` as `scaling` says. Quotients are less than
/// 2²² in magnitude: the caller has `factor` from the largest weight.
pub fn encode(
    level: Level,
    kind: Codes,
    scaling: Scaling,
    factor: f32,
    weights: Weights<'_>,
    codes: &mut [u8],
) {
    let size = weights.len().max(1);
    let significands = Significands::new(level, kind, scaling, factor, weights, size);
    let encoder = Encoder {
        level,
        kind,
        scaling,
        size,
        factors: &[factor],
        significands: significands.as_slice(),
    };
    // The next row is asked for while this one is encoded.
    encoder.encode(weights, codes, weights.bytes());
}

/// [`encode`] for weights of which `size` share a factor, the next ones another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Encoder<'a> {
    pub level: Level,
    pub kind: Codes,
    pub scaling: Scaling,
    /// At least 1.
    pub size: usize,
    pub factors: &'a [f32],
    /// As many, or none: then nothing is looked up.
    pub significands: &'a [Significands],
}

impl Encoder<'_> {
    /// Codes of weights. `ahead` bytes behind each lies one that will be asked for soon.
    pub(super) fn encode(&self, weights: Weights<'_>, codes: &mut [u8], ahead: usize) {
        let Encoder { level, size, .. } = *self;
        let compute = |factors: &[f32], weights: Weights<'_>, codes: &mut [u8]| {
            let Encoder { kind, scaling, .. } = *self;
            kernels::encode_row8(level, kind, scaling, size, factors, weights, codes, ahead);
        };
        match weights {
            Weights::BF16(weights) if !self.significands.is_empty() => {
                let tables = self.significands;
                significands::encode(
                    level,
                    tables,
                    size,
                    weights,
                    codes,
                    ahead,
                    |number, weights, codes| {
                        compute(&self.factors[number..], weights, codes);
                    },
                );
            }
            _ => compute(self.factors, weights, codes),
        }
    }
}

/// Codes of whole groups of `weights`, and the bytes of their scales.
pub fn encode_groups(
    level: Level,
    grouping: &Grouping,
    weights: Weights<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    kernels::encode_groups8(level, grouping, weights, codes, scales);
}

/// Weights of whole groups of `size` codes: (code − zero)·scale, scales being stored as `dtype` (F32, F16 or
/// BF16), zeros as a signed byte.
pub fn decode_groups(
    level: Level,
    size: usize,
    dtype: Dtype,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    weights: &mut [f32],
) {
    kernels::decode_groups8(level, size, dtype, codes, scales, zeros, weights);
}

/// Weights of `codes`: (code − zero)·scale. E4M3 has no zero.
pub fn decode(level: Level, kind: Codes, zero: i8, scale: f32, codes: &[u8], weights: &mut [f32]) {
    kernels::decode_row8(level, kind, zero, scale, codes, weights);
}

#[inline(always)]
pub(crate) fn largest_body(weights: Weights<'_>) -> f32 {
    for_stored!(weights, |weights: Type| Type::largest(weights))
}

/// With `FMA`, which the processor must have, quotients are made without dividing.
#[inline(always)]
pub(crate) fn encode_body<const FMA: bool>(
    kind: Codes,
    scaling: Scaling,
    size: usize,
    factors: &[f32],
    weights: Weights<'_>,
    codes: &mut [u8],
    ahead: usize,
) {
    for_stored!(weights, |weights: Type| {
        let parts = weights.chunks(size).zip(codes.chunks_mut(size));
        for ((weights, codes), &factor) in parts.zip(factors) {
            encode_of::<Type, FMA>(kind, scaling, factor, weights, codes, ahead);
        }
    });
}

#[inline(always)]
fn encode_of<S: Stored, const FMA: bool>(
    kind: Codes,
    scaling: Scaling,
    factor: f32,
    weights: &[S::Bytes],
    codes: &mut [u8],
    ahead: usize,
) {
    match kind {
        Codes::Int8 => scaled::<S, FMA>(scaling, factor, weights, codes, ahead, |value, _| {
            nearest_whole(value, -128.0, 127.0)
        }),
        Codes::E4m3 => scaled::<S, FMA>(scaling, factor, weights, codes, ahead, |value, weight| {
            to_e4m3(value.copysign(weight))
        }),
    }
}

/// `nearest` gives the code of a number, and is given the weight for its sign.
#[inline(always)]
fn scaled<S: Stored, const FMA: bool>(
    scaling: Scaling,
    factor: f32,
    weights: &[S::Bytes],
    codes: &mut [u8],
    ahead: usize,
    nearest: impl Fn(f32, f32) -> u8,
) {
    match scaling {
        Scaling::Product => each::<S, 64>(weights, codes, ahead, |weight| {
            nearest(weight * factor, weight)
        }),
        Scaling::Quotient(dtype) if FMA && Divisor::serves(factor) => {
            let divisor = Divisor::new(factor);
            quotients::<S>(dtype, weights, codes, ahead, nearest, |weight| {
                divisor.divide(weight)
            });
        }
        Scaling::Quotient(dtype) => {
            quotients::<S>(dtype, weights, codes, ahead, nearest, |weight| {
                weight / factor
            });
        }
    }
}

#[inline(always)]
fn quotients<S: Stored>(
    dtype: Dtype,
    weights: &[S::Bytes],
    codes: &mut [u8],
    ahead: usize,
    nearest: impl Fn(f32, f32) -> u8,
    divide: impl Fn(f32) -> f32,
) {
    match dtype {
        Dtype::F16 => each::<S, 64>(weights, codes, ahead, |weight| {
            nearest(Half::rounded(divide(weight)), weight)
        }),
        Dtype::BF16 => each::<S, 64>(weights, codes, ahead, |weight| {
            nearest(Brain::rounded(divide(weight)), weight)
        }),
        _ => each::<S, 64>(weights, codes, ahead, |weight| {
            nearest(divide(weight), weight)
        }),
    }
}

/// A number that many are divided by, with its reciprocal.
///
/// The product with the reciprocal is off by less than two units in the last place; what is left of the
/// dividend, which fused operations give exactly, corrects it to the rounded quotient (P. Markstein,
/// "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). That holds as long as
/// nothing leaves the range of `f32`, which quotients of less than 2²² do not. Those that are next to nothing
/// may be off, and zeros of the other sign: they are rounded to 0 whatever they are.
#[derive(Clone, Copy)]
pub(crate) struct Divisor {
    by: f32,
    inverse: f32,
}

impl Divisor {
    /// From the least number that serves to the least that is too large: the reciprocals, and what is left of
    /// dividends that count, are normal numbers.
    pub(crate) const SERVES: (f32, f32) = (
        f32::from_bits((127 - 80) << 23),
        f32::from_bits((127 + 80) << 23),
    );

    /// Whether `by` is one of [`Divisor::SERVES`].
    #[inline(always)]
    pub(crate) fn serves(by: f32) -> bool {
        (Self::SERVES.0..Self::SERVES.1).contains(&by)
    }

    #[inline(always)]
    pub(crate) fn new(by: f32) -> Self {
        Divisor {
            by,
            inverse: 1.0 / by,
        }
    }

    #[inline(always)]
    pub(crate) fn divide(self, dividend: f32) -> f32 {
        let about = dividend * self.inverse;
        let left = (-about).mul_add(self.by, dividend);
        left.mul_add(self.inverse, about)
    }
}

#[inline(always)]
fn each<S: Stored, const RUN: usize>(
    weights: &[S::Bytes],
    codes: &mut [u8],
    ahead: usize,
    code: impl Fn(f32) -> u8,
) {
    // Runs of a fixed length, so that bytes are put together from whole vectors.
    let (runs, rest) = weights.as_chunks::<RUN>();
    let (places, last) = codes.as_chunks_mut::<RUN>();
    for (weights, places) in runs.iter().zip(places) {
        kernels::ahead(weights, ahead);
        for (place, &weight) in places.iter_mut().zip(weights) {
            *place = code(S::value(weight));
        }
    }
    for (place, &weight) in last.iter_mut().zip(rest) {
        *place = code(S::value(weight));
    }
}

#[inline(always)]
pub(crate) fn encode_groups_body(
    grouping: &Grouping,
    weights: Weights<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    for_stored!(weights, |weights: Type| for_computed!(
        grouping.scale_type(),
        |Computed| groups::<Type, Computed>(grouping, weights, codes, scales)
    ));
}

/// `C` is the type of scales, in which reciprocals and products are computed.
#[inline(always)]
fn groups<S: Stored, C: Stored>(
    grouping: &Grouping,
    weights: &[S::Bytes],
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let (size, low, high) = (grouping.size.max(1), grouping.low, grouping.high);
    let ahead = std::mem::size_of_val(weights);
    let groups = weights
        .chunks(size)
        .zip(codes.chunks_mut(size))
        .zip(scales.chunks_exact_mut(C::BYTES));
    for ((weights, codes), place) in groups {
        let scale = grouping.scale(S::largest(weights));
        C::write(scale, place);
        let factor = round_to(grouping.scale_type(), 1.0 / scale);
        let code = |weight| nearest_whole(C::shortened(weight * factor), low, high);
        // The usual sizes of groups are multiples of one of these.
        match size.is_multiple_of(64) {
            true => each::<S, 64>(weights, codes, ahead, code),
            false => each::<S, 32>(weights, codes, ahead, code),
        }
    }
}

#[inline(always)]
pub(crate) fn decode_groups_body(
    size: usize,
    dtype: Dtype,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    weights: &mut [f32],
) {
    match dtype {
        Dtype::F16 => decode_scaled(size, codes, scales, zeros, weights, |bytes| {
            f16::from_le_bytes(bytes).to_f32()
        }),
        Dtype::BF16 => decode_scaled(size, codes, scales, zeros, weights, |bytes| {
            bf16::from_le_bytes(bytes).to_f32()
        }),
        _ => decode_scaled(size, codes, scales, zeros, weights, f32::from_le_bytes),
    }
}

#[inline(always)]
fn decode_scaled<const WIDTH: usize>(
    size: usize,
    codes: &[u8],
    scales: &[u8],
    zeros: &[u8],
    weights: &mut [f32],
    value: impl Fn([u8; WIDTH]) -> f32,
) {
    let groups = weights
        .chunks_mut(size.max(1))
        .zip(codes.chunks(size.max(1)))
        .zip(scales.as_chunks().0.iter().zip(zeros));
    for ((weights, codes), (scale, zero)) in groups {
        decode_body(
            Codes::Int8,
            zero.cast_signed(),
            value(*scale),
            codes,
            weights,
        );
    }
}

#[inline(always)]
pub(crate) fn decode_body(kind: Codes, zero: i8, scale: f32, codes: &[u8], weights: &mut [f32]) {
    match kind {
        Codes::Int8 => {
            let zero = f32::from(zero);
            for (weight, &code) in weights.iter_mut().zip(codes) {
                *weight = (f32::from(code.cast_signed()) - zero) * scale;
            }
        }
        Codes::E4m3 => {
            for (weight, &code) in weights.iter_mut().zip(codes) {
                *weight = of_e4m3(code) * scale;
            }
        }
    }
}

/// `value` with `DROPPED` bits less in its fraction, to nearest, ties to even.
#[inline(always)]
pub(super) fn shortened<const DROPPED: u32>(value: f32) -> f32 {
    if DROPPED == 0 {
        return value;
    }
    let bits = value.to_bits();
    let half = (1u32 << (DROPPED - 1)) - 1;
    let rounded = bits.wrapping_add(half + (bits >> DROPPED & 1));
    f32::from_bits(rounded & !((1 << DROPPED) - 1))
}

#[inline(always)]
fn nearest_whole(value: f32, low: f32, high: f32) -> u8 {
    let limited = value.clamp(low, high);
    (limited + TO_WHOLE).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The value of a code, from the definition.
    fn value(code: u8) -> f64 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(-9),
            _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
        };
        if code & 0x80 == 0 {
            magnitude
        } else {
            -magnitude
        }
    }

    fn encode(value: f32) -> u8 {
        to_e4m3(value)
    }

    #[test]
    fn every_code_survives_the_round_trip() {
        for code in 0..=u8::MAX {
            let weight = of_e4m3(code);
            if code & 0x7f == 0x7f {
                assert!(weight.is_nan());
            } else {
                assert_eq!(f64::from(weight), value(code));
                assert_eq!(encode(weight), code);
            }
        }
    }

    #[test]
    fn ties_go_to_even_and_large_numbers_to_448() {
        for code in 0..0x7eu8 {
            let tie = ((value(code) + value(code + 1)) / 2.0) as f32;
            assert_eq!(encode(tie), code + (code & 1), "{tie}");
            assert_eq!(encode(tie.next_down()), code, "{tie}");
            assert_eq!(encode(tie.next_up()), code + 1, "{tie}");
            assert_eq!(encode(-tie), 0x80 | (code + (code & 1)), "-{tie}");
        }
        assert_eq!(encode(1e30), 0x7e);
        assert_eq!(encode(f32::NEG_INFINITY), 0xfe);
    }

    #[test]
    fn quotients_without_division_are_the_quotients() {
        let mut state = 1u64;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        };
        for round in 0..200_000u32 {
            let bits = next();
            // Fractions of few bits and of all ones are among them, and dividends next to ties of codes.
            let fraction = match round % 4 {
                0 => bits & 0x7f_ffff,
                1 => bits & 0x7f_0000,
                2 => 0x7f_ffff - (bits & 7),
                _ => bits & 7,
            };
            let by = f32::from_bits((127 - 80 + next() % 160) << 23 | fraction);
            assert!(Divisor::serves(by));
            let divisor = Divisor::new(by);
            let ties = (next() % 4096) as f32 / 16.0 * by;
            let near = f32::from_bits(ties.to_bits().wrapping_add(next() % 5).saturating_sub(2));
            let size = f32::from_bits((next() % 0xfe) << 23 | bits & 0x7f_ffff);
            for dividend in [near, -near, size, -size, 0.0, -0.0] {
                let (expected, found) = (dividend / by, divisor.divide(dividend));
                if expected.abs() > 1e-5 && expected.abs() < 4e6 {
                    assert_eq!(found.to_bits(), expected.to_bits(), "{dividend:e} / {by:e}");
                } else if expected.abs() <= 1e-5 {
                    let found = found.copysign(dividend);
                    assert_eq!(to_e4m3(found), to_e4m3(expected), "{dividend:e} / {by:e}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn whole_numbers_are_the_nearest(x in -300f32..300.0, halves in -300i32..300) {
            for x in [x, halves as f32 / 2.0] {
                let expected = x.round_ties_even().clamp(-128.0, 127.0) as i8;
                prop_assert_eq!(nearest_whole(x, -128.0, 127.0).cast_signed(), expected);
            }
        }

        #[test]
        fn quotients_are_those_of_the_type(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            prop_assume!(x.is_finite());
            prop_assert_eq!(shortened::<16>(x).to_bits(), bf16::from_f32(x).to_f32().to_bits());
            if (6.2e-5..65000.0).contains(&x.abs()) {
                prop_assert_eq!(shortened::<13>(x), f16::from_f32(x).to_f32());
            }
        }

        #[test]
        fn the_largest_is_the_largest(weights in prop::collection::vec(-1e30f32..1e30, 0..70)) {
            let expected = weights.iter().fold(0f32, |most, x| most.max(x.abs()));
            prop_assert_eq!(largest_body(Weights::F32(&weights)), expected);
        }
    }
}
