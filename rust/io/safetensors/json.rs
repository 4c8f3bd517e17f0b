//! The header's JSON, walked once without building a tree, so that whatever appears twice is seen.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};

use super::{METADATA, MOST_DIMENSIONS};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::io::json::{fault, Discarded};
use crate::io::warnings::Warnings;

/// One tensor as the header describes it, unchecked.
#[derive(Debug)]
pub(super) struct Described {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub begin: u64,
    pub end: u64,
}

/// All that the header says.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub tensors: Vec<Described>,
    pub metadata: BTreeMap<String, String>,
    pub warnings: Warnings,
}

/// Parses header text that begins at `offset` of the file.
pub(super) fn parse(text: &str, offset: u64) -> Result<Parsed> {
    let place = Place::default();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let outcome = Top { place: &place }
        .deserialize(&mut deserializer)
        .and_then(|parsed| deserializer.end().map(|()| parsed));
    outcome.map_err(|error| {
        let tensor = place.tensor.borrow_mut().take();
        let fault = fault("header", &error, text, offset);
        match tensor {
            Some(name) => fault.tensor(&name),
            None => fault,
        }
    })
}

/// The tensor that is being read, for messages.
#[derive(Default)]
struct Place {
    tensor: RefCell<Option<String>>,
}

struct Top<'a> {
    place: &'a Place,
}

impl<'de> DeserializeSeed<'de> for Top<'_> {
    type Value = Parsed;

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<Parsed, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Top<'_> {
    type Value = Parsed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parsed, A::Error> {
        let mut parsed = Parsed::default();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                if std::mem::replace(&mut has_metadata, true) {
                    return Err(A::Error::custom("\"__metadata__\" appears twice"));
                }
                parsed.metadata = map.next_value_seed(OptionalTexts)?;
                continue;
            }
            self.place.tensor.replace(Some(name));
            let described = map.next_value_seed(Tensor {
                place: self.place,
                warnings: &mut parsed.warnings,
            })?;
            // Counts come from the file: memory is asked for in a way that can be refused.
            parsed.tensors.try_reserve(1).map_err(A::Error::custom)?;
            parsed.tensors.push(described);
        }
        Ok(parsed)
    }
}

struct Tensor<'w> {
    place: &'w Place,
    warnings: &'w mut Warnings,
}

impl<'de> DeserializeSeed<'de> for Tensor<'_> {
    type Value = Described;

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<Described, D::Error> {
        input.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tensor<'_> {
    type Value = Described;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Described, A::Error> {
        let mut dtype: Option<Dtype> = None;
        let mut shape: Option<Vec<u64>> = None;
        let mut offsets: Option<Vec<u64>> = None;
        let mut unknown = BTreeSet::new();
        while let Some(field) = map.next_key::<String>()? {
            let twice = || A::Error::custom(format!("field \"{field}\" appears twice"));
            match field.as_str() {
                "dtype" if dtype.is_some() => return Err(twice()),
                "shape" if shape.is_some() => return Err(twice()),
                "data_offsets" if offsets.is_some() => return Err(twice()),
                "dtype" => {
                    let name: String = map.next_value()?;
                    let known = Dtype::from_safetensors(&name);
                    let unknown = || A::Error::custom(format!("unknown dtype \"{name}\""));
                    dtype = Some(known.ok_or_else(unknown)?);
                }
                "shape" => shape = Some(map.next_value_seed(Counts("shape", MOST_DIMENSIONS))?),
                "data_offsets" => {
                    offsets = Some(map.next_value_seed(Counts("data_offsets", 2))?);
                }
                _ => {
                    map.next_value::<Discarded>()?;
                    self.warnings.add(|| {
                        let tensor = self.place.tensor.borrow();
                        let tensor = tensor.as_deref().unwrap_or_default();
                        format!("tensor \"{tensor}\": unknown field \"{field}\" is ignored")
                    });
                    if unknown.contains(&field) {
                        return Err(twice());
                    }
                    unknown.insert(field);
                }
            }
        }
        let missing = |field| A::Error::custom(format!("field \"{field}\" is missing"));
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;
        let &[begin, end] = offsets.as_slice() else {
            return Err(A::Error::custom(format!(
                "data_offsets holds {} numbers, expected 2",
                offsets.len()
            )));
        };
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        Ok(Described {
            name: self.place.tensor.take().unwrap_or_default(),
            dtype,
            shape,
            begin,
            end,
        })
    }
}

/// A list of counts: what it is called, and how many there may be.
struct Counts(&'static str, usize);

impl<'de> DeserializeSeed<'de> for Counts {
    type Value = Vec<u64>;

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<Vec<u64>, D::Error> {
        input.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Counts {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: a list of whole numbers", self.0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut counts = Vec::new();
        while let Some(count) = seq.next_element::<u64>()? {
            if counts.len() == self.1 {
                return Err(A::Error::custom(format!(
                    "{} holds more than {} numbers",
                    self.0, self.1
                )));
            }
            counts.push(count);
        }
        Ok(counts)
    }
}

/// An object of texts, or null.
struct OptionalTexts;

impl<'de> DeserializeSeed<'de> for OptionalTexts {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: serde::Deserializer<'de>>(self, input: D) -> Result<Self::Value, D::Error> {
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for OptionalTexts {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("__metadata__: an object of texts")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(BTreeMap::new())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut texts = BTreeMap::new();
        while let Some((key, text)) = map.next_entry::<String, String>()? {
            if texts.contains_key(&key) {
                return Err(A::Error::custom(format!(
                    "metadata key \"{key}\" appears twice"
                )));
            }
            texts.insert(key, text);
        }
        Ok(texts)
    }
}
