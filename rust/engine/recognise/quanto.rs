//! optimum-quanto: by the names of codes and scales.
//!
//! Arrays of 4-bit and 2-bit codes do not tell how many of their groups make a row. It is told by what the
//! file says of shapes, by the bias of the layer, or by groups that are no part of a row.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Layout, Params};
use crate::io::{index, Metadata};
use crate::shape;

use super::super::checkpoint::Stored;

type Shapes = BTreeMap<String, Vec<u64>>;

/// Every quanto tensor of a known shape.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    let mut shapes = None;
    for (name, codes) in sources.stored {
        let recognised = if let Some(base) = name.strip_suffix("._data._data") {
            let shapes = shapes.get_or_insert_with(|| told_shapes(sources));
            groups(sources, shapes, base, codes)
        } else if let Some(base) = name.strip_suffix("._data") {
            rows(sources, base, codes)
        } else {
            continue;
        };
        found.extend(recognised.map_err(|error| sources.located(error, name))?);
    }
    Ok(found)
}

/// Bytes with one scale for each row, and without shifts, which 4-bit and 2-bit codes have.
fn rows(sources: &Sources<'_>, base: &str, codes: &Stored) -> Result<Option<Recognised>> {
    let format = match codes.entry.dtype {
        Dtype::I8 => "quanto:int8",
        Dtype::F8_E4M3 => "quanto:float8",
        _ => return Ok(None),
    };
    let Some(scale) = sources.get(&format!("{base}._scale")) else {
        return Ok(None);
    };
    let rows = codes.entry.shape.first().copied().unwrap_or(0);
    let has_shift = sources.get(&format!("{base}._shift")).is_some();
    let scales = shape::count_weights(&scale.entry.shape)?;
    if !is_float(scale) || has_shift || codes.entry.shape.len() < 2 || scales != rows {
        return Ok(None);
    }
    recognised(sources, base, format, &codes.entry.shape, scale.entry.dtype).map(Some)
}

/// Codes of several groups in a byte, with a scale and a shift for each group.
fn groups(
    sources: &Sources<'_>,
    shapes: &Shapes,
    base: &str,
    codes: &Stored,
) -> Result<Option<Recognised>> {
    let (Some(scale), Some(shift)) = (
        sources.get(&format!("{base}._scale")),
        sources.get(&format!("{base}._shift")),
    ) else {
        return Ok(None);
    };
    let ([byte_rows, rest @ ..], [groups, ones @ ..]) =
        (codes.entry.shape.as_slice(), scale.entry.shape.as_slice())
    else {
        return Ok(None);
    };
    let fits = codes.entry.dtype == Dtype::U8
        && is_float(scale)
        && (shift.entry.dtype, &shift.entry.shape) == (scale.entry.dtype, &scale.entry.shape)
        && ones.len() == rest.len()
        && !rest.is_empty();
    // Shifts that are whole numbers, or codes along another axis, are no format here.
    if !fits {
        return Ok(None);
    }
    let bits: Vec<u64> = [4, 2]
        .into_iter()
        .filter(|bits| groups.div_ceil(8 / bits) == *byte_rows)
        .collect();
    let told = told_bits(sources);
    let format = match bits.as_slice() {
        [4, 2] if told == Some(2) => "quanto:int2",
        [4, ..] => "quanto:int4",
        [2, ..] => "quanto:int2",
        _ => {
            return Err(Error::checkpoint(format!(
                "codes of shape {:?} with scales of shape {:?} are neither 4 nor 2 bits each",
                codes.entry.shape, scale.entry.shape
            )))
        }
    };
    let group = shape::count_weights(rest)?;
    let Some(wanted) = shape_of(sources, shapes, base, *groups, group, rest)? else {
        return Ok(None);
    };
    let found = recognised(sources, base, format, &wanted, scale.entry.dtype)?;
    for (component, array) in found.layout.components.iter().zip([codes, scale, shift]) {
        if component.shape != array.entry.shape {
            return Err(Error::checkpoint(format!(
                "\"{}\" has shape {:?}, but a weight of shape {wanted:?} in {format} has {:?}",
                array.entry.name, array.entry.shape, component.shape
            )));
        }
    }
    Ok(Some(found))
}

/// The shape of a weight that consists of `groups` groups, as far as it is known.
fn shape_of(
    sources: &Sources<'_>,
    shapes: &Shapes,
    base: &str,
    groups: u64,
    group: u64,
    rest: &[u64],
) -> Result<Option<Vec<u64>>> {
    if let Some(told) = shapes.get(base) {
        return Ok(Some(told.clone()));
    }
    let rows = [&[groups], rest].concat();
    let is_part = rest.len() == 1 && formats::quanto_bits::GROUPS.contains(&group);
    if !is_part || groups == 1 {
        return Ok(Some(rows));
    }
    let module = base.rsplit_once('.').map_or("", |(module, _)| module);
    let bias = sources.get(&format!("{module}.bias"));
    let Some(&[outputs]) = bias.map(|bias| bias.entry.shape.as_slice()) else {
        return Ok(None);
    };
    if outputs == 0 || !groups.is_multiple_of(outputs) {
        return Err(Error::checkpoint(format!(
            "{groups} groups do not make the {outputs} rows that \"{module}.bias\" is for"
        )));
    }
    let columns = shape::multiply(groups / outputs, group, "weights of a row")?;
    Ok(Some(vec![outputs, columns]))
}

/// What the files say of shapes.
fn told_shapes(sources: &Sources<'_>) -> Shapes {
    let mut shapes = Shapes::new();
    for file in &sources.checkpoint.files {
        if let Metadata::Text(pairs) = &file.header.metadata {
            let told = pairs
                .get(index::SHAPES_KEY)
                .and_then(|text| serde_json::from_str::<Shapes>(text).ok());
            shapes.extend(told.unwrap_or_default());
        }
    }
    shapes
}

/// Bits of a code by the model's config, as diffusers or transformers has it.
fn told_bits(sources: &Sources<'_>) -> Option<u64> {
    let section = sources.hints.quantization.as_ref()?;
    let name = |key| section.get(key).and_then(Value::as_str);
    match name("weights_dtype").or_else(|| name("weights"))? {
        "int2" => Some(2),
        _ => None,
    }
}

fn is_float(scale: &Stored) -> bool {
    matches!(scale.entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

fn recognised(
    sources: &Sources<'_>,
    base: &str,
    format: &str,
    shape: &[u64],
    dtype: Dtype,
) -> Result<Recognised> {
    let format = formats::find(format)?;
    let params = Params {
        dtype,
        ..Params::default()
    };
    let mut layout: Layout = format.layout(shape, &params)?;
    // The scales of activations may have a type of their own.
    for component in &mut layout.components {
        if let Some(array) = sources.get(&component.stored_name(base)) {
            component.dtype = array.entry.dtype;
        }
    }
    Ok(Recognised {
        base: base.to_owned(),
        format,
        layout,
    })
}
