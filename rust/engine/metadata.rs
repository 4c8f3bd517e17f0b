//! Key-value pairs of a GGUF output: those asked for, before those carried over from a source.

use std::collections::HashSet;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::io::gguf::Value;
use crate::io::{Metadata, NewMetadata};

use super::checkpoint::Checkpoint;
use super::request::Output;

/// Pairs that describe how a file was split, not the model.
const SPLIT_PREFIX: &str = "split.";

/// The pairs of `output`, in order; one that is asked for replaces one carried over.
pub fn gguf(checkpoints: &[Arc<Checkpoint>], output: &Output) -> Result<NewMetadata> {
    let mut pairs = asked_for(&output.metadata)?;
    let known: HashSet<String> = pairs.iter().map(|(key, _)| key.clone()).collect();
    if let Some(index) = output.metadata_from {
        let checkpoint = checkpoints.get(index).ok_or_else(|| {
            Error::config(format!("no checkpoint {index} to carry metadata over from"))
        })?;
        if let Some(file) = checkpoint.files.first() {
            if let Metadata::Gguf(metadata) = &file.header.metadata {
                for key in metadata.keys() {
                    if !key.starts_with(SPLIT_PREFIX) && !known.contains(key) {
                        pairs.push((key.to_owned(), metadata.carry(file.source.as_ref(), key)?));
                    }
                }
            }
        }
    }
    Ok(NewMetadata::Gguf(pairs))
}

fn asked_for(metadata: &serde_json::Value) -> Result<Vec<(String, Value)>> {
    if metadata.is_null() {
        return Ok(Vec::new());
    }
    let triples: Vec<(String, String, serde_json::Value)> =
        serde_json::from_value(metadata.clone()).map_err(|error| {
            Error::config(format!(
                "GGUF metadata must be a list of [key, type, value]: {error}"
            ))
        })?;
    triples
        .into_iter()
        .map(|(key, kind, value)| Ok((key, Value::from_json(&kind, &value)?)))
        .collect()
}
