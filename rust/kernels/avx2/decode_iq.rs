//! Decoding of GGML's IQ types. Scalar bodies: see `crate::formats::ggml_iq`.
//!
//! A point of a grid is kept as the number that lists its levels, a digit per weight. Broadcast and
//! shifted by a digit more in each lane, it is eight indices into a register that holds the levels
//! times the scale; lookups take the low bits of a lane, whatever is above. Signs ride on top of the
//! number and are shifted up to the sign bit of their lane.

use std::arch::x86_64::*;

use super::blocks::{decode_blocks, field, half, nibbles, signed_to_floats};
use super::{load_32_bytes, load_bytes, store};

/// Sign codes of seven bits with their parity on top.
static EVEN_SIGNS: [u8; 128] = {
    let mut signs = [0; 128];
    let mut code = 0u8;
    while code < 128 {
        signs[code as usize] = code | (code.count_ones() as u8 & 1) << 7;
        code += 1;
    }
    signs
};

/// The sign byte of the code in bits 0-6.
#[inline]
fn even_signs(code: u32) -> u8 {
    EVEN_SIGNS[code as usize & 127]
}

#[inline]
fn word(bytes: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*bytes)
}

/// ±table at eight digits of two bits, bit j of `signs` being the sign of weight j.
#[inline]
#[target_feature(enable = "avx2")]
fn put_pairs(table: __m256, point: u16, signs: u8, weights: &mut [f32; 8]) {
    let both = u32::from(point) | u32::from(signs) << 16;
    let both = _mm256_set1_epi32(both.cast_signed());
    let digits = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    let signs = _mm256_sllv_epi32(both, _mm256_setr_epi32(15, 14, 13, 12, 11, 10, 9, 8));
    store(negated(_mm256_permutevar_ps(table, digits), signs), weights);
}

/// ±table at twice four digits of three bits, bit j of `signs` being the sign of weight j.
#[inline]
#[target_feature(enable = "avx2")]
fn put_triples(table: __m256, points: [u16; 2], signs: u8, weights: &mut [f32; 8]) {
    let [first, second] = points.map(u32::from);
    let all = first | second << 12 | u32::from(signs) << 24;
    let all = _mm256_set1_epi32(all.cast_signed());
    let digits = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21));
    let signs = _mm256_sllv_epi32(all, _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    store(
        negated(_mm256_permutevar8x32_ps(table, digits), signs),
        weights,
    );
}

/// `values`, negated where the top bit of `signs` is set.
#[inline]
#[target_feature(enable = "avx2")]
fn negated(values: __m256, signs: __m256i) -> __m256 {
    let signs = _mm256_and_ps(_mm256_castsi256_ps(signs), _mm256_set1_ps(-0.0));
    _mm256_xor_ps(values, signs)
}

/// The levels of the IQ2 grids times `scale`.
#[inline]
#[target_feature(enable = "avx2")]
fn pairs_table(scale: f32) -> __m256 {
    let levels = _mm256_setr_ps(8.0, 25.0, 43.0, 0.0, 8.0, 25.0, 43.0, 0.0);
    _mm256_mul_ps(_mm256_set1_ps(scale), levels)
}

decode_blocks!(decode_iq2_xxs(grid: &[u16; 256]), 66 to 256, |block, weights| {
    let d = half::<0, 66>(block);
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    for (weights, group) in groups.zip(field::<2, 64, 66>(block).as_chunks::<8>().0) {
        let signs = word(field::<4, 4, 8>(group));
        let table = pairs_table(d * (0.5 + (signs >> 28) as f32) * 0.25);
        for (run, weights) in weights.as_chunks_mut().0.iter_mut().enumerate() {
            let point = grid[usize::from(group[run])];
            put_pairs(table, point, even_signs(signs >> (7 * run)), weights);
        }
    }
});

decode_blocks!(decode_iq2_xs(grid: &[u16; 512]), 74 to 256, |block, weights| {
    let d = half::<0, 74>(block);
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    let codes = field::<2, 64, 74>(block).as_chunks::<8>().0;
    for ((weights, codes), scales) in groups.zip(codes).zip(field::<66, 8, 74>(block)) {
        let tables = [scales & 15, scales >> 4]
            .map(|scale| pairs_table(d * (0.5 + f32::from(scale)) * 0.25));
        let runs = weights.as_chunks_mut().0.iter_mut().zip(codes.as_chunks::<2>().0);
        for ((weights, code), part) in runs.zip([0, 0, 1, 1]) {
            let code = u16::from_le_bytes(*code);
            let point = grid[usize::from(code & 511)];
            put_pairs(tables[part], point, even_signs(u32::from(code >> 9)), weights);
        }
    }
});

decode_blocks!(decode_iq2_s(grid: &[u16; 1024]), 82 to 256, |block, weights| {
    let d = half::<0, 82>(block);
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    let low = field::<2, 32, 82>(block).as_chunks::<4>().0;
    let signs = field::<34, 32, 82>(block).as_chunks::<4>().0;
    let high = field::<66, 8, 82>(block);
    let scales = field::<74, 8, 82>(block);
    for ((((weights, low), signs), high), scales) in
        groups.zip(low).zip(signs).zip(high).zip(scales)
    {
        let tables = [scales & 15, scales >> 4]
            .map(|scale| pairs_table(d * (0.5 + f32::from(scale)) * 0.25));
        for (run, weights) in weights.as_chunks_mut().0.iter_mut().enumerate() {
            let index = usize::from(low[run]) | usize::from(high >> (2 * run) & 3) << 8;
            put_pairs(tables[run / 2], grid[index], signs[run], weights);
        }
    }
});

decode_blocks!(decode_iq3_xxs(grid: &[u16; 256]), 98 to 256, |block, weights| {
    let d = half::<0, 98>(block);
    let levels = _mm256_setr_ps(4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0);
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    let indices = field::<2, 64, 98>(block).as_chunks::<8>().0;
    let signs = field::<66, 32, 98>(block).as_chunks::<4>().0;
    for ((weights, indices), signs) in groups.zip(indices).zip(signs) {
        let signs = word(signs);
        let scale = d * (0.5 + (signs >> 28) as f32) * 0.5;
        let table = _mm256_mul_ps(_mm256_set1_ps(scale), levels);
        let runs = weights.as_chunks_mut().0.iter_mut().zip(indices.as_chunks::<2>().0);
        for (run, (weights, indices)) in runs.enumerate() {
            let points = indices.map(|index| grid[usize::from(index)]);
            put_triples(table, points, even_signs(signs >> (7 * run)), weights);
        }
    }
});

decode_blocks!(decode_iq3_s(grid: &[u16; 512]), 110 to 256, |block, weights| {
    let d = half::<0, 110>(block);
    let levels = _mm256_setr_ps(1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0);
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    let low = field::<2, 64, 110>(block).as_chunks::<8>().0;
    let high = field::<66, 8, 110>(block);
    let signs = field::<74, 32, 110>(block).as_chunks::<4>().0;
    let scales = field::<106, 4, 110>(block);
    for (group, (((weights, low), signs), high)) in groups.zip(low).zip(signs).zip(high).enumerate() {
        let scale = scales[group / 2] >> (4 * (group % 2)) & 15;
        let scale = d * f32::from(1 + 2 * scale);
        let table = _mm256_mul_ps(_mm256_set1_ps(scale), levels);
        for (run, weights) in weights.as_chunks_mut().0.iter_mut().enumerate() {
            let high = usize::from(*high) >> (2 * run);
            let points = [
                grid[usize::from(low[2 * run]) | (high & 1) << 8],
                grid[usize::from(low[2 * run + 1]) | (high >> 1 & 1) << 8],
            ];
            put_triples(table, points, signs[run], weights);
        }
    }
});

/// Levels of the IQ1 grid, shifted up and down.
#[inline]
#[target_feature(enable = "avx2")]
fn shifted_levels() -> [__m256; 2] {
    [0.125f32, -0.125].map(|shift| {
        let levels = _mm256_setr_ps(-1.0, 0.0, 1.0, 0.0, -1.0, 0.0, 1.0, 0.0);
        _mm256_add_ps(levels, _mm256_set1_ps(shift))
    })
}

/// Table at eight digits of two bits.
#[inline]
#[target_feature(enable = "avx2")]
fn put_unsigned_pairs(table: __m256, point: u16, weights: &mut [f32; 8]) {
    let point = _mm256_set1_epi32(i32::from(point));
    let digits = _mm256_srlv_epi32(point, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    store(_mm256_permutevar_ps(table, digits), weights);
}

decode_blocks!(decode_iq1_s(grid: &[u16; 2048]), 50 to 256, |block, weights| {
    let d = half::<0, 50>(block);
    let levels = shifted_levels();
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    let low = field::<2, 32, 50>(block).as_chunks::<4>().0;
    let high = field::<34, 16, 50>(block).as_chunks::<2>().0;
    for ((weights, low), high) in groups.zip(low).zip(high) {
        let high = usize::from(u16::from_le_bytes(*high));
        let scale = d * (2 * (high >> 12 & 7) + 1) as f32;
        let table = _mm256_mul_ps(_mm256_set1_ps(scale), levels[high >> 15 & 1]);
        for (run, weights) in weights.as_chunks_mut().0.iter_mut().enumerate() {
            let index = usize::from(low[run]) | (high >> (3 * run) & 7) << 8;
            put_unsigned_pairs(table, grid[index], weights);
        }
    }
});

decode_blocks!(decode_iq1_m(grid: &[u16; 2048]), 56 to 256, |block, weights| {
    let scales = u64::from_le_bytes(*field::<48, 8, 56>(block));
    let d = scales >> 12 & 15 | scales >> 24 & 0xf0 | scales >> 36 & 0xf00 | scales >> 48 & 0xf000;
    let d = half::<0, 2>(&(d as u16).to_le_bytes());
    let levels = shifted_levels();
    let groups = weights.as_chunks_mut::<16>().0.iter_mut();
    let low = field::<0, 32, 56>(block).as_chunks::<2>().0;
    let high = field::<32, 16, 56>(block);
    for (group, ((weights, low), high)) in groups.zip(low).zip(high).enumerate() {
        let scale = scales >> (16 * (group / 4) + 3 * (group % 4)) & 7;
        let scale = _mm256_set1_ps(d * (2 * scale + 1) as f32);
        for (run, weights) in weights.as_chunks_mut().0.iter_mut().enumerate() {
            let high = usize::from(*high) >> (4 * run);
            let index = usize::from(low[run]) | (high & 7) << 8;
            let table = _mm256_mul_ps(scale, levels[high >> 3 & 1]);
            put_unsigned_pairs(table, grid[index], weights);
        }
    }
});

/// 32 levels, of split nibbles, times `scale`.
#[inline]
#[target_feature(enable = "avx2")]
fn put_levels(levels: __m256i, bytes: &[u8; 16], scale: f32, weights: &mut [f32; 32]) {
    let bytes = load_bytes(bytes);
    let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
    let codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
    let values = signed_to_floats(_mm256_shuffle_epi8(levels, codes));
    for (weights, value) in weights.as_chunks_mut().0.iter_mut().zip(values) {
        store(_mm256_mul_ps(_mm256_set1_ps(scale), value), weights);
    }
}

/// A table of 16 signed bytes in both halves.
#[inline]
#[target_feature(enable = "avx2")]
fn both_halves(table: &[i8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(load_bytes(&table.map(i8::cast_unsigned)))
}

decode_blocks!(decode_iq4_nl(levels: &[i8; 16]), 18 to 32, |block, weights| {
    let levels = both_halves(levels);
    put_levels(levels, field::<2, 16, 18>(block), half::<0, 18>(block), weights);
});

decode_blocks!(decode_iq4_xs(levels: &[i8; 16]), 136 to 256, |block, weights| {
    let levels = both_halves(levels);
    let d = half::<0, 136>(block);
    let high = u16::from_le_bytes(*field::<2, 2, 136>(block));
    let low = word(field::<4, 4, 136>(block));
    let groups = weights.as_chunks_mut::<32>().0.iter_mut();
    let codes = field::<8, 128, 136>(block).as_chunks::<16>().0;
    for (group, (weights, codes)) in groups.zip(codes).enumerate() {
        let scale = low >> (4 * group) & 15 | u32::from(high >> (2 * group) & 3) << 4;
        let scale = d * (scale.cast_signed() - 32) as f32;
        put_levels(levels, codes, scale, weights);
    }
});

/// Doubled values of 16 codes of four bits, of 4-bit floats, times half a scale per group.
#[inline]
#[target_feature(enable = "avx2")]
fn float_levels() -> __m256i {
    both_halves(&[0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
}

decode_blocks!(decode_mxfp4(scales: &[f32; 256]), 17 to 32, |block, weights| {
    let scale = scales[usize::from(block[0])];
    put_levels(float_levels(), field::<1, 16, 17>(block), scale, weights);
});

decode_blocks!(decode_nvfp4(scales: &[f32; 256]), 36 to 64, |block, weights| {
    let codes = nibbles(load_32_bytes(field::<4, 32, 36>(block)));
    let values = codes.map(|codes| signed_to_floats(_mm256_shuffle_epi8(float_levels(), codes)));
    let groups = weights.as_chunks_mut::<16>().0.iter_mut();
    for (index, (weights, scale)) in groups.zip(field::<0, 4, 36>(block)).enumerate() {
        let scale = _mm256_set1_ps(scales[usize::from(*scale)]);
        for (half, weights) in weights.as_chunks_mut().0.iter_mut().enumerate() {
            store(_mm256_mul_ps(values[half][index], scale), weights);
        }
    }
});
