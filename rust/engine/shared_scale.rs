//! Tensors that get one scale of the whole tensor together: which they are, and the first pass over all of
//! them. The scale of each follows once every one has been read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::formats::Format;

use super::plan::{Action, Planned};
use super::pool::lock;
use super::request::Assignment;

/// The sets among `tensors`, all those of one output, as positions there. Tensors that are copied, and
/// empty ones, are in none; a tensor that would be alone is not, either.
pub fn sets(assignments: &[Assignment], tensors: &[Planned]) -> Result<Vec<Vec<usize>>> {
    let words: BTreeMap<&str, &str> = assignments
        .iter()
        .filter_map(|one| Some((one.target.as_str(), one.shared_scale.as_deref()?)))
        .collect();
    let mut sets: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let mut formats: BTreeMap<&str, &dyn Format> = BTreeMap::new();
    for (position, planned) in tensors.iter().enumerate() {
        let (Some(word), Action::Encode { format, layout, .. }) =
            (words.get(planned.target.as_str()), &planned.action)
        else {
            continue;
        };
        if layout.weights == 0 {
            continue;
        }
        format
            .join(&mut Vec::new(), &[])
            .map_err(|error| error.tensor(&planned.target))?;
        let (name, first) = (format.info().name, formats.entry(word).or_insert(*format));
        if first.info().name != name {
            return Err(Error::config(format!(
                "tensors that share a scale have one format, and these have {} and {name}",
                first.info().name
            ))
            .tensor(&planned.target));
        }
        sets.entry(word).or_default().push(position);
    }
    Ok(sets.into_values().filter(|set| set.len() > 1).collect())
}

/// The first pass over a set.
#[derive(Default)]
pub struct Joined {
    /// Tensors left.
    unread: AtomicUsize,
    statistics: Mutex<Vec<u8>>,
}

impl Joined {
    /// A pass over `tensors` tensors.
    pub fn new(tensors: usize) -> Self {
        Joined {
            unread: AtomicUsize::new(tensors),
            ..Joined::default()
        }
    }

    /// Takes what was measured of one tensor; with the last one, gives what holds for all.
    pub fn add(&self, format: &dyn Format, measured: &[u8]) -> Result<Option<Vec<u8>>> {
        format.join(&mut lock(&self.statistics), measured)?;
        if self.unread.fetch_sub(1, Ordering::AcqRel) != 1 {
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut *lock(&self.statistics))))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    use serde_json::json;

    use super::super::checkpoint::Checkpoint;
    use super::super::journal::Line;
    use super::super::keeper::Sinks;
    use super::super::plan::Plan;
    use super::super::run::{run, RunChoices};
    use super::super::workspace::Workspace;

    const NAMES: [&str; 3] = ["a.weight", "b.weight", "c.weight"];

    /// Three tensors of 4 x 512 weights, the last of which holds the largest.
    fn source(folder: &Path) -> Arc<Checkpoint> {
        let header: serde_json::Map<_, _> = NAMES
            .iter()
            .enumerate()
            .map(|(index, name)| {
                let range = [index * 8192, (index + 1) * 8192];
                let entry = json!({"dtype": "F32", "shape": [4, 512], "data_offsets": range});
                ((*name).to_owned(), entry)
            })
            .collect();
        let header = serde_json::to_vec(&header).unwrap();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        for number in 0..6144u16 {
            let weight = f32::from(number % 97 * (1 + number / 2048)) - 48.0;
            bytes.extend(weight.to_le_bytes());
        }
        let path = folder.join("model.safetensors");
        fs::write(&path, bytes).unwrap();
        Arc::new(Checkpoint::open(&path).unwrap())
    }

    fn plan(source: &Arc<Checkpoint>, destination: &Path) -> Plan {
        let row = |name: &&str| {
            json!({
                "checkpoint": 0, "name": name, "as": name, "format": "modelopt:nvfp4",
                "shared_scale": "all",
            })
        };
        let rows: Vec<_> = NAMES.iter().map(row).collect();
        let request = json!({
            "destination": destination, "kind": "folder",
            "outputs": [{"container": "safetensors", "stem": "model", "tensors": rows}],
            "options": {"threads": 2, "slab_bytes": 1, "verify": false},
        });
        let request = serde_json::from_value(request).unwrap();
        Plan::build(request, vec![Arc::clone(source)]).unwrap()
    }

    #[test]
    fn what_is_left_of_a_run_gets_the_scale_of_all() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let whole = folder.path().join("whole");
        run(&plan(&source, &whole), RunChoices::default(), &mut |_| {
            Ok(())
        })
        .unwrap();
        let whole = fs::read(whole.join("model.safetensors")).unwrap();
        for finished in 0..NAMES.len() {
            let destination = folder.path().join(format!("after {finished}"));
            let plan = plan(&source, &destination);
            let begin = Line::Begin {
                plan: plan.id.clone(),
                sources: plan.source_state.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                transient: false,
            };
            let opened = Workspace::open(&destination, plan.kind, &plan.id, &begin, false);
            let (workspace, mut journal, _) = opened.unwrap();
            let sinks = Sinks::new(&plan, workspace.content());
            let shard = &plan.shards[0];
            sinks.reserve(shard).unwrap();
            let sink = sinks.get(&plan, 0).unwrap();
            for slot in &plan.tensors[finished].slots {
                let start = shard.layout.offsets[slot.entry];
                let entry = &shard.layout.entries()[slot.entry];
                let bytes = entry.dtype.byte_len(&entry.shape).unwrap();
                let range = start as usize..(start + bytes) as usize;
                sink.write_at(start, &whole[range]).unwrap();
            }
            let line = Line::Tensor {
                tensor: finished,
                late: Vec::new(),
                sums: None,
            };
            journal.append(&[line]).unwrap();
            drop((journal, sinks, sink, workspace));
            let resume = RunChoices {
                resume: true,
                ..RunChoices::default()
            };
            let report = run(&plan, resume, &mut |_| Ok(())).unwrap();
            assert!(report.resumed_bytes > 0);
            // Everything is measured, and what is left is read once more.
            assert_eq!(report.read_bytes, 3 * 8192 + 2 * 8192);
            let found = fs::read(destination.join("model.safetensors")).unwrap();
            assert_eq!(found, whole);
        }
    }
}
