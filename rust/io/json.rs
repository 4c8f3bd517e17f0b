//! What the JSON of all containers needs: faults with their place as a byte of the file instead of
//! line and column, and values that are checked but not kept.

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

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

/// A value that nobody asked for. It takes no memory, but its texts must be valid and its depth is
/// bounded, as for values that are kept.
pub(super) struct Discarded;

impl<'de> Deserialize<'de> for Discarded {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_any(Discarded)
    }
}

impl<'de> Visitor<'de> for Discarded {
    type Value = Discarded;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self, A::Error> {
        while seq.next_element::<Discarded>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        while map.next_entry::<Discarded, Discarded>()?.is_some() {}
        Ok(self)
    }
}
