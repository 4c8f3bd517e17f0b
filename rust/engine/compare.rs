//! Compares tensors of two checkpoints, in any two formats, slab by slab.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::formats::{self, ErrorSums};

use super::checkpoint::{Checkpoint, Tensor};
use super::pool::{self, lock, Stop};
use super::read::SlabReader;
use super::run::Progress;
use super::slab::Cut;

/// Weights compared at a time.
const SLAB_WEIGHTS: u64 = 1 << 20;

/// Error sums of each pair of tensors, the second against the first; in the order of `pairs`.
pub fn compare(
    a: &Checkpoint,
    b: &Checkpoint,
    pairs: &[(String, String)],
    threads: usize,
    tick: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Vec<ErrorSums>> {
    let mut work = Vec::new();
    let mut total_bytes = 0;
    for (pair, (name_a, name_b)) in pairs.iter().enumerate() {
        let (x, y) = (a.tensor(name_a)?, b.tensor(name_b)?);
        let cut = cut(x, y)?;
        total_bytes += x.stored_bytes() + y.stored_bytes();
        let weights = crate::shape::count_weights(&x.shape)?;
        work.extend(
            (0..cut.slabs(weights)).map(|slab| (pair, x, y, cut, cut.slab_range(slab, weights))),
        );
    }
    let read_bytes = AtomicU64::new(0);
    let parts: Mutex<Vec<(usize, ErrorSums)>> = Mutex::new(Vec::new());
    let progress = || Progress {
        read_bytes: read_bytes.load(Ordering::Relaxed),
        total_bytes,
        ..Progress::default()
    };
    pool::run(
        threads,
        work.len(),
        &Stop::default(),
        || (SlabReader::default(), SlabReader::default()),
        |(reader_a, reader_b), position, stop| {
            let Some((_, x, y, cut, slab)) = work.get(position) else {
                return Ok(());
            };
            let read = reader_a.fill(a, x, slab)? + reader_b.fill(b, y, slab)?;
            read_bytes.fetch_add(read, Ordering::Relaxed);
            let mut sums = ErrorSums::default();
            for tile in super::slab::tiles(slab, cut.tile) {
                stop.check()?;
                sums.merge(&formats::error_sums(
                    reader_a.decode(x, slab, &tile)?,
                    reader_b.decode(y, slab, &tile)?,
                ));
            }
            lock(&parts).push((position, sums));
            Ok(())
        },
        &mut || tick(&progress()),
    )?;
    let mut parts = std::mem::take(&mut *lock(&parts));
    parts.sort_unstable_by_key(|(position, _)| *position);
    let mut sums = vec![ErrorSums::default(); pairs.len()];
    for (position, part) in parts {
        let pair = work.get(position).map(|(pair, ..)| *pair);
        if let Some(sums) = pair.and_then(|pair| sums.get_mut(pair)) {
            sums.merge(&part);
        }
    }
    Ok(sums)
}

fn cut(x: &Tensor, y: &Tensor) -> Result<Cut> {
    let (Some(packed_x), Some(packed_y)) = (x.as_packed(), y.as_packed()) else {
        return Err(Error::unsupported(format!(
            "{} and {} values are not compared",
            x.dtype, y.dtype
        ))
        .tensor(&x.name));
    };
    if packed_x.layout.weights != packed_y.layout.weights {
        return Err(
            Error::checkpoint(format!("shapes {:?} and {:?} differ", x.shape, y.shape))
                .tensor(&x.name),
        );
    }
    let units = [packed_x.layout.unit_weights, packed_y.layout.unit_weights];
    Ok(Cut::new(&units, packed_x.layout.weights, SLAB_WEIGHTS))
}
