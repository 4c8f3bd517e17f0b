//! Inner loops, one row per kernel and level, beside a copy of the same weights.
//!
//! Works on one tile of 4096 weights: 16 KiB of `f32`, of which the first-level cache holds two.
//! Figures are weights per second. Before a row is timed, its result is compared with
//! that of the scalar body, bit for bit.

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{criterion_group, criterion_main, BenchmarkGroup, Criterion, Throughput};
use weightpack::codebook::{Codebook, FP4, NF4};
use weightpack::dtype::Dtype;
use weightpack::float;
use weightpack::formats::quanto_groups::{self, Groups, Lanes, Sharing};
use weightpack::formats::{
    bnb4, bnb8, e2m1, fp4_blocks, ggml_basic, ggml_iq, ggml_k, rows8, torchao_int4, Block, Weights,
};
use weightpack::kernels::{self, Level};

const WEIGHTS: usize = 4096;
const ROW: usize = 2048;
const SIZE: usize = 64;

/// Weights with the spread of a trained layer (a sum of uniform numbers is close to normal).
fn weights() -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..WEIGHTS)
        .map(|_| (uniform() + uniform() + uniform() + uniform()) * 0.03)
        .collect()
}

/// Times `work` at every level, once its output at that level has been found equal.
fn rows<T: Clone + PartialEq + std::fmt::Debug>(
    criterion: &mut Criterion,
    name: &str,
    out: T,
    mut work: impl FnMut(Level, &mut T),
) {
    let mut group = group(criterion, name);
    let mut expected = out.clone();
    work(Level::SCALAR, &mut expected);
    for level in Level::available() {
        let mut out = out.clone();
        work(level, &mut out);
        assert_eq!(out, expected, "{name} at {}", level.name());
        group.bench_function(level.name(), |bencher| {
            bencher.iter(|| work(black_box(level), black_box(&mut out)));
        });
    }
    group.finish();
}

fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group
        .throughput(Throughput::Elements(WEIGHTS as u64))
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    group
}

fn casts(criterion: &mut Criterion) {
    let x = weights();
    let mut copy = group(criterion, "copy_f32");
    let mut to = x.clone();
    copy.bench_function("memcpy", |bencher| {
        bencher.iter(|| black_box(&mut to).copy_from_slice(black_box(&x)));
    });
    copy.finish();
    let bytes = vec![0u8; 2 * WEIGHTS];
    rows(criterion, "narrow_bf16", bytes.clone(), |level, out| {
        float::narrow_bf16(level, &x, out);
    });
    rows(criterion, "narrow_f16", bytes.clone(), |level, out| {
        float::narrow_f16(level, &x, out);
    });
    let (mut brains, mut halves) = (bytes.clone(), bytes);
    float::narrow_bf16(Level::SCALAR, &x, &mut brains);
    float::narrow_f16(Level::SCALAR, &x, &mut halves);
    rows(criterion, "widen_bf16", x.clone(), |level, out| {
        float::widen_bf16(level, &brains, out);
    });
    rows(criterion, "widen_f16", x.clone(), |level, out| {
        float::widen_f16(level, &halves, out);
    });
}

fn scans(criterion: &mut Criterion) {
    let x = weights();
    let y: Vec<f32> = x.iter().map(|x| x * 1.01).collect();
    rows(criterion, "first_nonfinite", None, |level, out| {
        *out = kernels::first_nonfinite(level, &x);
    });
    let sums = kernels::error_sums(Level::SCALAR, &x, &y);
    rows(criterion, "error_sums", sums, |level, out| {
        *out = kernels::error_sums(level, &x, &y);
    });
}

fn bnb_4bit(criterion: &mut Criterion) {
    let x = weights();
    let mut absmax = vec![[0u8; 4]; WEIGHTS / SIZE];
    rows(criterion, "measure_4bit", absmax.clone(), |level, out| {
        bnb4::measure(level, SIZE, &x, out);
    });
    bnb4::measure(Level::SCALAR, SIZE, &x, &mut absmax);
    let codebooks: [(&str, &Codebook); 2] = [("nf4", &NF4), ("fp4", &FP4)];
    for (name, codebook) in codebooks {
        let mut codes = vec![0u8; WEIGHTS / 2];
        rows(
            criterion,
            &format!("encode_{name}"),
            codes.clone(),
            |level, out| {
                bnb4::encode(level, codebook, SIZE, &x, &absmax, out);
            },
        );
        bnb4::encode(Level::SCALAR, codebook, SIZE, &x, &absmax, &mut codes);
        rows(
            criterion,
            &format!("decode_{name}"),
            x.clone(),
            |level, out| {
                bnb4::decode(level, codebook, SIZE, &codes, &absmax, out);
            },
        );
    }
}

fn bnb_int8(criterion: &mut Criterion) {
    let x = weights();
    let encode = |level, out: &mut (Vec<u8>, [f32; WEIGHTS / ROW])| {
        let rows = x.chunks_exact(ROW).zip(out.0.chunks_exact_mut(ROW));
        for ((weights, codes), scale) in rows.zip(&mut out.1) {
            *scale = bnb8::encode_row(level, Weights::F32(weights), codes);
        }
    };
    let mut encoded = (vec![0u8; WEIGHTS], [0.0; WEIGHTS / ROW]);
    rows(criterion, "encode_int8", encoded.clone(), encode);
    encode(Level::SCALAR, &mut encoded);
    rows(criterion, "decode_int8", x.clone(), |level, out| {
        let rows = encoded.0.chunks_exact(ROW).zip(out.chunks_exact_mut(ROW));
        for ((codes, weights), &scale) in rows.zip(&encoded.1) {
            bnb8::decode_row(level, codes, scale, weights);
        }
    });
}

/// Rows of one byte per weight (torchao, quanto, FP8), and 4-bit floats in blocks (NVFP4, MXFP4).
fn small_floats(criterion: &mut Criterion) {
    let x = weights();
    let given = Weights::F32(&x);
    rows(criterion, "largest", 0f32, |level, out| {
        *out = rows8::largest(level, given);
    });
    let quotient = rows8::Scaling::Quotient(Dtype::BF16);
    for (name, kind, scaling) in [
        ("int8_product", rows8::Codes::Int8, rows8::Scaling::Product),
        ("int8_quotient", rows8::Codes::Int8, quotient),
        ("e4m3_quotient", rows8::Codes::E4m3, quotient),
    ] {
        let mut codes = vec![0u8; WEIGHTS];
        let title = format!("{name}_encode");
        rows(criterion, &title, codes.clone(), |level, out| {
            rows8::encode(level, kind, scaling, 0.01, given, out);
        });
        rows8::encode(kernels::level(), kind, scaling, 0.01, given, &mut codes);
        let title = format!("{name}_decode");
        rows(criterion, &title, vec![0f32; WEIGHTS], |level, out| {
            rows8::decode(level, kind, 0, 0.01, &codes, out);
        });
    }
    let mut packed = vec![0u8; WEIGHTS / 2];
    for (name, block, rounding) in [
        ("nvfp4", 16, e2m1::Rounding::EvenUnsignedZero),
        ("mxfp4", 32, e2m1::Rounding::Down),
    ] {
        let title = format!("e2m1_{name}_encode");
        rows(criterion, &title, packed.clone(), |level, out| {
            for (x, out) in x.chunks_exact(block).zip(out.chunks_exact_mut(block / 2)) {
                let scaling = match block {
                    16 => e2m1::Scaling::Quotient(rows8::largest(level, Weights::F32(x)) / 6.0),
                    _ => e2m1::Scaling::Product(64.0),
                };
                e2m1::encode(level, rounding, scaling, x, out);
            }
        });
        let scaling = e2m1::Scaling::Product(64.0);
        e2m1::encode(kernels::level(), rounding, scaling, &x, &mut packed);
        let title = format!("e2m1_{name}_decode");
        rows(criterion, &title, vec![0f32; WEIGHTS], |level, out| {
            for (packed, out) in packed
                .chunks_exact(block / 2)
                .zip(out.chunks_exact_mut(block))
            {
                e2m1::decode(level, block == 32, 0.01, packed, out);
            }
        });
    }
}

/// Weights of BF16 as they are stored, in the formats that have a way of their own for them.
fn stored(criterion: &mut Criterion) {
    const GROUP: usize = 128;
    let mut bytes = vec![0; 2 * WEIGHTS];
    float::narrow_bf16(Level::SCALAR, &weights(), &mut bytes);
    let given = Weights::BF16(bytes.as_chunks().0);
    let codes = vec![0u8; WEIGHTS];
    rows(
        criterion,
        "bf16_e4m3_encode",
        codes.clone(),
        |level, out| {
            let scaling = rows8::Scaling::Quotient(Dtype::BF16);
            rows8::encode(level, rows8::Codes::E4m3, scaling, 0.0003, given, out);
        },
    );
    let blocks = (codes.clone(), vec![0u8; WEIGHTS / 32]);
    rows(criterion, "bf16_mxfp8_encode", blocks, |level, out| {
        let rule = fp4_blocks::Rule::TorchAoMxFp8;
        fp4_blocks::encode(level, rule, given, &mut out.0, &mut out.1);
    });
    for bits in [4, 2] {
        let groups = Groups {
            dtype: Dtype::BF16,
            bits,
            size: GROUP,
        };
        let lanes = Lanes::neighbours(groups, Sharing::Neighbours, given);
        let title = format!("bf16_quanto_int{bits}_encode");
        let out = (
            vec![0u8; WEIGHTS * bits as usize / 8],
            vec![0u8; WEIGHTS / GROUP * 4],
        );
        rows(criterion, &title, out, |level, (codes, pairs)| {
            let sharing = Sharing::Neighbours;
            let done = quanto_groups::encode(level, groups, sharing, &lanes, pairs, codes);
            assert_eq!(done, Ok(()));
        });
    }
    let out = (vec![0u8; WEIGHTS / 2], vec![0u8; WEIGHTS / GROUP * 4]);
    rows(criterion, "bf16_torchao_int4_encode", out, |level, out| {
        let (codes, pairs) = out;
        torchao_int4::encode(level, GROUP, Dtype::BF16, given, pairs, codes);
    });
}

fn ggml_block<B: Block>(criterion: &mut Criterion) {
    let x = weights();
    let name = B::DTYPE.name().to_lowercase();
    let mut blocks = vec![0u8; WEIGHTS / B::WEIGHTS * B::BYTES];
    rows(
        criterion,
        &format!("encode_{name}"),
        blocks.clone(),
        |level, out| {
            B::encode(level, &x, out);
        },
    );
    B::encode(Level::SCALAR, &x, &mut blocks);
    rows(
        criterion,
        &format!("decode_{name}"),
        x.clone(),
        |level, out| {
            B::decode(level, &blocks, out);
        },
    );
}

/// The search with importance.
fn ggml_weighted<B: Block>(criterion: &mut Criterion) {
    let x = weights();
    let importance: Vec<f32> = x.iter().map(|x| 1.0 + (30.0 * x).abs()).collect();
    let name = format!("encode_weighted_{}", B::DTYPE.name().to_lowercase());
    let blocks = vec![0u8; WEIGHTS / B::WEIGHTS * B::BYTES];
    rows(criterion, &name, blocks, |level, out| {
        B::encode_weighted(level, &x, &importance, out);
    });
}

fn ggml(criterion: &mut Criterion) {
    ggml_block::<ggml_basic::Q4_0>(criterion);
    ggml_block::<ggml_basic::Q4_1>(criterion);
    ggml_block::<ggml_basic::Q5_0>(criterion);
    ggml_block::<ggml_basic::Q5_1>(criterion);
    ggml_block::<ggml_basic::Q8_0>(criterion);
    ggml_block::<ggml_k::Q2K>(criterion);
    ggml_block::<ggml_k::Q3K>(criterion);
    ggml_block::<ggml_k::Q4K>(criterion);
    ggml_block::<ggml_k::Q5K>(criterion);
    ggml_block::<ggml_k::Q6K>(criterion);
    ggml_weighted::<ggml_k::Q2K>(criterion);
    ggml_weighted::<ggml_k::Q3K>(criterion);
    ggml_weighted::<ggml_k::Q4K>(criterion);
    ggml_weighted::<ggml_k::Q5K>(criterion);
    ggml_weighted::<ggml_k::Q6K>(criterion);
    ggml_block::<ggml_iq::Iq4Nl>(criterion);
    ggml_block::<ggml_iq::Iq4Xs>(criterion);
    ggml_block::<ggml_iq::Iq3S>(criterion);
    ggml_block::<ggml_iq::Iq3Xxs>(criterion);
    ggml_block::<ggml_iq::Iq2S>(criterion);
    ggml_block::<ggml_iq::Iq1M>(criterion);
    ggml_weighted::<ggml_iq::Iq4Nl>(criterion);
    ggml_weighted::<ggml_iq::Iq4Xs>(criterion);
    ggml_weighted::<ggml_iq::Iq2Xs>(criterion);
    ggml_weighted::<ggml_iq::Iq2Xxs>(criterion);
    ggml_weighted::<ggml_iq::Iq1S>(criterion);
}

/// What a conversion does to a tile: widen, encode, decode, compare.
fn pipeline(criterion: &mut Criterion) {
    let x = weights();
    let mut brains = vec![0u8; 2 * WEIGHTS];
    float::narrow_bf16(Level::SCALAR, &x, &mut brains);
    let mut absmax = vec![[0u8; 4]; WEIGHTS / SIZE];
    let mut codes = vec![0u8; WEIGHTS / 2];
    let (mut wide, mut decoded) = (x.clone(), x.clone());
    let sums = kernels::error_sums(Level::SCALAR, &x, &x);
    rows(criterion, "pipeline_bf16_nf4", sums, |level, out| {
        float::widen_bf16(level, &brains, &mut wide);
        if kernels::first_nonfinite(level, &wide).is_none() {
            let runs = wide.chunks(4096).zip(codes.chunks_mut(2048));
            for ((wide, codes), absmax) in runs.zip(absmax.chunks_mut(4096 / SIZE)) {
                bnb4::measure(level, SIZE, wide, absmax);
                bnb4::encode(level, &NF4, SIZE, wide, absmax, codes);
            }
        }
        bnb4::decode(level, &NF4, SIZE, &codes, &absmax, &mut decoded);
        *out = kernels::error_sums(level, &wide, &decoded);
    });
    let mut blocks = vec![0u8; WEIGHTS / 32 * 34];
    rows(criterion, "pipeline_bf16_q8_0", sums, |level, out| {
        float::widen_bf16(level, &brains, &mut wide);
        if kernels::first_nonfinite(level, &wide).is_none() {
            ggml_basic::Q8_0::encode(level, &wide, &mut blocks);
        }
        ggml_basic::Q8_0::decode(level, &blocks, &mut decoded);
        *out = kernels::error_sums(level, &wide, &decoded);
    });
}

criterion_group!(
    benches,
    casts,
    scans,
    bnb_4bit,
    bnb_int8,
    small_floats,
    stored,
    ggml,
    pipeline
);
criterion_main!(benches);
