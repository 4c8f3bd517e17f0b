//! Groups of quanto, of BF16: codes by comparing weights with the borders of codes.

use std::arch::x86_64::*;

use super::borders::{borders_at, Search};
use super::orders::{bits_of, ranges, rounded, values};
use super::{store, store_64_bytes};
use crate::formats::borders::Dividends;
use crate::formats::quanto_groups::{Groups, Lanes};
use crate::formats::rows8::Divisor;
use crate::formats::Weights;
use crate::kernels::{GROUPS, GROUP_STEP};

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in crate::kernels) fn encode_bf16_groups(
    groups: Groups,
    dividends: &Dividends,
    lanes: &Lanes<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    match groups.bits {
        2 => encode::<2, 4>(groups, dividends, lanes, pairs, codes),
        4 => encode::<4, 2>(groups, dividends, lanes, pairs, codes),
        _ => 0,
    }
}

/// `PARTS` groups of `BITS` bits share their bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn encode<const BITS: u32, const PARTS: usize>(
    groups: Groups,
    dividends: &Dividends,
    lanes: &Lanes<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    const EMPTY: &[[[u8; 2]; GROUP_STEP]] = &[];
    let size = groups.size;
    let mut parts: [&[[u8; 2]]; PARTS] = [&[]; PARTS];
    for (part, weights) in parts.iter_mut().zip(lanes.weights) {
        if let Weights::BF16(weights) = weights {
            *part = weights;
        }
    }
    // Without any, what is read now is asked for.
    let ahead = lanes.ahead.unwrap_or_default();
    let rows = GROUPS / PARTS;
    let blocks = pairs
        .as_chunks_mut::<{ 4 * GROUPS }>()
        .0
        .iter_mut()
        .zip(codes.chunks_exact_mut(size * rows));
    for (number, (pairs, codes)) in blocks.enumerate() {
        let group = |index: usize| {
            let row = number * rows + index / PARTS;
            let weights = parts[index % PARTS].get(row * lanes.step..);
            weights
                .and_then(|weights| weights.get(..size))
                .unwrap_or_default()
        };
        let [least, greatest] = ranges(group);
        let Some(scaled) = Scaled::new(&least, &greatest, groups.most()) else {
            return number * rows;
        };
        store_64_bytes(scaled.pairs, pairs);
        let mut borders = [[0; GROUPS]; GROUPS];
        for (index, borders) in borders.iter_mut().enumerate() {
            let (scale, least) = (scaled.scales[index], scaled.least[index]);
            put_borders(dividends, scale, least, borders);
        }
        for (row, codes) in codes.chunks_exact_mut(size).enumerate() {
            let mut lanes = [(Search::<BITS>::none(), EMPTY); PARTS];
            for (part, lane) in lanes.iter_mut().enumerate() {
                let index = row * PARTS + part;
                let (least, inverse) = (scaled.least[index], scaled.inverse[index]);
                let search = Search::new(&borders[index], least, inverse);
                *lane = (search, group(index).as_chunks().0);
            }
            for (at, place) in codes.as_chunks_mut().0.iter_mut().enumerate() {
                let mut packed = _mm512_setzero_si512();
                for (search, weights) in lanes.iter().rev() {
                    let weights = &weights[at];
                    crate::kernels::ahead(weights, ahead);
                    let (halves, _) = weights.as_chunks();
                    let low = search.codes(bits_of(&halves[0]));
                    let high = search.codes(bits_of(&halves[1]));
                    // No byte has bits that would go over to the next.
                    packed = _mm512_or_si512(
                        _mm512_slli_epi16::<BITS>(packed),
                        _mm512_packus_epi16(low, high),
                    );
                }
                // Packing works within quarters: those of the same half come to lie together.
                let in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
                store_64_bytes(_mm512_permutexvar_epi64(in_order, packed), place);
            }
        }
    }
    codes.len() / (size * rows) * rows
}

/// What belongs to 16 groups.
struct Scaled {
    /// Scale and shift of each, as they are stored.
    pairs: __m512i,
    scales: [f32; GROUPS],
    /// 1/scale.
    inverse: [f32; GROUPS],
    least: [f32; GROUPS],
}

impl Scaled {
    /// `None` if one of them needs care.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn new(least: &[i16; GROUPS], greatest: &[i16; GROUPS], most: f32) -> Option<Self> {
        let (least, greatest) = (values(least), values(greatest));
        let whole = rounded(_mm512_sub_ps(greatest, least));
        let scale = rounded(_mm512_div_ps(whole, _mm512_set1_ps(most)));
        let (low, high) = Divisor::SERVES;
        let serves = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(scale, _mm512_set1_ps(low))
            & _mm512_cmp_ps_mask::<_CMP_LT_OQ>(scale, _mm512_set1_ps(high));
        if serves != u16::MAX {
            return None;
        }
        // The shift is the least weight with the other sign, above the scale.
        let shift = _mm512_xor_si512(_mm512_castps_si512(least), _mm512_set1_epi32(i32::MIN));
        let stored = _mm512_srli_epi32::<16>(_mm512_castps_si512(scale));
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), scale);
        let [scales, inverse, least] = [scale, inverse, least].map(|vector| {
            let mut numbers = [0.0; GROUPS];
            store(vector, &mut numbers);
            numbers
        });
        Some(Scaled {
            pairs: _mm512_or_si512(shift, stored),
            scales,
            inverse,
            least,
        })
    }
}

/// The borders of a group.
///
/// A weight is at a border if its sum with the shift, the rounded one, is at least one of `dividends`. That is
/// rounded up from the middle between it and the number below on, or from what is above the middle if its last bit
/// is set. The middle and the least weight have so few bits that their sum is exact wherever it is near to a weight.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn put_borders(dividends: &Dividends, scale: f32, least: f32, borders: &mut [i16; GROUPS]) {
    let scale = scale.to_bits();
    let table = &dividends[(scale >> 16 & 127) as usize];
    // SAFETY: the reference is to 32 readable bytes; the load takes any alignment.
    let dividends = unsafe { _mm256_loadu_si256(table.as_ptr().cast()) };
    let dividends = _mm512_cvtepu16_epi32(dividends);
    let is_odd = _mm512_and_si512(dividends, _mm512_set1_epi32(1));
    // From the exponent of the table to that of the scale, and half a step of BF16 down.
    let down = (scale & 0x7f80_0000).wrapping_sub((127 << 23) + 0x8000);
    let middle = _mm512_add_epi32(
        _mm512_slli_epi32::<16>(dividends),
        _mm512_set1_epi32(down.cast_signed()),
    );
    let numbers = _mm512_add_ps(_mm512_castsi512_ps(middle), _mm512_set1_ps(least));
    borders_at(numbers, is_odd, borders);
}
