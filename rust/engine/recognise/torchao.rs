//! torchao: by what the files' metadata says of each weight.
//!
//! The metadata of a file holds, under the name of a weight, JSON with the class of its tensor, the
//! attributes of the class, and which arrays it consists of. It may speak of weights that another file
//! of the checkpoint holds. Classes and attributes that no format here covers are left alone.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::checkpoint::Stored;
use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::scaled::with_scales;
use crate::formats::{self, Format, Layout, Params};
use crate::io::Metadata;

/// What a weight of one class is decoded by; `None` where its attributes or arrays are not those of a
/// format here.
type Class = fn(&Weight<'_>) -> Result<Option<Decoder>>;
type Decoder = (&'static dyn Format, Layout);

/// The classes that have a format.
const CLASSES: &[(&str, Class)] = &[
    ("Int8Tensor", int8),
    ("IntxUnpackedToInt8Tensor", intx),
    ("Int4Tensor", int4),
    ("Float8Tensor", float8),
    ("NVFP4Tensor", nvfp4),
    ("MXTensor", mx),
];

/// Where the section of a model's config says what shares a scale.
const GRANULARITY: &str = "/quant_type/default/_data/granularity/_type";

/// One weight of the metadata.
#[derive(Deserialize)]
struct Described {
    #[serde(rename = "_type")]
    class: String,
    #[serde(rename = "_data", default)]
    attributes: Map<String, Value>,
    #[serde(rename = "_tensor_data_names", default)]
    arrays: Vec<String>,
}

/// A weight of a class that has a format.
struct Weight<'w> {
    attributes: &'w Map<String, Value>,
    /// The array of codes.
    data: &'w Stored,
    /// The array of scales, where it is called so.
    scale: Option<&'w Stored>,
    zero_point: Option<&'w Stored>,
    /// Whether the model's config says that tensors have one scale each.
    is_by_tensor: bool,
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

fn packed(sources: &Sources<'_>, name: &str, described: &Described) -> Result<Option<Recognised>> {
    let Some((_, class)) = CLASSES.iter().find(|(name, _)| *name == described.class) else {
        return Ok(None);
    };
    let (module, leaf) = name.rsplit_once('.').unwrap_or(("", name));
    let dot = if module.is_empty() { "" } else { "." };
    let array = |suffix: &str| sources.get(&format!("{module}{dot}_{leaf}_{suffix}"));
    let Some(data) = array("qdata") else {
        return Ok(None);
    };
    let weight = Weight {
        attributes: &described.attributes,
        data,
        scale: array("scale"),
        zero_point: array("zero_point"),
        is_by_tensor: sources
            .hints
            .quantization
            .as_ref()
            .and_then(|section| section.pointer(GRANULARITY))
            .is_some_and(|name| name == "PerTensor"),
    };
    let Some((format, layout)) = class(&weight)? else {
        return Ok(None);
    };
    let has_all = layout.components.len() == described.arrays.len()
        && layout
            .components
            .iter()
            .all(|component| described.arrays.iter().any(|one| *one == component.suffix));
    Ok(has_all.then(|| Recognised {
        base: name.to_owned(),
        format,
        layout,
    }))
}

impl Weight<'_> {
    /// Whether the attributes called `names` are all null, or not there.
    fn has_none_of(&self, names: &[&str]) -> bool {
        names
            .iter()
            .all(|name| self.attributes.get(*name).is_none_or(Value::is_null))
    }

    /// The attribute `name`, where it is the name of a member of one of torch's or torchao's types.
    fn member(&self, name: &str) -> Option<&str> {
        self.attributes.get(name)?.get("_data")?.as_str()
    }

    /// The attribute `name`, where it is a type of floats.
    fn dtype(&self, name: &str) -> Option<Dtype> {
        Some(match self.member(name)? {
            "float32" => Dtype::F32,
            "float16" => Dtype::F16,
            "bfloat16" => Dtype::BF16,
            _ => return None,
        })
    }

    /// The attribute `block_size`, where it has two dimensions.
    fn block(&self) -> Option<[u64; 2]> {
        match self.attributes.get("block_size")?.as_array()?.as_slice() {
            [rows, columns] => Some([rows.as_u64()?, columns.as_u64()?]),
            _ => None,
        }
    }

    /// Blocks of weights of a row, `per_byte` to a byte of type `codes`, with scales in the order of
    /// tensor cores.
    fn swizzled(&self, format: &str, codes: Dtype, per_byte: u64) -> Result<Option<Decoder>> {
        let is_swizzled = self.attributes.get("is_swizzled_scales") == Some(&Value::Bool(true));
        let block_size = self.attributes.get("block_size").and_then(Value::as_u64);
        let (Some(dtype), true, &[rows, bytes]) = (
            self.dtype("orig_dtype"),
            is_swizzled && self.data.entry.dtype == codes,
            self.data.entry.shape.as_slice(),
        ) else {
            return Ok(None);
        };
        let params = Params {
            dtype,
            block_size,
            ..Params::default()
        };
        let columns = crate::shape::multiply(bytes, per_byte, "weights of a row")?;
        // Blocks of another size are a format that is not there.
        Ok(decoder(format, &[rows, columns], &params).unwrap_or(None))
    }

    /// One code of type `codes` per weight, and one scale per group of weights of a row.
    fn groups(&self, format: &str, codes: Dtype) -> Result<Option<Decoder>> {
        let (Some(dtype), Some([1, size])) = (self.dtype("dtype"), self.block()) else {
            return Ok(None);
        };
        let params = Params {
            dtype,
            block_size: Some(size),
            ..Params::default()
        };
        self.codes(format, codes, &params)
    }

    /// One code of type `codes` per weight.
    fn codes(&self, format: &str, codes: Dtype, params: &Params) -> Result<Option<Decoder>> {
        match self.data.entry.dtype == codes && self.data.entry.shape.len() == 2 {
            true => decoder(format, &self.data.entry.shape, params),
            false => Ok(None),
        }
    }
}

/// The layout of a weight of `shape` in the format called `name`.
fn decoder(name: &str, shape: &[u64], params: &Params) -> Result<Option<Decoder>> {
    let format = formats::find(name)?;
    Ok(Some((format, format.layout(shape, params)?)))
}

fn int8(weight: &Weight<'_>) -> Result<Option<Decoder>> {
    let is_reduced = weight.attributes.get("reduce_range") == Some(&Value::Bool(true));
    if is_reduced || !weight.has_none_of(&["act_quant_kwargs"]) {
        return Ok(None);
    }
    weight.groups("torchao:int8", Dtype::I8)
}

fn intx(weight: &Weight<'_>) -> Result<Option<Decoder>> {
    let bits = weight
        .member("target_dtype")
        .and_then(|name| name.strip_prefix("int"));
    let (Some(bits @ ("1" | "2" | "3" | "4" | "5" | "6" | "7" | "8")), Some(scale)) =
        (bits, weight.scale)
    else {
        return Ok(None);
    };
    let has_whole_zeros = weight
        .zero_point
        .is_some_and(|zeros| zeros.entry.dtype == Dtype::I8);
    let has_floats = matches!(scale.entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    if !has_whole_zeros || !has_floats || !weight.has_none_of(&["activation_quantization"]) {
        return Ok(None);
    }
    let Some((format, layout)) = weight.groups(&format!("torchao:intx{bits}"), Dtype::I8)? else {
        return Ok(None);
    };
    let (dtype, shape) = (scale.entry.dtype, scale.entry.shape.as_slice());
    Ok(Some((format, with_scales(layout, dtype, shape)?)))
}

fn int4(weight: &Weight<'_>) -> Result<Option<Decoder>> {
    let (Some([1, size]), Some(scale), Some(zeros), &[rows, bytes], Some("bfloat16")) = (
        weight.block(),
        weight.scale,
        weight.zero_point,
        weight.data.entry.shape.as_slice(),
        weight.member("activation_dtype"),
    ) else {
        return Ok(None);
    };
    let dtype = scale.entry.dtype;
    let has_floats = matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    if !has_floats || zeros.entry.dtype != dtype || weight.data.entry.dtype != Dtype::I8 {
        return Ok(None);
    }
    let params = Params {
        dtype,
        block_size: Some(size),
        ..Params::default()
    };
    let columns = crate::shape::multiply(bytes, 2, "weights of a row")?;
    // Transposed weights are packed along their columns.
    if weight.attributes.get("shape") != Some(&serde_json::json!([rows, columns])) {
        return Ok(None);
    }
    let Some((format, layout)) = decoder("torchao:int4", &[rows, columns], &params)? else {
        return Ok(None);
    };
    for (array, component) in [scale, zeros]
        .into_iter()
        .zip(layout.components.iter().skip(1))
    {
        if array.entry.shape != component.shape {
            return Err(Error::checkpoint(format!(
                "\"{}\" has shape {:?}, expected {:?}",
                array.entry.name, array.entry.shape, component.shape
            )));
        }
    }
    Ok(Some((format, layout)))
}

fn float8(weight: &Weight<'_>) -> Result<Option<Decoder>> {
    if !weight.has_none_of(&["act_quant_kwargs", "mm_config"]) {
        return Ok(None);
    }
    let is_whole = match weight.block() {
        // One row has one scale either way.
        Some([1, _]) => weight.is_by_tensor,
        Some(block) => weight.data.entry.shape == block,
        None => false,
    };
    match (is_whole, weight.dtype("dtype")) {
        (true, Some(dtype)) => {
            let params = Params {
                dtype,
                ..Params::default()
            };
            weight.codes("torchao:float8_tensor", Dtype::F8_E4M3, &params)
        }
        _ => weight.groups("torchao:float8", Dtype::F8_E4M3),
    }
}

fn nvfp4(weight: &Weight<'_>) -> Result<Option<Decoder>> {
    if !weight.has_none_of(&["act_quant_kwargs"]) {
        return Ok(None);
    }
    weight.swizzled("torchao:nvfp4", Dtype::U8, 2)
}

/// Activations are quantized too; a copy tells of them what torchao's config does by itself.
fn mx(weight: &Weight<'_>) -> Result<Option<Decoder>> {
    let activations = weight.attributes.get("act_quant_kwargs");
    let activations = activations.and_then(|kwargs| kwargs.get("_data")?.as_object());
    let is_usual = activations.is_some_and(|attributes| {
        let activations = Weight {
            attributes,
            ..*weight
        };
        activations.member("scaling_mode") == Some("RCEIL")
            && ["elem_dtype", "kernel_preference"]
                .iter()
                .all(|name| activations.member(name) == weight.member(name))
    });
    if !is_usual || weight.member("kernel_preference") != Some("AUTO") {
        return Ok(None);
    }
    match weight.member("elem_dtype") {
        Some("float8_e4m3fn") => weight.swizzled("torchao:mxfp8", Dtype::F8_E4M3, 1),
        Some("float4_e2m1fn_x2") => weight.swizzled("torchao:mxfp4", Dtype::U8, 2),
        _ => Ok(None),
    }
}
