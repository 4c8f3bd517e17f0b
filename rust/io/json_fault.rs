//! Faults of JSON text, with their place as a byte of the file instead of line and column.

use crate::error::Error;

/// The fault of `text`, which is the file's `subject` and begins at byte `offset`.
pub(super) fn fault(subject: &str, error: &serde_json::Error, text: &str, offset: u64) -> Error {
    let told = error.to_string();
    let message = match told.rfind(" at line ") {
        Some(end) => told.get(..end).unwrap_or(&told),
        None => &told,
    };
    let line_start: usize = text
        .split_inclusive('\n')
        .take(error.line().saturating_sub(1))
        .map(str::len)
        .sum();
    let byte = (line_start + error.column().saturating_sub(1)).min(text.len()) as u64;
    Error::checkpoint(format!("{subject}: {message}")).at(offset + byte)
}
