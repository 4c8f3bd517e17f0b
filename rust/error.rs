//! The one error type. A message names the subject and the fact; the place (tensor, file,
//! byte offset) is carried beside it and printed behind it, so every layer adds what it knows.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A fact about bad input, and where it was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fault {
    /// Subject and fact: lower case, expected and got, no final period.
    pub message: String,
    /// Tensor the fault belongs to.
    pub tensor: Option<String>,
    /// File the fault belongs to.
    pub path: Option<PathBuf>,
    /// Byte offset in that file.
    pub offset: Option<u64>,
    /// What the caller may do next, printed on a line of its own.
    pub hint: Option<String>,
}

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that is malformed, cut short, or does not agree with its neighbours.
    #[error("{0}")]
    Checkpoint(Box<Fault>),
    /// A tensor or parameter that a format cannot take (row not divisible, non-finite weight).
    #[error("{0}")]
    Format(Box<Fault>),
    /// Options that contradict each other or name things that do not exist.
    #[error("{0}")]
    Config(Box<Fault>),
    /// A valid request that this version does not carry out.
    #[error("{0}")]
    Unsupported(Box<Fault>),
    /// The operating system refused.
    #[error("{action} {}: {source}", escape(&path.to_string_lossy()))]
    Io {
        /// What was being done, as in "cannot write".
        action: &'static str,
        /// The file concerned.
        path: PathBuf,
        /// The system's own error.
        source: io::Error,
    },
    /// A fault of this crate itself.
    #[error("internal error: {0}")]
    Internal(String),
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// A malformed or inconsistent input file.
    pub fn checkpoint(message: impl Into<String>) -> Self {
        Error::Checkpoint(Fault::boxed(message))
    }

    /// A tensor or parameter that a format cannot take.
    pub fn format(message: impl Into<String>) -> Self {
        Error::Format(Fault::boxed(message))
    }

    /// Options that cannot be carried out as given.
    pub fn config(message: impl Into<String>) -> Self {
        Error::Config(Fault::boxed(message))
    }

    /// A valid request that is not implemented.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Error::Unsupported(Fault::boxed(message))
    }

    /// The operating system refused `action` on `path`.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Error::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// The disk below `folder` has `free` bytes where `need` are needed.
    pub fn no_space(need: u64, free: u64, folder: &Path) -> Self {
        let full = io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        let told = io::Error::new(
            full.kind(),
            format!("{need} bytes are needed and {free} are free"),
        );
        Error::io("not enough disk space", folder, told)
    }

    /// Names the tensor, unless one is named already.
    #[must_use]
    pub fn tensor(self, name: &str) -> Self {
        self.amend(|fault| {
            fault.tensor.get_or_insert_with(|| name.to_owned());
        })
    }

    /// Names the file, unless one is named already.
    #[must_use]
    pub fn file(self, path: &Path) -> Self {
        self.amend(|fault| {
            fault.path.get_or_insert_with(|| path.to_owned());
        })
    }

    /// Names the byte offset, unless one is named already.
    #[must_use]
    pub fn at(self, offset: u64) -> Self {
        self.amend(|fault| {
            fault.offset.get_or_insert(offset);
        })
    }

    /// Says what to do next.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        self.amend(|fault| {
            fault.hint = Some(hint.into());
        })
    }

    /// The fault inside, for the kinds that carry one.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Error::Checkpoint(fault)
            | Error::Format(fault)
            | Error::Config(fault)
            | Error::Unsupported(fault) => Some(fault),
            Error::Io { .. } | Error::Internal(_) | Error::Interrupted => None,
        }
    }

    fn amend(mut self, change: impl FnOnce(&mut Fault)) -> Self {
        match &mut self {
            Error::Checkpoint(fault)
            | Error::Format(fault)
            | Error::Config(fault)
            | Error::Unsupported(fault) => change(fault),
            Error::Io { .. } | Error::Internal(_) | Error::Interrupted => {}
        }
        self
    }
}

impl Fault {
    fn boxed(message: impl Into<String>) -> Box<Self> {
        Box::new(Fault {
            message: message.into(),
            ..Fault::default()
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape(&self.message))?;
        let mut places = Vec::new();
        if let Some(tensor) = &self.tensor {
            places.push(format!("tensor \"{}\"", escape(tensor)));
        }
        if let Some(path) = &self.path {
            places.push(format!("file \"{}\"", escape(&path.to_string_lossy())));
        }
        if let Some(offset) = self.offset {
            places.push(format!("byte {offset}"));
        }
        if !places.is_empty() {
            write!(f, " ({})", places.join(", "))?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {}", escape(hint))?;
        }
        Ok(())
    }
}

/// Text that is safe on a terminal: control characters are shown as escapes, and text longer
/// than 300 characters is cut. Names come out of files that nobody vouches for.
pub fn escape(text: &str) -> String {
    const MOST: usize = 300;
    let mut safe = String::with_capacity(text.len().min(MOST + 3));
    for (count, c) in text.chars().enumerate() {
        if count == MOST {
            safe.push('…');
            break;
        }
        if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_the_fact_and_the_hint_has_its_own_line() {
        let error = Error::format("q8_0: row of 33 weights is not a multiple of block_size 32")
            .tensor("proj.weight")
            .tensor("ignored")
            .file(Path::new("a.safetensors"))
            .at(8)
            .hint("keep it with --keep");
        assert_eq!(
            error.to_string(),
            "q8_0: row of 33 weights is not a multiple of block_size 32 (tensor \"proj.weight\", \
             file \"a.safetensors\", byte 8)\nhint: keep it with --keep"
        );
    }

    #[test]
    fn names_from_files_cannot_drive_the_terminal() {
        assert_eq!(escape("a\u{1b}[2J\n\u{202e}b"), "a\\u{1b}[2J\\n\\u{202e}b");
        assert!(escape(&"x".repeat(10_000)).chars().count() <= 301);
    }
}
