//! Formats on arrays: `formats`, `layout`, `encode`, `decode`, `pack_int4`, `unpack_int4`.

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray1, PyReadwriteArray2};
use pyo3::prelude::*;
use serde::{Deserialize, Serialize};

use super::errors::guarded;
use crate::bits::{self, NibbleOrder};
use crate::dtype::Dtype;
use crate::engine::array::{self, Options};
use crate::error::{Error, Result};
use crate::formats::{self, Encodes, Exactness, Format, Importance, Layout, Params, Span};

/// Adds this module's functions to `_rust`.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(list_formats, module)?)?;
    module.add_function(wrap_pyfunction!(layout, module)?)?;
    module.add_function(wrap_pyfunction!(encode, module)?)?;
    module.add_function(wrap_pyfunction!(decode, module)?)?;
    module.add_function(wrap_pyfunction!(decode_rows, module)?)?;
    module.add_function(wrap_pyfunction!(types, module)?)?;
    module.add_function(wrap_pyfunction!(pack_int4, module)?)?;
    module.add_function(wrap_pyfunction!(unpack_int4, module)?)
}

#[derive(Serialize)]
struct FormatRow {
    name: &'static str,
    short: Option<&'static str>,
    container: &'static str,
    exactness: String,
    peer: &'static str,
    reader: &'static str,
    bits_per_weight: f64,
    encodes: &'static str,
}

#[derive(Serialize)]
struct ComponentRow<'a> {
    suffix: &'a str,
    naming: &'static str,
    dtype: String,
    shape: &'a [u64],
    bytes: u64,
    late: bool,
    /// Whether weights that are far apart share its bytes.
    repeated: bool,
}

/// The parameters of a format, and whether to keep weights that are not finite.
#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Choices {
    block_size: Option<u64>,
    double_quant: bool,
    dtype: Option<String>,
    nested_offset: f32,
    keep_nonfinite: bool,
}

impl Choices {
    fn parse(text: &str) -> Result<(Params, bool)> {
        let choices: Choices = serde_json::from_str(text)
            .map_err(|error| Error::config(format!("format parameters: {error}")))?;
        let params = Params {
            block_size: choices.block_size,
            double_quant: choices.double_quant,
            dtype: choices.dtype.as_deref().map_or(Ok(Dtype::F32), dtype_of)?,
            nested_offset: choices.nested_offset,
            ..Params::default()
        };
        Ok((params, choices.keep_nonfinite))
    }
}

pub(super) fn dtype_of(name: &str) -> Result<Dtype> {
    Dtype::from_name(name).ok_or_else(|| Error::config(format!("unknown dtype \"{name}\"")))
}

/// The format called `name`; also one that is read and never written, by the name of its type.
fn readable(name: &str) -> Result<&'static dyn Format> {
    let by_type = || formats::for_dtype(Dtype::from_name(&name.to_uppercase())?);
    formats::find(name).or_else(|error| by_type().ok_or(error))
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::Internal(error.to_string()))
}

#[pyfunction(name = "formats")]
fn list_formats(py: Python<'_>) -> PyResult<String> {
    guarded(py, || {
        let rows: Vec<FormatRow> = formats::FORMATS
            .iter()
            .map(|format| {
                let info = format.info();
                FormatRow {
                    name: info.name,
                    short: info.short,
                    container: info.container,
                    exactness: match info.exactness {
                        Exactness::Exact => "exact".to_owned(),
                        Exactness::ExactGiven(what) => format!("exact given {what}"),
                    },
                    peer: info.peer,
                    reader: info.reader,
                    bits_per_weight: info.bits_per_weight,
                    encodes: encodes(info.encodes),
                }
            })
            .collect();
        json(&rows)
    })
}

#[pyfunction]
fn layout(py: Python<'_>, format: &str, shape: Vec<u64>, params: &str) -> PyResult<String> {
    guarded(py, || {
        let (params, _) = Choices::parse(params)?;
        let layout = formats::find(format)?.layout(&shape, &params)?;
        let rows = component_rows(&layout)?;
        json(&rows)
    })
}

fn component_rows(layout: &Layout) -> Result<Vec<ComponentRow<'_>>> {
    let components = layout.components.iter().enumerate();
    components
        .map(|(index, component)| {
            Ok(ComponentRow {
                suffix: &component.suffix,
                naming: component.naming.name(),
                dtype: component.dtype.name(),
                shape: &component.shape,
                bytes: layout.component_bytes(index)?,
                late: component.span == Span::WholeAtMost,
                repeated: matches!(component.span, Span::Repeated { .. }),
            })
        })
        .collect()
}

#[pyfunction]
#[pyo3(signature = (format, shape, params, data, dtype, out, threads, importance=None))]
#[allow(clippy::too_many_arguments)]
fn encode(
    py: Python<'_>,
    format: &str,
    shape: Vec<u64>,
    params: &str,
    data: PyReadonlyArray1<'_, u8>,
    dtype: &str,
    mut out: Vec<PyReadwriteArray1<'_, u8>>,
    threads: Option<usize>,
    importance: Option<PyReadonlyArray1<'_, f32>>,
) -> PyResult<Vec<u64>> {
    let data = data.as_slice()?;
    let importance = match &importance {
        Some(importance) => Some(importance.as_slice()?.to_vec()),
        None => None,
    };
    let mut out = out
        .iter_mut()
        .map(|array| array.as_slice_mut())
        .collect::<Result<Vec<&mut [u8]>, _>>()?;
    guarded(py, || {
        let (mut params, keep_nonfinite) = Choices::parse(params)?;
        params.importance = importance.map(Importance::new).transpose()?;
        let format = formats::find(format)?;
        let mut layout = format.layout(&shape, &params)?;
        let options = Options {
            threads,
            keep_nonfinite,
        };
        array::encode_array(
            format,
            &mut layout,
            dtype_of(dtype)?,
            data,
            &mut out,
            options,
        )
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn decode(
    py: Python<'_>,
    format: &str,
    shape: Vec<u64>,
    params: &str,
    parts: Vec<PyReadonlyArray1<'_, u8>>,
    mut out: PyReadwriteArray1<'_, u8>,
    dtype: &str,
    threads: Option<usize>,
) -> PyResult<()> {
    let parts = parts
        .iter()
        .map(|array| array.as_slice())
        .collect::<Result<Vec<&[u8]>, _>>()?;
    let out = out.as_slice_mut()?;
    guarded(py, || {
        let (params, keep_nonfinite) = Choices::parse(params)?;
        let format = readable(format)?;
        let layout = format.layout(&shape, &params)?;
        let options = Options {
            threads,
            keep_nonfinite,
        };
        array::decode_array(format, &layout, &parts, dtype_of(dtype)?, out, options)
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn decode_rows(
    py: Python<'_>,
    format: &str,
    columns: u64,
    data: PyReadonlyArray2<'_, u8>,
    mut out: PyReadwriteArray2<'_, u8>,
    dtype: &str,
    threads: Option<usize>,
) -> PyResult<()> {
    let torn = || Error::config("the bytes of a row do not follow each other");
    let data = data.as_array();
    let mut out = out.as_array_mut();
    let packed = data
        .outer_iter()
        .map(|row| row.to_slice().ok_or_else(torn))
        .collect::<Result<Vec<&[u8]>>>()?;
    let weights = out
        .outer_iter_mut()
        .map(|row| row.into_slice().ok_or_else(torn))
        .collect::<Result<Vec<&mut [u8]>>>()?;
    guarded(py, || {
        let dtype = dtype_of(dtype)?;
        let format = readable(format)?;
        array::decode_rows(format, columns, packed, dtype, weights, threads)
    })
}

#[derive(Serialize)]
struct TypeRow {
    id: u32,
    name: String,
    block_weights: u64,
    block_bytes: u64,
    format: Option<&'static str>,
    encodes: &'static str,
}

#[pyfunction]
fn types(py: Python<'_>) -> PyResult<String> {
    guarded(py, || {
        let rows: Vec<TypeRow> = Dtype::all()
            .filter_map(|dtype| {
                let (block_weights, block_bytes) = dtype.block()?;
                let format = formats::for_dtype(dtype).map(|format| format.info());
                Some(TypeRow {
                    id: dtype.ggml_id()?,
                    name: dtype.name(),
                    block_weights,
                    block_bytes,
                    format: format.map(|info| info.name),
                    encodes: format
                        .and_then(|info| formats::find(info.name).ok())
                        .map_or("never", |format| encodes(format.info().encodes)),
                })
            })
            .collect();
        json(&rows)
    })
}

fn encodes(encodes: Encodes) -> &'static str {
    match encodes {
        Encodes::Always => "always",
        Encodes::WithImportance => "with importance",
        Encodes::Never => "never",
    }
}

#[pyfunction]
fn pack_int4<'py>(
    py: Python<'py>,
    codes: PyReadonlyArray1<'py, u8>,
    order: &str,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let codes = codes.as_slice()?;
    let packed = guarded(py, || {
        let mut packed = vec![0; codes.len().div_ceil(2)];
        bits::pack_int4(NibbleOrder::from_name(order)?, codes, &mut packed)?;
        Ok(packed)
    })?;
    Ok(PyArray1::from_vec(py, packed))
}

#[pyfunction]
fn unpack_int4<'py>(
    py: Python<'py>,
    packed: PyReadonlyArray1<'py, u8>,
    order: &str,
    count: usize,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let packed = packed.as_slice()?;
    let codes = guarded(py, || {
        // Before a buffer of this length is made.
        bits::check_int4(count, packed.len())?;
        let mut codes = vec![0; count];
        bits::unpack_int4(NibbleOrder::from_name(order)?, packed, &mut codes)?;
        Ok(codes)
    })?;
    Ok(PyArray1::from_vec(py, codes))
}
