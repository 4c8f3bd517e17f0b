//! Groups of `torchao_int4`, of BF16: the ranges of several at a time.

use super::orders::{ranges, values};
use super::store;
use crate::dtype::Dtype;
use crate::formats::rows8::Divisor;
use crate::formats::stored::{for_computed, Brain, Stored};
use crate::formats::torchao_int4::{put_pairs, Steps};
use crate::kernels::GROUPS;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(in crate::kernels) fn encode_bf16_pairs(
    size: usize,
    dtype: Dtype,
    weights: &[[u8; 2]],
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    for_computed!(dtype, |Computed| encode::<Computed>(
        size, weights, pairs, codes
    ))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn encode<C: Stored>(
    size: usize,
    weights: &[[u8; 2]],
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    let blocks = weights
        .chunks_exact(size * GROUPS)
        .zip(codes.chunks_exact_mut(size / 2 * GROUPS))
        .zip(pairs.chunks_exact_mut(2 * C::BYTES * GROUPS));
    for (number, ((weights, codes), pairs)) in blocks.enumerate() {
        let [least, greatest] = ranges(|index| &weights[index * size..(index + 1) * size]);
        let (mut leasts, mut greatests) = ([0.0; GROUPS], [0.0; GROUPS]);
        store(values(&least), &mut leasts);
        store(values(&greatest), &mut greatests);
        let mut steps = [Steps::between((0.0, 0.0)); GROUPS];
        let ranges = leasts.into_iter().zip(greatests);
        let places = steps.iter_mut().zip(pairs.chunks_exact_mut(2 * C::BYTES));
        for (range, (steps, pair)) in ranges.zip(places) {
            *steps = Steps::between(range);
            steps.store::<C>(pair);
        }
        if !steps.iter().all(|steps| Divisor::serves(steps.step)) {
            return number * GROUPS;
        }
        let groups = weights
            .chunks_exact(size)
            .zip(codes.chunks_exact_mut(size / 2));
        for ((weights, codes), steps) in groups.zip(steps) {
            let divisor = Divisor::new(steps.step);
            put_pairs::<Brain>(weights, codes, |weight| {
                divisor.divide(weight - steps.least)
            });
        }
    }
    codes.len() / (size / 2 * GROUPS) * GROUPS
}
