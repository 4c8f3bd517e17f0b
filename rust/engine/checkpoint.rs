//! The logical tensors of a checkpoint: a packed weight and the statistics beside it are one
//! tensor, whatever the number of arrays that store it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float;
use crate::formats::{self, Format, Layout, Params};
use crate::io::file::FileSource;
use crate::io::{index, Container, Entry, Header, Metadata, Source};
use crate::shape;

use super::decoded::Decoded;
use super::gather::Gather;
use super::recognise::{self, Hints};
use super::slab::Packed;
use super::transpose::Transposed;

/// Most bytes of a whole-tensor component that is read to recognise a packed tensor.
const MOST_WHOLE_BYTES: u64 = 64 * 1024;

/// One open file with its checked header.
pub struct OpenFile {
    /// The file.
    pub source: Arc<FileSource>,
    /// Its header.
    pub header: Header,
}

/// One stored array and the file that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Index into [`Checkpoint::files`].
    pub file: usize,
    /// Where it lies.
    pub entry: Entry,
    /// What it is made of, for an array that no file holds as it is; then `file` and the entry's
    /// offset are those of the first array that it is made of.
    pub made: Option<Made>,
}

/// How an array is made of stored ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Made {
    /// Rows of them, joined.
    Rows(Arc<Gather>),
    /// One of them, with rows and columns exchanged.
    Transposed(Arc<Transposed>),
    /// The decoded weights of several.
    Decoded(Arc<Decoded>),
}

impl Stored {
    /// Bytes of buffers that reading it takes, besides the one that is filled.
    pub fn buffer_bytes(&self) -> u64 {
        match &self.made {
            None => 0,
            Some(Made::Rows(gather)) => gather.buffer_bytes(),
            Some(Made::Transposed(matrix)) => matrix.buffer_bytes(),
            Some(Made::Decoded(weights)) => weights.buffer_bytes(),
        }
    }

    /// The shape that it has in the file, also where it is read with rows and columns exchanged.
    pub fn file_shape(&self) -> &[u64] {
        match &self.made {
            Some(Made::Transposed(matrix)) => &matrix.stored().entry.shape,
            _ => &self.entry.shape,
        }
    }

    /// Bytes that are read together without reading any in vain; 1 for what a file holds.
    pub fn unit_bytes(&self) -> u64 {
        match &self.made {
            Some(Made::Decoded(weights)) => weights.unit_bytes(),
            _ => 1,
        }
    }
}

/// One logical tensor.
#[derive(Clone)]
pub struct Tensor {
    /// Name of the weight.
    pub name: String,
    /// Logical shape, slowest dimension first.
    pub shape: Vec<u64>,
    /// Element type that decoding gives back; for arrays no format decodes, the stored type.
    pub dtype: Dtype,
    /// How to decode it, and the layout; `None` for integers and for types that are only listed.
    pub packed: Option<(&'static dyn Format, Layout)>,
    /// Stored arrays: for packed tensors in the order of the layout's components, otherwise one.
    pub parts: Vec<Option<Stored>>,
    /// What files hold in its place, for one whose weights are decoded before anything else is done.
    pub origin: Option<Origin>,
}

/// What decoded weights were made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The names of its formats.
    pub formats: String,
    /// Bytes that files hold of it.
    pub bytes: u64,
}

impl Tensor {
    /// Format and layout together, for tensors that can be decoded.
    pub fn as_packed(&self) -> Option<Packed<'_>> {
        self.packed.as_ref().map(|(format, layout)| Packed {
            format: *format,
            layout,
        })
    }

    /// The arrays that are there.
    pub fn stored(&self) -> impl Iterator<Item = &Stored> {
        self.parts.iter().flatten()
    }

    /// Bytes of all stored arrays.
    pub fn stored_bytes(&self) -> u64 {
        self.stored().map(|stored| stored.entry.bytes).sum()
    }

    /// Bytes that files hold of it.
    pub fn file_bytes(&self) -> u64 {
        match &self.origin {
            Some(origin) => origin.bytes,
            None => self.stored_bytes(),
        }
    }

    /// The main array.
    pub fn main(&self) -> Result<&Stored> {
        self.stored()
            .next()
            .ok_or_else(|| Error::checkpoint("no stored array").tensor(&self.name))
    }
}

/// The files of one checkpoint, open, and what they hold.
pub struct Checkpoint {
    /// Files in shard order.
    pub files: Vec<OpenFile>,
    /// Logical tensors, in file order of their main arrays.
    pub tensors: Vec<Tensor>,
    /// Peculiarities worth telling.
    pub warnings: Vec<String>,
    by_name: HashMap<String, usize>,
}

impl Checkpoint {
    /// Opens a `.safetensors`, an `*.index.json` with its shards, or a `.gguf` with its splits, and
    /// checks every header. Reads no weights.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, false, &Hints::default())
    }

    /// As [`Checkpoint::open`]; with `lenient`, what careless writers leave behind is told as a
    /// warning where it can be read all the same. `hints` are what the model says besides.
    pub fn open_with(path: &Path, lenient: bool, hints: &Hints) -> Result<Self> {
        let resolved = index::resolve_with(path, lenient)?;
        let files: Vec<OpenFile> = resolved
            .files
            .into_iter()
            .map(|(source, header)| OpenFile { source, header })
            .collect();
        Checkpoint::of(files, resolved.warnings, hints)
    }

    /// A safetensors file that is not on a disk: its bytes, and the name that messages use.
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        let source = FileSource::from_bytes(name, bytes);
        let header = Container::Safetensors.read_header(&source)?;
        let source = Arc::new(source);
        Checkpoint::of(
            vec![OpenFile { source, header }],
            Vec::new(),
            &Hints::default(),
        )
    }

    /// Arrays that lie in memory: each one is a tensor by itself, also what would be recognised as part of
    /// a packed weight in a file. `entries` say where each begins in `source`.
    pub fn from_arrays(source: FileSource, entries: Vec<Entry>) -> Result<Self> {
        let mut tensors = Vec::with_capacity(entries.len());
        let mut by_name = HashMap::with_capacity(entries.len());
        for (position, entry) in entries.iter().enumerate() {
            if by_name.insert(entry.name.clone(), position).is_some() {
                return Err(Error::config("name appears twice").tensor(&entry.name));
            }
            let stored = Stored {
                file: 0,
                entry: entry.clone(),
                made: None,
            };
            tensors.push(plain_tensor(stored).map_err(|error| error.tensor(&entry.name))?);
        }
        let header = Header {
            container: Container::Safetensors,
            entries,
            metadata: Metadata::Text(BTreeMap::new()),
            big_endian: false,
            header_bytes: 0,
            warnings: Vec::new(),
        };
        let source = Arc::new(source);
        Ok(Checkpoint {
            files: vec![OpenFile { source, header }],
            tensors,
            warnings: Vec::new(),
            by_name,
        })
    }

    fn of(files: Vec<OpenFile>, mut warnings: Vec<String>, hints: &Hints) -> Result<Self> {
        for file in &files {
            warnings.extend(file.header.warnings.iter().cloned());
        }
        let mut checkpoint = Checkpoint {
            files,
            tensors: Vec::new(),
            warnings,
            by_name: HashMap::new(),
        };
        checkpoint.tensors = checkpoint.recognise(hints)?;
        for (position, tensor) in checkpoint.tensors.iter().enumerate() {
            if checkpoint
                .by_name
                .insert(tensor.name.clone(), position)
                .is_some()
            {
                return Err(
                    Error::checkpoint("is there packed and not packed").tensor(&tensor.name)
                );
            }
        }
        Ok(checkpoint)
    }

    /// The container of its files.
    pub fn container(&self) -> Container {
        self.files
            .first()
            .map_or(Container::Safetensors, |file| file.header.container)
    }

    /// Position of the tensor called `name`.
    pub fn position(&self, name: &str) -> Result<usize> {
        self.by_name
            .get(name)
            .copied()
            .ok_or_else(|| Error::checkpoint("no such tensor").tensor(name))
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let position = self.position(name)?;
        self.tensors
            .get(position)
            .ok_or_else(|| Error::checkpoint("no such tensor").tensor(name))
    }

    /// Fills `buffer` with bytes `offset..` of a stored array, in little-endian order.
    pub fn read(&self, stored: &Stored, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let file = self
            .files
            .get(stored.file)
            .ok_or_else(|| Error::checkpoint(format!("no file {}", stored.file)))?;
        let end = shape::add(offset, buffer.len() as u64, "end of read")?;
        if end > stored.entry.bytes {
            return Err(Error::checkpoint(format!(
                "read of bytes {offset}..{end} of an array of {} bytes",
                stored.entry.bytes
            ))
            .tensor(&stored.entry.name));
        }
        let fetch = |part: &Stored, offset: u64, buffer: &mut [u8]| self.read(part, offset, buffer);
        match &stored.made {
            Some(Made::Rows(gather)) => return gather.read(offset, buffer, &fetch),
            Some(Made::Transposed(matrix)) => return matrix.read(offset, buffer, &fetch),
            Some(Made::Decoded(weights)) => return weights.read(self, offset, buffer),
            None => {}
        }
        file.source
            .read_at(
                shape::add(stored.entry.offset, offset, "file offset")?,
                buffer,
            )
            .map_err(|error| {
                let error = error.tensor(&stored.entry.name);
                match self.lasting_path(stored.file) {
                    Some(path) => error.file(path),
                    None => error,
                }
            })?;
        if file.header.big_endian {
            float::swap_elements(stored.entry.dtype, buffer)?;
        }
        Ok(())
    }

    /// As [`Self::read`], the array beginning anew after its last byte.
    pub fn read_turns(&self, stored: &Stored, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let period = stored.entry.bytes.max(1);
        let (mut offset, mut rest) = (offset % period, buffer);
        while rest.len() as u64 > period - offset {
            let (here, later) = rest.split_at_mut(shape::to_usize(period - offset)?);
            self.read(stored, offset, here)?;
            (offset, rest) = (0, later);
        }
        self.read(stored, offset, rest)
    }

    /// All bytes of a small array.
    pub fn read_whole(&self, stored: &Stored) -> Result<Vec<u8>> {
        if stored.entry.bytes > MOST_WHOLE_BYTES {
            return Err(Error::checkpoint(format!(
                "quantization record of {} bytes (expected at most {MOST_WHOLE_BYTES})",
                stored.entry.bytes
            ))
            .tensor(&stored.entry.name)
            .file(self.path(stored.file)));
        }
        let mut bytes = vec![0; shape::to_usize(stored.entry.bytes)?];
        self.read(stored, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Path of file `file`.
    pub fn path(&self, file: usize) -> &Path {
        self.files
            .get(file)
            .map_or(Path::new(""), |file| file.source.path())
    }

    /// As [`Self::path`], unless its bytes only lie in this process's memory.
    pub fn lasting_path(&self, file: usize) -> Option<&Path> {
        let source = &self.files.get(file)?.source;
        source.is_lasting().then(|| source.path())
    }

    fn recognise(&self, hints: &Hints) -> Result<Vec<Tensor>> {
        let mut stored: BTreeMap<&str, Stored> = BTreeMap::new();
        let mut order: Vec<&str> = Vec::new();
        for (file, open) in self.files.iter().enumerate() {
            for entry in &open.header.entries {
                order.push(&entry.name);
                stored.insert(
                    &entry.name,
                    Stored {
                        file,
                        entry: entry.clone(),
                        made: None,
                    },
                );
            }
        }
        let mut packed: HashMap<String, Tensor> = HashMap::new();
        if self.container() == Container::Safetensors {
            for recognised in recognise::packed_tensors(self, &stored, hints)? {
                let mut names = recognised.stored().map(|part| part.entry.name.clone());
                let main = names.next().unwrap_or_default();
                for name in names {
                    stored.remove(name.as_str());
                }
                packed.insert(main, recognised);
            }
        }
        let mut tensors = Vec::with_capacity(stored.len());
        for name in order {
            let Some(array) = stored.remove(name) else {
                continue;
            };
            tensors.push(match packed.remove(name) {
                Some(tensor) => tensor,
                None => plain_tensor(array).map_err(|error| error.tensor(name))?,
            });
        }
        Ok(tensors)
    }
}

/// The tensor that one array is by itself.
pub(super) fn plain_tensor(array: Stored) -> Result<Tensor> {
    let entry = &array.entry;
    let params = Params {
        dtype: entry.dtype,
        ..Params::default()
    };
    let packed = match formats::for_dtype(entry.dtype) {
        Some(format) => Some((format, format.layout(&entry.shape, &params)?)),
        None => None,
    };
    Ok(Tensor {
        name: entry.name.clone(),
        shape: entry.shape.clone(),
        dtype: entry.dtype,
        packed,
        parts: vec![Some(array)],
        origin: None,
    })
}
