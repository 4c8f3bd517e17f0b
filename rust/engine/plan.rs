//! The plan: everything that will be written, where, and how, from headers alone. Pure, but for the
//! look at free disk space; every refusal that can be known is raised here, before the first write.

use std::collections::{BTreeMap, HashSet};
use std::path::{Component as PathPart, Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use xxhash_rust::xxh3::Xxh3;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Format, Layout};
use crate::io::{self, file, Container, FileLayout, NewEntry, NewMetadata, Source};
use crate::shape;

use super::checkpoint::{Checkpoint, Tensor};
use super::request::{self, Assignment, ExtraFile, Kind, Options, Output, Request};
use super::slab::{Cut, Packed, Task};
use super::workspace;

/// Source bytes of a slab when nothing is asked for: large enough that calls and writes do not
/// count, small enough that a slab and its result stay in the last-level cache.
const SLAB_BYTES: u64 = 4 << 20;
/// Smallest slab that a tight memory limit leads to.
const SMALLEST_SLAB_BYTES: u64 = 64 << 10;

/// What happens to a tensor.
pub enum Action {
    /// Its stored bytes are written as they are.
    Copy,
    /// It is decoded and encoded anew.
    Encode {
        /// The new format.
        format: &'static dyn Format,
        /// The new layout.
        layout: Layout,
        /// How the work is cut.
        cut: Cut,
    },
}

/// Where one component of a tensor goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Component of the layout; for copies the position of the stored part.
    pub component: usize,
    /// Entry of the shard's file layout.
    pub entry: usize,
    /// Position among the shard's late entries.
    pub late: Option<usize>,
}

/// One tensor of the plan.
pub struct Planned {
    /// Checkpoint it comes from.
    pub checkpoint: usize,
    /// Position there.
    pub position: usize,
    /// Name in the output.
    pub target: String,
    /// Reason for what happens to it.
    pub why: String,
    /// What happens to it.
    pub action: Action,
    /// Shard it goes to.
    pub shard: usize,
    /// Its components in that shard.
    pub slots: Vec<Slot>,
}

/// One weights file.
pub struct Shard {
    /// Path below the destination.
    pub path: PathBuf,
    /// Where everything lies in it.
    pub layout: FileLayout,
    /// Number of late entries.
    pub late: usize,
    /// Its tensors, as positions in the plan.
    pub tensors: std::ops::Range<usize>,
}

/// One shard index.
pub struct IndexFile {
    /// Path below the destination.
    pub path: PathBuf,
    /// Name of each stored array and the shard file it is in.
    pub weight_map: BTreeMap<String, String>,
    /// The shards it speaks of.
    pub shards: std::ops::Range<usize>,
}

/// A conversion, complete and checked.
pub struct Plan {
    /// Identifies what is written: the same sources, assignments and names give the same id.
    pub id: String,
    /// Sizes, times and headers of the source files, hashed; a journal only speaks of these.
    pub source_state: String,
    /// Folder or file to make.
    pub destination: PathBuf,
    /// Which of the two.
    pub kind: Kind,
    /// Where tensors come from.
    pub checkpoints: Vec<Arc<Checkpoint>>,
    /// Tensors in shard order.
    pub tensors: Vec<Planned>,
    /// Weights files.
    pub shards: Vec<Shard>,
    /// Indexes of outputs with several shards.
    pub indexes: Vec<IndexFile>,
    /// Other files.
    pub files: Vec<ExtraFile>,
    /// How to work.
    pub options: Options,
    /// Worker threads.
    pub threads: usize,
    /// Source bytes per slab.
    pub slab_bytes: u64,
}

impl Plan {
    /// Plans a conversion.
    pub fn build(request: Request, checkpoints: Vec<Arc<Checkpoint>>) -> Result<Self> {
        check_destination(&request)?;
        let threads = request
            .options
            .threads
            .or_else(|| std::thread::available_parallelism().ok().map(usize::from))
            .unwrap_or(1)
            .clamp(1, 1024);
        let mut plan = Plan {
            id: identity(&request, &checkpoints)?,
            source_state: source_state(&checkpoints),
            destination: request.destination,
            kind: request.kind,
            checkpoints,
            tensors: Vec::new(),
            shards: Vec::new(),
            indexes: Vec::new(),
            files: request.files,
            options: request.options,
            threads,
            slab_bytes: 0,
        };
        plan.slab_bytes = plan.options.slab_bytes.unwrap_or(SLAB_BYTES).max(1);
        for output in &request.outputs {
            plan.add_output(output)?;
        }
        plan.check_paths()?;
        plan.fit_memory()?;
        Ok(plan)
    }

    /// The source tensor of a planned one.
    pub fn source(&self, planned: &Planned) -> Result<(&Checkpoint, &Tensor)> {
        let checkpoint = checkpoint_at(&self.checkpoints, planned.checkpoint)?;
        let tensor = checkpoint
            .tensors
            .get(planned.position)
            .ok_or_else(|| Error::config(format!("no tensor {}", planned.position)))?;
        Ok((checkpoint, tensor))
    }

    /// Bytes that will be read from weights files.
    pub fn source_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .filter_map(|planned| self.source(planned).ok())
            .map(|(_, tensor)| tensor.stored_bytes())
            .sum()
    }

    /// Bytes of a planned tensor's arrays, at most.
    pub fn target_bytes(&self, planned: &Planned) -> u64 {
        let Some(shard) = self.shards.get(planned.shard) else {
            return 0;
        };
        planned
            .slots
            .iter()
            .filter_map(|slot| shard.layout.entries().get(slot.entry))
            .filter_map(|entry| entry.dtype.byte_len(&entry.shape).ok())
            .sum()
    }

    /// Bytes that will be written, other files included, at most.
    pub fn output_bytes(&self) -> u64 {
        let weights: u64 = self
            .shards
            .iter()
            .map(|shard| shard.layout.total_bytes)
            .sum();
        let others: u64 = self.files.iter().map(extra_bytes).sum();
        weights + others
    }

    /// Buffers and statistics at their largest.
    pub fn memory_bytes(&self) -> u64 {
        let worker = self
            .tensors
            .iter()
            .map(|planned| self.worker_bytes(planned))
            .max()
            .unwrap_or(0);
        let mut statistics: Vec<u64> = self
            .tensors
            .iter()
            .map(statistics_bytes)
            .filter(|bytes| *bytes > 0)
            .collect();
        statistics.sort_unstable_by(|a, b| b.cmp(a));
        let held: u64 = statistics.iter().take(self.threads + 1).sum();
        worker * self.threads as u64 + held
    }

    /// Free bytes where the destination will lie.
    pub fn disk_free_bytes(&self) -> Result<u64> {
        file::free_bytes(workspace::existing_parent(&self.destination))
    }

    /// The plan as JSON, for people and tools.
    pub fn describe(&self) -> Result<serde_json::Value> {
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for planned in &self.tensors {
            let (_, tensor) = self.source(planned)?;
            let from = source_name(tensor);
            let (to, copied) = match &planned.action {
                Action::Copy => (from.clone(), true),
                Action::Encode { format, .. } => (format.info().name.to_owned(), false),
            };
            tensors.push(json!({
                "name": tensor.name, "as": planned.target, "shape": tensor.shape, "from": from, "to": to,
                "why": planned.why, "source_bytes": tensor.stored_bytes(), "output_bytes": self.target_bytes(planned),
                "file": self.shards.get(planned.shard).map(|shard| &shard.path), "copied": copied,
            }));
        }
        let weights = self.shards.iter().map(|shard| {
            json!({"path": shard.path, "bytes": shard.layout.total_bytes, "tensors": shard.tensors.len()})
        });
        let indexes = self
            .indexes
            .iter()
            .map(|index| json!({"path": index.path, "bytes": null, "tensors": 0}));
        let others = self
            .files
            .iter()
            .map(|extra| json!({"path": extra.path, "bytes": extra_bytes(extra), "tensors": 0}));
        Ok(json!({
            "plan_id": self.id, "threads": self.threads, "source_bytes": self.source_bytes(),
            "output_bytes": self.output_bytes(), "memory_bytes": self.memory_bytes(),
            "disk_free_bytes": self.disk_free_bytes()?,
            "files": weights.chain(indexes).chain(others).collect::<Vec<_>>(),
            "tensors": tensors,
        }))
    }

    /// What a worker does with each slab of an encoded tensor.
    pub fn task<'a>(&self, tensor: &'a Tensor, action: &'a Action) -> Option<Task<'a>> {
        let Action::Encode {
            format,
            layout,
            cut,
        } = action
        else {
            return None;
        };
        Some(Task {
            source: tensor.as_packed()?,
            target: Packed {
                format: *format,
                layout,
            },
            cut: *cut,
            verify: self.options.verify,
            keep_nonfinite: self.options.keep_nonfinite,
        })
    }

    fn add_output(&mut self, output: &Output) -> Result<()> {
        let container = match output.container.as_str() {
            "safetensors" => Container::Safetensors,
            "gguf" => Container::Gguf,
            other => return Err(Error::config(format!("unknown container \"{other}\""))),
        };
        if output.tensors.is_empty() {
            return Err(Error::checkpoint("no tensors to convert"));
        }
        let metadata = self.metadata(container, output)?;
        let first_shard = self.shards.len();
        let mut group: Vec<(Planned, Vec<NewEntry>)> = Vec::new();
        let mut groups = Vec::new();
        let mut group_bytes = 0u64;
        for assignment in &output.tensors {
            let (planned, entries) = self.assign(container, assignment)?;
            let bytes = entries.iter().try_fold(0u64, |sum, entry| {
                shape::add(sum, entry.dtype.byte_len(&entry.shape)?, "shard size")
            })?;
            // A tensor and its statistics stay in one shard: not every reader finds them otherwise.
            let full = output
                .max_shard_bytes
                .is_some_and(|most| group_bytes.saturating_add(bytes) > most);
            if full && !group.is_empty() {
                groups.push(std::mem::take(&mut group));
                group_bytes = 0;
            }
            group_bytes = shape::add(group_bytes, bytes, "shard size")?;
            group.push((planned, entries));
        }
        groups.push(group);
        let count = groups.len();
        let mut weight_map = BTreeMap::new();
        for (number, group) in groups.into_iter().enumerate() {
            let name = match self.kind {
                Kind::File => file_name(&self.destination),
                Kind::Folder => io::index::shard_name(&output.stem, container, number, count),
            };
            for (_, entries) in &group {
                for entry in entries {
                    if weight_map
                        .insert(entry.name.clone(), name.clone())
                        .is_some()
                    {
                        return Err(Error::checkpoint(
                            "two tensors would be stored under one name",
                        )
                        .tensor(&entry.name));
                    }
                }
            }
            self.add_shard(
                container,
                Path::new(&output.folder).join(&name),
                metadata.clone(),
                group,
            )?;
        }
        if count > 1 {
            self.indexes.push(IndexFile {
                path: Path::new(&output.folder)
                    .join(format!("{}.safetensors.index.json", output.stem)),
                weight_map,
                shards: first_shard..self.shards.len(),
            });
        }
        Ok(())
    }

    fn add_shard(
        &mut self,
        container: Container,
        path: PathBuf,
        metadata: NewMetadata,
        group: Vec<(Planned, Vec<NewEntry>)>,
    ) -> Result<()> {
        let shard = self.shards.len();
        let first = self.tensors.len();
        let mut entries = Vec::new();
        let mut late = 0;
        for (mut planned, new) in group {
            planned.shard = shard;
            for (slot, entry) in planned.slots.iter_mut().zip(new) {
                slot.entry = entries.len();
                if entry.late {
                    slot.late = Some(late);
                    late += 1;
                }
                entries.push(entry);
            }
            self.tensors.push(planned);
        }
        let layout = container
            .lay_out(entries, metadata)
            .map_err(|error| error.file(&path))?;
        self.shards.push(Shard {
            path,
            layout,
            late,
            tensors: first..self.tensors.len(),
        });
        Ok(())
    }

    /// Decides copy or encode for one assignment and lists the arrays it leads to.
    fn assign(
        &self,
        container: Container,
        assignment: &Assignment,
    ) -> Result<(Planned, Vec<NewEntry>)> {
        let checkpoint = checkpoint_at(&self.checkpoints, assignment.checkpoint)?;
        let position = checkpoint.position(&assignment.name)?;
        let tensor = checkpoint.tensor(&assignment.name)?;
        let path = checkpoint.path(tensor.main()?.file).to_owned();
        let locate = |error: Error| error.tensor(&tensor.name).file(&path);
        let action = self.action(tensor, assignment).map_err(locate)?;
        let (slots, entries) = match &action {
            Action::Copy => copied_entries(tensor, &assignment.target),
            Action::Encode { layout, .. } => encoded_entries(layout, &assignment.target),
        };
        for entry in &entries {
            storable(container, entry.dtype).map_err(locate)?;
        }
        let planned = Planned {
            checkpoint: assignment.checkpoint,
            position,
            target: assignment.target.clone(),
            why: assignment.why.clone(),
            action,
            shard: 0,
            slots,
        };
        Ok((planned, entries))
    }

    fn action(&self, tensor: &Tensor, assignment: &Assignment) -> Result<Action> {
        if assignment.format == "copy" {
            return Ok(Action::Copy);
        }
        let format = formats::find(&assignment.format)?;
        let source = tensor.as_packed().ok_or_else(|| {
            Error::unsupported(format!(
                "{} values cannot be turned into {}",
                tensor.dtype,
                format.info().name
            ))
        })?;
        let params = assignment.params.params(tensor.dtype)?;
        let layout = format.layout(&tensor.shape, &params)?;
        let same = source.format.info().name == format.info().name
            && source.layout.components == layout.components;
        if same
            && source.layout.params.block_size.unwrap_or_default()
                == layout.params.block_size.unwrap_or_default()
        {
            return Ok(Action::Copy);
        }
        let cut = Cut::new(
            &[source.layout.unit_weights, layout.unit_weights],
            layout.weights,
            slab_weights(tensor, self.slab_bytes),
        );
        Ok(Action::Encode {
            format,
            layout,
            cut,
        })
    }

    fn metadata(&self, container: Container, output: &Output) -> Result<NewMetadata> {
        match container {
            Container::Safetensors => {
                let mut metadata = request::text_metadata(&output.metadata)?;
                metadata.insert(String::from("weightpack.plan"), self.id.clone());
                Ok(NewMetadata::Text(metadata))
            }
            Container::Gguf => super::metadata::gguf(&self.checkpoints, output),
        }
    }

    fn check_paths(&self) -> Result<()> {
        let mut paths = HashSet::new();
        let weights = self.shards.iter().map(|shard| shard.path.as_path());
        let indexes = self.indexes.iter().map(|index| index.path.as_path());
        let others = self.files.iter().map(|extra| Path::new(&extra.path));
        for path in weights.chain(indexes).chain(others) {
            let inside = path
                .components()
                .all(|part| matches!(part, PathPart::Normal(_)));
            if !inside || path.as_os_str().is_empty() {
                return Err(Error::config("path leaves the destination").file(path));
            }
            if !paths.insert(path) {
                return Err(Error::config("two files would be written under one name").file(path));
            }
        }
        Ok(())
    }

    /// Chooses slabs small enough for the memory limit, or refuses.
    fn fit_memory(&mut self) -> Result<()> {
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
                    .max_by_key(|planned| self.worker_bytes(planned) + statistics_bytes(planned));
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
            let Some(tensor) = checkpoint.tensors.get(planned.position) else {
                continue;
            };
            if let (Action::Encode { layout, cut, .. }, Some(source)) =
                (&mut planned.action, tensor.as_packed())
            {
                let units = [source.layout.unit_weights, layout.unit_weights];
                *cut = Cut::new(
                    &units,
                    layout.weights,
                    slab_weights(tensor, self.slab_bytes),
                );
            }
        }
        Ok(())
    }

    /// Buffers of a worker at this tensor: slab in, slab out, two tiles of `f32`.
    fn worker_bytes(&self, planned: &Planned) -> u64 {
        match (&planned.action, self.source(planned)) {
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

fn statistics_bytes(planned: &Planned) -> u64 {
    match &planned.action {
        Action::Encode { layout, .. } => layout
            .statistics
            .map_or(0, |span| span.range(0, layout.weights).end),
        Action::Copy => 0,
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

/// What a tensor is stored as, for tables.
pub fn source_name(tensor: &Tensor) -> String {
    match &tensor.packed {
        Some((format, _)) => format.info().name.to_owned(),
        None => tensor.dtype.name(),
    }
}

fn checkpoint_at(checkpoints: &[Arc<Checkpoint>], index: usize) -> Result<&Arc<Checkpoint>> {
    checkpoints
        .get(index)
        .ok_or_else(|| Error::config(format!("no checkpoint {index}")))
}

fn extra_bytes(extra: &ExtraFile) -> u64 {
    match (&extra.text, &extra.copy) {
        (Some(text), _) => text.len() as u64,
        (None, Some(path)) => std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
        (None, None) => 0,
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or(String::new(), |name| name.to_string_lossy().into_owned())
}

fn check_destination(request: &Request) -> Result<()> {
    if request.destination.file_name().is_none() {
        return Err(Error::config("the destination has no name").file(&request.destination));
    }
    let file_with_more = request.outputs.len() != 1 || !request.files.is_empty();
    if request.kind == Kind::File && file_with_more {
        return Err(
            Error::config("a file destination takes one model and no other files")
                .file(&request.destination),
        );
    }
    for extra in &request.files {
        if extra.text.is_some() == extra.copy.is_some() {
            return Err(Error::config("a file needs either a text or a source")
                .file(Path::new(&extra.path)));
        }
    }
    Ok(())
}

/// Hash of all that decides the output bytes: what is asked for, and the sources' own headers.
fn identity(request: &Request, checkpoints: &[Arc<Checkpoint>]) -> Result<String> {
    let mut hash = Xxh3::new();
    let mut feed = |text: &str| {
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    };
    for output in &request.outputs {
        feed(&format!(
            "{} {} {} {:?} {:?}",
            output.container, output.folder, output.stem, output.max_shard_bytes, output.metadata
        ));
        for tensor in &output.tensors {
            feed(&format!(
                "{} {} {} {} {:?}",
                tensor.checkpoint, tensor.name, tensor.target, tensor.format, tensor.params
            ));
        }
    }
    for extra in &request.files {
        feed(&extra.path);
        feed(extra.text.as_deref().unwrap_or(""));
    }
    for checkpoint in checkpoints {
        for file in &checkpoint.files {
            for entry in &file.header.entries {
                feed(&format!(
                    "{} {} {:?} {}",
                    entry.name, entry.dtype, entry.shape, entry.offset
                ));
            }
        }
    }
    Ok(format!("{:032x}", hash.digest128()))
}

fn source_state(checkpoints: &[Arc<Checkpoint>]) -> String {
    let mut hash = Xxh3::new();
    for checkpoint in checkpoints {
        for file in &checkpoint.files {
            hash.update(file.source.path().to_string_lossy().as_bytes());
            hash.update(&file.source.len().to_le_bytes());
            hash.update(&file.source.identity().to_bytes());
        }
    }
    format!("{:032x}", hash.digest128())
}
