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
