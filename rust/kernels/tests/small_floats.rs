//! Floats of 4 bits, and blocks of small floats that share a scale.

use super::{inputs, types_of, values, Random, OFFSETS};
use crate::dtype::Dtype;
use crate::formats::fp4_blocks::{self, Rule};
use crate::formats::rows8::{self, Codes};
use crate::formats::{e2m1, Weights};
use crate::kernels::Level;

pub(super) fn check_e2m1(level: Level) {
    use e2m1::Rounding::{Down, Even, EvenUnsignedZero};
    use e2m1::Scaling::{Product, Quotient};
    // Ties and signs of what becomes zero are those of the numbers as they are, and of small ones of 6; some
    // factors and divisors leave the range where dividing is avoided.
    let scalings = [
        Product(3.7),
        Product(1.0),
        Product(0.0),
        Product(1e30),
        Product(f32::INFINITY),
        Quotient(0.37),
        Quotient(1.0),
        Quotient(6.0),
        Quotient(6f32.next_down()),
        Quotient(6f32.next_up()),
        Quotient(1e24),
        Quotient(1e-24),
        Quotient(1e30),
        Quotient(1e-30),
        Quotient(f32::INFINITY),
    ];
    let mut kinds = inputs(1003);
    // Quarters and their neighbours, and the least subnormal numbers.
    kinds.push(
        (0..1003)
            .map(|i| {
                let quarter = (i / 3 % 33) as f32 / 4.0;
                let x = [quarter, quarter.next_up(), quarter.next_down()][i % 3];
                if i % 2 == 0 {
                    x
                } else {
                    -x
                }
            })
            .collect(),
    );
    kinds.push(
        (0..1003)
            .map(|i| (i - 501) as f32 * f32::from_bits(1))
            .collect(),
    );
    for input in kinds {
        for (steps, offset) in [0, 1, 2, 7, 62]
            .into_iter()
            .flat_map(|l| OFFSETS.map(|o| (l, o)))
        {
            let length = (steps * 16).min((input.len() - offset) / 16 * 16);
            let weights = &input[offset..offset + length];
            for rounding in [Even, EvenUnsignedZero, Down] {
                for scaling in scalings {
                    let mut expected = vec![0; length / 2];
                    let mut got = expected.clone();
                    e2m1::encode(Level::SCALAR, rounding, scaling, weights, &mut expected);
                    e2m1::encode(level, rounding, scaling, weights, &mut got);
                    assert_eq!(got, expected);
                }
            }
            let codes: Vec<u8> = weights
                .iter()
                .step_by(2)
                .map(|x| (x.to_bits() >> 9) as u8)
                .collect();
            for keeps_sign in [false, true] {
                let mut expected = vec![0.0; length + offset];
                let mut got = expected.clone();
                e2m1::decode(
                    Level::SCALAR,
                    keeps_sign,
                    0.37,
                    &codes,
                    &mut expected[offset..],
                );
                e2m1::decode(level, keeps_sign, 0.37, &codes, &mut got[offset..]);
                assert_eq!(values(&got), values(&expected));
            }
        }
    }
}

/// Blocks of small floats that share a scale: every rule, numbers of blocks that fill no vector and several,
/// scales of the tensor that leave blocks beyond E4M3 or too small for a scale.
pub(super) fn check_fp4_blocks(level: Level) {
    for mut input in inputs(150 * 32 + 1) {
        // Weights that are not finite are refused.
        for weight in &mut input {
            *weight = if weight.is_finite() { *weight } else { 1.0 };
        }
        // Largest magnitudes that are 6 or 448 times a power of two, and their neighbours.
        for (i, block) in input.chunks_mut(16).enumerate().filter(|(i, _)| i % 5 == 0) {
            let most = [6.0f32, 448.0][i / 5 % 2] * 2f32.powi((i % 101) as i32 - 50);
            block.fill(most / 24.0);
            block[i % block.len()] = f32::from_bits(most.to_bits() + i as u32 % 31);
        }
        for tensor_scale in [1.0, 0.003, 6.0, 1e-38, 1e-45, 1e30] {
            for (rule, size, bytes) in [
                (Rule::ModelOptNvFp4 { tensor_scale }, 16, 8),
                (Rule::TorchAoNvFp4 { tensor_scale }, 16, 8),
                (Rule::ModelOptMxFp4, 32, 16),
                (Rule::TorchAoMxFp4, 32, 16),
                (Rule::TorchAoMxFp8, 32, 32),
            ] {
                for blocks in [0, 1, 15, 16, 64, 79, 150] {
                    let weights = Weights::F32(&input[1..=blocks * size]);
                    let mut expected = (vec![0; blocks * bytes], vec![0; blocks]);
                    let mut got = expected.clone();
                    let (codes, scales) = &mut expected;
                    fp4_blocks::encode(Level::SCALAR, rule, weights, codes, scales);
                    fp4_blocks::encode(level, rule, weights, &mut got.0, &mut got.1);
                    assert!(got == expected, "{rule:?}, {blocks} blocks");
                    for (numbers, stored) in types_of(&input[1..=blocks * size]) {
                        let (codes, scales) = &mut expected;
                        let numbers = Weights::F32(&numbers);
                        fp4_blocks::encode(Level::SCALAR, rule, numbers, codes, scales);
                        fp4_blocks::encode(level, rule, stored.weights(), &mut got.0, &mut got.1);
                        assert!(got == expected, "{rule:?}, {blocks} blocks as stored");
                    }
                }
            }
        }
    }
}

/// E4M3 codes of every pattern of BF16, which some levels look up: each pattern among ones that can be looked up,
/// and all of them one after the other.
pub(super) fn check_e4m3_of_bf16(level: Level) {
    use rows8::Scaling::{self, Product, Quotient};
    let patterns: Vec<[u8; 2]> = (0..=u16::MAX)
        .filter(|bits| f32::from_bits(u32::from(*bits) << 16).is_finite())
        .map(u16::to_le_bytes)
        .collect();
    let check = |scaling: Scaling, factor: f32, weights: &[[u8; 2]]| {
        let weights = Weights::BF16(weights);
        let (mut expected, mut got) = (vec![0; weights.len()], vec![0; weights.len()]);
        rows8::encode(
            Level::SCALAR,
            Codes::E4m3,
            scaling,
            factor,
            weights,
            &mut expected,
        );
        rows8::encode(level, Codes::E4m3, scaling, factor, weights, &mut got);
        assert!(got == expected, "{scaling:?} {factor:e}");
    };
    let mut random = Random(7);
    let edges = [
        1.0,
        1f32.next_up(),
        1f32.next_down(),
        1.0 / 448.0,
        448.0,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        1e-36,
        1e36,
        f32::MAX,
    ];
    let drawn = (0..40).map(|_| f32::from_bits((random.next() & 0x3fff_ffff) + 0x2000_0000));
    for factor in edges.into_iter().chain(drawn.collect::<Vec<_>>()) {
        for scaling in [
            Product,
            Quotient(Dtype::F32),
            Quotient(Dtype::F16),
            Quotient(Dtype::BF16),
        ] {
            // No quotient is beyond what a largest weight gives.
            let fits = |bytes: &[u8; 2]| {
                let weight = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                let scaled = match scaling {
                    Product => weight * factor,
                    Quotient(_) => weight / factor,
                };
                scaled.abs() < 2000.0
            };
            let fitting: Vec<[u8; 2]> = patterns.iter().copied().filter(fits).collect();
            check(scaling, factor, &fitting);
            // Nearly all of them are within the range of E4M3 then, in no order.
            let near: Vec<[u8; 2]> = (0..8000)
                .map(|_| {
                    let lowest = fitting.len() / 2 * 15 / 16;
                    let number = lowest + random.next() as usize % (fitting.len() / 2 - lowest);
                    fitting[number]
                })
                .collect();
            check(scaling, factor, &near);
            check(scaling, factor, &near[..7993]);
        }
    }
}
