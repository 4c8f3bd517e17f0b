//! Which stored arrays of a safetensors checkpoint together are one packed weight.
//!
//! Each packing has a module that finds its weights by names, types, the files' metadata and what
//! `config.json` says; [`PACKINGS`] is their list. A weight is claimed by the first that finds it.

mod bitsandbytes;
mod compressed;
mod experts;
mod fp8;
mod grouped;
mod hqq;
mod modelopt;
mod quanto;
mod torchao;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float;
use crate::formats::{Component, Format, Layout, Naming, Span};
use crate::shape;

use super::checkpoint::{Checkpoint, Stored, Tensor};
use super::derive;
use super::transpose::Transposed;

/// What a model says about its weights outside of the files that hold them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Hints {
    /// The section `quantization_config` of `config.json`, or what stands for it.
    pub quantization: Option<Value>,
    /// Type of the model's weights where they are not packed.
    pub dtype: Option<Dtype>,
}

/// What a packing is found by.
pub struct Sources<'c> {
    /// The files, and their metadata.
    pub checkpoint: &'c Checkpoint,
    /// The stored arrays by name.
    pub stored: &'c BTreeMap<&'c str, Stored>,
    /// What the model says besides.
    pub hints: &'c Hints,
}

/// A packed weight: its name, format and layout.
pub struct Recognised {
    /// Name of the logical tensor.
    pub base: String,
    /// How it is decoded.
    pub format: &'static dyn Format,
    /// Its arrays; their names follow from `base`.
    pub layout: Layout,
}

/// Finds every weight of one packing. An error is about an array that cannot be anything else.
type Find = fn(&Sources<'_>) -> Result<Vec<Recognised>>;

/// What may stand beside a packed weight: factors of its columns, and the ranges of activations, which
/// are no part of the weight and mean nothing once it is decoded.
const COLUMN_FACTORS: &str = "pre_quant_scale";
const BESIDE: &[&str] = &[
    COLUMN_FACTORS,
    "input_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "weight_scale_2",
    "input_global_scale",
    "input_zero_point",
    "output_zero_point",
];
/// The same beside the layer of an attention that the weight belongs to, by the name of its module:
/// ranges of what is kept of keys and values.
const OUTSIDE: &[(&str, &str)] = &[
    ("q_proj", "q_scale"),
    ("k_proj", "k_scale"),
    ("k_proj", "k_zero_point"),
    ("v_proj", "v_scale"),
    ("v_proj", "v_zero_point"),
];
/// Most columns that have factors of their own.
const MOST_COLUMNS: u64 = 1 << 24;

/// Every packing.
const PACKINGS: &[Find] = &[
    bitsandbytes::find,
    torchao::find,
    quanto::find,
    grouped::find,
    hqq::find,
    compressed::find,
    modelopt::find,
    fp8::find,
    experts::find,
];

/// Every packed weight of a checkpoint.
pub fn packed_tensors(
    checkpoint: &Checkpoint,
    stored: &BTreeMap<&str, Stored>,
    hints: &Hints,
) -> Result<Vec<Tensor>> {
    let sources = Sources {
        checkpoint,
        stored,
        hints,
    };
    let mut found = Vec::new();
    let mut taken: HashSet<String> = HashSet::new();
    for find in PACKINGS {
        for recognised in find(&sources)? {
            let base = recognised.base.clone();
            let tensor = sources
                .gather(recognised)
                .and_then(|tensor| sources.check_constants(tensor))
                .map_err(|error| sources.located(error, &base))?;
            let names: Vec<&str> = tensor
                .stored()
                .map(|part| part.entry.name.as_str())
                .collect();
            if names.iter().any(|name| taken.contains(*name)) {
                continue;
            }
            taken.extend(names.into_iter().map(str::to_owned));
            found.push(tensor);
        }
    }
    Ok(found)
}

impl Sources<'_> {
    /// The stored array called `name`.
    pub fn get(&self, name: &str) -> Option<&Stored> {
        self.stored.get(name)
    }

    /// A number of the quantization config, wherever it stands in it.
    fn number(&self, key: &str) -> Option<u64> {
        self.config(key)?.as_u64()
    }

    /// As [`Sources::number`], a text.
    fn text(&self, key: &str) -> Option<&str> {
        self.config(key)?.as_str()
    }

    /// The first value called `key` of the quantization config.
    fn config(&self, key: &str) -> Option<&Value> {
        look_up(self.hints.quantization.as_ref()?, key)
    }

    /// `error` with the tensor, and the file of the array of that name or of the first of its module.
    fn located(&self, error: Error, name: &str) -> Error {
        let error = error.tensor(name);
        let module = name.rfind('.').map_or("", |dot| &name[..=dot]);
        let beside = || {
            let (first, array) = self.stored.range(module..).next()?;
            first.starts_with(module).then_some(array)
        };
        match self.get(name).or_else(beside) {
            Some(array) => error.file(self.checkpoint.path(array.file)),
            None => error,
        }
    }

    /// Finds the arrays of a recognised tensor and checks their sizes against the layout.
    fn gather(&self, recognised: Recognised) -> Result<Tensor> {
        let Recognised {
            base,
            format,
            mut layout,
        } = recognised;
        let mut parts = Vec::with_capacity(layout.components.len());
        for (position, component) in layout.components.iter().enumerate() {
            let name = component.stored_name(&base);
            let found = self.get(&name).cloned();
            match &found {
                Some(part) => {
                    let expected = layout.component_bytes(position)?;
                    let fits = match component.span {
                        Span::WholeAtMost => true,
                        // Readers accept the packed bytes viewed as any other type.
                        Span::Blocks { .. } | Span::Repeated { .. } | Span::Whole => {
                            part.entry.bytes == expected || component.suffix.contains("quant_state")
                        }
                    };
                    if !fits {
                        return Err(Error::checkpoint(format!(
                            "\"{name}\" has {} bytes, but shape {:?} in {} needs {expected}",
                            part.entry.bytes,
                            layout.shape,
                            format.info().name
                        )));
                    }
                }
                None if component.span.is_sliced() => {
                    return Err(Error::checkpoint(format!("\"{name}\" is missing")));
                }
                None => {}
            }
            parts.push(
                match (found, format.transposed_element(&layout, position)) {
                    (Some(part), Some(element)) => {
                        Some(derive::turned(Transposed::of_elements(part, element)?))
                    }
                    (found, _) => found,
                },
            );
        }
        if let Some(index) = format.tensor_scale() {
            let Some(Some(part)) = parts.get(index) else {
                return Err(Error::checkpoint(
                    "the scale of the whole tensor is missing",
                ));
            };
            layout.params.tensor_scale = self.scale(part)?;
        }
        if let Some(index) = layout
            .components
            .iter()
            .position(|component| component.suffix == COLUMN_FACTORS)
        {
            if let Some(Some(part)) = parts.get(index) {
                layout.params.column_factors = Some(self.column_factors(part, &layout)?.into());
            }
        }
        Ok(Tensor {
            name: base,
            shape: layout.shape.clone(),
            dtype: layout.params.dtype,
            packed: Some((format, layout)),
            parts,
            origin: None,
        })
    }

    /// `layout` with the arrays that stand beside the weight `base` and are no components of its format.
    fn with_beside(&self, base: &str, mut layout: Layout) -> Layout {
        let module = base.strip_suffix(".weight").unwrap_or_default();
        let name = module.rsplit('.').next().unwrap_or_default();
        let outside = OUTSIDE.iter().filter(|(of, _)| *of == name);
        let outside = outside.map(|(_, suffix)| (*suffix, Naming::Outer));
        let beside = BESIDE.iter().map(|suffix| (*suffix, Naming::Sibling));
        for (suffix, naming) in beside.chain(outside) {
            let component = Component {
                suffix: Cow::Borrowed(suffix),
                naming,
                dtype: Dtype::F32,
                shape: Vec::new(),
                span: Span::Whole,
            };
            let is_known = |known: &Component| known.suffix == suffix;
            if layout.components.iter().any(is_known) {
                continue;
            }
            if let Some(found) = self.get(&component.stored_name(base)) {
                layout.components.push(Component {
                    dtype: found.entry.dtype,
                    shape: found.entry.shape.clone(),
                    ..component
                });
            }
        }
        layout
    }

    /// One number for each column of a matrix.
    fn column_factors(&self, stored: &Stored, layout: &Layout) -> Result<Vec<f32>> {
        let columns = shape::row_weights(&layout.shape);
        let count = shape::count_weights(&stored.entry.shape)?;
        if count != columns || columns > MOST_COLUMNS {
            return Err(Error::checkpoint(format!(
                "\"{}\" has shape {:?}, expected [{columns}]",
                stored.entry.name, stored.entry.shape
            )));
        }
        let mut bytes = vec![0; shape::to_usize(stored.entry.bytes)?];
        self.checkpoint.read(stored, 0, &mut bytes)?;
        let mut factors = vec![0.0; shape::to_usize(columns)?];
        float::widen(stored.entry.dtype, &bytes, &mut factors, false)?;
        Ok(factors)
    }

    /// The number that an array of one floating point number holds.
    fn scale(&self, stored: &Stored) -> Result<f32> {
        let dtype = stored.entry.dtype;
        let is_known = matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        if !is_known || shape::count_weights(&stored.entry.shape)? != 1 {
            return Err(Error::checkpoint(format!(
                "\"{}\" is {dtype} {:?}, expected one number of F32, F16 or BF16",
                stored.entry.name, stored.entry.shape
            )));
        }
        let mut found = [0.0];
        float::widen(
            dtype,
            &self.checkpoint.read_whole(stored)?,
            &mut found,
            false,
        )?;
        let [scale] = found;
        Ok(scale)
    }

    /// Whole-tensor components whose content the format fixes (code tables) must hold just that.
    fn check_constants(&self, tensor: Tensor) -> Result<Tensor> {
        let Some((format, layout)) = &tensor.packed else {
            return Ok(tensor);
        };
        for (position, expected) in format.whole(layout, &[])? {
            let fixed = layout
                .components
                .get(position)
                .is_some_and(Component::is_constant);
            let Some(Some(part)) = tensor.parts.get(position) else {
                continue;
            };
            if fixed && self.checkpoint.read_whole(part)? != expected {
                return Err(Error::unsupported(format!(
                    "\"{}\" differs from the table of {}",
                    part.entry.name,
                    format.info().name
                )));
            }
        }
        Ok(tensor)
    }
}

/// What stands before the last segment of `name`, if that is `leaf`.
fn module_of<'n>(name: &'n str, leaf: &str) -> Option<&'n str> {
    let module = name.strip_suffix(leaf)?;
    (module.is_empty() || module.ends_with('.')).then_some(module)
}

/// The first value called `key` in an object or in those within it.
fn look_up<'v>(value: &'v Value, key: &str) -> Option<&'v Value> {
    let object = value.as_object()?;
    object
        .get(key)
        .filter(|value| !value.is_null())
        .or_else(|| object.values().find_map(|inner| look_up(inner, key)))
}
