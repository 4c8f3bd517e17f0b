//! Shard indexes (`*.safetensors.index.json`), and from one path to all files of a checkpoint.
//!
//! An index is `{"metadata": {..}, "weight_map": {TENSOR: SHARD, ..}}`. Shards lie in the folder of
//! the index: a value that names anything but a plain `.safetensors` file there is refused, because
//! a converter publishes what it reads. A shard itself may be a link to a regular file elsewhere,
//! as in the hub's cache.
//!
//! transformers writes `model.safetensors.index.json`, with a variant `model.safetensors.index.
//! fp16.json`; diffusers writes `diffusion_pytorch_model.safetensors.index.fp16.json`. Sources:
//! transformers 5.23, diffusers 0.42.1, huggingface_hub 2.4.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::file::FileSource;
use super::gguf::split;
use super::json::{fault, Discarded};
use super::{Container, Header, Metadata, Source};
use crate::error::{Error, Result};
use crate::shape;

/// Largest index that is read: that of a million tensors.
pub const MOST_INDEX_BYTES: u64 = 100_000_000;

/// Key of shard metadata and index metadata that holds the id of the plan that wrote them.
pub const PLAN_KEY: &str = "weightpack.plan";
/// Metadata key of the shapes of packed weights, JSON by name, where those of the arrays do not tell.
pub const SHAPES_KEY: &str = "weightpack.shapes";

/// A checked index.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Index {
    /// What the index says about the model; empty when it says nothing.
    pub metadata: Map<String, Value>,
    /// Tensor name to the name of the file that holds it.
    pub weight_map: BTreeMap<String, String>,
}

/// All files of one checkpoint, open and checked.
#[derive(Debug)]
pub struct Resolved {
    /// Files in shard order.
    pub files: Vec<(Arc<FileSource>, Header)>,
    /// What the index says about the model; empty without an index.
    pub index_metadata: Map<String, Value>,
    /// Peculiarities of the files together; each header has its own.
    pub warnings: Vec<String>,
}

/// Whether a path names a shard index, with or without a variant.
pub fn is_index(path: &Path) -> bool {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("");
    name.ends_with(".json") && name.contains(".safetensors.index.")
}

/// As [`resolve_with`], nothing but the rules.
pub fn resolve(path: &Path) -> Result<Resolved> {
    resolve_with(path, false)
}

/// Opens all files of a checkpoint and checks every header. `path`: a `.safetensors`, an index
/// beside its shards, or a `.gguf` (any part of a split one). Reads no weights. With `lenient`,
/// what careless writers of GGUF files leave behind is a warning.
pub fn resolve_with(path: &Path, lenient: bool) -> Result<Resolved> {
    if is_index(path) {
        return resolve_index(path);
    }
    match Container::from_path(path)? {
        Container::Gguf => {
            let (files, warnings) = split::open_parts(path, lenient)?;
            Ok(Resolved {
                files,
                index_metadata: Map::new(),
                warnings,
            })
        }
        container @ Container::Safetensors => {
            let (source, header) = open_file(container, path, false)?;
            let mut warnings = Vec::new();
            if let Some((_, number, count)) = shard_number(path, ".safetensors") {
                warnings.push(format!(
                    "this file is shard {number} of {count}; the whole model opens through its index"
                ));
            }
            Ok(Resolved {
                files: vec![(source, header)],
                index_metadata: Map::new(),
                warnings,
            })
        }
    }
}

/// Opens one file and checks its header.
pub(super) fn open_file(
    container: Container,
    path: &Path,
    lenient: bool,
) -> Result<(Arc<FileSource>, Header)> {
    let source = FileSource::open(path)?;
    let header = match lenient {
        true => container.read_header_leniently(&source)?,
        false => container.read_header(&source)?,
    };
    Ok((Arc::new(source), header))
}

fn resolve_index(path: &Path) -> Result<Resolved> {
    let index = read(&FileSource::open(path)?)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let names = index.shards();
    let mut files = Vec::with_capacity(names.len());
    for name in &names {
        let shard = folder.join(name);
        let opened =
            open_file(Container::Safetensors, &shard, false).map_err(|error| match error {
                Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                    Error::checkpoint("a shard that the index names is missing").file(&shard)
                }
                other => other,
            })?;
        files.push(opened);
    }
    let headers: Vec<(&str, &Header)> = names
        .iter()
        .copied()
        .zip(files.iter().map(|(_, header)| header))
        .collect();
    index.check(&headers).map_err(|error| error.file(path))?;
    Ok(Resolved {
        warnings: index.mixture(&headers),
        files,
        index_metadata: index.metadata,
    })
}

impl Index {
    /// The shards, sorted by name.
    pub fn shards(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Whether the shards hold exactly the tensors that the index says, each in its own shard.
    pub fn check(&self, shards: &[(&str, &Header)]) -> Result<()> {
        let mut found: HashMap<&str, &str> = HashMap::new();
        for (shard, header) in shards {
            for entry in &header.entries {
                let fault = match (
                    self.weight_map.get(&entry.name),
                    found.get(entry.name.as_str()),
                ) {
                    (_, Some(other)) => {
                        format!("stored in two shards, \"{other}\" and \"{shard}\"")
                    }
                    (None, _) => format!("shard \"{shard}\" holds it, but the index does not"),
                    (Some(named), _) if named != shard => {
                        format!("shard \"{shard}\" holds it, but the index names \"{named}\"")
                    }
                    _ => {
                        found.insert(&entry.name, shard);
                        continue;
                    }
                };
                return Err(Error::checkpoint(fault).tensor(&entry.name));
            }
        }
        for (name, shard) in &self.weight_map {
            if !found.contains_key(name.as_str()) {
                return Err(Error::checkpoint(format!(
                    "the index names shard \"{shard}\", which does not hold it"
                ))
                .tensor(name));
            }
        }
        Ok(())
    }

    /// Warns of shards that were written by different runs.
    fn mixture(&self, shards: &[(&str, &Header)]) -> Vec<String> {
        let expected = self.metadata.get(PLAN_KEY).and_then(Value::as_str);
        let mut warnings = Vec::new();
        for (shard, header) in shards {
            let written = match &header.metadata {
                Metadata::Text(texts) => texts.get(PLAN_KEY).map(String::as_str),
                Metadata::Gguf(_) => None,
            };
            if written != expected {
                warnings.push(format!(
                    "shard \"{shard}\" and the index were written by different conversions ({} and \
                     {}): the model may be a mixture",
                    written.unwrap_or("none"),
                    expected.unwrap_or("none"),
                ));
            }
        }
        warnings
    }
}

/// Reads and checks an index. Opens no shard.
pub fn read(source: &dyn Source) -> Result<Index> {
    parse_source(source).map_err(|error| error.file(source.path()))
}

fn parse_source(source: &dyn Source) -> Result<Index> {
    if source.len() > MOST_INDEX_BYTES {
        return Err(Error::checkpoint(format!(
            "index of {} bytes is above the limit of {MOST_INDEX_BYTES}",
            source.len()
        )));
    }
    let count = shape::to_usize(source.len())?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(count)
        .map_err(|_| Error::checkpoint(format!("index of {count} bytes does not fit in memory")))?;
    bytes.resize(count, 0);
    source.read_at(0, &mut bytes)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        Error::checkpoint("index is not valid UTF-8").at(error.utf8_error().valid_up_to() as u64)
    })?;
    if text.starts_with("version https://git-lfs") {
        return Err(Error::checkpoint("index is not JSON")
            .hint("this is a git-lfs pointer: fetch the file with git lfs pull"));
    }
    let index = parse(&text)?;
    for (tensor, shard) in &index.weight_map {
        check_name(shard).map_err(|error| error.tensor(tensor))?;
    }
    Ok(index)
}

fn parse(text: &str) -> Result<Index> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let parsed = Top
        .deserialize(&mut deserializer)
        .and_then(|index| deserializer.end().map(|()| index));
    parsed.map_err(|error| fault("index", &error, text, 0))
}

/// A shard's name must be a plain file name of a safetensors file.
fn check_name(name: &str) -> Result<()> {
    // A colon could be a Windows drive or stream. Two dots are only dangerous as a whole name, but
    // with the extension required below, that cannot occur.
    let plain = !name.starts_with('.')
        && !name
            .chars()
            .any(|c| matches!(c, '/' | '\\' | ':') || c.is_control());
    if !plain {
        return Err(Error::checkpoint(format!(
            "shard \"{name}\" is not a plain file name in the folder of the index"
        )));
    }
    if !name.ends_with(".safetensors") {
        return Err(
            Error::unsupported(format!("shard \"{name}\" is not a .safetensors file"))
                .hint("pickle files (.bin, .pt) are not read: save them as safetensors first"),
        );
    }
    Ok(())
}

/// The index's text as transformers and huggingface_hub write it: keys sorted, two spaces of
/// indent, a newline at the end.
pub fn to_json(
    metadata: &Map<String, Value>,
    weight_map: &BTreeMap<String, String>,
) -> Result<String> {
    #[derive(serde::Serialize)]
    struct File<'a> {
        metadata: BTreeMap<&'a String, &'a Value>,
        weight_map: &'a BTreeMap<String, String>,
    }
    let file = File {
        metadata: metadata.iter().collect(),
        weight_map,
    };
    let mut text =
        serde_json::to_string_pretty(&file).map_err(|error| Error::Internal(error.to_string()))?;
    text.push('\n');
    Ok(text)
}

/// File name of shard `position` (from 0) of `count`: `model-00001-of-00003.safetensors`; a single
/// file has no number.
pub fn shard_name(stem: &str, container: Container, position: usize, count: usize) -> String {
    let extension = container.name();
    match count {
        0 | 1 => format!("{stem}.{extension}"),
        _ => format!("{stem}-{:05}-of-{count:05}.{extension}", position + 1),
    }
}

/// Stem, number (from 1) and count in a file name such as `model-00001-of-00003.safetensors`.
pub(super) fn shard_number<'p>(path: &'p Path, extension: &str) -> Option<(&'p str, u64, u64)> {
    let name = path.file_name()?.to_str()?.strip_suffix(extension)?;
    let (rest, count) = name.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(number) || !digits(count) {
        return None;
    }
    Some((stem, number.parse().ok()?, count.parse().ok()?))
}

struct Top;

impl<'de> DeserializeSeed<'de> for Top {
    type Value = Index;

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<Index, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Top {
    type Value = Index;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
        let (mut metadata, mut weight_map) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "metadata" => metadata
                    .replace(map.next_value::<Option<Once<Value>>>()?)
                    .is_some(),
                "weight_map" => weight_map
                    .replace(map.next_value::<Once<String>>()?)
                    .is_some(),
                _ => {
                    map.next_value::<Discarded>()?;
                    false
                }
            };
            if twice {
                return Err(A::Error::custom(format!("\"{key}\" appears twice")));
            }
        }
        let weight_map: Once<String> =
            weight_map.ok_or_else(|| A::Error::custom("\"weight_map\" is missing"))?;
        if weight_map.0.is_empty() {
            return Err(A::Error::custom("\"weight_map\" names no tensor"));
        }
        Ok(Index {
            metadata: metadata
                .flatten()
                .map(|entries: Once<Value>| entries.0.into_iter().collect())
                .unwrap_or_default(),
            weight_map: weight_map.0,
        })
    }
}

/// A JSON object whose keys appear once each.
struct Once<T>(BTreeMap<String, T>);

impl<'de, T: serde::Deserialize<'de>> serde::Deserialize<'de> for Once<T> {
    fn deserialize<D: serde::Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: serde::Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Once<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once<T>, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    if entries.contains_key(&key) {
                        return Err(A::Error::custom(format!("\"{key}\" appears twice")));
                    }
                    entries.insert(key, value);
                }
                Ok(Once(entries))
            }
        }
        input.deserialize_map(Entries(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::memory::MemorySource;

    fn index(text: &str) -> Result<Index> {
        read(&MemorySource::new(
            "model.safetensors.index.json",
            text.as_bytes(),
        ))
    }

    #[test]
    fn reads_what_it_writes_in_the_form_of_the_peers() {
        let mut metadata = Map::new();
        metadata.insert("total_size".into(), 12.into());
        metadata.insert("a".into(), "é".into());
        let weight_map: BTreeMap<String, String> =
            [("z", "m-00002-of-00002"), ("a", "m-00001-of-00002")]
                .map(|(name, shard)| (name.into(), format!("{shard}.safetensors")))
                .into();
        let text = to_json(&metadata, &weight_map).unwrap();
        assert_eq!(
            text,
            "{\n  \"metadata\": {\n    \"a\": \"é\",\n    \"total_size\": 12\n  },\n  \"weight_map\": {\n    \
             \"a\": \"m-00001-of-00002.safetensors\",\n    \"z\": \"m-00002-of-00002.safetensors\"\n  }\n}\n"
        );
        let read = index(&text).unwrap();
        assert_eq!(read.weight_map, weight_map);
        assert_eq!(read.metadata.get("total_size"), Some(&12.into()));
        assert_eq!(
            read.shards(),
            [
                "m-00001-of-00002.safetensors",
                "m-00002-of-00002.safetensors"
            ]
        );
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        for name in [
            "../a.safetensors",
            "/a.safetensors",
            "sub/a.safetensors",
            "..\\\\a.safetensors",
            "C:a.safetensors",
            "..",
            ".",
            "",
            ".hidden.safetensors",
            "a\\u0000.safetensors",
            "a\\n.safetensors",
            "a.bin",
            "a.safetensors/",
        ] {
            let text = format!("{{\"weight_map\": {{\"w\": \"{name}\"}}}}");
            let error = index(&text).unwrap_err().to_string();
            assert!(
                error.contains("shard \"") && error.contains("tensor \"w\""),
                "{name}: {error}"
            );
        }
        let error = index("{\"weight_map\": {\"w\": \"a.bin\"}}").unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)));
        assert!(error.to_string().contains("hint: pickle files"));
    }

    #[test]
    fn doubles_are_refused_after_unescaping() {
        for text in [
            r#"{"weight_map": {"a": "m.safetensors", "\u0061": "m.safetensors"}}"#,
            r#"{"metadata": {"a": 1, "a": 2}, "weight_map": {"w": "m.safetensors"}}"#,
            r#"{"weight_map": {"w": "m.safetensors"}, "weight_map": {"w": "m.safetensors"}}"#,
            r#"{"metadata": null, "metadata": null, "weight_map": {"w": "m.safetensors"}}"#,
        ] {
            let error = index(text).unwrap_err().to_string();
            assert!(
                error.contains("appears twice") && error.contains("byte "),
                "{error}"
            );
        }
        assert!(index(r#"{"metadata": null, "weight_map": {"w": "m.safetensors"}}"#).is_ok());
    }

    #[test]
    fn shard_names_have_numbers_only_in_company() {
        assert_eq!(
            shard_name("model", Container::Safetensors, 0, 1),
            "model.safetensors"
        );
        assert_eq!(
            shard_name("model", Container::Safetensors, 2, 3),
            "model-00003-of-00003.safetensors"
        );
        let path = Path::new("a/model.fp16-00002-of-00010.safetensors");
        assert_eq!(
            shard_number(path, ".safetensors"),
            Some(("model.fp16", 2, 10))
        );
        assert_eq!(
            shard_number(Path::new("m-1-of-3.safetensors"), ".safetensors"),
            None
        );
        assert!(is_index(Path::new(
            "x/diffusion_pytorch_model.safetensors.index.fp16.json"
        )));
        assert!(is_index(Path::new("model.safetensors.index.json")));
        assert!(!is_index(Path::new("model.safetensors")) && !is_index(Path::new("index.json")));
    }
}
