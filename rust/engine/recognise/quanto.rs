//! optimum-quanto: by the names of codes and scales.

use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::formats::{self, Params};

use super::super::checkpoint::Stored;

/// Every 8-bit quanto tensor.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    for (name, codes) in sources.stored {
        if let Some(base) = name.strip_suffix("._data") {
            let recognised = packed(sources, base, codes);
            found.extend(recognised.map_err(|error| sources.located(error, name))?);
        }
    }
    Ok(found)
}

/// Bytes with one scale for each row, and without shifts, which 4-bit and 2-bit codes have.
fn packed(sources: &Sources<'_>, base: &str, codes: &Stored) -> Result<Option<Recognised>> {
    let format = match codes.entry.dtype {
        Dtype::I8 => "quanto:int8",
        Dtype::F8_E4M3 => "quanto:float8",
        _ => return Ok(None),
    };
    let Some(scale) = sources.get(&format!("{base}._scale")) else {
        return Ok(None);
    };
    let is_float = matches!(scale.entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let rows = codes.entry.shape.first().copied().unwrap_or(0);
    let has_shift = sources.get(&format!("{base}._shift")).is_some();
    let scales = crate::shape::count_weights(&scale.entry.shape)?;
    if !is_float || has_shift || codes.entry.shape.len() < 2 || scales != rows {
        return Ok(None);
    }
    let format = formats::find(format)?;
    let params = Params {
        dtype: scale.entry.dtype,
        ..Params::default()
    };
    let mut layout = format.layout(&codes.entry.shape, &params)?;
    // The scales of activations may have a type of their own.
    for component in &mut layout.components {
        if let Some(array) = sources.get(&component.stored_name(base)) {
            component.dtype = array.entry.dtype;
        }
    }
    Ok(Some(Recognised {
        base: base.to_owned(),
        format,
        layout,
    }))
}
