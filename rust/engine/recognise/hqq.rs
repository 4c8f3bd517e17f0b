//! HQQ: by the names of codes and of the arrays beside them, in which each layer says how it is packed. So
//! the state of hqq's layers is stored, by hqq and by transformers 4; `config.json` is not needed.

use super::{module_of, Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{hqq, Format, Params};
use crate::shape;

use super::super::checkpoint::Stored;

/// Arrays in place of plain scales and zeros: both in one array, and ones that are packed themselves.
const NOT_DECODED: &[&str] = &["zero_scale", "scale_q", "zero_q"];
/// Most bytes of an array that says one thing.
const MOST_BYTES: u64 = 64;

/// Every HQQ weight.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let mut found = Vec::new();
    for (name, codes) in sources.stored {
        if let Some(module) = module_of(name, "W_q") {
            let recognised = packed(sources, module, codes);
            found.extend(recognised.map_err(|error| sources.located(error, name))?);
        }
    }
    Ok(found)
}

fn packed(sources: &Sources<'_>, module: &str, codes: &Stored) -> Result<Option<Recognised>> {
    let is_told = sources.text("quant_method") == Some("hqq");
    let has_record = sources.get(&format!("{module}packing")).is_some();
    if !is_told && !has_record {
        return Ok(None);
    }
    if let Some(name) = NOT_DECODED
        .iter()
        .map(|name| format!("{module}{name}"))
        .find(|name| sources.get(name).is_some())
    {
        return Err(Error::unsupported(format!(
            "\"{name}\": only scales and zeros in plain arrays of their own are decoded"
        )));
    }
    if flag(sources, module, "channel_wise")? == Some(false) {
        return Err(Error::unsupported(
            "one scale for all weights (channel_wise false) is not decoded",
        ));
    }
    let shape = shape_of(sources, module)?;
    let is_line = match number(sources, module, "axis")? {
        0 => false,
        1 => true,
        other => {
            return Err(Error::checkpoint(format!(
                "\"{module}axis\" is {other}, expected 0 or 1"
            )))
        }
    };
    let (scale, zero) = (
        needed(sources, module, "scale")?,
        needed(sources, module, "zero")?,
    );
    let record = hqq::Record {
        bits: bits(sources, module)?,
        group: number(sources, module, "group_size")?,
        is_line,
        scale: scale_type(scale)?,
    };
    // Scales in 32 bits say nothing about the type of the weights.
    let dtype = match record.scale {
        Dtype::F32 => sources.hints.dtype.unwrap_or(Dtype::F32),
        scale => scale,
    };
    let params = Params {
        dtype,
        hqq: Some(record),
        ..Params::default()
    };
    let format = &hqq::HQQ;
    let mut layout = format.layout(&shape, &params)?;
    let is_viewed = flag(sources, module, "view_as_float")? == Some(true);
    for (component, array) in layout.components.iter().zip([codes, scale, zero]) {
        let found = &array.entry;
        let is_same = (found.dtype, &found.shape) == (component.dtype, &component.shape);
        let is_view = is_viewed
            && component.suffix == "W_q"
            && found.dtype.is_float()
            && found.bytes == component.dtype.byte_len(&component.shape)?;
        if !(is_same || is_view) {
            return Err(Error::checkpoint(format!(
                "\"{}\" is {} {:?}, but a weight of shape {shape:?} in groups of {} with {} bits has {} {:?}",
                found.name,
                found.dtype,
                found.shape,
                record.group,
                record.bits,
                component.dtype,
                component.shape
            )));
        }
    }
    for component in layout.components.iter_mut().skip(3) {
        if let Some(array) = sources.get(&format!("{module}{}", component.suffix)) {
            component.dtype = array.entry.dtype;
            component.shape = array.entry.shape.clone();
        }
    }
    Ok(Some(Recognised {
        base: format!("{module}weight"),
        format,
        layout,
    }))
}

/// Bits of a code, by the name of the packing.
fn bits(sources: &Sources<'_>, module: &str) -> Result<u32> {
    let text = small(sources, module, "packing", Dtype::U8)?;
    let known = hqq::PACKINGS
        .iter()
        .find(|(name, _)| name.as_bytes() == text.as_slice());
    known.map(|(_, bits)| *bits).ok_or_else(|| {
        let names: Vec<&str> = hqq::PACKINGS.iter().map(|(name, _)| *name).collect();
        Error::unsupported(format!(
            "packing \"{}\" is not decoded by this version, only {}",
            crate::error::escape(&String::from_utf8_lossy(&text)),
            names.join(", ")
        ))
    })
}

/// Rows and columns of the weight.
fn shape_of(sources: &Sources<'_>, module: &str) -> Result<[u64; 2]> {
    let bytes = small(sources, module, "shape", Dtype::I64)?;
    let (sizes, _) = bytes.as_chunks::<8>();
    let sizes: Vec<i64> = sizes.iter().map(|size| i64::from_le_bytes(*size)).collect();
    match sizes.as_slice() {
        &[rows, columns] if rows > 0 && columns > 0 => {
            let shape = [rows.unsigned_abs(), columns.unsigned_abs()];
            shape::count_weights(&shape)?;
            Ok(shape)
        }
        _ => Err(Error::checkpoint(format!(
            "\"{module}shape\" holds {sizes:?}, expected rows and columns"
        ))),
    }
}

/// The positive number, or zero, that an array holds.
fn number(sources: &Sources<'_>, module: &str, name: &str) -> Result<u64> {
    let bytes = small(sources, module, name, Dtype::I32)?;
    let value = <[u8; 4]>::try_from(bytes.as_slice()).map(i32::from_le_bytes);
    match value.map(u64::try_from) {
        Ok(Ok(value)) => Ok(value),
        _ => Err(Error::checkpoint(format!(
            "\"{module}{name}\" does not hold one number that is not negative"
        ))),
    }
}

/// The yes or no that an array holds; `None` where there is none.
fn flag(sources: &Sources<'_>, module: &str, name: &str) -> Result<Option<bool>> {
    if sources.get(&format!("{module}{name}")).is_none() {
        return Ok(None);
    }
    let bytes = small(sources, module, name, Dtype::U8)?;
    Ok(Some(bytes.iter().any(|byte| *byte != 0)))
}

/// The bytes of an array that says one thing.
fn small(sources: &Sources<'_>, module: &str, name: &str, dtype: Dtype) -> Result<Vec<u8>> {
    let array = needed(sources, module, name)?;
    if array.entry.dtype != dtype || array.entry.bytes > MOST_BYTES {
        return Err(Error::checkpoint(format!(
            "\"{module}{name}\" is {} {:?}, expected {dtype} of at most {MOST_BYTES} bytes",
            array.entry.dtype, array.entry.shape
        )));
    }
    sources.checkpoint.read_whole(array)
}

fn needed<'s>(sources: &'s Sources<'_>, module: &str, name: &str) -> Result<&'s Stored> {
    sources.get(&format!("{module}{name}")).ok_or_else(|| {
        Error::checkpoint(format!(
            "\"{module}{name}\" is missing, which hqq stores beside its codes"
        ))
    })
}

fn scale_type(scale: &Stored) -> Result<Dtype> {
    match scale.entry.dtype {
        dtype @ (Dtype::F16 | Dtype::BF16 | Dtype::F32) => Ok(dtype),
        other => Err(Error::unsupported(format!("scales of type {other}"))),
    }
}
