//! The pieces of work of a run: slabs of tensors, in the order workers claim them.

use std::ops::Range;

use crate::error::Result;
use crate::formats::Layout;
use crate::shape;

use super::checkpoint::{Checkpoint, Stored, Tensor};
use super::plan::{Action, Plan, Planned};
use super::slab::{self, Pass, Scratch};

/// One piece of work: a slab of a tensor in one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Bytes of one stored array, as they are.
    Copy {
        /// Position in the plan.
        tensor: usize,
        /// Position among its slots.
        slot: usize,
        /// First byte.
        first: u64,
        /// Number of bytes.
        bytes: u64,
    },
    /// Statistics of a slab.
    Measure {
        /// Position in the plan.
        tensor: usize,
        /// Number of the slab.
        slab: u64,
    },
    /// The slab itself.
    Encode {
        /// Position in the plan.
        tensor: usize,
        /// Number of the slab.
        slab: u64,
    },
}

impl Piece {
    /// The tensor it belongs to.
    pub fn tensor(self) -> usize {
        match self {
            Piece::Copy { tensor, .. }
            | Piece::Measure { tensor, .. }
            | Piece::Encode { tensor, .. } => tensor,
        }
    }
}

/// The stored parts of the sliced components, and the bytes of `slab` in each: of one that is repeated,
/// counted on from one turn to the next.
pub fn source_ranges<'t>(
    source: &'t Tensor,
    layout: &'t Layout,
    slab: &Range<u64>,
) -> impl Iterator<Item = (&'t Stored, Range<u64>)> + use<'t> {
    let (first, count) = (slab.start, slab.end - slab.start);
    layout.sliced().filter_map(move |(position, component)| {
        let part = source.parts.get(position)?.as_ref()?;
        Some((part, component.span.range(first, count)))
    })
}

/// Reads the packed bytes of `slab` into `scratch.input`; gives their number.
pub fn read_slab(
    checkpoint: &Checkpoint,
    source: &Tensor,
    layout: &Layout,
    slab: &Range<u64>,
    scratch: &mut Scratch,
) -> Result<u64> {
    let mut read = 0;
    let ranges = source_ranges(source, layout, slab);
    for (buffer, (part, range)) in scratch.input.iter_mut().zip(ranges) {
        let bytes = range.end - range.start;
        checkpoint.read_turns(part, range.start, slab::resize(buffer, bytes)?)?;
        read += bytes;
    }
    Ok(read)
}

/// Lists the pieces of the first pass over one tensor, if there is one; gives the number of slabs that are
/// measured, in that pass or while they are encoded.
pub fn add_first_pass(tensor: usize, planned: &Planned, pieces: &mut Vec<Piece>) -> Result<usize> {
    let Action::Encode {
        format,
        layout,
        cut,
        ..
    } = &planned.action
    else {
        return Ok(0);
    };
    let slabs = cut.slabs(layout.weights);
    if Pass::that_encodes(*format, layout) == Pass::Second {
        pieces.extend((0..slabs).map(|slab| Piece::Measure { tensor, slab }));
    }
    match layout.statistics {
        Some(_) => shape::to_usize(slabs),
        None => Ok(0),
    }
}

/// Lists the pieces of one tensor, but for those of the first pass; gives their number.
pub fn add_pieces(
    plan: &Plan,
    tensor: usize,
    planned: &Planned,
    pieces: &mut Vec<Piece>,
) -> Result<usize> {
    let (_, source) = plan.source(planned)?;
    let before = pieces.len();
    match &planned.action {
        Action::Copy => {
            for (slot, place) in planned.slots.iter().enumerate() {
                let Some(Some(part)) = source.parts.get(place.component) else {
                    continue;
                };
                let step = copy_step(plan.slab_bytes, part);
                let mut first = 0;
                while first < part.entry.bytes || first == 0 {
                    let bytes = step.min(part.entry.bytes - first);
                    pieces.push(Piece::Copy {
                        tensor,
                        slot,
                        first,
                        bytes,
                    });
                    first += step;
                }
            }
        }
        Action::Encode { layout, cut, .. } => {
            let slabs = cut.slabs(layout.weights);
            pieces.extend((0..slabs).map(|slab| Piece::Encode { tensor, slab }));
            if slabs == 0 {
                // Nothing to encode, but the components that do not depend on weights are there.
                pieces.push(Piece::Copy {
                    tensor,
                    slot: 0,
                    first: 0,
                    bytes: 0,
                });
            }
        }
    }
    Ok(pieces.len() - before)
}

/// Bytes copied at a time, about `slab_bytes`: whole elements, so that big-endian ones can be turned
/// round.
pub fn copy_step(slab_bytes: u64, part: &Stored) -> u64 {
    let element = part.entry.dtype.block().map_or(1, |(_, bytes)| bytes);
    (slab_bytes / element).max(1) * element
}
