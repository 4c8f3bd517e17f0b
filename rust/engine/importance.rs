//! Importance vectors of planned tensors: checked when the plan is made, loaded while a tensor is
//! worked on and dropped behind it, so that those of a large model are never held together.
//!
//! Stored are sums of squared activations, one row per matrix, and the number of activations of
//! each matrix; the importance is their quotient, and 1 for a matrix that saw none (llama.cpp's
//! `tools/quantize`, of ggml 0.25.3).

use std::path::Path;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::Importance;
use crate::shape;

use super::checkpoint::{Checkpoint, Stored, Tensor};
use super::plan::checkpoint_at;
use super::request::ImportanceSource;

/// Where the importance of one tensor's columns comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weighed {
    /// Checkpoint, sums and counts; `None` for 1 everywhere.
    stored: Option<Box<(usize, Stored, Stored)>>,
    /// Numbers in all.
    numbers: u64,
}

impl Weighed {
    /// Finds what `source` names and checks that it goes with a tensor of shape `weights`, which is
    /// called `name` and stored in `file`.
    pub fn new(
        checkpoints: &[Arc<Checkpoint>],
        source: &ImportanceSource,
        name: &str,
        file: &Path,
        weights: &[u64],
    ) -> Result<Self> {
        let columns = shape::row_weights(weights);
        let Some(index) = source.checkpoint else {
            return Ok(Weighed {
                stored: None,
                numbers: columns,
            });
        };
        let checkpoint = checkpoint_at(checkpoints, index)?;
        let (sums, counts) = (
            checkpoint.tensor(&source.sums)?,
            checkpoint.tensor(&source.counts)?,
        );
        let located = |tensor: &Tensor, error: Error| match tensor.main() {
            Ok(array) => error.tensor(&tensor.name).file(checkpoint.path(array.file)),
            Err(_) => error.tensor(&tensor.name),
        };
        let sums_array = array(sums).map_err(|error| located(sums, error))?;
        let counts_array = array(counts).map_err(|error| located(counts, error))?;
        let numbers = shape::count_weights(&sums.shape)?;
        let matrices = shape::count_weights(&counts.shape)?;
        if matrices == 0 || !numbers.is_multiple_of(matrices) {
            return Err(located(
                sums,
                Error::checkpoint(format!("{numbers} sums, but {matrices} counts")),
            ));
        }
        let there = match weights {
            [outer @ .., _, _] => shape::count_weights(outer)?,
            _ => 1,
        };
        if numbers / matrices != columns || !(matrices == 1 || matrices == there) {
            return Err(located(
                sums,
                Error::config(format!(
                    "importance of {matrices} x {} columns does not go with tensor \"{name}\" of shape {weights:?} in {}",
                    numbers / matrices,
                    file.display()
                ))
                .hint("the importance file belongs to another model"),
            ));
        }
        Ok(Weighed {
            stored: Some(Box::new((index, sums_array.clone(), counts_array.clone()))),
            numbers,
        })
    }

    /// Bytes of the numbers once they are loaded.
    pub fn bytes(&self) -> u64 {
        self.numbers.saturating_mul(4)
    }

    /// Loads the numbers.
    pub fn load(&self, checkpoints: &[Arc<Checkpoint>]) -> Result<Importance> {
        let Some((index, sums, counts)) = self.stored.as_deref() else {
            return Importance::new(vec![1.0; shape::to_usize(self.numbers)?]);
        };
        let checkpoint = checkpoint_at(checkpoints, *index)?;
        let mut values = floats(checkpoint, sums)?;
        let counts = floats(checkpoint, counts)?;
        let columns = values.len().checked_div(counts.len()).unwrap_or(0).max(1);
        for (row, count) in values.chunks_mut(columns).zip(counts) {
            // Counts are stored as numbers with a fraction and meant as whole ones.
            let count = count.round();
            if count > 0.0 {
                row.iter_mut().for_each(|value| *value /= count);
            } else {
                row.fill(1.0);
            }
        }
        Importance::new(values).map_err(|error| {
            error
                .tensor(&sums.entry.name)
                .file(checkpoint.path(sums.file))
        })
    }
}

fn array(tensor: &Tensor) -> Result<&Stored> {
    let array = tensor.main()?;
    if array.entry.dtype == Dtype::F32 && tensor.parts.len() == 1 {
        return Ok(array);
    }
    Err(Error::checkpoint(format!(
        "importance is stored as {}, expected F32",
        tensor.dtype
    )))
}

fn floats(checkpoint: &Checkpoint, array: &Stored) -> Result<Vec<f32>> {
    let mut bytes = vec![0; shape::to_usize(array.entry.bytes)?];
    checkpoint.read(array, 0, &mut bytes)?;
    Ok(bytes
        .chunks_exact(4)
        .filter_map(|four| four.try_into().ok())
        .map(f32::from_le_bytes)
        .collect())
}
