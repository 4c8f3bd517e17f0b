//! Weights that share a scale in groups, squares and pairs of rows.

use super::{inputs, types_of};
use crate::dtype::Dtype;
use crate::formats::quanto_groups::{self, Groups, Lanes, Sharing};
use crate::formats::{scaled, Weights};
use crate::kernels::{self, Level};

/// Runs `made` at the scalar level over numbers, and at `level` over numbers and over what is stored.
fn check<T: PartialEq + std::fmt::Debug>(
    level: Level,
    weights: &[f32],
    made: impl Fn(Level, Weights<'_>) -> T,
) {
    for (numbers, stored) in types_of(weights) {
        let numbers = Weights::F32(&numbers);
        let expected = made(Level::SCALAR, numbers);
        assert_eq!(made(level, numbers), expected);
        assert_eq!(made(level, stored.weights()), expected);
    }
}

pub(super) fn check_quanto_groups(level: Level) {
    for input in inputs(1024) {
        for (dtype, bytes) in [(Dtype::F32, 4), (Dtype::F16, 2), (Dtype::BF16, 2)] {
            for (bits, size) in [(4, 128), (4, 96), (2, 64), (2, 32), (4, 7), (2, 1)] {
                let groups = Groups { dtype, bits, size };
                let parts = 8 / bits as usize;
                for (sharing, shared) in [
                    (Sharing::Neighbours, parts),
                    (Sharing::Others(0), 1),
                    (Sharing::Others(bits), 1),
                ] {
                    let rows = 1000 / (size * shared);
                    let weights = &input[1..1 + rows * size * shared];
                    check(level, weights, |level, weights| {
                        let mut pairs = vec![0; rows * shared * 2 * bytes];
                        let mut codes = vec![0; rows * size];
                        let (to, places) = (&mut codes, &mut pairs);
                        let lanes = Lanes::neighbours(groups, sharing, weights);
                        let done =
                            quanto_groups::encode(level, groups, sharing, &lanes, places, to);
                        // Of a range that the type does not hold, the number of the group is told.
                        match done {
                            Ok(()) => (done, pairs, codes),
                            Err(_) => (done, Vec::new(), Vec::new()),
                        }
                    });
                }
            }
        }
    }
}

pub(super) fn check_int4_rows(level: Level) {
    for input in inputs(1024) {
        for (block, across) in [(128, 3), (32, 5), (20, 4)] {
            let columns = block * across;
            check(level, &input[1..1 + 2 * columns], |level, weights| {
                let (mut codes, mut scales) = (vec![0xff; columns], vec![0; across * 8]);
                kernels::encode_int4_rows(level, block, weights, &mut codes, &mut scales);
                (codes, scales)
            });
        }
    }
}

pub(super) fn check_squares(level: Level) {
    for input in inputs(5000) {
        for format in [&scaled::FP8_BLOCK, &scaled::MODELOPT_FP8_BLOCK] {
            for (size, columns, rows) in [(16, 40, 16), (16, 128, 3), (200, 900, 5), (7, 600, 7)] {
                let squares = scaled::Squares {
                    dtype: Dtype::BF16,
                    size,
                    columns,
                };
                check(level, &input[1..1 + rows * columns], |level, weights| {
                    let mut codes = vec![0; rows * columns];
                    let mut scales = vec![0; columns.div_ceil(size) * 4];
                    let (to, places) = (&mut codes, &mut scales);
                    let done = scaled::encode_squares(level, format, squares, weights, to, places);
                    assert!(done);
                    (codes, scales)
                });
            }
        }
    }
}
