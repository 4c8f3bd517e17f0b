//! What holds for whole arrays in every format: threads change nothing, the first weight that is not
//! finite is named, and decoding comes back close to what was encoded.

#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use weightpack::dtype::Dtype;
use weightpack::engine::array::{decode_array, encode_array, Options};
use weightpack::formats::{self, Encodes, Format, Info, Params};

/// Weights that come back from a round trip, or the error.
fn round_trip(
    format: &dyn Format,
    shape: &[u64],
    params: &Params,
    weights: &[f32],
) -> weightpack::Result<Vec<f32>> {
    let mut layout = format.layout(shape, params)?;
    let source: Vec<u8> = weights.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut parts: Vec<Vec<u8>> = (0..layout.components.len())
        .map(|index| vec![0; layout.component_bytes(index).unwrap() as usize])
        .collect();
    let mut out: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
    let options = Options::default();
    let lengths = encode_array(format, &mut layout, Dtype::F32, &source, &mut out, options)?;
    let slices: Vec<&[u8]> = parts
        .iter()
        .zip(lengths)
        .map(|(part, n)| &part[..n as usize])
        .collect();
    let mut decoded = vec![0; source.len()];
    decode_array(format, &layout, &slices, Dtype::F32, &mut decoded, options)?;
    Ok(decoded
        .as_chunks()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect())
}

/// Whether runs of weights become points of a grid: near as a whole, and not in every weight.
fn is_on_grid(name: &str) -> bool {
    ["gguf:iq1", "gguf:iq2", "gguf:iq3"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Largest error that a format may make, as a part of the largest magnitude that shares a scale.
fn bound(info: &Info) -> f32 {
    match info.name {
        // Half of the widest gap between values, and of a 16-bit step of the scale.
        "bitsandbytes:nf4" => 0.152,
        "bitsandbytes:fp4" => 0.167,
        name if name.ends_with(":int8") => 0.5 / 127.0 + 0.001,
        // Half of the widest gap, 32 of 448, or of more than 256 where scales are powers of two.
        "torchao:mxfp8" => 0.063,
        name if name.contains("fp8") || name.contains(":float8") => 0.037,
        // Half a step, of which 2^bits - 1 are twice the largest magnitude at most.
        name if name.starts_with("torchao:int") || name.starts_with("quanto:int") => {
            let bits = name.trim_start_matches(|letter: char| !letter.is_ascii_digit());
            1.01 / (bits.parse::<f32>().unwrap_or(1.0).exp2() - 1.0) + 0.001
        }
        // Half a step of 7; half of the widest gap of E2M1, 2 of 6, below a rounded scale.
        "modelopt:int4" => 0.075,
        "modelopt:mxfp4" | "modelopt:nvfp4" | "torchao:mxfp4" | "torchao:nvfp4" => 0.26,
        // The extreme that has the other sign is cut to one step less.
        "gguf:q4_0" => 1.01 / 8.0,
        "gguf:q5_0" => 1.01 / 16.0,
        "gguf:q4_1" => 2.0 * 0.52 / 15.0,
        "gguf:q5_1" => 2.0 * 0.52 / 31.0 + 0.001,
        "gguf:q8_0" => 0.52 / 127.0 + 0.001,
        "bf16" => 1.0 / 256.0,
        "f16" => 1.0 / 2048.0,
        "f32" => 0.0,
        // The steps of its scale stop shrinking: small weights come back as zeros.
        "gguf:nvfp4" => 1.0,
        // Other GGUF types search; four steps of a range cut into 2^bits is far, and a wrong code
        // is farther.
        other if other.starts_with("gguf:") => 4.0 / info.bits_per_weight.floor().exp2() as f32,
        other => panic!("no bound for {other}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn decoding_comes_back_close(
        rows in 1u64..6,
        blocks in 1u64..5,
        scale in -3i32..3,
        weights in prop::collection::vec(-1.0f32..1.0, 6 * 5 * 256),
    ) {
        // Some formats put two rows into one.
        let rows = rows.next_multiple_of(2);
        let shape = [rows, 256 * blocks];
        let count = (rows * 256 * blocks) as usize;
        let weights: Vec<f32> = weights[..count].iter().map(|x| x * 10f32.powi(scale)).collect();
        for format in formats::FORMATS {
            let name = format.info().name;
            if format.info().encodes != Encodes::Always {
                continue;
            }
            // Groups of weights that share a scale.
            let (group, block_size) = match name {
                name if name.ends_with(":int8") => (256 * blocks as usize, None),
                _ if name.contains("fp8") || name.starts_with("quanto") => (count, None),
                _ if name.starts_with("modelopt") || name.starts_with("torchao") => (count, None),
                _ if name.starts_with("bitsandbytes") => (32, Some(32)),
                _ if name.starts_with("gguf") => {
                    let unit = format.layout(&[1, 256], &Params::default()).unwrap().unit_weights;
                    (unit as usize, None)
                }
                _ => (1, None),
            };
            let params = Params { block_size, ..Params::default() };
            let decoded = round_trip(*format, &shape, &params, &weights).unwrap();
            for (x, y) in weights.chunks(group).zip(decoded.chunks(group)) {
                if is_on_grid(name) {
                    let sum = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
                    let error = sum(&mut x.iter().zip(y).map(|(x, y)| x - y));
                    let whole = sum(&mut x.iter().copied());
                    prop_assert!(error <= 0.75 * whole, "{name}: an error of {error} in {whole}");
                    continue;
                }
                let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                for (x, y) in x.iter().zip(y) {
                    // The steps of a small f16 scale stop shrinking: 127 times half of 2^-24; another
                    // 32 times that where it is the scale of scales.
                    let least = if group == 256 { 1.3e-4 } else { 4e-6 };
                    prop_assert!((x - y).abs() <= bound(format.info()) * most + least, "{name}: {x} came back as {y}");
                }
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    let weights: Vec<u8> = (0..1_100_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e7 - 0.8)
        .flat_map(f32::to_le_bytes)
        .collect();
    for format in formats::FORMATS {
        for double_quant in [false, true] {
            let params = Params {
                double_quant,
                ..Params::default()
            };
            let Ok(layout) = format.layout(&[1074, 1024], &params) else {
                continue;
            };
            if format.check_encodes(&params).is_err() {
                continue;
            }
            let source = &weights[..4 * layout.weights as usize];
            let encode = |threads| {
                let mut layout = layout.clone();
                let mut parts: Vec<Vec<u8>> = (0..layout.components.len())
                    .map(|index| vec![0; layout.component_bytes(index).unwrap() as usize])
                    .collect();
                let mut out: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
                let options = Options {
                    threads: Some(threads),
                    ..Options::default()
                };
                let lengths =
                    encode_array(*format, &mut layout, Dtype::F32, source, &mut out, options)
                        .unwrap();
                let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
                let mut decoded = vec![0; 2 * layout.weights as usize];
                decode_array(
                    *format,
                    &layout,
                    &slices,
                    Dtype::BF16,
                    &mut decoded,
                    options,
                )
                .unwrap();
                (parts, lengths, decoded)
            };
            let one = encode(1);
            for threads in [2, 3, 8] {
                assert!(encode(threads) == one, "{} {threads}", format.info().name);
            }
        }
    }
}

#[test]
fn the_first_weight_that_is_not_finite_is_named_whatever_the_threads() {
    let mut weights = vec![0.5f32; 1 << 20];
    for at in [400_000, 700_000, 1_000_000] {
        weights[at] = f32::NAN;
    }
    let source: Vec<u8> = weights.into_iter().flat_map(f32::to_le_bytes).collect();
    let format = formats::find("q8_0").unwrap();
    for threads in [1, 4] {
        let mut layout = format.layout(&[1024, 1024], &Params::default()).unwrap();
        let mut blocks = vec![0; layout.component_bytes(0).unwrap() as usize];
        let options = Options {
            threads: Some(threads),
            ..Options::default()
        };
        let error = encode_array(
            format,
            &mut layout,
            Dtype::F32,
            &source,
            &mut [&mut blocks],
            options,
        );
        let text = error.unwrap_err().to_string();
        assert!(text.contains("400000"), "{text}");
    }
}
