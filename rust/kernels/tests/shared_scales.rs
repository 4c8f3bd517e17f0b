//! Weights that share a scale in groups, squares and pairs of rows.

use super::{inputs, types_of, Random};
use crate::dtype::Dtype;
use crate::formats::quanto_groups::{self, Groups, Lanes, Sharing};
use crate::formats::{scaled, torchao_int4, Weights};
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

/// Groups of BF16 between any two numbers, drawn by their values, by their patterns, and about the middle between
/// codes.
pub(super) fn check_bf16_ranges(level: Level) {
    let mut random = Random(11);
    let of_order = |order: i16| {
        let bits = order ^ (order >> 15 & i16::MAX);
        f32::from_bits(u32::from(bits.cast_unsigned()) << 16)
    };
    let order_of = |value: f32| {
        let bits = ((value.to_bits() >> 16) as u16).cast_signed();
        bits ^ (bits >> 15 & i16::MAX)
    };
    for round in 0..400 {
        let weights: Vec<[u8; 2]> = (0..32)
            .flat_map(|_| {
                let least = random.normal() * 2f32.powi(random.next() as i32 % 40);
                // Far, near, and next to it.
                let width = match round % 4 {
                    0 => least.abs() * 2f32.powi(random.next() as i32 % 20),
                    1 => 2f32.powi(random.next() as i32 % 60),
                    2 => least.abs() / 64.0,
                    _ => random.normal().abs(),
                };
                let (low, high) = (order_of(least), order_of(least + width));
                let most = [15.0, 3.0][round / 4 % 2];
                (0..64)
                    .map(|index| {
                        let order = match index % 4 {
                            _ if index < 2 => [low, high][index],
                            0 => order_of(least + width * (random.next() as f32 / 2f32.powi(32))),
                            1 => {
                                let span = i32::from(high) - i32::from(low) + 1;
                                (i32::from(low) + random.next() as i32 % span.max(1)) as i16
                            }
                            _ => {
                                let code = (random.next() % most as u32) as f32 + 0.5;
                                let near = order_of(of_order(low) + width * code / most);
                                near.saturating_add((random.next() % 5) as i16 - 2)
                            }
                        };
                        let value = of_order(order.clamp(low.min(high), high.max(low)));
                        let value = if value.is_finite() { value } else { 0.0 };
                        ((value.to_bits() >> 16) as u16).to_le_bytes()
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
        for (bits, size) in [(4, 64), (2, 64), (4, 128)] {
            let dtype = Dtype::BF16;
            let groups = Groups { dtype, bits, size };
            let made = |level| {
                let sharing = Sharing::Neighbours;
                let mut pairs = vec![0; weights.len() / size * 4];
                let mut codes = vec![0; weights.len() * bits as usize / 8];
                let lanes = Lanes::neighbours(groups, sharing, Weights::BF16(&weights));
                let (to, places) = (&mut codes, &mut pairs);
                let done = quanto_groups::encode(level, groups, sharing, &lanes, places, to);
                (done, pairs, codes)
            };
            assert!(
                made(level) == made(Level::SCALAR),
                "round {round}, {bits} bits"
            );
        }
        for (dtype, size, bytes) in [(Dtype::BF16, 128, 2), (Dtype::F32, 64, 4)] {
            let made = |level| {
                let mut pairs = vec![0; weights.len() / size * 2 * bytes];
                let mut codes = vec![0; weights.len() / 2];
                let (to, places) = (&mut codes, &mut pairs);
                let given = Weights::BF16(&weights);
                let done = torchao_int4::encode(level, size, dtype, given, places, to);
                assert_eq!(done, weights.len() / size);
                (pairs, codes)
            };
            assert!(made(level) == made(Level::SCALAR), "round {round}, torchao");
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
