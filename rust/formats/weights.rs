//! Weights of a tile, in the type that encoders take them in: `f32`, or the two bytes of F16 or BF16 in which
//! they are stored, so that they need not be widened in memory first.

use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float;
use crate::kernels::{self, Level};

use super::stored::{for_stored, Stored};

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

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        match self {
            Weights::F32(weights) => std::mem::size_of_val(*weights),
            Weights::F16(weights) | Weights::BF16(weights) => std::mem::size_of_val(*weights),
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

    /// The least and the greatest, −0 being less than 0; infinities if there are none.
    #[inline(always)]
    pub fn range(self) -> (f32, f32) {
        for_stored!(self, |weights: Type| Type::range(weights))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_the_numbers() {
        let numbers = [1.5f32, -0.0, 0.0, 3e-5, -7.0, 0.25];
        let bytes = |dtype| {
            let mut bytes = vec![0; 12];
            float::narrow(dtype, &numbers, &mut bytes).unwrap();
            bytes
        };
        let (half, brain) = (bytes(Dtype::F16), bytes(Dtype::BF16));
        for weights in [
            Weights::F32(&numbers),
            Weights::stored(Dtype::F16, &half).unwrap(),
            Weights::stored(Dtype::BF16, &brain).unwrap(),
        ] {
            assert_eq!(weights.range(), (-7.0, 1.5));
            assert_eq!(weights.split_at(1).0.range(), (1.5, 1.5));
            let (least, greatest) = weights.split_at(1).1.split_at(2).0.range();
            assert_eq!(
                (least.to_bits(), greatest.to_bits()),
                ((-0f32).to_bits(), 0)
            );
            assert_eq!(
                weights.split_at(0).0.range(),
                (f32::INFINITY, f32::NEG_INFINITY)
            );
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
