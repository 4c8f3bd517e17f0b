//! Codes of less than a byte, those of weights that lie apart together in one byte.

use super::stored::Stored;
use crate::kernels;

/// Bytes that are put together from whole vectors.
const RUN: usize = 32;

/// Puts the code of weight i of each part into byte i: `code` is given the number of the part and the weight,
/// `bit` says where that part's codes begin. With `KEEP` they are added to bits that are 0 there. `ahead` bytes
/// behind each weight lies one that will be asked for soon.
#[inline(always)]
pub(super) fn put<S: Stored, const KEEP: bool, const PARTS: usize>(
    parts: [&[S::Bytes]; PARTS],
    codes: &mut [u8],
    ahead: Option<usize>,
    bit: impl Fn(usize) -> u32,
    code: impl Fn(usize, f32) -> u8,
) {
    let (places, last) = codes.as_chunks_mut::<RUN>();
    let done = RUN * places.len();
    for (number, place) in places.iter_mut().enumerate() {
        let mut found = if KEEP { *place } else { [0; RUN] };
        for (part, weights) in parts.iter().enumerate() {
            let Some(weights) = weights.as_chunks::<RUN>().0.get(number) else {
                continue;
            };
            if let Some(ahead) = ahead {
                kernels::ahead(weights, ahead);
            }
            for (found, &weight) in found.iter_mut().zip(weights) {
                *found |= code(part, S::value(weight)) << bit(part);
            }
        }
        *place = found;
    }
    for (index, place) in (done..).zip(last) {
        let kept = if KEEP { *place } else { 0 };
        *place = parts
            .iter()
            .enumerate()
            .fold(kept, |found, (part, weights)| {
                let code = weights
                    .get(index)
                    .map_or(0, |&weight| code(part, S::value(weight)));
                found | code << bit(part)
            });
    }
}
