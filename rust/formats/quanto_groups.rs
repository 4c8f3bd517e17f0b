//! The loops of [`super::quanto_bits`]: scale and shift of every group of weights, and codes from these.
//!
//! A pair is the bytes of a group's scale and, behind them, of its shift, both in the type that everything is
//! computed in. Runs of groups are one call, whose loops `kernels` has compiled for every level.

use super::borders;
use super::rows8::{Divisor, TO_WHOLE};
use super::shared_bytes;
use super::stored::{for_computed, for_stored, Brain, Stored};
use super::weights::Weights;
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
    pub(crate) fn most(self) -> f32 {
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

impl Sharing {
    /// Groups of a byte.
    fn parts(self, groups: Groups) -> usize {
        match self {
            Sharing::Neighbours => 8 / groups.bits as usize,
            Sharing::Others(_) => 1,
        }
    }
}

/// Where groups lie that share bytes: those of one lane go to the same bits.
#[derive(Debug, Clone, Copy)]
pub struct Lanes<'a> {
    pub(crate) weights: [Weights<'a>; MAX_LANES],
    /// Weights from a group of a lane to the next.
    pub(crate) step: usize,
    /// So many bytes behind what this call gets lies what the next one gets.
    pub(crate) ahead: Option<usize>,
}

impl<'a> Lanes<'a> {
    /// Groups one after the other, those of a byte together.
    pub fn neighbours(groups: Groups, sharing: Sharing, weights: Weights<'a>) -> Self {
        let count = sharing.parts(groups);
        Lanes {
            weights: std::array::from_fn(|lane| weights.split_at(lane * groups.size).1),
            step: groups.size * count,
            ahead: None,
        }
    }

    /// The groups of each lane one after the other.
    pub fn apart(groups: Groups, weights: [Weights<'a>; MAX_LANES]) -> Self {
        Lanes {
            weights,
            step: groups.size,
            ahead: Some(weights[0].bytes()),
        }
    }

    /// Those of each lane but the first `count`.
    fn after(&self, count: usize) -> Self {
        let at = count * self.step;
        Lanes {
            weights: self.weights.map(|weights| weights.split_at(at).1),
            ..*self
        }
    }
}

/// Most groups that share bytes.
pub const MAX_LANES: usize = 4;

/// A group whose range the type does not hold, or whose weights are not finite, by its number in the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beyond(pub usize);

/// Pairs and codes of as many groups as have their codes in `codes`.
pub fn encode(
    level: Level,
    groups: Groups,
    sharing: Sharing,
    lanes: &Lanes<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> Result<(), Beyond> {
    let parts = sharing.parts(groups);
    let pair = 2 * parts * for_computed!(groups.dtype, |Computed| Computed::BYTES);
    let has_borders = sharing == Sharing::Neighbours
        && groups.dtype == Dtype::BF16
        && groups.size.is_multiple_of(kernels::GROUP_STEP)
        && matches!(lanes.weights[0], Weights::BF16(_));
    let count = codes.len() / groups.size;
    let mut first = 0;
    while first < count {
        let lanes = lanes.after(first);
        let pairs = &mut pairs[first * pair..count * pair];
        let codes = &mut codes[first * groups.size..];
        let mut next = count - first;
        if has_borders {
            let done = kernels::encode_bf16_groups(
                level,
                groups,
                borders::dividends(),
                &lanes,
                pairs,
                codes,
            );
            if done > 0 {
                first += done;
                continue;
            }
            // What is not done by borders is done by arithmetic, and then others may be.
            next = next.min(kernels::GROUPS / parts);
        }
        let (pairs, codes) = (&mut pairs[..next * pair], &mut codes[..next * groups.size]);
        kernels::encode_shared_groups(level, groups, sharing, &lanes, pairs, codes)
            .map_err(|Beyond(number)| Beyond(first * parts + number))?;
        first += next;
    }
    Ok(())
}

/// Pairs of whole groups.
pub fn measure(groups: Groups, weights: Weights<'_>, pairs: &mut [u8]) -> Result<(), Beyond> {
    for_stored!(weights, |weights: Type| for_computed!(
        groups.dtype,
        |Computed| measure_of::<Type, Computed>(groups, weights, pairs)
    ))
}

fn measure_of<S: Stored, C: Stored>(
    groups: Groups,
    weights: &[S::Bytes],
    pairs: &mut [u8],
) -> Result<(), Beyond> {
    let pairs = pairs.chunks_exact_mut(2 * C::BYTES);
    for (number, (weights, pair)) in weights.chunks_exact(groups.size).zip(pairs).enumerate() {
        Pair::of::<S, C>(groups.most(), weights, pair).ok_or(Beyond(number))?;
    }
    Ok(())
}

/// Scale and shift of a group.
#[derive(Clone, Copy, Default)]
struct Pair {
    scale: f32,
    shift: f32,
}

impl Pair {
    /// Those of some weights, rounded to `C`, whose bytes go to `place`.
    #[inline(always)]
    fn of<S: Stored, C: Stored>(most: f32, weights: &[S::Bytes], place: &mut [u8]) -> Option<Self> {
        let (least, greatest) = S::range(weights);
        let (scale, shift) = place.split_at_mut(C::BYTES);
        let exact = greatest - least;
        let range = C::write(exact, scale);
        (exact.is_finite() && range.is_finite()).then(|| Pair {
            scale: C::write(range / most, scale),
            shift: C::write(-least, shift),
        })
    }
}

/// With `FMA` as [`super::rows8::encode_body`].
#[inline(always)]
pub(crate) fn encode_body<const FMA: bool>(
    groups: Groups,
    sharing: Sharing,
    lanes: &Lanes<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> Result<(), Beyond> {
    let [first, ..] = lanes.weights;
    for_stored!(first, |_first: Type| for_computed!(
        groups.dtype,
        |Computed| match (sharing, groups.bits) {
            (Sharing::Others(bit), _) =>
                encode_of::<Type, Computed, FMA, true, 1>(groups, bit, lanes, pairs, codes),
            (Sharing::Neighbours, 4) =>
                encode_of::<Type, Computed, FMA, false, 2>(groups, 0, lanes, pairs, codes),
            (Sharing::Neighbours, _) =>
                encode_of::<Type, Computed, FMA, false, 4>(groups, 0, lanes, pairs, codes),
        }
    ))
}

/// `PARTS` groups share their bytes, the codes of the first beginning at bit `first_bit`; with `KEEP`, beside
/// what is there.
#[inline(always)]
fn encode_of<S: Stored, C: Stored, const FMA: bool, const KEEP: bool, const PARTS: usize>(
    groups: Groups,
    first_bit: u32,
    lanes: &Lanes<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> Result<(), Beyond> {
    let Groups { bits, size, .. } = groups;
    let most = groups.most();
    let mut slices: [&[S::Bytes]; PARTS] = [&[]; PARTS];
    for (slice, weights) in slices.iter_mut().zip(lanes.weights) {
        *slice = S::slice(weights);
    }
    let runs = pairs
        .chunks_exact_mut(2 * C::BYTES * PARTS)
        .zip(codes.chunks_exact_mut(size));
    for (number, (places, codes)) in runs.enumerate() {
        let start = number * lanes.step;
        let parts = slices.map(|slice| slice.get(start..start + size).unwrap_or_default());
        let mut pairs = [Pair::default(); PARTS];
        let places = places.chunks_exact_mut(2 * C::BYTES);
        for (part, ((pair, weights), place)) in pairs.iter_mut().zip(parts).zip(places).enumerate()
        {
            let beyond = Beyond(number * PARTS + part);
            *pair = Pair::of::<S, C>(most, weights, place).ok_or(beyond)?;
        }
        let bit = |part: usize| first_bit + part as u32 * bits;
        if FMA && pairs.iter().all(|pair| Divisor::serves(pair.scale)) {
            let divisors = pairs.map(|pair| (Divisor::new(pair.scale), pair.shift));
            shared_bytes::put::<S, KEEP, PARTS>(parts, codes, lanes.ahead, bit, |part, weight| {
                let (divisor, shift) = divisors[part];
                let sum = C::rounded(weight + shift);
                nearest_of_normal::<C>(C::rounded(divisor.divide(sum)), most)
            });
        } else {
            shared_bytes::put::<S, KEEP, PARTS>(parts, codes, lanes.ahead, bit, |part, weight| {
                let Pair { scale, shift } = pairs[part];
                let sum = C::shortened(weight + shift);
                nearest(C::shortened(sum / scale), most)
            });
        }
    }
    Ok(())
}

/// The nearest whole number up to `most`, ties to even; 0 for what is no number.
#[inline(always)]
fn nearest(value: f32, most: f32) -> u8 {
    (value.max(0.0).min(most) + TO_WHOLE).to_bits() as u8
}

/// As [`nearest`], for quotients by a scale that is a normal number: no weight is less than the least, and what
/// roundings took from the scale is less than half a code. Scales of F16 may be subnormal.
#[inline(always)]
fn nearest_of_normal<C: Stored>(value: f32, most: f32) -> u8 {
    match C::DROPPED {
        13 => nearest(value, most),
        _ => (value + TO_WHOLE).to_bits() as u8,
    }
}

/// The code of a BF16 weight that is so much above the least, from the definition.
pub(super) fn code_of(sum: f32, scale: f32) -> u8 {
    nearest(Brain::shortened(sum / scale), 15.0)
}
