//! Carries a plan out: workers fill the shards slab by slab, a keeper forces them to the disk and
//! keeps the journal, and the finished content takes the destination's place in one step.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::formats::{ErrorSums, Importance, Layout};

use super::carry::Keep;
use super::checkpoint::{Stored, Tensor};
use super::extra;
use super::journal::{Journal, Line};
use super::keeper::{self, Done, Finished, Keeper, Sinks};
use super::leftovers::{self, Leftover};
use super::pieces::{add_first_pass, add_pieces, read_slab, source_ranges, Piece};
use super::plan::{Action, Plan, Planned, Slot};
use super::pool::{self, lock, Stop};
use super::preflight;
use super::report::{Report, Totals};
use super::shared_scale::Joined;
use super::slab::{self, Packed, Pass, Scratch, Task};
use super::two_pass::FirstPass;
use super::workspace::Workspace;

/// How a run treats what it finds.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunChoices {
    /// Replace an existing destination, once the new one is complete.
    pub overwrite: bool,
    /// Go on from what an earlier, interrupted run of the same plan left.
    pub resume: bool,
}

/// How far a run is.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Bytes read from weights files, repeated passes included.
    pub read_bytes: u64,
    /// Bytes that will have been read.
    pub total_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// A tensor being worked on.
    pub tensor: String,
}

/// What workers share about one tensor.
#[derive(Default)]
struct TensorState {
    /// Pieces left, without those of the first pass.
    remaining: AtomicUsize,
    first_pass: FirstPass,
    /// Importance of the columns, from the first slab on.
    importance: Mutex<Option<Importance>>,
    /// Error sums by slab; they are added up in that order.
    sums: Mutex<Vec<(u64, ErrorSums)>>,
}

struct Run<'r> {
    plan: &'r Plan,
    sinks: &'r Sinks,
    pieces: Vec<Piece>,
    states: Vec<TensorState>,
    /// First passes over tensors that share a scale.
    joined: Vec<Joined>,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    current: AtomicUsize,
}

/// Carries `plan` out. `tick` runs on the calling thread about twenty times a second; an error from
/// it stops the work and leaves the workspace for a later `resume`.
pub fn run(
    plan: &Plan,
    choices: RunChoices,
    tick: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Report> {
    run_beside(plan, choices, None, tick)
}

/// As [`run`]; where a folder is at the destination, what `keep` lists of it is carried over, and what
/// that does not refuse is replaced.
pub fn run_beside(
    plan: &Plan,
    choices: RunChoices,
    keep: Option<Keep<'_>>,
    tick: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Report> {
    let started = Instant::now();
    let begin = Line::Begin {
        plan: plan.id.clone(),
        sources: plan.source_state.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        transient: plan.is_transient(),
    };
    let (destination, kind, id) = (plan.destination.as_path(), plan.kind, plan.workspace_id());
    leftovers::recover(destination)?;
    if choices.resume {
        if let Some(lines) = Workspace::committed(destination, kind, id, &begin)? {
            let done = keeper::read_lines(plan, lines);
            let totals = Totals {
                resumed_bytes: plan.output_bytes(),
                ..Totals::default()
            };
            return Ok(Report::new(plan, &done, &totals, started.elapsed()));
        }
    }
    preflight::check_destination(plan, choices.overwrite || keep.is_some())?;
    let leftovers = leftovers::find(destination);
    preflight::check_space(plan, &leftovers)?;
    leftovers.into_iter().for_each(Leftover::remove);
    let (workspace, mut journal, lines) =
        Workspace::open(destination, kind, id, &begin, choices.resume)?;
    let outcome = fill(plan, &workspace, &mut journal, lines, tick).and_then(|filled| {
        let (_, totals) = &filled;
        let last = plan.tensors.last();
        let progress = Progress {
            read_bytes: totals.read_bytes,
            total_bytes: totals.read_bytes,
            written_bytes: totals.written_bytes,
            tensor: last.map_or(String::new(), |planned| planned.target.clone()),
        };
        let mut quiet = || tick(&progress);
        let (sync, overwrite) = (plan.options.sync, choices.overwrite);
        workspace.commit_beside(&mut journal, sync, overwrite, keep, &mut quiet)?;
        Ok(filled)
    });
    match outcome {
        Ok((done, totals)) => {
            let removed = workspace.remove();
            // What is left of a transient one the next writer removes.
            if !plan.is_transient() {
                removed?;
            }
            Ok(Report::new(plan, &done, &totals, started.elapsed()))
        }
        Err(error) => {
            // An interruption or a full disk can be resumed; bad input cannot, nor what was in memory.
            let resumable = matches!(error, Error::Interrupted | Error::Io { .. });
            if plan.is_transient() || !resumable {
                workspace.discard();
            }
            Err(error)
        }
    }
}

/// Fills the workspace's content: weights, then indexes and other files.
fn fill(
    plan: &Plan,
    workspace: &Workspace,
    journal: &mut Journal,
    lines: Vec<Line>,
    tick: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<(Done, Totals)> {
    let sinks = Sinks::new(plan, workspace.content());
    let done = keeper::restore(plan, &sinks, lines);
    let resumed_bytes = plan
        .tensors
        .iter()
        .zip(&done.tensors)
        .filter(|(_, finished)| finished.is_some())
        .map(|(planned, _)| plan.target_bytes(planned))
        .sum();
    for (shard, sealed) in plan.shards.iter().zip(&done.shards) {
        let started = done
            .tensors
            .get(shard.tensors.clone())
            .is_some_and(|all| all.iter().any(Option::is_some));
        if sealed.is_none() && !started {
            sinks.reserve(shard)?;
        }
    }
    let run = Run::new(plan, &sinks, &done.tensors)?;
    let total_bytes = run.total_bytes()?;
    let stop = Stop::default();
    let (outbox, inbox) = mpsc::channel();
    let keeper = Keeper {
        plan,
        sinks: &sinks,
        journal,
        written_bytes: &run.written_bytes,
        done,
    };
    let stop = &stop;
    let (worked, kept) = std::thread::scope(|scope| {
        let keeper = scope.spawn(move || keeper.keep(&inbox, stop));
        let worked = pool::run(
            plan.threads,
            run.pieces.len(),
            stop,
            || (Scratch::default(), outbox.clone()),
            |(scratch, outbox), position, stop| run.carry_out(position, scratch, outbox, stop),
            &mut || tick(&run.progress(total_bytes)),
        );
        drop(outbox);
        let mut watched = Ok(());
        while !keeper.is_finished() {
            std::thread::sleep(Duration::from_millis(5));
            if watched.is_ok() {
                watched = tick(&run.progress(total_bytes));
            }
        }
        let kept = keeper
            .join()
            .unwrap_or_else(|_| Err(Error::Internal(String::from("the keeper panicked"))));
        (worked.and(watched), kept)
    });
    // A keeper that fails stops the workers, so its error is the cause.
    let done = match (worked, kept) {
        (Err(error), Ok(_)) => return Err(error),
        (_, kept) => kept?,
    };
    if done.shards.iter().any(Option::is_none) {
        return Err(Error::Internal(String::from(
            "a shard was left without its header",
        )));
    }
    let mut totals = Totals {
        read_bytes: run.read_bytes.load(Ordering::Relaxed),
        written_bytes: run.written_bytes.load(Ordering::Relaxed),
        resumed_bytes,
    };
    totals.written_bytes += extra::write(plan, &workspace.content(), &mut || {
        tick(&run.progress(total_bytes))
    })?;
    Ok((done, totals))
}

impl<'r> Run<'r> {
    fn new(plan: &'r Plan, sinks: &'r Sinks, finished: &[Option<Finished>]) -> Result<Self> {
        let mut pieces = Vec::new();
        let mut states = Vec::new();
        states.resize_with(plan.tensors.len(), TensorState::default);
        let joined = |set: &Vec<usize>| Joined::new(set.len());
        let joined = plan.shared_scales.iter().map(joined).collect();
        let mut listed = HashSet::new();
        for (tensor, planned) in plan.tensors.iter().enumerate() {
            if !finished.get(tensor).is_some_and(Option::is_none) {
                continue;
            }
            // All that share the scale are read before the first of them is encoded, also those that an
            // earlier run has finished.
            let alone = [tensor];
            let first_pass = match planned.shared_scale {
                None => alone.as_slice(),
                Some(set) if listed.insert(set) => {
                    plan.shared_scales.get(set).map_or(&[][..], Vec::as_slice)
                }
                Some(_) => &[],
            };
            for &member in first_pass {
                let (Some(planned), Some(state)) =
                    (plan.tensors.get(member), states.get_mut(member))
                else {
                    continue;
                };
                let measured = add_first_pass(member, planned, &mut pieces)?;
                state.first_pass = FirstPass::new(measured);
            }
            let added = add_pieces(plan, tensor, planned, &mut pieces)?;
            if let Some(state) = states.get_mut(tensor) {
                state.remaining.store(added, Ordering::Relaxed);
            }
        }
        Ok(Run {
            plan,
            sinks,
            pieces,
            states,
            joined,
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            current: AtomicUsize::new(0),
        })
    }

    fn progress(&self, total_bytes: u64) -> Progress {
        let tensor = self.plan.tensors.get(self.current.load(Ordering::Relaxed));
        Progress {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            total_bytes,
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            tensor: tensor.map_or(String::new(), |planned| planned.target.clone()),
        }
    }

    /// Bytes that the pieces will read.
    fn total_bytes(&self) -> Result<u64> {
        let mut total = 0;
        for piece in &self.pieces {
            total += match *piece {
                Piece::Copy { bytes, .. } => bytes,
                Piece::Measure { tensor, slab } | Piece::Encode { tensor, slab } => {
                    let (source, task) = self.task(tensor)?;
                    let range = task.cut.slab_range(slab, task.target.layout.weights);
                    let bytes = |(_, part): (&Stored, std::ops::Range<u64>)| part.end - part.start;
                    source_ranges(source, task.source.layout, &range)
                        .map(bytes)
                        .sum()
                }
            };
        }
        Ok(total)
    }

    fn task(&self, tensor: usize) -> Result<(&'r Tensor, Task<'r>)> {
        let planned = self.planned(tensor)?;
        let (_, source) = self.plan.source(planned)?;
        let task = self
            .plan
            .task(source, &planned.action)
            .ok_or_else(|| Error::Internal(format!("tensor {tensor} is not encoded")))?;
        Ok((source, task))
    }

    fn planned(&self, tensor: usize) -> Result<&'r Planned> {
        self.plan
            .tensors
            .get(tensor)
            .ok_or_else(|| Error::Internal(format!("no planned tensor {tensor}")))
    }

    fn state(&self, tensor: usize) -> Result<&TensorState> {
        self.states
            .get(tensor)
            .ok_or_else(|| Error::Internal(format!("no state of tensor {tensor}")))
    }

    fn carry_out(
        &self,
        position: usize,
        scratch: &mut Scratch,
        outbox: &Sender<(usize, Finished)>,
        stop: &Stop,
    ) -> Result<()> {
        let Some(piece) = self.pieces.get(position) else {
            return Ok(());
        };
        let tensor = piece.tensor();
        self.current.store(tensor, Ordering::Relaxed);
        let worked = match *piece {
            Piece::Copy {
                slot, first, bytes, ..
            } => self.copy(tensor, slot, first, bytes, scratch),
            Piece::Measure { slab, .. } => self.measure(tensor, slab, scratch, stop),
            Piece::Encode { slab, .. } => self.encode(tensor, slab, scratch, stop),
        };
        worked.map_err(|error| self.locate(tensor, error))?;
        if matches!(piece, Piece::Measure { .. }) {
            return Ok(());
        }
        let state = self.state(tensor)?;
        if state.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            let finished = self
                .finish(tensor, state)
                .map_err(|error| self.locate(tensor, error))?;
            // The keeper hangs up only after a failure of its own, which is the one to report.
            let _ = outbox.send((tensor, finished));
        }
        Ok(())
    }

    fn locate(&self, tensor: usize, error: Error) -> Error {
        match self
            .planned(tensor)
            .and_then(|planned| self.plan.source(planned))
        {
            Ok((checkpoint, source)) => match source.main() {
                Ok(main) => {
                    let error = error.tensor(&source.name);
                    match checkpoint.lasting_path(main.file) {
                        Some(path) => error.file(path),
                        None => error,
                    }
                }
                Err(_) => error.tensor(&source.name),
            },
            Err(_) => error,
        }
    }

    fn write(&self, planned: &Planned, slot: &Slot, offset: u64, bytes: &[u8]) -> Result<()> {
        let start = self
            .plan
            .shards
            .get(planned.shard)
            .and_then(|shard| shard.layout.offsets.get(slot.entry))
            .ok_or_else(|| Error::Internal(format!("no entry {}", slot.entry)))?;
        self.sinks
            .get(self.plan, planned.shard)?
            .write_at(start + offset, bytes)?;
        self.written_bytes
            .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn copy(
        &self,
        tensor: usize,
        slot: usize,
        first: u64,
        bytes: u64,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let planned = self.planned(tensor)?;
        let (checkpoint, source) = self.plan.source(planned)?;
        let Some(slot) = planned.slots.get(slot) else {
            return Err(Error::Internal(format!("no slot {slot}")));
        };
        let Some(Some(part)) = source.parts.get(slot.component) else {
            return Err(Error::Internal(format!("no part {}", slot.component)));
        };
        let [buffer, ..] = &mut scratch.input;
        let buffer = slab::resize(buffer, bytes)?;
        checkpoint.read(part, first, buffer)?;
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.write(planned, slot, first, buffer)
    }

    /// Reads the packed source bytes of a slab.
    fn read(
        &self,
        tensor: usize,
        layout: &Layout,
        slab: &std::ops::Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (checkpoint, source) = self.plan.source(self.planned(tensor)?)?;
        let bytes = read_slab(checkpoint, source, layout, slab, scratch)?;
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn measure(&self, tensor: usize, slab: u64, scratch: &mut Scratch, stop: &Stop) -> Result<()> {
        let (_, task) = self.task(tensor)?;
        let range = task.cut.slab_range(slab, task.target.layout.weights);
        self.read(tensor, task.source.layout, &range, scratch)?;
        task.measure(&range, scratch, &|| stop.check())?;
        let first_pass = &self.state(tensor)?.first_pass;
        let Some(measured) = first_pass.add(task.target, &range, &scratch.statistics)? else {
            return Ok(());
        };
        let Some(set) = self.planned(tensor)?.shared_scale else {
            return first_pass.settle(task.target, measured);
        };
        let (Some(joined), Some(members)) =
            (self.joined.get(set), self.plan.shared_scales.get(set))
        else {
            return Err(Error::Internal(format!("no shared scale {set}")));
        };
        let Some(of_all) = joined.add(task.target.format, &measured)? else {
            return Ok(());
        };
        for &member in members {
            let (_, task) = self.task(member)?;
            let state = self.state(member)?;
            state.first_pass.settle(task.target, of_all.clone())?;
        }
        Ok(())
    }

    fn encode(&self, tensor: usize, slab: u64, scratch: &mut Scratch, stop: &Stop) -> Result<()> {
        let planned = self.planned(tensor)?;
        let (_, mut task) = self.task(tensor)?;
        let state = self.state(tensor)?;
        let settled = match Pass::that_encodes(task.target.format, task.target.layout) {
            Pass::Second => Some(state.first_pass.wait(stop)?),
            Pass::First => None,
        };
        let mut statistics: &[u8] = &[];
        if let Some(settled) = &settled {
            task.target = Packed {
                format: task.target.format,
                layout: &settled.0,
            };
            statistics = &settled.1;
        }
        let weighed = self.weighed(planned, state, task.target.layout)?;
        if let Some(layout) = &weighed {
            task.target.layout = layout;
        }
        let range = task.cut.slab_range(slab, task.target.layout.weights);
        self.read(tensor, task.source.layout, &range, scratch)?;
        let mut buffers = std::mem::take(&mut scratch.output);
        let mut output = slab::output(task.target.layout, &mut buffers, &range)?;
        let stop = || stop.check();
        let sums = task.encode(&range, statistics, scratch, &mut output, &stop)?;
        for (packed, (component, layout)) in output.iter().zip(task.target.layout.sliced()) {
            let bytes = layout.span.range(range.start, range.end - range.start);
            self.write(planned, slot_of(planned, component)?, bytes.start, packed)?;
        }
        scratch.output = buffers;
        if settled.is_none() {
            let measured = &scratch.statistics;
            state
                .first_pass
                .add_encoded(task.target, &range, measured)?;
        }
        lock(&state.sums).push((slab, sums));
        Ok(())
    }

    /// `layout` with the importance of the columns, for tensors that have one. The first slab loads
    /// it, the last one drops it.
    fn weighed(
        &self,
        planned: &Planned,
        state: &TensorState,
        layout: &Layout,
    ) -> Result<Option<Layout>> {
        let Action::Encode {
            weighed: Some(source),
            ..
        } = &planned.action
        else {
            return Ok(None);
        };
        let mut held = lock(&state.importance);
        if held.is_none() {
            *held = Some(source.load(&self.plan.checkpoints)?);
        }
        let mut layout = layout.clone();
        layout.params.importance.clone_from(&held);
        Ok(Some(layout))
    }

    /// Writes the whole-tensor components and adds the error sums up.
    fn finish(&self, tensor: usize, state: &TensorState) -> Result<Finished> {
        let planned = self.planned(tensor)?;
        let Action::Encode { format, layout, .. } = &planned.action else {
            return Ok(Finished::default());
        };
        lock(&state.importance).take();
        let settled = state.first_pass.take();
        let whole = match &settled {
            Some(settled) => format.whole(&settled.0, &settled.1)?,
            None => format.whole(layout, &[])?,
        };
        let mut late = Vec::new();
        for (component, bytes) in whole {
            let slot = slot_of(planned, component)?;
            if slot.late.is_some() {
                late.push((component, bytes));
            } else {
                self.write(planned, slot, 0, &bytes)?;
            }
        }
        let mut slabs = std::mem::take(&mut *lock(&state.sums));
        slabs.sort_unstable_by_key(|(slab, _)| *slab);
        let mut sums = ErrorSums::default();
        for (_, part) in &slabs {
            sums.merge(part);
        }
        Ok(Finished {
            late,
            sums: self.plan.options.verify.then_some(sums),
        })
    }
}

fn slot_of(planned: &Planned, component: usize) -> Result<&Slot> {
    planned
        .slots
        .iter()
        .find(|slot| slot.component == component)
        .ok_or_else(|| Error::Internal(format!("component {component} has no place")))
}
