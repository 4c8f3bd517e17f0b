//! Conversions between stored floats and `f32`: F32, F16, BF16 and F64, little-endian, at any
//! alignment.
//!
//! | direction | rule |
//! |---|---|
//! | F16, BF16, F32 to `f32` | exact (a signalling NaN of F16 becomes quiet) |
//! | F64 to `f32` | to nearest, ties to even; or to odd, see below |
//! | `f32` to F16 | to nearest, ties to even; beyond 65504 + half a step: infinity; NaN stays NaN, quiet |
//! | `f32` to BF16 | to nearest, ties to even; NaN stays NaN, quiet |
//! | `f32` to F32, F64 | exact |
//!
//! *Rounding to odd.* A 64-bit weight that is to end up in 16 bits passes through `f32`. Rounding
//! to nearest twice can miss the nearest 16-bit value by half a step; if the first rounding
//! truncates and then sets the last bit of an inexact result, the second sees which side of a tie
//! it is on, and the two equal one rounding of the 64-bit value (24 bits hold at least two more
//! than the 11 of F16 or the 8 of BF16).

use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::{self, Level};

/// Widens (or narrows, for F64) `bytes`, elements of type `dtype`, to `weights`. `to_odd` selects
/// rounding to odd for F64 and changes nothing for the others.
///
/// Fails if `dtype` is not one of the four, or if the lengths do not agree.
pub fn widen(dtype: Dtype, bytes: &[u8], weights: &mut [f32], to_odd: bool) -> Result<()> {
    check(dtype, bytes.len(), weights.len())?;
    let level = kernels::level();
    match dtype {
        Dtype::F32 => {
            for (weight, bytes) in weights.iter_mut().zip(bytes.as_chunks().0) {
                *weight = f32::from_le_bytes(*bytes);
            }
        }
        Dtype::F16 => widen_f16(level, bytes, weights),
        Dtype::BF16 => widen_bf16(level, bytes, weights),
        _ => {
            let narrow = if to_odd {
                f64_to_odd
            } else {
                |x: f64| x as f32
            };
            for (weight, bytes) in weights.iter_mut().zip(bytes.as_chunks().0) {
                *weight = narrow(f64::from_le_bytes(*bytes));
            }
        }
    }
    Ok(())
}

/// Rounds `weights` once to elements of type `dtype`.
///
/// Fails if `dtype` is not one of the four, or if the lengths do not agree.
pub fn narrow(dtype: Dtype, weights: &[f32], bytes: &mut [u8]) -> Result<()> {
    check(dtype, bytes.len(), weights.len())?;
    let level = kernels::level();
    match dtype {
        Dtype::F32 => {
            for (weight, bytes) in weights.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = weight.to_le_bytes();
            }
        }
        Dtype::F16 => narrow_f16(level, weights, bytes),
        Dtype::BF16 => narrow_bf16(level, weights, bytes),
        _ => {
            for (weight, bytes) in weights.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = f64::from(*weight).to_le_bytes();
            }
        }
    }
    Ok(())
}

#[doc(hidden)]
pub fn widen_f16(level: Level, bytes: &[u8], weights: &mut [f32]) {
    let done = kernels::widen_f16(level, bytes, weights);
    let halves = bytes[2 * done..].as_chunks().0;
    for (weight, bytes) in weights[done..].iter_mut().zip(halves) {
        *weight = f16::from_le_bytes(*bytes).to_f32();
    }
}

#[doc(hidden)]
pub fn widen_bf16(level: Level, bytes: &[u8], weights: &mut [f32]) {
    let done = kernels::widen_bf16(level, bytes, weights);
    let brains = bytes[2 * done..].as_chunks().0;
    for (weight, bytes) in weights[done..].iter_mut().zip(brains) {
        *weight = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

#[doc(hidden)]
pub fn narrow_f16(level: Level, weights: &[f32], bytes: &mut [u8]) {
    let done = kernels::narrow_f16(level, weights, bytes);
    let halves = bytes[2 * done..].as_chunks_mut().0;
    for (weight, bytes) in weights[done..].iter().zip(halves) {
        *bytes = f16::from_f32(*weight).to_le_bytes();
    }
}

#[doc(hidden)]
pub fn narrow_bf16(level: Level, weights: &[f32], bytes: &mut [u8]) {
    let done = kernels::narrow_bf16(level, weights, bytes);
    let brains = bytes[2 * done..].as_chunks_mut().0;
    for (weight, bytes) in weights[done..].iter().zip(brains) {
        *bytes = bf16::from_f32(*weight).to_le_bytes();
    }
}

/// `weight` rounded to F16 and back, as a library does that casts to half precision first.
pub fn through_f16(weight: f32) -> f32 {
    f16::from_f32(weight).to_f32()
}

fn check(dtype: Dtype, bytes: usize, weights: usize) -> Result<()> {
    let (1, size) = dtype.block().unwrap_or_default() else {
        return Err(unsupported(dtype));
    };
    if !dtype.is_float() {
        return Err(unsupported(dtype));
    }
    if weights.checked_mul(size as usize) != Some(bytes) {
        return Err(Error::checkpoint(format!(
            "{dtype}: {bytes} bytes do not hold {weights} weights of {size} bytes"
        )));
    }
    Ok(())
}

fn unsupported(dtype: Dtype) -> Error {
    Error::unsupported(format!("{dtype} is not a floating point type that is read"))
}

/// `x` truncated to `f32`, the last bit set if that was inexact.
fn f64_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    if back == x || x.is_nan() {
        return nearest;
    }
    // Bits of one sign are ordered like the values, so one less is the next value towards zero.
    let toward_zero = nearest.to_bits() - u32::from(back.abs() > x.abs());
    f32::from_bits(toward_zero | 1)
}

/// Turns big-endian elements of type `dtype` into little-endian ones, in place (and back). Inside
/// a GGUF block only the multi-byte fields are swapped.
///
/// Fails for block types whose fields are not known here, and for lengths that are no whole number
/// of elements.
pub fn swap_elements(dtype: Dtype, bytes: &mut [u8]) -> Result<()> {
    let Some((_, size)) = dtype.block() else {
        return Err(Error::unsupported(format!(
            "{dtype}: byte order of this type is not known"
        )));
    };
    // Widths of the multi-byte fields that open a block, in order.
    let fields: &[usize] = match dtype {
        Dtype::Q4_0 | Dtype::Q8_0 => &[2],
        Dtype::Q4_1 => &[2, 2],
        Dtype::Q5_0 => &[2, 4],
        Dtype::Q5_1 => &[2, 2, 4],
        Dtype::C64 => &[4, 4],
        _ if dtype.is_block() => {
            return Err(Error::unsupported(format!(
                "{dtype}: big-endian blocks of this type are not read"
            )));
        }
        _ => &[size as usize],
    };
    if !bytes.len().is_multiple_of(size as usize) {
        return Err(Error::checkpoint(format!(
            "{dtype}: {} bytes are not a multiple of {size}",
            bytes.len()
        )));
    }
    for block in bytes.chunks_exact_mut(size as usize) {
        let mut rest = block;
        for &width in fields {
            let (field, behind) = rest.split_at_mut(width);
            field.reverse();
            rest = behind;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn widen_one(dtype: Dtype, bytes: &[u8], to_odd: bool) -> f32 {
        let mut weight = [0.0];
        widen(dtype, bytes, &mut weight, to_odd).unwrap();
        weight[0]
    }

    fn narrow_one<const N: usize>(dtype: Dtype, weight: f32) -> [u8; N] {
        let mut bytes = [0; N];
        narrow(dtype, &[weight], &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_16_bit_pattern_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            for (dtype, quiet, is_nan) in [
                (Dtype::F16, 0x200, f16::from_bits(bits).is_nan()),
                (Dtype::BF16, 0x40, bf16::from_bits(bits).is_nan()),
            ] {
                let weight = widen_one(dtype, &bits.to_le_bytes(), false);
                let expected = if is_nan { bits | quiet } else { bits };
                assert_eq!(
                    u16::from_le_bytes(narrow_one(dtype, weight)),
                    expected,
                    "{dtype} {bits:#06x}"
                );
            }
        }
    }

    #[test]
    fn overflow_and_ties_follow_ieee() {
        let half = |weight| u16::from_le_bytes(narrow_one(Dtype::F16, weight));
        let brain = |weight| u16::from_le_bytes(narrow_one(Dtype::BF16, weight));
        assert_eq!(half(65519.99), 0x7bff);
        assert_eq!(half(65520.0), 0x7c00);
        assert_eq!(half(-65520.0), 0xfc00);
        assert_eq!(
            half(f32::from_bits(0x3300_0000)),
            0x0000,
            "2^-25 ties to zero"
        );
        assert_eq!(half(f32::from_bits(0x3300_0001)), 0x0001);
        assert_eq!(brain(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(brain(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(brain(f32::MAX), 0x7f80);
        assert_eq!(brain(f32::from_bits(0x7f80_0001)), 0x7fc0);
    }

    #[test]
    fn rounding_to_odd_keeps_what_16_bits_need() {
        let odd = |x: f64| widen_one(Dtype::F64, &x.to_le_bytes(), true);
        let nearest = |x: f64| widen_one(Dtype::F64, &x.to_le_bytes(), false);
        // Just above a tie between two halves: rounding to f32 first lands on the tie.
        let x = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
        assert_eq!(f16::from_f32(nearest(x)), f16::ONE);
        assert_eq!(f16::from_f32(odd(x)), f16::from_bits(0x3c01));
        assert_eq!(odd(1e300), f32::MAX);
        assert_eq!(nearest(1e300), f32::INFINITY);
        assert_eq!(odd(-1e-300).to_bits(), 0x8000_0001);
        assert_eq!(odd(-0.0).to_bits(), 0x8000_0000);
        assert_eq!(odd(f64::NEG_INFINITY), f32::NEG_INFINITY);
        assert!(odd(f64::NAN).is_nan());
    }

    /// Whether the 16-bit float `bits` is nearest to `x`, and even in a tie. `value` gives the value
    /// of a pattern, infinity counting as the next power of two. (The `half` crate is no judge here:
    /// it rounds 64-bit numbers twice.)
    fn is_nearest(x: f64, bits: u16, value: impl Fn(u16) -> f64) -> bool {
        let distance = |bits: u16| (x.abs() - value(bits & 0x7fff)).abs();
        let most = (bits & 0x7fff) == 0 || distance(bits) <= distance(bits - 1);
        let rest = value(bits & 0x7fff).is_infinite() || distance(bits) <= distance(bits + 1);
        let tie = distance(bits) == distance(bits + 1)
            || (bits & 0x7fff) != 0 && distance(bits) == distance(bits - 1);
        most && rest && (!tie || bits & 1 == 0) && (bits >> 15 == 1) == x.is_sign_negative()
    }

    fn value_f16(bits: u16) -> f64 {
        match bits {
            0x7c00 => 65536.0,
            _ => f16::from_bits(bits).to_f64(),
        }
    }

    fn value_bf16(bits: u16) -> f64 {
        match bits {
            0x7f80 => 2f64.powi(128),
            _ => bf16::from_bits(bits).to_f64(),
        }
    }

    proptest! {
        #[test]
        fn two_roundings_equal_one(small in -40i32..20, scale in 1.0f64..2.0, near in 0u16..0x7bff, nudge in -3i64..=3) {
            let tie = (value_f16(near) + value_f16(near + 1)) / 2.0;
            let tie = f64::from_bits(tie.to_bits().wrapping_add_signed(nudge));
            for x in [scale * 2f64.powi(small), -scale * 2f64.powi(small), tie, -tie] {
                if x.abs() < 65536.0 {
                    let half = f16::from_f32(widen_one(Dtype::F64, &x.to_le_bytes(), true));
                    prop_assert!(is_nearest(x, half.to_bits(), value_f16), "{x:e} {half}");
                }
            }
            let tie = (value_bf16(near) + value_bf16(near + 1)) / 2.0;
            let tie = f64::from_bits(tie.to_bits().wrapping_add_signed(nudge));
            for x in [scale * 2f64.powi(small * 3), tie, -tie] {
                let brain = bf16::from_f32(widen_one(Dtype::F64, &x.to_le_bytes(), true));
                prop_assert!(is_nearest(x, brain.to_bits(), value_bf16), "{x:e} {brain}");
            }
        }
    }

    #[test]
    fn lengths_and_types_are_checked() {
        assert!(widen(Dtype::F16, &[0; 3], &mut [0.0; 1], false).is_err());
        assert!(narrow(Dtype::F32, &[0.0; 2], &mut [0; 4]).is_err());
        assert!(widen(Dtype::I8, &[0; 1], &mut [0.0; 1], false).is_err());
        assert!(swap_elements(Dtype::F32, &mut [0; 3]).is_err());
        assert!(swap_elements(Dtype::Q4_K, &mut [0; 144]).is_err());
    }

    #[test]
    fn fields_are_swapped_and_codes_are_not() {
        let mut bytes: Vec<u8> = (0..48).collect();
        swap_elements(Dtype::Q5_1, &mut bytes).unwrap();
        assert_eq!(bytes[..10], [1, 0, 3, 2, 7, 6, 5, 4, 8, 9]);
        assert_eq!(bytes[24..34], [25, 24, 27, 26, 31, 30, 29, 28, 32, 33]);
        let mut bytes: Vec<u8> = (0..8).collect();
        swap_elements(Dtype::F64, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 6, 5, 4, 3, 2, 1, 0]);
        swap_elements(Dtype::U8, &mut bytes).unwrap();
        assert_eq!(bytes, [7, 6, 5, 4, 3, 2, 1, 0]);
    }
}
