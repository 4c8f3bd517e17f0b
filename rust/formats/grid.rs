//! Bytes with a scale, and for whole numbers maybe a zero, for each cell of a grid over the weight. Decoded
//! only.
//!
//! | format | `weight` | a cell | `weight_scale` | `weight_zero_point` |
//! |---|---|---|---|---|
//! | `compressed-tensors:int8` | I8 [N, K] | the tensor, a row, g columns of a row, or r × c weights | F32, BF16 or F16: \[1\], [N, 1], [N, K/g] or [⌈N/r⌉, ⌈K/c⌉] | I8, as the scales, or none |
//! | `compressed-tensors:float8` | F8_E4M3 [N, K] | g columns of a row, or r × c weights | likewise | – |
//! | `modelopt:mxfp8` | F8_E4M3 [.., N, K] | 32 columns of a row | U8 or F8_E8M0 [.., N, K/32]: E8M0 | – |
//!
//! y = (code − zero)·scale: the difference is exact, and so is its product with a scale of 16 bits or a
//! power of two; with one in `f32` it is rounded once. Cells at the edges hold fewer weights.
//!
//! Special cases: E8M0 code 255 is NaN. FP8 with one scale for a row or for the tensor is `fp8:row` and
//! `fp8:tensor`.
//!
//! Peers: compressed-tensors 0.20 (`int-quantized`, `naive-quantized`, `float-quantized`,
//! `mxfp8-quantized`; the last is the same as ModelOpt's), ModelOpt 0.47 (`MXFP8QTensor`).

use super::rows8::{self, Codes};
use super::scaled::{read_scale, scale_bytes};
use super::{Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, Span};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::{kernels, shape};

/// Columns that are decoded at once, or one cell where that has more.
const RUN: usize = 2048;

/// What weights share a scale, and what else stands beside the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Rows of a cell.
    pub rows: u64,
    /// Columns of a cell.
    pub columns: u64,
    /// Type of the scales.
    pub scale: Dtype,
    /// Whether each cell has a zero.
    pub has_zeros: bool,
}

/// A format of this family.
pub struct Gridded {
    info: &'static Info,
    codes: Codes,
    /// The grid, where it is the same for all weights.
    grid: Option<Grid>,
}

const fn info(name: &'static str) -> Info {
    Info {
        name,
        short: None,
        container: "safetensors",
        exactness: Exactness::Exact,
        peer: "compressed-tensors 0.20",
        reader: "transformers, vLLM, SGLang",
        bits_per_weight: 8.0,
        encodes: Encodes::Never,
    }
}

/// compressed-tensors' whole numbers.
pub static INT8: Gridded = Gridded {
    info: &info("compressed-tensors:int8"),
    codes: Codes::Int8,
    grid: None,
};
/// compressed-tensors' FP8, where a scale is neither for a row nor for the tensor.
pub static FLOAT8: Gridded = Gridded {
    info: &info("compressed-tensors:float8"),
    codes: Codes::E4m3,
    grid: None,
};
/// FP8 with a power of two for every 32 weights.
pub static MXFP8: Gridded = Gridded {
    info: &Info {
        peer: "ModelOpt 0.47",
        reader: "vLLM, TensorRT-LLM, SGLang",
        bits_per_weight: 8.25,
        ..info("modelopt:mxfp8")
    },
    codes: Codes::E4m3,
    grid: Some(Grid {
        rows: 1,
        columns: 32,
        scale: Dtype::U8,
        has_zeros: false,
    }),
};

impl Gridded {
    fn grid(&self, params: &Params) -> Result<Grid> {
        params.grid.or(self.grid).ok_or_else(|| {
            Error::unsupported(format!(
                "{}: is decoded, and not encoded, and only from a checkpoint, which says what shares a scale",
                self.info.name
            ))
        })
    }
}

impl Format for Gridded {
    fn info(&self) -> &'static Info {
        self.info
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let name = self.info.name;
        params.refuse_choices(name, self.grid.map(|grid| grid.columns))?;
        let grid = self.grid(params)?;
        let &[ref outer @ .., columns] = shape else {
            return Err(Error::format(format!("{name}: takes rows, got a scalar")));
        };
        let rows = shape::count_weights(outer)?;
        let weights = shape::count_weights(shape)?;
        let is_whole = grid.rows >= rows && grid.columns >= columns;
        if outer.is_empty() || (outer.len() > 1 && grid.rows > 1 && !is_whole) {
            return Err(Error::format(format!(
                "{name}: takes 2 dimensions, got shape {shape:?}"
            )));
        }
        if columns == 0 || grid.rows == 0 || grid.columns == 0 {
            return Err(Error::format(format!("{name}: rows are empty")));
        }
        if grid.rows == 1 && !is_whole && !columns.is_multiple_of(grid.columns) {
            return Err(Error::format(format!(
                "{name}: row of {columns} weights is not a multiple of {} that share a scale",
                grid.columns
            )));
        }
        let (down, across) = (rows.div_ceil(grid.rows), columns.div_ceil(grid.columns));
        let width = scale_bytes(grid.scale)? as u64;
        // One row of cells belongs to any range of the weights, whatever row that begins at.
        let cells = shape::multiply(grid.rows.min(rows.max(1)), columns, "weights of cells")?;
        let of_cells = |bytes: u64| -> Result<Span> {
            Ok(Span::Blocks {
                weights: cells,
                bytes: shape::multiply(across, bytes, "bytes of scales")?,
            })
        };
        let of_shape = match (is_whole, outer) {
            (true, _) => vec![1],
            (false, [_]) => vec![down, across],
            (false, outer) => [outer, &[across]].concat(),
        };
        let array = |suffix: &'static str, dtype, shape: Vec<u64>, span| Component {
            suffix: suffix.into(),
            naming: match suffix {
                "" => Naming::Appended,
                _ => Naming::Sibling,
            },
            dtype,
            shape,
            span,
        };
        let codes = match self.codes {
            Codes::E4m3 => Dtype::F8_E4M3,
            Codes::Int8 => Dtype::I8,
        };
        let one = Span::Blocks {
            weights: 1,
            bytes: 1,
        };
        let mut components = vec![
            array("", codes, shape.to_vec(), one),
            array(
                "weight_scale",
                grid.scale,
                of_shape.clone(),
                of_cells(width)?,
            ),
        ];
        if grid.has_zeros {
            components.push(array(
                "weight_zero_point",
                Dtype::I8,
                of_shape,
                of_cells(1)?,
            ));
        }
        Ok(Layout {
            shape: shape.to_vec(),
            weights,
            params: params.clone(),
            components,
            unit_weights: if down > 1 { cells } else { columns },
            statistics: None,
        })
    }

    fn decode(
        &self,
        layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let grid = self.grid(&layout.params)?;
        let width = scale_bytes(grid.scale)?;
        let columns = shape::to_usize(shape::row_weights(&layout.shape))?.max(1);
        let cell_rows = usize::try_from(grid.rows).unwrap_or(usize::MAX).max(1);
        let cell_columns = usize::try_from(grid.columns).unwrap_or(usize::MAX).max(1);
        let across = columns.div_ceil(cell_columns);
        let run = cell_columns.saturating_mul((RUN / cell_columns).max(1));
        let [codes, scales, zeros, ..] = *parts;
        let rows = weights.chunks_mut(columns).zip(codes.chunks(columns));
        for (row, (weights, codes)) in rows.enumerate() {
            let first = row / cell_rows * across;
            let scales = scales.get(first * width..).unwrap_or_default();
            let mut zeros = zeros.get(first..).unwrap_or_default().iter();
            let mut scales = scales.chunks_exact(width);
            let runs = weights.chunks_mut(run).zip(codes.chunks(run));
            for (weights, codes) in runs {
                // Small cells are too short for a call each: the codes first, all in one.
                rows8::decode(kernels::level(), self.codes, 0, 1.0, codes, weights);
                for (weights, scale) in weights.chunks_mut(cell_columns).zip(&mut scales) {
                    let zero = zeros
                        .next()
                        .map_or(0.0, |zero| f32::from(zero.cast_signed()));
                    let scale = read_scale(grid.scale, scale);
                    for weight in weights {
                        *weight = (*weight - zero) * scale;
                    }
                }
            }
        }
        Ok(())
    }
}
