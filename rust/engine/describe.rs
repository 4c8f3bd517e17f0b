//! The plan in words: for people, and for tools as JSON.

use serde_json::json;

use crate::error::Result;

use super::plan::{extra_bytes, format_name, source_name, Action, Plan};

impl Plan {
    /// The plan as JSON, for people and tools.
    pub fn describe(&self) -> Result<serde_json::Value> {
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for planned in &self.tensors {
            let (_, tensor) = self.source(planned)?;
            let from = source_name(tensor);
            let (to, copied) = match &planned.action {
                Action::Copy => (format_name(tensor), tensor.origin.is_none()),
                Action::Encode { format, .. } => (format.info().name.to_owned(), false),
            };
            tensors.push(json!({
                "name": tensor.name, "as": planned.target, "shape": planned.shape(tensor), "from": from, "to": to,
                "why": planned.why, "source_bytes": tensor.file_bytes(), "output_bytes": self.target_bytes(planned),
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
}
