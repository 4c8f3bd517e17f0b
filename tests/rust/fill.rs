//! Arrays filled from a checkpoint hold what encoding each tensor in memory gives.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::Arc;

use serde_json::{json, Value};
use weightpack::dtype::Dtype;
use weightpack::engine::array::{self, Options};
use weightpack::engine::fill::{fill, Job};
use weightpack::engine::Checkpoint;
use weightpack::float;
use weightpack::formats::{self, Encodes, Layout, Params};
use weightpack::{Error, Result};

fn numbers(count: u64, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Weights of type `dtype`, in memory order.
fn stored(dtype: Dtype, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; (dtype.alignment() * count) as usize];
    float::narrow(dtype, &numbers(count, 9), &mut bytes).unwrap();
    bytes
}

fn checkpoint(tensors: &[(String, Dtype, [u64; 2])]) -> Arc<Checkpoint> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape) in tensors {
        let start = data.len();
        data.extend(stored(*dtype, shape[0] * shape[1]));
        let row =
            json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), row);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(data);
    Arc::new(Checkpoint::from_bytes("model.safetensors", file).unwrap())
}

fn buffers(layout: &Layout) -> Vec<Vec<u8>> {
    (0..layout.components.len())
        .map(|index| vec![0xA5; layout.component_bytes(index).unwrap() as usize])
        .collect()
}

fn filled(
    checkpoint: &Arc<Checkpoint>,
    jobs: Value,
    layouts: &[Layout],
    threads: usize,
) -> Result<Vec<Vec<Vec<u8>>>> {
    let jobs: Vec<Job> = serde_json::from_value(jobs).unwrap();
    let mut made: Vec<Vec<Vec<u8>>> = layouts.iter().map(buffers).collect();
    let out = made.iter_mut().flatten().map(Vec::as_mut_slice).collect();
    let lengths = fill(checkpoint, &jobs, out, threads, &mut |_| Ok(()))?;
    assert_eq!(lengths.len(), made.len());
    for (arrays, lengths) in made.iter_mut().zip(lengths) {
        assert_eq!(arrays.len(), lengths.len());
        for (array, length) in arrays.iter_mut().zip(lengths) {
            array.truncate(length as usize);
        }
    }
    Ok(made)
}

#[test]
fn every_format_from_every_type_with_any_number_of_threads() {
    // Even numbers of rows: some formats put two into one.
    let shapes = [[2, 256], [0, 256], [302, 4096], [34, 512]];
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64] {
        let tensors: Vec<_> = shapes
            .iter()
            .enumerate()
            .map(|(index, shape)| (format!("layers.{index}.weight"), dtype, *shape))
            .collect();
        let checkpoint = checkpoint(&tensors);
        let twice = formats::FORMATS.iter().map(|format| (*format, false));
        let twice = twice.chain([(formats::find("nf4").unwrap(), true)]);
        for (format, double_quant) in twice {
            let name = format.info().name;
            // The searching ones take minutes, and are cut like the others of their kind.
            if format.info().encodes != Encodes::Always || name.contains(":iq") {
                continue;
            }
            let params = Params {
                dtype,
                double_quant,
                ..Params::default()
            };
            let (mut layouts, mut expected) = (Vec::new(), Vec::new());
            for (_, _, shape) in &tensors {
                let mut layout = format.layout(shape, &params).unwrap();
                layouts.push(layout.clone());
                let mut made = buffers(&layout);
                let mut places: Vec<&mut [u8]> = made.iter_mut().map(Vec::as_mut_slice).collect();
                let data = stored(dtype, layout.weights);
                let options = Options::default();
                let lengths =
                    array::encode_array(format, &mut layout, dtype, &data, &mut places, options)
                        .unwrap();
                for (array, length) in made.iter_mut().zip(lengths) {
                    array.truncate(length as usize);
                }
                expected.push(made);
            }
            let job = |(tensor, ..): &(String, Dtype, [u64; 2])| json!({"name": tensor, "format": name, "params": {"double_quant": double_quant}});
            let jobs: Vec<Value> = tensors.iter().map(job).collect();
            for threads in [1, 3] {
                let made = filled(&checkpoint, json!(jobs), &layouts, threads).unwrap();
                assert!(made == expected, "{name} from {dtype}, {threads} threads");
            }
        }
    }
}

#[test]
fn nothing_is_begun_before_every_job_is_checked() {
    let tensors = [
        (String::from("a"), Dtype::F32, [3, 100]),
        (String::from("b"), Dtype::F32, [3, 100]),
    ];
    let checkpoint = checkpoint(&tensors);
    let jobs = |format: &str, name: &str| -> Vec<Job> {
        serde_json::from_value(
            json!([{"name": "a", "format": "copy"}, {"name": name, "format": format}]),
        )
        .unwrap()
    };
    for (format, name, bytes) in [
        ("copy", "c", 1200),
        ("gguf:q8_0", "b", 1200),
        ("copy", "b", 1199),
        ("f16", "b", 1200),
    ] {
        let (mut first, mut second) = (vec![7; 1200], vec![7; bytes]);
        let out = vec![first.as_mut_slice(), second.as_mut_slice()];
        let error = fill(&checkpoint, &jobs(format, name), out, 2, &mut |_| Ok(())).unwrap_err();
        assert_eq!(error.fault().unwrap().tensor.as_deref(), Some(name));
        assert!(first.iter().chain(&second).all(|byte| *byte == 7));
    }
    let unknown = json!([{"name": "a", "format": "copy", "threads": 3}]);
    assert!(serde_json::from_value::<Vec<Job>>(unknown).is_err());
}

#[test]
fn an_interruption_stops_the_work() {
    let tensors = [(String::from("a"), Dtype::F32, [4096, 1024])];
    let checkpoint = checkpoint(&tensors);
    let layout = formats::find("gguf:q4_k").unwrap();
    let layout = layout.layout(&[4096, 1024], &Params::default()).unwrap();
    let jobs = vec![json!({"name": "a", "format": "gguf:q4_k"}); 16];
    let jobs: Vec<Job> = serde_json::from_value(json!(jobs)).unwrap();
    let mut out = vec![buffers(&layout); jobs.len()];
    let places = out.iter_mut().flatten().map(Vec::as_mut_slice).collect();
    let stopped = fill(&checkpoint, &jobs, places, 1, &mut |progress| {
        assert_eq!(progress.total_bytes, 16 * 4096 * 1024 * 4);
        Err(Error::Interrupted)
    });
    assert!(matches!(stopped, Err(Error::Interrupted)));
}
