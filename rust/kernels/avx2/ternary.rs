//! GGML's ternary and one- and two-bit types, and its types for activations. Scalar bodies and special
//! cases: see `crate::formats::ggml_ternary` and `crate::formats::ggml_activation`.

use std::arch::x86_64::*;

use super::blocks::{
    decode_blocks, encode_blocks, field, half, pack_unsigned, signed_to_floats, widen_32, widen_8,
};
use super::ggml::half_bytes;
use super::{load, load_32_bytes, load_bytes, store, store_32_bytes, store_bytes};

/// −d, 0·d, d, 2d.
#[inline]
#[target_feature(enable = "avx2")]
fn table(d: f32) -> __m256 {
    let codes = _mm256_setr_ps(-1.0, 0.0, 1.0, 2.0, -1.0, 0.0, 1.0, 2.0);
    _mm256_mul_ps(codes, _mm256_set1_ps(d))
}

/// Bytes times 3, modulo 256.
#[inline]
#[target_feature(enable = "avx2")]
fn times_3(bytes: __m256i) -> __m256i {
    _mm256_add_epi8(_mm256_add_epi8(bytes, bytes), bytes)
}

/// ⌊3·byte / 256⌋: how many of 86 and 171 the byte reaches.
#[inline]
#[target_feature(enable = "avx2")]
fn first_trit(bytes: __m256i) -> __m256i {
    let reaches = |least: u8| {
        let least = _mm256_set1_epi8(least.cast_signed());
        _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, least), bytes)
    };
    _mm256_abs_epi8(_mm256_add_epi8(reaches(86), reaches(171)))
}

decode_blocks!(decode_tq1_0(), 54 to 256, |block, weights| {
    let table = table(half::<52, 54>(block));
    let (groups, rest) = weights.as_chunks_mut::<32>();
    debug_assert!(rest.is_empty());
    let (first, others) = groups.split_at_mut(5);
    let mut bytes = load_32_bytes(field::<0, 32, 54>(block));
    for weights in first {
        let codes = widen_32(first_trit(bytes));
        for (weights, code) in weights.as_chunks_mut().0.iter_mut().zip(codes) {
            store(_mm256_permutevar_ps(table, code), weights);
        }
        bytes = times_3(bytes);
    }
    // Sixteen bytes of five trits, then four bytes of four: a trit more in each run of 16 or 4.
    let (runs, _) = others.as_flattened_mut().as_chunks_mut::<16>();
    let mut bytes = _mm256_castsi128_si256(load_bytes(field::<32, 16, 54>(block)));
    let (last, runs) = match runs.split_last_mut() {
        Some((last, runs)) => (last, runs),
        None => continue,
    };
    for weights in runs {
        let [low, high, ..] = widen_32(first_trit(bytes));
        for (weights, code) in weights.as_chunks_mut().0.iter_mut().zip([low, high]) {
            store(_mm256_permutevar_ps(table, code), weights);
        }
        bytes = times_3(bytes);
    }
    let four = _mm256_castsi128_si256(_mm_cvtsi32_si128(i32::from_le_bytes(
        *field::<48, 4, 54>(block),
    )));
    let [one, two, three] = {
        let one = times_3(four);
        let two = times_3(one);
        [one, two, times_3(two)]
    };
    let trits = _mm256_unpacklo_epi64(
        _mm256_unpacklo_epi32(four, one),
        _mm256_unpacklo_epi32(two, three),
    );
    let [low, high, ..] = widen_32(first_trit(trits));
    for (weights, code) in last.as_chunks_mut().0.iter_mut().zip([low, high]) {
        store(_mm256_permutevar_ps(table, code), weights);
    }
});

decode_blocks!(decode_tq2_0(), 66 to 256, |block, weights| {
    // Lookups take the low two bits of a lane.
    let table = table(half::<64, 66>(block));
    let halves = weights.as_chunks_mut::<128>().0.iter_mut();
    for (weights, bytes) in halves.zip(field::<0, 64, 66>(block).as_chunks::<32>().0) {
        let (groups, _) = weights.as_chunks_mut::<32>();
        for (run, bytes) in bytes.as_chunks::<8>().0.iter().enumerate() {
            let codes = widen_8(bytes);
            let shifted = [
                codes,
                _mm256_srli_epi32::<2>(codes),
                _mm256_srli_epi32::<4>(codes),
                _mm256_srli_epi32::<6>(codes),
            ];
            for (weights, codes) in groups.iter_mut().zip(shifted) {
                let weights = &mut weights.as_chunks_mut().0[run];
                store(_mm256_permutevar_ps(table, codes), weights);
            }
        }
    }
});

decode_blocks!(decode_q1_0(), 18 to 128, |block, weights| {
    let d = half::<0, 18>(block);
    let (up, down) = (_mm256_set1_ps(d), _mm256_set1_ps(-d));
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    for (weights, bits) in groups.zip(field::<2, 16, 18>(block).as_chunks::<4>().0) {
        let bits = _mm256_set1_epi32(i32::from_le_bytes(*bits));
        // Bit i of a run of eight comes to the top of lane i.
        let shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
        for (run, weights) in (0..).zip(weights.as_chunks_mut().0) {
            let shifts = _mm256_sub_epi32(shifts, _mm256_set1_epi32(8 * run));
            let top = _mm256_castsi256_ps(_mm256_sllv_epi32(bits, shifts));
            store(_mm256_blendv_ps(down, up, top), weights);
        }
    }
});

decode_blocks!(decode_q2_0(), 18 to 64, |block, weights| {
    let table = table(half::<0, 18>(block));
    let groups = weights.as_chunks_mut::<16>().0.iter_mut();
    for (weights, codes) in groups.zip(field::<2, 16, 18>(block).as_chunks::<4>().0) {
        let codes = _mm256_set1_epi32(i32::from_le_bytes(*codes));
        let shifts = [
            _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14),
            _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30),
        ];
        for (weights, shift) in weights.as_chunks_mut().0.iter_mut().zip(shifts) {
            let codes = _mm256_srlv_epi32(codes, shift);
            store(_mm256_permutevar_ps(table, codes), weights);
        }
    }
});

/// Signed bytes times `d`, in whole runs of 32.
#[inline]
#[target_feature(enable = "avx2")]
fn put_products(d: f32, codes: &[u8], weights: &mut [f32]) {
    let d = _mm256_set1_ps(d);
    let runs = weights.as_chunks_mut::<32>().0.iter_mut();
    for (weights, codes) in runs.zip(codes.as_chunks().0) {
        let codes = signed_to_floats(load_32_bytes(codes));
        for (weights, code) in weights.as_chunks_mut().0.iter_mut().zip(codes) {
            store(_mm256_mul_ps(code, d), weights);
        }
    }
}

decode_blocks!(decode_q8_1(), 36 to 32, |block, weights| {
    put_products(half::<0, 36>(block), field::<4, 32, 36>(block), weights);
});

decode_blocks!(decode_q8_k(), 292 to 256, |block, weights| {
    let d = f32::from_le_bytes(*field::<0, 4, 292>(block));
    put_products(d, field::<4, 256, 292>(block), weights);
});

/// The largest magnitude, NaN aside.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn largest_magnitude(weights: &[f32]) -> f32 {
    let mut most = _mm256_setzero_ps();
    for weights in weights.as_chunks().0 {
        let magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0), load(weights));
        // The second operand stays where the comparison does not hold.
        most = _mm256_max_ps(magnitude, most);
    }
    let most = _mm_max_ps(
        _mm256_castps256_ps128(most),
        _mm256_extractf128_ps::<1>(most),
    );
    let most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)))
}

/// 1/d, or 0 where it is infinite, or d NaN or 0.
#[inline]
#[target_feature(enable = "avx2")]
fn reciprocal(d: f32) -> __m256 {
    let reciprocal = 1.0 / d;
    _mm256_set1_ps(if reciprocal.is_finite() {
        reciprocal
    } else {
        0.0
    })
}

/// 1 + x·scale rounded, ties away from zero, for products not far from −1 to 1.
#[inline]
#[target_feature(enable = "avx2")]
fn codes(weights: &[f32; 8], scale: __m256) -> __m256i {
    let value = _mm256_mul_ps(load(weights), scale);
    let up = _mm256_cmp_ps::<_CMP_GE_OQ>(value, _mm256_set1_ps(0.5));
    let down = _mm256_cmp_ps::<_CMP_LE_OQ>(value, _mm256_set1_ps(-0.5));
    let code = _mm256_sub_epi32(_mm256_set1_epi32(1), _mm256_castps_si256(up));
    _mm256_add_epi32(code, _mm256_castps_si256(down))
}

/// Five codes as a fraction of 256, rounded up.
#[inline]
#[target_feature(enable = "avx2")]
fn fraction(codes: [__m256i; 5]) -> __m256i {
    let [first, rest @ ..] = codes;
    let value = rest.into_iter().fold(first, |value, code| {
        let tripled = _mm256_add_epi32(_mm256_add_epi32(value, value), value);
        _mm256_add_epi32(tripled, code)
    });
    // ⌈256·v / 243⌉ for v up to 242, as a product and a shift.
    let product = _mm256_mullo_epi32(value, _mm256_set1_epi32(8631));
    _mm256_srli_epi32::<13>(_mm256_add_epi32(product, _mm256_set1_epi32(8159)))
}

encode_blocks!(encode_tq1_0, 256 to 54, |weights, block| {
    let d = largest_magnitude(weights);
    let scale = reciprocal(d);
    let (runs, _) = weights.as_chunks::<8>();
    let zero = _mm256_setzero_si256();
    let long: [__m256i; 4] =
        std::array::from_fn(|k| fraction([0, 4, 8, 12, 16].map(|n| codes(&runs[n + k], scale))));
    let short: [__m256i; 2] =
        std::array::from_fn(|k| fraction([20, 22, 24, 26, 28].map(|n| codes(&runs[n + k], scale))));
    // Four codes of four bytes: the two halves of two vectors.
    let (a, b) = (codes(&runs[30], scale), codes(&runs[31], scale));
    let swap = |codes| _mm256_permute2x128_si256::<1>(codes, codes);
    let four = fraction([a, swap(a), b, swap(b), zero]);
    if let Some(bytes) = block.first_chunk_mut() {
        store_32_bytes(pack_unsigned(long), bytes);
    }
    let rest = pack_unsigned([short[0], short[1], four, zero]);
    if let Some(bytes) = block[32..].first_chunk_mut() {
        store_bytes(_mm256_castsi256_si128(rest), bytes);
    }
    let four = _mm_cvtsi128_si32(_mm256_extracti128_si256::<1>(rest));
    block[48..52].copy_from_slice(&four.to_le_bytes());
    block[52..].copy_from_slice(&half_bytes(d));
});

encode_blocks!(encode_tq2_0, 256 to 66, |weights, block| {
    let d = largest_magnitude(weights);
    let scale = reciprocal(d);
    let halves = weights.as_chunks::<128>().0;
    for (bytes, weights) in block.as_chunks_mut::<32>().0.iter_mut().zip(halves) {
        let (runs, _) = weights.as_chunks::<8>();
        let packed = std::array::from_fn(|k| {
            let [a, b, c, d] = [0, 4, 8, 12].map(|l| codes(&runs[l + k], scale));
            _mm256_or_si256(
                _mm256_or_si256(a, _mm256_slli_epi32::<2>(b)),
                _mm256_or_si256(_mm256_slli_epi32::<4>(c), _mm256_slli_epi32::<6>(d)),
            )
        });
        store_32_bytes(pack_unsigned(packed), bytes);
    }
    block[64..].copy_from_slice(&half_bytes(d));
});

encode_blocks!(encode_q1_0, 128 to 18, |weights, block| {
    // The sum is taken in order.
    let sum = weights.iter().fold(0.0, |sum, weight| sum + weight.abs());
    let d: f32 = sum / 128.0;
    block[..2].copy_from_slice(&half_bytes(if d.is_nan() { f32::NAN } else { d }));
    for (byte, weights) in block[2..].iter_mut().zip(weights.as_chunks().0) {
        let is_set = _mm256_cmp_ps::<_CMP_GE_OQ>(load(weights), _mm256_setzero_ps());
        *byte = _mm256_movemask_ps(is_set) as u8;
    }
});

encode_blocks!(encode_q2_0, 64 to 18, |weights, block| {
    let d = largest_magnitude(weights);
    let scale = reciprocal(d);
    let groups = weights.as_chunks::<32>().0;
    let fours: [__m256i; 2] = std::array::from_fn(|k| {
        let (runs, _) = groups[k].as_chunks();
        let bytes = pack_unsigned(std::array::from_fn(|run| codes(&runs[run], scale)));
        // Two codes times 1 and 4, then two pairs times 1 and 16.
        let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0401));
        _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x0010_0001))
    });
    let zero = _mm256_setzero_si256();
    let packed = pack_unsigned([fours[0], fours[1], zero, zero]);
    block[..2].copy_from_slice(&half_bytes(d));
    if let Some(bytes) = block.last_chunk_mut() {
        store_bytes(_mm256_castsi256_si128(packed), bytes);
    }
});
