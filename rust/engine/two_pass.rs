//! Formats that need two passes, or something of the whole tensor once it is encoded: the statistics of a
//! tensor, collected slab by slab by any number of threads, and what comes of them once they are complete.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::error::Result;
use crate::formats::Layout;

use super::pool::{lock, Stop};
use super::slab::{self, Packed};

/// Layout and statistics of a tensor whose first pass is complete.
pub type Settled = (Layout, Vec<u8>);

/// The first pass over one tensor.
#[derive(Default)]
pub struct FirstPass {
    /// Slabs left.
    unmeasured: AtomicUsize,
    statistics: Mutex<Vec<u8>>,
    settled: Mutex<Option<Arc<Settled>>>,
    is_settled: Condvar,
}

impl FirstPass {
    /// A pass over `slabs` slabs.
    pub fn new(slabs: usize) -> Self {
        FirstPass {
            unmeasured: AtomicUsize::new(slabs),
            ..FirstPass::default()
        }
    }

    /// Takes what was measured of `slab`; with the last one, gives the statistics of the tensor.
    pub fn add(
        &self,
        target: Packed<'_>,
        slab: &Range<u64>,
        measured: &[u8],
    ) -> Result<Option<Vec<u8>>> {
        let Some(span) = target.layout.statistics else {
            return Ok(None);
        };
        let part = slab::span_bytes(span, slab)?;
        {
            let mut statistics = lock(&self.statistics);
            slab::resize(&mut statistics, span.range(0, target.layout.weights).end)?;
            if let (Some(place), Some(measured)) =
                (statistics.get_mut(part.clone()), measured.get(..part.len()))
            {
                place.copy_from_slice(measured);
            }
        }
        if self.unmeasured.fetch_sub(1, Ordering::AcqRel) != 1 {
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut *lock(&self.statistics))))
    }

    /// Takes what was measured of `slab` while it was encoded, if something was.
    pub fn add_encoded(
        &self,
        target: Packed<'_>,
        slab: &Range<u64>,
        measured: &[u8],
    ) -> Result<()> {
        match self.add(target, slab, measured)? {
            Some(statistics) => self.settle(target, statistics),
            None => Ok(()),
        }
    }

    /// Completes the pass: `statistics` are those of the tensor, or of all that share its scale.
    pub fn settle(&self, target: Packed<'_>, mut statistics: Vec<u8>) -> Result<()> {
        let mut layout = target.layout.clone();
        target.format.settle(&mut layout, &mut statistics)?;
        *lock(&self.settled) = Some(Arc::new((layout, statistics)));
        self.is_settled.notify_all();
        Ok(())
    }

    /// Waits until the pass is complete. Pieces are claimed in order, so the slabs of the first pass, and
    /// of those of tensors that share the scale, are all done or being worked on by threads that wait
    /// for nothing.
    pub fn wait(&self, stop: &Stop) -> Result<Arc<Settled>> {
        let mut settled = lock(&self.settled);
        loop {
            if let Some(settled) = settled.as_ref() {
                return Ok(Arc::clone(settled));
            }
            stop.check()?;
            let waited = self
                .is_settled
                .wait_timeout(settled, Duration::from_millis(20));
            settled = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets go of layout and statistics, which are `None` where there was no first pass.
    pub fn take(&self) -> Option<Arc<Settled>> {
        lock(&self.settled).take()
    }
}
