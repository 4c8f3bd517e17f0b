//! What a finished run tells.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::{json, Value};

use crate::formats::ErrorSums;

use super::keeper::{Done, Finished};
use super::plan::{Action, Plan};

/// Bytes moved by one run.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Read from weights files, repeated passes included.
    pub read_bytes: u64,
    /// Written, other files included.
    pub written_bytes: u64,
    /// Found finished in an earlier run's workspace.
    pub resumed_bytes: u64,
}

/// One weights file that was written.
#[derive(Debug, Clone, Serialize)]
pub struct FileReport {
    /// Path below the destination.
    pub path: PathBuf,
    /// Length.
    pub bytes: u64,
}

/// One tensor that was written.
#[derive(Debug, Clone, Serialize)]
pub struct TensorReport {
    /// Name in the source.
    pub name: String,
    /// Name in the output.
    #[serde(rename = "as")]
    pub target: String,
    /// What it was stored as.
    pub from: String,
    /// What it is stored as.
    pub to: String,
    /// Bytes of its arrays.
    pub output_bytes: u64,
    /// Those bytes in bits, per weight; `None` for a tensor without weights.
    pub bits_per_weight: Option<f64>,
    /// How far the stored weights are from the source's; `None` for copies.
    pub error: Option<Value>,
}

/// What a finished run tells.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Wall time.
    pub seconds: f64,
    /// See [`Totals::read_bytes`].
    pub read_bytes: u64,
    /// See [`Totals::written_bytes`].
    pub written_bytes: u64,
    /// See [`Totals::resumed_bytes`].
    pub resumed_bytes: u64,
    /// Weights files.
    pub files: Vec<FileReport>,
    /// Tensors in plan order.
    pub tensors: Vec<TensorReport>,
}

impl Report {
    /// The report of a run that finished everything in `finished`.
    pub fn new(plan: &Plan, done: &Done, totals: &Totals, elapsed: Duration) -> Self {
        let files = plan
            .shards
            .iter()
            .zip(&done.shards)
            .map(|(shard, bytes)| FileReport {
                path: shard.path.clone(),
                bytes: bytes.unwrap_or(shard.layout.total_bytes),
            });
        let mut tensors = Vec::with_capacity(plan.tensors.len());
        for (planned, finished) in plan.tensors.iter().zip(&done.tensors) {
            let Ok((_, source)) = plan.source(planned) else {
                continue;
            };
            let from = super::plan::source_name(source);
            let weights = crate::shape::count_weights(&source.shape).unwrap_or(0);
            let output_bytes = exact_bytes(plan, planned, finished.as_ref());
            let sums = finished.as_ref().and_then(|finished| finished.sums);
            tensors.push(TensorReport {
                name: source.name.clone(),
                target: planned.target.clone(),
                to: match &planned.action {
                    Action::Copy => super::plan::format_name(source),
                    Action::Encode { format, .. } => format.info().name.to_owned(),
                },
                from,
                output_bytes,
                bits_per_weight: (weights > 0).then(|| output_bytes as f64 * 8.0 / weights as f64),
                error: sums.map(|sums| error_json(&sums, weights)),
            });
        }
        Report {
            seconds: elapsed.as_secs_f64(),
            read_bytes: totals.read_bytes,
            written_bytes: totals.written_bytes,
            resumed_bytes: totals.resumed_bytes,
            files: files.collect(),
            tensors,
        }
    }
}

/// Bytes of a tensor's arrays, late ones at their final length.
fn exact_bytes(plan: &Plan, planned: &super::plan::Planned, finished: Option<&Finished>) -> u64 {
    let Some(shard) = plan.shards.get(planned.shard) else {
        return 0;
    };
    let length = |slot: &super::plan::Slot| {
        let late = finished.and_then(|finished| {
            finished
                .late
                .iter()
                .find(|(component, _)| *component == slot.component)
        });
        match late {
            Some((_, bytes)) => bytes.len() as u64,
            None => {
                let entry = shard.layout.entries().get(slot.entry);
                entry
                    .and_then(|entry| entry.dtype.byte_len(&entry.shape).ok())
                    .unwrap_or(0)
            }
        }
    };
    planned.slots.iter().map(length).sum()
}

/// Error sums and the figures people read off them. `snr_db` is null where there is no error, and
/// `relative_rms` and `cosine` where there is no signal to relate it to.
pub fn error_json(sums: &ErrorSums, weights: u64) -> Value {
    let related = |value: f64| (sums.signal > 0.0 && value.is_finite()).then_some(value);
    let snr_db = related(10.0 * (sums.signal / sums.noise).log10());
    let cosine = sums.cross / (sums.signal * sums.power).sqrt();
    json!({
        "weights": weights, "signal": sums.signal, "noise": sums.noise, "cross": sums.cross, "power": sums.power,
        "max_error": sums.max_error, "relative_rms": related((sums.noise / sums.signal).sqrt()),
        "snr_db": snr_db, "cosine": related(cosine),
    })
}
