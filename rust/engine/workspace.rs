//! Where a conversion is built, and how it takes the destination's place.
//!
//! Everything is made in `DESTINATION.partial-<plan>/`:
//!
//! | name | is |
//! |---|---|
//! | `content/` | what becomes the destination |
//! | `journal` | what is finished, see [`super::journal`] |
//! | `lock` | locked by the process at work; the system frees it however that process ends |
//!
//! Committing is one rename (or one exchange, where something stands at the destination): before
//! it the old destination is whole, after it the new one is. The folder is then called
//! `DESTINATION.partial-<plan>.done` and removed: a run that is stopped while it removes must not leave
//! what looks like an unfinished one.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::file;

use super::journal::{Journal, Line};
use super::request::Kind;

/// The folder a conversion is built in, locked.
pub struct Workspace {
    destination: PathBuf,
    kind: Kind,
    folder: PathBuf,
    _lock: File,
}

impl Workspace {
    /// Makes or takes over the folder for plan `id`, and gives the lines of an earlier run's journal
    /// if there is something to resume. Without `resume` what an earlier run left is removed.
    pub fn open(
        destination: &Path,
        kind: Kind,
        id: &str,
        begin: &Line,
        resume: bool,
    ) -> Result<(Self, Journal, Vec<Line>)> {
        let workspace = Self::lock(destination, kind, id)?;
        if resume {
            if let Some((journal, lines)) = Journal::reopen(&workspace.journal(), begin)? {
                return Ok((workspace, journal, lines));
            }
        }
        let content = workspace.content();
        if content.exists() {
            fs::remove_dir_all(&content)
                .map_err(|error| Error::io("cannot remove", &content, error))?;
        }
        fs::create_dir(&content).map_err(|error| Error::io("cannot create", &content, error))?;
        let journal = Journal::create(&workspace.journal(), begin)?;
        Ok((workspace, journal, Vec::new()))
    }

    /// The journal of an earlier run that was stopped after its result had taken the destination's
    /// place: what it left is removed, and nothing remains to be done.
    pub fn committed(
        destination: &Path,
        kind: Kind,
        id: &str,
        begin: &Line,
    ) -> Result<Option<Vec<Line>>> {
        let done = done_of(&partial_path(destination, id));
        if done.is_dir() {
            let left = Journal::reopen(&done.join("journal"), begin)?;
            let lines = left.map(|(_, lines)| lines);
            remove_done(&done)?;
            // The journal is removed last: where there is none, hardly any time has passed.
            let is_there = match &lines {
                Some(lines) => was_committed(destination, lines),
                None => destination.exists(),
            };
            if is_there {
                return Ok(Some(lines.unwrap_or_default()));
            }
        }
        if !partial_path(destination, id).is_dir() {
            return Ok(None);
        }
        let workspace = Self::lock(destination, kind, id)?;
        match Journal::reopen(&workspace.journal(), begin)? {
            Some((_, lines)) if was_committed(destination, &lines) => {
                workspace.remove()?;
                Ok(Some(lines))
            }
            _ => Ok(None),
        }
    }

    fn lock(destination: &Path, kind: Kind, id: &str) -> Result<Self> {
        let folder = partial_path(destination, id);
        fs::create_dir_all(&folder).map_err(|error| Error::io("cannot create", &folder, error))?;
        let path = folder.join("lock");
        let lock = File::create(&path).map_err(|error| Error::io("cannot create", &path, error))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
            |_| Error::config("another process is writing this conversion").file(&folder),
        )?;
        Ok(Workspace {
            destination: destination.to_owned(),
            kind,
            folder,
            _lock: lock,
        })
    }

    fn journal(&self) -> PathBuf {
        self.folder.join("journal")
    }

    /// The folder whose content becomes the destination.
    pub fn content(&self) -> PathBuf {
        self.folder.join("content")
    }

    /// What takes the destination's place: the content folder, or the one file in it.
    fn product(&self) -> PathBuf {
        match self.kind {
            Kind::Folder => self.content(),
            Kind::File => self
                .content()
                .join(self.destination.file_name().unwrap_or_default()),
        }
    }

    /// Puts the content in the destination's place and removes the workspace.
    pub fn commit(self, journal: &mut Journal, sync: bool) -> Result<()> {
        let product = self.product();
        let inode = fs::metadata(&product)
            .map_err(|error| Error::io("cannot read", &product, error))?
            .ino();
        journal.append(&[Line::Committing { inode }])?;
        match (self.kind, self.destination.exists()) {
            (Kind::Folder, true) => file::exchange(&product, &self.destination)?,
            _ => fs::rename(&product, &self.destination)
                .map_err(|error| Error::io("cannot rename", &product, error))?,
        }
        if sync {
            file::sync_directory(parent(&self.destination))?;
        }
        self.remove()
    }

    /// Removes the workspace and all in it. After an exchange that is the old destination.
    fn remove(self) -> Result<()> {
        let done = done_of(&self.folder);
        remove_done(&done)?;
        fs::rename(&self.folder, &done)
            .map_err(|error| Error::io("cannot rename", &self.folder, error))?;
        remove_done(&done)
    }

    /// Removes what was made in vain; the failure that led here is the one to report.
    pub fn discard(self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// What the name of a folder ends in whose content has taken the destination's place.
const DONE: &str = ".done";

/// What a workspace is called while it is being removed.
fn done_of(folder: &Path) -> PathBuf {
    let mut name = folder.to_owned().into_os_string();
    name.push(DONE);
    name.into()
}

/// Removes a folder of that name, if there is one, and its journal last.
fn remove_done(done: &Path) -> Result<()> {
    for removed in [
        fs::remove_dir_all(done.join("content")),
        fs::remove_dir_all(done),
    ] {
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("cannot remove", done, error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether the destination is what the journal says was to take its place.
fn was_committed(destination: &Path, lines: &[Line]) -> bool {
    let committing = lines.iter().rev().find_map(|line| match line {
        Line::Committing { inode } => Some(*inode),
        _ => None,
    });
    match (committing, fs::metadata(destination)) {
        (Some(inode), Ok(metadata)) => metadata.ino() == inode,
        _ => false,
    }
}

/// The folder that holds `path`.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Where the conversion with plan `id` to `destination` is built.
pub fn partial_path(destination: &Path, id: &str) -> PathBuf {
    let mut name = destination.file_name().unwrap_or_default().to_owned();
    name.push(".partial-");
    name.push(id.get(..12).unwrap_or(id));
    parent(destination).join(name)
}

/// The nearest folder above `path` that exists; what free space is asked of.
pub fn existing_parent(path: &Path) -> &Path {
    path.ancestors()
        .skip(1)
        .find(|folder| folder.is_dir())
        .unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin() -> Line {
        Line::Begin {
            plan: "0123456789abcdef".into(),
            sources: "s".into(),
            version: "v".into(),
        }
    }

    #[test]
    fn a_run_stopped_between_its_commit_and_its_cleaning_is_known_as_committed() {
        let folder = tempfile::tempdir().unwrap();
        let destination = folder.path().join("out");
        fs::create_dir(&destination).unwrap();
        let id = "0123456789abcdef";
        let known = || {
            Workspace::committed(&destination, Kind::Folder, id, &begin())
                .map(|left| left.is_some())
        };
        assert!(!known().unwrap());

        let (workspace, mut journal, lines) =
            Workspace::open(&destination, Kind::Folder, id, &begin(), false).unwrap();
        assert!(lines.is_empty());
        fs::write(workspace.content().join("new"), "").unwrap();
        // Locked: a second writer is told so.
        assert!(matches!(known(), Err(Error::Config(_))));
        let inode = fs::metadata(workspace.content()).unwrap().ino();
        journal.append(&[Line::Committing { inode }]).unwrap();
        drop(workspace);
        assert!(!known().unwrap());

        let content = partial_path(&destination, id).join("content");
        file::exchange(&content, &destination).unwrap();
        assert!(known().unwrap());
        assert!(destination.join("new").exists());
        assert!(!partial_path(&destination, id).exists());
        assert!(!known().unwrap());
    }

    #[test]
    fn a_run_stopped_while_cleaning_is_known_as_committed() {
        let folder = tempfile::tempdir().unwrap();
        let destination = folder.path().join("out");
        let id = "0123456789abcdef";
        let done = done_of(&partial_path(&destination, id));
        for has_journal in [true, false] {
            let (workspace, mut journal, _) =
                Workspace::open(&destination, Kind::Folder, id, &begin(), false).unwrap();
            let inode = fs::metadata(workspace.content()).unwrap().ino();
            journal.append(&[Line::Committing { inode }]).unwrap();
            fs::rename(workspace.content(), &destination).unwrap();
            fs::rename(partial_path(&destination, id), &done).unwrap();
            if !has_journal {
                fs::remove_file(done.join("journal")).unwrap();
            }
            let known = || Workspace::committed(&destination, Kind::Folder, id, &begin()).unwrap();
            assert_eq!(
                known(),
                Some(vec![Line::Committing { inode }; has_journal as usize])
            );
            assert!(!done.exists());
            assert_eq!(known(), None);
            fs::remove_dir(&destination).unwrap();
        }
    }
}
