//! Bytes in memory that are read like a file.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::Source;
use crate::error::{Error, Result};

/// Bytes in memory (owned, borrowed or shared) under a name for messages.
#[derive(Debug, Clone)]
pub struct MemorySource<B> {
    bytes: B,
    name: PathBuf,
}

impl<B: AsRef<[u8]>> MemorySource<B> {
    /// A source of `bytes` that messages call `name`.
    pub fn new(name: impl Into<PathBuf>, bytes: B) -> Self {
        MemorySource {
            bytes,
            name: name.into(),
        }
    }
}

impl<B: AsRef<[u8]> + Send + Sync> Source for MemorySource<B> {
    fn len(&self) -> u64 {
        self.bytes.as_ref().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let bytes = self.bytes.as_ref();
        let found = usize::try_from(offset).ok().and_then(|start| {
            let end = start.checked_add(buffer.len())?;
            bytes.get(start..end)
        });
        match found {
            Some(found) => {
                buffer.copy_from_slice(found);
                Ok(())
            }
            None => Err(Error::checkpoint(format!(
                "file ends at byte {}, expected {} bytes from byte {offset}",
                bytes.len(),
                buffer.len()
            ))
            .file(&self.name)),
        }
    }

    fn path(&self) -> &Path {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_inside_and_refuses_outside() {
        let source = MemorySource::new("a", b"0123456789");
        let mut buffer = [0; 3];
        source.read_at(7, &mut buffer).unwrap();
        assert_eq!(&buffer, b"789");
        for offset in [8, 10, u64::MAX] {
            let text = source.read_at(offset, &mut buffer).unwrap_err().to_string();
            assert!(text.starts_with("file ends at byte 10, expected 3 bytes from byte"));
        }
    }
}
