//! FP8 weights with scales beside them: in blocks (`weight_scale_inv`, as DeepSeek stores them), or one
//! for each row or for the tensor (`weight_scale`, as compressed-tensors and others do). Stacks of experts
//! in blocks have names of their own (`gate_up_proj` and `gate_up_proj_scale_inv`).

use serde_json::Value;

use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, scaled, Naming, Params};
use crate::shape;

use super::super::checkpoint::Stored;

/// Every FP8 weight.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    for (name, array) in sources.stored {
        if array.entry.dtype != Dtype::F8_E4M3 {
            continue;
        }
        found.extend(packed(sources, name, array).map_err(|error| sources.located(error, name))?);
    }
    Ok(found)
}

fn packed(sources: &Sources<'_>, name: &str, weight: &Stored) -> Result<Option<Recognised>> {
    let beside = |suffix: &str| sources.get(&format!("{name}{suffix}"));
    let (kind, scales) = match (beside("_scale_inv"), beside("_scale")) {
        (Some(scales), _) => ("fp8:block", scales),
        (None, Some(scales)) if scales.entry.shape.iter().product::<u64>() == 1 => {
            ("fp8:tensor", scales)
        }
        (None, Some(scales)) if is_one_a_row(weight, scales) => ("fp8:row", scales),
        _ => return Ok(None),
    };
    let is_known = scales.entry.dtype.is_float() || scales.entry.dtype == Dtype::F8_E8M0;
    let is_layer = name == "weight" || name.ends_with(".weight");
    let is_stack = kind == "fp8:block" && weight.entry.shape.len() == 3;
    if !(is_layer || is_stack) || !is_known {
        return Ok(None);
    }
    let mut params = Params {
        dtype: sources.hints.dtype.unwrap_or(Dtype::BF16),
        ..Params::default()
    };
    if kind == "fp8:block" {
        params.block_size = block_size(sources.hints.quantization.as_ref())?;
    }
    let format = formats::find(kind)?;
    let layout = match weight.entry.shape.as_slice() {
        &[experts, rows, columns] if is_stack => {
            if !rows.is_multiple_of(params.block_size.unwrap_or(128)) {
                return Err(Error::unsupported(format!(
                    "experts of {rows} rows in blocks that two of them share"
                )));
            }
            let rows = shape::multiply(experts, rows, "rows of a stack")?;
            let mut layout = format.layout(&[rows, columns], &params)?;
            layout.shape.clone_from(&weight.entry.shape);
            layout
        }
        shape => format.layout(shape, &params)?,
    };
    let mut layout = scaled::with_scales(layout, scales.entry.dtype, &scales.entry.shape)?;
    if is_stack {
        for (component, stored) in layout.components.iter_mut().zip([weight, scales]) {
            component.shape.clone_from(&stored.entry.shape);
        }
    }
    if let (false, Some(component)) = (is_layer, layout.components.get_mut(1)) {
        (component.naming, component.suffix) = (Naming::Joined, "scale_inv".into());
    }
    let layout = sources.with_beside(name, layout);
    Ok(Some(Recognised {
        base: name.to_owned(),
        format,
        layout,
    }))
}

/// Whether the scales are a vector or a column of as many numbers as the matrix has rows.
fn is_one_a_row(weight: &Stored, scales: &Stored) -> bool {
    match (weight.entry.shape.as_slice(), scales.entry.shape.as_slice()) {
        (&[rows, _], &[count] | &[count, 1]) => rows == count,
        _ => false,
    }
}

/// Rows and columns of a block, where the config names another size than 128.
fn block_size(config: Option<&Value>) -> Result<Option<u64>> {
    let Some(given) = config.and_then(|config| config.get("weight_block_size")) else {
        return Ok(None);
    };
    let sizes: Option<Vec<u64>> = given
        .as_array()
        .and_then(|sizes| sizes.iter().map(Value::as_u64).collect());
    match sizes.as_deref() {
        _ if given.is_null() => Ok(None),
        Some([128, 128]) => Ok(None),
        Some(&[rows, columns]) if rows == columns && rows > 0 => Ok(Some(rows)),
        _ => Err(Error::unsupported(format!(
            "weight_block_size is {given}, and blocks are decoded that are squares"
        ))),
    }
}
