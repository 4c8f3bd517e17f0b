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
//! it the old destination is whole, after it the new one is.

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

    /// The folder of an earlier run that was stopped after its result had taken the destination's
    /// place, with its journal: nothing is left to do but to remove it.
    pub fn committed(
        destination: &Path,
        kind: Kind,
        id: &str,
        begin: &Line,
    ) -> Result<Option<(Self, Vec<Line>)>> {
        if !partial_path(destination, id).is_dir() {
            return Ok(None);
        }
        let workspace = Self::lock(destination, kind, id)?;
        let left = Journal::reopen(&workspace.journal(), begin)?;
        Ok(left
            .filter(|(_, lines)| workspace.was_committed(lines))
            .map(|(_, lines)| (workspace, lines)))
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

    fn was_committed(&self, lines: &[Line]) -> bool {
        let committing = lines.iter().rev().find_map(|line| match line {
            Line::Committing { inode } => Some(*inode),
            _ => None,
        });
        match (committing, fs::metadata(&self.destination)) {
            (Some(inode), Ok(metadata)) => metadata.ino() == inode,
            _ => false,
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
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.folder)
            .map_err(|error| Error::io("cannot remove", &self.folder, error))
    }

    /// Removes what was made in vain; the failure that led here is the one to report.
    pub fn discard(self) {
        let _ = fs::remove_dir_all(&self.folder);
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
    }
}
