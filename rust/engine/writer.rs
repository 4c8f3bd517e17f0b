//! A file made from arrays in memory, tensor by tensor, in the caller's order. It is built beside
//! the destination like every conversion, and takes its place in one step.

use std::path::Path;

use xxhash_rust::xxh3::xxh3_128;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::formats::{self, Importance, Params};
use crate::io::file::{self, FileSink};
use crate::io::{Container, FileLayout, NewEntry, NewMetadata};
use crate::shape;

use super::array::{self, Options};
use super::journal::{Journal, Line};
use super::leftovers;
use super::preflight;
use super::request::Kind;
use super::workspace::{self, Workspace};

/// A file that is being written.
pub struct Writer {
    layout: FileLayout,
    sink: FileSink,
    workspace: Workspace,
    journal: Journal,
    written: Vec<bool>,
    overwrite: bool,
}

impl Writer {
    /// Begins a file at `destination`: everything about it but the data is known and checked.
    pub fn create(
        destination: &Path,
        container: Container,
        entries: Vec<NewEntry>,
        metadata: NewMetadata,
        overwrite: bool,
    ) -> Result<Self> {
        let Some(name) = destination.file_name() else {
            return Err(Error::config("the destination has no name").file(destination));
        };
        let count = entries.len();
        let layout = container
            .lay_out(entries, metadata)
            .map_err(|error| error.file(destination))?;
        preflight::check_place(destination, Kind::File, overwrite)?;
        let folder = workspace::existing_parent(destination)?;
        let free = file::free_bytes(folder)?;
        if layout.total_bytes > free {
            return Err(Error::no_space(layout.total_bytes, free, folder));
        }
        for leftover in leftovers::find(destination) {
            leftover.remove();
        }
        let id = identity(&layout)?;
        let begin = Line::Begin {
            plan: id.clone(),
            sources: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            transient: true,
        };
        let (workspace, journal, _) = Workspace::open(destination, Kind::File, &id, &begin, false)?;
        let made = FileSink::create(&workspace.content().join(name))
            .and_then(|sink| sink.reserve(layout.total_bytes).map(|()| sink));
        match made {
            Ok(sink) => Ok(Writer {
                layout,
                sink,
                workspace,
                journal,
                written: vec![false; count],
                overwrite,
            }),
            Err(error) => {
                workspace.discard();
                Err(error)
            }
        }
    }

    /// Writes tensor `index`: `data` as it is, or, where `source` names the element type of weights,
    /// encoded to the type that the file was laid out with.
    pub fn put(
        &mut self,
        index: usize,
        data: &[u8],
        source: Option<Dtype>,
        importance: Option<Importance>,
        options: Options,
    ) -> Result<()> {
        let (Some(entry), Some(offset)) = (
            self.layout.entries().get(index),
            self.layout.offsets.get(index),
        ) else {
            return Err(Error::Internal(format!("no tensor {index}")));
        };
        let located = |error: Error| error.tensor(&entry.name);
        let bytes = match source {
            Some(dtype) if dtype != entry.dtype => {
                encode(entry, data, dtype, importance, options).map_err(located)?
            }
            _ => {
                let expected = entry.dtype.byte_len(&entry.shape)?;
                if data.len() as u64 != expected {
                    return Err(located(Error::format(format!(
                        "{} bytes, expected {expected}",
                        data.len()
                    ))));
                }
                self.sink.write_at(*offset, data)?;
                Vec::new()
            }
        };
        self.sink.write_at(*offset, &bytes)?;
        if let Some(written) = self.written.get_mut(index) {
            *written = true;
        }
        Ok(())
    }

    /// Finishes the file and puts it in its place.
    pub fn commit(mut self) -> Result<u64> {
        if let Some(missing) = self.written.iter().position(|written| !written) {
            let entry = self.layout.entries().get(missing);
            let name = entry.map_or("", |entry| &entry.name);
            return Err(Error::config("tensor was not given").tensor(name));
        }
        self.sink.sync_data()?;
        // Until here the file begins with zeros, which every reader refuses.
        self.sink.write_at(0, &self.layout.header(&[])?)?;
        self.sink.sync_all()?;
        let committed = self
            .workspace
            .commit(&mut self.journal, true, self.overwrite);
        if let Err(error) = committed {
            self.workspace.discard();
            return Err(error);
        }
        // Should that fail, the next writer tries again.
        let _ = self.workspace.remove();
        Ok(self.layout.total_bytes)
    }

    /// Removes what was written so far.
    pub fn discard(self) {
        self.workspace.discard();
    }
}

fn encode(
    entry: &NewEntry,
    data: &[u8],
    source: Dtype,
    importance: Option<Importance>,
    options: Options,
) -> Result<Vec<u8>> {
    let format = formats::for_dtype(entry.dtype)
        .ok_or_else(|| Error::unsupported(format!("{} is not encoded", entry.dtype)))?;
    let params = Params {
        importance,
        ..Params::default()
    };
    let mut layout = format.layout(&entry.shape, &params)?;
    let mut bytes = vec![0; shape::to_usize(layout.component_bytes(0)?)?];
    array::encode_array(
        format,
        &mut layout,
        source,
        data,
        &mut [&mut bytes],
        options,
    )?;
    Ok(bytes)
}

/// Names the workspace; a later writer of the same file takes over what a killed one left.
fn identity(layout: &FileLayout) -> Result<String> {
    Ok(format!("{:032x}", xxh3_128(&layout.header(&[])?)))
}
