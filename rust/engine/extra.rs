//! The files of a destination that hold no planned tensors: carried over, then indexes, then texts,
//! so that what makes a folder a model (index, config) comes last.

use std::path::Path;

use crate::error::{Error, Result};
use crate::io::file::{FileSink, FileSource};
use crate::io::{index, Source};

use super::plan::Plan;

/// Bytes copied between two looks at signals.
const COPY_BYTES: usize = 4 << 20;

/// Writes them below `content`; gives the bytes written.
pub fn write(plan: &Plan, content: &Path, tick: &mut dyn FnMut() -> Result<()>) -> Result<u64> {
    let mut written = 0;
    for extra in &plan.files {
        if let Some(source) = &extra.copy {
            let path = made(content, Path::new(&extra.path))?;
            written += copy(source, &path, plan.options.sync, tick)?;
        }
        if let Some(source) = &extra.link {
            let path = made(content, Path::new(&extra.path))?;
            if std::fs::hard_link(source, &path).is_err() {
                written += copy(source, &path, plan.options.sync, tick)?;
            }
        }
    }
    for made_index in &plan.indexes {
        let path = made(content, &made_index.path)?;
        let mut metadata = made_index.metadata.clone();
        metadata.insert(
            String::from("total_size"),
            data_bytes(plan, made_index.shards.clone(), content)?.into(),
        );
        metadata.insert(String::from(index::PLAN_KEY), plan.id.clone().into());
        let text = index::to_json(&metadata, &made_index.weight_map)?;
        written += write_text(&path, &text, plan.options.sync)?;
    }
    for extra in &plan.files {
        if let Some(text) = &extra.text {
            let path = made(content, Path::new(&extra.path))?;
            written += write_text(&path, text, plan.options.sync)?;
        }
    }
    Ok(written)
}

/// Data bytes of finished shards.
fn data_bytes(plan: &Plan, shards: std::ops::Range<usize>, content: &Path) -> Result<u64> {
    let mut sum = 0;
    for shard in plan.shards.get(shards).unwrap_or_default() {
        let path = content.join(&shard.path);
        let length = std::fs::metadata(&path)
            .map_err(|error| Error::io("cannot read", &path, error))?
            .len();
        sum += length.saturating_sub(shard.layout.header_bytes);
    }
    Ok(sum)
}

/// `content/path`, its folder made, nothing there.
fn made(content: &Path, path: &Path) -> Result<std::path::PathBuf> {
    let path = content.join(path);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|error| Error::io("cannot create", folder, error))?;
    }
    if path.exists() {
        std::fs::remove_file(&path).map_err(|error| Error::io("cannot remove", &path, error))?;
    }
    Ok(path)
}

fn write_text(path: &Path, text: &str, sync: bool) -> Result<u64> {
    let sink = FileSink::create(path)?;
    sink.write_at(0, text.as_bytes())?;
    if sync {
        sink.sync_all()?;
    }
    Ok(text.len() as u64)
}

/// Copies a file, or what a link leads to; gives its length.
pub fn copy(
    from: &Path,
    to: &Path,
    sync: bool,
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<u64> {
    let source = FileSource::open(from)?;
    let sink = FileSink::create(to)?;
    let mut buffer = vec![0; COPY_BYTES.min(usize::try_from(source.len()).unwrap_or(COPY_BYTES))];
    let mut offset = 0;
    while offset < source.len() {
        tick()?;
        let left = usize::try_from(source.len() - offset).unwrap_or(COPY_BYTES);
        let length = buffer.len().min(left);
        let Some(part) = buffer.get_mut(..length) else {
            break;
        };
        source.read_at(offset, part)?;
        sink.write_at(offset, part)?;
        offset += length as u64;
    }
    if sync {
        sink.sync_all()?;
    }
    Ok(offset)
}
