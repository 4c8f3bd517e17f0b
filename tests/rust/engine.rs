//! The crate without Python: a conversion from Rust, interrupted, resumed, and read back.

#![allow(clippy::unwrap_used, clippy::panic)]
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use weightpack::dtype::Dtype;
use weightpack::engine::{read, run, Checkpoint, Plan, Progress, RunChoices};
use weightpack::io::{Container, NewEntry, NewMetadata};
use weightpack::{Error, Result};

fn weights(count: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn source(folder: &Path, names: &[&str], shape: [u64; 2]) -> PathBuf {
    let entry = |name: &&str| NewEntry {
        name: (*name).to_owned(),
        dtype: Dtype::F32,
        shape: shape.to_vec(),
        late: false,
    };
    let entries: Vec<NewEntry> = names.iter().map(entry).collect();
    let layout = Container::Safetensors
        .lay_out(entries, NewMetadata::Text(Default::default()))
        .unwrap();
    let mut bytes = vec![0; layout.total_bytes as usize];
    let header = layout.header(&[]).unwrap();
    bytes[..header.len()].copy_from_slice(&header);
    for offset in &layout.offsets {
        let values = weights((shape[0] * shape[1]) as usize);
        for (place, value) in bytes[*offset as usize..].chunks_exact_mut(4).zip(values) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    }
    let path = folder.join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn plan(source: &Path, destination: &Path, format: &str, names: &[&str]) -> Plan {
    let checkpoint = Arc::new(Checkpoint::open(source).unwrap());
    let tensor = |name: &&str| json!({"checkpoint": 0, "name": name, "as": name, "format": format});
    let request = json!({
        "destination": destination, "kind": "folder",
        "outputs": [{
            "container": "safetensors", "stem": "model", "max_shard_bytes": 40_000,
            "tensors": names.iter().map(tensor).collect::<Vec<_>>(),
        }],
        "files": [{"path": "config.json", "text": "{}"}],
        "options": {"threads": 1, "slab_bytes": 1},
    });
    Plan::build(serde_json::from_value(request).unwrap(), vec![checkpoint]).unwrap()
}

fn quiet(_: &Progress) -> Result<()> {
    Ok(())
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(&path).unwrap(),
            )
        })
        .collect();
    files.sort();
    files
}

#[test]
fn an_interrupted_conversion_is_resumed_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a.weight", "b.weight", "c.weight", "d.weight"];
    let source = source(folder.path(), &names, [200, 320]);
    let whole = folder.path().join("whole");
    let report = run(
        &plan(&source, &whole, "bitsandbytes:nf4", &names),
        RunChoices::default(),
        &mut quiet,
    )
    .unwrap();
    assert_eq!((report.tensors.len(), report.files.len()), (4, 4));

    let again = folder.path().join("again");
    let plan = plan(&source, &again, "bitsandbytes:nf4", &names);
    let stopped = run(&plan, RunChoices::default(), &mut |_| {
        Err(Error::Interrupted)
    });
    // A short run may be over before the first look at signals.
    if stopped.is_err() {
        assert!(!again.exists());
        let choices = RunChoices {
            resume: true,
            ..RunChoices::default()
        };
        run(&plan, choices, &mut quiet).unwrap();
    }
    assert_eq!(files(&whole), files(&again));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}

#[test]
fn what_was_packed_decodes_to_about_the_source() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path(), &["a.weight"], [64, 320]);
    let expected = weights(64 * 320);
    for (format, most) in [
        ("bitsandbytes:nf4", 0.16),
        ("bitsandbytes:int8", 0.005),
        ("bf16", 0.004),
        ("f32", 0.0),
    ] {
        let destination = folder.path().join(format.replace(':', "-"));
        run(
            &plan(&source, &destination, format, &["a.weight"]),
            RunChoices::default(),
            &mut quiet,
        )
        .unwrap();
        let packed = Checkpoint::open(&destination.join("model.safetensors")).unwrap();
        let mut bytes = vec![0; expected.len() * 4];
        read::read(
            &packed,
            "a.weight",
            Dtype::F32,
            None,
            &mut bytes,
            2,
            &mut || Ok(()),
        )
        .unwrap();
        let decoded = bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let worst = decoded
            .zip(&expected)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst <= most, "{format}: {worst}");
    }
}

#[test]
fn an_existing_destination_is_only_replaced_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path(), &["a.weight"], [8, 64]);
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let plan = plan(&source, &out, "bitsandbytes:nf4", &["a.weight"]);
    assert!(matches!(
        run(&plan, RunChoices::default(), &mut quiet),
        Err(Error::Config(_))
    ));
    assert_eq!(files(&out).len(), 1);
    let choices = RunChoices {
        overwrite: true,
        ..RunChoices::default()
    };
    run(&plan, choices, &mut quiet).unwrap();
    let names: Vec<String> = files(&out).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["config.json", "model.safetensors"]);
}

/// A conversion to NVFP4 of `names`, of which those in `shared` get one scale.
fn shared_plan(source: &Path, destination: &Path, names: &[&str], shared: &[&str]) -> Result<Plan> {
    let checkpoint = Arc::new(Checkpoint::open(source)?);
    let tensor = |name: &&str| {
        let mut row =
            json!({"checkpoint": 0, "name": name, "as": name, "format": "modelopt:nvfp4"});
        if shared.contains(name) {
            row["shared_scale"] = json!("one");
        }
        row
    };
    let request = json!({
        "destination": destination, "kind": "folder",
        "outputs": [{
            "container": "safetensors", "stem": "model", "max_shard_bytes": 40_000,
            "tensors": names.iter().map(tensor).collect::<Vec<_>>(),
        }],
        "options": {"threads": 3, "slab_bytes": 1},
    });
    Plan::build(serde_json::from_value(request).unwrap(), vec![checkpoint])
}

/// The same numbers in each tensor, times a factor.
fn scaled_source(folder: &Path, names: &[&str], factors: &[f32]) -> PathBuf {
    let path = source(folder, names, [200, 320]);
    let mut bytes = std::fs::read(&path).unwrap();
    let start = bytes.len() - names.len() * 200 * 320 * 4;
    let data = &mut bytes[start..];
    for (tensor, factor) in data.chunks_exact_mut(200 * 320 * 4).zip(factors) {
        for place in tensor.chunks_exact_mut(4) {
            let weight = f32::from_le_bytes([place[0], place[1], place[2], place[3]]);
            place.copy_from_slice(&(weight * factor).to_le_bytes());
        }
    }
    std::fs::write(&path, bytes).unwrap();
    path
}

fn scales(folder: &Path, names: &[&str]) -> Vec<f32> {
    let index = folder.join("model.safetensors.index.json");
    let checkpoint = Checkpoint::open(&index).unwrap();
    let scale = |name: &&str| {
        let tensor = checkpoint.tensor(name).unwrap();
        tensor.as_packed().unwrap().layout.params.tensor_scale
    };
    names.iter().map(scale).collect()
}

#[test]
fn tensors_share_the_scale_of_the_largest_weight_of_all() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a.weight", "b.weight", "c.weight", "d.weight"];
    let shared = ["a.weight", "c.weight", "d.weight"];
    let path = scaled_source(folder.path(), &names, &[1.0, 8.0, 0.0, 4.0]);
    let whole = folder.path().join("whole");
    let make = |destination: &Path| shared_plan(&path, destination, &names, &shared).unwrap();
    run(&make(&whole), RunChoices::default(), &mut quiet).unwrap();
    let found = scales(&whole, &names);
    assert_eq!(found[0], found[3]);
    assert_eq!(found[2], found[3]);
    assert_eq!(found[1], 2.0 * found[3]);

    let alone = folder.path().join("alone");
    let plan = shared_plan(&path, &alone, &names, &[]).unwrap();
    assert_ne!(plan.id, make(&alone).id);
    run(&plan, RunChoices::default(), &mut quiet).unwrap();
    let own = scales(&alone, &names);
    assert_eq!((own[3], own[1], own[2]), (found[3], found[1], 1.0));
    assert_eq!(own[0] * 4.0, own[3]);
}

#[test]
fn a_scale_is_shared_by_one_format_that_has_one() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a.weight", "b.weight"];
    let path = source(folder.path(), &names, [200, 320]);
    let build = |formats: [&str; 2]| {
        let row = |(name, format): (&&str, &str)| json!({"checkpoint": 0, "name": name, "as": name, "format": format, "shared_scale": "one"});
        let rows: Vec<_> = names.iter().zip(formats).map(row).collect();
        let output = json!({"container": "safetensors", "stem": "model", "tensors": rows});
        let request = json!({
            "destination": folder.path().join("out"), "kind": "folder", "outputs": [output],
        });
        let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
        Plan::build(serde_json::from_value(request).unwrap(), vec![checkpoint])
    };
    assert_eq!(
        build(["modelopt:nvfp4"; 2]).unwrap().shared_scales,
        [[0, 1]]
    );
    for format in ["modelopt:int8", "modelopt:mxfp4", "bitsandbytes:nf4"] {
        let Err(error) = build([format; 2]) else {
            panic!("{format} has no scale that tensors share");
        };
        assert!(error.to_string().contains("no scale that tensors share"));
    }
    assert_eq!(
        build(["copy", "modelopt:nvfp4"]).unwrap().shared_scales,
        [[0usize; 0]; 0]
    );
}
