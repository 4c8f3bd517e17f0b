//! Files of this machine: positional reads and writes on one open descriptor.
//!
//! A file is opened once and judged by what the descriptor says, so that what was checked is what
//! is read. Reads never map the file: one that shrinks under the reader is an error, not a signal.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, FallocateFlags, OFlags, RenameFlags, CWD};
use rustix::io::Errno;

use super::memory::MemorySource;
use super::Source;
use crate::error::{Error, Result};

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// Length in bytes.
    pub bytes: u64,
    /// Time of the last change, nanoseconds since 1970.
    pub modified_ns: i64,
    /// Device the file lies on.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
}

impl Identity {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Identity {
            bytes: metadata.len(),
            modified_ns: metadata
                .mtime()
                .saturating_mul(1_000_000_000)
                .saturating_add(metadata.mtime_nsec()),
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    /// The four numbers, little-endian, one after the other.
    pub fn to_bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        let words = [
            self.bytes.to_le_bytes(),
            self.modified_ns.to_le_bytes(),
            self.device.to_le_bytes(),
            self.inode.to_le_bytes(),
        ];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word);
        }
        bytes
    }
}

/// A regular file that is read at offsets, or the bytes of one; several threads may read at once.
#[derive(Debug)]
pub struct FileSource {
    content: Content,
    path: PathBuf,
    identity: Identity,
}

enum Content {
    File(File),
    Memory(MemorySource<Vec<u8>>),
    Other(Box<dyn Source>),
}

impl std::fmt::Debug for Content {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Content::File(file) => file.fmt(to),
            Content::Memory(memory) => memory.fmt(to),
            Content::Other(source) => source.path().fmt(to),
        }
    }
}

impl FileSource {
    /// Opens a regular file, or a link to one. Pipes, devices and folders are refused without
    /// waiting for them.
    pub fn open(path: &Path) -> Result<Self> {
        // Without O_NONBLOCK the opening of a pipe would wait for somebody to write to it.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(path)
            .map_err(|error| Error::io("cannot open", path, error))?;
        let metadata = regular(&file, path)?;
        Ok(FileSource {
            identity: Identity::of(&metadata),
            content: Content::File(file),
            path: path.to_owned(),
        })
    }

    /// Bytes in memory that stand for a file called `name`, for what is made on the way and not worth
    /// a file. The same bytes have the same identity, so that work that was interrupted goes on.
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        let path = name.into();
        FileSource {
            identity: Identity {
                bytes: bytes.len() as u64,
                modified_ns: xxhash_rust::xxh3::xxh3_64(&bytes).cast_signed(),
                device: 0,
                inode: 0,
            },
            content: Content::Memory(MemorySource::new(&path, bytes)),
            path,
        }
    }

    /// Anything else that is read like a file. `stamp` tells one content from another.
    pub fn from_source(source: Box<dyn Source>, stamp: i64) -> Self {
        FileSource {
            identity: Identity {
                bytes: source.len(),
                modified_ns: stamp,
                device: 0,
                inode: 0,
            },
            path: source.path().to_owned(),
            content: Content::Other(source),
        }
    }

    /// Whether another process can read the same bytes: those of a file, or made of files.
    pub fn is_lasting(&self) -> bool {
        !matches!(self.content, Content::Other(_))
    }

    /// Whether it is a file, and its path one of this machine.
    pub fn is_file(&self) -> bool {
        matches!(self.content, Content::File(_))
    }

    /// What tells this state of the file from another, as of opening.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Tells the system that the file will be read from front to back. A hint: failure is no error.
    pub fn advise_sequential(&self) {
        #[cfg(target_os = "linux")]
        if let Content::File(file) = &self.content {
            let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Sequential);
        }
    }

    /// Tells the system that these bytes will not be read again. A hint: failure is no error.
    pub fn advise_unneeded(&self, offset: u64, bytes: u64) {
        #[cfg(target_os = "linux")]
        if let (Content::File(file), Some(bytes)) =
            (&self.content, std::num::NonZeroU64::new(bytes))
        {
            let advice = rustix::fs::Advice::DontNeed;
            let _ = rustix::fs::fadvise(file, offset, Some(bytes), advice);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (offset, bytes);
    }
}

impl Source for FileSource {
    fn len(&self) -> u64 {
        self.identity.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let file = match &self.content {
            Content::File(file) => file,
            Content::Memory(memory) => return memory.read_at(offset, buffer),
            Content::Other(source) => return source.read_at(offset, buffer),
        };
        let wanted = buffer.len();
        let mut rest = buffer;
        let mut position = offset;
        while !rest.is_empty() {
            match file.read_at(rest, position) {
                Ok(0) => {
                    let now = file.metadata().map_or(position, |now| now.len());
                    return Err(Error::checkpoint(format!(
                        "file ends at byte {now}, expected {wanted} bytes from byte {offset}"
                    ))
                    .file(&self.path));
                }
                Ok(count) => {
                    position += count as u64;
                    rest = rest.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("cannot read", &self.path, error)),
            }
        }
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// A regular file that is written at offsets; several threads may write at once.
#[derive(Debug)]
pub struct FileSink {
    file: File,
    path: PathBuf,
}

impl FileSink {
    /// Makes a new file with the mode that the umask leaves; one that is there already is an error.
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|error| Error::io("cannot create", path, error))?;
        Ok(FileSink {
            file,
            path: path.to_owned(),
        })
    }

    /// Opens a file that is there, to go on writing it.
    pub fn open_existing(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32)
            .open(path)
            .map_err(|error| Error::io("cannot open", path, error))?;
        regular(&file, path)?;
        Ok(FileSink {
            file,
            path: path.to_owned(),
        })
    }

    /// Makes the file `bytes` long and takes the disk space now, so that a full disk is found here.
    /// A file system that cannot reserve gets the length only.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        if bytes > 0 {
            loop {
                match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
                    Err(Errno::INTR) => {}
                    Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => break,
                    Err(error) => {
                        return Err(Error::io(
                            "cannot reserve space for",
                            &self.path,
                            error.into(),
                        ))
                    }
                }
            }
        }
        self.truncate(bytes)
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|error| Error::io("cannot write", &self.path, error))
    }

    /// Sets the file's length; what lies behind is given back.
    pub fn truncate(&self, bytes: u64) -> Result<()> {
        self.file
            .set_len(bytes)
            .map_err(|error| Error::io("cannot set the length of", &self.path, error))
    }

    /// Waits until the data is on the disk.
    pub fn sync_data(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|error| Error::io("cannot sync", &self.path, error))
    }

    /// Waits until data and attributes are on the disk.
    pub fn sync_all(&self) -> Result<()> {
        self.file
            .sync_all()
            .map_err(|error| Error::io("cannot sync", &self.path, error))
    }

    /// The name that messages use.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What an open file is, if it is a regular one.
fn regular(file: &File, path: &Path) -> Result<std::fs::Metadata> {
    use std::os::unix::fs::FileTypeExt;
    let metadata = file
        .metadata()
        .map_err(|error| Error::io("cannot examine", path, error))?;
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(metadata);
    }
    let found = if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "something else"
    };
    Err(Error::checkpoint(format!("expected a regular file, got {found}")).file(path))
}

/// Waits until the names in a folder are on the disk.
pub fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| Error::io("cannot sync", path, error))
}

/// Whether files can be made and removed in a folder.
pub fn check_writable(folder: &Path) -> Result<()> {
    rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| Error::io("cannot write to", folder, error.into()))
}

/// Whether another file system begins at `path`, as far as the system tells: such a folder has no
/// other name that it could get.
pub fn is_mount_point(path: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::statx(CWD, path, flags, StatxFlags::empty())
            .is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
    }
    #[cfg(not(target_os = "linux"))]
    {
        let device = |path: &Path| std::fs::symlink_metadata(path).map(|metadata| metadata.dev());
        let above = path.parent().and_then(|parent| device(parent).ok());
        device(path)
            .ok()
            .zip(above)
            .is_some_and(|(own, above)| own != above)
    }
}

/// Takes the lock of an open file or folder, unless another one holds it: the system frees it however
/// its holder ends. `None` where the file system has no locks.
pub fn try_lock(file: &File) -> Option<bool> {
    use rustix::fs::FlockOperation::NonBlockingLockExclusive;
    loop {
        match rustix::fs::flock(file, NonBlockingLockExclusive) {
            Ok(()) => return Some(true),
            Err(Errno::WOULDBLOCK) => return Some(false),
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// Whether an open file or folder is still the one called `path`.
pub fn is_called(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

/// Gives `from` the name `to`, unless something has that name: then it is `false`.
pub fn rename_new(from: &Path, to: &Path) -> Result<bool> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            if to.symlink_metadata().is_ok() {
                return Ok(false);
            }
            std::fs::rename(from, to)
                .map(|()| true)
                .map_err(|error| Error::io("cannot rename", from, error))
        }
        Err(error) => Err(Error::io("cannot rename", from, error.into())),
    }
}

/// Bytes that this user can still write to the file system that holds `path`.
pub fn free_bytes(path: &Path) -> Result<u64> {
    let status = rustix::fs::statvfs(path)
        .map_err(|error| Error::io("cannot ask for the free space of", path, error.into()))?;
    Ok(status.f_bavail.saturating_mul(status.f_frsize))
}

/// Disk space taken by a file, or by all files below a folder; what cannot be examined counts as
/// nothing. Links are not followed.
pub fn used_bytes(path: &Path) -> u64 {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return 0;
    };
    if !metadata.is_dir() {
        // The unit of st_blocks is 512 bytes, whatever the block size of the file system.
        return metadata.blocks().saturating_mul(512);
    }
    std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|item| used_bytes(&item.path()))
        .fold(0, u64::saturating_add)
}

/// Lets two existing files or folders change names, in one step that a crash cannot halve.
///
/// A file system without that operation gets three renames: a crash between them leaves `a` under
/// the name `a.exchanged-<process>` and nothing, or already `b`, under the name of `a`.
pub fn exchange(a: &Path, b: &Path) -> Result<()> {
    match rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => exchange_by_renames(a, b),
        Err(error) => Err(Error::io("cannot exchange", b, error.into())),
    }
}

/// What [`exchange`] calls a folder between two renames, without the number of its process.
const ASIDE: &str = ".exchanged-";

/// What a crash in the middle of [`exchange`] left of `a` under another name.
pub fn aside(a: &Path) -> Option<PathBuf> {
    let prefix = format!("{}{ASIDE}", a.file_name()?.to_string_lossy());
    let mut entries = std::fs::read_dir(a.parent()?).ok()?.flatten();
    entries
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
}

fn exchange_by_renames(a: &Path, b: &Path) -> Result<()> {
    let mut name = a.as_os_str().to_owned();
    name.push(format!("{ASIDE}{}", std::process::id()));
    let aside = PathBuf::from(name);
    let rename = |from: &Path, to: &Path| {
        std::fs::rename(from, to).map_err(|error| Error::io("cannot rename", from, error))
    };
    rename(a, &aside)?;
    if let Err(error) = rename(b, a) {
        rename(&aside, a)?;
        return Err(error);
    }
    if let Err(error) = rename(&aside, b) {
        rename(a, b)?;
        rename(&aside, a)?;
        return Err(error);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn bytes_stand_for_a_file() {
        let source = FileSource::from_bytes("made", b"0123456789".to_vec());
        let mut buffer = [0; 4];
        source.read_at(6, &mut buffer).unwrap();
        assert_eq!(&buffer, b"6789");
        assert!(source.read_at(7, &mut buffer).is_err());
        assert_eq!((source.len(), source.path()), (10, Path::new("made")));
        source.advise_sequential();
        source.advise_unneeded(0, 10);
        let again = FileSource::from_bytes("made", b"0123456789".to_vec());
        let other = FileSource::from_bytes("made", b"0123456788".to_vec());
        assert_eq!(source.identity(), again.identity());
        assert_ne!(source.identity(), other.identity());
    }

    #[test]
    fn only_regular_files_open_and_nothing_waits() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe.safetensors");
        rustix::fs::mkfifoat(CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
        let text = FileSource::open(&pipe).unwrap_err().to_string();
        assert!(text.starts_with("expected a regular file, got a pipe (file \""));
        let text = FileSource::open(folder.path()).unwrap_err().to_string();
        assert!(text.contains("got a folder"), "{text}");
        let zero = folder.path().join("zero.gguf");
        std::os::unix::fs::symlink("/dev/zero", &zero).unwrap();
        let text = FileSource::open(&zero).unwrap_err().to_string();
        assert!(text.contains("got a device"), "{text}");
        let none = folder.path().join("none");
        let text = FileSource::open(&none).unwrap_err().to_string();
        assert!(text.starts_with("cannot open ") && text.contains("No such file"));
    }

    #[test]
    fn a_link_to_a_file_opens_and_identity_follows_the_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"0123456789").unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let source = FileSource::open(&link).unwrap();
        assert_eq!(source.len(), 10);
        source.advise_sequential();
        source.advise_unneeded(0, 10);
        let before = source.identity();
        assert_eq!(before, FileSource::open(&path).unwrap().identity());
        std::fs::write(&path, b"01234567890").unwrap();
        let after = FileSource::open(&path).unwrap().identity();
        assert_ne!(before, after);
        assert_ne!(before.to_bytes(), after.to_bytes());
    }

    #[test]
    fn a_file_that_shrinks_is_an_error_with_the_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"0123456789").unwrap();
        let source = FileSource::open(&path).unwrap();
        let mut buffer = [0; 4];
        source.read_at(6, &mut buffer).unwrap();
        assert_eq!(&buffer, b"6789");
        FileSink::open_existing(&path).unwrap().truncate(7).unwrap();
        let text = source.read_at(5, &mut buffer).unwrap_err().to_string();
        assert!(text.starts_with("file ends at byte 7, expected 4 bytes from byte 5 (file"));
    }

    #[test]
    fn a_sink_is_reserved_written_and_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let sink = FileSink::create(&path).unwrap();
        assert!(FileSink::create(&path).is_err());
        sink.reserve(0).unwrap();
        sink.reserve(100_000).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 100_000);
        assert!(used_bytes(folder.path()) >= 100_000);
        sink.write_at(99_990, b"0123456789").unwrap();
        sink.truncate(99_995).unwrap();
        sink.sync_data().unwrap();
        sink.sync_all().unwrap();
        sync_directory(folder.path()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() == 99_995 && bytes.ends_with(b"\0\x0001234"));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let plain = folder.path().join("plain");
        std::fs::write(&plain, b"").unwrap();
        let plain_mode = std::fs::metadata(&plain).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, plain_mode, "the mode follows the umask");
    }

    #[test]
    fn space_that_is_not_there_is_refused_before_it_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let free = free_bytes(folder.path()).unwrap();
        let sink = FileSink::create(&folder.path().join("a")).unwrap();
        // Beyond any disk; the error is the system's (no space, or larger than it allows).
        let text = sink.reserve(free.saturating_add(1 << 42)).unwrap_err();
        assert!(text.to_string().starts_with("cannot reserve space for"));
    }

    #[test]
    fn a_new_name_is_not_taken_from_another_and_locks_belong_to_one() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        check_writable(&a).unwrap();
        assert!(check_writable(&b).is_err());
        assert!(!is_mount_point(&a) && !is_mount_point(&b));
        #[cfg(target_os = "linux")]
        assert!(is_mount_point(Path::new("/proc")));
        let open = File::open(&a).unwrap();
        assert_eq!(try_lock(&open), Some(true));
        assert_eq!(try_lock(&File::open(&a).unwrap()), Some(false));
        assert!(is_called(&open, &a));
        assert!(rename_new(&a, &b).unwrap());
        assert!(!is_called(&open, &a) && is_called(&open, &b));
        std::fs::create_dir(&a).unwrap();
        assert!(!rename_new(&a, &b).unwrap());
        assert!(is_called(&open, &b));
        drop(open);
        assert_eq!(try_lock(&File::open(&b).unwrap()), Some(true));
    }

    #[test]
    fn two_folders_change_names_either_way() {
        for exchange in [exchange, exchange_by_renames] {
            let folder = tempfile::tempdir().unwrap();
            let (a, b) = (folder.path().join("a"), folder.path().join("b"));
            for path in [&a, &b] {
                std::fs::create_dir(path).unwrap();
                std::fs::write(path.join("name"), path.to_str().unwrap()).unwrap();
            }
            exchange(&a, &b).unwrap();
            assert_eq!(
                std::fs::read_to_string(a.join("name")).unwrap(),
                b.to_str().unwrap()
            );
            assert_eq!(
                std::fs::read_to_string(b.join("name")).unwrap(),
                a.to_str().unwrap()
            );
            std::fs::remove_dir_all(&b).unwrap();
            assert!(exchange(&a, &b).is_err());
            assert!(
                a.join("name").exists(),
                "a failed exchange leaves things as they were"
            );
        }
    }
}
