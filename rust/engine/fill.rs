//! Tensors of a checkpoint into arrays of the caller, encoded on the way.
//!
//! Many tensors are one work: their slabs are claimed one after the other by the same threads, so
//! that neither many small tensors nor a few large ones leave a thread idle. A slab is read into a
//! buffer of the thread, encoded tile by tile straight into its place in the caller's arrays, and
//! forgotten: beside those arrays no memory grows with the model, but for the statistics of the
//! tensors at work whose format takes two passes. Bytes that are taken as they are stored are read
//! into their place. The threads touch the arrays first, each its own part.

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde::Deserialize;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{Format, Layout, PartsMut};
use crate::shape;

use super::assign;
use super::checkpoint::{Checkpoint, Made, Tensor};
use super::derive::{derive, transpose};
use super::pieces::{copy_step, read_slab, source_ranges};
use super::plan::Action;
use super::pool::{self, lock, Stop};
use super::request::{Assignment, Choices, Rows};
use super::run::Progress;
use super::slab::{Packed, Pass, Scratch, Task};
use super::two_pass::FirstPass;

/// Most source bytes of a slab. Larger ones are no faster, and leave more to wait for at the end.
const SLAB_BYTES: u64 = 1 << 20;
/// Most source bytes of the slabs of all threads together.
const SLABS_BYTES: u64 = 32 << 20;
/// Smallest slab that many threads lead to.
const SMALLEST_SLAB_BYTES: u64 = 64 << 10;

/// One tensor and what it becomes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// Name in the checkpoint.
    pub name: String,
    /// Full format name, or `copy` for the stored bytes as they are.
    pub format: String,
    /// Choices the format leaves open.
    #[serde(default)]
    pub params: JobParams,
    /// Type that the weights are rounded to before they are encoded.
    #[serde(default)]
    pub through: Option<String>,
    /// As in [`Assignment::rows`].
    #[serde(default)]
    pub rows: Vec<Rows>,
    /// As in [`Assignment::shape`].
    #[serde(default)]
    pub shape: Option<Vec<u64>>,
    /// As in [`Assignment::add`].
    #[serde(default)]
    pub add: Option<f32>,
    /// Take the matrix, of plain numbers, with rows and columns exchanged.
    #[serde(default)]
    pub transpose: bool,
}

/// The choices of one job.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobParams {
    /// Weights sharing a scale.
    pub block_size: Option<u64>,
    /// Quantize the scales as well.
    pub double_quant: bool,
    /// Element type to record as the one decoding gives back; by default `through`, or the source's.
    pub dtype: Option<String>,
    /// Encode weights that are not finite, where the format defines how.
    pub keep_nonfinite: bool,
}

/// A job that was found to be possible.
struct Checked<'c> {
    /// Place for messages.
    name: &'c str,
    path: &'c Path,
    /// The stored tensor, and the one made of stored ones where it is not simply that.
    stored: &'c Tensor,
    derived: Option<Tensor>,
    action: Action,
    through: Option<Dtype>,
    keep_nonfinite: bool,
    /// Source bytes of a slab.
    slab_bytes: u64,
    /// Format and layout that the arrays have, where a format was named and the bytes are copied
    /// because they are in it already.
    copied: Option<(&'static dyn Format, Layout)>,
}

/// One piece of work.
enum Piece<'o> {
    /// Bytes of a stored array from `first` on, as they are.
    Copy {
        job: usize,
        part: usize,
        first: u64,
        place: &'o mut [u8],
    },
    /// Statistics of a slab.
    Measure { job: usize, slab: u64 },
    /// The slab itself.
    Encode {
        job: usize,
        slab: u64,
        places: PartsMut<'o>,
    },
    /// Nothing: the tensor has no weights, or no array that is cut.
    Nothing { job: usize },
}

impl Piece<'_> {
    fn job(&self) -> usize {
        match self {
            Piece::Copy { job, .. }
            | Piece::Measure { job, .. }
            | Piece::Encode { job, .. }
            | Piece::Nothing { job } => *job,
        }
    }
}

/// What threads share about one job.
#[derive(Default)]
struct State<'o> {
    /// Pieces left, both passes.
    remaining: AtomicUsize,
    first_pass: FirstPass,
    /// Components that are known when everything else is.
    whole: Mutex<Vec<(usize, &'o mut [u8])>>,
    /// Final length of each component.
    lengths: Mutex<Vec<u64>>,
}

/// Carries `jobs` out. `out` holds, for each job in order, one buffer per component of its format's
/// layout, or for `copy` one per stored array; each as long as that is at most. Gives the final
/// lengths, by job and component.
///
/// Every job is checked before anything is read. `tick` runs on the calling thread about twenty
/// times a second; an error from it stops the work. After an error the content of `out` is
/// undefined.
pub fn fill(
    checkpoint: &Arc<Checkpoint>,
    jobs: &[Job],
    out: Vec<&mut [u8]>,
    threads: usize,
    tick: &mut dyn FnMut(&Progress) -> Result<()>,
) -> Result<Vec<Vec<u64>>> {
    let threads = threads.clamp(1, 1024);
    let slab_bytes = (SLABS_BYTES / threads as u64).clamp(SMALLEST_SLAB_BYTES, SLAB_BYTES);
    let checked = jobs
        .iter()
        .map(|job| check(checkpoint, job, slab_bytes))
        .collect::<Result<Vec<_>>>()?;
    let fill = Fill::new(checkpoint, &checked, out)?;
    let total_bytes = fill.total_bytes()?;
    pool::run(
        threads,
        fill.pieces.len(),
        &Stop::default(),
        Scratch::default,
        |scratch, position, stop| fill.carry_out(position, scratch, stop),
        &mut || tick(&fill.progress(total_bytes)),
    )?;
    let lengths = |state: State<'_>| std::mem::take(&mut *lock(&state.lengths));
    Ok(fill.states.into_iter().map(lengths).collect())
}

fn check<'c>(
    checkpoint: &'c Arc<Checkpoint>,
    job: &'c Job,
    slab_bytes: u64,
) -> Result<Checked<'c>> {
    let stored_name = job.rows.first().map_or(&job.name, |rows| &rows.name);
    let stored = checkpoint.tensor(stored_name)?;
    let path = checkpoint.path(stored.main()?.file);
    check_stored(checkpoint, job, stored, path, slab_bytes)
        .map_err(|error| error.tensor(&job.name).file(path))
}

fn check_stored<'c>(
    checkpoint: &'c Arc<Checkpoint>,
    job: &'c Job,
    stored: &'c Tensor,
    path: &'c Path,
    slab_bytes: u64,
) -> Result<Checked<'c>> {
    let assignment = Assignment {
        checkpoint: 0,
        name: job.name.clone(),
        target: job.name.clone(),
        format: job.format.clone(),
        params: Choices {
            block_size: job.params.block_size,
            double_quant: job.params.double_quant,
            dtype: job.params.dtype.clone(),
        },
        why: String::new(),
        rows: job.rows.clone(),
        shape: job.shape.clone(),
        add: job.add,
        with_previous: false,
        importance: None,
        shared_scale: None,
    };
    let through = job.through.as_deref().map(rounding_type).transpose()?;
    let mut derived = derive(checkpoint, &assignment)?;
    let mut slab_bytes = slab_bytes;
    if job.transpose {
        if job.shape.is_some() {
            return Err(Error::config(
                "a transposed matrix is not put into another shape",
            ));
        }
        let transposed = transpose(derived.as_ref().unwrap_or(stored))?;
        if let Some(Made::Transposed(matrix)) = &transposed.main()?.made {
            slab_bytes = matrix.slab_bytes(slab_bytes);
        }
        derived = Some(transposed);
    }
    let tensor = derived.as_ref().unwrap_or(stored);
    let checkpoints = std::slice::from_ref(checkpoint);
    let (action, ordered) =
        assign::action(checkpoints, tensor, path, slab_bytes, &assignment, through)?;
    let copied = match (&action, tensor.as_packed()) {
        (Action::Copy, Some(packed)) if job.format != "copy" => {
            Some((packed.format, packed.layout.clone()))
        }
        _ => None,
    };
    let rounds = |dtype: &Dtype| match tensor.as_packed() {
        Some(source) => job.add.is_some() || !assign::is_exact(source, *dtype),
        None => false,
    };
    Ok(Checked {
        name: &job.name,
        path,
        stored,
        through: through.filter(rounds),
        derived: ordered.or(derived),
        action,
        keep_nonfinite: job.params.keep_nonfinite,
        copied,
        slab_bytes,
    })
}

fn rounding_type(name: &str) -> Result<Dtype> {
    match Dtype::from_name(name) {
        Some(dtype @ (Dtype::F32 | Dtype::F16 | Dtype::BF16)) => Ok(dtype),
        _ => Err(Error::config(format!(
            "weights are rounded to F32, F16 or BF16, not to \"{name}\""
        ))),
    }
}

impl Checked<'_> {
    fn source(&self) -> &Tensor {
        self.derived.as_ref().unwrap_or(self.stored)
    }

    fn locate(&self, error: Error) -> Error {
        error.tensor(self.name).file(self.path)
    }

    /// What is done with each slab, for jobs that encode.
    fn task(&self) -> Result<Task<'_>> {
        let (
            Action::Encode {
                format,
                layout,
                cut,
                add,
                ..
            },
            Some(source),
        ) = (&self.action, self.source().as_packed())
        else {
            return Err(Error::Internal(String::from("nothing is encoded")));
        };
        Ok(Task {
            source,
            target: Packed {
                format: *format,
                layout,
            },
            cut: *cut,
            add: *add,
            through: self.through,
            verify: false,
            keep_nonfinite: self.keep_nonfinite,
        })
    }

    /// The layout of the arrays, unless they are simply what is stored.
    fn layout(&self) -> Option<&Layout> {
        match (&self.action, &self.copied) {
            (Action::Encode { layout, .. }, _) => Some(layout),
            (Action::Copy, Some((_, layout))) => Some(layout),
            (Action::Copy, None) => None,
        }
    }

    /// Name and length of each array.
    fn arrays(&self) -> Result<Vec<(String, u64)>> {
        match self.layout() {
            Some(layout) => layout
                .components
                .iter()
                .enumerate()
                .map(|(index, component)| {
                    let name = format!("component \"{}\"", component.suffix);
                    Ok((name, layout.component_bytes(index)?))
                })
                .collect(),
            None => Ok(self
                .source()
                .stored()
                .map(|part| (format!("array \"{}\"", part.entry.name), part.entry.bytes))
                .collect()),
        }
    }
}

/// Work under way.
struct Fill<'o, 'c> {
    checkpoint: &'c Checkpoint,
    jobs: &'c [Checked<'c>],
    pieces: Vec<Mutex<Piece<'o>>>,
    states: Vec<State<'o>>,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    current: AtomicUsize,
}

impl<'o, 'c> Fill<'o, 'c> {
    fn new(
        checkpoint: &'c Checkpoint,
        jobs: &'c [Checked<'c>],
        out: Vec<&'o mut [u8]>,
    ) -> Result<Self> {
        let given = out.len();
        let arrays = jobs
            .iter()
            .map(|job| job.arrays().map_err(|error| job.locate(error)))
            .collect::<Result<Vec<_>>>()?;
        let expected: usize = arrays.iter().map(Vec::len).sum();
        if given != expected {
            return Err(Error::config(format!(
                "{given} arrays for the {expected} of {} tensors",
                jobs.len()
            )));
        }
        let mut fill = Fill {
            checkpoint,
            jobs,
            pieces: Vec::new(),
            states: Vec::with_capacity(jobs.len()),
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            current: AtomicUsize::new(0),
        };
        let mut out = out.into_iter();
        let mut places = Vec::with_capacity(jobs.len());
        for (job, arrays) in jobs.iter().zip(&arrays) {
            let buffers: Vec<&'o mut [u8]> = out.by_ref().take(arrays.len()).collect();
            for (buffer, (name, bytes)) in buffers.iter().zip(arrays) {
                if buffer.len() as u64 != *bytes {
                    return Err(job.locate(Error::format(format!(
                        "{name}: expected {bytes} bytes, got {}",
                        buffer.len()
                    ))));
                }
            }
            places.push(buffers);
        }
        for (index, (job, buffers)) in jobs.iter().zip(places).enumerate() {
            let state = fill
                .add(index, job, buffers)
                .map_err(|error| job.locate(error))?;
            fill.states.push(state);
        }
        Ok(fill)
    }

    /// Lists the pieces of one job.
    fn add(
        &mut self,
        index: usize,
        job: &Checked<'_>,
        buffers: Vec<&'o mut [u8]>,
    ) -> Result<State<'o>> {
        let before = self.pieces.len();
        let mut state = State {
            lengths: Mutex::new(buffers.iter().map(|buffer| buffer.len() as u64).collect()),
            ..State::default()
        };
        match &job.action {
            Action::Copy => self.add_copies(index, job, buffers, &state)?,
            Action::Encode {
                format,
                layout,
                cut,
                ..
            } => {
                let slabs = cut.slabs(layout.weights);
                if Pass::that_encodes(*format, layout) == Pass::Second {
                    let measures = (0..slabs).map(|slab| Piece::Measure { job: index, slab });
                    self.pieces.extend(measures.map(Mutex::new));
                }
                state.first_pass = FirstPass::new(shape::to_usize(slabs)?);
                let mut sliced = Vec::new();
                for (component, buffer) in buffers.into_iter().enumerate() {
                    match layout.components.get(component).map(|found| found.span) {
                        Some(span) if span.is_sliced() => sliced.push((span, buffer)),
                        _ => lock(&state.whole).push((component, buffer)),
                    }
                }
                for slab in 0..slabs {
                    let range = cut.slab_range(slab, layout.weights);
                    let mut places = PartsMut::default();
                    for (place, (span, rest)) in places.iter_mut().zip(&mut sliced) {
                        let bytes = span.range(range.start, range.end - range.start);
                        *place = take(rest, bytes.end - bytes.start)?;
                    }
                    let piece = Piece::Encode {
                        job: index,
                        slab,
                        places,
                    };
                    self.pieces.push(Mutex::new(piece));
                }
            }
        }
        if self.pieces.len() == before {
            let nothing = Piece::Nothing { job: index };
            self.pieces.push(Mutex::new(nothing));
        }
        state
            .remaining
            .store(self.pieces.len() - before, Ordering::Relaxed);
        Ok(state)
    }

    fn add_copies(
        &mut self,
        index: usize,
        job: &Checked<'_>,
        buffers: Vec<&'o mut [u8]>,
        state: &State<'o>,
    ) -> Result<()> {
        let is_listed = |part: &&Option<_>| job.copied.is_some() || part.is_some();
        let parts = job.source().parts.iter().enumerate();
        let parts = parts.filter(|(_, part)| is_listed(part));
        for (position, ((part, stored), mut rest)) in parts.zip(buffers).enumerate() {
            let Some(stored) = stored else {
                // Files may leave out what the format alone decides.
                lock(&state.whole).push((part, rest));
                continue;
            };
            if stored.entry.bytes > rest.len() as u64 {
                return Err(Error::unsupported(format!(
                    "\"{}\" has {} bytes, more than the {} it may have",
                    stored.entry.name,
                    stored.entry.bytes,
                    rest.len()
                ))
                .hint("copy the tensor as it is stored"));
            }
            if let Some(length) = lock(&state.lengths).get_mut(position) {
                *length = stored.entry.bytes;
            }
            let step = copy_step(job.slab_bytes, stored);
            let mut first = 0;
            while first < stored.entry.bytes {
                let bytes = step.min(stored.entry.bytes - first);
                let place = take(&mut rest, bytes)?;
                let piece = Piece::Copy {
                    job: index,
                    part,
                    first,
                    place,
                };
                self.pieces.push(Mutex::new(piece));
                first += bytes;
            }
        }
        Ok(())
    }

    fn progress(&self, total_bytes: u64) -> Progress {
        let job = self.jobs.get(self.current.load(Ordering::Relaxed));
        Progress {
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            total_bytes,
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            tensor: job.map_or(String::new(), |job| job.name.to_owned()),
        }
    }

    /// Bytes that the pieces will read.
    fn total_bytes(&self) -> Result<u64> {
        let mut total = 0;
        for piece in &self.pieces {
            total += match &*lock(piece) {
                Piece::Copy { place, .. } => place.len() as u64,
                Piece::Measure { job, slab } | Piece::Encode { job, slab, .. } => {
                    let job = self.job(*job)?;
                    let task = job.task()?;
                    let range = task.cut.slab_range(*slab, task.target.layout.weights);
                    source_ranges(job.source(), task.source.layout, &range)
                        .map(|(_, bytes)| bytes.end - bytes.start)
                        .sum()
                }
                Piece::Nothing { .. } => 0,
            };
        }
        Ok(total)
    }

    fn job(&self, index: usize) -> Result<&'c Checked<'c>> {
        self.jobs
            .get(index)
            .ok_or_else(|| Error::Internal(format!("no job {index}")))
    }

    fn carry_out(&self, position: usize, scratch: &mut Scratch, stop: &Stop) -> Result<()> {
        let Some(piece) = self.pieces.get(position) else {
            return Ok(());
        };
        let mut piece = lock(piece);
        let index = piece.job();
        self.current.store(index, Ordering::Relaxed);
        let job = self.job(index)?;
        let state = self
            .states
            .get(index)
            .ok_or_else(|| Error::Internal(format!("no state of job {index}")))?;
        self.work(job, state, &mut piece, scratch, stop)
            .and_then(|()| match state.remaining.fetch_sub(1, Ordering::AcqRel) {
                1 => finish(job, state),
                _ => Ok(()),
            })
            .map_err(|error| job.locate(error))
    }

    fn work(
        &self,
        job: &Checked<'_>,
        state: &State<'_>,
        piece: &mut Piece<'_>,
        scratch: &mut Scratch,
        stop: &Stop,
    ) -> Result<()> {
        match piece {
            Piece::Nothing { .. } => Ok(()),
            Piece::Copy {
                part, first, place, ..
            } => {
                let Some(Some(stored)) = job.source().parts.get(*part) else {
                    return Err(Error::Internal(format!("no part {part}")));
                };
                self.checkpoint.read(stored, *first, place)?;
                self.count(place.len(), place.len());
                Ok(())
            }
            Piece::Measure { slab, .. } => {
                let task = job.task()?;
                let range = task.cut.slab_range(*slab, task.target.layout.weights);
                self.read(job, task, &range, scratch)?;
                task.measure(&range, scratch, &|| stop.check())?;
                let first_pass = &state.first_pass;
                first_pass.add_encoded(task.target, &range, &scratch.statistics)
            }
            Piece::Encode { slab, places, .. } => {
                let mut task = job.task()?;
                let settled = match Pass::that_encodes(task.target.format, task.target.layout) {
                    Pass::Second => Some(state.first_pass.wait(stop)?),
                    Pass::First => None,
                };
                let mut statistics: &[u8] = &[];
                if let Some(settled) = &settled {
                    task.target.layout = &settled.0;
                    statistics = &settled.1;
                }
                let range = task.cut.slab_range(*slab, task.target.layout.weights);
                self.read(job, task, &range, scratch)?;
                task.encode(&range, statistics, scratch, places, &|| stop.check())?;
                if settled.is_none() {
                    let measured = &scratch.statistics;
                    state
                        .first_pass
                        .add_encoded(task.target, &range, measured)?;
                }
                self.count(0, places.iter().map(|place| place.len()).sum());
                Ok(())
            }
        }
    }

    fn read(
        &self,
        job: &Checked<'_>,
        task: Task<'_>,
        slab: &std::ops::Range<u64>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let layout = task.source.layout;
        let bytes = read_slab(self.checkpoint, job.source(), layout, slab, scratch)?;
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn count(&self, read: usize, written: usize) {
        self.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
        self.written_bytes
            .fetch_add(written as u64, Ordering::Relaxed);
    }
}

/// Fills the components that are known once all weights are encoded.
fn finish(job: &Checked<'_>, state: &State<'_>) -> Result<()> {
    let mut places = std::mem::take(&mut *lock(&state.whole));
    if places.is_empty() {
        return Ok(());
    }
    let settled = state.first_pass.take();
    let whole = match (&job.action, &job.copied, &settled) {
        (Action::Encode { format, .. }, _, Some(settled)) => {
            format.whole(&settled.0, &settled.1)?
        }
        (Action::Encode { format, layout, .. }, _, None) => format.whole(layout, &[])?,
        (Action::Copy, Some((format, layout)), _) => format.whole(layout, &[])?,
        (Action::Copy, None, _) => Vec::new(),
    };
    for (component, bytes) in whole {
        let place = places.iter_mut().find(|(wanted, _)| *wanted == component);
        let Some((_, place)) = place else { continue };
        match place.get_mut(..bytes.len()) {
            Some(place) => place.copy_from_slice(&bytes),
            None => {
                return Err(Error::Internal(format!(
                    "component {component} is too short"
                )))
            }
        }
        if let Some(length) = lock(&state.lengths).get_mut(component) {
            *length = bytes.len() as u64;
        }
    }
    Ok(())
}

/// The next `bytes` of what is left of a buffer.
fn take<'o>(rest: &mut &'o mut [u8], bytes: u64) -> Result<&'o mut [u8]> {
    rest.split_off_mut(..shape::to_usize(bytes)?)
        .ok_or_else(|| Error::Internal(format!("{bytes} bytes run over the end of an array")))
}
