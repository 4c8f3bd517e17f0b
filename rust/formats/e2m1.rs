//! E2M1, the 4-bit float of NVFP4 and MXFP4: a sign (bit 3), 2 bits of exponent with bias 1, 1 bit of
//! fraction; no infinity, no NaN. Magnitudes 0, ½, 1, 1½, 2, 3, 4, 6.
//!
//! Encoding rounds to nearest; what is beyond 6, and NaN, becomes 6. Libraries differ in ties and in the sign of what
//! becomes zero ([`Rounding`]), and in whether weights are divided by the scale or multiplied with its
//! reciprocal (the caller passes either as [`Scaling`] says). A byte holds the code of an even weight in
//! bits 0-3 and that of the odd one behind it in bits 4-7.

use crate::kernels::{self, Level};

/// The largest magnitude.
pub const MOST: f32 = 6.0;

/// Magnitudes by code.
pub const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
/// Numbers by code.
pub const SIGNED_VALUES: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];

/// How a number becomes a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Ties to the even code; the sign is that of the number, also of −0.
    Even,
    /// Ties to the even code; the sign is set for numbers below 0 only.
    EvenUnsignedZero,
    /// Ties to the smaller magnitude; the sign is set for all numbers that are not above 0.
    Down,
}

/// What a weight is turned into first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// `weight·factor`.
    Product(f32),
    /// `weight/factor`.
    Quotient(f32),
}

/// Codes of `weights`, a multiple of 16, two to a byte.
pub fn encode(
    level: Level,
    rounding: Rounding,
    scaling: Scaling,
    weights: &[f32],
    packed: &mut [u8],
) {
    let done = kernels::encode_e2m1(level, rounding, scaling, weights, packed);
    let pairs = weights.as_chunks::<2>().0.iter().zip(packed).skip(done / 2);
    for (pair, byte) in pairs {
        let [low, high] = pair.map(|weight| match scaling {
            Scaling::Product(factor) => code(rounding, weight * factor),
            Scaling::Quotient(factor) => code(rounding, weight / factor),
        });
        *byte = low | high << 4;
    }
}

/// Weights of `packed` codes, each number times `scale`; a multiple of 16. Code 8 is −0, or 0 unless
/// `keeps_sign`.
pub fn decode(level: Level, keeps_sign: bool, scale: f32, packed: &[u8], weights: &mut [f32]) {
    let done = kernels::decode_e2m1(level, keeps_sign, scale, packed, weights);
    let pairs = weights
        .as_chunks_mut::<2>()
        .0
        .iter_mut()
        .zip(packed)
        .skip(done / 2);
    for (pair, byte) in pairs {
        *pair = [byte & 15, byte >> 4].map(|code| {
            let value = SIGNED_VALUES[usize::from(code & 15)];
            // What is added makes 0 of −0 and changes nothing else.
            (if keeps_sign { value } else { value + 0.0 }) * scale
        });
    }
}

/// The code of `x`; NaN has that of 6.
fn code(rounding: Rounding, x: f32) -> u8 {
    let size = x.abs().min(MOST);
    let above = |bound: f32| u8::from(size > bound);
    let even = |bound: f32| match rounding {
        Rounding::Even | Rounding::EvenUnsignedZero => u8::from(size >= bound),
        Rounding::Down => u8::from(size > bound),
    };
    let size =
        above(0.25) + even(0.75) + above(1.25) + even(1.75) + above(2.5) + even(3.5) + above(5.0);
    let is_signed = match rounding {
        Rounding::Even => x.is_sign_negative(),
        Rounding::EvenUnsignedZero => x < 0.0,
        Rounding::Down => x <= 0.0,
    };
    size | u8::from(is_signed) << 3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One code, by looking at all of them.
    fn nearest(rounding: Rounding, x: f32) -> u8 {
        let size = f64::from(x.abs()).min(6.0);
        let distance = |code: u8| (f64::from(VALUES[usize::from(code)]) - size).abs();
        let size = (1..8).fold(0, |best, code| {
            let (there, here) = (distance(best), distance(code));
            let wins_ties = rounding != Rounding::Down && code % 2 == 0;
            if here < there || here == there && wins_ties {
                code
            } else {
                best
            }
        });
        let is_negative = match rounding {
            Rounding::Even => x.is_sign_negative(),
            Rounding::EvenUnsignedZero => x < 0.0,
            Rounding::Down => x <= 0.0,
        };
        size | u8::from(is_negative) << 3
    }

    fn packed_code(rounding: Rounding, x: f32) -> u8 {
        let mut packed = [0; 8];
        let weights = [x; 16];
        encode(
            kernels::level(),
            rounding,
            Scaling::Product(1.0),
            &weights,
            &mut packed,
        );
        assert_eq!(packed, [packed[0]; 8]);
        assert_eq!(packed[0] & 15, packed[0] >> 4);
        packed[0] & 15
    }

    const ROUNDINGS: [Rounding; 3] = [Rounding::Even, Rounding::EvenUnsignedZero, Rounding::Down];

    #[test]
    fn ties_zeros_and_large_numbers_are_as_each_rounding_says() {
        for rounding in ROUNDINGS {
            for quarters in -40..=40 {
                for x in [
                    quarters as f32 / 4.0,
                    (quarters as f32 / 4.0).next_up(),
                    (quarters as f32 / 4.0).next_down(),
                ] {
                    assert_eq!(
                        packed_code(rounding, x),
                        nearest(rounding, x),
                        "{rounding:?} {x}"
                    );
                }
            }
            for x in [
                -0.0,
                f32::MAX,
                -f32::MAX,
                f32::INFINITY,
                f32::MIN_POSITIVE,
                -1e-45,
            ] {
                assert_eq!(
                    packed_code(rounding, x),
                    nearest(rounding, x),
                    "{rounding:?} {x}"
                );
            }
        }
    }

    #[test]
    fn codes_decode_to_their_numbers() {
        let packed: Vec<u8> = (0..=255).collect();
        let mut weights = vec![0.0; 512];
        for keeps_sign in [false, true] {
            decode(kernels::level(), keeps_sign, 3.0, &packed, &mut weights);
            for (index, weight) in weights.iter().enumerate() {
                let code = packed[index / 2] >> (index % 2 * 4) & 15;
                let value = VALUES[usize::from(code & 7)] * 3.0;
                let value = match code {
                    8 if !keeps_sign => 0.0,
                    0..8 => value,
                    _ => -value,
                };
                assert_eq!(weight.to_bits(), value.to_bits(), "{code}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_number_becomes_the_nearest(x in -8f32..8.0, bits in any::<u32>()) {
            for rounding in ROUNDINGS {
                prop_assert_eq!(packed_code(rounding, x), nearest(rounding, x));
                let x = f32::from_bits(bits);
                if x.is_finite() {
                    prop_assert_eq!(packed_code(rounding, x), nearest(rounding, x));
                }
            }
        }
    }
}
