//! The loops of [`super::quanto_bits`]: scale and shift of every group of weights, and codes from these.
//!
//! A pair is the bytes of a group's scale and, behind them, of its shift, both in the type that everything is
//! computed in. Runs of groups are one call, whose loops `kernels` has compiled for every level.

use super::rows8::{shortened, Divisor, TO_WHOLE};
use super::shared_bytes;
use super::weights::{for_stored, Brain, Half, Single, Stored, Weights};
use crate::dtype::Dtype;
use crate::kernels::{self, Level};

/// What groups are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Type of scales and shifts: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Bits of a code: 4 or 2.
    pub bits: u32,
    /// Weights of a group, at least 1.
    pub size: usize,
}

impl Groups {
    /// The largest code.
    #[inline(always)]
    fn most(self) -> f32 {
        f32::from((1u8 << self.bits) - 1)
    }
}

/// Which groups have their codes in the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// As many neighbours as fill a byte, the first in the lowest bits.
    Neighbours,
    /// Groups of other calls: codes are put to this bit of bytes that are 0 there.
    Others(u32),
}

/// Pairs of whole groups; gives the number of a group whose range the type does not hold, if there is one.
pub fn measure(
    level: Level,
    groups: Groups,
    weights: Weights<'_>,
    pairs: &mut [u8],
) -> Option<usize> {
    kernels::measure_groups(level, groups, weights, pairs)
}

/// Codes of whole groups with these pairs.
pub fn encode(
    level: Level,
    groups: Groups,
    sharing: Sharing,
    weights: Weights<'_>,
    pairs: &[u8],
    codes: &mut [u8],
) {
    kernels::encode_shared_groups(level, groups, sharing, weights, pairs, codes);
}

/// A number in the type of scales and shifts.
trait Computed: Stored {
    /// Bits that its fraction has less than that of F32.
    const DROPPED: u32;
    const BYTES: usize;

    fn read(bytes: &[u8]) -> f32;

    /// `value` rounded to the type, whose bytes go to `place`.
    fn write(value: f32, place: &mut [u8]) -> f32;
}

#[inline(always)]
fn put_bytes<const N: usize>(bytes: [u8; N], place: &mut [u8]) {
    if let Some(place) = place.first_chunk_mut() {
        *place = bytes;
    }
}

impl Computed for Single {
    const DROPPED: u32 = 0;
    const BYTES: usize = 4;

    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        f32::from_le_bytes(bytes.first_chunk().copied().unwrap_or_default())
    }

    #[inline(always)]
    fn write(value: f32, place: &mut [u8]) -> f32 {
        put_bytes(value.to_le_bytes(), place);
        value
    }
}

impl Computed for Half {
    const DROPPED: u32 = 13;
    const BYTES: usize = 2;

    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        Half::value(bytes.first_chunk().copied().unwrap_or_default())
    }

    #[inline(always)]
    fn write(value: f32, place: &mut [u8]) -> f32 {
        let rounded = half::f16::from_f32(value);
        put_bytes(rounded.to_le_bytes(), place);
        rounded.to_f32()
    }
}

impl Computed for Brain {
    const DROPPED: u32 = 16;
    const BYTES: usize = 2;

    #[inline(always)]
    fn read(bytes: &[u8]) -> f32 {
        Brain::value(bytes.first_chunk().copied().unwrap_or_default())
    }

    #[inline(always)]
    fn write(value: f32, place: &mut [u8]) -> f32 {
        let rounded = shortened::<16>(value);
        put_bytes(((rounded.to_bits() >> 16) as u16).to_le_bytes(), place);
        rounded
    }
}

/// Calls a function for the type that is computed in.
macro_rules! for_computed {
    ($dtype:expr, |$computed:ident| $call:expr) => {
        match $dtype {
            Dtype::F16 => {
                type $computed = Half;
                $call
            }
            Dtype::BF16 => {
                type $computed = Brain;
                $call
            }
            _ => {
                type $computed = Single;
                $call
            }
        }
    };
}

#[inline(always)]
pub(crate) fn measure_body(
    groups: Groups,
    weights: Weights<'_>,
    pairs: &mut [u8],
) -> Option<usize> {
    for_stored!(weights, |weights: Type| for_computed!(
        groups.dtype,
        |Computed| measure_of::<Type, Computed>(groups, weights, pairs)
    ))
}

#[inline(always)]
fn measure_of<S: Stored, C: Computed>(
    groups: Groups,
    weights: &[S::Bytes],
    pairs: &mut [u8],
) -> Option<usize> {
    let most = groups.most();
    let pairs = pairs.chunks_exact_mut(2 * C::BYTES);
    let mut beyond = None;
    for (number, (weights, pair)) in weights.chunks_exact(groups.size).zip(pairs).enumerate() {
        let (least, greatest) = S::range(weights);
        let (scale, shift) = pair.split_at_mut(C::BYTES);
        let range = C::write(greatest - least, scale);
        if range.is_infinite() {
            beyond = beyond.or(Some(number));
        }
        C::write(range / most, scale);
        C::write(-least, shift);
    }
    beyond
}

/// With `FMA` as [`rows8::encode_body`].
#[inline(always)]
pub(crate) fn encode_body<const FMA: bool>(
    groups: Groups,
    sharing: Sharing,
    weights: Weights<'_>,
    pairs: &[u8],
    codes: &mut [u8],
) {
    for_stored!(weights, |weights: Type| for_computed!(
        groups.dtype,
        |Computed| {
            let run = Run::<Type, Computed>::new(groups, weights, pairs);
            match (sharing, groups.bits) {
                (Sharing::Others(bit), _) => run.encode::<FMA, true, 1>(bit, codes),
                (Sharing::Neighbours, 4) => run.encode::<FMA, false, 2>(0, codes),
                (Sharing::Neighbours, _) => run.encode::<FMA, false, 4>(0, codes),
            }
        }
    ));
}

/// What is encoded.
struct Run<'a, S: Stored, C: Computed> {
    groups: Groups,
    weights: &'a [S::Bytes],
    pairs: &'a [u8],
    computed: std::marker::PhantomData<C>,
}

impl<'a, S: Stored, C: Computed> Run<'a, S, C> {
    #[inline(always)]
    fn new(groups: Groups, weights: &'a [S::Bytes], pairs: &'a [u8]) -> Self {
        Run {
            groups,
            weights,
            pairs,
            computed: std::marker::PhantomData,
        }
    }

    /// `PARTS` groups share their bytes, the codes of the first beginning at bit `bit`; with `KEEP`, beside
    /// what is there.
    #[inline(always)]
    fn encode<const FMA: bool, const KEEP: bool, const PARTS: usize>(
        &self,
        bit: u32,
        codes: &mut [u8],
    ) {
        let Groups { bits, size, .. } = self.groups;
        let most = self.groups.most();
        let runs = self
            .weights
            .chunks_exact(size * PARTS)
            .zip(self.pairs.chunks_exact(2 * C::BYTES * PARTS))
            .zip(codes.chunks_exact_mut(size));
        for ((weights, pairs), codes) in runs {
            let (mut scales, mut shifts) = ([0f32; PARTS], [0f32; PARTS]);
            let pairs = pairs.chunks_exact(2 * C::BYTES);
            for ((scale, shift), pair) in scales.iter_mut().zip(&mut shifts).zip(pairs) {
                let (first, second) = pair.split_at(C::BYTES);
                (*scale, *shift) = (C::read(first), C::read(second));
            }
            let bit = |part: usize| bit + part as u32 * bits;
            let parts = std::array::from_fn(|part| weights.get(part * size..).unwrap_or_default());
            if FMA && scales.iter().all(|&scale| Divisor::serves(scale)) {
                let divisors = scales.map(Divisor::new);
                shared_bytes::put::<S, KEEP, PARTS>(parts, codes, None, bit, |part, weight| {
                    let sum = shorten::<C>(weight + shifts[part]);
                    nearest(shorten::<C>(divisors[part].divide(sum)), most)
                });
            } else {
                shared_bytes::put::<S, KEEP, PARTS>(parts, codes, None, bit, |part, weight| {
                    let sum = shorten::<C>(weight + shifts[part]);
                    nearest(shorten::<C>(sum / scales[part]), most)
                });
            }
        }
    }
}

/// `value` rounded to the type, unless it is subnormal there.
#[inline(always)]
fn shorten<C: Computed>(value: f32) -> f32 {
    match C::DROPPED {
        13 => shortened::<13>(value),
        16 => shortened::<16>(value),
        _ => value,
    }
}

/// The nearest whole number up to `most`, ties to even; 0 for what is no number.
#[inline(always)]
fn nearest(value: f32, most: f32) -> u8 {
    (value.max(0.0).min(most) + TO_WHOLE).to_bits() as u8
}
