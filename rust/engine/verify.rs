//! Reads every stored byte of a checkpoint and looks for scales that cannot be meant.

use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::formats;

use super::checkpoint::{Checkpoint, Stored};
use super::pool::{self, lock, Stop};
use super::run::Progress;
use super::slab;

/// Bytes read at a time, before rounding to whole blocks.
const STEP_BYTES: u64 = 4 << 20;

/// A stored array with a block that is not valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Name of the array.
    pub tensor: String,
    /// Its first block, or element, that is not valid.
    pub block: u64,
    /// What is wrong with it.
    pub fault: &'static str,
}

/// A run of bytes of one array.
struct Step<'c> {
    stored: &'c Stored,
    first: u64,
    bytes: u64,
    block_bytes: u64,
}

/// Looks through every array; gives the first invalid block of each, in file order.
pub fn verify(
    checkpoint: &Checkpoint,
    threads: usize,
    tick: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Vec<Problem>> {
    let mut steps = Vec::new();
    for stored in checkpoint.tensors.iter().flat_map(|tensor| tensor.stored()) {
        let Some((_, block_bytes)) = stored.entry.dtype.block() else {
            continue;
        };
        let step = (STEP_BYTES / block_bytes).max(1) * block_bytes;
        let mut first = 0;
        while first < stored.entry.bytes {
            let bytes = step.min(stored.entry.bytes - first);
            steps.push(Step {
                stored,
                first,
                bytes,
                block_bytes,
            });
            first += bytes;
        }
    }
    let total_bytes = steps.iter().map(|step| step.bytes).sum();
    let progress = Mutex::new(Progress {
        total_bytes,
        ..Progress::default()
    });
    let found: Mutex<Vec<(usize, Problem)>> = Mutex::new(Vec::new());
    pool::run(
        threads,
        steps.len(),
        &Stop::default(),
        Vec::new,
        |buffer: &mut Vec<u8>, position, stop| {
            stop.check()?;
            let Some(step) = steps.get(position) else {
                return Ok(());
            };
            let bytes = slab::resize(buffer, step.bytes)?;
            checkpoint.read(step.stored, step.first, bytes)?;
            lock(&progress).read_bytes += step.bytes;
            let Some((block, fault)) = formats::first_invalid(step.stored.entry.dtype, bytes)
            else {
                return Ok(());
            };
            let problem = Problem {
                tensor: step.stored.entry.name.clone(),
                block: step.first / step.block_bytes + block as u64,
                fault,
            };
            lock(&found).push((position, problem));
            Ok(())
        },
        &mut || {
            let now = lock(&progress).clone();
            tick(&now)
        },
    )?;
    let mut found = found
        .into_inner()
        .map_err(|_| Error::Internal(String::from("a worker panicked")))?;
    found.sort_by_key(|(position, _)| *position);
    let mut problems: Vec<Problem> = found.into_iter().map(|(_, problem)| problem).collect();
    problems.dedup_by(|later, first| later.tensor == first.tensor);
    Ok(problems)
}
