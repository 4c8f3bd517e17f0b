//! Weights of a tile, in the type that encoders take them in: `f32`, or the two bytes of F16 or BF16 in which
//! they are stored, so that they need not be widened in memory first.

use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float;
use crate::kernels::{self, Level};

/// Weights in memory order. Those of 16 bits are finite.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// Numbers of this machine.
    F32(&'a [f32]),
    /// Little-endian F16.
    F16(&'a [[u8; 2]]),
    /// Little-endian BF16.
    BF16(&'a [[u8; 2]]),
}

/// Calls a function for the type that weights are stored in.
macro_rules! for_stored {
    ($weights:expr, |$slice:ident: $stored:ident| $call:expr) => {
        match $weights {
            $crate::formats::Weights::F32($slice) => {
                type $stored = $crate::formats::weights::Single;
                $call
            }
            $crate::formats::Weights::F16($slice) => {
                type $stored = $crate::formats::weights::Half;
                $call
            }
            $crate::formats::Weights::BF16($slice) => {
                type $stored = $crate::formats::weights::Brain;
                $call
            }
        }
    };
}
pub(crate) use for_stored;

/// Does the same to the slice of any type of weights.
macro_rules! each_type {
    ($weights:expr, $slice:ident => $made:expr) => {
        match $weights {
            Weights::F32($slice) => Weights::F32($made),
            Weights::F16($slice) => Weights::F16($made),
            Weights::BF16($slice) => Weights::BF16($made),
        }
    };
}

impl<'a> From<&'a [f32]> for Weights<'a> {
    fn from(weights: &'a [f32]) -> Self {
        Weights::F32(weights)
    }
}

impl<'a> Weights<'a> {
    /// The elements of type `dtype` in `bytes`; `None` for types that have to be widened.
    pub fn stored(dtype: Dtype, bytes: &'a [u8]) -> Option<Self> {
        match dtype {
            Dtype::F16 => Some(Weights::F16(bytes.as_chunks().0)),
            Dtype::BF16 => Some(Weights::BF16(bytes.as_chunks().0)),
            _ => None,
        }
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        match self {
            Weights::F32(weights) => weights.len(),
            Weights::F16(weights) | Weights::BF16(weights) => weights.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `count`, or all if they are fewer, and the rest.
    #[inline]
    pub fn split_at(self, count: usize) -> (Self, Self) {
        let count = count.min(self.len());
        let first = each_type!(self, weights => weights.get(..count).unwrap_or_default());
        let rest = each_type!(self, weights => weights.get(count..).unwrap_or_default());
        (first, rest)
    }

    /// `size` (at least 1) after `size` of them; the last may be fewer.
    #[inline]
    pub fn chunks(self, size: usize) -> impl Iterator<Item = Weights<'a>> {
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let first;
            (first, rest) = rest.split_at(size.max(1));
            Some(first)
        })
    }

    /// As [`Weights::chunks`], without what is left at the end.
    #[inline]
    pub fn chunks_exact(self, size: usize) -> impl Iterator<Item = Weights<'a>> {
        let whole = self.len() - self.len() % size.max(1);
        self.split_at(whole).0.chunks(size)
    }

    /// Weight `index` as a number; 0 beyond the end.
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Weights::F32(weights) => weights.get(index).copied(),
            Weights::F16(weights) => weights
                .get(index)
                .map(|bytes| f16::from_le_bytes(*bytes).to_f32()),
            Weights::BF16(weights) => weights
                .get(index)
                .map(|bytes| bf16::from_le_bytes(*bytes).to_f32()),
        }
        .unwrap_or_default()
    }

    /// The least and the greatest; infinities if there are none.
    #[inline(always)]
    pub fn range(self) -> (f32, f32) {
        for_stored!(self, |weights: Type| Type::range(weights))
    }

    /// Asks for the memory behind these, as much as they have.
    pub fn ask_behind(self) {
        for_stored!(self, |weights: Type| {
            kernels::ahead(
                weights,
                std::mem::size_of_val::<[<Type as Stored>::Bytes]>(weights),
            );
        });
    }

    /// The slice of numbers, for formats that do not say [`super::Format::takes_stored`].
    pub fn floats(self) -> Result<&'a [f32]> {
        match self {
            Weights::F32(weights) => Ok(weights),
            _ => Err(Error::Internal(String::from("weights were not widened"))),
        }
    }

    /// The numbers, widened to `place`, which holds as many, if they are not `f32` yet.
    #[inline]
    pub fn widened<'b>(self, level: Level, place: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        let count = self.len().min(place.len());
        let place = &mut place[..count];
        match self {
            Weights::F32(weights) => return weights,
            Weights::F16(weights) => float::widen_f16(level, weights.as_flattened(), place),
            Weights::BF16(weights) => float::widen_bf16(level, weights.as_flattened(), place),
        }
        place
    }

    /// Index of the first weight that is infinite or NaN.
    pub fn first_nonfinite(&self, level: Level) -> Option<usize> {
        const RUN: usize = 4096;
        if let Weights::F32(weights) = self {
            return kernels::first_nonfinite(level, weights);
        }
        self.chunks(RUN).enumerate().find_map(|(number, run)| {
            if kernels::largest_weight(level, run).is_finite() {
                return None;
            }
            let index = (0..run.len()).find(|&index| !run.get(index).is_finite())?;
            Some(number * RUN + index)
        })
    }
}

/// A type of weights that loops are written for once and compiled for each.
pub(crate) trait Stored {
    /// One weight in memory.
    type Bytes: Copy;
    /// A magnitude, ordered as the numbers are: bits, positive as a signed number.
    type Size: Copy + Ord + Default;

    /// Its value, if it is finite.
    fn value(bytes: Self::Bytes) -> f32;

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
        /// What is looked at together, and how many of these lie between that and what is asked for.
        const RUN: usize = 256;
        const AHEAD: usize = 4;
        let (runs, rest) = weights.as_chunks::<RUN>();
        let largest = runs.iter().fold(Self::largest_size(rest), |largest, run| {
            kernels::ahead(run, AHEAD * std::mem::size_of_val(run));
            largest.max(Self::largest_size(run))
        });
        Self::of_size(largest)
    }

    /// The least and the greatest of finite weights; infinities if there are none.
    fn range(weights: &[Self::Bytes]) -> (f32, f32);
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

    #[inline(always)]
    fn value(weight: f32) -> f32 {
        weight
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
    fn range(weights: &[f32]) -> (f32, f32) {
        let lower = |a: f32, b: f32| if b < a { b } else { a };
        let higher = |a: f32, b: f32| if b > a { b } else { a };
        // Several at a time, so that one comparison does not wait for the other.
        let (runs, rest) = weights.as_chunks::<16>();
        let (mut least, mut greatest) = ([f32::INFINITY; 16], [f32::NEG_INFINITY; 16]);
        for run in runs {
            for (least, &weight) in least.iter_mut().zip(run) {
                *least = lower(*least, weight);
            }
            for (greatest, &weight) in greatest.iter_mut().zip(run) {
                *greatest = higher(*greatest, weight);
            }
        }
        for width in [8, 4, 2, 1] {
            let (low, high) = least.split_at_mut(width);
            for (a, &b) in low.iter_mut().zip(&*high) {
                *a = lower(*a, b);
            }
            let (low, high) = greatest.split_at_mut(width);
            for (a, &b) in low.iter_mut().zip(&*high) {
                *a = higher(*a, b);
            }
        }
        (
            rest.iter().copied().fold(least[0], lower),
            rest.iter().copied().fold(greatest[0], higher),
        )
    }
}

impl Stored for Half {
    type Bytes = [u8; 2];
    type Size = i16;

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        let bits = u32::from(u16::from_le_bytes(bytes));
        // With the bits in place the exponent is 112 too small, for subnormal numbers as well.
        let size = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
        f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
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
    fn range(weights: &[[u8; 2]]) -> (f32, f32) {
        range16(weights).map_or(NO_RANGE, |[least, greatest]| {
            (Half::value(least), Half::value(greatest))
        })
    }
}

impl Stored for Brain {
    type Bytes = [u8; 2];
    type Size = i16;

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
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
    fn range(weights: &[[u8; 2]]) -> (f32, f32) {
        range16(weights).map_or(NO_RANGE, |[least, greatest]| {
            (Brain::value(least), Brain::value(greatest))
        })
    }
}

#[inline(always)]
fn size16(bytes: [u8; 2]) -> i16 {
    (u16::from_le_bytes(bytes) & 0x7fff).cast_signed()
}

/// The range of no weights.
const NO_RANGE: (f32, f32) = (f32::INFINITY, f32::NEG_INFINITY);

/// The bytes of the least and of the greatest weight, if there is any; -0 is less than 0.
#[inline(always)]
fn range16(weights: &[[u8; 2]]) -> Option<[[u8; 2]; 2]> {
    // Of negative numbers all bits but the sign are turned, so that whole numbers are ordered as they are.
    let turned = |bits: i16| bits ^ (bits >> 15 & 0x7fff);
    let order = |bytes: &[u8; 2]| turned(i16::from_le_bytes(*bytes));
    let least = weights.iter().map(order).fold(i16::MAX, i16::min);
    let greatest = weights.iter().map(order).fold(i16::MIN, i16::max);
    (!weights.is_empty()).then(|| [least, greatest].map(|order| turned(order).to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn chunks_cover_all_weights_and_exact_ones_leave_the_rest() {
        let bytes: Vec<u8> = (0..20).collect();
        let weights = Weights::stored(Dtype::BF16, &bytes).unwrap();
        let lengths = |chunks: &mut dyn Iterator<Item = Weights<'_>>| -> Vec<usize> {
            chunks.map(|chunk| chunk.len()).collect()
        };
        assert_eq!(lengths(&mut weights.chunks(4)), [4, 4, 2]);
        assert_eq!(lengths(&mut weights.chunks_exact(4)), [4, 4]);
        assert_eq!(lengths(&mut weights.chunks(100)), [10]);
        assert!(Weights::stored(Dtype::F32, &bytes).is_none());
        assert_eq!(weights.split_at(3).1.get(0).to_bits(), 0x0706_0000);
        assert_eq!(weights.get(10), 0.0);
    }

    #[test]
    fn the_first_that_is_not_finite_is_found() {
        for level in Level::available() {
            for (dtype, infinity) in [(Dtype::F16, 0x7c00u16), (Dtype::BF16, 0x7f80)] {
                let mut bytes = (infinity - 1).to_le_bytes().repeat(10_000);
                let found = |bytes: &[u8]| {
                    Weights::stored(dtype, bytes)
                        .unwrap()
                        .first_nonfinite(level)
                };
                assert_eq!(found(&bytes), None);
                for (index, bits) in [(9_999, 0x8000), (4_097, 0), (4_095, 1), (0, 0x8001)] {
                    let bits: u16 = infinity | bits;
                    bytes[2 * index..2 * index + 2].copy_from_slice(&bits.to_le_bytes());
                    assert_eq!(found(&bytes), Some(index));
                }
            }
        }
    }
}
