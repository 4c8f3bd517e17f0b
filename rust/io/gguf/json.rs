//! Metadata values as JSON, for tools and requests.

use serde_json::Value as Json;

use super::{Array, Kind, Value};
use crate::error::{Error, Result};

macro_rules! whole {
    ($json:expr, $type:ident, $name:literal) => {
        $json
            .as_i64()
            .map(i128::from)
            .or_else(|| $json.as_u64().map(i128::from))
            .and_then(|number| $type::try_from(number).ok())
            .ok_or_else(|| mismatch($json, $name))
    };
}

impl Value {
    /// The value as JSON. Numbers that JSON has no word for (NaN, infinity) become null; a carried
    /// over value becomes the name of its type.
    pub fn to_json(&self) -> Json {
        match self {
            Value::U8(number) => (*number).into(),
            Value::I8(number) => (*number).into(),
            Value::U16(number) => (*number).into(),
            Value::I16(number) => (*number).into(),
            Value::U32(number) => (*number).into(),
            Value::I32(number) => (*number).into(),
            Value::F32(number) => (*number).into(),
            Value::U64(number) => (*number).into(),
            Value::I64(number) => (*number).into(),
            Value::F64(number) => (*number).into(),
            Value::Bool(truth) => (*truth).into(),
            Value::Text(text) => text.as_str().into(),
            Value::Array(array) => array.to_json(),
            Value::Raw { kind, .. } => kind.name().into(),
        }
    }

    /// The value of type `type_name` (`u32`, `str`, `[i32]`, `[str]`, ...) that `json` stands for.
    pub fn from_json(type_name: &str, json: &Json) -> Result<Self> {
        let item = type_name
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        if let Some(item) = item {
            let items = json.as_array().ok_or_else(|| mismatch(json, type_name))?;
            return Array::from_json(item, items).map(Value::Array);
        }
        Ok(match kind(type_name)? {
            Kind::U8 => Value::U8(whole!(json, u8, "u8")?),
            Kind::I8 => Value::I8(whole!(json, i8, "i8")?),
            Kind::U16 => Value::U16(whole!(json, u16, "u16")?),
            Kind::I16 => Value::I16(whole!(json, i16, "i16")?),
            Kind::U32 => Value::U32(whole!(json, u32, "u32")?),
            Kind::I32 => Value::I32(whole!(json, i32, "i32")?),
            Kind::F32 => Value::F32(float(json)? as f32),
            Kind::U64 => Value::U64(whole!(json, u64, "u64")?),
            Kind::I64 => Value::I64(whole!(json, i64, "i64")?),
            Kind::F64 => Value::F64(float(json)?),
            Kind::Bool => Value::Bool(json.as_bool().ok_or_else(|| mismatch(json, "bool"))?),
            Kind::Text => Value::Text(text(json)?),
            Kind::Array => {
                return Err(Error::config(
                    "type \"array\" does not say what the items are, expected as in \"[i32]\"",
                ))
            }
        })
    }
}

impl Array {
    fn to_json(&self) -> Json {
        match self {
            Array::U8(items) => items.as_slice().into(),
            Array::I8(items) => items.as_slice().into(),
            Array::U16(items) => items.as_slice().into(),
            Array::I16(items) => items.as_slice().into(),
            Array::U32(items) => items.as_slice().into(),
            Array::I32(items) => items.as_slice().into(),
            Array::F32(items) => items.as_slice().into(),
            Array::U64(items) => items.as_slice().into(),
            Array::I64(items) => items.as_slice().into(),
            Array::F64(items) => items.as_slice().into(),
            Array::Bool(items) => items.as_slice().into(),
            Array::Text(items) => items.as_slice().into(),
            Array::Array(items) => items.iter().map(Array::to_json).collect(),
        }
    }

    fn from_json(item: &str, items: &[Json]) -> Result<Self> {
        macro_rules! each {
            ($load:expr) => {
                items.iter().map($load).collect::<Result<Vec<_>>>()?
            };
        }
        Ok(match kind(item)? {
            Kind::U8 => Array::U8(each!(|json| whole!(json, u8, "u8"))),
            Kind::I8 => Array::I8(each!(|json| whole!(json, i8, "i8"))),
            Kind::U16 => Array::U16(each!(|json| whole!(json, u16, "u16"))),
            Kind::I16 => Array::I16(each!(|json| whole!(json, i16, "i16"))),
            Kind::U32 => Array::U32(each!(|json| whole!(json, u32, "u32"))),
            Kind::I32 => Array::I32(each!(|json| whole!(json, i32, "i32"))),
            Kind::F32 => Array::F32(each!(|json| float(json).map(|number| number as f32))),
            Kind::U64 => Array::U64(each!(|json| whole!(json, u64, "u64"))),
            Kind::I64 => Array::I64(each!(|json| whole!(json, i64, "i64"))),
            Kind::F64 => Array::F64(each!(float)),
            Kind::Bool => Array::Bool(each!(|json| json
                .as_bool()
                .ok_or_else(|| mismatch(json, "bool")))),
            Kind::Text => Array::Text(each!(text)),
            Kind::Array => {
                return Err(Error::unsupported(
                    "arrays of arrays cannot be given as JSON",
                ))
            }
        })
    }
}

fn kind(name: &str) -> Result<Kind> {
    Kind::from_name(name).ok_or_else(|| Error::config(format!("unknown metadata type \"{name}\"")))
}

fn float(json: &Json) -> Result<f64> {
    json.as_f64().ok_or_else(|| mismatch(json, "number"))
}

fn text(json: &Json) -> Result<String> {
    json.as_str()
        .map(str::to_owned)
        .ok_or_else(|| mismatch(json, "str"))
}

fn mismatch(json: &Json, expected: &str) -> Error {
    Error::config(format!("metadata value: expected {expected}, got {json}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_type_goes_both_ways() {
        for (name, json) in [
            ("u8", json!(255)),
            ("i8", json!(-128)),
            ("u16", json!(65535)),
            ("i16", json!(-32768)),
            ("u32", json!(4294967295u32)),
            ("i32", json!(-2147483648)),
            ("f32", json!(0.5)),
            ("u64", json!(u64::MAX)),
            ("i64", json!(i64::MIN)),
            ("f64", json!(0.1)),
            ("bool", json!(true)),
            ("str", json!("é")),
        ] {
            let value = Value::from_json(name, &json).unwrap();
            assert_eq!(value.kind().name(), name);
            assert_eq!(value.to_json(), json);
            let array = json!([json, json]);
            let value = Value::from_json(&format!("[{name}]"), &array).unwrap();
            assert_eq!(value.to_json(), array);
        }
    }

    #[test]
    fn values_that_do_not_fit_are_refused() {
        for (name, json) in [
            ("u8", json!(256)),
            ("u32", json!(-1)),
            ("i32", json!(1.5)),
            ("u64", json!("1")),
            ("bool", json!(1)),
            ("str", json!(1)),
            ("[i32]", json!(1)),
            ("[i32]", json!(["a"])),
            ("array", json!([])),
            ("float", json!(1)),
        ] {
            assert!(Value::from_json(name, &json).is_err(), "{name} {json}");
        }
    }
}
