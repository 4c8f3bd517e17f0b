//! Stacks of experts in 4-bit floats, as gpt-oss stores them: by the names, types and shapes of codes and
//! scales, which nothing else has.

use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::formats::{self, Format, Params};
use crate::shape;

use super::super::checkpoint::Stored;

/// What the names of the codes end in.
const CODES: &str = "_blocks";

/// Every stack of experts.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    for (name, array) in sources.stored {
        if let Some(base) = name.strip_suffix(CODES) {
            let recognised = packed(sources, base, array);
            found.extend(recognised.map_err(|error| sources.located(error, name))?);
        }
    }
    Ok(found)
}

fn packed(sources: &Sources<'_>, base: &str, codes: &Stored) -> Result<Option<Recognised>> {
    let &[ref outer @ .., columns, blocks, 16] = codes.entry.shape.as_slice() else {
        return Ok(None);
    };
    let Some(scales) = sources.get(&format!("{base}_scales")) else {
        return Ok(None);
    };
    let are_bytes = [codes, scales].map(|array| array.entry.dtype) == [Dtype::U8; 2];
    if !are_bytes || scales.entry.shape != [outer, &[columns, blocks]].concat() {
        return Ok(None);
    }
    let params = Params {
        dtype: sources.hints.dtype.unwrap_or(Dtype::BF16),
        ..Params::default()
    };
    let rows = shape::multiply(blocks, 32, "rows of a stack")?;
    let format = &formats::experts::MXFP4;
    Ok(Some(Recognised {
        base: base.to_owned(),
        format,
        layout: format.layout(&[outer, &[rows, columns]].concat(), &params)?,
    }))
}
