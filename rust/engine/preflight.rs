//! What is checked about the destination before the first byte is written.

use std::path::Path;

use crate::error::{Error, Result};
use crate::io::file;
use crate::io::Source;

use super::leftovers::Leftover;
use super::plan::Plan;
use super::request::Kind;
use super::workspace;

/// Refuses a destination that exists, is of another kind or cannot be written.
pub fn check_place(destination: &Path, kind: Kind, overwrite: bool) -> Result<()> {
    let parent = workspace::existing_parent(destination)?;
    file::check_writable(parent)?;
    let Ok(metadata) = std::fs::symlink_metadata(destination) else {
        return Ok(());
    };
    let empty_folder = metadata.is_dir()
        && std::fs::read_dir(destination).is_ok_and(|mut entries| entries.next().is_none());
    let same_kind = metadata.is_dir() == (kind == Kind::Folder);
    if !same_kind {
        return Err(
            Error::config("the destination is of another kind (folder or file)").file(destination),
        );
    }
    if !overwrite && !empty_folder {
        return Err(Error::config("the destination exists")
            .file(destination)
            .hint("choose another one, or replace it with --overwrite (overwrite=True)"));
    }
    if metadata.is_dir() {
        // The folder as a whole gets another name.
        file::check_writable(destination)?;
        if file::is_mount_point(destination) {
            let fact = "the destination is a mount point, and a folder is replaced as a whole";
            return Err(Error::config(fact)
                .file(destination)
                .hint("write to a folder in it"));
        }
    }
    Ok(())
}

/// As [`check_place`]; also refuses a destination that holds the source.
pub fn check_destination(plan: &Plan, overwrite: bool) -> Result<()> {
    let destination = plan.destination.as_path();
    check_place(destination, plan.kind, overwrite)?;
    if plan
        .checkpoints
        .iter()
        .flat_map(|checkpoint| &checkpoint.files)
        .any(|open| open.source.is_file() && lies_in(open.source.path(), destination))
    {
        return Err(Error::config("the destination holds the source")
            .file(destination)
            .hint("write somewhere else, then move it"));
    }
    Ok(())
}

/// Whether `file` is `place` or lies below it.
fn lies_in(file: &Path, place: &Path) -> bool {
    match (file.canonicalize(), place.canonicalize()) {
        (Ok(file), Ok(place)) => file.starts_with(place),
        _ => false,
    }
}

/// Refuses a plan that the disk has no room for, what an earlier run reserved and what will be
/// removed counted in.
pub fn check_space(plan: &Plan, leftovers: &[Leftover]) -> Result<()> {
    let partial = workspace::partial_path(&plan.destination, plan.workspace_id());
    let removed = leftovers
        .iter()
        .map(|leftover| file::used_bytes(leftover.path()));
    let there = removed.fold(file::used_bytes(&partial), u64::saturating_add);
    let need = plan.output_bytes().saturating_sub(there);
    let free = plan.disk_free_bytes()?;
    if need > free {
        let folder = workspace::existing_parent(&plan.destination)?;
        return Err(Error::no_space(need, free, folder));
    }
    Ok(())
}
