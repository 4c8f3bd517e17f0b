//! What the versions for GGML blocks share: the loops over blocks, fields of a block, and codes that
//! become floats.

use std::arch::x86_64::*;

/// Defines a function that decodes whole blocks and gives their number. The arguments in front are
/// tables of the format.
macro_rules! decode_blocks {
    ($name:ident($($table:ident: $type:ty),*), $bytes:literal to $count:literal,
     |$block:ident, $weights:ident| $body:block) => {
        #[target_feature(enable = "avx2,f16c")]
        pub(in crate::kernels) fn $name($($table: $type,)* blocks: &[u8], weights: &mut [f32]) -> usize {
            let (weights, _) = weights.as_chunks_mut::<$count>();
            let (blocks, _) = blocks.as_chunks::<$bytes>();
            for ($weights, $block) in weights.iter_mut().zip(blocks) $body
            weights.len().min(blocks.len())
        }
    };
}

/// Defines a function that encodes whole blocks and gives their number.
macro_rules! encode_blocks {
    ($name:ident, $count:literal to $bytes:literal, |$weights:ident, $block:ident| $body:block) => {
        #[target_feature(enable = "avx2,f16c")]
        pub(in crate::kernels) fn $name(weights: &[f32], blocks: &mut [u8]) -> usize {
            let (weights, _) = weights.as_chunks::<$count>();
            let (blocks, _) = blocks.as_chunks_mut::<$bytes>();
            for ($weights, $block) in weights.iter().zip(&mut *blocks) $body
            weights.len().min(blocks.len())
        }
    };
}

pub(super) use {decode_blocks, encode_blocks};

/// The f16 at byte `AT`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn half<const AT: usize, const BYTES: usize>(block: &[u8; BYTES]) -> f32 {
    let bits = u16::from_le_bytes([block[AT], block[AT + 1]]);
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

/// The bytes from `AT` on.
#[inline]
pub(super) fn field<const AT: usize, const LENGTH: usize, const BYTES: usize>(
    block: &[u8; BYTES],
) -> &[u8; LENGTH] {
    const { assert!(AT + LENGTH <= BYTES) };
    // The range was checked when this was compiled.
    block[AT..].first_chunk().unwrap_or(&[0; LENGTH])
}

/// Eight bytes as unsigned numbers.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn widen_8(bytes: &[u8; 8]) -> __m256i {
    _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes)))
}

/// 32 unsigned bytes as four vectors of numbers, in order.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn widen_32(bytes: __m256i) -> [__m256i; 4] {
    quarters(bytes).map(|bytes| _mm256_cvtepu8_epi32(bytes))
}

/// 32 signed bytes as four vectors of floats, in order.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn signed_to_floats(bytes: __m256i) -> [__m256; 4] {
    quarters(bytes).map(|bytes| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)))
}

/// 32 unsigned bytes as four vectors of floats, in order.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn unsigned_to_floats(bytes: __m256i) -> [__m256; 4] {
    widen_32(bytes).map(|numbers| _mm256_cvtepi32_ps(numbers))
}

/// Runs of eight bytes at the front of each vector.
#[inline]
#[target_feature(enable = "avx2")]
fn quarters(bytes: __m256i) -> [__m128i; 4] {
    let (low, high) = (
        _mm256_castsi256_si128(bytes),
        _mm256_extracti128_si256::<1>(bytes),
    );
    [
        low,
        _mm_unpackhi_epi64(low, low),
        high,
        _mm_unpackhi_epi64(high, high),
    ]
}

/// Low and high four bits of 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn nibbles(bytes: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    [
        _mm256_and_si256(bytes, mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask),
    ]
}

/// 32 numbers below 256 in order as bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn pack_unsigned([a, b, c, d]: [__m256i; 4]) -> __m256i {
    let packed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
    // Packing works within halves: fours of bytes of the lower halves come first.
    _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}
