//! Numeric layouts of one tensor.
//!
//! A [`Format`] says which arrays ("components") are stored for a tensor of a given shape, as pure
//! arithmetic, and turns weights into the bytes of those arrays and back. Loading, saving,
//! converting, inspecting and comparing all take their sizes from [`Format::layout`]; none has a
//! size formula of its own.
//!
//! Work comes in *tiles*: runs of weights in memory order that begin at a multiple of
//! [`Layout::unit_weights`] and end at one or at the end of the tensor. A tile is decoded to `f32`,
//! encoded and measured while it is in cache, so every format here takes and gives `f32`;
//! [`crate::float`] widens and narrows. Encoders may take 16-bit weights as they are stored ([`Weights`]).
//!
//! [`FORMATS`] is the only list of formats.

mod blocks;
#[doc(hidden)]
pub mod bnb4;
mod bnb4_state;
#[doc(hidden)]
pub mod bnb8;
pub(crate) mod borders;
#[doc(hidden)]
pub mod e2m1;
#[doc(hidden)]
pub mod experts;
mod fold;
mod format;
#[doc(hidden)]
pub mod fp4;
#[doc(hidden)]
pub mod fp4_blocks;
#[doc(hidden)]
pub mod ggml_activation;
#[doc(hidden)]
pub mod ggml_basic;
#[doc(hidden)]
pub mod ggml_iq;
#[doc(hidden)]
pub mod ggml_k;
mod ggml_k_encode;
#[doc(hidden)]
pub mod ggml_search;
#[doc(hidden)]
pub mod ggml_ternary;
pub mod grid;
pub mod grouped;
pub mod hqq;
#[doc(hidden)]
pub mod int4_rows;
mod iq1_search;
mod iq4_search;
mod iq_grid_search;
#[doc(hidden)]
pub mod iq_grids;
mod iq_neighbours;
#[doc(hidden)]
pub mod mx;
mod plain;
#[doc(hidden)]
pub mod quanto;
#[doc(hidden)]
pub mod quanto_bits;
#[doc(hidden)]
pub mod quanto_groups;
mod recode;
#[doc(hidden)]
pub mod rows8;
#[doc(hidden)]
pub mod scaled;
mod shared_bytes;
pub(crate) mod significands;
mod span;
pub(crate) mod stored;
#[doc(hidden)]
pub mod torchao;
#[doc(hidden)]
pub mod torchao_blocks;
#[doc(hidden)]
pub mod torchao_int4;
mod validity;
#[doc(hidden)]
pub mod weights;

use std::borrow::Cow;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::{kernels, shape};

pub use blocks::{Block, Weighing};
pub use bnb4_state::{read_quant_state, QuantState};
pub use fold::Fold;
pub use format::Format;
pub use grid::Grid;
pub use grouped::Integers;
pub use recode::{recoding, Recode};
pub use span::Span;
pub use validity::first_invalid;
pub use weights::Weights;

pub use crate::kernels::ErrorSums;

/// Most components of one format that are cut into tiles.
pub const MAX_PARTS: usize = 4;

/// The bytes of one tile in each sliced component, in component order; the rest are empty.
pub type Parts<'a> = [&'a [u8]; MAX_PARTS];

/// As [`Parts`], to be filled.
pub type PartsMut<'a> = [&'a mut [u8]; MAX_PARTS];

/// Choices a format leaves open, and facts a packed tensor records about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Weights sharing a scale in memory order; `None` takes the format's default.
    pub block_size: Option<u64>,
    /// bitsandbytes 4-bit: quantize the scales as well.
    pub double_quant: bool,
    /// Element type that decoding gives back; recorded by formats that store it.
    pub dtype: Dtype,
    /// bitsandbytes double quantization: mean that was taken off the scales. Set by
    /// [`Format::settle`] when encoding and by the reader when decoding.
    pub nested_offset: f32,
    /// What all decoded weights are multiplied with, in formats with [`Format::tensor_scale`]. Set as
    /// `nested_offset` is.
    pub tensor_scale: f32,
    /// Factors of the columns of a decoded matrix, where the file has some beside the packed weight.
    pub column_factors: Option<Arc<[f32]>>,
    /// GGUF: how much each weight counts when codes and scales are searched.
    pub importance: Option<Importance>,
    /// Bytes with a scale for each cell of a grid: what a cell is. Set by the reader.
    pub grid: Option<Grid>,
    /// Whole numbers in groups: how they are packed. Set by the reader.
    pub integers: Option<Arc<Integers>>,
    /// HQQ: what one weight says of its codes. Set by the reader.
    pub hqq: Option<hqq::Record>,
}

/// How much each weight of a row counts: one number per column, the same for every row of a matrix.
/// Finite and not negative.
#[derive(Debug, Clone, PartialEq)]
pub struct Importance(Arc<[f32]>);

impl Importance {
    /// `values` hold one number per column, or, for a stack of matrices, one per matrix and column.
    pub fn new(values: Vec<f32>) -> Result<Self> {
        match values
            .iter()
            .position(|value| !(value.is_finite() && *value >= 0.0))
        {
            Some(index) => Err(Error::format(format!(
                "importance {index} is {}, expected a finite number that is not negative",
                values[index]
            ))),
            None => Ok(Importance(values.into())),
        }
    }

    /// Fails unless it goes with a tensor of `shape`.
    fn check(&self, format: &str, shape: &[u64]) -> Result<()> {
        let columns = shape.last().copied().unwrap_or(1);
        let matrices = match shape {
            [matrices @ .., _, _] => shape::count_weights(matrices)?,
            _ => 1,
        };
        let given = self.0.len() as u64;
        if given == columns || columns.checked_mul(matrices) == Some(given) {
            return Ok(());
        }
        Err(Error::format(format!(
            "{format}: importance of {given} numbers, expected {columns} (one per column)"
        )))
    }

    /// The numbers for `count` weights of a tensor of `shape`, all of one row, from weight `first`.
    fn of_row(&self, shape: &[u64], first: u64, count: usize) -> Result<&[f32]> {
        let columns = shape.last().copied().unwrap_or(1).max(1);
        let rows = match shape {
            [.., rows, _] => (*rows).max(1),
            _ => 1,
        };
        let matrices = (self.0.len() as u64 / columns).max(1);
        let matrix = (first / columns / rows) % matrices;
        let start = shape::to_usize(matrix * columns + first % columns)?;
        self.0
            .get(start..start + count)
            .ok_or_else(|| Error::Internal(String::from("importance is too short")))
    }
}

/// When a format can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encodes {
    /// From weights alone.
    Always,
    /// Only with an importance vector.
    WithImportance,
    /// Not at all: it is decoded only.
    Never,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            block_size: None,
            double_quant: false,
            dtype: Dtype::F32,
            nested_offset: 0.0,
            tensor_scale: 1.0,
            column_factors: None,
            importance: None,
            grid: None,
            integers: None,
            hqq: None,
        }
    }
}

impl Params {
    /// Fails if a choice is made that the format called `format` does not leave open; naming its
    /// only block size is allowed.
    fn refuse_choices(&self, format: &str, block_size: Option<u64>) -> Result<()> {
        if self.block_size.is_some() && self.block_size != block_size {
            return Err(Error::config(match block_size {
                Some(size) => format!("{format}: block_size is always {size}"),
                None => format!("{format}: has no block_size"),
            }));
        }
        if self.double_quant {
            return Err(Error::config(format!("{format}: has no double_quant")));
        }
        Ok(())
    }
}

/// What the array of a component is called, for a tensor called `m.weight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `m.weight.absmax`: the suffix behind the tensor's name and a dot.
    Appended,
    /// `m.SCB`: the suffix in place of the last segment.
    Sibling,
    /// `m.weight_blocks`: the suffix behind the tensor's name and an underscore.
    Joined,
    /// `m._weight_qdata`: the last segment with an underscore on both sides, then the suffix (torchao).
    Flattened,
    /// `k_scale` for a tensor called `m.weight`, `a.k_scale` for `a.m.weight`: the suffix in place of the last
    /// two segments.
    Outer,
}

impl Naming {
    /// The name that JSON has for it.
    pub fn name(self) -> &'static str {
        match self {
            Naming::Appended => "appended",
            Naming::Sibling => "sibling",
            Naming::Joined => "joined",
            Naming::Flattened => "flattened",
            Naming::Outer => "outer",
        }
    }
}

/// One stored array of an encoded tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Which one it is; empty for a main array that has the tensor's own name.
    pub suffix: Cow<'static, str>,
    /// How the name of the array is made of the suffix and the tensor's name.
    pub naming: Naming,
    /// Stored element type.
    pub dtype: Dtype,
    /// Stored shape; for [`Span::WholeAtMost`] the largest possible.
    pub shape: Vec<u64>,
    /// How its bytes follow from the weights.
    pub span: Span,
}

impl Component {
    /// Whether the format alone decides what this array holds (a code table, a layout number).
    pub fn is_constant(&self) -> bool {
        matches!(
            self.suffix.as_ref(),
            "quant_map" | "nested_quant_map" | "weight_format"
        )
    }

    /// Name of this array in the file, for a tensor called `base`.
    pub fn stored_name(&self, base: &str) -> String {
        let suffix = self.suffix.as_ref();
        let (module, leaf) = match base.rsplit_once('.') {
            Some((module, leaf)) => (format!("{module}."), leaf),
            None => (String::new(), base),
        };
        match self.naming {
            Naming::Appended if suffix.is_empty() => base.to_owned(),
            Naming::Appended => format!("{base}.{suffix}"),
            Naming::Sibling => format!("{module}{suffix}"),
            Naming::Joined => format!("{base}_{suffix}"),
            Naming::Flattened => format!("{module}_{leaf}_{suffix}"),
            Naming::Outer => {
                let inner = module.trim_end_matches('.');
                let dot = inner.rfind('.').map_or(0, |dot| dot + 1);
                format!("{}{suffix}", &inner[..dot])
            }
        }
    }
}

/// What is stored for one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Logical shape, slowest dimension first.
    pub shape: Vec<u64>,
    /// Product of the shape.
    pub weights: u64,
    /// The parameters, defaults filled in.
    pub params: Params,
    /// Stored arrays; at most [`MAX_PARTS`] of them sliced.
    pub components: Vec<Component>,
    /// Tiles begin at multiples of this many weights. At least 1.
    pub unit_weights: u64,
    /// Bytes of tensor-wide statistics that a first pass collects (a [`Span::Blocks`]); `None` for
    /// formats that need one pass only.
    pub statistics: Option<Span>,
}

impl Layout {
    /// Bytes of component `index`, at most.
    pub fn component_bytes(&self, index: usize) -> Result<u64> {
        let component = self
            .components
            .get(index)
            .ok_or_else(|| Error::config(format!("no component {index}")))?;
        component.dtype.byte_len(&component.shape)
    }

    /// Bytes of all components, at most.
    pub fn total_bytes(&self) -> Result<u64> {
        (0..self.components.len()).try_fold(0u64, |sum, index| {
            shape::add(sum, self.component_bytes(index)?, "tensor size")
        })
    }

    /// The sliced components, in order: what [`Parts`] holds.
    pub fn sliced(&self) -> impl Iterator<Item = (usize, &Component)> {
        self.components
            .iter()
            .enumerate()
            .filter(|(_, component)| component.span.is_sliced())
    }
}

/// How close a format is to its peer library. Every claim is backed by a test against that peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exactness {
    /// Byte-equal to the named peer on finite input.
    Exact,
    /// Byte-equal once one named value is given.
    ExactGiven(&'static str),
}

/// What a format does with weights that are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonFinite {
    /// They are values like any other (casts).
    Stored,
    /// They have a defined encoding, which is used only if the caller asks for it.
    OnRequest,
    /// They have none.
    Refused,
}

/// One row of the format table.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// Full name, `backend:name`.
    pub name: &'static str,
    /// Short form, where it is unambiguous.
    pub short: Option<&'static str>,
    /// Container the backend reads it from: `safetensors`, `gguf`, or both as `any`.
    pub container: &'static str,
    /// How close it is to its peer.
    pub exactness: Exactness,
    /// The peer and its version.
    pub peer: &'static str,
    /// Who reads the result.
    pub reader: &'static str,
    /// Nominal bits per weight, data and scales, at default parameters.
    pub bits_per_weight: f64,
    /// When it can be written.
    pub encodes: Encodes,
}

impl Info {
    /// As [`Format::check_encodes`], by the table alone.
    fn check_encodes(&self, params: &Params) -> Result<()> {
        match self.encodes {
            Encodes::Never => Err(Error::unsupported(format!(
                "{}: is decoded, and not encoded",
                self.name
            ))),
            Encodes::WithImportance if params.importance.is_none() => Err(Error::unsupported(
                format!("{}: is encoded with an importance vector only", self.name),
            )
            .hint("give one (--importance FILE), or choose another format")),
            Encodes::WithImportance | Encodes::Always => Ok(()),
        }
    }
}

/// Every format, in the order tables show them.
pub static FORMATS: &[&dyn Format] = &[
    &bnb4::NF4,
    &bnb4::FP4,
    &bnb8::INT8,
    &torchao::INT8,
    &torchao::INTX[0],
    &torchao::INTX[1],
    &torchao::INTX[2],
    &torchao::INTX[3],
    &torchao::INTX[4],
    &torchao::INTX[5],
    &torchao::INTX[6],
    &torchao::INTX[7],
    &torchao_int4::INT4,
    &torchao::FLOAT8,
    &torchao::FLOAT8_TENSOR,
    &torchao_blocks::NVFP4,
    &torchao_blocks::MXFP8,
    &torchao_blocks::MXFP4,
    &quanto::INT8,
    &quanto::FLOAT8,
    &quanto_bits::INT4,
    &quanto_bits::INT2,
    &fp4::NVFP4,
    &fp4::MXFP4,
    &scaled::MODELOPT_FP8,
    &scaled::MODELOPT_FP8_ROW,
    &scaled::MODELOPT_FP8_BLOCK,
    &scaled::MODELOPT_INT8,
    &int4_rows::INT4,
    &grid::MXFP8,
    &scaled::FP8_BLOCK,
    &scaled::FP8_ROW,
    &scaled::FP8_TENSOR,
    &ggml_basic::Q4_0_FORMAT,
    &ggml_basic::Q4_1_FORMAT,
    &ggml_basic::Q5_0_FORMAT,
    &ggml_basic::Q5_1_FORMAT,
    &ggml_basic::Q8_0_FORMAT,
    &ggml_k::Q2_K_FORMAT,
    &ggml_k::Q3_K_FORMAT,
    &ggml_k::Q4_K_FORMAT,
    &ggml_k::Q5_K_FORMAT,
    &ggml_k::Q6_K_FORMAT,
    &ggml_iq::IQ4_XS_FORMAT,
    &ggml_iq::IQ4_NL_FORMAT,
    &ggml_iq::IQ1_M_FORMAT,
    &ggml_iq::IQ1_S_FORMAT,
    &ggml_iq::IQ3_S_FORMAT,
    &ggml_iq::IQ3_XXS_FORMAT,
    &ggml_iq::IQ2_S_FORMAT,
    &ggml_iq::IQ2_XS_FORMAT,
    &ggml_iq::IQ2_XXS_FORMAT,
    &ggml_ternary::TQ1_0_FORMAT,
    &ggml_ternary::TQ2_0_FORMAT,
    &ggml_ternary::Q1_0_FORMAT,
    &ggml_ternary::Q2_0_FORMAT,
    &mx::MXFP4_FORMAT,
    &mx::NVFP4_FORMAT,
    &ggml_activation::Q8_1_FORMAT,
    &ggml_activation::Q8_K_FORMAT,
    &experts::MXFP4,
    &grouped::GPTQ,
    &grouped::AWQ,
    &grouped::COMPRESSED,
    &hqq::HQQ,
    &fp4::COMPRESSED_NVFP4,
    &fp4::COMPRESSED_MXFP4,
    &grid::INT8,
    &grid::FLOAT8,
    &plain::BF16,
    &plain::F16,
    &plain::F32,
];

/// The format called `name`: a full name (`gguf:q8_0`) or an unambiguous short one (`nf4`).
pub fn find(name: &str) -> Result<&'static dyn Format> {
    FORMATS
        .iter()
        .copied()
        .find(|format| format.info().name == name || format.info().short == Some(name))
        .ok_or_else(|| {
            let known: Vec<&str> = FORMATS.iter().map(|format| format.info().name).collect();
            Error::unsupported(format!("unknown format \"{name}\""))
                .hint(format!("known formats: {}", known.join(", ")))
        })
}

/// The format that decodes one stored array of type `dtype` by itself, if there is one.
pub fn for_dtype(dtype: Dtype) -> Option<&'static dyn Format> {
    Some(match dtype {
        Dtype::F32 => &plain::F32,
        Dtype::F16 => &plain::F16,
        Dtype::BF16 => &plain::BF16,
        Dtype::F64 => &plain::F64,
        Dtype::Q4_0 => &ggml_basic::Q4_0_FORMAT,
        Dtype::Q4_1 => &ggml_basic::Q4_1_FORMAT,
        Dtype::Q5_0 => &ggml_basic::Q5_0_FORMAT,
        Dtype::Q5_1 => &ggml_basic::Q5_1_FORMAT,
        Dtype::Q8_0 => &ggml_basic::Q8_0_FORMAT,
        Dtype::Q2_K => &ggml_k::Q2_K_FORMAT,
        Dtype::Q3_K => &ggml_k::Q3_K_FORMAT,
        Dtype::Q4_K => &ggml_k::Q4_K_FORMAT,
        Dtype::Q5_K => &ggml_k::Q5_K_FORMAT,
        Dtype::Q6_K => &ggml_k::Q6_K_FORMAT,
        Dtype::IQ4_XS => &ggml_iq::IQ4_XS_FORMAT,
        Dtype::IQ4_NL => &ggml_iq::IQ4_NL_FORMAT,
        Dtype::IQ1_M => &ggml_iq::IQ1_M_FORMAT,
        Dtype::IQ1_S => &ggml_iq::IQ1_S_FORMAT,
        Dtype::IQ3_S => &ggml_iq::IQ3_S_FORMAT,
        Dtype::IQ3_XXS => &ggml_iq::IQ3_XXS_FORMAT,
        Dtype::IQ2_S => &ggml_iq::IQ2_S_FORMAT,
        Dtype::IQ2_XS => &ggml_iq::IQ2_XS_FORMAT,
        Dtype::IQ2_XXS => &ggml_iq::IQ2_XXS_FORMAT,
        Dtype::TQ1_0 => &ggml_ternary::TQ1_0_FORMAT,
        Dtype::TQ2_0 => &ggml_ternary::TQ2_0_FORMAT,
        Dtype::Q1_0 => &ggml_ternary::Q1_0_FORMAT,
        Dtype::Q2_0 => &ggml_ternary::Q2_0_FORMAT,
        Dtype::MXFP4 => &mx::MXFP4_FORMAT,
        Dtype::NVFP4 => &mx::NVFP4_FORMAT,
        Dtype::Q8_1 => &ggml_activation::Q8_1_FORMAT,
        Dtype::Q8_K => &ggml_activation::Q8_K_FORMAT,
        _ => return None,
    })
}

/// Compares decoded weights `y` with their source `x`. Sums of neighbouring tiles are joined by
/// [`ErrorSums::merge`], in order.
pub fn error_sums(x: &[f32], y: &[f32]) -> ErrorSums {
    kernels::error_sums(kernels::level(), x, y)
}

/// Index of the first weight that is infinite or NaN.
pub fn first_nonfinite(weights: Weights<'_>) -> Option<usize> {
    weights.first_nonfinite(kernels::level())
}
