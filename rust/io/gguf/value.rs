//! Metadata values: their types, and how each is stored.

use super::scan::Scan;
use super::MOST_DEPTH;
use crate::error::{Error, Result};
use crate::shape;

macro_rules! numbers {
    ($($variant:ident $type:ident $id:literal $name:literal;)*) => {
        /// Type of a metadata value.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum Kind {
            $($variant,)*
            /// One byte, 0 or 1.
            Bool,
            /// UTF-8.
            Text,
            /// Values of one type.
            Array,
        }

        impl Kind {
            /// The type with this id in a file.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Kind::$variant),)*
                    7 => Some(Kind::Bool),
                    8 => Some(Kind::Text),
                    9 => Some(Kind::Array),
                    _ => None,
                }
            }

            /// Id of the type in a file.
            pub fn id(self) -> u32 {
                match self {
                    $(Kind::$variant => $id,)*
                    Kind::Bool => 7,
                    Kind::Text => 8,
                    Kind::Array => 9,
                }
            }

            /// Name of the type: `u32`, `bool`, `str`, `array`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Kind::$variant => $name,)*
                    Kind::Bool => "bool",
                    Kind::Text => "str",
                    Kind::Array => "array",
                }
            }

            /// The type with this name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Kind::$variant),)*
                    "bool" => Some(Kind::Bool),
                    "str" => Some(Kind::Text),
                    "array" => Some(Kind::Array),
                    _ => None,
                }
            }

            /// Bytes of a value, where all values of the type have the same.
            pub fn fixed_bytes(self) -> Option<u64> {
                match self {
                    $(Kind::$variant => Some(size_of::<$type>() as u64),)*
                    Kind::Bool => Some(1),
                    Kind::Text | Kind::Array => None,
                }
            }
        }

        /// A metadata value.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum Value {
            $($variant($type),)*
            Bool(bool),
            Text(String),
            Array(Array),
            /// A value carried over from a little-endian file, as it is stored there.
            Raw {
                /// Its type.
                kind: Kind,
                /// All that follows the type id.
                bytes: Vec<u8>,
            },
        }

        /// Values of one type.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum Array {
            $($variant(Vec<$type>),)*
            Bool(Vec<bool>),
            Text(Vec<String>),
            Array(Vec<Array>),
        }

        impl Value {
            /// The value's type.
            pub fn kind(&self) -> Kind {
                match self {
                    $(Value::$variant(_) => Kind::$variant,)*
                    Value::Bool(_) => Kind::Bool,
                    Value::Text(_) => Kind::Text,
                    Value::Array(_) => Kind::Array,
                    Value::Raw { kind, .. } => *kind,
                }
            }

            /// Appends the value as a little-endian file stores it, without the type id.
            pub(super) fn store(&self, out: &mut Vec<u8>) {
                match self {
                    $(Value::$variant(number) => out.extend_from_slice(&number.to_le_bytes()),)*
                    Value::Bool(truth) => out.push(u8::from(*truth)),
                    Value::Text(text) => store_text(text, out),
                    Value::Array(array) => array.store(out),
                    Value::Raw { bytes, .. } => out.extend_from_slice(bytes),
                }
            }

            /// Reads a value of type `kind`.
            pub(super) fn load(scan: &mut Scan<'_>, kind: Kind) -> Result<Self> {
                Ok(match kind {
                    $(Kind::$variant => {
                        let bytes = scan.fixed("value")?;
                        Value::$variant(match scan.big_endian {
                            true => $type::from_be_bytes(bytes),
                            false => $type::from_le_bytes(bytes),
                        })
                    })*
                    Kind::Bool => Value::Bool(load_bool(scan)?),
                    Kind::Text => Value::Text(scan.text("value")?),
                    Kind::Array => Value::Array(Array::load(scan, 1)?),
                })
            }
        }

        impl Array {
            /// Type of the items.
            pub fn item_kind(&self) -> Kind {
                match self {
                    $(Array::$variant(_) => Kind::$variant,)*
                    Array::Bool(_) => Kind::Bool,
                    Array::Text(_) => Kind::Text,
                    Array::Array(_) => Kind::Array,
                }
            }

            /// Number of items.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(items) => items.len(),)*
                    Array::Bool(items) => items.len(),
                    Array::Text(items) => items.len(),
                    Array::Array(items) => items.len(),
                }
            }

            /// Whether there are no items.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            fn store(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.item_kind().id().to_le_bytes());
                out.extend_from_slice(&(self.len() as u64).to_le_bytes());
                match self {
                    $(Array::$variant(items) => {
                        items.iter().for_each(|item| out.extend_from_slice(&item.to_le_bytes()));
                    })*
                    Array::Bool(items) => out.extend(items.iter().map(|item| u8::from(*item))),
                    Array::Text(items) => items.iter().for_each(|item| store_text(item, out)),
                    Array::Array(items) => items.iter().for_each(|item| item.store(out)),
                }
            }

            fn load(scan: &mut Scan<'_>, depth: usize) -> Result<Self> {
                let (kind, count) = load_array_head(scan, depth)?;
                Ok(match kind {
                    $(Kind::$variant => {
                        const BYTES: usize = size_of::<$type>();
                        let stored = scan.bytes(
                            shape::multiply(count, BYTES as u64, "array length")?, "array")?;
                        let (numbers, _) = stored.as_chunks::<BYTES>();
                        Array::$variant(match scan.big_endian {
                            true => numbers.iter().map(|bytes| $type::from_be_bytes(*bytes)).collect(),
                            false => numbers.iter().map(|bytes| $type::from_le_bytes(*bytes)).collect(),
                        })
                    })*
                    Kind::Bool => Array::Bool(items(scan, count, load_bool)?),
                    Kind::Text => Array::Text(items(scan, count, |scan| scan.text("array item"))?),
                    Kind::Array => {
                        Array::Array(items(scan, count, |scan| Array::load(scan, depth + 1))?)
                    }
                })
            }
        }
    };
}

numbers! {
    U8 u8 0 "u8";
    I8 i8 1 "i8";
    U16 u16 2 "u16";
    I16 i16 3 "i16";
    U32 u32 4 "u32";
    I32 i32 5 "i32";
    F32 f32 6 "f32";
    U64 u64 10 "u64";
    I64 i64 11 "i64";
    F64 f64 12 "f64";
}

impl Kind {
    /// Fewest bytes that a value of the type takes.
    pub(super) fn least_bytes(self) -> u64 {
        match self {
            Kind::Text => 8,
            Kind::Array => 12,
            fixed => fixed.fixed_bytes().unwrap_or(1),
        }
    }
}

impl Value {
    /// The text, if the value is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The number, if the value is a whole one that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(number) => Some(number.into()),
            Value::U16(number) => Some(number.into()),
            Value::U32(number) => Some(number.into()),
            Value::U64(number) => Some(number),
            Value::I8(number) => number.try_into().ok(),
            Value::I16(number) => number.try_into().ok(),
            Value::I32(number) => number.try_into().ok(),
            Value::I64(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// The truth value, if the value is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(truth) => Some(*truth),
            _ => None,
        }
    }

    /// The number, if the value is a floating point one.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(number) => Some(number.into()),
            Value::F64(number) => Some(number),
            _ => None,
        }
    }
}

/// Type id of a value.
pub(super) fn load_kind(scan: &mut Scan<'_>) -> Result<Kind> {
    let place = scan.position();
    let id = scan.u32("value type")?;
    Kind::from_id(id).ok_or_else(|| Error::checkpoint(format!("unknown value type {id}")).at(place))
}

/// Item type and count of an array, which are known to fit into the bytes that are left.
pub(super) fn load_array_head(scan: &mut Scan<'_>, depth: usize) -> Result<(Kind, u64)> {
    let place = scan.position();
    if depth > MOST_DEPTH {
        return Err(
            Error::checkpoint(format!("arrays are nested deeper than {MOST_DEPTH}")).at(place),
        );
    }
    let kind = load_kind(scan)?;
    let count = scan.u64("array length")?;
    if count > scan.left() / kind.least_bytes() {
        return Err(Error::checkpoint(format!(
            "array of {count} {} items does not fit into the {} bytes that are left",
            kind.name(),
            scan.left()
        ))
        .at(place));
    }
    Ok((kind, count))
}

fn load_bool(scan: &mut Scan<'_>) -> Result<bool> {
    let place = scan.position();
    match scan.fixed("value")? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(Error::checkpoint(format!("bool is {other}, expected 0 or 1")).at(place)),
    }
}

fn items<T>(
    scan: &mut Scan<'_>,
    count: u64,
    mut load: impl FnMut(&mut Scan<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    let mut items = Vec::new();
    items
        .try_reserve_exact(shape::to_usize(count)?)
        .map_err(|_| Error::checkpoint(format!("array of {count} items does not fit in memory")))?;
    for _ in 0..count {
        items.push(load(scan)?);
    }
    Ok(items)
}

fn store_text(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::memory::MemorySource;

    #[test]
    fn ids_and_names_are_those_of_the_format() {
        for id in 0..13 {
            let kind = Kind::from_id(id).unwrap();
            assert_eq!(kind.id(), id);
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(Kind::from_id(13), None);
        assert_eq!(Kind::from_id(7), Some(Kind::Bool));
        assert_eq!(Kind::from_id(12), Some(Kind::F64));
    }

    #[test]
    fn nested_arrays_load_as_stored_but_not_too_deep() {
        let mut array = Array::I16(vec![-1, 2]);
        for _ in 1..MOST_DEPTH {
            array = Array::Array(vec![array.clone(), array]);
        }
        let mut bytes = Vec::new();
        Value::Array(array.clone()).store(&mut bytes);
        let source = MemorySource::new("a", &bytes);
        let mut scan = Scan::new(&source, 0, u64::MAX, false);
        assert_eq!(
            Value::load(&mut scan, Kind::Array).unwrap(),
            Value::Array(array.clone())
        );
        bytes.clear();
        Value::Array(Array::Array(vec![array])).store(&mut bytes);
        let source = MemorySource::new("a", &bytes);
        let mut scan = Scan::new(&source, 0, u64::MAX, false);
        let error = Value::load(&mut scan, Kind::Array).unwrap_err().to_string();
        assert!(
            error.starts_with("arrays are nested deeper than 4"),
            "{error}"
        );
    }
}
