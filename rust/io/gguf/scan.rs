//! Reading numbers and texts one after the other, through a window of the file.

use super::MOST_NAME_BYTES;
use crate::error::{Error, Result};
use crate::io::Source;
use crate::shape;

/// Bytes read at once.
const WINDOW_BYTES: u64 = 64 * 1024;

/// A place in a file, and the bytes around it.
pub(super) struct Scan<'a> {
    source: &'a dyn Source,
    window: Vec<u8>,
    window_start: u64,
    position: u64,
    end: u64,
    /// Whether numbers are stored most significant byte first.
    pub big_endian: bool,
    /// Whether an empty key is a key.
    pub lenient: bool,
}

impl<'a> Scan<'a> {
    /// A scan of bytes `position..end`.
    pub fn new(source: &'a dyn Source, position: u64, end: u64, big_endian: bool) -> Self {
        Scan {
            source,
            window: Vec::new(),
            window_start: position,
            position,
            end: end.min(source.len()),
            big_endian,
            lenient: false,
        }
    }

    /// The next byte's place in the file.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes from here to the end.
    pub fn left(&self) -> u64 {
        self.end.saturating_sub(self.position)
    }

    /// Fails unless `bytes` more are there.
    pub fn need(&self, bytes: u64, what: &str) -> Result<()> {
        if bytes > self.left() {
            return Err(Error::checkpoint(format!(
                "{what} takes {bytes} bytes, but {} are left",
                self.left()
            ))
            .at(self.position));
        }
        Ok(())
    }

    /// Steps over `bytes` without reading them.
    pub fn skip(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.need(bytes, what)?;
        self.position += bytes;
        Ok(())
    }

    /// The next `N` bytes.
    pub fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.need(N as u64, what)?;
        if let Some(found) = self.in_window() {
            self.position += N as u64;
            return Ok(found);
        }
        let bytes = shape::to_usize(self.left().min(WINDOW_BYTES))?;
        self.window.resize(bytes, 0);
        self.window_start = self.position;
        if let Err(error) = self.source.read_at(self.position, &mut self.window) {
            self.window.clear();
            return Err(error);
        }
        let found = self
            .in_window()
            .ok_or_else(|| Error::Internal(String::from("a window that misses its own start")))?;
        self.position += N as u64;
        Ok(found)
    }

    fn in_window<const N: usize>(&self) -> Option<[u8; N]> {
        let start = usize::try_from(self.position.checked_sub(self.window_start)?).ok()?;
        self.window.get(start..)?.first_chunk().copied()
    }

    /// The next u32.
    pub fn u32(&mut self, what: &str) -> Result<u32> {
        let bytes = self.fixed(what)?;
        Ok(match self.big_endian {
            true => u32::from_be_bytes(bytes),
            false => u32::from_le_bytes(bytes),
        })
    }

    /// The next u64.
    pub fn u64(&mut self, what: &str) -> Result<u64> {
        let bytes = self.fixed(what)?;
        Ok(match self.big_endian {
            true => u64::from_be_bytes(bytes),
            false => u64::from_le_bytes(bytes),
        })
    }

    /// The next `count` bytes, in memory of their own.
    pub fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>> {
        self.need(count, what)?;
        let size = shape::to_usize(count)?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).map_err(|_| {
            Error::checkpoint(format!("{what} of {count} bytes does not fit in memory"))
                .at(self.position)
        })?;
        bytes.resize(size, 0);
        let start = self
            .position
            .checked_sub(self.window_start)
            .and_then(|start| usize::try_from(start).ok());
        let found = start.and_then(|start| self.window.get(start..)?.get(..size));
        match found {
            Some(found) => bytes.copy_from_slice(found),
            None if count <= WINDOW_BYTES / 2 => {
                // Texts follow each other: fill the window, the next ones come from it.
                let window = shape::to_usize(self.left().min(WINDOW_BYTES))?;
                self.window.resize(window, 0);
                self.window_start = self.position;
                if let Err(error) = self.source.read_at(self.position, &mut self.window) {
                    self.window.clear();
                    return Err(error);
                }
                if let Some(found) = self.window.get(..size) {
                    bytes.copy_from_slice(found);
                }
            }
            None => self.source.read_at(self.position, &mut bytes)?,
        }
        self.position += count;
        Ok(bytes)
    }

    /// The next text, which must be UTF-8.
    pub fn text(&mut self, what: &str) -> Result<String> {
        let count = self.u64(what)?;
        let start = self.position;
        let bytes = self.bytes(count, what)?;
        String::from_utf8(bytes).map_err(|error| {
            Error::checkpoint(format!("{what} is not valid UTF-8"))
                .at(start + error.utf8_error().valid_up_to() as u64)
        })
    }

    /// The next text, which is a key or a tensor's name: neither empty nor overlong.
    pub fn name(&mut self, what: &str) -> Result<String> {
        let start = self.position;
        let count = self.u64(what)?;
        if count == 0 {
            return Err(Error::checkpoint(format!("{what} is empty")).at(start));
        }
        if count > MOST_NAME_BYTES && count <= self.left() {
            return Err(Error::checkpoint(format!(
                "{what} of {count} bytes is above the limit of {MOST_NAME_BYTES}"
            ))
            .at(start));
        }
        self.position = start;
        self.text(what)
    }
}
