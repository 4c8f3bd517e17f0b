//! One assignment: copy or encode, and the arrays it leads to.

use std::path::Path;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Encodes, Layout};
use crate::io::{Container, NewEntry};
use crate::shape;

use super::checkpoint::{Checkpoint, Tensor};
use super::derive::{as_stored, derive, folded};
use super::importance::Weighed;
use super::plan::{checkpoint_at, source_name, Action, Planned, Slot};
use super::request::{Assignment, Output};
use super::slab::{Cut, Packed};

/// Decides copy or encode for one assignment and lists the arrays it leads to.
pub fn assign(
    checkpoints: &[Arc<Checkpoint>],
    output: &Output,
    container: Container,
    slab_bytes: u64,
    assignment: &Assignment,
) -> Result<(Planned, Vec<NewEntry>)> {
    let checkpoint = checkpoint_at(checkpoints, assignment.checkpoint)?;
    let stored_name = assignment
        .rows
        .first()
        .map_or(&assignment.name, |rows| &rows.name);
    let position = checkpoint.position(stored_name)?;
    let stored = checkpoint.tensor(stored_name)?;
    let path = checkpoint.path(stored.main()?.file).to_owned();
    let locate = |error: Error| error.tensor(&assignment.name).file(&path);
    let derived = derive(checkpoint, assignment).map_err(locate)?;
    let tensor = derived.as_ref().unwrap_or(stored);
    let (action, ordered) =
        action(checkpoints, tensor, &path, slab_bytes, assignment, None).map_err(locate)?;
    let (slots, entries) = match &action {
        Action::Copy => copied_entries(ordered.as_ref().unwrap_or(tensor), &assignment.target),
        Action::Encode { layout, .. } => encoded_entries(layout, &assignment.target),
    };
    for entry in &entries {
        storable(container, entry.dtype).map_err(locate)?;
        if container == Container::Gguf {
            check_dimensions(entry.shape.len(), output.max_dimensions).map_err(locate)?;
        }
    }
    let planned = Planned {
        checkpoint: assignment.checkpoint,
        position,
        derived: ordered.or(derived),
        target: assignment.target.clone(),
        why: assignment.why.clone(),
        action,
        shard: 0,
        slots,
        shared_scale: None,
    };
    Ok((planned, entries))
}

/// What becomes of `tensor`, whose weights are rounded to the type `through` first if there is one; and the
/// tensor in another order, where the format encodes by that or its arrays are copied.
pub fn action(
    checkpoints: &[Arc<Checkpoint>],
    tensor: &Tensor,
    path: &Path,
    slab_bytes: u64,
    assignment: &Assignment,
    through: Option<Dtype>,
) -> Result<(Action, Option<Tensor>)> {
    let shape = assignment.shape.as_ref().unwrap_or(&tensor.shape);
    if assignment.format == "copy" {
        if assignment.add.is_some() {
            return Err(Error::config(
                "a number is added to decoded weights, not to copied bytes",
            ));
        }
        if through.is_some() {
            return Err(Error::config(
                "decoded weights are rounded to another type, not copied bytes",
            ));
        }
        if *shape != tensor.shape {
            return Err(Error::unsupported(format!(
                "{} is stored as several arrays and is not copied into another shape",
                source_name(tensor)
            )));
        }
        let as_stored = as_stored(tensor);
        let (Some(packed), true) = (tensor.as_packed(), as_stored.is_some()) else {
            return Ok((Action::Copy, None));
        };
        if packed.format.info().encodes == Encodes::Never {
            return Err(Error::unsupported(format!(
                "{} is stored column by column and not copied",
                source_name(tensor)
            ))
            .hint("decode it, or pack it as another format"));
        }
        return Ok((Action::Copy, as_stored));
    }
    let format = formats::find(&assignment.format)?;
    let source = tensor.as_packed().ok_or_else(|| {
        Error::unsupported(format!(
            "{} values cannot be turned into {}",
            tensor.dtype,
            format.info().name
        ))
    })?;
    let mut params = assignment.params.params(through.unwrap_or(tensor.dtype))?;
    let weighed = match &assignment.importance {
        Some(source) if format.weighs() => {
            let name = &assignment.target;
            Some(Weighed::new(checkpoints, source, name, path, shape)?)
        }
        _ => None,
    };
    // What it holds decides how the work is cut; it is loaded anew when the tensor is worked on.
    params.importance = weighed
        .as_ref()
        .map(|weighed| weighed.load(checkpoints))
        .transpose()?;
    let mut layout = format.layout(shape, &params)?;
    layout.params.importance = None;
    let same = format.info().encodes != Encodes::Never
        && assignment.add.is_none()
        && through.is_none_or(|dtype| is_exact(source, dtype))
        && source.format.info().name == format.info().name
        && source.layout.components == layout.components;
    if same
        && source.layout.params.block_size.unwrap_or_default()
            == layout.params.block_size.unwrap_or_default()
    {
        return Ok((Action::Copy, as_stored(tensor)));
    }
    format.check_encodes(&params)?;
    let layout = format.encoding(&layout)?;
    let ordered = match format.fold(&layout) {
        Some(fold) => Some(folded(tensor, fold)?),
        None => None,
    };
    let tensor = ordered.as_ref().unwrap_or(tensor);
    let action = Action::Encode {
        format,
        cut: cut(tensor, &layout, slab_bytes),
        layout: Box::new(layout),
        add: checked(assignment.add)?,
        weighed,
    };
    Ok((action, ordered))
}

/// How the work on `tensor` is cut, which is encoded by `layout`, in slabs of about `slab_bytes` source bytes.
pub fn cut(tensor: &Tensor, layout: &Layout, slab_bytes: u64) -> Cut {
    let unit = tensor
        .as_packed()
        .map_or(1, |packed| packed.layout.unit_weights);
    Cut::new(
        &[unit, layout.unit_weights],
        layout.weights,
        slab_weights(tensor, slab_bytes),
    )
}

/// Whether rounding the weights of `source` to `dtype` changes none: they are stored as such, or
/// decoding gives no more than `f32` holds.
pub fn is_exact(source: Packed<'_>, dtype: Dtype) -> bool {
    match source.layout.components.as_slice() {
        [array] => array.dtype == dtype || dtype == Dtype::F32 && array.dtype != Dtype::F64,
        _ => false,
    }
}

fn checked(add: Option<f32>) -> Result<Option<f32>> {
    match add {
        Some(add) if !add.is_finite() => Err(Error::config(format!("add is {add}"))),
        add => Ok(add),
    }
}

/// Weights in a slab of about `bytes` source bytes.
fn slab_weights(tensor: &Tensor, bytes: u64) -> u64 {
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

fn check_dimensions(count: usize, most: usize) -> Result<()> {
    if count <= most {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "{count} dimensions, but at most {most} are to be written"
    ))
    .hint("ggml reads 4; for readers that take more, raise max_dimensions"))
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
