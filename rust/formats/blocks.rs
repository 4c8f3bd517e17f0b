//! Adapter from one typed block to a whole [`Format`](super::Format).

use std::marker::PhantomData;

use super::{Component, Format, Info, Layout, Params, Parts, PartsMut, Span};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::kernels::{self, Level};
use crate::shape;

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

    /// Encodes whole blocks: `weights.len() / WEIGHTS == blocks.len() / BYTES`. The bytes are the
    /// same at every level.
    fn encode(level: Level, weights: &[f32], blocks: &mut [u8]);

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
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![Component {
                suffix: "".into(),
                sibling: false,
                dtype: B::DTYPE,
                shape: shape.to_vec(),
                span: Span::Blocks {
                    weights: B::WEIGHTS as u64,
                    bytes: B::BYTES as u64,
                },
            }],
            unit_weights: B::WEIGHTS as u64,
            statistics: None,
        })
    }

    fn encode(
        &self,
        _layout: &Layout,
        _first: u64,
        weights: &[f32],
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        B::encode(kernels::level(), weights, parts[0]);
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
