//! compressed-tensors: 4-bit floats by the names of their arrays, bytes by the shapes of their scales. What
//! shares a scale follows from these; only blocks are told by `config.json`. Packed whole numbers are
//! [`super::grouped`]'s, FP8 with one scale for a row or for the tensor is [`super::fp8`]'s.

use serde_json::Value;

use super::{module_of, Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Grid, Params};
use crate::shape;

use super::super::checkpoint::Stored;

/// Layouts of sparse weights, and of ones that are arranged for a kernel.
const NOT_DECODED: &[&str] = &["marlin-24", "sparse-24-bitmask", "sparse-bitmask"];

/// Every tensor of these layouts.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let is_told = sources.text("quant_method") == Some("compressed-tensors");
    if let Some(config) = sources.hints.quantization.as_ref().filter(|_| is_told) {
        refuse(config)?;
    }
    let mut found = Vec::new();
    for (name, array) in sources.stored {
        let recognised = if let (Some(module), Dtype::U8) =
            (module_of(name, "weight_packed"), array.entry.dtype)
        {
            four_bits(sources, module, array)
        } else if let Some(module) = module_of(name, "weight_scale") {
            match sources.get(&format!("{module}weight")) {
                Some(weight) => bytes(sources, module, weight, array, is_told),
                None => continue,
            }
        } else {
            continue;
        };
        found.extend(recognised.map_err(|error| sources.located(error, name))?);
    }
    Ok(found)
}

/// Fails if the config tells of something that decoded weights alone do not make up for.
fn refuse(config: &Value) -> Result<()> {
    let layouts = [
        config.get("format"),
        config.pointer("/sparsity_config/format"),
    ];
    let layouts = layouts.into_iter().flatten().filter_map(Value::as_str);
    if let Some(layout) = layouts.into_iter().find(|one| NOT_DECODED.contains(one)) {
        return Err(Error::unsupported(format!(
            "the source is packed by compressed-tensors as \"{layout}\", which is not decoded"
        ))
        .hint("decompress it with compressed-tensors, or convert the model it was made from"));
    }
    let transforms = config.get("transform_config");
    match transforms.and_then(|transforms| online(transforms)) {
        Some(place) => Err(Error::unsupported(format!(
            "the model turns its activations (transform_config, at \"{place}\"), and its weights mean nothing without"
        ))
        .hint("convert the model it was made from")),
        None => Ok(()),
    }
}

/// A place of a transform that is no part of a weight.
fn online(value: &Value) -> Option<&str> {
    match value {
        Value::Object(fields) => {
            let place = fields.get("location").and_then(Value::as_str);
            let place = place.filter(|place| !place.starts_with("weight"));
            place.or_else(|| fields.values().find_map(online))
        }
        Value::Array(items) => items.iter().find_map(online),
        _ => None,
    }
}

/// `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.
fn four_bits(sources: &Sources<'_>, module: &str, codes: &Stored) -> Result<Option<Recognised>> {
    let Some(scales) = sources.get(&format!("{module}weight_scale")) else {
        return Err(Error::checkpoint(format!(
            "\"{module}weight_scale\" is missing"
        )));
    };
    refuse_zeros(sources, module)?;
    let sizes = &scales.entry.shape;
    let (&[rows, bytes], &[scale_rows, across]) = (codes.entry.shape.as_slice(), sizes.as_slice())
    else {
        return Err(mismatch(module, scales, codes));
    };
    let columns = shape::multiply(bytes, 2, "weights of a row")?;
    let has_global = sources
        .get(&format!("{module}weight_global_scale"))
        .is_some();
    let (kind, block) = match scales.entry.dtype {
        Dtype::F8_E4M3 if has_global => ("compressed-tensors:nvfp4", 16),
        Dtype::F8_E4M3 => {
            return Err(Error::checkpoint(format!(
                "\"{module}weight_global_scale\" is missing"
            )));
        }
        Dtype::U8 | Dtype::F8_E8M0 if bytes == across.saturating_mul(24) => {
            return Err(Error::unsupported("weights of 6 bits are not decoded"));
        }
        Dtype::U8 | Dtype::F8_E8M0 => ("compressed-tensors:mxfp4", 32),
        other => return Err(Error::unsupported(format!("scales of type {other}"))),
    };
    if scale_rows != rows || across.checked_mul(block) != Some(columns) {
        return Err(mismatch(module, scales, codes));
    }
    recognised(sources, module, kind, &[rows, columns], None).map(Some)
}

/// `int-quantized`, `float-quantized`, `naive-quantized` and `mxfp8-quantized`; `None` where the arrays are
/// somebody else's. `is_told`: the config names the library.
fn bytes(
    sources: &Sources<'_>,
    module: &str,
    codes: &Stored,
    scales: &Stored,
    is_told: bool,
) -> Result<Option<Recognised>> {
    let (shape, sizes) = (&codes.entry.shape, &scales.entry.shape);
    let kind = match (codes.entry.dtype, scales.entry.dtype) {
        (Dtype::F8_E4M3, Dtype::U8 | Dtype::F8_E8M0) if is_mx(shape, sizes) => "modelopt:mxfp8",
        (Dtype::F8_E4M3, scale) if is_told && scale.is_float() => "compressed-tensors:float8",
        (Dtype::I8, scale) if (is_told || sizes.len() == 2) && scale.is_float() => {
            "compressed-tensors:int8"
        }
        (Dtype::I8 | Dtype::F8_E4M3, scale) if is_told => {
            return Err(Error::unsupported(format!("scales of type {scale}")));
        }
        _ => return Ok(None),
    };
    let zeros = sources.get(&format!("{module}weight_zero_point"));
    if kind == "modelopt:mxfp8" {
        return recognised(sources, module, kind, shape, None).map(Some);
    }
    let cell = cell(sources, shape, sizes).ok_or_else(|| mismatch(module, scales, codes))?;
    if kind == "compressed-tensors:float8" {
        refuse_zeros(sources, module)?;
        let is_row_or_tensor = Some(cell.1) == shape.last().copied();
        if is_row_or_tensor && (cell.0 == 1 || sizes.iter().product::<u64>() == 1) {
            return Ok(None);
        }
    }
    if let Some(zeros) = zeros.filter(|zeros| {
        zeros.entry.dtype != Dtype::I8
            || shape::count_weights(&zeros.entry.shape).ok() != shape::count_weights(sizes).ok()
    }) {
        return Err(Error::checkpoint(format!(
            "\"{}\" is {} {:?}, expected I8 {sizes:?}",
            zeros.entry.name, zeros.entry.dtype, zeros.entry.shape
        )));
    }
    let grid = Grid {
        rows: cell.0,
        columns: cell.1,
        scale: scales.entry.dtype,
        has_zeros: zeros.is_some(),
    };
    recognised(sources, module, kind, shape, Some(grid)).map(Some)
}

/// Whether every 32 columns have a scale.
fn is_mx(shape: &[u64], sizes: &[u64]) -> bool {
    match (shape, sizes) {
        ([outer @ .., columns], [scale_outer @ .., across]) => {
            outer == scale_outer && across.checked_mul(32) == Some(*columns)
        }
        _ => false,
    }
}

/// Rows and columns of the weights that share a scale, by the shape of the scales.
fn cell(sources: &Sources<'_>, shape: &[u64], sizes: &[u64]) -> Option<(u64, u64)> {
    let &[rows, columns] = shape else {
        return None;
    };
    match *sizes {
        [] | [1] | [1, 1] => Some((rows.max(1), columns.max(1))),
        [count] | [count, 1] if count == rows => Some((1, columns.max(1))),
        [down, across] if down > 0 && across > 0 => {
            let fits =
                |&(r, c): &(u64, u64)| rows.div_ceil(r) == down && columns.div_ceil(c) == across;
            let group = || {
                let is_group = down == rows && columns.is_multiple_of(across);
                is_group.then(|| (1, columns / across))
            };
            block_structure(sources).filter(fits).or_else(group)
        }
        _ => None,
    }
}

/// Rows and columns of a block, where the config speaks of blocks.
fn block_structure(sources: &Sources<'_>) -> Option<(u64, u64)> {
    let sizes: Vec<u64> = match sources.config("block_structure")? {
        Value::Array(sizes) => sizes.iter().filter_map(Value::as_u64).collect(),
        Value::String(text) => text.split('x').flat_map(str::parse).collect(),
        _ => return None,
    };
    match *sizes {
        [rows, columns] if rows > 0 && columns > 0 => Some((rows, columns)),
        _ => None,
    }
}

fn recognised(
    sources: &Sources<'_>,
    module: &str,
    kind: &str,
    shape: &[u64],
    grid: Option<Grid>,
) -> Result<Recognised> {
    let dtype = match grid.map(|grid| grid.scale) {
        Some(scale @ (Dtype::F16 | Dtype::BF16)) => scale,
        _ => sources.hints.dtype.unwrap_or(Dtype::BF16),
    };
    let params = Params {
        dtype,
        grid,
        ..Params::default()
    };
    let format = formats::find(kind)?;
    let base = format!("{module}weight");
    let layout = sources.with_beside(&base, format.layout(shape, &params)?);
    Ok(Recognised {
        base,
        format,
        layout,
    })
}

/// Fails if floats have zeros, which the library writes for asymmetric ones.
fn refuse_zeros(sources: &Sources<'_>, module: &str) -> Result<()> {
    match sources.get(&format!("{module}weight_zero_point")) {
        Some(_) => Err(Error::unsupported("floats with zeros are not decoded")),
        None => Ok(()),
    }
}

fn mismatch(module: &str, scales: &Stored, codes: &Stored) -> Error {
    Error::checkpoint(format!(
        "\"{module}weight_scale\" has shape {:?}, which fits no codes of shape {:?}",
        scales.entry.shape, codes.entry.shape
    ))
}
