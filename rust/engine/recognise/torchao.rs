//! torchao: by what the files' metadata says of each weight.
//!
//! The metadata of a file holds, under the name of a weight, JSON with the class of its tensor, the
//! attributes of the class, and which arrays it consists of. It may speak of weights that another file
//! of the checkpoint holds. Classes and attributes that no format here covers are left alone.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::formats::{self, Params};
use crate::io::Metadata;

/// One weight of the metadata.
#[derive(Deserialize)]
struct Described {
    #[serde(rename = "_type")]
    class: String,
    #[serde(rename = "_data", default)]
    attributes: Attributes,
    #[serde(rename = "_tensor_data_names", default)]
    arrays: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Attributes {
    block_size: Vec<u64>,
    dtype: Value,
    /// How activations are quantized, where they are.
    act_quant_kwargs: Value,
    mm_config: Value,
    reduce_range: Option<bool>,
}

/// Every torchao tensor of a class that has a format.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let mut described: BTreeMap<&str, &str> = BTreeMap::new();
    for file in &sources.checkpoint.files {
        if let Metadata::Text(pairs) = &file.header.metadata {
            described.extend(pairs.iter().map(|(name, text)| (&**name, &**text)));
        }
    }
    let mut found = Vec::new();
    for (name, text) in described {
        // Most pairs speak of plain tensors, or of something else.
        if text.contains("_tensor_data_names") {
            if let Ok(weight) = serde_json::from_str(text) {
                let recognised = packed(sources, name, &weight);
                found.extend(recognised.map_err(|error| sources.located(error, name))?);
            }
        }
    }
    Ok(found)
}

fn packed(sources: &Sources<'_>, name: &str, weight: &Described) -> Result<Option<Recognised>> {
    let (format, codes) = match weight.class.as_str() {
        "Int8Tensor" => ("torchao:int8", Dtype::I8),
        "Float8Tensor" => ("torchao:float8", Dtype::F8_E4M3),
        _ => return Ok(None),
    };
    let attributes = &weight.attributes;
    let is_plain = attributes.act_quant_kwargs.is_null()
        && attributes.mm_config.is_null()
        && attributes.reduce_range != Some(true);
    let format = formats::find(format)?;
    let dtype = attributes.dtype.get("_data").and_then(Value::as_str);
    let (true, Some(dtype), &[1, columns]) = (
        is_plain,
        dtype.and_then(of_torch),
        attributes.block_size.as_slice(),
    ) else {
        return Ok(None);
    };
    let params = Params {
        dtype,
        ..Params::default()
    };
    let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    let dot = if module.is_empty() { "" } else { "." };
    let Some(data) = sources.get(&format!("{module}{dot}_{leaf}_qdata")) else {
        return Ok(None);
    };
    let &[_, found] = data.entry.shape.as_slice() else {
        return Ok(None);
    };
    if found != columns || data.entry.dtype != codes {
        return Ok(None);
    }
    let layout = format.layout(&data.entry.shape, &params)?;
    let has_all = layout.components.len() == weight.arrays.len()
        && layout
            .components
            .iter()
            .all(|component| weight.arrays.iter().any(|one| *one == component.suffix));
    Ok(has_all.then(|| Recognised {
        base: name.to_owned(),
        format,
        layout,
    }))
}

/// The type that torch calls `name`.
fn of_torch(name: &str) -> Option<Dtype> {
    Some(match name {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        _ => return None,
    })
}
