//! Tensors that are made of rows of stored ones, put into another shape or shifted, against the same
//! thing done to whole arrays in memory.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{json, Value};
use weightpack::dtype::Dtype;
use weightpack::engine::array::{self, Options};
use weightpack::engine::{run, Checkpoint, Plan, Progress, RunChoices};
use weightpack::formats::{self, Encodes, Importance, Params};
use weightpack::io::{Container, NewEntry, NewMetadata};
use weightpack::{Error, Result};

/// A stored array: name, type, shape, bytes.
type Array = (&'static str, Dtype, Vec<u64>, Vec<u8>);

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

fn bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn f32_array(name: &'static str, shape: &[u64], seed: u64) -> Array {
    let values = numbers(shape.iter().product(), seed);
    (name, Dtype::F32, shape.to_vec(), bytes(&values))
}

fn write(path: &Path, container: Container, arrays: &[Array]) -> PathBuf {
    let entry = |(name, dtype, shape, _): &Array| NewEntry {
        name: (*name).to_owned(),
        dtype: *dtype,
        shape: shape.clone(),
        late: false,
    };
    let metadata = match container {
        Container::Safetensors => NewMetadata::Text(Default::default()),
        Container::Gguf => NewMetadata::Gguf(Vec::new()),
    };
    let layout = container
        .lay_out(arrays.iter().map(entry).collect(), metadata)
        .unwrap();
    let mut file = vec![0; layout.total_bytes as usize];
    let header = layout.header(&[]).unwrap();
    file[..header.len()].copy_from_slice(&header);
    for (offset, (.., content)) in layout.offsets.iter().zip(arrays) {
        file[*offset as usize..*offset as usize + content.len()].copy_from_slice(content);
    }
    std::fs::write(path, file).unwrap();
    path.to_owned()
}

fn try_plan(sources: &[&Path], destination: &Path, output: Value, options: Value) -> Result<Plan> {
    let mut output = output;
    output["container"] = json!("gguf");
    output["stem"] = json!("model");
    let request = json!({
        "destination": destination, "kind": "file", "outputs": [output], "options": options,
    });
    let checkpoints = sources
        .iter()
        .map(|path| Arc::new(Checkpoint::open(path).unwrap()))
        .collect();
    Plan::build(serde_json::from_value(request).unwrap(), checkpoints)
}

fn quiet(_: &Progress) -> Result<()> {
    Ok(())
}

/// Converts with small slabs, and gives shape and stored bytes of the one tensor that results.
fn convert(sources: &[&Path], assignment: Value) -> (Vec<u64>, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let mut found = Vec::new();
    for (name, options) in [
        ("small", json!({"threads": 3, "slab_bytes": 1})),
        ("large", json!({"threads": 1})),
    ] {
        let path = folder.path().join(name).with_extension("gguf");
        let output = json!({"tensors": [assignment], "max_dimensions": 5});
        let plan = try_plan(sources, &path, output, options).unwrap();
        run(&plan, RunChoices::default(), &mut quiet).unwrap();
        found.push(stored(&path, "t"));
    }
    assert_eq!(found[0], found[1]);
    found.remove(0)
}

fn stored(path: &Path, name: &str) -> (Vec<u64>, Vec<u8>) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let tensor = checkpoint.tensor(name).unwrap();
    let main = tensor.main().unwrap();
    let mut content = vec![0; main.entry.bytes as usize];
    checkpoint.read(main, 0, &mut content).unwrap();
    (tensor.shape.clone(), content)
}

fn encoded(format: &str, shape: &[u64], values: &[f32], importance: Option<Vec<f32>>) -> Vec<u8> {
    let format = formats::find(format).unwrap();
    let params = Params {
        importance: importance.map(|values| Importance::new(values).unwrap()),
        ..Params::default()
    };
    let mut layout = format.layout(shape, &params).unwrap();
    let mut out = vec![0; layout.component_bytes(0).unwrap() as usize];
    let options = Options::default();
    let data = bytes(values);
    array::encode_array(
        format,
        &mut layout,
        Dtype::F32,
        &data,
        &mut [&mut out],
        options,
    )
    .unwrap();
    out
}

fn rows(values: &[f32], columns: usize, order: impl IntoIterator<Item = usize>) -> Vec<f32> {
    order
        .into_iter()
        .flat_map(|row| values[row * columns..(row + 1) * columns].to_vec())
        .collect()
}

#[test]
fn rows_are_joined_swapped_and_interleaved_in_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[
            f32_array("q", &[48, 640], 1),
            f32_array("k", &[16, 640], 2),
            f32_array("bias", &[48], 3),
            f32_array("one", &[], 4),
        ],
    );
    let (q, k) = (numbers(48 * 640, 1), numbers(16 * 640, 2));
    for format in ["copy", "f32", "gguf:q8_0", "gguf:q4_0"] {
        let expect = |shape: &[u64], values: &[f32]| match format {
            "copy" => bytes(values),
            format => encoded(format, shape, values, None),
        };
        let task = |rows: Value| json!({"checkpoint": 0, "name": "q", "as": "t", "format": format, "rows": rows});
        let fused = convert(&[&source], task(json!([{"name": "q"}, {"name": "k"}])));
        let joined = [q.clone(), k.clone()].concat();
        assert_eq!(fused, (vec![64, 640], expect(&[64, 640], &joined)));

        let halves = json!([{"name": "q", "first": 24}, {"name": "q", "count": 24}]);
        let swapped = rows(&q, 640, (24..48).chain(0..24));
        let found = convert(&[&source], task(halves));
        assert_eq!(found, (vec![48, 640], expect(&[48, 640], &swapped)));

        let heads = json!([{"name": "q", "interleave": {"groups": 3, "parts": 2}}]);
        let order = (0..48).map(|row| row / 16 * 16 + (row % 2) * 8 + row % 16 / 2);
        let permuted = rows(&q, 640, order);
        let found = convert(&[&source], task(heads.clone()));
        assert_eq!(found, (vec![48, 640], expect(&[48, 640], &permuted)));

        let mut stacked = task(json!([{"name": "q", "count": 32}, {"name": "k"}]));
        stacked["shape"] = json!([3, 16, 640]);
        let values = [q[..32 * 640].to_vec(), k.clone()].concat();
        let found = convert(&[&source], stacked);
        assert_eq!(found, (vec![3, 16, 640], expect(&[3, 16, 640], &values)));
    }
    let bias = numbers(48, 3);
    let task = |rows: Value| json!({"checkpoint": 0, "name": "bias", "as": "t", "format": "f32", "rows": rows});
    let heads = json!([{"name": "bias", "interleave": {"groups": 3, "parts": 2}}, {"name": "bias", "count": 4}, {"name": "one"}]);
    let order = (0..48).map(|row| row / 16 * 16 + (row % 2) * 8 + row % 16 / 2);
    let mut expected = rows(&bias, 1, order.chain(0..4));
    expected.extend(numbers(1, 4));
    assert_eq!(
        convert(&[&source], task(heads)),
        (vec![53], bytes(&expected))
    );
}

#[test]
fn packed_rows_are_joined_without_being_decoded() {
    let folder = tempfile::tempdir().unwrap();
    let values = numbers(24 * 64, 9);
    let packed = encoded("gguf:q4_0", &[24, 64], &values, None);
    let source = write(
        &folder.path().join("model.gguf"),
        Container::Gguf,
        &[("w", Dtype::Q4_0, vec![24, 64], packed.clone())],
    );
    let row = 64 / 32 * 18;
    let swapped: Vec<u8> = [&packed[12 * row..], &packed[..12 * row]].concat();
    let halves = json!([{"name": "w", "first": 12}, {"name": "w", "count": 12}]);
    for format in ["copy", "gguf:q4_0"] {
        let task =
            json!({"checkpoint": 0, "name": "w", "as": "t", "format": format, "rows": halves});
        assert_eq!(convert(&[&source], task), (vec![24, 64], swapped.clone()));
        let shape = json!([4, 12, 32]);
        let task =
            json!({"checkpoint": 0, "name": "w", "as": "t", "format": format, "shape": shape});
        assert_eq!(convert(&[&source], task), (vec![4, 12, 32], packed.clone()));
    }
}

/// The stored arrays of `values` in `format`, and the weights that they decode to.
fn packed(format: &str, name: &str, shape: &[u64], values: &[f32]) -> (Vec<Array>, Vec<f32>) {
    let format = formats::find(format).unwrap();
    let mut layout = format.layout(shape, &Params::default()).unwrap();
    let mut buffers: Vec<Vec<u8>> = (0..layout.components.len())
        .map(|index| vec![0; layout.component_bytes(index).unwrap() as usize])
        .collect();
    let mut places: Vec<&mut [u8]> = buffers.iter_mut().map(|buffer| &mut buffer[..]).collect();
    let (data, options) = (bytes(values), Options::default());
    array::encode_array(format, &mut layout, Dtype::F32, &data, &mut places, options).unwrap();
    let mut weights = vec![0; data.len()];
    let parts: Vec<&[u8]> = buffers.iter().map(|buffer| &buffer[..]).collect();
    array::decode_array(format, &layout, &parts, Dtype::F32, &mut weights, options).unwrap();
    let arrays = layout
        .components
        .iter()
        .zip(&buffers)
        .map(|(array, bytes)| {
            let name: &'static str = String::leak(array.stored_name(name));
            (name, array.dtype, array.shape.clone(), bytes.clone())
        });
    let weights = weights
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
    (arrays.collect(), weights.collect())
}

#[test]
fn rows_of_several_arrays_and_of_several_types_are_decoded_and_joined() {
    let folder = tempfile::tempdir().unwrap();
    // Units of a row, of 128 rows, and of blocks that run over the end of a row.
    for format in ["quanto:int8", "fp8:block", "bitsandbytes:nf4"] {
        let (mut all, w) = packed(format, "a.weight", &[320, 144], &numbers(320 * 144, 1));
        let half: Vec<u8> = (0..6 * 144u16)
            .flat_map(|bits| (bits * 7).to_le_bytes())
            .collect();
        all.push(("half", Dtype::F16, vec![6, 144], half.clone()));
        let path = folder.path().join("model.safetensors");
        let source = write(&path, Container::Safetensors, &all);
        let task = |format: &str, rows: Value| json!({"checkpoint": 0, "name": "a.weight", "as": "t", "format": format, "rows": rows});
        for target in ["f32", "gguf:q8_0"] {
            let expect = |shape: &[u64], values: &[f32]| match target {
                "f32" => bytes(values),
                target => encoded(target, shape, values, None),
            };
            // Rows that begin and end inside of a unit, whole heads, and a far interleave.
            for (first, count, groups) in [(7, 250, 125), (0, 320, 10), (64, 256, 1), (317, 2, 1)] {
                let parts = if count > 2 { 2 } else { 1 };
                let size = count / groups;
                let order = (0..count).map(|row| {
                    let within = row % size;
                    first + row / size * size + within % parts * (size / parts) + within / parts
                });
                let expected = rows(&w, 144, order);
                let interleave = json!({"groups": groups, "parts": parts});
                let some = json!([{"name": "a.weight", "first": first, "count": count, "interleave": interleave}]);
                let shape = [count as u64, 144];
                let shape = if target == "f32" {
                    shape.to_vec()
                } else {
                    vec![count as u64 * 144 / 32, 32]
                };
                let mut task = task(target, some);
                task["shape"] = json!(shape);
                let found = convert(&[&source], task);
                assert_eq!(
                    found,
                    (shape.clone(), expect(&shape, &expected)),
                    "{format} {first}"
                );
            }
        }
        let both = json!([{"name": "half"}, {"name": "a.weight", "first": 1, "count": 2}]);
        let mut expected: Vec<f32> = (0..6 * 144u16)
            .map(|bits| half::f16::from_bits(bits * 7).to_f32())
            .collect();
        expected.extend(&w[144..3 * 144]);
        let found = convert(&[&source], task("f32", both.clone()));
        assert_eq!(found, (vec![8, 144], bytes(&expected)));
        let output = json!({"tensors": [task("copy", both)]});
        let refusal = try_plan(
            &[&source],
            &folder.path().join("out.gguf"),
            output,
            json!({}),
        );
        let text = refusal.err().unwrap().to_string();
        assert!(text.contains("not joined as they are stored"), "{text}");
    }
}

#[test]
fn shapes_change_and_numbers_are_added_before_the_encoding() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[
            f32_array("conv", &[8, 4, 1, 2, 8], 1),
            f32_array("norm", &[96], 2),
        ],
    );
    let conv = numbers(512, 1);
    let task = |name: &str, format: &str| json!({"checkpoint": 0, "name": name, "as": "t", "format": format});
    let found = convert(&[&source], task("conv", "copy"));
    assert_eq!(found, (vec![8, 4, 1, 2, 8], bytes(&conv)));
    let mut flat = task("conv", "gguf:q8_0");
    flat["shape"] = json!([8, 64]);
    let expected = encoded("gguf:q8_0", &[8, 64], &conv, None);
    assert_eq!(convert(&[&source], flat), (vec![8, 64], expected));
    // Trailing dimensions of 1 are kept.
    let mut trailing = task("norm", "f32");
    trailing["shape"] = json!([1, 96, 1]);
    let norm = numbers(96, 2);
    assert_eq!(
        convert(&[&source], trailing),
        (vec![1, 96, 1], bytes(&norm))
    );
    for format in ["f32", "gguf:q8_0"] {
        let mut shifted = task("norm", format);
        shifted["add"] = json!(1.0);
        let values: Vec<f32> = norm.iter().map(|value| value + 1.0).collect();
        let expected = encoded(format, &[96], &values, None);
        assert_eq!(convert(&[&source], shifted), (vec![96], expected));
    }
}

#[test]
fn importance_is_the_quotient_of_sums_and_counts() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[
            f32_array("w", &[3, 8, 256], 1),
            f32_array("v", &[8, 256], 5),
        ],
    );
    let sums: Vec<f32> = numbers(3 * 256, 7).iter().map(|x| x.abs() * 50.0).collect();
    let counts = [4.0, 0.0, 7.0];
    let imatrix = write(
        &folder.path().join("imatrix.gguf"),
        Container::Gguf,
        &[
            ("w.in_sum2", Dtype::F32, vec![3, 256], bytes(&sums)),
            ("w.counts", Dtype::F32, vec![3, 1], bytes(&counts)),
        ],
    );
    let importance: Vec<f32> = sums
        .iter()
        .zip(0..)
        .map(|(sum, index)| match counts[index / 256] {
            0.0 => 1.0,
            count => sum / count,
        })
        .collect();
    let values = numbers(3 * 8 * 256, 1);
    let mut weighed = 0;
    let writable = formats::FORMATS.iter().map(|format| format.info());
    for info in writable.filter(|info| info.container == "gguf" && info.encodes != Encodes::Never) {
        let task = |importance: Value| json!({"checkpoint": 0, "name": "w", "as": "t", "format": info.name, "importance": importance});
        let from = json!({"checkpoint": 1, "sums": "w.in_sum2", "counts": "w.counts"});
        let expected = encoded(info.name, &[3, 8, 256], &values, Some(importance.clone()));
        let found = convert(&[&source, &imatrix], task(from));
        assert!(found == (vec![3, 8, 256], expected), "{}", info.name);
        let expected = encoded(info.name, &[3, 8, 256], &values, Some(vec![1.0; 256]));
        let found = convert(&[&source], task(json!({"checkpoint": null})));
        assert!(found.1 == expected, "{}: ones", info.name);
        let plain = match info.encodes {
            Encodes::Always => encoded(info.name, &[3, 8, 256], &values, None),
            _ => Vec::new(),
        };
        weighed += usize::from(plain != expected);
    }
    assert!(weighed >= 10, "{weighed} formats look at importance");
}

#[test]
fn importance_that_does_not_fit_is_refused_with_both_names() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[f32_array("w", &[8, 256], 1)],
    );
    let vector = |name, shape: &[u64], value: f32| {
        let count: u64 = shape.iter().product();
        (
            name,
            Dtype::F32,
            shape.to_vec(),
            bytes(&vec![value; count as usize]),
        )
    };
    let imatrix = write(
        &folder.path().join("imatrix.gguf"),
        Container::Gguf,
        &[
            vector("narrow", &[1, 128], 1.0),
            vector("stack", &[2, 256], 1.0),
            vector("odd", &[3, 85], 1.0),
            vector("negative", &[1, 256], -1.0),
            vector("one", &[1], 1.0),
            vector("two", &[2], 1.0),
            ("half", Dtype::F16, vec![1, 256], vec![0; 512]),
        ],
    );
    for (sums, counts, text) in [
        (
            "narrow",
            "one",
            "importance of 1 x 128 columns does not go with tensor \"t\" of shape [8, 256]",
        ),
        ("stack", "two", "importance of 2 x 256 columns"),
        ("odd", "two", "255 sums, but 2 counts"),
        ("negative", "one", "importance 0 is -1"),
        ("half", "one", "stored as F16, expected F32"),
        ("none", "one", "no such tensor"),
    ] {
        let from = json!({"checkpoint": 1, "sums": sums, "counts": counts});
        let task = json!({"checkpoint": 0, "name": "w", "as": "t", "format": "gguf:q4_k", "importance": from});
        let output = json!({"tensors": [task]});
        let out = folder.path().join("o.gguf");
        let Err(error) = try_plan(&[&source, &imatrix], &out, output, json!({})) else {
            panic!("{sums} was planned");
        };
        let told = error.to_string();
        assert!(told.contains(text), "{told}");
        assert!(sums == "none" || told.contains("imatrix.gguf"), "{told}");
        assert!(
            text.len() < 60 || told.contains("model.safetensors"),
            "{told}"
        );
    }
}

/// The plan knows what an importance takes, and that types which look at whole rows with it have
/// tiles of rows.
#[test]
fn memory_is_planned_for_the_importance_and_for_whole_rows() {
    let folder = tempfile::tempdir().unwrap();
    let columns = 1 << 18;
    let source = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[f32_array("w", &[2, columns], 1)],
    );
    for name in ["gguf:q8_0", "gguf:q4_0", "gguf:q4_k"] {
        let plan = |importance: Value| {
            let task = json!({"checkpoint": 0, "name": "w", "as": "t", "format": name, "importance": importance});
            let options = json!({"threads": 1, "slab_bytes": 65536});
            let out = folder.path().join("o.gguf");
            try_plan(&[&source], &out, json!({"tensors": [task]}), options).unwrap()
        };
        let plain = plan(Value::Null).memory_bytes();
        let weighed = plan(json!({"checkpoint": null})).memory_bytes();
        let format = formats::find(name).unwrap();
        let params = Params {
            importance: Some(Importance::new(vec![1.0; columns as usize]).unwrap()),
            ..Params::default()
        };
        let unit = format.layout(&[2, columns], &params).unwrap().unit_weights;
        let row = 4 * columns;
        match (format.weighs(), unit == columns) {
            (false, _) => assert_eq!(weighed, plain, "{name}"),
            (true, false) => assert_eq!(weighed, plain + row, "{name}"),
            // The row itself and two tiles of it.
            (true, true) => assert!(weighed > plain + 3 * row, "{name}"),
        }
    }
}

#[test]
fn what_cannot_be_carried_out_is_refused_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let half = vec![0; 2 * 8 * 32];
    let packed = encoded("gguf:q8_0", &[64], &numbers(64, 1), None);
    let model = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[
            f32_array("a", &[8, 32], 1),
            f32_array("narrow", &[8, 16], 1),
            f32_array("conv", &[1, 1, 1, 1, 32], 1),
            ("half", Dtype::F16, vec![8, 32], half),
        ],
    );
    let vector = write(
        &folder.path().join("vector.gguf"),
        Container::Gguf,
        &[("v", Dtype::Q8_0, vec![64], packed)],
    );
    let out = folder.path().join("out.gguf");
    let cases = [
        (
            json!({"rows": [{"name": "a"}, {"name": "half"}]}),
            "rows of \"half\" are F16, those of \"a\" F32",
        ),
        (
            json!({"rows": [{"name": "a"}, {"name": "narrow"}]}),
            "rows of \"narrow\" have 16 weights, those of \"a\" 32",
        ),
        (
            json!({"rows": [{"name": "a", "first": 9}]}),
            "rows from 9 on, but the tensor has 8",
        ),
        (
            json!({"rows": [{"name": "a", "first": 4, "count": 5}]}),
            "rows 4..9, but the tensor has 8",
        ),
        (
            json!({"rows": [{"name": "a", "interleave": {"groups": 3, "parts": 2}}]}),
            "8 rows do not divide into 3 groups of 2 parts",
        ),
        (
            json!({"rows": [{"name": "a"}], "shape": [9, 32]}),
            "shape [9, 32] holds 288 weights, the rows 256",
        ),
        (json!({"rows": [{"name": "none"}]}), "no such tensor"),
        (
            json!({"shape": [7, 32]}),
            "shape [7, 32] holds 224 weights, the tensor 256",
        ),
        (
            json!({"shape": [16, 16], "format": "gguf:q8_0"}),
            "row of 16 weights is not a multiple of block_size 32",
        ),
        (
            json!({"add": 1.0}),
            "added to decoded weights, not to copied bytes",
        ),
        (json!({"name": "conv"}), "5 dimensions, but at most 4"),
        (
            json!({"checkpoint": 1, "name": "v", "rows": [{"name": "v"}]}),
            "packed together and cannot be taken apart",
        ),
    ];
    for (change, text) in cases {
        let mut task = json!({"checkpoint": 0, "name": "a", "as": "t", "format": "copy"});
        for (key, value) in change.as_object().unwrap() {
            task[key] = value.clone();
        }
        let output = json!({"tensors": [task]});
        let refusal = try_plan(&[&model, &vector], &out, output, json!({}));
        let Err(error) = refusal else {
            panic!("{change} was planned");
        };
        assert!(error.to_string().contains(text), "{change}: {error}");
        assert!(!matches!(error, Error::Internal(_)), "{error}");
    }
    assert!(!out.exists());
}

#[test]
fn a_plan_is_another_one_whenever_the_derivation_differs() {
    let folder = tempfile::tempdir().unwrap();
    let model = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[f32_array("a", &[8, 32], 1)],
    );
    let changes = [
        json!({}),
        json!({"rows": [{"name": "a"}]}),
        json!({"rows": [{"name": "a", "first": 0, "count": 4}, {"name": "a", "first": 4}]}),
        json!({"rows": [{"name": "a", "interleave": {"groups": 2, "parts": 2}}]}),
        json!({"rows": [{"name": "a", "interleave": {"groups": 1, "parts": 2}}]}),
        json!({"shape": [8, 32]}),
        json!({"shape": [16, 16]}),
        json!({"add": 1.0}),
        json!({"add": 0.0}),
        json!({"importance": {"checkpoint": null}}),
    ];
    let mut ids = Vec::new();
    for change in changes {
        let mut task = json!({"checkpoint": 0, "name": "a", "as": "t", "format": "f32"});
        for (key, value) in change.as_object().unwrap() {
            task[key] = value.clone();
        }
        let output = json!({"tensors": [task]});
        let plan = try_plan(&[&model], &folder.path().join("o.gguf"), output, json!({})).unwrap();
        assert!(!ids.contains(&plan.id), "{change}");
        ids.push(plan.id);
    }
}

#[test]
fn an_interrupted_join_is_resumed_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = write(
        &folder.path().join("model.safetensors"),
        Container::Safetensors,
        &[
            f32_array("a", &[512, 320], 1),
            f32_array("b", &[512, 320], 2),
        ],
    );
    let task = |target: &str| {
        let rows = json!([{"name": "b", "interleave": {"groups": 4, "parts": 2}}, {"name": "a"}]);
        json!({"checkpoint": 0, "name": "a", "as": target, "format": "gguf:q4_0", "rows": rows})
    };
    let plan = |name: &str| {
        let output = json!({"tensors": [task("one"), task("two"), task("t")]});
        let options = json!({"threads": 1, "slab_bytes": 1});
        try_plan(&[&model], &folder.path().join(name), output, options).unwrap()
    };
    run(&plan("whole.gguf"), RunChoices::default(), &mut quiet).unwrap();
    let mut left = 3;
    let stopped = run(&plan("again.gguf"), RunChoices::default(), &mut |_| {
        left -= 1;
        match left {
            0 => Err(Error::Interrupted),
            _ => Ok(()),
        }
    });
    // A short run may be over before the third look at signals.
    if stopped.is_err() {
        let choices = RunChoices {
            resume: true,
            ..RunChoices::default()
        };
        run(&plan("again.gguf"), choices, &mut quiet).unwrap();
    }
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert!(read("whole.gguf") == read("again.gguf"));
}
