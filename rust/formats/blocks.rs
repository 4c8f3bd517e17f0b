//! Adapter from one typed block to a whole [`Format`](super::Format).

use std::marker::PhantomData;

use half::f16;

use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::kernels::{self, Level};
use crate::shape;

/// What an importance vector does to a block type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighing {
    /// Nothing: the bytes are the same.
    Ignored,
    /// It changes the search in each block by itself.
    ByBlock,
    /// It changes the search, which also looks at the whole row.
    ByRow,
}

/// What the rows of ggml's types have in common.
pub const GGML: Info = Info {
    name: "",
    short: None,
    container: "gguf",
    exactness: Exactness::Exact,
    peer: "ggml 0.25.3",
    reader: "llama.cpp",
    bits_per_weight: 0.0,
    encodes: Encodes::Always,
};

/// A numeric layout whose blocks stand alone: `WEIGHTS` weights in, `BYTES` bytes out.
pub trait Block: Sync + Send + 'static {
    /// The row of the format table.
    const INFO: Info;
    /// Storage type of the one component.
    const DTYPE: Dtype;
    /// Weights per block.
    const WEIGHTS: usize;
    /// Bytes per block.
    const BYTES: usize;

    /// What an importance vector does.
    const WEIGHING: Weighing = Weighing::Ignored;

    /// Encodes whole blocks: `weights.len() / WEIGHTS == blocks.len() / BYTES`. The bytes are the
    /// same at every level. Types that are never written keep this body, which
    /// [`Format::check_encodes`] keeps from being reached.
    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
        let _ = (level, weights);
        blocks.fill(0);
    }

    /// As [`Block::encode`], with the importance of each weight. The blocks are neighbours in one
    /// row; with [`Weighing::ByRow`] they are the row.
    fn encode_weighted(level: Level, weights: &[f32], importance: &[f32], blocks: &mut [u8]) {
        let _ = importance;
        Self::encode(level, weights, blocks);
    }

    /// Decodes whole blocks.
    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]);
}

/// A [`Block`] as a format.
pub struct Blocks<B>(PhantomData<fn() -> B>);

impl<B> Blocks<B> {
    /// The adapter; it holds nothing.
    pub const fn new() -> Self {
        Blocks(PhantomData)
    }
}

impl<B: Block> Format for Blocks<B> {
    fn info(&self) -> &'static Info {
        &B::INFO
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        B::DTYPE.byte_len(shape)?;
        params.refuse_choices(B::INFO.name, Some(B::WEIGHTS as u64))?;
        if let Some(importance) = &params.importance {
            importance.check(B::INFO.name, shape)?;
        }
        let row_weights = shape.last().copied().unwrap_or(1).max(1);
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![Component {
                suffix: "".into(),
                naming: Naming::Appended,
                dtype: B::DTYPE,
                shape: shape.to_vec(),
                span: Span::Blocks {
                    weights: B::WEIGHTS as u64,
                    bytes: B::BYTES as u64,
                },
            }],
            unit_weights: match (&params.importance, B::WEIGHING) {
                (Some(_), Weighing::ByRow) => row_weights,
                _ => B::WEIGHTS as u64,
            },
            statistics: None,
        })
    }

    fn weighs(&self) -> bool {
        B::WEIGHING != Weighing::Ignored
    }

    fn encode(
        &self,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let weights = weights.floats()?;
        let importance = match &layout.params.importance {
            Some(importance) if B::WEIGHING != Weighing::Ignored => importance,
            _ => {
                B::encode(kernels::level(), weights, parts[0]);
                return Ok(());
            }
        };
        // A tile may hold the end of one row and the beginning of the next.
        let row_weights = layout.shape.last().copied().unwrap_or(1).max(1);
        let (mut first, mut weights, mut blocks) = (first, weights, &mut *parts[0]);
        while !weights.is_empty() {
            let left = shape::to_usize(row_weights - first % row_weights)?;
            let (here, later) = weights.split_at(left.min(weights.len()));
            let (packed, rest) = blocks.split_at_mut(here.len() / B::WEIGHTS * B::BYTES);
            let importance = importance.of_row(&layout.shape, first, here.len())?;
            B::encode_weighted(kernels::level(), here, importance, packed);
            (first, weights, blocks) = (first + here.len() as u64, later, rest);
        }
        Ok(())
    }

    fn decode(
        &self,
        _layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        B::decode(kernels::level(), parts[0], weights);
        Ok(())
    }
}

/// Encodes all blocks but the first `done`.
pub(super) fn for_each_encoded<const WEIGHTS: usize, const BYTES: usize>(
    done: usize,
    weights: &[f32],
    blocks: &mut [u8],
    encode: impl Fn(&[f32; WEIGHTS], &mut [u8; BYTES]),
) {
    for (weights, block) in weights
        .as_chunks()
        .0
        .iter()
        .zip(blocks.as_chunks_mut().0)
        .skip(done)
    {
        encode(weights, block);
    }
}

/// Decodes all blocks but the first `done`.
pub(super) fn for_each_decoded<const WEIGHTS: usize, const BYTES: usize>(
    done: usize,
    blocks: &[u8],
    weights: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; WEIGHTS]),
) {
    for (block, weights) in blocks
        .as_chunks()
        .0
        .iter()
        .zip(weights.as_chunks_mut().0)
        .skip(done)
    {
        decode(block, weights);
    }
}

/// Writes the f16 nearest to `value` at byte `at`.
pub(super) fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

/// The f16 at byte `at`.
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 16-bit number at byte `at`.
pub(super) fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// The 32-bit number at byte `at`.
pub(super) fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}
