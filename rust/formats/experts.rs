//! 4-bit floats of a stack of experts, as gpt-oss stores them: each expert's matrix is packed with rows and
//! columns exchanged, so that the weights that share a scale lie below one another.
//!
//! | array of a stack `w` [.., K, N] | type | holds |
//! |---|---|---|
//! | `w_blocks` [.., N, K/32, 16] | U8 | byte j of a block: the code of weight (k + 2j, n) in bits 0-3, of (k + 2j + 1, n) in bits 4-7 |
//! | `w_scales` [.., N, K/32] | U8 | E8M0: byte e is 2^(e − 127) |
//!
//! A code is a sign (bit 3) and a magnitude (bits 0-2) of 0, ½, 1, 1½, 2, 3, 4, 6; a weight is
//! value·2^(e − 127). That is exact in bf16 too, also where it is subnormal (e = 0).
//!
//! The arrays are read with the blocks of all columns behind one another, so that 32 rows of the stack are
//! a run of N blocks. Read without that they are `modelopt:mxfp4` of shape [.., N, K].
//!
//! Special cases:
//! - 2^128 and more is infinite: magnitudes from 4 on at e = 253, from 2 on at e = 254.
//! - e = 255 is NaN, as the microscaling formats define it. transformers takes it for 2^128, which gives
//!   infinities, and NaN for zeros.
//!
//! Peer: transformers 5.23 (`convert_moe_packed_tensors`). Decoded, and not encoded.

use super::e2m1::SIGNED_VALUES;
use super::{Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, Span};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float8::of_e8m0;
use crate::shape;

/// Weights that share a scale, all in one column.
const BLOCK: usize = 32;
/// Bytes of their codes.
const BLOCK_BYTES: usize = BLOCK / 2;
/// Columns that are decoded together, so that whole lines of the cache are written.
const COLUMNS: usize = 16;

/// Stacks of experts with powers of two as scales.
pub struct MxFp4;

pub static MXFP4: MxFp4 = MxFp4;

static INFO: Info = Info {
    name: "mxfp4:experts",
    short: None,
    container: "safetensors",
    exactness: Exactness::Exact,
    peer: "transformers 5.23",
    reader: "transformers, vLLM",
    bits_per_weight: 4.25,
    encodes: Encodes::Never,
};

impl Format for MxFp4 {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        params.refuse_choices(INFO.name, Some(BLOCK as u64))?;
        let &[ref outer @ .., rows, columns] = shape else {
            return Err(Error::format(format!(
                "{}: takes 2 dimensions or more, got shape {shape:?}",
                INFO.name
            )));
        };
        if !rows.is_multiple_of(BLOCK as u64) || columns == 0 {
            return Err(Error::format(format!(
                "{}: columns of {rows} weights are not a multiple of block_size {BLOCK} (shape {shape:?})",
                INFO.name
            )));
        }
        let blocks = rows / BLOCK as u64;
        let unit = shape::multiply(columns, BLOCK as u64, "weights of a row of blocks")?;
        let array = |suffix: &'static str, inner: &[u64], bytes: usize| Component {
            suffix: suffix.into(),
            naming: Naming::Joined,
            dtype: Dtype::U8,
            shape: [outer, &[columns, blocks], inner].concat(),
            span: Span::Blocks {
                weights: unit,
                bytes: columns.saturating_mul(bytes as u64),
            },
        };
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![
                array("blocks", &[BLOCK_BYTES as u64], BLOCK_BYTES),
                array("scales", &[], 1),
            ],
            unit_weights: unit,
            statistics: None,
        })
    }

    fn transposed_element(&self, _layout: &Layout, component: usize) -> Option<u64> {
        Some(if component == 0 {
            BLOCK_BYTES as u64
        } else {
            1
        })
    }

    fn decode(
        &self,
        layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let columns = shape::to_usize(shape::row_weights(&layout.shape))?.max(1);
        let [codes, scales, ..] = parts;
        let (codes, _) = codes.as_chunks::<BLOCK_BYTES>();
        let runs = codes
            .chunks_exact(columns)
            .zip(scales.chunks_exact(columns));
        for (weights, (codes, scales)) in weights.chunks_exact_mut(columns * BLOCK).zip(runs) {
            decode_run(columns, codes, scales, weights);
        }
        Ok(())
    }
}

/// Decodes 32 rows of `columns` weights, a block for each column.
fn decode_run(columns: usize, codes: &[[u8; BLOCK_BYTES]], scales: &[u8], weights: &mut [f32]) {
    let together = codes.chunks(COLUMNS).zip(scales.chunks(COLUMNS));
    for (place, (codes, scales)) in (0..).step_by(COLUMNS).zip(together) {
        let mut rows = [[0.0f32; COLUMNS]; BLOCK];
        for (column, (block, &scale)) in codes.iter().zip(scales).enumerate() {
            let scale = of_e8m0(scale);
            for (pair, &byte) in rows.as_chunks_mut::<2>().0.iter_mut().zip(block) {
                pair[0][column] = SIGNED_VALUES[usize::from(byte & 15)] * scale;
                pair[1][column] = SIGNED_VALUES[usize::from(byte >> 4)] * scale;
            }
        }
        for (row, found) in weights.chunks_exact_mut(columns).zip(&rows) {
            for (weight, found) in row.iter_mut().skip(place).zip(&found[..codes.len()]) {
                *weight = *found;
            }
        }
    }
}
