//! bitsandbytes: 4-bit weights by the record beside them, int8 ones by `SCB`.

use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Params};

use super::super::checkpoint::Stored;

/// Every bitsandbytes tensor.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    for (name, array) in sources.stored {
        let recognised = if let Some((base, kind)) = name.split_once(".quant_state.bitsandbytes__")
        {
            packed_4bit(sources, base, kind, array).map(Some)
        } else if let Some(module) = name.strip_suffix("SCB") {
            packed_int8(sources, module, array)
        } else {
            Ok(None)
        };
        found.extend(recognised.map_err(|error| sources.located(error, name))?);
    }
    Ok(found)
}

fn packed_4bit(
    sources: &Sources<'_>,
    base: &str,
    kind: &str,
    record: &Stored,
) -> Result<Recognised> {
    let state = formats::read_quant_state(&sources.checkpoint.read_whole(record)?)?;
    let format = formats::find(state.format)?;
    if state.format.strip_prefix("bitsandbytes:") != Some(kind) {
        return Err(Error::checkpoint(format!(
            "the record's name ends in {}, but it describes {}",
            crate::error::escape(kind),
            state.format
        )));
    }
    let layout = format.layout(&state.shape, &state.params)?;
    Ok(Recognised {
        base: base.to_owned(),
        format,
        layout,
    })
}

/// `SCB` beside an int8 weight of as many rows.
fn packed_int8(sources: &Sources<'_>, module: &str, scales: &Stored) -> Result<Option<Recognised>> {
    if !(module.is_empty() || module.ends_with('.')) {
        return Ok(None);
    }
    let base = format!("{module}weight");
    let Some(weight) = sources.get(&base) else {
        return Ok(None);
    };
    if weight.entry.dtype != Dtype::I8
        || weight.entry.shape.len() != 2
        || scales.entry.shape.first() != weight.entry.shape.first()
    {
        return Ok(None);
    }
    let format = formats::find("bitsandbytes:int8")?;
    let params = Params {
        dtype: Dtype::F16,
        ..Params::default()
    };
    let layout = format.layout(&weight.entry.shape, &params)?;
    Ok(Some(Recognised {
        base,
        format,
        layout,
    }))
}
