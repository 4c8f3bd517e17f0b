//! GGML blocks of 32 weights, four vectors of eight. Scalar bodies and special cases: see
//! `crate::formats::ggml_basic`.

use std::arch::x86_64::*;

use super::{
    largest, load_32_bytes, load_block, load_bytes, magnitude, pack_signed, store_32_bytes,
    store_block, store_bytes, zero_nan,
};

/// First weight with the largest magnitude; +0 in a block of zeros.
#[inline]
#[target_feature(enable = "avx2")]
fn extreme(weights: &[f32; 32]) -> f32 {
    let vectors = load_block(weights).map(|weights| magnitude(weights));
    let [a, b, c, d] = vectors;
    let most = largest(_mm256_max_epu32(
        _mm256_max_epu32(a, b),
        _mm256_max_epu32(c, d),
    ));
    if most == 0 {
        return 0.0;
    }
    let most = _mm256_set1_epi32(most.cast_signed());
    let hits = vectors.map(|vector| _mm256_castsi256_ps(_mm256_cmpeq_epi32(vector, most)));
    weights[signs(hits).trailing_zeros() as usize & 31]
}

/// Sign bits of 32 numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn signs(vectors: [__m256; 4]) -> u32 {
    let [a, b, c, d] = vectors.map(|vector| _mm256_movemask_ps(vector).cast_unsigned());
    a | b << 8 | c << 16 | d << 24
}

/// Smallest and largest weight; of two zeros, the first one.
#[inline]
#[target_feature(enable = "avx2")]
fn range(weights: &[f32; 32]) -> (f32, f32) {
    let vectors = load_block(weights);
    let (mut low, mut high) = (_mm256_set1_ps(f32::MAX), _mm256_set1_ps(-f32::MAX));
    for vector in vectors {
        // The second operand stays where the comparison does not hold.
        low = _mm256_min_ps(vector, low);
        high = _mm256_max_ps(vector, high);
    }
    let low = _mm_min_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps::<1>(low));
    let high = _mm_max_ps(
        _mm256_castps256_ps128(high),
        _mm256_extractf128_ps::<1>(high),
    );
    let low = _mm_min_ps(low, _mm_movehl_ps(low, low));
    let high = _mm_max_ps(high, _mm_movehl_ps(high, high));
    let mut least = _mm_cvtss_f32(_mm_min_ss(low, _mm_movehdup_ps(low)));
    let mut most = _mm_cvtss_f32(_mm_max_ss(high, _mm_movehdup_ps(high)));
    if least == 0.0 {
        let zero = _mm256_setzero_ps();
        let zeros = vectors.map(|vector| _mm256_cmp_ps::<_CMP_EQ_OQ>(vector, zero));
        least = weights[signs(zeros).trailing_zeros() as usize & 31];
        if most == 0.0 {
            most = least;
        }
    }
    (least, most)
}

/// 1/d, or 0 where d is zero or 1/d is infinite.
#[inline]
fn reciprocal(d: f32) -> f32 {
    let reciprocal = 1.0 / d;
    if d == 0.0 || reciprocal.is_infinite() {
        0.0
    } else {
        reciprocal
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(super) fn half_bytes(value: f32) -> [u8; 2] {
    let half = _mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(value));
    (_mm_cvtsi128_si32(half) as u16).to_le_bytes()
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half_at(block: &[u8], at: usize) -> __m256 {
    let half = u16::from_le_bytes([block[at], block[at + 1]]);
    let value = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(half)));
    _mm256_broadcastss_ps(value)
}

/// min(limit, trunc((x − least)·scale + bias)) of 32 weights; NaN gives 0.
#[inline]
#[target_feature(enable = "avx2")]
fn codes(weights: &[f32; 32], least: f32, scale: f32, bias: f32, limit: i32) -> [__m256i; 4] {
    let (least, scale) = (_mm256_set1_ps(least), _mm256_set1_ps(scale));
    let (bias, most) = (_mm256_set1_ps(bias), _mm256_set1_ps(255.0));
    let limit = _mm256_set1_epi32(limit);
    load_block(weights).map(|weights| {
        let product = _mm256_mul_ps(_mm256_sub_ps(weights, least), scale);
        // The second operand stays where the comparison does not hold: NaN becomes a number that
        // is negative after conversion, and then zero.
        let value = _mm256_min_ps(most, _mm256_add_ps(product, bias));
        let code = _mm256_min_epi32(_mm256_cvttps_epi32(value), limit);
        _mm256_max_epi32(code, _mm256_setzero_si256())
    })
}

/// 32 codes, low four bits each, as split nibbles.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn split_nibbles([a, b, c, d]: [__m256i; 4]) -> __m128i {
    let mask = _mm256_set1_epi16(15);
    let low = _mm256_and_si256(_mm256_packus_epi32(a, b), mask);
    let high = _mm256_and_si256(_mm256_packus_epi32(c, d), mask);
    let bytes = _mm256_or_si256(low, _mm256_slli_epi16::<4>(high));
    // Packing works within halves: fours of codes of the lower halves come first.
    let bytes = _mm256_packus_epi16(bytes, bytes);
    _mm_unpacklo_epi32(
        _mm256_castsi256_si128(bytes),
        _mm256_extracti128_si256::<1>(bytes),
    )
}

/// Bit 4 of 32 codes.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bits(codes: [__m256i; 4]) -> [u8; 4] {
    signs(codes.map(|codes| _mm256_castsi256_ps(_mm256_slli_epi32::<27>(codes)))).to_le_bytes()
}

/// Split nibbles as 32 bytes, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn joined_nibbles(bytes: &[u8; 16]) -> __m256i {
    let bytes = load_bytes(bytes);
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// Bit i of `bits` as bit 4 of byte i.
#[inline]
#[target_feature(enable = "avx2")]
fn spread_bits(bits: [u8; 4]) -> __m256i {
    let bits = _mm256_set1_epi32(i32::from_le_bytes(bits));
    let source = _mm256_setr_epi64x(
        0,
        0x0101_0101_0101_0101,
        0x0202_0202_0202_0202,
        0x0303_0303_0303_0303,
    );
    let place = _mm256_set1_epi64x(0x8040_2010_0804_0201u64.cast_signed());
    let bytes = _mm256_and_si256(_mm256_shuffle_epi8(bits, source), place);
    _mm256_and_si256(_mm256_cmpeq_epi8(bytes, place), _mm256_set1_epi8(16))
}

/// 32 bytes as floats, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn bytes_to_float(bytes: __m256i) -> [__m256; 4] {
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
    .map(|bytes| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn put<const AT: usize, const LENGTH: usize, const BYTES: usize>(
    block: &mut [u8; BYTES],
    bytes: [u8; LENGTH],
) {
    block[AT..AT + LENGTH].copy_from_slice(&bytes);
}

#[inline]
#[target_feature(enable = "avx2")]
fn put_nibbles<const BYTES: usize>(block: &mut [u8; BYTES], codes: [__m256i; 4]) {
    if let Some(bytes) = block.last_chunk_mut() {
        store_bytes(split_nibbles(codes), bytes);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn nibbles_of<const BYTES: usize>(block: &[u8; BYTES]) -> __m256i {
    block
        .last_chunk()
        .map_or(_mm256_setzero_si256(), |bytes| joined_nibbles(bytes))
}

macro_rules! encode {
    ($name:ident, $bytes:literal, |$weights:ident, $block:ident| $body:block) => {
        #[target_feature(enable = "avx2,f16c")]
        pub(in super::super) fn $name(weights: &[f32], blocks: &mut [u8]) -> usize {
            let (blocks, _) = blocks.as_chunks_mut::<$bytes>();
            let (weights, _) = weights.as_chunks();
            for ($weights, $block) in weights.iter().zip(&mut *blocks) $body
            weights.len().min(blocks.len())
        }
    };
}

macro_rules! decode {
    ($name:ident, $bytes:literal, |$block:ident| $body:expr) => {
        #[target_feature(enable = "avx2,f16c")]
        pub(in super::super) fn $name(blocks: &[u8], weights: &mut [f32]) -> usize {
            let (weights, _) = weights.as_chunks_mut();
            let (blocks, _) = blocks.as_chunks::<$bytes>();
            for (weights, $block) in weights.iter_mut().zip(blocks) {
                store_block($body, weights);
            }
            weights.len().min(blocks.len())
        }
    };
}

encode!(encode_q4_0, 18, |weights, block| {
    let d = extreme(weights) / -8.0;
    put::<0, 2, _>(block, half_bytes(d));
    put_nibbles(block, codes(weights, 0.0, reciprocal(d), 8.5, 15));
});

decode!(decode_q4_0, 18, |block| {
    let (d, bias) = (half_at(block, 0), _mm256_set1_ps(8.0));
    bytes_to_float(nibbles_of(block)).map(|code| _mm256_mul_ps(_mm256_sub_ps(code, bias), d))
});

encode!(encode_q4_1, 20, |weights, block| {
    let (least, most) = range(weights);
    let d = (most - least) / 15.0;
    put::<0, 2, _>(block, half_bytes(d));
    put::<2, 2, _>(block, half_bytes(least));
    put_nibbles(block, codes(weights, least, reciprocal(d), 0.5, 15));
});

decode!(decode_q4_1, 20, |block| {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    bytes_to_float(nibbles_of(block)).map(|code| _mm256_add_ps(_mm256_mul_ps(code, d), m))
});

encode!(encode_q5_0, 22, |weights, block| {
    let d = extreme(weights) / -16.0;
    let codes = codes(weights, 0.0, reciprocal(d), 16.5, 31);
    put::<0, 2, _>(block, half_bytes(d));
    put::<2, 4, _>(block, fifth_bits(codes));
    put_nibbles(block, codes);
});

decode!(decode_q5_0, 22, |block| {
    let (d, bias) = (half_at(block, 0), _mm256_set1_ps(16.0));
    let high = spread_bits([block[2], block[3], block[4], block[5]]);
    let codes = _mm256_or_si256(nibbles_of(block), high);
    bytes_to_float(codes).map(|code| _mm256_mul_ps(_mm256_sub_ps(code, bias), d))
});

encode!(encode_q5_1, 24, |weights, block| {
    let (least, most) = range(weights);
    let d = (most - least) / 31.0;
    let codes = codes(weights, least, reciprocal(d), 0.5, 31);
    put::<0, 2, _>(block, half_bytes(d));
    put::<2, 2, _>(block, half_bytes(least));
    put::<4, 4, _>(block, fifth_bits(codes));
    put_nibbles(block, codes);
});

decode!(decode_q5_1, 24, |block| {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = spread_bits([block[4], block[5], block[6], block[7]]);
    let codes = _mm256_or_si256(nibbles_of(block), high);
    bytes_to_float(codes).map(|code| _mm256_add_ps(_mm256_mul_ps(code, d), m))
});

encode!(encode_q8_0, 34, |weights, block| {
    let [a, b, c, d] = load_block(weights).map(|weights| magnitude(weights));
    let most = _mm256_max_epu32(_mm256_max_epu32(a, b), _mm256_max_epu32(c, d));
    let d = f32::from_bits(largest(most)) / 127.0;
    put::<0, 2, _>(block, half_bytes(d));
    let scale = _mm256_set1_ps(reciprocal(d));
    let sign = _mm256_set1_ps(-0.0);
    // Adding the number below one half and truncating takes ties, and nothing less, away from zero.
    let below_half = _mm256_set1_ps(0.5f32.next_down());
    let rounded = load_block(weights).map(|weights| {
        let value = zero_nan(_mm256_mul_ps(weights, scale));
        let nudge = _mm256_or_ps(below_half, _mm256_and_ps(value, sign));
        _mm256_cvttps_epi32(_mm256_add_ps(value, nudge))
    });
    if let Some(bytes) = block.last_chunk_mut() {
        store_32_bytes(pack_signed(rounded), bytes);
    }
});

decode!(decode_q8_0, 34, |block| {
    let d = half_at(block, 0);
    let codes = block
        .last_chunk()
        .map_or(_mm256_setzero_si256(), |bytes| load_32_bytes(bytes));
    let (low, high) = (
        _mm256_castsi256_si128(codes),
        _mm256_extracti128_si256::<1>(codes),
    );
    [
        low,
        _mm_unpackhi_epi64(low, low),
        high,
        _mm_unpackhi_epi64(high, high),
    ]
    .map(|codes| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)), d))
});
