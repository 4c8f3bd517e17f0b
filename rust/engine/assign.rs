//! One assignment: copy or encode, and the arrays it leads to.

use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Layout};
use crate::io::{Container, NewEntry};
use crate::shape;

use super::checkpoint::{Checkpoint, Tensor};
use super::plan::{checkpoint_at, Action, Planned, Slot};
use super::request::Assignment;
use super::slab::Cut;

/// Decides copy or encode for one assignment and lists the arrays it leads to.
pub fn assign(
    checkpoints: &[Arc<Checkpoint>],
    container: Container,
    slab_bytes: u64,
    assignment: &Assignment,
) -> Result<(Planned, Vec<NewEntry>)> {
    let checkpoint = checkpoint_at(checkpoints, assignment.checkpoint)?;
    let position = checkpoint.position(&assignment.name)?;
    let tensor = checkpoint.tensor(&assignment.name)?;
    if !assignment.rows.is_empty()
        || assignment.shape.is_some()
        || assignment.add.is_some()
        || assignment.importance.is_some()
    {
        return Err(Error::unsupported(
            "rows, shape, add and importance are not carried out yet",
        ));
    }
    let path = checkpoint.path(tensor.main()?.file).to_owned();
    let locate = |error: Error| error.tensor(&tensor.name).file(&path);
    let action = action(tensor, slab_bytes, assignment).map_err(locate)?;
    let (slots, entries) = match &action {
        Action::Copy => copied_entries(tensor, &assignment.target),
        Action::Encode { layout, .. } => encoded_entries(layout, &assignment.target),
    };
    for entry in &entries {
        storable(container, entry.dtype).map_err(locate)?;
    }
    let planned = Planned {
        checkpoint: assignment.checkpoint,
        position,
        target: assignment.target.clone(),
        why: assignment.why.clone(),
        action,
        shard: 0,
        slots,
    };
    Ok((planned, entries))
}

fn action(tensor: &Tensor, slab_bytes: u64, assignment: &Assignment) -> Result<Action> {
    if assignment.format == "copy" {
        return Ok(Action::Copy);
    }
    let format = formats::find(&assignment.format)?;
    let source = tensor.as_packed().ok_or_else(|| {
        Error::unsupported(format!(
            "{} values cannot be turned into {}",
            tensor.dtype,
            format.info().name
        ))
    })?;
    let params = assignment.params.params(tensor.dtype)?;
    format.check_encodes(&params)?;
    let layout = format.layout(&tensor.shape, &params)?;
    let same = source.format.info().name == format.info().name
        && source.layout.components == layout.components;
    if same
        && source.layout.params.block_size.unwrap_or_default()
            == layout.params.block_size.unwrap_or_default()
    {
        return Ok(Action::Copy);
    }
    let cut = Cut::new(
        &[source.layout.unit_weights, layout.unit_weights],
        layout.weights,
        slab_weights(tensor, slab_bytes),
    );
    Ok(Action::Encode {
        format,
        layout,
        cut,
    })
}

/// Weights in a slab of about `bytes` source bytes.
pub fn slab_weights(tensor: &Tensor, bytes: u64) -> u64 {
    let weights = shape::count_weights(&tensor.shape).unwrap_or(1).max(1);
    let scaled = u128::from(weights) * u128::from(bytes) / u128::from(tensor.stored_bytes().max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX).max(1)
}

fn copied_entries(tensor: &Tensor, target: &str) -> (Vec<Slot>, Vec<NewEntry>) {
    let mut slots = Vec::new();
    let mut entries = Vec::new();
    for (component, part) in tensor.parts.iter().enumerate() {
        let Some(part) = part else { continue };
        let name = match &tensor.packed {
            Some((_, layout)) => layout
                .components
                .get(component)
                .map(|component| component.stored_name(target)),
            None => None,
        };
        slots.push(Slot {
            component,
            entry: 0,
            late: None,
        });
        entries.push(NewEntry {
            name: name.unwrap_or_else(|| target.to_owned()),
            dtype: part.entry.dtype,
            shape: part.entry.shape.clone(),
            late: false,
        });
    }
    (slots, entries)
}

fn encoded_entries(layout: &Layout, target: &str) -> (Vec<Slot>, Vec<NewEntry>) {
    let slot = |component| Slot {
        component,
        entry: 0,
        late: None,
    };
    let entry = |component: &formats::Component| NewEntry {
        name: component.stored_name(target),
        dtype: component.dtype,
        shape: component.shape.clone(),
        late: component.span == formats::Span::WholeAtMost,
    };
    (
        (0..layout.components.len()).map(slot).collect(),
        layout.components.iter().map(entry).collect(),
    )
}

fn storable(container: Container, dtype: Dtype) -> Result<()> {
    let (storable, hint) = match container {
        Container::Safetensors => (
            dtype.in_safetensors(),
            "decode it: convert to bf16, f16 or f32",
        ),
        Container::Gguf => (
            dtype.ggml_id().is_some() && !matches!(dtype, Dtype::Unknown(_)),
            "convert to a safetensors format instead",
        ),
    };
    if storable {
        Ok(())
    } else {
        Err(Error::unsupported(format!(
            "a {} file cannot hold {dtype} values",
            container.name()
        ))
        .hint(hint))
    }
}
