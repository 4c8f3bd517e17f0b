//! The types of numbers that encoders read, and compute in, with what loops need to know of them.

use half::{bf16, f16};

use super::rows8::shortened;
use super::weights::Weights;

/// Calls a function for the type that weights are stored in.
macro_rules! for_stored {
    ($weights:expr, |$slice:ident: $stored:ident| $call:expr) => {
        match $weights {
            $crate::formats::Weights::F32($slice) => {
                type $stored = $crate::formats::stored::Single;
                $call
            }
            $crate::formats::Weights::F16($slice) => {
                type $stored = $crate::formats::stored::Half;
                $call
            }
            $crate::formats::Weights::BF16($slice) => {
                type $stored = $crate::formats::stored::Brain;
                $call
            }
        }
    };
}
pub(crate) use for_stored;

/// Calls a function for the type that is computed in.
macro_rules! for_computed {
    ($dtype:expr, |$computed:ident| $call:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F16 => {
                type $computed = $crate::formats::stored::Half;
                $call
            }
            $crate::dtype::Dtype::BF16 => {
                type $computed = $crate::formats::stored::Brain;
                $call
            }
            _ => {
                type $computed = $crate::formats::stored::Single;
                $call
            }
        }
    };
}
pub(crate) use for_computed;

/// A type of weights that loops are written for once and compiled for each.
pub(crate) trait Stored {
    /// One weight in memory.
    type Bytes: Copy + 'static;
    /// A magnitude, ordered as the numbers are: bits, positive as a signed number.
    type Size: Copy + Ord + Default;
    /// Bits that its fraction has less than that of `f32`.
    const DROPPED: u32;
    /// Bytes of a number.
    const BYTES: usize;

    /// Weights of this type; none if they are of another.
    fn slice(weights: Weights<'_>) -> &[Self::Bytes];

    /// Its value, if it is finite.
    fn value(bytes: Self::Bytes) -> f32;

    /// The values of weights, in `room`, which holds as many, or where they are.
    #[inline(always)]
    fn widened<'a>(weights: &'a [Self::Bytes], room: &'a mut [f32]) -> &'a [f32] {
        let room = room.get_mut(..weights.len()).unwrap_or_default();
        for (place, &weight) in room.iter_mut().zip(weights) {
            *place = Self::value(weight);
        }
        room
    }

    /// The values of two neighbours.
    #[inline(always)]
    fn pair(pair: [Self::Bytes; 2]) -> [f32; 2] {
        pair.map(Self::value)
    }

    /// The value of a number at the front of `bytes`.
    fn read(bytes: &[u8]) -> f32;

    /// Rounds `value` to the type, to nearest with ties to even; its bytes go to the front of `place`.
    fn write(value: f32, place: &mut [u8]) -> f32;

    /// `value` rounded to the type, unless it is subnormal there.
    #[inline(always)]
    fn shortened(value: f32) -> f32 {
        match Self::DROPPED {
            13 => shortened::<13>(value),
            16 => shortened::<16>(value),
            _ => value,
        }
    }

    /// `value` rounded to the type, if its magnitude is less than 2^100 and it is not subnormal there.
    #[inline(always)]
    fn rounded(value: f32) -> f32 {
        if Self::DROPPED == 0 {
            return value;
        }
        // Of a number so much larger what is kept ends at the last bit, so the sum is rounded there.
        let power = (value.to_bits() & 0xff80_0000) + (Self::DROPPED << 23);
        let large = f32::from_bits(power);
        value + large - large
    }

    /// Its magnitude.
    fn size(bytes: Self::Bytes) -> Self::Size;

    /// The magnitude as a number; not a finite one if it is not.
    fn of_size(size: Self::Size) -> f32;

    /// The largest magnitude.
    #[inline(always)]
    fn largest_size(weights: &[Self::Bytes]) -> Self::Size {
        let sizes = weights.iter().map(|&bytes| Self::size(bytes));
        sizes.fold(Self::Size::default(), Ord::max)
    }

    /// The largest magnitude as a number.
    #[inline(always)]
    fn largest(weights: &[Self::Bytes]) -> f32 {
        Self::of_size(Self::largest_size(weights))
    }

    /// Whole numbers that are ordered as finite weights are, −0 before 0.
    fn order(bytes: Self::Bytes) -> Self::Size;

    /// The number that [`Stored::order`] turns into this one.
    fn of_order(order: Self::Size) -> f32;

    /// The least and the greatest of finite weights; infinities if there are none.
    #[inline(always)]
    fn range(weights: &[Self::Bytes]) -> (f32, f32) {
        let Some(&first) = weights.first() else {
            return (f32::INFINITY, f32::NEG_INFINITY);
        };
        // One after the other, which the compiler makes vectors of.
        let (first, orders) = (Self::order(first), || {
            weights.iter().copied().map(Self::order)
        });
        (
            Self::of_order(orders().fold(first, Ord::min)),
            Self::of_order(orders().fold(first, Ord::max)),
        )
    }
}

/// [`Stored`] as [`Weights::F32`].
pub(crate) struct Single;
/// [`Stored`] as [`Weights::F16`].
pub(crate) struct Half;
/// [`Stored`] as [`Weights::BF16`].
pub(crate) struct Brain;

impl Stored for Single {
    type Bytes = f32;
    type Size = i32;
    const DROPPED: u32 = 0;
    const BYTES: usize = 4;

    #[inline(always)]
    fn slice(weights: Weights<'_>) -> &[f32] {
        match weights {
            Weights::F32(weights) => weights,
            _ => &[],
        }
    }

    #[inline(always)]
    fn value(weight: f32) -> f32 {
        weight
    }

    #[inline(always)]
    fn widened<'a>(weights: &'a [f32], _room: &'a mut [f32]) -> &'a [f32] {
        weights
    }

    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        f32::from_le_bytes(front(bytes))
    }

    #[inline(always)]
    fn write(value: f32, place: &mut [u8]) -> f32 {
        put_front(value.to_le_bytes(), place);
        value
    }

    #[inline(always)]
    fn size(weight: f32) -> i32 {
        (weight.to_bits() & 0x7fff_ffff).cast_signed()
    }

    #[inline(always)]
    fn of_size(size: i32) -> f32 {
        f32::from_bits(size.cast_unsigned())
    }

    #[inline(always)]
    fn order(weight: f32) -> i32 {
        turned32(weight.to_bits().cast_signed())
    }

    #[inline(always)]
    fn of_order(order: i32) -> f32 {
        f32::from_bits(turned32(order).cast_unsigned())
    }
}

impl Stored for Half {
    type Bytes = [u8; 2];
    type Size = i16;
    const DROPPED: u32 = 13;
    const BYTES: usize = 2;

    #[inline(always)]
    fn slice(weights: Weights<'_>) -> &[[u8; 2]] {
        match weights {
            Weights::F16(weights) => weights,
            _ => &[],
        }
    }

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        let bits = u32::from(u16::from_le_bytes(bytes));
        // With the bits in place the exponent is 112 too small, for subnormal numbers as well.
        let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        Half::value(front(bytes))
    }

    #[inline(always)]
    fn write(value: f32, place: &mut [u8]) -> f32 {
        let rounded = f16::from_f32(value);
        put_front(rounded.to_le_bytes(), place);
        rounded.to_f32()
    }

    #[inline(always)]
    fn size(bytes: [u8; 2]) -> i16 {
        size16(bytes)
    }

    #[inline(always)]
    fn of_size(size: i16) -> f32 {
        f16::from_bits(size.cast_unsigned()).to_f32()
    }

    #[inline(always)]
    fn order(bytes: [u8; 2]) -> i16 {
        turned16(i16::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn of_order(order: i16) -> f32 {
        Half::value(turned16(order).to_le_bytes())
    }
}

impl Stored for Brain {
    type Bytes = [u8; 2];
    type Size = i16;
    const DROPPED: u32 = 16;
    const BYTES: usize = 2;

    #[inline(always)]
    fn slice(weights: Weights<'_>) -> &[[u8; 2]] {
        match weights {
            Weights::BF16(weights) => weights,
            _ => &[],
        }
    }

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
    }

    #[inline(always)]
    fn pair([first, second]: [[u8; 2]; 2]) -> [f32; 2] {
        // As the halves of one word, of which the upper one is in its place.
        let word = u32::from_le_bytes([first[0], first[1], second[0], second[1]]);
        [word << 16, word & 0xffff_0000].map(f32::from_bits)
    }

    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        Brain::value(front(bytes))
    }

    #[inline(always)]
    fn write(value: f32, place: &mut [u8]) -> f32 {
        let rounded = shortened::<16>(value);
        put_front(((rounded.to_bits() >> 16) as u16).to_le_bytes(), place);
        rounded
    }

    #[inline(always)]
    fn size(bytes: [u8; 2]) -> i16 {
        size16(bytes)
    }

    #[inline(always)]
    fn of_size(size: i16) -> f32 {
        bf16::from_bits(size.cast_unsigned()).to_f32()
    }

    #[inline(always)]
    fn order(bytes: [u8; 2]) -> i16 {
        turned16(i16::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn of_order(order: i16) -> f32 {
        Brain::value(turned16(order).to_le_bytes())
    }
}

#[inline(always)]
fn front<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

#[inline(always)]
fn put_front<const N: usize>(bytes: [u8; N], place: &mut [u8]) {
    if let Some(place) = place.first_chunk_mut() {
        *place = bytes;
    }
}

#[inline(always)]
fn size16(bytes: [u8; 2]) -> i16 {
    (u16::from_le_bytes(bytes) & 0x7fff).cast_signed()
}

/// All bits of a negative number turned but its sign, so that it is the less the larger they were; and back.
#[inline(always)]
fn turned16(bits: i16) -> i16 {
    bits ^ (bits >> 15 & i16::MAX)
}

/// As [`turned16`].
#[inline(always)]
fn turned32(bits: i32) -> i32 {
    bits ^ (bits >> 31 & i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::Weights;
    use proptest::prelude::*;

    #[test]
    fn every_finite_pattern_of_16_bits_has_its_value() {
        let patterns: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_le_bytes).collect();
        for weights in [Weights::F16(&patterns), Weights::BF16(&patterns)] {
            for (index, &bytes) in patterns.iter().enumerate() {
                let (value, expected) = match weights {
                    Weights::F16(_) => (Half::value(bytes), weights.get(index)),
                    _ => (Brain::value(bytes), weights.get(index)),
                };
                if expected.is_finite() {
                    assert_eq!(value.to_bits(), expected.to_bits(), "{index:#06x}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn rounding_by_a_sum_is_rounding(bits in any::<u32>(), ties in any::<u16>()) {
            let tie = f32::from_bits(u32::from(ties) << 16 | 0x8000);
            for x in [f32::from_bits(bits), tie, tie.next_up(), tie.next_down()] {
                if x.abs() < 1e30 && x.abs() > 1e-30 {
                    prop_assert_eq!(Brain::rounded(x).to_bits(), shortened::<16>(x).to_bits());
                    prop_assert_eq!(Half::rounded(x).to_bits(), shortened::<13>(x).to_bits());
                }
            }
            prop_assert_eq!(Brain::rounded(0.0), 0.0);
        }
    }
}
