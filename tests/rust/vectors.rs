//! Golden vectors of the formats (`tests/vectors/formats`), written by `tests/vectors/make.py` from
//! the peer libraries.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;

use serde_json::Value;
use weightpack::dtype::Dtype;
use weightpack::engine::array::{decode_array, encode_array, Options};
use weightpack::formats::{self, Encodes, Importance, Layout, Params};

struct Case {
    name: String,
    layout: Layout,
    format: &'static dyn formats::Format,
    dtype: Dtype,
    /// `None`: bytes that are decoded only.
    source: Option<Vec<u8>>,
    /// Name, type, shape and bytes.
    components: Vec<(String, String, Vec<u64>, Vec<u8>)>,
    decoded: Vec<u8>,
}

fn bytes(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

fn shape(list: &Value) -> Vec<u64> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|dim| dim.as_u64().unwrap())
        .collect()
}

fn cases(path: &Path) -> Vec<Case> {
    let peer = path.file_stem().unwrap().display();
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let case = |case: &Value| {
        let format = formats::find(case["format"].as_str().unwrap()).unwrap();
        let dtype = Dtype::from_name(case["dtype"].as_str().unwrap()).unwrap();
        let params = Params {
            block_size: case["params"]["block_size"].as_u64(),
            double_quant: case["params"]["double_quant"].as_bool().unwrap_or(false),
            dtype,
            importance: case["importance"].is_string().then(|| {
                let bytes = bytes(&case["importance"]);
                let values = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
                Importance::new(values.collect()).unwrap()
            }),
            ..Params::default()
        };
        let components = case["components"].as_object().unwrap();
        Case {
            name: format!("{peer} {}: {}", case["format"], case["note"]),
            layout: format.layout(&shape(&case["shape"]), &params).unwrap(),
            format,
            dtype,
            source: case["source"].is_string().then(|| bytes(&case["source"])),
            components: components
                .iter()
                .map(|(name, part)| {
                    let dtype = part["dtype"].as_str().unwrap().to_owned();
                    (
                        name.clone(),
                        dtype,
                        shape(&part["shape"]),
                        bytes(&part["data"]),
                    )
                })
                .collect(),
            decoded: bytes(&case["decoded"]),
        }
    };
    file["cases"].as_array().unwrap().iter().map(case).collect()
}

fn all_cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors/formats");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().flat_map(|path| cases(path)).collect()
}

#[test]
fn encoding_gives_the_bytes_of_the_peer() {
    for mut case in all_cases() {
        let Some(source) = &case.source else {
            continue;
        };
        let mut parts: Vec<Vec<u8>> = (0..case.layout.components.len())
            .map(|index| vec![0xaa; case.layout.component_bytes(index).unwrap() as usize])
            .collect();
        let mut out: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
        let lengths = encode_array(
            case.format,
            &mut case.layout,
            case.dtype,
            source,
            &mut out,
            Options::default(),
        )
        .unwrap();
        assert_eq!(parts.len(), case.components.len(), "{}", case.name);
        for (name, dtype, shape, expected) in &case.components {
            let index = case
                .layout
                .components
                .iter()
                .position(|part| part.suffix == *name);
            let index = index.unwrap_or_else(|| panic!("{}: no component {name}", case.name));
            let component = &case.layout.components[index];
            if !component.dtype.is_block() {
                assert_eq!(component.dtype.name(), *dtype, "{} {name}", case.name);
                if lengths[index] == parts[index].len() as u64 {
                    assert_eq!(component.shape, *shape, "{} {name}", case.name);
                }
            }
            let got = &parts[index][..lengths[index] as usize];
            assert_eq!(got, expected, "{} {name}", case.name);
        }
    }
}

#[test]
fn decoding_gives_the_weights_of_the_peer() {
    for mut case in all_cases() {
        let part = |suffix: &str| {
            let part = case.components.iter().find(|(name, ..)| name == suffix);
            part.map(|(.., bytes)| bytes.as_slice()).unwrap()
        };
        let state = case
            .layout
            .components
            .iter()
            .find(|part| part.suffix.starts_with("quant_state"));
        if let Some(state) = state {
            let state = formats::read_quant_state(part(&state.suffix)).unwrap();
            assert_eq!(state.format, case.format.info().name);
            assert_eq!(state.shape, case.layout.shape, "{}", case.name);
            case.layout.params.nested_offset = state.params.nested_offset;
            assert_eq!(state.params, case.layout.params, "{}", case.name);
        }
        let parts: Vec<&[u8]> = case
            .layout
            .components
            .iter()
            .map(|c| part(&c.suffix))
            .collect();
        let mut decoded = vec![0xaa; case.decoded.len()];
        decode_array(
            case.format,
            &case.layout,
            &parts,
            Dtype::F32,
            &mut decoded,
            Options::default(),
        )
        .unwrap();
        assert_eq!(decoded, case.decoded, "{}", case.name);
    }
}

#[test]
fn every_format_has_a_vector() {
    let cases = all_cases();
    for format in formats::FORMATS {
        let name = format.info().name;
        // Only a checkpoint says how the arrays of some are to be read.
        let Ok(layout) = format.layout(&[32, 256], &formats::Params::default()) else {
            continue;
        };
        if (0..4).any(|component| format.transposed_element(&layout, component).is_some()) {
            continue;
        }
        let mut own = cases
            .iter()
            .filter(|case| case.format.info().name == name)
            .peekable();
        assert!(own.peek().is_some(), "{name}");
        if format.info().encodes != Encodes::Never {
            assert!(own.any(|case| case.source.is_some()), "{name}");
        }
    }
}
