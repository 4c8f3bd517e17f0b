//! What makes two conversions the same one.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::error::Result;
use crate::io::Source;

use super::checkpoint::Checkpoint;
use super::request::{Assignment, Request};

/// Hash of all that decides the output bytes: what is asked for, and the sources' own headers.
pub fn plan_id(request: &Request, checkpoints: &[Arc<Checkpoint>]) -> Result<String> {
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
        if output.index.is_some() || !output.index_metadata.is_empty() {
            feed(&format!("{:?} {:?}", output.index, output.index_metadata));
        }
        if let Some(source) = output.metadata_from {
            feed(&format!("metadata from {source}"));
        }
        for tensor in &output.tensors {
            feed(&format!(
                "{} {} {} {} {:?}",
                tensor.checkpoint, tensor.name, tensor.target, tensor.format, tensor.params
            ));
            if let Some(derivation) = derivation(tensor) {
                feed(&derivation);
            }
            if tensor.with_previous {
                feed("with the one before");
            }
            if let Some(word) = &tensor.shared_scale {
                feed(&format!("scale of {word}"));
            }
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

/// What is done to the stored tensor before it is encoded; `None` for nothing.
fn derivation(tensor: &Assignment) -> Option<String> {
    let Assignment {
        rows,
        shape,
        add,
        importance,
        ..
    } = tensor;
    let plain = rows.is_empty() && shape.is_none() && add.is_none() && importance.is_none();
    (!plain).then(|| {
        let add = add.map(f32::to_bits);
        format!("{rows:?} {shape:?} {add:?} {importance:?}")
    })
}

/// Hash of the source files' paths, sizes and times: a journal only speaks of these.
pub fn source_state(checkpoints: &[Arc<Checkpoint>]) -> String {
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
