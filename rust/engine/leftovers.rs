//! What killed runs left beside a destination.
//!
//! A conversion can be resumed, so its folder is kept. What was written from memory nobody can go on
//! with: the next writer to the same place removes it, unless its lock says that it is being worked on.
//! What has no journal yet, and no content, is nobody's either.
//!
//! One thing is finished instead of removed: an exchange by three renames (see [`file::exchange`]) that was
//! stopped while nothing had the destination's name.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::io::file;

use super::journal::{Journal, Line};
use super::workspace;

/// A workspace that nobody works in, locked.
pub struct Leftover {
    folder: PathBuf,
    _lock: File,
}

/// The workspaces of `destination` that can be removed.
pub fn find(destination: &Path) -> Vec<Leftover> {
    idle(destination)
        .filter(|leftover| is_waste(&leftover.folder, destination))
        .collect()
}

/// Finishes an exchange that was stopped half-way.
pub fn recover(destination: &Path) -> Result<()> {
    if destination.symlink_metadata().is_ok() {
        return Ok(());
    }
    for leftover in idle(destination) {
        if let Some(aside) = file::aside(&leftover.folder.join(workspace::CONTENT)) {
            if file::rename_new(&aside, destination)? {
                file::sync_directory(workspace::parent(destination))?;
            }
        }
    }
    Ok(())
}

impl Leftover {
    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// Removes it. What cannot be removed is left to the next writer.
    pub fn remove(self) {
        let _ = workspace::remove_folder(&self.folder);
    }
}

fn idle(destination: &Path) -> impl Iterator<Item = Leftover> + use<'_> {
    let parent = workspace::parent(destination);
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| {
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        is_folder && workspace::is_partial_of(destination, &entry.file_name())
    });
    folders.filter_map(|entry| {
        let folder = entry.path();
        let path = folder.join(workspace::LOCK);
        // A folder without a lock may be about to get one: then its owner finds this one.
        let mut options = OpenOptions::new();
        let lock = options.create(true).truncate(false).write(true);
        let lock = lock.open(&path).ok()?;
        let free = file::try_lock(&lock) == Some(true) && file::is_called(&lock, &path);
        free.then_some(Leftover {
            folder,
            _lock: lock,
        })
    })
}

/// Whether nobody can go on with what is in a workspace.
fn is_waste(folder: &Path, destination: &Path) -> bool {
    if workspace::holds_all(folder, destination) {
        return false;
    }
    let content = folder.join(workspace::CONTENT);
    let lines = Journal::read(&folder.join(workspace::JOURNAL)).unwrap_or_default();
    match lines.first() {
        Some(Line::Begin { transient, .. }) => *transient,
        Some(_) => false,
        None => fs::read_dir(content).map_or(true, |mut entries| entries.next().is_none()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::Kind;
    use super::super::workspace::Workspace;
    use super::*;

    fn begin(transient: bool) -> Line {
        Line::Begin {
            plan: String::from("p"),
            sources: String::from("s"),
            version: String::from("v"),
            transient,
        }
    }

    fn open(destination: &Path, id: &str, transient: bool) -> Workspace {
        let begin = begin(transient);
        let (workspace, _, _) =
            Workspace::open(destination, Kind::Folder, id, &begin, false).unwrap();
        fs::write(workspace.content().join("weights"), "w").unwrap();
        workspace
    }

    fn left(destination: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(destination.parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_nobody_can_go_on_with_is_removed_and_nothing_else() {
        let top = tempfile::tempdir().unwrap();
        let destination = top.path().join("out");
        let live = open(&destination, "aaaaaaaaaaaa", true);
        drop(open(&destination, "bbbbbbbbbbbb", true));
        drop(open(&destination, "cccccccccccc", false));
        fs::create_dir(top.path().join("out.partial-dddddddddddd")).unwrap();
        drop(open(&top.path().join("other"), "eeeeeeeeeeee", true));
        for name in ["out.partial-mine", "out.partial-ffffffffffff.old"] {
            fs::create_dir(top.path().join(name)).unwrap();
        }
        drop(open(&destination, "999999999999", true));
        fs::rename(
            top.path().join("out.partial-999999999999"),
            top.path().join("out.partial-999999999999.done"),
        )
        .unwrap();
        find(&destination).into_iter().for_each(Leftover::remove);
        let kept = [
            "other.partial-eeeeeeeeeeee",
            "out.partial-aaaaaaaaaaaa",
            "out.partial-cccccccccccc",
            "out.partial-ffffffffffff.old",
            "out.partial-mine",
        ];
        assert_eq!(left(&destination), kept);
        drop(live);
        find(&destination).into_iter().for_each(Leftover::remove);
        assert!(!top.path().join("out.partial-aaaaaaaaaaaa").exists());
    }

    #[test]
    fn an_exchange_that_was_stopped_half_way_is_finished() {
        let top = tempfile::tempdir().unwrap();
        let destination = top.path().join("out");
        let workspace = open(&destination, "aaaaaaaaaaaa", true);
        let content = workspace.content();
        fs::rename(&content, top.path().join("x")).unwrap();
        fs::create_dir(&content).unwrap();
        fs::write(content.join("weights"), "old").unwrap();
        let aside = content.with_file_name("content.exchanged-77");
        fs::rename(top.path().join("x"), &aside).unwrap();
        // Neither its own writer nor another one throws that away.
        workspace.discard();
        assert!(find(&destination).is_empty());
        recover(&destination).unwrap();
        assert_eq!(
            fs::read_to_string(destination.join("weights")).unwrap(),
            "w"
        );
        assert_eq!(find(&destination).len(), 1);
        recover(&destination).unwrap();
        find(&destination).into_iter().for_each(Leftover::remove);
        assert_eq!(left(&destination), ["out"]);
    }
}
