//! The keeper of a run: one thread that forces finished data to the disk, writes the journal, and
//! gives a complete shard its header. Workers never wait for the disk; because the keeper syncs in
//! small steps, little is left to wait for at the end.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::formats::ErrorSums;
use crate::io::file::FileSink;

use super::journal::{pack_sums, unpack_sums, Journal, Line};
use super::plan::{Plan, Shard};
use super::pool::{lock, Stop};

/// Longest time a finished tensor waits for its line in the journal.
const JOURNAL_INTERVAL: Duration = Duration::from_secs(1);
/// Bytes written that lead to a sync without waiting for that time.
const SYNC_BYTES: u64 = 128 << 20;

/// A tensor whose bytes are all written.
#[derive(Debug, Clone, Default)]
pub struct Finished {
    /// Late components, by component index.
    pub late: Vec<(usize, Vec<u8>)>,
    /// Error sums, for tensors that were encoded and measured.
    pub sums: Option<ErrorSums>,
}

/// How far a run is: what an earlier one left, and what the keeper gives back.
#[derive(Debug, Default)]
pub struct Done {
    /// What is finished, by tensor.
    pub tensors: Vec<Option<Finished>>,
    /// Final length of each sealed shard.
    pub shards: Vec<Option<u64>>,
}

/// The open weights files of a run, opened when first written to and closed when sealed.
pub struct Sinks {
    content: PathBuf,
    open: Vec<Mutex<Option<Arc<FileSink>>>>,
}

impl Sinks {
    /// Sinks below the folder `content`.
    pub fn new(plan: &Plan, content: PathBuf) -> Self {
        Sinks {
            content,
            open: plan.shards.iter().map(|_| Mutex::new(None)).collect(),
        }
    }

    /// Path of a shard while it is built.
    pub fn path(&self, shard: &Shard) -> PathBuf {
        self.content.join(&shard.path)
    }

    /// Creates a shard's file and reserves its space.
    pub fn reserve(&self, shard: &Shard) -> Result<()> {
        let path = self.path(shard);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| Error::io("cannot create", folder, error))?;
        }
        if path.exists() {
            std::fs::remove_file(&path)
                .map_err(|error| Error::io("cannot remove", &path, error))?;
        }
        FileSink::create(&path)?.reserve(shard.layout.total_bytes)
    }

    /// The file of shard `index`.
    pub fn get(&self, plan: &Plan, index: usize) -> Result<Arc<FileSink>> {
        let (Some(slot), Some(shard)) = (self.open.get(index), plan.shards.get(index)) else {
            return Err(Error::Internal(format!("no shard {index}")));
        };
        let mut slot = lock(slot);
        match slot.as_ref() {
            Some(sink) => Ok(Arc::clone(sink)),
            None => {
                let sink = Arc::new(FileSink::open_existing(&self.path(shard))?);
                *slot = Some(Arc::clone(&sink));
                Ok(sink)
            }
        }
    }

    fn close(&self, index: usize) {
        if let Some(slot) = self.open.get(index) {
            lock(slot).take();
        }
    }
}

/// State of the keeper's thread.
pub struct Keeper<'r> {
    /// What is carried out.
    pub plan: &'r Plan,
    /// Weights files.
    pub sinks: &'r Sinks,
    /// Where finished work is recorded.
    pub journal: &'r mut Journal,
    /// Bytes the workers have written so far.
    pub written_bytes: &'r AtomicU64,
    /// How far the run is; filled from an earlier run's journal.
    pub done: Done,
}

impl Keeper<'_> {
    /// Works until the workers have hung up, or `stop` is set.
    pub fn keep(mut self, inbox: &Receiver<(usize, Finished)>, stop: &Stop) -> Result<Done> {
        let outcome = self.receive(inbox, stop);
        if outcome.is_err() {
            stop.set();
        }
        outcome.map(|()| self.done)
    }

    fn receive(&mut self, inbox: &Receiver<(usize, Finished)>, stop: &Stop) -> Result<()> {
        // Shards that an earlier run had filled but not sealed.
        self.seal_complete()?;
        let mut waiting: Vec<usize> = Vec::new();
        let mut last = Instant::now();
        let mut synced_bytes = 0;
        loop {
            let message = inbox.recv_timeout(Duration::from_millis(100));
            let over = matches!(message, Err(RecvTimeoutError::Disconnected));
            let mut complete = None;
            if let Ok((tensor, finished)) = message {
                if let Some(slot) = self.done.tensors.get_mut(tensor) {
                    *slot = Some(finished);
                    waiting.push(tensor);
                }
                complete = self
                    .shard_of(tensor)
                    .filter(|shard| self.is_complete(*shard));
            }
            let written_bytes = self.written_bytes.load(Ordering::Relaxed);
            let due =
                last.elapsed() >= JOURNAL_INTERVAL || written_bytes - synced_bytes >= SYNC_BYTES;
            if over || due || complete.is_some() {
                self.record(&mut waiting)?;
                last = Instant::now();
                synced_bytes = written_bytes;
            }
            if let (Some(shard), Ok(())) = (complete, stop.check()) {
                self.seal(shard)?;
            }
            if over {
                return Ok(());
            }
        }
    }

    /// Forces the shards of the `waiting` tensors to the disk, then writes their lines.
    fn record(&mut self, waiting: &mut Vec<usize>) -> Result<()> {
        if self.plan.options.sync {
            let mut shards: Vec<usize> = waiting
                .iter()
                .filter_map(|tensor| self.shard_of(*tensor))
                .collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                if self.done.shards.get(shard).is_some_and(Option::is_none) {
                    self.sinks.get(self.plan, shard)?.sync_data()?;
                }
            }
        }
        let lines: Vec<Line> = waiting
            .drain(..)
            .filter_map(|tensor| {
                let done = self.done.tensors.get(tensor)?.as_ref()?;
                Some(Line::Tensor {
                    tensor,
                    late: done.late.clone(),
                    sums: done.sums.as_ref().and_then(pack_sums),
                })
            })
            .collect();
        if lines.is_empty() {
            return Ok(());
        }
        self.journal.append(&lines)
    }

    fn shard_of(&self, tensor: usize) -> Option<usize> {
        self.plan.tensors.get(tensor).map(|planned| planned.shard)
    }

    fn seal_complete(&mut self) -> Result<()> {
        for shard in 0..self.plan.shards.len() {
            if self.is_complete(shard) {
                self.seal(shard)?;
            }
        }
        Ok(())
    }

    fn is_complete(&self, shard: usize) -> bool {
        let unsealed = self.done.shards.get(shard).is_some_and(Option::is_none);
        let tensors = self
            .plan
            .shards
            .get(shard)
            .map(|shard| shard.tensors.clone());
        unsealed
            && tensors
                .and_then(|tensors| self.done.tensors.get(tensors))
                .is_some_and(|finished| finished.iter().all(Option::is_some))
    }

    /// Writes what was late, forces the data to the disk, and only then writes the header: until
    /// then the file begins with zeros, which every reader refuses.
    fn seal(&mut self, index: usize) -> Result<()> {
        let Some(shard) = self.plan.shards.get(index) else {
            return Ok(());
        };
        let sink = self.sinks.get(self.plan, index)?;
        let late = self.late_bytes(shard);
        let mut bytes = shard.layout.total_bytes;
        if let Some(start) = late_start(shard) {
            let joined: Vec<u8> = late
                .iter()
                .flat_map(|bytes| bytes.iter().copied())
                .collect();
            sink.write_at(start, &joined)?;
            bytes = start + joined.len() as u64;
            sink.truncate(bytes)?;
        }
        if self.plan.options.sync {
            sink.sync_data()?;
        }
        let lengths: Vec<u64> = late.iter().map(|bytes| bytes.len() as u64).collect();
        let header = shard
            .layout
            .header(&lengths)
            .map_err(|error| error.file(&shard.path))?;
        sink.write_at(0, &header)?;
        if self.plan.options.sync {
            sink.sync_all()?;
        }
        self.sinks.close(index);
        if let Some(slot) = self.done.shards.get_mut(index) {
            *slot = Some(bytes);
        }
        self.journal.append(&[Line::Shard {
            shard: index,
            bytes,
        }])
    }

    /// The late components of a shard, in the order of its file layout.
    fn late_bytes(&self, shard: &Shard) -> Vec<Vec<u8>> {
        let mut late = vec![Vec::new(); shard.late];
        for tensor in shard.tensors.clone() {
            let (Some(planned), Some(Some(done))) =
                (self.plan.tensors.get(tensor), self.done.tensors.get(tensor))
            else {
                continue;
            };
            for slot in &planned.slots {
                let found = done
                    .late
                    .iter()
                    .find(|(component, _)| *component == slot.component);
                if let (Some(position), Some((_, bytes))) = (slot.late, found) {
                    if let Some(place) = late.get_mut(position) {
                        bytes.clone_into(place);
                    }
                }
            }
        }
        late
    }
}

/// First byte of a shard's late entries.
fn late_start(shard: &Shard) -> Option<u64> {
    let entries = shard.layout.entries().iter().zip(&shard.layout.offsets);
    entries
        .filter(|(entry, _)| entry.late)
        .map(|(_, offset)| *offset)
        .min()
}

/// What a journal's lines say is finished.
pub fn read_lines(plan: &Plan, lines: Vec<Line>) -> Done {
    let mut done = Done {
        tensors: plan.tensors.iter().map(|_| None).collect(),
        shards: plan.shards.iter().map(|_| None).collect(),
    };
    for line in lines {
        match line {
            Line::Tensor { tensor, late, sums } => {
                if let Some(slot) = done.tensors.get_mut(tensor) {
                    let sums = sums.map(unpack_sums);
                    *slot = Some(Finished { late, sums });
                }
            }
            Line::Shard { shard, bytes } => {
                if let Some(slot) = done.shards.get_mut(shard) {
                    *slot = Some(bytes);
                }
            }
            Line::Begin { .. } | Line::Committing { .. } => {}
        }
    }
    done
}

/// What a journal's lines say is finished, as far as the files bear it out: a shard that is not
/// there at its full length is done anew.
pub fn restore(plan: &Plan, sinks: &Sinks, lines: Vec<Line>) -> Done {
    let mut done = read_lines(plan, lines);
    for (shard, sealed) in plan.shards.iter().zip(&mut done.shards) {
        let tensors = done
            .tensors
            .get_mut(shard.tensors.clone())
            .unwrap_or_default();
        let expected_bytes = sealed.unwrap_or(shard.layout.total_bytes);
        let there = file_bytes(&sinks.path(shard)) == Some(expected_bytes);
        let recorded = sealed.is_none() || tensors.iter().all(Option::is_some);
        if !(there && recorded) {
            *sealed = None;
            tensors.fill(None);
        }
    }
    done
}

fn file_bytes(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|metadata| metadata.len())
}
