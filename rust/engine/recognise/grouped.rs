//! GPTQ, AWQ and compressed-tensors' packed integers, by the names and shapes of their arrays. Bits and
//! groups follow from the shapes; `config.json` says what these leave open.

use std::sync::Arc;

use serde_json::Value;

use super::{module_of, Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Format, Integers, Params};
use crate::shape;

use super::super::checkpoint::Stored;

/// Every tensor of these families.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    refuse_layouts(sources)?;
    let mut found = Vec::new();
    for (name, array) in sources.stored {
        if array.entry.dtype != Dtype::I32 || array.entry.shape.len() != 2 {
            continue;
        }
        let recognised = if let Some(module) = module_of(name, "qweight") {
            by_columns(sources, module, array)
        } else if let Some(module) = module_of(name, "weight_packed") {
            by_rows(sources, module, array)
        } else {
            continue;
        };
        found.extend(recognised.map_err(|error| sources.located(error, name))?);
    }
    Ok(found)
}

/// GPTQ and AWQ.
fn by_columns(sources: &Sources<'_>, module: &str, codes: &Stored) -> Result<Option<Recognised>> {
    let (Some(scales), Some(zeros)) = (
        sources.get(&format!("{module}scales")),
        sources.get(&format!("{module}qzeros")),
    ) else {
        return match sources.text("quant_method") {
            Some(method @ ("gptq" | "awq")) => Err(Error::checkpoint(format!(
                "\"{module}scales\" or \"{module}qzeros\" is missing, which {method} has beside its codes"
            ))),
            _ => Ok(None),
        };
    };
    let (&[first, second], &[groups, rows]) =
        (codes.entry.shape.as_slice(), scales.entry.shape.as_slice())
    else {
        return Ok(None);
    };
    let order = sources.get(&format!("{module}g_idx"));
    let (format, bits, columns): (&'static dyn Format, u64, u64) = if second == rows {
        let told = sources.number("bits");
        let bits = match order.and_then(|order| order.entry.shape.first().copied()) {
            Some(columns) if columns > 0 => {
                shape::multiply(first, 32, "bits of a column")? / columns
            }
            _ => told.unwrap_or(4),
        };
        let columns = shape::multiply(first, 32, "bits of a column")? / bits.max(1);
        (&formats::grouped::GPTQ, bits, columns)
    } else if shape::multiply(second, 8, "rows of words")? == rows {
        (&formats::grouped::AWQ, 4, first)
    } else {
        return Err(Error::unsupported(format!(
            "codes of shape {:?} with scales of shape {:?} are neither GPTQ's nor AWQ's layout",
            codes.entry.shape, scales.entry.shape
        ))
        .hint("they may be arranged for a kernel (GEMV, Marlin): convert the checkpoint they were made from"));
    };
    let is_gptq = second == rows;
    let is_second_version =
        layout_of(sources, GPTQ_KEYS).is_some_and(|(_, told)| told == "gptq_v2");
    let group = group_size(sources, columns, groups);
    let integers = Integers {
        bits,
        group,
        groups,
        scale: scale_type(scales)?,
        zero: Some(i32::from(is_gptq && !is_second_version)),
        order: match order {
            Some(order) if is_gptq => read_order(sources, order, columns, group, groups)?,
            _ => None,
        },
    };
    if zeros.entry.dtype != Dtype::I32 {
        return Err(Error::unsupported(format!(
            "zeros of type {}, expected I32",
            zeros.entry.dtype
        )));
    }
    recognised(sources, module, format, [rows, columns], integers).map(Some)
}

/// compressed-tensors, `pack-quantized`.
fn by_rows(sources: &Sources<'_>, module: &str, codes: &Stored) -> Result<Option<Recognised>> {
    let (Some(scales), Some(dimensions)) = (
        sources.get(&format!("{module}weight_scale")),
        sources.get(&format!("{module}weight_shape")),
    ) else {
        return Ok(None);
    };
    let bytes = sources.checkpoint.read_whole(dimensions)?;
    let (sizes, _) = bytes.as_chunks::<8>();
    let &[rows, columns] = sizes else {
        return Err(Error::checkpoint(format!(
            "\"{module}weight_shape\" holds {} numbers, expected 2",
            sizes.len()
        )));
    };
    let (rows, columns) = (u64::from_le_bytes(rows), u64::from_le_bytes(columns));
    let words = codes.entry.shape.last().copied().unwrap_or(0);
    let fits = |bits: &u64| columns.checked_mul(*bits).map(|bits| bits.div_ceil(32)) == Some(words);
    let Some(bits) = sources
        .number("num_bits")
        .into_iter()
        .chain([4, 8, 2, 3, 5, 6, 7, 1])
        .find(fits)
    else {
        return Err(Error::checkpoint(format!(
            "rows of {words} words do not hold {columns} codes of any number of bits"
        )));
    };
    let &[scale_rows, groups] = scales.entry.shape.as_slice() else {
        return Err(Error::unsupported(format!(
            "scales of shape {:?}, expected one row per row of the weight",
            scales.entry.shape
        )));
    };
    if scale_rows != rows || groups == 0 {
        return Err(Error::unsupported(format!(
            "scales of shape {:?} for a weight of shape [{rows}, {columns}]",
            scales.entry.shape
        )));
    }
    let group = columns.div_ceil(groups).max(1);
    let has_zeros = sources.get(&format!("{module}weight_zero_point")).is_some();
    let integers = Integers {
        bits,
        group,
        groups,
        scale: scale_type(scales)?,
        zero: has_zeros.then_some(0),
        order: match sources.get(&format!("{module}weight_g_idx")) {
            Some(order) => read_order(sources, order, columns, group, groups)?,
            None => None,
        },
    };
    let format = &formats::grouped::COMPRESSED;
    recognised(sources, module, format, [rows, columns], integers).map(Some)
}

fn recognised(
    sources: &Sources<'_>,
    module: &str,
    format: &'static dyn Format,
    shape: [u64; 2],
    integers: Integers,
) -> Result<Recognised> {
    // Scales in 32 bits say nothing about the type of the weights.
    let dtype = match integers.scale {
        Dtype::F32 => sources.hints.dtype.unwrap_or(Dtype::F32),
        scale => scale,
    };
    let params = Params {
        dtype,
        integers: Some(Arc::new(integers)),
        ..Params::default()
    };
    let base = format!("{module}weight");
    let layout = sources.with_beside(&base, format.layout(&shape, &params)?);
    Ok(Recognised {
        base,
        format,
        layout,
    })
}

fn scale_type(scales: &Stored) -> Result<Dtype> {
    match scales.entry.dtype {
        dtype @ (Dtype::F16 | Dtype::BF16 | Dtype::F32) => Ok(dtype),
        other => Err(Error::unsupported(format!("scales of type {other}"))),
    }
}

/// Columns of a group. Where they do not divide the row, only the config tells.
fn group_size(sources: &Sources<'_>, columns: u64, groups: u64) -> u64 {
    let even = columns.div_ceil(groups.max(1)).max(1);
    sources
        .number("group_size")
        .filter(|&told| told > 0 && columns.div_ceil(told) == groups)
        .unwrap_or(even)
}

/// The group of each column; `None` where they are in order.
fn read_order(
    sources: &Sources<'_>,
    order: &Stored,
    columns: u64,
    group: u64,
    groups: u64,
) -> Result<Option<Arc<[u32]>>> {
    let expected = shape::multiply(columns, 4, "bytes of groups of columns")?;
    if order.entry.dtype != Dtype::I32 || order.entry.bytes != expected {
        return Err(Error::checkpoint(format!(
            "\"{}\" holds {} {:?}, expected I32 [{columns}]",
            order.entry.name, order.entry.dtype, order.entry.shape
        )));
    }
    let mut bytes = vec![0; shape::to_usize(expected)?];
    sources.checkpoint.read(order, 0, &mut bytes)?;
    let (numbers, _) = bytes.as_chunks::<4>();
    let numbers: Arc<[u32]> = numbers
        .iter()
        .map(|bytes| u32::from_le_bytes(*bytes))
        .collect();
    if let Some(column) = numbers
        .iter()
        .position(|&number| u64::from(number) >= groups)
    {
        return Err(Error::checkpoint(format!(
            "\"{}\": column {column} belongs to group {} of {groups}",
            order.entry.name, numbers[column]
        )));
    }
    let in_order = (0u64..)
        .zip(numbers.iter())
        .all(|(k, &of)| k / group == u64::from(of));
    Ok((!in_order).then_some(numbers))
}

/// What the config calls the layout, under the names that it has had.
const GPTQ_KEYS: &[&str] = &["checkpoint_format", "format"];
const AWQ_KEYS: &[&str] = &["version", "format"];

/// The name of the layout in small letters, and the key it stands under.
fn layout_of<'k>(sources: &Sources<'_>, keys: &[&'k str]) -> Option<(&'k str, String)> {
    let config = sources.hints.quantization.as_ref()?;
    keys.iter().find_map(|key| {
        let told = config.get(key)?.as_str()?;
        Some((*key, told.to_lowercase()))
    })
}

/// Fails if the config names a layout of GPTQ or AWQ that is not decoded.
fn refuse_layouts(sources: &Sources<'_>) -> Result<()> {
    let (keys, known) = match sources.text("quant_method") {
        Some("gptq") => (GPTQ_KEYS, ["gptq", "gptq_v2"].as_slice()),
        Some("awq") => (AWQ_KEYS, ["gemm"].as_slice()),
        _ => return Ok(()),
    };
    let is_marlin = sources.config("is_marlin_format") == Some(&Value::Bool(true));
    let told = match layout_of(sources, keys) {
        Some((key, layout)) if !known.contains(&layout.as_str()) => format!("{key} \"{layout}\""),
        _ if is_marlin => String::from("is_marlin_format"),
        _ => return Ok(()),
    };
    Err(Error::unsupported(format!(
        "{told} is not decoded by this version, only {}",
        known.join(", ")
    ))
    .hint(
        "the codes are arranged for a kernel: convert the checkpoint they were made from, or the model",
    ))
}
