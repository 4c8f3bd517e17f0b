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

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::io::file;

use super::carry::{self, Carried, Keep};
use super::journal::{Journal, Line};
use super::preflight;
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
            let left = Journal::reopen(&done.join(JOURNAL), begin)?;
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
        let path = folder.join(LOCK);
        // A process that removes the folder holds its lock until the folder has another name.
        for _ in 0..LOCK_ATTEMPTS {
            fs::create_dir_all(&folder)
                .map_err(|error| Error::io("cannot create", &folder, error))?;
            let lock = match File::create(&path) {
                Ok(lock) => lock,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("cannot create", &path, error)),
            };
            // Where there are no locks, nobody else is known of.
            let is_free = file::try_lock(&lock) != Some(false);
            if is_free && file::is_called(&lock, &path) {
                return Ok(Workspace {
                    destination: destination.to_owned(),
                    kind,
                    folder,
                    _lock: lock,
                });
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        Err(Error::config("another process is writing to this place").file(&folder))
    }

    fn journal(&self) -> PathBuf {
        self.folder.join(JOURNAL)
    }

    /// The folder whose content becomes the destination.
    pub fn content(&self) -> PathBuf {
        self.folder.join(CONTENT)
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

    /// Puts the content in the destination's place. What was there is in the workspace then.
    pub fn commit(&self, journal: &mut Journal, sync: bool, overwrite: bool) -> Result<()> {
        self.commit_beside(journal, sync, overwrite, None, &mut || Ok(()))
    }

    /// As [`Self::commit`]; what `keep` lists of a folder at the destination is carried over. An error from
    /// it, or from `tick` while another writer has its turn, leaves the destination as it is.
    pub fn commit_beside(
        &self,
        journal: &mut Journal,
        sync: bool,
        overwrite: bool,
        mut keep: Option<Keep<'_>>,
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let product = self.product();
        let inode = fs::metadata(&product)
            .map_err(|error| Error::io("cannot read", &product, error))?
            .ino();
        journal.append(&[Line::Committing { inode }])?;
        if self.kind == Kind::File {
            self.rename_file(&product, overwrite)?;
        } else {
            loop {
                if let Some(turn) = carry::hold(&self.destination, tick)? {
                    match keep.as_mut() {
                        Some(keep) => self.exchange_beside(&product, sync, keep, tick)?,
                        None => {
                            preflight::check_place(&self.destination, self.kind, overwrite)?;
                            carry::settle_folders(Some(&self.destination), &product, sync)?;
                            file::exchange(&product, &self.destination)?;
                        }
                    }
                    drop(turn);
                    break;
                }
                carry::settle_folders(None, &product, sync)?;
                // Somebody else may have put a folder there just now.
                if file::rename_new(&product, &self.destination)? {
                    break;
                }
            }
        }
        if sync {
            file::sync_directory(parent(&self.destination))?;
        }
        Ok(())
    }

    fn rename_file(&self, product: &Path, overwrite: bool) -> Result<()> {
        if !overwrite {
            while !file::rename_new(product, &self.destination)? {
                preflight::check_place(&self.destination, self.kind, overwrite)?;
            }
            return Ok(());
        }
        fs::rename(product, &self.destination)
            .map_err(|error| Error::io("cannot rename", product, error))
    }

    fn exchange_beside(
        &self,
        product: &Path,
        sync: bool,
        keep: &mut Keep<'_>,
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let destination = &self.destination;
        let mut carried = Carried::default();
        carried.link(&keep(destination)?, destination, product, tick)?;
        carry::settle_folders(Some(destination), product, sync)?;
        // The disk took its time: look once more, and change names at once.
        carried.link(&keep(destination)?, destination, product, tick)?;
        file::exchange(product, destination)?;
        if let Ok(names) = keep(product) {
            carried.move_late(&names, product, destination);
        }
        Ok(())
    }

    /// Removes the workspace and all in it. After an exchange that is the old destination.
    pub fn remove(self) -> Result<()> {
        remove_folder(&self.folder)
    }

    /// Removes what was made in vain; the failure that led here is the one to report.
    pub fn discard(self) {
        if !holds_all(&self.folder, &self.destination) {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Names in a workspace, see above.
pub const CONTENT: &str = "content";
/// The journal.
pub const JOURNAL: &str = "journal";
/// The lock.
pub const LOCK: &str = "lock";

/// Attempts to lock a folder that another process may be about to remove.
const LOCK_ATTEMPTS: usize = 20;
/// Time between two of them.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Whether an exchange stopped half-way, so that the old and the new one are both in the workspace.
pub fn holds_all(folder: &Path, destination: &Path) -> bool {
    file::aside(&folder.join(CONTENT)).is_some() && destination.symlink_metadata().is_err()
}

/// Removes a workspace under a name that does not look like an unfinished one.
pub fn remove_folder(folder: &Path) -> Result<()> {
    if folder
        .as_os_str()
        .as_encoded_bytes()
        .ends_with(DONE.as_bytes())
    {
        return remove_done(folder);
    }
    let done = done_of(folder);
    remove_done(&done)?;
    fs::rename(folder, &done).map_err(|error| Error::io("cannot rename", folder, error))?;
    remove_done(&done)
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
    for removed in [remove_all(&done.join(CONTENT)), remove_all(done)] {
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io("cannot remove", done, error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes a folder and all in it, also where folders in it are read-only.
fn remove_all(folder: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            make_writable(folder)?;
            fs::remove_dir_all(folder)
        }
        removed => removed,
    }
}

fn make_writable(folder: &Path) -> std::io::Result<()> {
    let mut permissions = fs::symlink_metadata(folder)?.permissions();
    permissions.set_mode(permissions.mode() | 0o700);
    fs::set_permissions(folder, permissions)?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_writable(&entry.path())?;
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
    name.push(PARTIAL);
    name.push(id.get(..ID_LETTERS).unwrap_or(id));
    parent(destination).join(name)
}

/// What follows the destination's name in that of a workspace.
const PARTIAL: &str = ".partial-";
/// Letters of the id that follow.
const ID_LETTERS: usize = 12;

/// Whether `name` is that of a workspace of `destination`, of a finished one too.
pub fn is_partial_of(destination: &Path, name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    let own = destination.file_name().unwrap_or_default();
    let id = bytes
        .strip_prefix(own.as_encoded_bytes())
        .and_then(|rest| rest.strip_prefix(PARTIAL.as_bytes()));
    id.map(|id| id.strip_suffix(DONE.as_bytes()).unwrap_or(id))
        .is_some_and(|id| id.len() == ID_LETTERS && id.iter().all(u8::is_ascii_hexdigit))
}

/// The nearest folder above `path` that exists; what free space is asked of. Fails where something else
/// than a folder is in the way.
pub fn existing_parent(path: &Path) -> Result<&Path> {
    for above in path.ancestors().skip(1) {
        let above = match above {
            empty if empty == Path::new("") => Path::new("."),
            above => above,
        };
        match fs::metadata(above) {
            Ok(metadata) if metadata.is_dir() => return Ok(above),
            Ok(_) => {
                let told = std::io::Error::from(ErrorKind::NotADirectory);
                return Err(Error::io("cannot create a folder in", above, told));
            }
            // Below a file there is not even nothing.
            Err(_) => {}
        }
    }
    Ok(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin() -> Line {
        Line::Begin {
            plan: "0123456789abcdef".into(),
            sources: "s".into(),
            version: "v".into(),
            transient: false,
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
                fs::remove_file(done.join(JOURNAL)).unwrap();
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
