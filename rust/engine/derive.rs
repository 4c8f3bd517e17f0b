//! Tensors that no file holds as they are: rows of stored ones joined, or a stored one in another
//! shape or transposed. They are tensors like any other to the rest of the engine; only their bytes are
//! gathered, or, where what is stored cannot be taken apart by rows, their weights.

use std::borrow::Cow;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::Fold;
use crate::io::Entry;
use crate::shape;

use super::checkpoint::{plain_tensor, Checkpoint, Made, Origin, Stored, Tensor};
use super::decoded::Decoded;
use super::gather::{Gather, Order};
use super::plan::source_name;
use super::request::{Assignment, Rows};
use super::transpose::Transposed;

/// The tensor that `assignment` asks for, if it is not simply a stored one.
pub fn derive(checkpoint: &Checkpoint, assignment: &Assignment) -> Result<Option<Tensor>> {
    let mut tensor = match (assignment.rows.as_slice(), &assignment.shape) {
        ([], None) => return Ok(None),
        ([], Some(wanted)) => {
            let source = checkpoint.tensor(&assignment.name)?;
            check_weights(source, wanted)?;
            match whole_array(source) {
                Some(array) if keeps_blocks(array.entry.dtype, wanted) => reshaped(array, wanted)?,
                // Its weights are taken in order, and it cannot be copied into another shape.
                _ => return Ok(None),
            }
        }
        (rows, wanted) => {
            let is_copied = assignment.format == "copy";
            join(checkpoint, rows, wanted.as_deref(), is_copied)?
        }
    };
    tensor.name.clone_from(&assignment.name);
    Ok(Some(tensor))
}

/// `tensor` with rows and columns exchanged.
pub fn transpose(tensor: &Tensor) -> Result<Tensor> {
    let array = match whole_array(tensor) {
        Some(array) => array.clone(),
        None => decoded(tensor)?,
    };
    in_place_of(tensor, turned(Transposed::new(array)?))
}

/// An array of the decoded weights.
fn decoded(tensor: &Tensor) -> Result<Stored> {
    Decoded::new(tensor.clone())?.stored()
}

/// The tensor that `array`, made of `tensor`, is by itself.
fn in_place_of(tensor: &Tensor, array: Stored) -> Result<Tensor> {
    let mut result = plain_tensor(array)?;
    result.name.clone_from(&tensor.name);
    result.dtype = tensor.dtype;
    Ok(result)
}

/// An array of what is transposed.
pub fn turned(matrix: Transposed) -> Stored {
    let mut result = matrix.stored().clone();
    result.entry.shape = matrix.shape();
    result.made = Some(Made::Transposed(Arc::new(matrix)));
    result
}

/// `tensor` with its arrays as the file holds them, where some of a packed one are read with rows and columns
/// exchanged; `None` for all others.
pub fn as_stored(tensor: &Tensor) -> Option<Tensor> {
    let (format, layout) = tensor.packed.as_ref()?;
    let mut result = None;
    for (index, part) in tensor.parts.iter().enumerate() {
        let made = part.as_ref().and_then(|part| part.made.as_ref());
        if let (Some(Made::Transposed(matrix)), true) =
            (made, format.transposed_element(layout, index).is_some())
        {
            let parts = &mut result.get_or_insert_with(|| tensor.clone()).parts;
            if let Some(place) = parts.get_mut(index) {
                *place = Some(matrix.stored().clone());
            }
        }
    }
    result
}

/// `tensor` with its weights in the order of `fold`. Its shape says nothing about that order.
pub fn folded(tensor: &Tensor, fold: Fold) -> Result<Tensor> {
    let row = (fold.row_weights(), true);
    let stored = whole_array(tensor)
        .and_then(|array| Some((array.clone(), row_bytes(array.entry.dtype, row).ok()?)));
    let (mut array, row_bytes) = match stored {
        Some(stored) => stored,
        None => (decoded(tensor)?, row_bytes(Dtype::F32, row)?),
    };
    let mut gather = Gather::default();
    let order = Order::new(fold.rows(), 1, fold.parts())?;
    gather.add(&array, row_bytes, 0, fold.rows(), Some(order))?;
    if gather.bytes() != array.entry.bytes {
        return Err(Error::Internal(format!(
            "{} bytes in another order for {}",
            gather.bytes(),
            array.entry.bytes
        )));
    }
    array.made = Some(Made::Rows(Arc::new(gather)));
    in_place_of(tensor, array)
}

/// The one array of a tensor that is stored as one.
fn whole_array(tensor: &Tensor) -> Option<&Stored> {
    match tensor.parts.as_slice() {
        [Some(array)] => Some(array),
        _ => None,
    }
}

/// Whether the rows of a tensor of this shape are whole blocks of its type.
fn keeps_blocks(dtype: Dtype, wanted: &[u64]) -> bool {
    let row = wanted.last().copied().unwrap_or(1);
    dtype
        .block()
        .is_none_or(|(weights, _)| row.is_multiple_of(weights))
}

fn check_weights(source: &Tensor, wanted: &[u64]) -> Result<()> {
    let (there, asked) = (
        shape::count_weights(&source.shape)?,
        shape::count_weights(wanted)?,
    );
    if there == asked {
        return Ok(());
    }
    Err(Error::config(format!(
        "shape {wanted:?} holds {asked} weights, the tensor {there}"
    ))
    .tensor(&source.name))
}

fn reshaped(array: &Stored, wanted: &[u64]) -> Result<Tensor> {
    let mut array = array.clone();
    array.entry.dtype.byte_len(wanted)?;
    array.entry.shape = wanted.to_vec();
    plain_tensor(array)
}

/// Rows of one tensor, resolved.
struct Run<'c> {
    array: Cow<'c, Stored>,
    /// Weights of a row, and whether the tensor has at least two dimensions.
    row: (u64, bool),
    first: u64,
    count: u64,
    order: Option<Order>,
}

/// The rows, as they are stored where that can be, and decoded otherwise.
fn join(
    checkpoint: &Checkpoint,
    rows: &[Rows],
    wanted: Option<&[u64]>,
    is_copied: bool,
) -> Result<Tensor> {
    let sources: Vec<&Tensor> = rows
        .iter()
        .map(|part| checkpoint.tensor(&part.name))
        .collect::<Result<_>>()?;
    let Some(&first) = sources.first() else {
        return Err(Error::Internal(String::from("no rows to join")));
    };
    let as_stored = is_copied || sources.iter().all(|source| joins_as_stored(first, source));
    let mut runs = Vec::with_capacity(rows.len());
    for (part, source) in rows.iter().zip(&sources) {
        let array = match as_stored {
            true => stored_rows(source),
            false => weights_of(source).map(Cow::Owned),
        };
        let run = array.and_then(|array| run(source, array, part));
        runs.push(run.map_err(|error| {
            let file = source.main().map_or(0, |array| array.file);
            error.tensor(&part.name).file(checkpoint.path(file))
        })?);
    }
    let mut tensor = joined(&runs, wanted)?;
    if !as_stored {
        let is_one = sources.iter().all(|source| source.dtype == first.dtype);
        tensor.dtype = if is_one { first.dtype } else { Dtype::F32 };
        tensor.origin = Some(origin(&sources, &runs));
    }
    Ok(tensor)
}

/// What files hold of the rows.
fn origin(sources: &[&Tensor], runs: &[Run<'_>]) -> Origin {
    let mut formats: Vec<String> = Vec::new();
    let mut bytes = 0u64;
    for (source, run) in sources.iter().zip(runs) {
        let name = source_name(source);
        if !formats.contains(&name) {
            formats.push(name);
        }
        let rows = row_of(source).map_or(1, |(rows, _)| rows.max(1));
        let part = u128::from(source.file_bytes()) * u128::from(run.count) / u128::from(rows);
        bytes = bytes.saturating_add(u64::try_from(part).unwrap_or(u64::MAX));
    }
    Origin {
        formats: formats.join(", "),
        bytes,
    }
}

/// Whether rows of `source` stand behind rows of `first` as they are stored.
fn joins_as_stored(first: &Tensor, source: &Tensor) -> bool {
    match (whole_array(first), whole_array(source)) {
        (Some(first), Some(array)) => {
            first.entry.dtype == array.entry.dtype
                && row_of(source).is_ok_and(|(_, row)| row_bytes(array.entry.dtype, row).is_ok())
        }
        _ => false,
    }
}

/// The array whose rows are those of the tensor.
fn stored_rows(source: &Tensor) -> Result<Cow<'_, Stored>> {
    match whole_array(source) {
        Some(array) => Ok(Cow::Borrowed(array)),
        None => Err(Error::unsupported(format!(
            "rows of {} are not joined as they are stored, in several arrays",
            source_name(source)
        ))
        .hint("decode them: bf16, f16, f32 or another format in place of copy")),
    }
}

/// An array of the weights in `f32`.
fn weights_of(source: &Tensor) -> Result<Stored> {
    match whole_array(source) {
        Some(array) if array.entry.dtype == Dtype::F32 => Ok(array.clone()),
        _ => decoded(source),
    }
}

/// Number of rows, and of what one consists.
fn row_of(tensor: &Tensor) -> Result<(u64, (u64, bool))> {
    Ok(match tensor.shape.as_slice() {
        [] => (1, (1, false)),
        [length] => (*length, (1, false)),
        [outer @ .., length] => (shape::count_weights(outer)?, (*length, true)),
    })
}

fn joined(runs: &[Run<'_>], wanted: Option<&[u64]>) -> Result<Tensor> {
    let Some(first) = runs.first() else {
        return Err(Error::Internal(String::from("no rows to join")));
    };
    let dtype = first.array.entry.dtype;
    let row_weights = first.row.0;
    let row_bytes = row_bytes(dtype, first.row)?;
    let mut gather = Gather::default();
    let mut count = 0;
    for run in runs {
        let other = &run.array.entry;
        if other.dtype != dtype {
            return Err(Error::unsupported(format!(
                "rows of \"{}\" are {}, those of \"{}\" {dtype}: rows of one type are copied",
                other.name, other.dtype, first.array.entry.name
            ))
            .hint("convert the checkpoint to one type first"));
        }
        if run.row.0 != row_weights {
            return Err(Error::config(format!(
                "rows of \"{}\" have {} weights, those of \"{}\" {row_weights}",
                other.name, run.row.0, first.array.entry.name
            )));
        }
        gather.add(&run.array, row_bytes, run.first, run.count, run.order)?;
        count = shape::add(count, run.count, "number of rows")?;
    }
    let natural = match runs.iter().any(|run| run.row.1) {
        true => vec![count, row_weights],
        false => vec![count],
    };
    let result = wanted.unwrap_or(&natural);
    let (there, asked) = (
        shape::count_weights(&natural)?,
        shape::count_weights(result)?,
    );
    if there != asked {
        return Err(Error::config(format!(
            "shape {result:?} holds {asked} weights, the rows {there}"
        )));
    }
    let bytes = dtype.byte_len(result)?;
    if bytes != gather.bytes() {
        return Err(Error::Internal(format!(
            "{} bytes of rows for {bytes} of shape {result:?}",
            gather.bytes()
        )));
    }
    plain_tensor(Stored {
        file: first.array.file,
        entry: Entry {
            name: first.array.entry.name.clone(),
            dtype,
            shape: result.to_vec(),
            offset: first.array.entry.offset,
            bytes,
        },
        made: Some(Made::Rows(Arc::new(gather))),
    })
}

fn run<'c>(source: &Tensor, array: Cow<'c, Stored>, part: &Rows) -> Result<Run<'c>> {
    let (total, row) = row_of(source)?;
    row_bytes(array.entry.dtype, row)?;
    let left = total.checked_sub(part.first).ok_or_else(|| {
        Error::config(format!(
            "rows from {} on, but the tensor has {total}",
            part.first
        ))
    })?;
    let count = part.count.unwrap_or(left);
    if count > left {
        return Err(Error::config(format!(
            "rows {}..{}, but the tensor has {total}",
            part.first,
            part.first.saturating_add(count)
        )));
    }
    let order = part
        .interleave
        .map(|interleave| Order::new(count, interleave.groups, interleave.parts))
        .transpose()?;
    Ok(Run {
        array,
        row,
        first: part.first,
        count,
        order,
    })
}

/// Bytes of a row, which must be whole blocks.
fn row_bytes(dtype: Dtype, (weights, is_matrix): (u64, bool)) -> Result<u64> {
    match dtype.block() {
        Some((1, bytes)) => shape::multiply(weights, bytes, "bytes of a row"),
        Some(_) if is_matrix => dtype.byte_len(&[weights]),
        Some(_) => Err(Error::unsupported(format!(
            "the weights of a {dtype} vector are packed together and cannot be taken apart"
        ))),
        None => Err(Error::unsupported(format!(
            "rows of {dtype} are not joined"
        ))),
    }
}
