//! The JSON that bitsandbytes stores beside a 4-bit tensor, byte for byte as Python's `json.dumps`
//! writes it:
//!
//! ```json
//! {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 256],
//!  "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 2.579861640930176}
//! ```
//!
//! on one line; the nested entries stand there with double quantization only. The offset is an
//! `f32` widened to `f64`.
//!
//! Source: bitsandbytes 0.50.2, `functional.py` (`QuantState.as_dict`, `from_dict`).

use super::bnb4::{BLOCK_SIZES, FP4, NESTED_BLOCK, NF4};
use super::{Format, Layout, Params};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// Most characters that Python's `repr` needs for a positive `float` that came from an `f32`:
/// 17 digits, the point, and an exponent such as `e-38`, or as many zeros in front.
const MOST_OFFSET_CHARACTERS: usize = 22;

/// The JSON of a tensor of this layout; block size and element type are filled in.
pub fn write(quant_type: &str, layout: &Layout) -> String {
    let offset = python_repr(f64::from(layout.params.nested_offset));
    text(quant_type, layout, &offset)
}

/// Bytes of that JSON; with double quantization, whose offset is not known yet, at most.
pub fn most_bytes(quant_type: &str, layout: &Layout) -> usize {
    text(quant_type, layout, &"0".repeat(MOST_OFFSET_CHARACTERS)).len()
}

fn text(quant_type: &str, layout: &Layout, offset: &str) -> String {
    let dtype = match layout.params.dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    };
    let mut text = format!(
        "{{\"quant_type\": \"{quant_type}\", \"blocksize\": {}, \"dtype\": \"{dtype}\", \
         \"shape\": {:?}",
        layout.params.block_size.unwrap_or_default(),
        layout.shape,
    );
    if layout.params.double_quant {
        text.push_str(&format!(
            ", \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \
             \"nested_offset\": {offset}"
        ));
    }
    text.push('}');
    text
}

/// `x` as Python's `repr` writes a float: the fewest digits that read back as `x`, the nearest such
/// ones, the even ones in a tie; an exponent of at least two digits from 1e16 on and below 1e-4.
/// `x` is finite.
fn python_repr(x: f64) -> String {
    // The shortest digits of `core` may end on the odd side of a tie (common here, as the digits of
    // an `f32` end early); rounding to as many digits does not.
    let shortest = format!("{x:e}");
    let decimals = shortest
        .split('e')
        .next()
        .and_then(|digits| digits.split_once('.'))
        .map_or(0, |(_, decimals)| decimals.len());
    let rounded = format!("{x:.decimals$e}");
    let scientific = if rounded.parse() == Ok(x) {
        rounded
    } else {
        shortest
    };
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    // As many digits behind the point as the scientific form has in all, and at least one.
    let decimals = i32::try_from(decimals).unwrap_or(0) - exponent;
    format!("{x:.*}", decimals.max(1) as usize)
}

/// What the JSON of a 4-bit tensor says.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// Full name of the format.
    pub format: &'static str,
    /// Logical shape.
    pub shape: Vec<u64>,
    /// Parameters that decode it.
    pub params: Params,
}

/// Reads the JSON that bitsandbytes stores beside a 4-bit tensor.
///
/// Fails if the text is not such an object, or describes a variant that this version does not
/// decode.
pub fn read_quant_state(text: &[u8]) -> Result<QuantState> {
    #[derive(serde::Deserialize)]
    struct Stored {
        quant_type: String,
        blocksize: u64,
        dtype: String,
        shape: Vec<u64>,
        nested_blocksize: Option<u64>,
        nested_dtype: Option<String>,
        nested_offset: Option<f64>,
    }
    let stored: Stored = serde_json::from_slice(text).map_err(|error| {
        Error::checkpoint(format!(
            "quant_state is not what bitsandbytes writes: {error}"
        ))
    })?;
    let format = match stored.quant_type.as_str() {
        "nf4" => &NF4,
        "fp4" => &FP4,
        other => {
            return Err(Error::unsupported(format!(
                "quant_type \"{other}\" is not nf4 or fp4"
            )));
        }
    };
    let dtype = match stored.dtype.as_str() {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        other => {
            return Err(Error::unsupported(format!(
                "quant_state: dtype \"{other}\" is not float32, float16 or bfloat16"
            )));
        }
    };
    let nested = (
        stored.nested_blocksize,
        stored.nested_dtype.as_deref(),
        stored.nested_offset,
    );
    let nested_offset = match nested {
        (None, None, None) => None,
        (Some(256), Some("float32"), Some(offset)) => Some(offset as f32),
        _ => {
            return Err(Error::unsupported(
                "quant_state: nested blocks are not 256 scales of float32 with an offset",
            ));
        }
    };
    if !BLOCK_SIZES.contains(&stored.blocksize) {
        return Err(Error::unsupported(format!(
            "quant_state: blocksize {} is not one of {BLOCK_SIZES:?}",
            stored.blocksize
        )));
    }
    Ok(QuantState {
        format: format.info().name,
        shape: stored.shape,
        params: Params {
            block_size: Some(stored.blocksize),
            double_quant: nested_offset.is_some(),
            dtype,
            nested_offset: nested_offset.unwrap_or(0.0),
            ..Params::default()
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        for (x, text) in [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (1e15, "1000000000000000.0"),
            (9007199254740993.0, "9007199254740992.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (5e-324, "5e-324"),
            (0.1, "0.1"),
            (f64::from(0.1f32), "0.10000000149011612"),
            (f64::from(1e-45f32), "1.401298464324817e-45"),
            (f64::from(f32::MAX), "3.4028234663852886e+38"),
            // Exactly between two numbers of 17 digits.
            (1_809.455_200_195_312_5, "1809.4552001953125"),
        ] {
            assert_eq!(python_repr(x), text);
        }
    }
}
