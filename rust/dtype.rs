//! The one table of storage types: the element types of safetensors and the tensor types of
//! GGUF, with the size of each. Containers and formats both take their sizes from here.
//!
//! Sources: safetensors 0.8 (`tensor.rs`), ggml 0.25.3 (`ggml.h`, `ggml-common.h`).

use crate::error::{Error, Result};
use crate::shape;

macro_rules! dtypes {
    ($($variant:ident $name:literal weights $weights:literal bits $bits:literal
       safetensors $safetensors:literal ggml $ggml:expr;)*) => {
        /// How the elements of one stored array are laid out.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, missing_docs)]
        pub enum Dtype {
            $($variant,)*
            /// A GGUF type id this version does not know: listed, never read.
            Unknown(u32),
        }

        const TABLE: &[Row] = &[$(Row {
            dtype: Dtype::$variant, name: $name, weights: $weights, bits: $bits,
            safetensors: $safetensors, ggml: $ggml,
        },)*];

        impl Dtype {
            fn row(self) -> Option<&'static Row> {
                // Variants stand in the table in declaration order.
                let mut index = 0usize;
                $(if self == Dtype::$variant { return TABLE.get(index); } index += 1;)*
                let _ = index;
                None
            }
        }
    };
}

struct Row {
    dtype: Dtype,
    name: &'static str,
    weights: u64,
    bits: u64,
    safetensors: bool,
    ggml: Option<u32>,
}

dtypes! {
    Bool "BOOL" weights 1 bits 8 safetensors true ggml None;
    F4 "F4" weights 1 bits 4 safetensors true ggml None;
    F6_E2M3 "F6_E2M3" weights 1 bits 6 safetensors true ggml None;
    F6_E3M2 "F6_E3M2" weights 1 bits 6 safetensors true ggml None;
    U8 "U8" weights 1 bits 8 safetensors true ggml None;
    I8 "I8" weights 1 bits 8 safetensors true ggml Some(24);
    F8_E5M2 "F8_E5M2" weights 1 bits 8 safetensors true ggml None;
    F8_E4M3 "F8_E4M3" weights 1 bits 8 safetensors true ggml None;
    F8_E8M0 "F8_E8M0" weights 1 bits 8 safetensors true ggml None;
    F8_E4M3FNUZ "F8_E4M3FNUZ" weights 1 bits 8 safetensors true ggml None;
    F8_E5M2FNUZ "F8_E5M2FNUZ" weights 1 bits 8 safetensors true ggml None;
    I16 "I16" weights 1 bits 16 safetensors true ggml Some(25);
    U16 "U16" weights 1 bits 16 safetensors true ggml None;
    F16 "F16" weights 1 bits 16 safetensors true ggml Some(1);
    BF16 "BF16" weights 1 bits 16 safetensors true ggml Some(30);
    I32 "I32" weights 1 bits 32 safetensors true ggml Some(26);
    U32 "U32" weights 1 bits 32 safetensors true ggml None;
    F32 "F32" weights 1 bits 32 safetensors true ggml Some(0);
    C64 "C64" weights 1 bits 64 safetensors true ggml None;
    F64 "F64" weights 1 bits 64 safetensors true ggml Some(28);
    I64 "I64" weights 1 bits 64 safetensors true ggml Some(27);
    U64 "U64" weights 1 bits 64 safetensors true ggml None;
    Q4_0 "Q4_0" weights 32 bits 144 safetensors false ggml Some(2);
    Q4_1 "Q4_1" weights 32 bits 160 safetensors false ggml Some(3);
    Q5_0 "Q5_0" weights 32 bits 176 safetensors false ggml Some(6);
    Q5_1 "Q5_1" weights 32 bits 192 safetensors false ggml Some(7);
    Q8_0 "Q8_0" weights 32 bits 272 safetensors false ggml Some(8);
    Q8_1 "Q8_1" weights 32 bits 288 safetensors false ggml Some(9);
    Q2_K "Q2_K" weights 256 bits 672 safetensors false ggml Some(10);
    Q3_K "Q3_K" weights 256 bits 880 safetensors false ggml Some(11);
    Q4_K "Q4_K" weights 256 bits 1152 safetensors false ggml Some(12);
    Q5_K "Q5_K" weights 256 bits 1408 safetensors false ggml Some(13);
    Q6_K "Q6_K" weights 256 bits 1680 safetensors false ggml Some(14);
    Q8_K "Q8_K" weights 256 bits 2336 safetensors false ggml Some(15);
    IQ2_XXS "IQ2_XXS" weights 256 bits 528 safetensors false ggml Some(16);
    IQ2_XS "IQ2_XS" weights 256 bits 592 safetensors false ggml Some(17);
    IQ3_XXS "IQ3_XXS" weights 256 bits 784 safetensors false ggml Some(18);
    IQ1_S "IQ1_S" weights 256 bits 400 safetensors false ggml Some(19);
    IQ4_NL "IQ4_NL" weights 32 bits 144 safetensors false ggml Some(20);
    IQ3_S "IQ3_S" weights 256 bits 880 safetensors false ggml Some(21);
    IQ2_S "IQ2_S" weights 256 bits 656 safetensors false ggml Some(22);
    IQ4_XS "IQ4_XS" weights 256 bits 1088 safetensors false ggml Some(23);
    IQ1_M "IQ1_M" weights 256 bits 448 safetensors false ggml Some(29);
    TQ1_0 "TQ1_0" weights 256 bits 432 safetensors false ggml Some(34);
    TQ2_0 "TQ2_0" weights 256 bits 528 safetensors false ggml Some(35);
    MXFP4 "MXFP4" weights 32 bits 136 safetensors false ggml Some(39);
    NVFP4 "NVFP4" weights 64 bits 288 safetensors false ggml Some(40);
    Q1_0 "Q1_0" weights 128 bits 144 safetensors false ggml Some(41);
    Q2_0 "Q2_0" weights 64 bits 144 safetensors false ggml Some(42);
}

impl Dtype {
    /// Every known type, in table order.
    pub fn all() -> impl Iterator<Item = Dtype> {
        TABLE.iter().map(|row| row.dtype)
    }

    /// The name safetensors or GGUF tools print: `BF16`, `Q4_K`, `type 99` when unknown.
    pub fn name(self) -> String {
        match (self, self.row()) {
            (_, Some(row)) => row.name.to_owned(),
            (Dtype::Unknown(id), None) => format!("type {id}"),
            (_, None) => String::from("unknown"),
        }
    }

    /// The type with this exact name, whichever container it comes from.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE
            .iter()
            .find(|row| row.name == name)
            .map(|row| row.dtype)
    }

    /// The element type that a safetensors header calls `name`.
    pub fn from_safetensors(name: &str) -> Option<Self> {
        TABLE
            .iter()
            .find(|row| row.safetensors && row.name == name)
            .map(|row| row.dtype)
    }

    /// The tensor type with GGUF id `id`; an id without a row is kept as [`Dtype::Unknown`].
    pub fn from_ggml(id: u32) -> Self {
        TABLE
            .iter()
            .find(|row| row.ggml == Some(id))
            .map_or(Dtype::Unknown(id), |row| row.dtype)
    }

    /// GGUF type id, for types that a GGUF file can hold.
    pub fn ggml_id(self) -> Option<u32> {
        match self {
            Dtype::Unknown(id) => Some(id),
            known => known.row().and_then(|row| row.ggml),
        }
    }

    /// Whether a safetensors file can hold this type.
    pub fn in_safetensors(self) -> bool {
        self.row().is_some_and(|row| row.safetensors)
    }

    /// Whether several weights share a block (the GGUF quantized types).
    pub fn is_block(self) -> bool {
        self.row().is_some_and(|row| row.weights > 1)
    }

    /// Weights and bytes of one block; `None` for unknown types and for types whose element
    /// is not a whole number of bytes.
    pub fn block(self) -> Option<(u64, u64)> {
        self.row()
            .filter(|row| row.bits.is_multiple_of(8))
            .map(|row| (row.weights, row.bits / 8))
    }

    /// Bytes that a header must be aligned to before this type; also the element size.
    pub fn alignment(self) -> u64 {
        self.row()
            .filter(|row| row.weights == 1)
            .map_or(1, |row| (row.bits / 8).max(1))
    }

    /// Whether elements are floating point numbers that a format can encode.
    pub fn is_float(self) -> bool {
        matches!(self, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
    }

    /// Stored bytes of a tensor of this type, checked.
    pub fn byte_len(self, shape: &[u64]) -> Result<u64> {
        let row = self.row().ok_or_else(|| {
            Error::unsupported(format!("{} is not a known tensor type", self.name()))
        })?;
        let count = shape::count_weights(shape)?;
        let length = shape::row_weights(shape);
        if !length.is_multiple_of(row.weights) {
            return Err(Error::format(format!(
                "{}: row of {length} weights is not a multiple of block_size {}",
                row.name.to_lowercase(),
                row.weights
            )));
        }
        let bits = shape::multiply(count / row.weights, row.bits, "tensor size in bits")?;
        if !bits.is_multiple_of(8) {
            return Err(Error::checkpoint(format!(
                "{} tensor of shape {shape:?} does not end on a whole byte",
                row.name
            )));
        }
        Ok(bits / 8)
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_ids_find_their_own_row() {
        for dtype in Dtype::all() {
            assert_eq!(Dtype::from_name(&dtype.name()), Some(dtype));
            if let Some(id) = dtype.ggml_id() {
                assert_eq!(Dtype::from_ggml(id), dtype);
            }
        }
        assert_eq!(Dtype::from_ggml(99), Dtype::Unknown(99));
        assert_eq!(Dtype::from_safetensors("Q4_0"), None);
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(Dtype::Q4_0.byte_len(&[3, 64]).ok(), Some(3 * 2 * 18));
        assert!(Dtype::Q4_0.byte_len(&[64, 3]).is_err());
        assert!(Dtype::F4.byte_len(&[3]).is_err());
        assert_eq!(Dtype::F4.byte_len(&[4]).ok(), Some(2));
        assert!(Dtype::F64.byte_len(&[1 << 61]).is_err());
        assert!(Dtype::Unknown(7).byte_len(&[1]).is_err());
    }
}
