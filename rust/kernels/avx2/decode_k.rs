//! Decoding of GGML's K types. Scalar bodies: see `crate::formats::ggml_k`.
//!
//! Where a code has two or three bits, the weights of a sub-block that it may stand for are a table in
//! a register, and codes look them up; lookups take the low bits of a lane, whatever is above.

use std::arch::x86_64::*;

use super::blocks::{
    decode_blocks, field, half, nibbles, signed_to_floats, unsigned_to_floats, widen_32, widen_8,
};
use super::{load_32_bytes, load_bytes, store};

/// Sixteen unsigned bytes times `d`.
#[inline]
#[target_feature(enable = "avx2")]
fn times_16(d: f32, bytes: __m128i) -> [f32; 16] {
    let mut products = [0.0; 16];
    let halves = [bytes, _mm_unpackhi_epi64(bytes, bytes)];
    for (products, bytes) in products.as_chunks_mut().0.iter_mut().zip(halves) {
        let numbers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
        store(_mm256_mul_ps(_mm256_set1_ps(d), numbers), products);
    }
    products
}

/// Eight numbers, the low bytes of `bytes`, times `d`.
#[inline]
#[target_feature(enable = "avx2")]
fn times_8(d: f32, bytes: u64) -> [f32; 8] {
    let mut products = [0.0; 8];
    let numbers = _mm256_cvtepi32_ps(widen_8(&bytes.to_le_bytes()));
    store(_mm256_mul_ps(_mm256_set1_ps(d), numbers), &mut products);
    products
}

/// Eight scales and mins of six bits, a byte each.
#[inline]
fn six_bits_of_8(bytes: &[u8; 12]) -> (u64, u64) {
    let word = |at: usize| {
        u64::from(u32::from_le_bytes([
            bytes[at],
            bytes[at + 1],
            bytes[at + 2],
            bytes[at + 3],
        ]))
    };
    let (a, b, c) = (word(0), word(4), word(8));
    let low_six = 0x3f3f_3f3f;
    let top_two = |word: u64| (word >> 6 & 0x0303_0303) << 4;
    let scales = a & low_six | (c & 0x0f0f_0f0f | top_two(a)) << 32;
    let mins = b & low_six | (c >> 4 & 0x0f0f_0f0f | top_two(b)) << 32;
    (scales, mins)
}

/// Two bits of 32 bytes, from bit `2·j`.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs(bytes: __m256i, j: usize) -> __m256i {
    let shifted = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(2 * j as i32));
    _mm256_and_si256(shifted, _mm256_set1_epi8(3))
}

/// `value` in each of 32 bytes that has bit `bit`, 0 in the others.
#[inline]
#[target_feature(enable = "avx2")]
fn where_bit(bytes: __m256i, bit: usize, value: i8) -> __m256i {
    let mask = _mm256_set1_epi8((1u8 << bit).cast_signed());
    let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
    _mm256_and_si256(is_set, _mm256_set1_epi8(value))
}

/// scale·number of 32 signed codes, the scale of each 16 of them.
#[inline]
#[target_feature(enable = "avx2")]
fn put_scaled(codes: __m256i, scales: &[f32; 2], weights: &mut [f32; 32]) {
    let vectors = weights.as_chunks_mut().0.iter_mut();
    for ((weights, code), index) in vectors.zip(signed_to_floats(codes)).zip([0, 0, 1, 1]) {
        store(_mm256_mul_ps(_mm256_set1_ps(scales[index]), code), weights);
    }
}

/// scale·number − min of 32 unsigned codes.
#[inline]
#[target_feature(enable = "avx2")]
fn put_affine(codes: __m256i, scale: f32, min: f32, weights: &mut [f32; 32]) {
    let (scale, min) = (_mm256_set1_ps(scale), _mm256_set1_ps(min));
    for (weights, code) in weights
        .as_chunks_mut()
        .0
        .iter_mut()
        .zip(unsigned_to_floats(codes))
    {
        store(_mm256_sub_ps(_mm256_mul_ps(scale, code), min), weights);
    }
}

decode_blocks!(decode_q2_k(), 84 to 256, |block, weights| {
    let packed = load_bytes(field::<0, 16, 84>(block));
    let low = _mm_set1_epi8(15);
    let scales = times_16(half::<80, 84>(block), _mm_and_si128(packed, low));
    let mins = times_16(
        half::<82, 84>(block),
        _mm_and_si128(_mm_srli_epi16::<4>(packed), low),
    );
    let codes = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 3.0);
    let (scales, mins) = (scales.as_chunks::<8>().0, mins.as_chunks::<8>().0);
    let halves = weights.as_chunks_mut::<128>().0.iter_mut();
    let bytes = field::<16, 64, 84>(block).as_chunks::<32>().0;
    for (((weights, bytes), scales), mins) in halves.zip(bytes).zip(scales).zip(mins) {
        for (part, bytes) in bytes.as_chunks::<16>().0.iter().enumerate() {
            let tables: [__m256; 4] = std::array::from_fn(|j| {
                let k = 2 * j + part;
                let product = _mm256_mul_ps(_mm256_set1_ps(scales[k]), codes);
                _mm256_sub_ps(product, _mm256_set1_ps(mins[k]))
            });
            for (run, bytes) in bytes.as_chunks::<8>().0.iter().enumerate() {
                let [mut codes, first] = [widen_8(bytes); 2];
                for (j, table) in tables.into_iter().enumerate() {
                    if j > 0 {
                        codes = _mm256_srl_epi32(first, _mm_cvtsi32_si128(2 * j as i32));
                    }
                    let value = _mm256_permutevar_ps(table, codes);
                    let group = &mut weights.as_chunks_mut::<32>().0[j];
                    store(value, &mut group.as_chunks_mut().0[2 * part + run]);
                }
            }
        }
    }
});

decode_blocks!(decode_q3_k(), 110 to 256, |block, weights| {
    let d = half::<108, 110>(block);
    let bytes = field::<96, 12, 110>(block);
    // Bits 0-3 of the scales are nibbles of the first eight bytes, bits 4-5 pairs of the last four.
    let low = _mm_cvtsi64_si128(i64::from_le_bytes(*field::<0, 8, 12>(bytes)));
    let low = _mm_unpacklo_epi64(low, _mm_srli_epi16::<4>(low));
    let high = _mm_set1_epi32(i32::from_le_bytes(*field::<8, 4, 12>(bytes)));
    let high = _mm_srlv_epi32(high, _mm_setr_epi32(0, 2, 4, 6));
    let high = _mm_slli_epi16::<4>(_mm_and_si128(high, _mm_set1_epi8(3)));
    let scales = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi8(15)), high);
    let scales = _mm_sub_epi8(scales, _mm_set1_epi8(32));
    let mut products = [0.0; 16];
    let halves = [scales, _mm_unpackhi_epi64(scales, scales)];
    for (products, scales) in products.as_chunks_mut().0.iter_mut().zip(halves) {
        let scales = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales));
        store(_mm256_mul_ps(_mm256_set1_ps(d), scales), products);
    }

    let codes = _mm256_setr_ps(-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0);
    let bits = load_32_bytes(field::<0, 32, 110>(block));
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    let scales = products.as_chunks::<2>().0;
    let bytes = field::<32, 64, 110>(block).as_chunks::<32>().0;
    for (index, (weights, scales)) in groups.zip(scales).enumerate() {
        let low = pairs(load_32_bytes(&bytes[index / 4]), index % 4);
        let indices = _mm256_or_si256(low, where_bit(bits, index, 4));
        let tables = scales.map(|scale| _mm256_mul_ps(_mm256_set1_ps(scale), codes));
        let vectors = weights.as_chunks_mut().0.iter_mut();
        for ((weights, index), part) in vectors.zip(widen_32(indices)).zip([0, 0, 1, 1]) {
            store(_mm256_permutevar8x32_ps(tables[part], index), weights);
        }
    }
});

decode_blocks!(decode_q4_k(), 144 to 256, |block, weights| {
    let (scales, mins) = six_bits_of_8(field::<4, 12, 144>(block));
    let scales = times_8(half::<0, 144>(block), scales);
    let mins = times_8(half::<2, 144>(block), mins);
    let groups = weights.as_chunks_mut::<32>().0.as_chunks_mut::<2>().0.iter_mut();
    let bytes = field::<16, 128, 144>(block).as_chunks::<32>().0;
    let (scales, mins) = (scales.as_chunks::<2>().0, mins.as_chunks::<2>().0);
    for (((weights, bytes), scales), mins) in groups.zip(bytes).zip(scales).zip(mins) {
        let codes = nibbles(load_32_bytes(bytes));
        for (k, weights) in weights.iter_mut().enumerate() {
            put_affine(codes[k], scales[k], mins[k], weights);
        }
    }
});

decode_blocks!(decode_q5_k(), 176 to 256, |block, weights| {
    let (scales, mins) = six_bits_of_8(field::<4, 12, 176>(block));
    let scales = times_8(half::<0, 176>(block), scales);
    let mins = times_8(half::<2, 176>(block), mins);
    let bits = load_32_bytes(field::<16, 32, 176>(block));
    let groups = weights.as_chunks_mut::<32>().0.as_chunks_mut::<2>().0.iter_mut();
    let bytes = field::<48, 128, 176>(block).as_chunks::<32>().0;
    for (index, (weights, bytes)) in groups.zip(bytes).enumerate() {
        let codes = nibbles(load_32_bytes(bytes));
        for (k, weights) in weights.iter_mut().enumerate() {
            let k8 = 2 * index + k;
            let codes = _mm256_or_si256(codes[k], where_bit(bits, k8, 16));
            put_affine(codes, scales[k8 & 7], mins[k8 & 7], weights);
        }
    }
});

decode_blocks!(decode_q6_k(), 210 to 256, |block, weights| {
    let d = half::<208, 210>(block);
    let scales = load_bytes(field::<192, 16, 210>(block));
    let mut products = [0.0; 16];
    let parts = [scales, _mm_unpackhi_epi64(scales, scales)];
    for (products, scales) in products.as_chunks_mut().0.iter_mut().zip(parts) {
        let scales = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales));
        store(_mm256_mul_ps(_mm256_set1_ps(d), scales), products);
    }
    let halves = weights.as_chunks_mut::<128>().0.iter_mut();
    let low = field::<0, 128, 210>(block).as_chunks::<64>().0;
    let high = field::<128, 64, 210>(block).as_chunks::<32>().0;
    let scales = products.as_chunks::<8>().0;
    for (((weights, low), high), scales) in halves.zip(low).zip(high).zip(scales) {
        let (low, _) = low.as_chunks::<32>();
        let (first, second) = (nibbles(load_32_bytes(&low[0])), nibbles(load_32_bytes(&low[1])));
        let high = load_32_bytes(high);
        let groups = weights.as_chunks_mut::<32>().0.iter_mut();
        let low = [first[0], second[0], first[1], second[1]];
        for (j, ((weights, low), scales)) in
            groups.zip(low).zip(scales.as_chunks::<2>().0).enumerate()
        {
            let codes = _mm256_or_si256(low, _mm256_slli_epi16::<4>(pairs(high, j)));
            let codes = _mm256_sub_epi8(codes, _mm256_set1_epi8(32));
            put_scaled(codes, scales, weights);
        }
    }
});
