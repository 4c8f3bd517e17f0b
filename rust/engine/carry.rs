//! Files of a folder that outlive the model in it: they get a second name in the new folder before
//! that takes the old one's place, so that they are there at any moment.
//!
//! Writers of this library take turns at a destination from the listing to the exchange. Other programs
//! are not held up: what they change between is looked for twice, right before the exchange and, in the
//! old folder, after it.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::OFlags;

use crate::error::{Error, Result};
use crate::io::file;

use super::extra;

/// Lists what stays of the folder given to it: files, links and empty folders, relative to it.
pub type Keep<'k> = &'k mut dyn FnMut(&Path) -> Result<Vec<PathBuf>>;

/// Time between two attempts to get a lock.
const PAUSE: Duration = Duration::from_millis(10);

/// Waits for one's turn at the folder `destination`, which ends when the result is dropped; `None` where
/// there is no such folder.
pub fn hold(destination: &Path, tick: &mut dyn FnMut() -> Result<()>) -> Result<Option<File>> {
    loop {
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::DIRECTORY | OFlags::NOFOLLOW).bits() as i32)
            .open(destination);
        let folder = match opened {
            Ok(folder) => folder,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("cannot open", destination, error)),
        };
        // The one whose turn it was has put another folder here.
        if file::try_lock(&folder) != Some(false) {
            if file::is_called(&folder, destination) {
                return Ok(Some(folder));
            }
            continue;
        }
        tick()?;
        std::thread::sleep(PAUSE);
    }
}

/// What tells a file from another one of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Origin {
    device: u64,
    inode: u64,
    /// Length and time of the last change, of a file that was copied.
    state: Option<(u64, i64, i64)>,
}

impl Origin {
    fn of(metadata: &Metadata, copied: bool) -> Self {
        Origin {
            device: metadata.dev(),
            inode: metadata.ino(),
            state: copied.then(|| (metadata.len(), metadata.mtime(), metadata.mtime_nsec())),
        }
    }
}

/// The files that were carried over.
#[derive(Default)]
pub struct Carried(HashMap<PathBuf, Origin>);

impl Carried {
    /// Gives `names` of the folder `from` a second name in `to`. What has that name there already, and was
    /// not carried over before, is the new model's and stays. What has vanished from `from` is passed over.
    pub fn link(
        &mut self,
        names: &[PathBuf],
        from: &Path,
        to: &Path,
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        for name in names {
            tick()?;
            let (old, new) = (from.join(name), to.join(name));
            check_inside(name)?;
            let Some(metadata) = examine(&old)? else {
                continue;
            };
            if examine(&new)?.is_some() {
                match self.0.get(name) {
                    Some(origin) if *origin != Origin::of(&metadata, origin.state.is_some()) => {
                        fs::remove_file(&new)
                            .map_err(|error| Error::io("cannot remove", &new, error))?;
                    }
                    _ => continue,
                }
            }
            if let Some(folder) = new.parent() {
                fs::create_dir_all(folder)
                    .map_err(|error| Error::io("cannot create", folder, error))?;
            }
            if let Some(copied) = second_name(&old, &new, &metadata, tick)? {
                self.0.insert(name.clone(), Origin::of(&metadata, copied));
            }
        }
        Ok(())
    }

    /// After the exchange: moves what came to the old folder too late to be linked. A file that somebody has
    /// made anew since stays.
    pub fn move_late(&self, names: &[PathBuf], from: &Path, to: &Path) {
        for name in names {
            let (old, new) = (from.join(name), to.join(name));
            let Ok(metadata) = old.symlink_metadata() else {
                continue;
            };
            let is_late = match self.0.get(name) {
                Some(origin) => *origin != Origin::of(&metadata, origin.state.is_some()),
                None => new.symlink_metadata().is_err(),
            };
            if is_late && check_inside(name).is_ok() {
                let _ = new.parent().map(fs::create_dir_all);
                let _ = fs::rename(&old, &new);
            }
        }
    }
}

/// Gives the folders in `to` the owner and the rights of those of the same name in `from`, where there are
/// such, and forces their names to the disk.
pub fn settle_folders(from: Option<&Path>, to: &Path, sync: bool) -> Result<()> {
    let entries = fs::read_dir(to).map_err(|error| Error::io("cannot list", to, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io("cannot list", to, error))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let from = from.map(|from| from.join(entry.file_name()));
            settle_folders(from.as_deref(), &entry.path(), sync)?;
        }
    }
    if sync {
        file::sync_directory(to)?;
    }
    if let Some(metadata) = from.and_then(|from| from.symlink_metadata().ok()) {
        if metadata.is_dir() {
            // Neither is worth losing a model for.
            let _ = std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid()));
            let _ = fs::set_permissions(to, metadata.permissions());
        }
    }
    Ok(())
}

fn check_inside(name: &Path) -> Result<()> {
    let mut parts = name.components();
    if name.as_os_str().is_empty() || !parts.all(|part| matches!(part, Component::Normal(_))) {
        return Err(Error::config("path leaves the destination").file(name));
    }
    Ok(())
}

fn examine(path: &Path) -> Result<Option<Metadata>> {
    match path.symlink_metadata() {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("cannot examine", path, error)),
    }
}

/// Makes `new` another name of `old`, or a copy where the file system gives no second names; whether it is
/// one. `None` where `old` has vanished.
fn second_name(
    old: &Path,
    new: &Path,
    metadata: &Metadata,
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<Option<bool>> {
    let refused = |error| Error::io("cannot carry over", old, error);
    if metadata.is_dir() {
        return fs::create_dir(new).map_err(refused).map(|()| None);
    }
    match fs::hard_link(old, new) {
        Ok(()) => return Ok(Some(false)),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if !(metadata.is_file() || metadata.is_symlink()) => return Err(refused(error)),
        Err(_) => {}
    }
    if metadata.is_symlink() {
        let target = fs::read_link(old).map_err(refused)?;
        std::os::unix::fs::symlink(target, new).map_err(refused)?;
    } else {
        extra::copy(old, new, true, tick)?;
        fs::set_permissions(new, metadata.permissions()).map_err(refused)?;
    }
    Ok(Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn nothing() -> Result<()> {
        Ok(())
    }

    #[test]
    fn names_are_linked_refreshed_and_moved_late() {
        let top = tempfile::tempdir().unwrap();
        let (old, new) = (top.path().join("old"), top.path().join("new"));
        fs::create_dir_all(old.join("sub/deep")).unwrap();
        fs::create_dir_all(old.join("empty")).unwrap();
        fs::create_dir(&new).unwrap();
        for (name, text) in [
            ("a", "1"),
            ("sub/deep/b", "2"),
            ("config", "old"),
            ("late", "x"),
        ] {
            fs::write(old.join(name), text).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", old.join("link")).unwrap();
        fs::write(new.join("config"), "new").unwrap();
        let names: Vec<PathBuf> = ["a", "sub/deep/b", "config", "link", "empty", "vanished"]
            .map(PathBuf::from)
            .into();
        let mut carried = Carried::default();
        carried.link(&names, &old, &new, &mut nothing).unwrap();
        let read = |name: &str| fs::read_to_string(new.join(name)).unwrap();
        assert_eq!(read("a") + &read("sub/deep/b") + &read("config"), "12new");
        assert_eq!(
            fs::read_link(new.join("link")).unwrap(),
            Path::new("nowhere")
        );
        assert!(new.join("empty").is_dir());
        assert!(!new.join("vanished").exists());
        // The same file, whoever writes to it.
        fs::write(old.join("a"), "3").unwrap();
        // Another file of the same name.
        fs::write(old.join("c"), "4").unwrap();
        fs::rename(old.join("c"), old.join("sub/deep/b")).unwrap();
        carried.link(&names, &old, &new, &mut nothing).unwrap();
        assert_eq!(read("a") + &read("sub/deep/b") + &read("config"), "34new");
        // Changed once more, and a newcomer; the new model's own file stays.
        fs::write(old.join("c"), "5").unwrap();
        fs::rename(old.join("c"), old.join("sub/deep/b")).unwrap();
        let later = [&names[..], &[PathBuf::from("late"), PathBuf::from("../x")]].concat();
        carried.move_late(&later, &old, &new);
        assert_eq!(
            read("a") + &read("sub/deep/b") + &read("config") + &read("late"),
            "35newx"
        );
        let outside = [PathBuf::from("../x")];
        assert!(carried.link(&outside, &old, &new, &mut nothing).is_err());
    }

    #[test]
    fn folders_keep_their_rights() {
        let top = tempfile::tempdir().unwrap();
        let (old, new) = (top.path().join("old"), top.path().join("new"));
        for folder in [&old, &new] {
            fs::create_dir_all(folder.join("sub")).unwrap();
        }
        fs::create_dir(new.join("own")).unwrap();
        fs::set_permissions(&old, fs::Permissions::from_mode(0o750)).unwrap();
        fs::set_permissions(old.join("sub"), fs::Permissions::from_mode(0o700)).unwrap();
        settle_folders(Some(&old), &new, true).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&new), mode(&new.join("sub"))), (0o750, 0o700));
        settle_folders(None, &new, true).unwrap();
    }

    #[test]
    fn a_turn_is_waited_for_and_belongs_to_the_folder_of_that_name() {
        let top = tempfile::tempdir().unwrap();
        let (place, other) = (top.path().join("place"), top.path().join("other"));
        assert!(hold(&place, &mut nothing).unwrap().is_none());
        fs::create_dir(&place).unwrap();
        fs::create_dir(&other).unwrap();
        let first = hold(&place, &mut nothing).unwrap().unwrap();
        let stopped = hold(&place, &mut || Err(Error::Interrupted));
        assert!(matches!(stopped, Err(Error::Interrupted)));
        let mut waited = 0;
        let mut first = Some(first);
        let second = hold(&place, &mut || {
            waited += 1;
            if waited == 3 {
                file::exchange(&place, &other)?;
                first.take();
            }
            Ok(())
        });
        assert!(file::is_called(&second.unwrap().unwrap(), &place));
    }
}
