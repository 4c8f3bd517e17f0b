//! The plan: everything that will be written, where, and how, from headers alone. Pure, but for the
//! look at free disk space; every refusal that can be known is raised here, before the first write.

use std::collections::{BTreeMap, HashSet};
use std::path::{Component as PathPart, Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::formats::{Format, Layout};
use crate::io::{self, file, Container, FileLayout, NewEntry, NewMetadata};
use crate::shape;

use super::assign::assign;
use super::checkpoint::{Checkpoint, Tensor};
use super::identity;
use super::importance::Weighed;
use super::request::{self, ExtraFile, Kind, Options, Output, Request};
use super::shards;
use super::shared_scale;
use super::slab::{Cut, Packed, Task};
use super::workspace;

/// Source bytes of a slab when nothing is asked for: large enough that calls and writes do not
/// count, small enough that a slab and its result stay in the last-level cache.
const SLAB_BYTES: u64 = 4 << 20;

/// What happens to a tensor.
#[allow(
    clippy::large_enum_variant,
    reason = "one for each tensor of a plan, and most of them encode"
)]
pub enum Action {
    /// Its stored bytes are written as they are.
    Copy,
    /// It is decoded and encoded anew.
    Encode {
        /// The new format.
        format: &'static dyn Format,
        /// The new layout.
        layout: Box<Layout>,
        /// How the work is cut.
        cut: Cut,
        /// Added to every weight before it is encoded.
        add: Option<f32>,
        /// Importance of the columns; the layout holds it only while the tensor is worked on.
        weighed: Option<Weighed>,
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
    /// Position there; of a derived tensor, that of the first it is made of.
    pub position: usize,
    /// The source, where it is made of stored tensors and not one itself.
    pub derived: Option<Tensor>,
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
    /// Position among the plan's sets of tensors with one scale, where it is in one.
    pub shared_scale: Option<usize>,
}

impl Planned {
    /// The source tensor, `checkpoint` being the one it comes from.
    pub fn tensor<'a>(&'a self, checkpoint: &'a Checkpoint) -> Result<&'a Tensor> {
        match &self.derived {
            Some(tensor) => Ok(tensor),
            None => checkpoint
                .tensors
                .get(self.position)
                .ok_or_else(|| Error::config(format!("no tensor {}", self.position))),
        }
    }

    /// Shape of the result, `source` being the source tensor.
    pub fn shape<'a>(&'a self, source: &'a Tensor) -> &'a [u64] {
        match &self.action {
            Action::Encode { layout, .. } => &layout.shape,
            Action::Copy => &source.shape,
        }
    }
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
    /// What it says about the model, besides its size.
    pub metadata: serde_json::Map<String, serde_json::Value>,
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
    /// Sets of tensors that get one scale, as positions in `tensors`.
    pub shared_scales: Vec<Vec<usize>>,
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
            id: identity::plan_id(&request, &checkpoints)?,
            source_state: identity::source_state(&checkpoints),
            destination: request.destination,
            kind: request.kind,
            checkpoints,
            tensors: Vec::new(),
            shared_scales: Vec::new(),
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
    pub fn source<'a>(&'a self, planned: &'a Planned) -> Result<(&'a Checkpoint, &'a Tensor)> {
        let checkpoint = checkpoint_at(&self.checkpoints, planned.checkpoint)?;
        Ok((checkpoint, planned.tensor(checkpoint)?))
    }

    /// Whether its source lies in the memory of this process, so that no other one can go on with it.
    pub fn is_transient(&self) -> bool {
        let files = self.checkpoints.iter().flat_map(|one| &one.files);
        files.into_iter().any(|open| !open.source.is_lasting())
    }

    /// Names the folder it is built in: the same for a conversion that may be resumed, another one each
    /// time for what is written from memory, so that two writers do not meet.
    pub fn workspace_id(&self) -> &str {
        if self.is_transient() {
            &self.source_state
        } else {
            &self.id
        }
    }

    /// Bytes of the tensors in the files that hold them.
    pub fn source_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .filter_map(|planned| self.source(planned).ok())
            .map(|(_, tensor)| tensor.file_bytes())
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

    /// Free bytes where the destination will lie.
    pub fn disk_free_bytes(&self) -> Result<u64> {
        file::free_bytes(workspace::existing_parent(&self.destination)?)
    }

    /// What a worker does with each slab of an encoded tensor.
    pub fn task<'a>(&self, tensor: &'a Tensor, action: &'a Action) -> Option<Task<'a>> {
        let Action::Encode {
            format,
            layout,
            cut,
            add,
            ..
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
            add: *add,
            through: None,
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
            return Err(Error::checkpoint("no tensors to write"));
        }
        let metadata = self.metadata(container, output)?;
        let first_shard = self.shards.len();
        // A tensor and its statistics stay in one shard: not every reader finds them otherwise.
        let mut units: Vec<Vec<(Planned, Vec<NewEntry>)>> = Vec::new();
        let mut sizes: Vec<u64> = Vec::new();
        for assignment in &output.tensors {
            let (planned, entries) = assign(
                &self.checkpoints,
                output,
                container,
                self.slab_bytes,
                assignment,
            )?;
            let bytes = entries.iter().try_fold(0u64, |sum, entry| {
                shape::add(sum, entry.dtype.byte_len(&entry.shape)?, "shard size")
            })?;
            match (units.last_mut(), sizes.last_mut()) {
                (Some(unit), Some(size)) if assignment.with_previous => {
                    *size = shape::add(*size, bytes, "shard size")?;
                    unit.push((planned, entries));
                }
                _ => {
                    units.push(vec![(planned, entries)]);
                    sizes.push(bytes);
                }
            }
        }
        let files = shards::split(&sizes, output.max_shard_bytes);
        let mut groups = Vec::with_capacity(files.len());
        for file in files {
            let held = file
                .into_iter()
                .flat_map(|unit| units.get_mut(unit).map(std::mem::take));
            groups.push(held.flatten().collect::<Vec<_>>());
        }
        let count = groups.len();
        let first_tensor = self.tensors.len();
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
        self.share_scales(output, first_tensor)?;
        if count > 1 {
            self.indexes.push(IndexFile {
                path: Path::new(&output.folder).join(match &output.index {
                    Some(name) => name.clone(),
                    None => format!("{}.safetensors.index.json", output.stem),
                }),
                metadata: output.index_metadata.clone(),
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

    /// Finds the tensors with one scale among those from `first` on, which are all of an output.
    fn share_scales(&mut self, output: &Output, first: usize) -> Result<()> {
        let tensors = self.tensors.get_mut(first..).unwrap_or_default();
        for mut set in shared_scale::sets(&output.tensors, tensors)? {
            for position in &mut set {
                if let Some(planned) = tensors.get_mut(*position) {
                    planned.shared_scale = Some(self.shared_scales.len());
                }
                *position += first;
            }
            self.shared_scales.push(set);
        }
        Ok(())
    }

    fn metadata(&self, container: Container, output: &Output) -> Result<NewMetadata> {
        match container {
            Container::Safetensors => {
                let mut metadata = request::text_metadata(&output.metadata)?;
                metadata.insert(String::from(io::index::PLAN_KEY), self.id.clone());
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
}

/// What a tensor is stored as, for tables; for decoded weights, what they were made of.
pub fn source_name(tensor: &Tensor) -> String {
    match &tensor.origin {
        Some(origin) => origin.formats.clone(),
        None => format_name(tensor),
    }
}

/// What a copy of a tensor is stored as.
pub fn format_name(tensor: &Tensor) -> String {
    match &tensor.packed {
        Some((format, _)) => format.info().name.to_owned(),
        None => tensor.dtype.name(),
    }
}

/// Checkpoint `index`.
pub fn checkpoint_at(checkpoints: &[Arc<Checkpoint>], index: usize) -> Result<&Arc<Checkpoint>> {
    checkpoints
        .get(index)
        .ok_or_else(|| Error::config(format!("no checkpoint {index}")))
}

/// Length of another file. One that only gets another name needs no room.
pub fn extra_bytes(extra: &ExtraFile) -> u64 {
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
        let sources = [
            extra.text.is_some(),
            extra.copy.is_some(),
            extra.link.is_some(),
        ];
        if sources.iter().filter(|given| **given).count() != 1 {
            return Err(Error::config("a file needs one of a text and a source")
                .file(Path::new(&extra.path)));
        }
    }
    Ok(())
}
