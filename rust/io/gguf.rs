//! gguf.
use super::{FileLayout, Header, NewEntry, NewMetadata, Source};
use crate::error::{Error, Result};

/// Reads and checks a header.
pub fn read_header(_source: &dyn Source) -> Result<Header> {
    Err(Error::unsupported("gguf"))
}

/// Plans a file.
pub fn lay_out(_entries: Vec<NewEntry>, _metadata: NewMetadata) -> Result<FileLayout> {
    Err(Error::unsupported("gguf"))
}

/// Writes a header.
pub fn header(_layout: &FileLayout, _late: &[u64]) -> Result<Vec<u8>> {
    Err(Error::unsupported("gguf"))
}

/// Key-value pairs of a file.
#[derive(Debug, Clone)]
pub struct Metadata {}

/// A value to be written.
#[derive(Debug, Clone)]
pub enum Value {
    /// Unsigned.
    U32(u32),
}
