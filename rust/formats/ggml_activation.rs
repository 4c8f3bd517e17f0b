//! GGML's types for activations: 8-bit codes with sums beside them, which speed up products. They are
//! not meant for files; a file that has them is decoded.
//!
//! | type | weights | bytes | fields at | decodes to |
//! |---|---|---|---|---|
//! | Q8_1 | 32 | 36 | d f16 @0, s f16 @2 (d times the sum of the codes), 32 signed bytes @4 | q·d |
//! | Q8_K | 256 | 292 | d f32 @0, 256 signed bytes @4, 16 sums i16 @260 | d·q |
//!
//! All fields are little-endian. The sums are not looked at. Every byte pattern decodes.
//!
//! Source: ggml 0.25.3, `ggml-common.h`, `ggml-quants.c` (`dequantize_row_q8_K`; it has no function
//! that decodes Q8_1).

use super::blocks::{for_each_decoded, half_at, u32_at, Block, Blocks, GGML};
use super::{Encodes, Info};
use crate::dtype::Dtype;
use crate::kernels::{self, Level};

/// 32 codes of 8 bits and their sum.
pub struct Q8_1;
/// 256 codes of 8 bits and 16 sums.
pub struct Q8K;

pub static Q8_1_FORMAT: Blocks<Q8_1> = Blocks::new();
pub static Q8_K_FORMAT: Blocks<Q8K> = Blocks::new();

const fn info(name: &'static str, short: &'static str, bits_per_weight: f64) -> Info {
    Info {
        name,
        short: Some(short),
        bits_per_weight,
        encodes: Encodes::Never,
        ..GGML
    }
}

impl Block for Q8_1 {
    const INFO: Info = info("gguf:q8_1", "q8_1", 9.0);
    const DTYPE: Dtype = Dtype::Q8_1;
    const WEIGHTS: usize = 32;
    const BYTES: usize = 36;

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q8_1(level, blocks, weights);
        for_each_decoded::<32, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            put_weights(half_at(block, 0), &block[4..], weights);
        });
    }
}

impl Block for Q8K {
    const INFO: Info = info("gguf:q8_k", "q8_k", 9.125);
    const DTYPE: Dtype = Dtype::Q8_K;
    const WEIGHTS: usize = 256;
    const BYTES: usize = 292;

    fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
        let done = kernels::decode_q8_k(level, blocks, weights);
        for_each_decoded::<256, { Self::BYTES }>(done, blocks, weights, |block, weights| {
            put_weights(f32::from_bits(u32_at(block, 0)), &block[4..], weights);
        });
    }
}

fn put_weights(d: f32, codes: &[u8], weights: &mut [f32]) {
    for (weight, code) in weights.iter_mut().zip(codes) {
        *weight = f32::from(code.cast_signed()) * d;
    }
}
