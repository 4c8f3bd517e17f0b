//! Every level gives the same bits as the scalar body: one test per kernel and level, over all
//! block sizes, tails, unaligned slices and special numbers.

use super::{error_sums, first_nonfinite, ErrorSums, Level};
use crate::codebook::{Codebook, FP4, NF4};
use crate::dtype::Dtype;
use crate::float;
use crate::formats::rows8::{self, Codes, Grouping, Scaling};
use crate::formats::{bnb4, bnb8, ggml_activation, ggml_basic, ggml_iq, ggml_k, ggml_ternary, mx};
use crate::formats::{Block, Weights};

mod shared_scales;
mod small_floats;

use shared_scales::{check_bf16_ranges, check_int4_rows, check_quanto_groups, check_squares};
use small_floats::{check_e2m1, check_e4m3_of_bf16, check_fp4_blocks};

/// A small generator of random numbers (xorshift), so that failures repeat.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// Roughly normal.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.next() as f32 / u32::MAX as f32).sum();
        (sum - 2.0) * 1.7
    }
}

/// Weights of every kind that has ever made a difference, `count` of each, one kind per run.
fn inputs(count: usize) -> Vec<Vec<f32>> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    type Make<'a> = Box<dyn FnMut(&mut Random, usize) -> f32 + 'a>;
    let mut fill =
        |mut make: Make<'_>| -> Vec<f32> { (0..count).map(|i| make(&mut random, i)).collect() };
    let near = |x: f32, which: u32| [x, x.next_up(), x.next_down()][which as usize % 3];
    let special = [
        0.0,
        -0.0,
        f32::NAN,
        -f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        -f32::from_bits(0x0040_0000),
        1.0,
        -1.0,
        65504.0,
        65520.0,
        1e-38,
    ];
    let thresholds: Vec<f32> = [&NF4, &FP4]
        .iter()
        .flat_map(|codebook| codebook.thresholds)
        .flat_map(|t| [t, t.next_up(), t.next_down()])
        .chain([1.0])
        .collect();
    vec![
        fill(Box::new(|random, _| random.normal() * 0.02)),
        fill(Box::new(|random, _| f32::from_bits(random.next()))),
        fill(Box::new(|random, _| {
            f32::from_bits(random.next() & 0xbfff_ffff)
        })),
        fill(Box::new(|_, _| 0.0)),
        fill(Box::new(|_, _| -0.0)),
        fill(Box::new(
            |random, _| if random.next() & 1 == 0 { 0.0 } else { -0.0 },
        )),
        // Non-negative and non-positive, with zeros of both signs.
        fill(Box::new(|random, i| match i % 3 {
            0 => -0.0,
            1 => 0.0,
            _ => random.normal().abs(),
        })),
        fill(Box::new(|random, i| match i % 5 {
            0 => 0.0,
            1 => -0.0,
            _ => -random.normal().abs(),
        })),
        fill(Box::new(|random, _| {
            (random.next() % 400) as f32 * 1e-45 - 2e-43
        })),
        fill(Box::new(|random, _| random.normal() * 1e38)),
        fill(Box::new(|random, _| random.normal() * 1e-38)),
        fill(Box::new(move |random, i| {
            if i % 41 == 7 {
                special[random.next() as usize % special.len()]
            } else {
                random.normal()
            }
        })),
        fill(Box::new(move |random, _| {
            special[random.next() as usize % special.len()]
        })),
        // Thresholds themselves, in blocks whose largest magnitude is 1.
        fill(Box::new(move |random, i| match i % 32 {
            3 => -1.0,
            _ => thresholds[random.next() as usize % thresholds.len()],
        })),
        // Multiples of half a step of every block type, and their neighbours.
        fill(Box::new(|random, i| match i % 32 {
            0 => 127.0,
            1 => -127.0,
            _ => near((random.next() % 507) as f32 / 2.0 - 126.5, random.next()),
        })),
        fill(Box::new(|random, i| match i % 32 {
            0 => 15.5,
            1 => -15.5,
            _ => near((random.next() % 61) as f32 / 2.0 - 15.0, random.next()),
        })),
        // The same largest magnitude with both signs.
        fill(Box::new(
            |random, _| if random.next() & 1 == 0 { 3.0 } else { -3.0 },
        )),
    ]
}

/// Lengths that leave every kind of tail, and offsets that break every alignment.
const LENGTHS: [usize; 12] = [0, 1, 7, 8, 9, 15, 31, 33, 64, 127, 300, 1000];
const OFFSETS: [usize; 3] = [0, 1, 3];

fn bits(weights: &[f32]) -> Vec<u32> {
    weights.iter().map(|weight| weight.to_bits()).collect()
}

/// Bits, all NaN being one.
fn values(weights: &[f32]) -> Vec<u32> {
    let one = |weight: &f32| {
        if weight.is_nan() {
            0x7fc0_0000
        } else {
            weight.to_bits()
        }
    };
    weights.iter().map(one).collect()
}

fn check_casts(level: Level) {
    for input in inputs(1003) {
        for length in LENGTHS {
            for offset in OFFSETS {
                let weights = &input[offset..offset + length];
                for (narrow, widen) in [
                    (
                        float::narrow_f16 as fn(Level, &[f32], &mut [u8]),
                        float::widen_f16 as fn(Level, &[u8], &mut [f32]),
                    ),
                    (float::narrow_bf16, float::widen_bf16),
                ] {
                    let mut expected = vec![0; 2 * length + offset];
                    let mut got = expected.clone();
                    narrow(Level::SCALAR, weights, &mut expected[offset..]);
                    narrow(level, weights, &mut got[offset..]);
                    assert_eq!(got, expected);

                    // All bit patterns are weights: take the input's own bytes.
                    let bytes: Vec<u8> = weights.iter().flat_map(|x| x.to_le_bytes()).collect();
                    let bytes = &bytes[..2 * length];
                    let mut expected = vec![0.0; length + offset];
                    let mut got = expected.clone();
                    widen(Level::SCALAR, bytes, &mut expected[offset..]);
                    widen(level, bytes, &mut got[offset..]);
                    assert_eq!(bits(&got), bits(&expected));
                }
            }
        }
    }
}

fn check_first_nonfinite(level: Level) {
    for length in LENGTHS {
        for offset in OFFSETS {
            let mut weights = vec![f32::MAX; length + offset];
            assert_eq!(first_nonfinite(level, &weights[offset..]), None);
            for at in 0..length {
                for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    weights[offset + at] = value;
                    if let Some(last) = weights.last_mut().filter(|last| last.is_finite()) {
                        *last = f32::NAN;
                    }
                    assert_eq!(first_nonfinite(level, &weights[offset..]), Some(at));
                    weights.fill(-1.0);
                }
            }
        }
    }
}

fn check_error_sums(level: Level) {
    let sums = |s: ErrorSums| {
        let all = [s.signal, s.noise, s.cross, s.power, s.max_error];
        (
            s.weights,
            all.map(|sum| if sum.is_nan() { 1 } else { sum.to_bits() }),
        )
    };
    let kinds = inputs(2503);
    for x in &kinds {
        for y in [&kinds[0], &kinds[1], &kinds[2], &kinds[11]] {
            for length in LENGTHS.into_iter().chain([1024, 2100, 2500]) {
                for offset in OFFSETS {
                    let (x, y) = (&x[offset..offset + length], &y[..length]);
                    let expected = sums(error_sums(Level::SCALAR, x, y));
                    assert_eq!(sums(error_sums(level, x, y)), expected);
                }
            }
        }
    }
}

fn check_4bit(level: Level, codebook: &Codebook) {
    for input in inputs(3 * 4096 + 70) {
        for size in [32, 64, 128, 256, 512, 1024, 2048, 4096] {
            for length in [0, 1, 31, size - 1, size, 3 * size, 3 * size + 67] {
                let weights = &input[1..1 + length];
                let blocks = length.div_ceil(size);
                let (mut expected, mut got) = (vec![[0; 4]; blocks], vec![[0; 4]; blocks]);
                bnb4::measure(Level::SCALAR, size, weights, &mut expected);
                bnb4::measure(level, size, weights, &mut got);
                assert_eq!(got, expected);

                let absmax = expected;
                let mut expected = vec![0; length.div_ceil(2) + 1];
                let mut got = expected.clone();
                bnb4::encode(
                    Level::SCALAR,
                    codebook,
                    size,
                    weights,
                    &absmax,
                    &mut expected[1..],
                );
                bnb4::encode(level, codebook, size, weights, &absmax, &mut got[1..]);
                assert_eq!(got, expected);

                let codes: Vec<u8> = input.iter().map(|x| (x.to_bits() >> 9) as u8).collect();
                let codes = &codes[..length.div_ceil(2)];
                let mut expected = vec![0.0; length + 1];
                let mut got = expected.clone();
                bnb4::decode(
                    Level::SCALAR,
                    codebook,
                    size,
                    codes,
                    &absmax,
                    &mut expected[1..],
                );
                bnb4::decode(level, codebook, size, codes, &absmax, &mut got[1..]);
                assert_eq!(values(&got), values(&expected));
            }
        }
    }
}

fn check_int8(level: Level) {
    for input in inputs(1003) {
        for length in LENGTHS {
            for offset in OFFSETS {
                let weights = &input[offset..offset + length];
                let mut expected = vec![0; length + offset];
                let same_codes = |weights: Weights<'_>, most: f32, expected: &[u8]| {
                    let mut got = vec![0; length + offset];
                    let same = bnb8::encode_row(level, weights, &mut got[offset..]);
                    assert_eq!(same.to_bits(), most.to_bits());
                    assert_eq!(got, expected);
                };
                for (numbers, stored) in types_of(weights) {
                    let numbers = Weights::F32(&numbers);
                    let most = bnb8::encode_row(Level::SCALAR, numbers, &mut expected[offset..]);
                    same_codes(stored.weights(), most, &expected);
                }
                let given = Weights::F32(weights);
                let most = bnb8::encode_row(Level::SCALAR, given, &mut expected[offset..]);
                same_codes(given, most, &expected);

                let codes: Vec<u8> = weights.iter().map(|x| (x.to_bits() >> 9) as u8).collect();
                let mut expected = vec![0.0; length + offset];
                let mut got = expected.clone();
                bnb8::decode_row(Level::SCALAR, &codes, most, &mut expected[offset..]);
                bnb8::decode_row(level, &codes, most, &mut got[offset..]);
                assert_eq!(values(&got), values(&expected));
            }
        }
    }
}

/// Weights in the bytes of a type.
struct InType(Dtype, Vec<u8>);

impl InType {
    fn weights(&self) -> Weights<'_> {
        Weights::stored(self.0, &self.1).unwrap()
    }
}

/// `weights` in each type of 16 bits, those that are not finite or are very large replaced: as numbers and in
/// memory.
fn types_of(weights: &[f32]) -> [(Vec<f32>, InType); 2] {
    let limited: Vec<f32> = weights
        .iter()
        .map(|weight| {
            if weight.is_finite() {
                weight.clamp(-6e4, 6e4)
            } else {
                1.0
            }
        })
        .collect();
    [Dtype::F16, Dtype::BF16].map(|dtype| {
        let mut bytes = vec![0; 2 * limited.len()];
        let mut numbers = limited.clone();
        float::narrow(dtype, &limited, &mut bytes).unwrap();
        float::widen(dtype, &bytes, &mut numbers, false).unwrap();
        (numbers, InType(dtype, bytes))
    })
}

fn check_rows8(level: Level) {
    let scalings = [
        Scaling::Product,
        Scaling::Quotient(Dtype::F32),
        Scaling::Quotient(Dtype::F16),
        Scaling::Quotient(Dtype::BF16),
    ];
    for input in inputs(1003) {
        for (length, offset) in LENGTHS.into_iter().flat_map(|l| OFFSETS.map(|o| (l, o))) {
            let weights = &input[offset..offset + length];
            for kind in [Codes::Int8, Codes::E4m3] {
                for (numbers, stored) in types_of(weights) {
                    let (numbers, stored) = (Weights::F32(&numbers), stored.weights());
                    let most = rows8::largest(Level::SCALAR, numbers);
                    for weights in [numbers, stored] {
                        assert_eq!(rows8::largest(level, weights).to_bits(), most.to_bits());
                    }
                    for scaling in scalings {
                        let mut expected = vec![0; length + offset];
                        let place = &mut expected[offset..];
                        rows8::encode(Level::SCALAR, kind, scaling, 0.37, numbers, place);
                        for weights in [numbers, stored] {
                            let mut got = vec![0; length + offset];
                            rows8::encode(level, kind, scaling, 0.37, weights, &mut got[offset..]);
                            assert_eq!(got, expected);
                        }
                    }
                }
                let codes: Vec<u8> = weights.iter().map(|x| (x.to_bits() >> 9) as u8).collect();
                let mut expected = vec![0.0; length + offset];
                let mut got = expected.clone();
                rows8::decode(
                    Level::SCALAR,
                    kind,
                    3,
                    0.37,
                    &codes,
                    &mut expected[offset..],
                );
                rows8::decode(level, kind, 3, 0.37, &codes, &mut got[offset..]);
                assert_eq!(values(&got), values(&expected));
            }
        }
    }
}

fn check_groups8(level: Level) {
    for mut input in inputs(1024) {
        // Scales that are NaN have no bits in particular; such weights are refused.
        for weight in &mut input {
            *weight = if weight.is_finite() { *weight } else { 1.0 };
        }
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            for (size, is_narrow) in [(32, true), (128, true), (80, true), (1, true), (64, false)] {
                let grouping = Grouping {
                    size,
                    dtype,
                    is_narrow,
                    divisor: 7.5,
                    least: 6.2e-5,
                    low: -8.0,
                    high: 7.0,
                };
                let weights = &input[1..1 + 1000 / size * size];
                let [_, (numbers, stored)] = types_of(weights);
                let width = if is_narrow && dtype != Dtype::F32 {
                    2
                } else {
                    4
                };
                let groups = weights.len() / size;
                let mut expected = (vec![0; weights.len()], vec![0; groups * width]);
                let mut got = expected.clone();
                let (codes, scales) = &mut expected;
                let numbers = Weights::F32(&numbers);
                rows8::encode_groups(Level::SCALAR, &grouping, numbers, codes, scales);
                rows8::encode_groups(level, &grouping, stored.weights(), &mut got.0, &mut got.1);
                assert_eq!(got, expected);
                let weights = Weights::F32(weights);
                let (codes, scales) = &mut expected;
                rows8::encode_groups(Level::SCALAR, &grouping, weights, codes, scales);
                rows8::encode_groups(level, &grouping, weights, &mut got.0, &mut got.1);
                assert_eq!(got, expected);

                let stored = grouping.scale_type();
                let zeros: Vec<u8> = (0..groups).map(|group| (group * 3) as u8).collect();
                let (codes, scales) = (&expected.0, &expected.1);
                let mut expected = vec![0.0; weights.len()];
                let mut got = expected.clone();
                let scalar = Level::SCALAR;
                rows8::decode_groups(scalar, size, stored, codes, scales, &zeros, &mut expected);
                rows8::decode_groups(level, size, stored, codes, scales, &zeros, &mut got);
                assert_eq!(values(&got), values(&expected));
            }
        }
    }
}

fn check_blocks<B: Block>(level: Level) {
    for input in inputs(200 * B::WEIGHTS + 1) {
        for blocks in [0, 1, 2, 3, 200] {
            for offset in [0, 1] {
                let weights = &input[offset..offset + blocks * B::WEIGHTS];
                let mut expected = vec![0; blocks * B::BYTES + offset];
                let mut got = expected.clone();
                B::encode(Level::SCALAR, weights, &mut expected[offset..]);
                B::encode(level, weights, &mut got[offset..]);
                assert_eq!(got, expected);

                // Blocks that were encoded, and any bytes at all.
                let any: Vec<u8> = input.iter().flat_map(|x| x.to_le_bytes()).collect();
                for bytes in [
                    &expected[offset..],
                    &any[offset..offset + blocks * B::BYTES],
                ] {
                    let mut expected = vec![0.0; blocks * B::WEIGHTS + offset];
                    let mut got = expected.clone();
                    B::decode(Level::SCALAR, bytes, &mut expected[offset..]);
                    B::decode(level, bytes, &mut got[offset..]);
                    assert_eq!(values(&got), values(&expected));
                }
            }
        }
    }
}

/// As the encoding in [`check_blocks`], with importance.
fn check_weighted<B: Block>(level: Level) {
    let mut random = Random(7);
    let most = 90 * B::WEIGHTS;
    let importance: Vec<f32> = (0..most)
        .map(|i| match (i / 100 % 3, i % 7) {
            (0, _) => 1.0,
            (1, 0) => 0.0,
            _ => random.normal().powi(4),
        })
        .collect();
    for input in inputs(most + 1) {
        for blocks in [1, 2, 3, 90] {
            let weights = &input[1..1 + blocks * B::WEIGHTS];
            let importance = &importance[..weights.len()];
            let mut expected = vec![0; blocks * B::BYTES];
            let mut got = expected.clone();
            B::encode_weighted(Level::SCALAR, weights, importance, &mut expected);
            B::encode_weighted(level, weights, importance, &mut got);
            assert_eq!(got, expected);
        }
    }
}

/// Blocks whose encoder searches: numbers of blocks that fill no group and several, with importance of
/// many kinds and without.
fn check_searched_blocks<B: Block>(level: Level) {
    let most = 19 * B::WEIGHTS;
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut importance: Vec<Vec<f32>> = vec![vec![1.0; most], vec![0.0; most]];
    for kind in 0..3 {
        let number = |_| match kind {
            0 => random.normal().abs(),
            1 => random.normal().max(0.0),
            _ => (10.0 * random.normal()).exp2(),
        };
        importance.push((0..most).map(number).collect());
    }
    for mut input in inputs(most + 1) {
        // A search among numbers that are not finite means nothing; it may not panic, no more.
        let mut blocks = vec![0; 19 * B::BYTES];
        B::encode(level, &input[1..], &mut blocks);
        B::encode_weighted(level, &input[1..], &importance[2], &mut blocks);
        for weight in input.iter_mut().filter(|weight| !weight.is_finite()) {
            *weight = 0.0;
        }
        for blocks in [0, 1, 3, 16, 19] {
            let weights = &input[1..=blocks * B::WEIGHTS];
            let mut expected = vec![0; blocks * B::BYTES];
            let mut got = expected.clone();
            B::encode(Level::SCALAR, weights, &mut expected);
            B::encode(level, weights, &mut got);
            assert!(got == expected);
            for importance in &importance {
                let importance = &importance[..weights.len()];
                B::encode_weighted(Level::SCALAR, weights, importance, &mut expected);
                B::encode_weighted(level, weights, importance, &mut got);
                assert!(got == expected);
            }
        }
    }
}

/// One module of tests per kernel, one test per level; a level that the processor lacks is named
/// and passes.
macro_rules! stamp {
    ($($kernel:ident: |$level:ident| $check:expr;)*) => {$(
        mod $kernel {
            #[allow(unused_imports)]
            use super::*;

            fn at(name: &str) {
                match Level::available().into_iter().find(|level| level.name() == name) {
                    Some($level) => $check,
                    None => println!("this build or processor has no {name}"),
                }
            }

            #[test]
            fn scalar() {
                at("scalar");
            }

            #[test]
            fn avx2() {
                at("avx2");
            }

            #[test]
            fn avx512() {
                at("avx512");
            }
        }
    )*};
}

stamp! {
    casts: |level| check_casts(level);
    nonfinite: |level| check_first_nonfinite(level);
    sums: |level| check_error_sums(level);
    nf4: |level| check_4bit(level, &NF4);
    fp4: |level| check_4bit(level, &FP4);
    int8: |level| check_int8(level);
    rows_of_bytes: |level| check_rows8(level);
    small_floats_of_bf16: |level| check_e4m3_of_bf16(level);
    groups_of_bytes: |level| check_groups8(level);
    groups_that_share_bytes: |level| check_quanto_groups(level);
    groups_between_any_two_numbers: |level| check_bf16_ranges(level);
    rows_that_share_bytes: |level| check_int4_rows(level);
    squares_that_share_a_scale: |level| check_squares(level);
    floats_of_4_bits: |level| check_e2m1(level);
    blocks_of_small_floats: |level| check_fp4_blocks(level);
    q4_0: |level| check_blocks::<ggml_basic::Q4_0>(level);
    q4_1: |level| check_blocks::<ggml_basic::Q4_1>(level);
    q5_0: |level| check_blocks::<ggml_basic::Q5_0>(level);
    q5_1: |level| check_blocks::<ggml_basic::Q5_1>(level);
    q8_0: |level| check_blocks::<ggml_basic::Q8_0>(level);
    iq4_nl: |level| check_blocks::<ggml_iq::Iq4Nl>(level);
    iq4_nl_weighted: |level| check_weighted::<ggml_iq::Iq4Nl>(level);
    iq4_xs: |level| check_blocks::<ggml_iq::Iq4Xs>(level);
    iq1_s_weighted: |level| check_weighted::<ggml_iq::Iq1S>(level);
    iq1_m_weighted: |level| check_weighted::<ggml_iq::Iq1M>(level);
    iq2_xxs_weighted: |level| check_weighted::<ggml_iq::Iq2Xxs>(level);
    iq2_xs_weighted: |level| check_weighted::<ggml_iq::Iq2Xs>(level);
    iq2_s_weighted: |level| check_weighted::<ggml_iq::Iq2S>(level);
    iq3_xxs_weighted: |level| check_weighted::<ggml_iq::Iq3Xxs>(level);
    iq3_s_weighted: |level| check_weighted::<ggml_iq::Iq3S>(level);
    iq4_xs_weighted: |level| check_weighted::<ggml_iq::Iq4Xs>(level);
    q4_0_weighted: |level| check_searched_blocks::<ggml_basic::Q4_0>(level);
    q4_1_weighted: |level| check_searched_blocks::<ggml_basic::Q4_1>(level);
    q5_0_weighted: |level| check_searched_blocks::<ggml_basic::Q5_0>(level);
    q5_1_weighted: |level| check_searched_blocks::<ggml_basic::Q5_1>(level);
    q2_k: |level| check_searched_blocks::<ggml_k::Q2K>(level);
    q3_k: |level| check_searched_blocks::<ggml_k::Q3K>(level);
    q4_k: |level| check_searched_blocks::<ggml_k::Q4K>(level);
    q5_k: |level| check_searched_blocks::<ggml_k::Q5K>(level);
    q6_k: |level| check_searched_blocks::<ggml_k::Q6K>(level);
    iq2_xxs: |level| check_blocks::<ggml_iq::Iq2Xxs>(level);
    iq2_xs: |level| check_blocks::<ggml_iq::Iq2Xs>(level);
    iq2_s: |level| check_blocks::<ggml_iq::Iq2S>(level);
    iq3_xxs: |level| check_blocks::<ggml_iq::Iq3Xxs>(level);
    iq3_s: |level| check_blocks::<ggml_iq::Iq3S>(level);
    iq1_s: |level| check_blocks::<ggml_iq::Iq1S>(level);
    iq1_m: |level| check_blocks::<ggml_iq::Iq1M>(level);
    mxfp4: |level| check_blocks::<mx::MxFp4>(level);
    nvfp4: |level| check_blocks::<mx::NvFp4>(level);
    tq1_0: |level| check_blocks::<ggml_ternary::Tq1_0>(level);
    tq2_0: |level| check_blocks::<ggml_ternary::Tq2_0>(level);
    q1_0: |level| check_blocks::<ggml_ternary::Q1_0>(level);
    q2_0: |level| check_blocks::<ggml_ternary::Q2_0>(level);
    q8_1: |level| check_blocks::<ggml_activation::Q8_1>(level);
    q8_k: |level| check_blocks::<ggml_activation::Q8K>(level);
}

#[test]
fn a_build_with_the_feature_scalar_has_no_other_level() {
    if cfg!(feature = "scalar") {
        assert_eq!(Level::available(), [Level::SCALAR]);
    }
    assert_eq!(Some(&super::level()), Level::available().last());
}
