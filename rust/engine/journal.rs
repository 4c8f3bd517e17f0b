//! The journal of an unfinished conversion: one JSON object a line, appended only after the bytes
//! it speaks of are on the disk. A torn last line is what a kill leaves, and is passed over.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::formats::ErrorSums;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// First line: which conversion this is. All three must agree to resume.
    Begin {
        /// Plan id.
        plan: String,
        /// Sizes and times of the source files.
        sources: String,
        /// Version of this crate; another one starts over.
        version: String,
        /// The source lay in the memory of the process: nobody can go on from here.
        #[serde(default, skip_serializing_if = "is_resumable")]
        transient: bool,
    },
    /// Every byte of a tensor is in its shard.
    Tensor {
        /// Position in the plan.
        tensor: usize,
        /// Late components, by component index.
        late: Vec<(usize, Vec<u8>)>,
        /// Error sums, for tensors that were encoded: see [`pack_sums`].
        sums: Option<(u64, [f64; 5])>,
    },
    /// A shard has its header.
    Shard {
        /// Position in the plan.
        shard: usize,
        /// Final file length.
        bytes: u64,
    },
    /// The content is about to take the destination's place.
    Committing {
        /// Inode of the content, to tell afterwards whether it did.
        inode: u64,
    },
}

/// For serde, which leaves the field out where it says nothing.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_resumable(transient: &bool) -> bool {
    !transient
}

/// Error sums as a line holds them; `None` where one is not finite, which JSON has no word for.
pub fn pack_sums(sums: &ErrorSums) -> Option<(u64, [f64; 5])> {
    let packed = [
        sums.signal,
        sums.noise,
        sums.cross,
        sums.power,
        sums.max_error,
    ];
    packed
        .iter()
        .all(|sum| sum.is_finite())
        .then_some((sums.weights, packed))
}

/// The reverse of [`pack_sums`].
pub fn unpack_sums(
    (weights, [signal, noise, cross, power, max_error]): (u64, [f64; 5]),
) -> ErrorSums {
    ErrorSums {
        weights,
        signal,
        noise,
        cross,
        power,
        max_error,
    }
}

/// A journal open for appending.
pub struct Journal {
    file: File,
    path: PathBuf,
}

impl Journal {
    /// Starts a new journal.
    pub fn create(path: &Path, begin: &Line) -> Result<Self> {
        let file = File::create(path).map_err(|error| Error::io("cannot create", path, error))?;
        let mut journal = Journal {
            file,
            path: path.to_owned(),
        };
        journal.append(std::slice::from_ref(begin))?;
        Ok(journal)
    }

    /// Reads the lines of an earlier run and continues behind the last whole one. `None` if there
    /// is no journal, or none that begins with `begin`.
    pub fn reopen(path: &Path, begin: &Line) -> Result<Option<(Self, Vec<Line>)>> {
        let mut file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("cannot open", path, error)),
        };
        let (mut lines, whole_bytes) = whole_lines(&file, path)?;
        if lines.first() != Some(begin) {
            return Ok(None);
        }
        file.set_len(whole_bytes)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .map_err(|error| Error::io("cannot truncate", path, error))?;
        let rest = lines.split_off(1);
        Ok(Some((
            Journal {
                file,
                path: path.to_owned(),
            },
            rest,
        )))
    }

    /// The whole lines of a journal, the first one included; none where there is no journal.
    pub fn read(path: &Path) -> Result<Vec<Line>> {
        match File::open(path) {
            Ok(file) => Ok(whole_lines(&file, path)?.0),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io("cannot open", path, error)),
        }
    }

    /// Appends lines and forces them to the disk.
    pub fn append(&mut self, lines: &[Line]) -> Result<()> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, line)
                .map_err(|error| Error::io("cannot write", &self.path, error.into()))?;
            text.push(b'\n');
        }
        self.file
            .write_all(&text)
            .and_then(|()| self.file.sync_data())
            .map_err(|error| Error::io("cannot write", &self.path, error))
    }
}

/// The lines of a journal up to the first that is not whole, and their length in bytes.
fn whole_lines(file: &File, path: &Path) -> Result<(Vec<Line>, u64)> {
    let mut lines = Vec::new();
    let mut whole_bytes = 0u64;
    let mut reader = BufReader::new(file);
    let mut text = Vec::new();
    loop {
        text.clear();
        let length = reader
            .read_until(b'\n', &mut text)
            .map_err(|error| Error::io("cannot read", path, error))?;
        if length == 0 || text.last() != Some(&b'\n') {
            break;
        }
        let Ok(line) = serde_json::from_slice::<Line>(&text) else {
            break;
        };
        lines.push(line);
        whole_bytes += length as u64;
    }
    Ok((lines, whole_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begin(plan: &str) -> Line {
        Line::Begin {
            plan: plan.into(),
            sources: "s".into(),
            version: "v".into(),
            transient: false,
        }
    }

    #[test]
    fn a_torn_line_is_dropped_and_another_plan_starts_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let line = Line::Tensor {
            tensor: 3,
            late: vec![(5, vec![1, 2])],
            sums: None,
        };
        Journal::create(&path, &begin("a"))
            .unwrap()
            .append(std::slice::from_ref(&line))
            .unwrap();
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"shard\":{\"sh")
            .unwrap();
        let (mut journal, lines) = Journal::reopen(&path, &begin("a")).unwrap().unwrap();
        assert_eq!(lines, std::slice::from_ref(&line));
        let shard = Line::Shard { shard: 0, bytes: 9 };
        journal.append(std::slice::from_ref(&shard)).unwrap();
        assert_eq!(
            Journal::reopen(&path, &begin("a")).unwrap().unwrap().1,
            [line, shard]
        );
        assert!(Journal::reopen(&path, &begin("b")).unwrap().is_none());
        assert!(Journal::reopen(&folder.path().join("none"), &begin("a"))
            .unwrap()
            .is_none());
    }

    #[test]
    fn only_a_source_in_memory_is_told_and_older_journals_have_none() {
        let text = serde_json::to_string(&begin("a")).unwrap();
        assert!(!text.contains("transient"), "{text}");
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), begin("a"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        assert!(Journal::read(&path).unwrap().is_empty());
        let line = Line::Begin {
            plan: "a".into(),
            sources: "s".into(),
            version: "v".into(),
            transient: true,
        };
        Journal::create(&path, &line).unwrap();
        assert_eq!(Journal::read(&path).unwrap(), [line]);
        assert!(Journal::reopen(&path, &begin("a")).unwrap().is_none());
    }
}
