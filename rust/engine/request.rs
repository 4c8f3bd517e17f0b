//! What a conversion is asked to do: complete, explicit, without patterns. Rules that decide which
//! tensor gets which format live above this crate.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::Params;
use crate::io::gguf;

/// A whole conversion.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Folder or file to make.
    pub destination: PathBuf,
    /// Which of the two.
    pub kind: Kind,
    /// Groups of tensors, each its own model inside the destination.
    pub outputs: Vec<Output>,
    /// Other files of the destination.
    #[serde(default)]
    pub files: Vec<ExtraFile>,
    /// How to work.
    #[serde(default)]
    pub options: Options,
}

/// What the destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A folder with weights, indexes and other files.
    Folder,
    /// One weights file.
    File,
}

/// One group of tensors: a single file, or shards and their index.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// `safetensors` or `gguf`.
    pub container: String,
    /// Subfolder of the destination; empty for the top.
    #[serde(default)]
    pub folder: String,
    /// File name without extension.
    pub stem: String,
    /// Most data bytes of one shard; `None` for one file.
    #[serde(default)]
    pub max_shard_bytes: Option<u64>,
    /// File name of the index of several shards; `None` for the stem and `.safetensors.index.json`.
    #[serde(default)]
    pub index: Option<String>,
    /// What the index says about the model, besides its size.
    #[serde(default)]
    pub index_metadata: serde_json::Map<String, serde_json::Value>,
    /// GGUF: most dimensions of a tensor; those readers that are built on ggml take 4, others more.
    #[serde(default = "Output::default_max_dimensions")]
    pub max_dimensions: usize,
    /// safetensors: an object of strings. GGUF: a list of `[key, type, value]`.
    #[serde(default)]
    pub metadata: serde_json::Value,
    /// A GGUF checkpoint whose key-value pairs are carried over; those of `metadata` replace them.
    #[serde(default)]
    pub metadata_from: Option<usize>,
    /// The tensors, in the order they are to be stored.
    pub tensors: Vec<Assignment>,
}

impl Output {
    fn default_max_dimensions() -> usize {
        gguf::GGML_DIMENSIONS
    }
}

/// One tensor and what it becomes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    /// Which of the checkpoints it comes from.
    pub checkpoint: usize,
    /// Name there.
    pub name: String,
    /// Name in the output.
    #[serde(rename = "as")]
    pub target: String,
    /// Full format name, or `copy` for the stored bytes as they are.
    pub format: String,
    /// Choices the format leaves open.
    #[serde(default)]
    pub params: Choices,
    /// Reason, for people.
    #[serde(default)]
    pub why: String,
    /// Rows of tensors of the same checkpoint that, joined in this order, are the tensor; empty for
    /// the tensor called `name` as it is. A row is a run along the last dimension.
    #[serde(default)]
    pub rows: Vec<Rows>,
    /// Shape of the result where it is not that of the source: the same weights in the same order.
    #[serde(default)]
    pub shape: Option<Vec<u64>>,
    /// Added to every weight, in `f32`, before it is encoded.
    #[serde(default)]
    pub add: Option<f32>,
    /// Kept in one file with the tensor before it.
    #[serde(default)]
    pub with_previous: bool,
    /// Where the importance of the columns is stored.
    #[serde(default)]
    pub importance: Option<ImportanceSource>,
    /// Encoded tensors of one output that have the same word here get one scale of the whole tensor, as
    /// if they were one. Their format must have such a scale, and be the same.
    #[serde(default)]
    pub shared_scale: Option<String>,
}

/// Some rows of one tensor.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rows {
    /// Name of the tensor.
    pub name: String,
    /// First row.
    #[serde(default)]
    pub first: u64,
    /// Number of rows; `None` for all that follow.
    #[serde(default)]
    pub count: Option<u64>,
    /// Reorder the rows within each of this many equal groups (the heads of an attention): from
    /// [parts, half] to [half, parts], so that with two parts the rows of the halves alternate.
    #[serde(default)]
    pub interleave: Option<Interleave>,
}

/// A reordering of rows.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interleave {
    /// Groups, each by itself.
    pub groups: u64,
    /// Parts of a group that are interleaved: row `part·size + i` becomes row `i·parts + part`.
    pub parts: u64,
}

/// Where the importance of a tensor's columns is stored: sums of squared activations, and how many
/// activations they are the sums of (llama.cpp's imatrix GGUF).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportanceSource {
    /// Which of the checkpoints holds them; `None` for 1 everywhere.
    pub checkpoint: Option<usize>,
    /// Sums, one row per matrix.
    #[serde(default)]
    pub sums: String,
    /// Counts, one per matrix.
    #[serde(default)]
    pub counts: String,
}

/// The part of [`Params`] that a caller chooses.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choices {
    /// Weights sharing a scale.
    #[serde(default)]
    pub block_size: Option<u64>,
    /// Quantize the scales as well.
    #[serde(default)]
    pub double_quant: bool,
    /// Element type to record as the one decoding gives back; the source's by default.
    #[serde(default)]
    pub dtype: Option<String>,
}

impl Choices {
    /// The parameters for a tensor whose source decodes to `source`.
    pub fn params(&self, source: Dtype) -> Result<Params> {
        let dtype = match &self.dtype {
            None => source,
            Some(name) => Dtype::from_name(name)
                .ok_or_else(|| Error::config(format!("unknown dtype \"{name}\"")))?,
        };
        Ok(Params {
            block_size: self.block_size,
            double_quant: self.double_quant,
            dtype,
            ..Params::default()
        })
    }
}

/// A file of the destination that holds no planned tensors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExtraFile {
    /// Path below the destination.
    pub path: String,
    /// Its content, or
    #[serde(default)]
    pub text: Option<String>,
    /// the file it is a copy of, or
    #[serde(default)]
    pub copy: Option<PathBuf>,
    /// the file that it is another name of (a link is taken as it is). A copy, where the file system
    /// gives no second names.
    #[serde(default)]
    pub link: Option<PathBuf>,
}

/// How to work. None of these changes a byte of the output.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// Worker threads; `None` for as many as the machine allows.
    pub threads: Option<usize>,
    /// Most memory for buffers and statistics.
    pub max_memory_bytes: u64,
    /// Source bytes per slab; `None` chooses.
    pub slab_bytes: Option<u64>,
    /// Measure the error of every encoded tensor.
    pub verify: bool,
    /// Pass weights through that are not finite, where the format can.
    pub keep_nonfinite: bool,
    /// Force everything to the disk before the result is committed.
    pub sync: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            threads: None,
            max_memory_bytes: 256_000_000,
            slab_bytes: None,
            verify: true,
            keep_nonfinite: false,
            sync: true,
        }
    }
}

/// safetensors metadata of an output.
pub fn text_metadata(value: &serde_json::Value) -> Result<BTreeMap<String, String>> {
    match value {
        serde_json::Value::Null => Ok(BTreeMap::new()),
        value => serde_json::from_value(value.clone()).map_err(|error| {
            Error::config(format!(
                "safetensors metadata must be an object of strings: {error}"
            ))
        }),
    }
}
