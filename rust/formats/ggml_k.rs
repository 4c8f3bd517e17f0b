//! GGML's K types: blocks of 256 weights in sub-blocks of 16 or 32, whose scales are small integers.
//!
//! A row is a whole number of blocks. f16 is IEEE half, little-endian; i is a weight's place in the
//! block. Codes are stored in planes, each of which holds some bits of every code:
//!
//! - *pairs*, 64 bytes: byte 32h + l holds two bits of the codes 128h + 32j + l, at bit 2j.
//! - *bits*, 32 bytes: byte l holds one bit of the codes 32j + l, at bit j.
//! - *nibbles* over n, 128 bytes: n/2 bytes hold n codes, byte j code j in its low and code j + n/2 in
//!   its high four bits; then the next n.
//!
//! | type | bytes | fields at | sub-block | decodes to |
//! |---|---|---|---|---|
//! | Q2_K | 84 | scale (low nibble) and min (high) of each sub-block @0, pairs @16, d f16 @80, dmin f16 @82 | 16 | (d·scale)·q − dmin·min |
//! | Q3_K | 110 | bits of bit 2 @0, pairs of bits 0-1 @32, scales @96, d f16 @108 | 16 | (d·(scale − 32))·(q − 4) |
//! | Q4_K | 144 | d f16 @0, dmin f16 @2, scales and mins @4, nibbles over 64 @16 | 32 | (d·scale)·q − dmin·min |
//! | Q5_K | 176 | d f16 @0, dmin f16 @2, scales and mins @4, bits of bit 4 @16, nibbles over 64 @48 | 32 | (d·scale)·q − dmin·min |
//! | Q6_K | 210 | nibbles over 128 @0, pairs of bits 4-5 @128, scales i8 @192, d f16 @208 | 16 | (d·scale)·(q − 32) |
//!
//! Sixteen scales of six bits (Q3_K, 12 bytes): bits 0-3 of scale k are a nibble of byte k mod 8, the
//! high one from k = 8; bits 4-5 are in byte 8 + k mod 4, at bit 2·(k / 4). Eight scales and mins of six
//! bits (Q4_K, Q5_K, 12 bytes): those of sub-blocks 0-3 are bits 0-5 of the bytes k and k + 4; of the
//! others, byte k + 4 has bits 0-3 (scale low, min high), and bits 4-5 are the top of the bytes k − 4
//! (scale) and k (min).
//!
//! Decoding rounds each product, and the difference, to `f32`. Encoding searches each sub-block for a
//! scale and a min (see [`super::ggml_search`] and [`super::ggml_k_encode`]), rounds these to integers,
//! and then chooses every code anew for the rounded ones.
//!
//! Special cases:
//! - A sub-block whose rounded scale is zero keeps the codes of the search. Where all its weights are
//!   zero, these are 0, also in Q3_K and Q6_K, where 0 is not the code of zero.
//! - A block of zeros is all zero bytes, except that Q3_K's d is 0 and its scales are 0 (which mean −32).
//! - Scales so small that their reciprocal is infinite round to zero, as the peer's arithmetic on the
//!   bits of infinity has it. Nothing here is left undefined by the peer.
//! - Weights that are not finite are refused by the caller. Where squares of weights are beyond the
//!   `f32` range, d may be stored as infinity or NaN, as the peer does.
//!
//! With importance, the weights of a search are importance·√(σ² + x²), σ² being the mean square of the
//! block (Q2_K) or twice that (Q3_K, Q4_K, Q5_K); in Q6_K they are the importance itself.
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`quantize_row_q*_K_ref`, `quantize_row_q*_K_impl`,
//! `dequantize_row_q*_K`), built for x86-64 without fused multiply-add.

use super::blocks::{half_at, Block, Blocks, Weighing, GGML};
use super::ggml_k_encode;
use super::Info;
use crate::dtype::Dtype;
use crate::kernels::{self, Level};

/// Weights per block.
pub(super) const WEIGHTS: usize = 256;

/// 256 codes of 2 bits above minimums.
pub struct Q2K;
/// 256 codes of 3 bits, symmetric.
pub struct Q3K;
/// 256 codes of 4 bits above minimums.
pub struct Q4K;
/// 256 codes of 5 bits above minimums.
pub struct Q5K;
/// 256 codes of 6 bits, symmetric.
pub struct Q6K;

pub static Q2_K_FORMAT: Blocks<Q2K> = Blocks::new();
pub static Q3_K_FORMAT: Blocks<Q3K> = Blocks::new();
pub static Q4_K_FORMAT: Blocks<Q4K> = Blocks::new();
pub static Q5_K_FORMAT: Blocks<Q5K> = Blocks::new();
pub static Q6_K_FORMAT: Blocks<Q6K> = Blocks::new();

const fn info(name: &'static str, short: &'static str, bytes: usize) -> Info {
    Info {
        name,
        short: Some(short),
        reader: "llama.cpp, gguf-py, diffusers, transformers",
        bits_per_weight: 8.0 * bytes as f64 / WEIGHTS as f64,
        ..GGML
    }
}

/// The [`Block`] of one type: its row, its bytes, and the bodies of its functions.
macro_rules! block {
    ($type:ident, $dtype:ident, $name:literal, $short:literal, $bytes:literal, $encode:ident<$($size:literal),*>,
     $fast:ident or |$block:ident, $weights:ident| $decode:block) => {
        impl Block for $type {
            const INFO: Info = info($name, $short, $bytes);
            const DTYPE: Dtype = Dtype::$dtype;
            const WEIGHTS: usize = WEIGHTS;
            const BYTES: usize = $bytes;
            const WEIGHING: Weighing = Weighing::ByBlock;

            fn encode(level: Level, weights: &[f32], blocks: &mut [u8]) {
                ggml_k_encode::$encode::<Self, $($size),*>(level, weights, None, blocks);
            }

            fn encode_weighted(
                level: Level,
                weights: &[f32],
                importance: &[f32],
                blocks: &mut [u8],
            ) {
                ggml_k_encode::$encode::<Self, $($size),*>(level, weights, Some(importance), blocks);
            }

            fn decode(level: Level, blocks: &[u8], weights: &mut [f32]) {
                let done = kernels::$fast(level, blocks, weights);
                let blocks = blocks.as_chunks::<$bytes>().0;
                for ($block, $weights) in blocks.iter().zip(weights.as_chunks_mut().0).skip(done) $decode
            }
        }
    };
}

block!(Q2K, Q2_K, "gguf:q2_k", "q2_k", 84, encode_affine<16, 16, 84>, decode_q2_k or |block, weights| {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    let codes = codes_of(|codes| add_pairs(&block[16..80], 0, codes));
    for (k, weights, codes) in sub_blocks::<16>(weights, &codes) {
        let scale = d * f32::from(block[k] & 15);
        let min = dmin * f32::from(block[k] >> 4);
        for (weight, &code) in weights.iter_mut().zip(codes) {
            *weight = scale * f32::from(code) - min;
        }
    }
});

block!(
    Q3K,
    Q3_K,
    "gguf:q3_k",
    "q3_k",
    110,
    encode_symmetric<110>,
    decode_q3_k or |block, weights| {
        let d = half_at(block, 108);
        let scales = six_bits_of_16(&block[96..108]);
        let codes = codes_of(|codes| {
            add_pairs(&block[32..96], 0, codes);
            add_bits(&block[..32], 2, codes);
        });
        for (k, weights, codes) in sub_blocks::<16>(weights, &codes) {
            let scale = d * (f32::from(scales[k]) - 32.0);
            for (weight, &code) in weights.iter_mut().zip(codes) {
                *weight = scale * (f32::from(code) - 4.0);
            }
        }
    }
);

block!(Q4K, Q4_K, "gguf:q4_k", "q4_k", 144, encode_affine<8, 32, 144>, decode_q4_k or |block, weights| {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, mins) = six_bits_of_8(&block[4..16]);
    let codes = codes_of(|codes| add_nibbles::<64>(&block[16..], codes));
    for (k, weights, codes) in sub_blocks::<32>(weights, &codes) {
        let (scale, min) = (d * f32::from(scales[k]), dmin * f32::from(mins[k]));
        for (weight, &code) in weights.iter_mut().zip(codes) {
            *weight = scale * f32::from(code) - min;
        }
    }
});

block!(Q5K, Q5_K, "gguf:q5_k", "q5_k", 176, encode_affine<8, 32, 176>, decode_q5_k or |block, weights| {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, mins) = six_bits_of_8(&block[4..16]);
    let codes = codes_of(|codes| {
        add_nibbles::<64>(&block[48..], codes);
        add_bits(&block[16..48], 4, codes);
    });
    for (k, weights, codes) in sub_blocks::<32>(weights, &codes) {
        let (scale, min) = (d * f32::from(scales[k]), dmin * f32::from(mins[k]));
        for (weight, &code) in weights.iter_mut().zip(codes) {
            *weight = scale * f32::from(code) - min;
        }
    }
});

block!(
    Q6K,
    Q6_K,
    "gguf:q6_k",
    "q6_k",
    210,
    encode_symmetric<210>,
    decode_q6_k or |block, weights| {
        let d = half_at(block, 208);
        let codes = codes_of(|codes| {
            add_nibbles::<128>(&block[..128], codes);
            add_pairs(&block[128..192], 4, codes);
        });
        for (k, weights, codes) in sub_blocks::<16>(weights, &codes) {
            let scale = d * f32::from(block[192 + k].cast_signed());
            for (weight, &code) in weights.iter_mut().zip(codes) {
                *weight = scale * (f32::from(code) - 32.0);
            }
        }
    }
);

/// Number, weights and codes of each sub-block of `N`.
fn sub_blocks<'a, const N: usize>(
    weights: &'a mut [f32; WEIGHTS],
    codes: &'a [u8; WEIGHTS],
) -> impl Iterator<Item = (usize, &'a mut [f32; N], &'a [u8; N])> {
    let both = weights
        .as_chunks_mut()
        .0
        .iter_mut()
        .zip(codes.as_chunks().0);
    both.enumerate()
        .map(|(k, (weights, codes))| (k, weights, codes))
}

// ---- planes of codes

/// 256 codes, their planes added up by `add`.
fn codes_of(add: impl FnOnce(&mut [u8; WEIGHTS])) -> [u8; WEIGHTS] {
    let mut codes = [0; WEIGHTS];
    add(&mut codes);
    codes
}

/// Adds a plane of pairs at bit `shift`.
fn add_pairs(bytes: &[u8], shift: u32, codes: &mut [u8; WEIGHTS]) {
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (j, codes) in (0u32..).zip(codes.chunks_exact_mut(32)) {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code |= (byte >> (2 * j) & 3) << shift;
            }
        }
    }
}

/// Writes a plane of pairs: the bits `shift` and `shift + 1`.
pub(super) fn put_pairs(bytes: &mut [u8], shift: u32, codes: &[u8; WEIGHTS]) {
    for (bytes, codes) in bytes.chunks_exact_mut(32).zip(codes.as_chunks::<128>().0) {
        for (l, byte) in bytes.iter_mut().enumerate() {
            let pair = |j: usize| codes[32 * j + l] >> shift & 3;
            *byte = pair(0) | pair(1) << 2 | pair(2) << 4 | pair(3) << 6;
        }
    }
}

/// Adds a plane of bits at bit `shift`.
fn add_bits(bytes: &[u8], shift: u32, codes: &mut [u8; WEIGHTS]) {
    for (j, codes) in (0u32..).zip(codes.chunks_exact_mut(32)) {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code |= (byte >> j & 1) << shift;
        }
    }
}

/// Writes a plane of bits: bit `shift`.
pub(super) fn put_bits(bytes: &mut [u8], shift: u32, codes: &[u8; WEIGHTS]) {
    bytes.fill(0);
    for (j, codes) in (0u32..).zip(codes.chunks_exact(32)) {
        for (code, byte) in codes.iter().zip(&mut *bytes) {
            *byte |= (code >> shift & 1) << j;
        }
    }
}

/// Adds a plane of nibbles over `N`.
fn add_nibbles<const N: usize>(bytes: &[u8], codes: &mut [u8; WEIGHTS]) {
    for (bytes, codes) in bytes.chunks_exact(N / 2).zip(codes.chunks_exact_mut(N)) {
        let (low, high) = codes.split_at_mut(N / 2);
        for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
            *low |= byte & 15;
            *high |= byte >> 4;
        }
    }
}

/// Writes a plane of nibbles over `N`: the bits 0-3.
pub(super) fn put_nibbles<const N: usize>(bytes: &mut [u8], codes: &[u8; WEIGHTS]) {
    for (bytes, codes) in bytes.chunks_exact_mut(N / 2).zip(codes.chunks_exact(N)) {
        let (low, high) = codes.split_at(N / 2);
        for ((low, high), byte) in low.iter().zip(high).zip(bytes) {
            *byte = low & 15 | high << 4;
        }
    }
}

// ---- scales of six bits

/// Sixteen scales from 12 bytes.
pub(super) fn six_bits_of_16(bytes: &[u8]) -> [u8; 16] {
    std::array::from_fn(|k| {
        let low = bytes[k % 8] >> (4 * (k / 8)) & 15;
        low | (bytes[8 + k % 4] >> (2 * (k / 4)) & 3) << 4
    })
}

pub(super) fn put_six_bits_of_16(bytes: &mut [u8], scales: &[u8; 16]) {
    bytes.fill(0);
    for (k, scale) in scales.iter().enumerate() {
        bytes[k % 8] |= (scale & 15) << (4 * (k / 8));
        bytes[8 + k % 4] |= scale >> 4 << (2 * (k / 4));
    }
}

/// Eight scales and eight mins from 12 bytes.
pub(super) fn six_bits_of_8(bytes: &[u8]) -> ([u8; 8], [u8; 8]) {
    let pair = |k: usize| match k {
        0..4 => (bytes[k] & 63, bytes[k + 4] & 63),
        _ => (
            bytes[k + 4] & 15 | bytes[k - 4] >> 6 << 4,
            bytes[k + 4] >> 4 | bytes[k] >> 6 << 4,
        ),
    };
    (
        std::array::from_fn(|k| pair(k).0),
        std::array::from_fn(|k| pair(k).1),
    )
}

/// A number beyond six bits (of a negative scale, in a hopeless fit) runs into its neighbour's bits, as
/// the peer's does.
pub(super) fn put_six_bits_of_8(bytes: &mut [u8], scales: &[u8], mins: &[u8]) {
    for (k, (scale, min)) in scales.iter().zip(mins).enumerate() {
        if k < 4 {
            bytes[k] = *scale;
            bytes[k + 4] = *min;
        } else {
            bytes[k + 4] = scale & 15 | min << 4;
            bytes[k - 4] |= scale >> 4 << 6;
            bytes[k] |= min >> 4 << 6;
        }
    }
}
