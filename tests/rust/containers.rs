//! The containers through the crate's public face: against golden files of the peer libraries
//! (`tests/vectors/containers`), and with made-up tensors.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use weightpack::dtype::Dtype;
use weightpack::io::file::{FileSink, FileSource};
use weightpack::io::gguf::{Array, Kind, Value};
use weightpack::io::index::resolve;
use weightpack::io::memory::MemorySource;
use weightpack::io::{
    Container, Entry, FileLayout, Header, Metadata, NewEntry, NewMetadata, Source,
};

fn vector(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/vectors/containers")
        .join(name)
}

fn as_new(entry: &Entry) -> NewEntry {
    NewEntry {
        name: entry.name.clone(),
        dtype: entry.dtype,
        shape: entry.shape.clone(),
        late: false,
    }
}

fn gguf_pairs(header: &Header) -> &weightpack::io::gguf::Metadata {
    match &header.metadata {
        Metadata::Gguf(pairs) => pairs,
        Metadata::Text(_) => panic!("no pairs"),
    }
}

/// Name, type and shape of each entry.
fn listed(header: &Header) -> Vec<(&str, Dtype, &[u64])> {
    fn row(entry: &Entry) -> (&str, Dtype, &[u64]) {
        (&entry.name, entry.dtype, &entry.shape)
    }
    header.entries.iter().map(row).collect()
}

fn data(bytes: &[u8], entry: &Entry) -> Vec<u8> {
    bytes[entry.offset as usize..(entry.offset + entry.bytes) as usize].to_vec()
}

#[test]
fn a_file_of_safetensors_is_read_and_written_byte_for_byte() {
    let bytes = fs::read(vector("types.safetensors")).unwrap();
    let source = MemorySource::new("types.safetensors", &bytes);
    let header = Container::Safetensors.read_header(&source).unwrap();
    assert_eq!(header.entries.len(), 20);
    assert!(header.warnings.is_empty());
    let by_name: BTreeMap<&str, &Entry> = header
        .entries
        .iter()
        .map(|e| (e.name.as_str(), e))
        .collect();
    let weight = by_name["a.weight"];
    assert_eq!(
        (weight.dtype, weight.shape.as_slice()),
        (Dtype::F32, [3, 2].as_slice())
    );
    let expected: Vec<u8> = (0..6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    assert_eq!(data(&bytes, weight), expected);
    let odd = by_name["b/é \"\\\n\x01\x7f\u{2028}\u{1f600}"];
    assert_eq!(
        (odd.dtype, odd.shape.as_slice()),
        (Dtype::BF16, [2, 3].as_slice())
    );
    assert_eq!((by_name["scalar"].bytes, by_name["empty"].bytes), (8, 0));
    let Metadata::Text(texts) = header.metadata else {
        panic!("no texts")
    };
    assert_eq!(texts, BTreeMap::from([("format".into(), "pt".into())]));

    // The writer finds the peer's order by itself.
    let mut entries: Vec<NewEntry> = header.entries.iter().map(as_new).collect();
    entries.sort_by(|a, b| a.name.len().cmp(&b.name.len()).then(b.name.cmp(&a.name)));
    let names: Vec<String> = entries.iter().map(|entry| entry.name.clone()).collect();
    let layout = Container::Safetensors
        .lay_out(entries, NewMetadata::Text(texts))
        .unwrap();
    let mut written = layout.header(&[]).unwrap();
    written.resize(layout.total_bytes as usize, 0xee);
    for (name, offset) in names.iter().zip(&layout.offsets) {
        let data = data(&bytes, by_name[name.as_str()]);
        written[*offset as usize..][..data.len()].copy_from_slice(&data);
    }
    assert!(written == bytes);
}

fn expected_pairs(alignment: Option<u32>) -> Vec<(&'static str, Value)> {
    let mut pairs = vec![("general.architecture", Value::Text("llama".into()))];
    pairs.extend(alignment.map(|alignment| ("general.alignment", Value::U32(alignment))));
    pairs.extend([
        ("t.u8", Value::U8(255)),
        ("t.i8", Value::I8(-128)),
        ("t.u16", Value::U16(65535)),
        ("t.i16", Value::I16(-32768)),
        ("t.u32", Value::U32(u32::MAX)),
        ("t.i32", Value::I32(i32::MIN)),
        ("t.f32", Value::F32(0.1)),
        ("t.u64", Value::U64(u64::MAX)),
        ("t.i64", Value::I64(i64::MIN)),
        ("t.f64", Value::F64(0.1)),
        ("t.bool", Value::Bool(true)),
        ("t.text", Value::Text("é\n".into())),
        (
            "t.texts",
            Value::Array(Array::Text(vec!["a".into(), "é".into(), String::new()])),
        ),
        ("t.numbers", Value::Array(Array::I32(vec![1, -2, 3]))),
        ("t.floats", Value::Array(Array::F32(vec![0.5, -0.25]))),
        ("t.truths", Value::Array(Array::Bool(vec![true, false]))),
    ]);
    pairs
}

#[test]
fn files_of_gguf_py_are_read_and_written_byte_for_byte() {
    for (name, alignment) in [("little.gguf", None), ("aligned.gguf", Some(128))] {
        let bytes = fs::read(vector(name)).unwrap();
        let source = MemorySource::new(name, &bytes);
        let header = Container::Gguf.read_header(&source).unwrap();
        let pairs = gguf_pairs(&header);
        assert_eq!(pairs.alignment(), u64::from(alignment.unwrap_or(32)));
        for (key, value) in expected_pairs(alignment) {
            assert_eq!(pairs.value(&source, key).unwrap(), value, "{key}");
        }
        let expected: [(&str, Dtype, &[u64]); 4] = [
            ("f32", Dtype::F32, &[1, 2, 3]),
            ("f16", Dtype::F16, &[5]),
            ("i8", Dtype::I8, &[7]),
            ("q8_0", Dtype::Q8_0, &[3, 32]),
        ];
        assert_eq!(listed(&header), expected);
        assert_eq!(header.entries[3].bytes, 3 * 34);

        let decoded = |key: &str| pairs.value(&source, key).unwrap();
        let carried = |key: &str| pairs.carry(&source, key).unwrap();
        for take in [&decoded as &dyn Fn(&str) -> Value, &carried] {
            let metadata = pairs
                .keys()
                .map(|key| (key.to_owned(), take(key)))
                .collect();
            let entries = header.entries.iter().map(as_new).collect();
            let layout = Container::Gguf
                .lay_out(entries, NewMetadata::Gguf(metadata))
                .unwrap();
            let mut written = layout.header(&[]).unwrap();
            assert_eq!(layout.total_bytes, bytes.len() as u64);
            written.resize(bytes.len(), 0);
            for (entry, offset) in header.entries.iter().zip(&layout.offsets) {
                let data = data(&bytes, entry);
                written[*offset as usize..][..data.len()].copy_from_slice(&data);
            }
            assert!(written == bytes, "{name}");
        }
    }
}

#[test]
fn a_big_endian_file_says_the_same() {
    let bytes = fs::read(vector("big.gguf")).unwrap();
    let source = MemorySource::new("big.gguf", &bytes);
    let header = Container::Gguf.read_header(&source).unwrap();
    assert!(header.big_endian);
    let pairs = gguf_pairs(&header);
    for (key, value) in expected_pairs(None) {
        assert_eq!(pairs.value(&source, key).unwrap(), value, "{key}");
        assert_eq!(
            pairs.carry(&source, key).unwrap(),
            value,
            "carried values change their order"
        );
    }
    let first = &header.entries[0];
    assert_eq!(
        (first.name.as_str(), first.shape.as_slice()),
        ("f32", [1, 2, 3].as_slice())
    );
    let expected: Vec<u8> = (0..6)
        .flat_map(|i| (i as f32 - 48.0).to_be_bytes())
        .collect();
    assert_eq!(data(&bytes, first), expected);
}

#[test]
fn a_split_model_of_gguf_py_opens_from_any_part() {
    for name in ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"] {
        let opened = resolve(&vector(name)).unwrap();
        assert_eq!(opened.files.len(), 2);
        let (source, first) = &opened.files[0];
        assert!(source.path().ends_with("m-00001-of-00002.gguf"));
        assert_eq!(gguf_pairs(first).get_str("t.text"), Some("é\n"));
        let names: Vec<&str> = opened
            .files
            .iter()
            .flat_map(|(_, header)| header.entries.iter().map(|entry| entry.name.as_str()))
            .collect();
        assert_eq!(names, ["f32", "f16", "i8", "q8_0"]);
    }
}

#[test]
fn a_long_vocabulary_is_decoded_only_when_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocabulary.gguf");
    let words: Vec<String> = (0..20_000).map(|i| format!("word{i}")).collect();
    let metadata = vec![(
        "tokens".to_owned(),
        Value::Array(Array::Text(words.clone())),
    )];
    let layout = Container::Gguf
        .lay_out(Vec::new(), NewMetadata::Gguf(metadata))
        .unwrap();
    let sink = FileSink::create(&path).unwrap();
    sink.reserve(layout.total_bytes).unwrap();
    sink.write_at(0, &layout.header(&[]).unwrap()).unwrap();
    let source = FileSource::open(&path).unwrap();
    let header = Container::Gguf.read_header(&source).unwrap();
    let pairs = gguf_pairs(&header);
    assert_eq!(pairs.get("tokens"), None);
    assert_eq!(pairs.array("tokens"), Some((Kind::Text, 20_000)));
    assert_eq!(
        pairs.value(&source, "tokens").unwrap(),
        Value::Array(Array::Text(words))
    );
}

#[test]
fn links_to_shards_are_followed_and_pipes_are_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = folder.path().join("blobs");
    let snapshot = folder.path().join("snapshot");
    fs::create_dir(&blobs).unwrap();
    fs::create_dir(&snapshot).unwrap();
    let entry = NewEntry {
        name: "w".into(),
        dtype: Dtype::U8,
        shape: vec![4],
        late: false,
    };
    let layout = Container::Safetensors
        .lay_out(vec![entry], NewMetadata::Text(BTreeMap::new()))
        .unwrap();
    let mut bytes = layout.header(&[]).unwrap();
    bytes.extend([1, 2, 3, 4]);
    fs::write(blobs.join("0123"), bytes).unwrap();
    let index = snapshot.join("model.safetensors.index.json");
    fs::write(
        blobs.join("4567"),
        r#"{"weight_map":{"w":"m.safetensors"}}"#,
    )
    .unwrap();
    std::os::unix::fs::symlink("../blobs/4567", &index).unwrap();
    let shard = snapshot.join("m.safetensors");
    std::os::unix::fs::symlink("../blobs/0123", &shard).unwrap();
    assert_eq!(resolve(&index).unwrap().files.len(), 1);

    let refused = |expected: &str| {
        let error = resolve(&index).unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains("m.safetensors"),
            "{error}"
        );
        fs::remove_file(&shard)
            .or_else(|_| fs::remove_dir(&shard))
            .unwrap();
    };
    fs::remove_file(&shard).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &shard, rustix::fs::Mode::RWXU).unwrap();
    refused("expected a regular file, got a pipe");
    std::os::unix::fs::symlink("/dev/zero", &shard).unwrap();
    refused("expected a regular file, got a device");
    fs::create_dir(&shard).unwrap();
    refused("expected a regular file, got a folder");
    std::os::unix::fs::symlink("nowhere", &shard).unwrap();
    refused("a shard that the index names is missing");
}

/// Bytes that differ from entry to entry and from place to place.
fn pattern(seed: usize, length: u64) -> Vec<u8> {
    (0..length)
        .map(|i| (i as usize * 31 + seed * 7 + 1) as u8)
        .collect()
}

/// The file of a layout, each entry filled with its own pattern.
fn filled(layout: &FileLayout) -> Vec<u8> {
    let mut bytes = layout.header(&[]).unwrap();
    assert_eq!(bytes.len() as u64, layout.header_bytes);
    bytes.resize(layout.total_bytes as usize, 0);
    for (seed, (entry, offset)) in layout.entries().iter().zip(&layout.offsets).enumerate() {
        let pattern = pattern(seed, entry.dtype.byte_len(&entry.shape).unwrap());
        bytes[*offset as usize..][..pattern.len()].copy_from_slice(&pattern);
    }
    bytes
}

fn entries(holds: fn(&Dtype) -> bool, dims: usize) -> impl Strategy<Value = Vec<NewEntry>> {
    let types: Vec<Dtype> = Dtype::all().filter(holds).collect();
    let shape = prop::collection::vec(0u64..5, 0..=dims);
    let entry =
        (".{1,20}", prop::sample::select(types), shape).prop_map(|(name, dtype, mut shape)| {
            // The last dimension is made to fill whole blocks and whole bytes.
            let (weights, _) = dtype.block().unwrap_or((8, 0));
            match shape.last_mut() {
                Some(last) => *last *= weights,
                None if weights > 1 => shape.push(weights),
                None => {}
            }
            NewEntry {
                name,
                dtype,
                shape,
                late: false,
            }
        });
    prop::collection::vec(entry, 0..12).prop_map(|mut entries| {
        let mut names = BTreeSet::new();
        entries.retain(|entry| names.insert(entry.name.clone()));
        entries
    })
}

fn check(container: Container, layout: &FileLayout, bytes: &[u8]) -> Header {
    let header = container
        .read_header(&MemorySource::new("made", bytes))
        .unwrap();
    let found: BTreeMap<&str, &Entry> = header
        .entries
        .iter()
        .map(|e| (e.name.as_str(), e))
        .collect();
    assert_eq!(found.len(), layout.entries().len());
    for (seed, entry) in layout.entries().iter().enumerate() {
        let stored = found[entry.name.as_str()];
        assert_eq!((stored.dtype, &stored.shape), (entry.dtype, &entry.shape));
        assert_eq!(data(bytes, stored), pattern(seed, stored.bytes));
    }
    assert!(header
        .entries
        .windows(2)
        .all(|pair| pair[0].offset <= pair[1].offset));
    header
}

fn values() -> impl Strategy<Value = Vec<(String, Value)>> {
    let value = prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i64>().prop_map(Value::I64),
        (-1e30f32..1e30).prop_map(Value::F32),
        any::<bool>().prop_map(Value::Bool),
        ".{0,40}".prop_map(Value::Text),
        prop::collection::vec(".{0,9}", 0..9).prop_map(|items| Value::Array(Array::Text(items))),
        prop::collection::vec(any::<u64>(), 0..9).prop_map(|items| Value::Array(Array::U64(items))),
        prop::collection::vec(any::<bool>(), 0..9)
            .prop_map(|items| Value::Array(Array::Bool(items))),
    ];
    prop::collection::btree_map("[a-z_.]{1,12}", value, 0..9)
        .prop_map(|pairs| pairs.into_iter().collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_tensors_go_through_safetensors(
        entries in entries(|dtype| dtype.in_safetensors(), 6),
        texts in prop::collection::btree_map(".{0,9}", ".{0,40}", 0..5),
    ) {
        let container = Container::Safetensors;
        let layout = container.lay_out(entries, NewMetadata::Text(texts.clone())).unwrap();
        let bytes = filled(&layout);
        let header = check(container, &layout, &bytes);
        prop_assert_eq!(layout.header_bytes % 8, 0);
        let Metadata::Text(found) = header.metadata else { panic!("no texts") };
        prop_assert_eq!(found, texts);
        // Judged by a plain JSON parser as well.
        let text = &bytes[8..layout.header_bytes as usize];
        let json: serde_json::Value = serde_json::from_slice(text).unwrap();
        for (entry, offset) in layout.entries().iter().zip(&layout.offsets) {
            let begin = offset - layout.header_bytes;
            let end = begin + entry.dtype.byte_len(&entry.shape).unwrap();
            prop_assert_eq!(&json[&entry.name]["data_offsets"], &serde_json::json!([begin, end]));
        }
    }

    #[test]
    fn late_entries_of_any_length_lie_behind_each_other(
        entries in entries(|dtype| dtype.in_safetensors(), 3),
        late in prop::collection::vec((0u64..2000, 0.0..=1.0f64), 1..6),
    ) {
        let mut all = entries.clone();
        for (number, (most, _)) in late.iter().enumerate() {
            let name = format!("late {number}");
            all.insert(all.len() / 2, NewEntry { name, dtype: Dtype::U8, shape: vec![*most], late: true });
        }
        let lengths: Vec<u64> = all
            .iter()
            .filter(|entry| entry.late)
            .map(|entry| (entry.shape[0] as f64 * late[0].1) as u64)
            .collect();
        let metadata = NewMetadata::Text(BTreeMap::new());
        let layout = Container::Safetensors.lay_out(all.clone(), metadata).unwrap();
        let mut bytes = layout.header(&lengths).unwrap();
        prop_assert_eq!(bytes.len() as u64, layout.header_bytes);
        let most: u64 = all.iter().filter(|entry| entry.late).map(|entry| entry.shape[0]).sum();
        bytes.resize((layout.total_bytes - most + lengths.iter().sum::<u64>()) as usize, 0);
        let header = Container::Safetensors.read_header(&MemorySource::new("late", &bytes)).unwrap();
        let found: BTreeMap<&str, &Entry> = header.entries.iter().map(|e| (e.name.as_str(), e)).collect();
        let mut next = layout.total_bytes - most;
        let mut lengths = lengths.into_iter();
        for (entry, offset) in all.iter().zip(&layout.offsets) {
            let stored = found[entry.name.as_str()];
            if entry.late {
                let length = lengths.next().unwrap();
                prop_assert_eq!((stored.offset, stored.bytes), (next, length));
                prop_assert_eq!(*offset, layout.total_bytes - most);
                next += length;
            } else {
                prop_assert_eq!(stored.offset, *offset);
            }
        }
    }

    #[test]
    fn any_tensors_go_through_gguf(
        entries in entries(|dtype| dtype.ggml_id().is_some(), 4),
        pairs in values(),
    ) {
        let container = Container::Gguf;
        let layout = container.lay_out(entries, NewMetadata::Gguf(pairs.clone())).unwrap();
        let bytes = filled(&layout);
        let header = check(container, &layout, &bytes);
        prop_assert_eq!(layout.total_bytes % 32, 0);
        let source = MemorySource::new("made", &bytes);
        let found = gguf_pairs(&header);
        for (key, value) in pairs {
            prop_assert_eq!(found.value(&source, &key).unwrap(), value);
        }
    }

    #[test]
    fn a_header_cut_anywhere_is_refused(
        entries in entries(|dtype| *dtype == Dtype::F32, 3),
        part in 0.0..1.0f64,
    ) {
        for (container, metadata) in [
            (Container::Safetensors, NewMetadata::Text(BTreeMap::new())),
            (Container::Gguf, NewMetadata::Gguf(vec![("a".into(), Value::U8(1))])),
        ] {
            let layout = container.lay_out(entries.clone(), metadata).unwrap();
            let bytes = filled(&layout);
            let data = layout.total_bytes - layout.header_bytes;
            let end = if data == 0 { layout.header_bytes - 32.min(layout.header_bytes) } else { layout.total_bytes - 32.min(data) };
            let length = (end as f64 * part) as usize;
            prop_assert!(container.read_header(&MemorySource::new("cut", &bytes[..length])).is_err());
        }
    }
}
