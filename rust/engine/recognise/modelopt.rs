//! ModelOpt's unified export: what a weight is packed as is told by its arrays. 8-bit floats with a scale
//! for each row or for the tensor look the same elsewhere; they are ModelOpt's where the config says so.

use serde_json::Value;

use super::{Recognised, Sources};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, scaled, Params};

use super::super::checkpoint::Stored;

/// What is added to the product of a weight packed by SVDQuant.
const LOW_RANK: &[&str] = &["svdquant_lora_a", "weight_quantizer.svdquant_lora_a"];

/// Every weight that ModelOpt exported.
pub fn find(sources: &Sources<'_>) -> Result<Vec<Recognised>> {
    let by_modelopt = sources.hints.quantization.as_ref().is_some_and(is_export);
    let mut found = Vec::new();
    for (name, array) in sources.stored {
        let Some(base) = name.strip_suffix("weight_scale") else {
            continue;
        };
        let base = format!("{base}weight");
        let Some(weight) = sources.get(&base) else {
            continue;
        };
        let recognised = packed(sources, &base, weight, array, by_modelopt);
        found.extend(recognised.map_err(|error| sources.located(error, &base))?);
    }
    Ok(found)
}

/// Whether a section is that of an export, or of `hf_quant_config.json`.
fn is_export(section: &Value) -> bool {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_lowercase);
    let producer = section.get("producer").and_then(|made| made.get("name"));
    [text(section.get("quant_method")), text(producer)].contains(&Some(String::from("modelopt")))
}

fn packed(
    sources: &Sources<'_>,
    base: &str,
    weight: &Stored,
    scales: &Stored,
    by_modelopt: bool,
) -> Result<Option<Recognised>> {
    let module = base.strip_suffix("weight").unwrap_or(base);
    for low_rank in LOW_RANK {
        if sources.get(&format!("{module}{low_rank}")).is_some() {
            return Err(Error::unsupported(format!(
                "\"{module}{low_rank}\" is a part of the weight (SVDQuant), and is not decoded"
            ))
            .hint("convert the model it was made from"));
        }
    }
    let (codes, sizes) = (&weight.entry.shape, &scales.entry.shape);
    let is_one = sizes.iter().product::<u64>() == 1;
    let is_float = scales.entry.dtype.is_float();
    let mut params = Params {
        dtype: sources.hints.dtype.unwrap_or(Dtype::BF16),
        ..Params::default()
    };
    let mut shape = codes.clone();
    let kind = match (weight.entry.dtype, scales.entry.dtype) {
        (Dtype::F8_E4M3, _) if is_float && sizes.len() == 4 => "modelopt:fp8_block",
        (Dtype::F8_E4M3, _) if is_float && by_modelopt && is_one => "modelopt:fp8",
        (Dtype::F8_E4M3, _) if is_float && by_modelopt => "modelopt:fp8_row",
        (Dtype::I8, _) if is_float && (by_modelopt || sizes.len() == 1) => "modelopt:int8",
        (Dtype::U8, Dtype::F8_E4M3) if has_second(sources, base) => {
            widen(&mut shape, codes.len().wrapping_sub(1))?;
            let block = per_scale(&shape, sizes);
            params.block_size = (block != 16).then_some(block);
            "modelopt:nvfp4"
        }
        (Dtype::U8, Dtype::U8) => {
            widen(&mut shape, codes.len().wrapping_sub(1))?;
            "modelopt:mxfp4"
        }
        (Dtype::U8, Dtype::F32) if sizes.len() == 2 && codes.len() == 2 => {
            widen(&mut shape, 0)?;
            let block = per_scale(&shape, sizes);
            params.block_size = (block != 128).then_some(block);
            "modelopt:int4"
        }
        _ => return Ok(None),
    };
    let format = formats::find(kind)?;
    let Ok(mut layout) = format.layout(&shape, &params) else {
        return Ok(None);
    };
    let count = |shape: &[u64]| crate::shape::count_weights(shape).unwrap_or(0);
    let expected = layout.components.get(1).map(|scales| &scales.shape);
    match kind {
        "modelopt:nvfp4" | "modelopt:mxfp4" | "modelopt:int4" if expected != Some(sizes) => {
            return Ok(None);
        }
        _ if expected.map(|shape| count(shape)) != Some(count(sizes)) => return Ok(None),
        "modelopt:fp8_row" | "modelopt:fp8_block" | "modelopt:int8" => {
            layout = scaled::with_scales(layout, scales.entry.dtype, sizes)?;
        }
        _ => {}
    }
    let layout = sources.with_beside(base, layout);
    Ok(Some(Recognised {
        base: base.to_owned(),
        format,
        layout,
    }))
}

/// Weights of a row that share a scale; 0 where rows are not whole blocks.
fn per_scale(shape: &[u64], scales: &[u64]) -> u64 {
    match (shape.last(), scales.last()) {
        (Some(&columns), Some(&across)) if across > 0 && columns.is_multiple_of(across) => {
            columns / across
        }
        _ => 0,
    }
}

/// Whether there is a scale for the whole tensor besides.
fn has_second(sources: &Sources<'_>, base: &str) -> bool {
    sources.get(&format!("{base}_scale_2")).is_some()
}

/// The shape of the weights, two of which are in one byte along `dimension`.
fn widen(shape: &mut [u64], dimension: usize) -> Result<()> {
    match shape.get_mut(dimension) {
        Some(size) => {
            *size = crate::shape::multiply(*size, 2, "weights of a row")?;
            Ok(())
        }
        None => Err(Error::checkpoint("packed weight is a scalar")),
    }
}
