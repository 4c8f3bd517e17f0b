//! The key-value pairs of a file: short values in memory, long ones left where they are.

use super::scan::Scan;
use super::value::{load_array_head, load_kind};
use super::{Kind, Value, MOST_PAIRS};
use crate::error::{Error, Result};
use crate::io::unique::first_double;
use crate::io::Source;

/// Longest text that is kept in memory from the start.
const MOST_KEPT_TEXT: u64 = 64 * 1024;
/// Most bytes of text that are kept in memory from the start.
const MOST_KEPT_TEXTS: u64 = 8 << 20;
/// Fewest bytes of a pair: key length, one byte of key, value type, one byte of value.
const LEAST_PAIR_BYTES: u64 = 14;

/// One pair, as the file holds it.
#[derive(Debug, Clone)]
pub struct Field {
    /// The key.
    pub key: String,
    /// Type of the value.
    pub kind: Kind,
    /// Item type and count, for arrays.
    pub array: Option<(Kind, u64)>,
    /// The value: always for numbers and bools, and for texts of ordinary length.
    pub value: Option<Value>,
    /// First byte of the value in the file (of an array: of its item type).
    pub offset: u64,
    /// Length there.
    pub bytes: u64,
}

/// The pairs of a file, in file order.
#[derive(Debug, Clone)]
pub struct Metadata {
    version: u32,
    alignment: u64,
    big_endian: bool,
    fields: Vec<Field>,
    /// Indices of `fields`, sorted by key.
    by_key: Vec<usize>,
}

impl Metadata {
    /// Scans `count` pairs; `scan` stands at the first and is left behind the last.
    pub(super) fn scan(
        scan: &mut Scan<'_>,
        version: u32,
        count: u64,
        warn: &mut impl FnMut(String),
    ) -> Result<Self> {
        if count > scan.left() / LEAST_PAIR_BYTES {
            return Err(Error::checkpoint(format!(
                "{count} metadata pairs do not fit into the {} bytes that are left",
                scan.left()
            ))
            .at(scan.position()));
        }
        if count > MOST_PAIRS {
            return Err(Error::checkpoint(format!(
                "{count} metadata pairs are above the limit of {MOST_PAIRS}"
            ))
            .at(scan.position()));
        }
        let mut fields: Vec<Field> = Vec::new();
        let mut text_bytes_left = MOST_KEPT_TEXTS;
        for _ in 0..count {
            let key = if scan.lenient {
                scan.text("metadata key")?
            } else {
                scan.name("metadata key")?
            };
            if key.is_empty() {
                warn(String::from("a metadata key is empty"));
            }
            let field = scan_value(scan, &key, &mut text_bytes_left, warn)
                .map_err(|error| about(error, &key))?;
            fields
                .try_reserve(1)
                .map_err(|_| Error::checkpoint("the metadata does not fit in memory"))?;
            fields.push(field);
        }
        if let Some(key) = first_double(&fields, |field| &field.key) {
            return Err(Error::checkpoint(format!(
                "metadata key \"{key}\" appears twice"
            )));
        }
        let mut by_key: Vec<usize> = (0..fields.len()).collect();
        by_key.sort_by(|a, b| {
            let key = |index: &usize| fields.get(*index).map(|field| &field.key);
            key(a).cmp(&key(b))
        });
        Ok(Metadata {
            version,
            alignment: super::DEFAULT_ALIGNMENT,
            big_endian: scan.big_endian,
            fields,
            by_key,
        })
    }

    pub(super) fn set_alignment(&mut self, alignment: u64) {
        self.alignment = alignment;
    }

    /// Version of the file.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of the tensors' data.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The pairs, in file order.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The keys, in file order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().map(|field| field.key.as_str())
    }

    /// The pair with this key.
    pub fn field(&self, key: &str) -> Option<&Field> {
        let at = |index: &usize| self.fields.get(*index);
        let found = self
            .by_key
            .binary_search_by(|index| at(index).map(|field| field.key.as_str()).cmp(&Some(key)))
            .ok()?;
        self.by_key.get(found).and_then(at)
    }

    /// Whether there is a pair with this key.
    pub fn contains(&self, key: &str) -> bool {
        self.field(key).is_some()
    }

    /// The value of this key, if it is in memory: numbers, bools, ordinary texts.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.field(key)?.value.as_ref()
    }

    /// A text of ordinary length.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A whole number that is not negative, of whatever type.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// A floating point number.
    pub fn get_f64(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64()
    }

    /// A truth value.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        self.get(key)?.as_bool()
    }

    /// Item type and count of an array.
    pub fn array(&self, key: &str) -> Option<(Kind, u64)> {
        self.field(key)?.array
    }

    /// The value of this key, decoded whole from `source`, the file that the pairs came from.
    pub fn value(&self, source: &dyn Source, key: &str) -> Result<Value> {
        let field = self.existing(key)?;
        if let Some(value) = &field.value {
            return Ok(value.clone());
        }
        let end = field.offset.saturating_add(field.bytes);
        let mut scan = Scan::new(source, field.offset, end, self.big_endian);
        Value::load(&mut scan, field.kind).map_err(|error| about(error, key).file(source.path()))
    }

    /// The stored bytes of the value of this key, in the file's byte order.
    pub fn raw(&self, source: &dyn Source, key: &str) -> Result<Vec<u8>> {
        let field = self.existing(key)?;
        let end = field.offset.saturating_add(field.bytes);
        Scan::new(source, field.offset, end, self.big_endian)
            .bytes(field.bytes, "value")
            .map_err(|error| about(error, key).file(source.path()))
    }

    /// The value of this key, to be written into another file: as its stored bytes, which are not
    /// looked into, or decoded if they stand in the wrong order.
    pub fn carry(&self, source: &dyn Source, key: &str) -> Result<Value> {
        let field = self.existing(key)?;
        if self.big_endian {
            return self.value(source, key);
        }
        Ok(Value::Raw {
            kind: field.kind,
            bytes: self.raw(source, key)?,
        })
    }

    fn existing(&self, key: &str) -> Result<&Field> {
        self.field(key)
            .ok_or_else(|| Error::checkpoint(format!("no metadata key \"{key}\"")))
    }
}

/// The error, with the key it is about.
fn about(error: Error, key: &str) -> Error {
    match error {
        Error::Checkpoint(mut fault) => {
            fault.message = format!("metadata \"{key}\": {}", fault.message);
            Error::Checkpoint(fault)
        }
        other => other,
    }
}

/// One value: kept if it is short, stepped over if it is not.
fn scan_value(
    scan: &mut Scan<'_>,
    key: &str,
    text_bytes_left: &mut u64,
    warn: &mut impl FnMut(String),
) -> Result<Field> {
    let kind = load_kind(scan)?;
    let offset = scan.position();
    let mut array = None;
    let mut value = None;
    match kind {
        Kind::Array => array = Some(skip_array(scan)?),
        Kind::Text => {
            let count = scan.u64("value")?;
            if count > MOST_KEPT_TEXT || count > *text_bytes_left {
                scan.skip(count, "value")?;
            } else {
                *text_bytes_left -= count;
                match String::from_utf8(scan.bytes(count, "value")?) {
                    Ok(text) => value = Some(Value::Text(text)),
                    Err(_) => warn(format!("metadata \"{key}\" is not valid UTF-8")),
                }
            }
        }
        short => value = Some(Value::load(scan, short)?),
    }
    Ok(Field {
        key: key.to_owned(),
        kind,
        array,
        value,
        offset,
        bytes: scan.position() - offset,
    })
}

/// Steps over an array, arrays within it included; gives its own item type and count.
fn skip_array(scan: &mut Scan<'_>) -> Result<(Kind, u64)> {
    let outer = load_array_head(scan, 1)?;
    // Arrays that are begun and not yet finished, outermost first: never more than the depth limit.
    let mut open = vec![outer];
    while let Some((kind, left)) = open.last_mut() {
        match (*kind, kind.fixed_bytes()) {
            (_, Some(bytes)) => {
                scan.skip(left.saturating_mul(bytes), "array")?;
                open.pop();
            }
            (Kind::Text, None) => {
                for _ in 0..*left {
                    let bytes = scan.u64("array item")?;
                    scan.skip(bytes, "array item")?;
                }
                open.pop();
            }
            (_, None) if *left == 0 => {
                open.pop();
            }
            (_, None) => {
                *left -= 1;
                let inner = load_array_head(scan, open.len() + 1)?;
                open.push(inner);
            }
        }
    }
    Ok(outer)
}
