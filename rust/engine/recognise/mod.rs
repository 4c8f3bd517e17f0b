//! Which stored arrays of a safetensors checkpoint together are one packed weight.
//!
//! Each packing has a module that finds its weights by names, types, the files' metadata and what
//! `config.json` says; [`PACKINGS`] is their list. A weight is claimed by the first that finds it.

mod bitsandbytes;
mod grouped;
mod quanto;
mod torchao;

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{Component, Format, Layout, Span};

use super::checkpoint::{Checkpoint, Stored, Tensor};
use super::derive;

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

/// Every packing.
const PACKINGS: &[Find] = &[
    bitsandbytes::find,
    torchao::find,
    quanto::find,
    grouped::find,
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

    /// `error` with the tensor and, where there is an array of that name, its file.
    fn located(&self, error: Error, name: &str) -> Error {
        let error = error.tensor(name);
        match self.get(name) {
            Some(array) => error.file(self.checkpoint.path(array.file)),
            None => error,
        }
    }

    /// Finds the arrays of a recognised tensor and checks their sizes against the layout.
    fn gather(&self, recognised: Recognised) -> Result<Tensor> {
        let Recognised {
            base,
            format,
            layout,
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
                        Span::Blocks { .. } | Span::Whole => {
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
            parts.push(match found {
                Some(part) if format.is_transposed(position) => Some(derive::turned(part)?),
                found => found,
            });
        }
        Ok(Tensor {
            name: base,
            shape: layout.shape.clone(),
            dtype: layout.params.dtype,
            packed: Some((format, layout)),
            parts,
        })
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
