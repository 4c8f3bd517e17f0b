//! How much memory a plan needs, and how it is made to fit.

use crate::error::{Error, Result};
use crate::formats::{self, Layout};

use super::assign;
use super::checkpoint::Stored;
use super::importance::Weighed;
use super::plan::{checkpoint_at, Action, Plan, Planned};

/// Smallest slab that a tight memory limit leads to.
const SMALLEST_SLAB_BYTES: u64 = 64 << 10;

impl Plan {
    /// Buffers and statistics at their largest.
    pub fn memory_bytes(&self) -> u64 {
        let worker = self
            .tensors
            .iter()
            .map(|planned| self.worker_bytes(planned))
            .max()
            .unwrap_or(0);
        let mut held: Vec<u64> = self
            .tensors
            .iter()
            .map(held_bytes)
            .filter(|bytes| *bytes > 0)
            .collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        let held: u64 = held.iter().take(self.threads + 1).sum();
        worker * self.threads as u64 + held
    }

    /// Chooses slabs small enough for the memory limit, or refuses.
    pub(super) fn fit_memory(&mut self) -> Result<()> {
        let most = self.options.max_memory_bytes;
        while self.memory_bytes() > most {
            if self.options.slab_bytes.is_none() && self.slab_bytes > SMALLEST_SLAB_BYTES {
                self.slab_bytes /= 2;
                self.cut_again()?;
            } else if self.options.threads.is_none() && self.threads > 1 {
                self.threads -= 1;
            } else {
                let need = self.memory_bytes();
                let widest = self
                    .tensors
                    .iter()
                    .max_by_key(|planned| self.worker_bytes(planned) + held_bytes(planned));
                let name = widest.map_or(String::new(), |planned| planned.target.clone());
                return Err(Error::config(format!(
                    "the work needs {need} bytes of memory, more than the {most} allowed"
                ))
                .tensor(&name)
                .hint("raise --max-memory, or use fewer --threads"));
            }
        }
        Ok(())
    }

    fn cut_again(&mut self) -> Result<()> {
        for planned in &mut self.tensors {
            let checkpoint = checkpoint_at(&self.checkpoints, planned.checkpoint)?;
            let tensor = planned.tensor(checkpoint)?;
            let again = match &planned.action {
                Action::Encode { layout, .. } => assign::cut(tensor, layout, self.slab_bytes),
                Action::Copy => continue,
            };
            if let Action::Encode { cut, .. } = &mut planned.action {
                *cut = again;
            }
        }
        Ok(())
    }

    /// Buffers of a worker at this tensor: slab in, slab out, two tiles of `f32`, and what gathering
    /// rows takes.
    fn worker_bytes(&self, planned: &Planned) -> u64 {
        let made = match self.source(planned) {
            Ok((_, tensor)) => tensor.stored().map(Stored::buffer_bytes).max(),
            Err(_) => None,
        };
        made.unwrap_or(0)
            + match (&planned.action, self.source(planned)) {
                (Action::Encode { layout, cut, .. }, Ok((_, tensor))) => {
                    let source = tensor
                        .as_packed()
                        .map_or(0, |packed| sliced_bytes(packed.layout, cut.slab));
                    source + sliced_bytes(layout, cut.slab) + cut.tile * 8
                }
                (Action::Copy, Ok((_, tensor))) => {
                    let widest = tensor.stored().map(|part| part.entry.bytes).max();
                    self.slab_bytes.min(widest.unwrap_or(0))
                }
                (_, Err(_)) => 0,
            }
    }
}

fn sliced_bytes(layout: &Layout, weights: u64) -> u64 {
    let bytes = |(_, component): (usize, &formats::Component)| component.span.range(0, weights).end;
    layout.sliced().map(bytes).sum()
}

/// Statistics and importance of a tensor, held while it is worked on.
fn held_bytes(planned: &Planned) -> u64 {
    match &planned.action {
        Action::Encode {
            layout, weighed, ..
        } => {
            let statistics = layout
                .statistics
                .map_or(0, |span| span.range(0, layout.weights).end);
            statistics + weighed.as_ref().map_or(0, Weighed::bytes)
        }
        Action::Copy => 0,
    }
}
