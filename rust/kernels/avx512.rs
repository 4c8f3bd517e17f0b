//! AVX-512 versions (F, BW, DQ, VL). Scalar bodies and special cases: see the function that offers
//! the work.
//!
//! Every function here may be called only on a processor that has these features, and those that it says
//! itself.

mod bodies;
mod borders;
mod e2m1;
mod e4m3;
mod groups;
mod lanes;
mod levels;
mod orders;
mod pairs;

pub(super) use bodies::*;
pub(super) use e2m1::*;
pub(super) use e4m3::*;
pub(super) use groups::*;
pub(super) use lanes::*;
pub(super) use levels::*;
pub(super) use pairs::*;

use std::arch::x86_64::*;

use super::sums::{RunLanes, RUN};
use crate::codebook::{Codebook, PARTS_PER_UNIT};

/// Bits of a magnitude; bits of infinity.
const MAGNITUDE: i32 = 0x7fff_ffff;
const INFINITY: i32 = 0x7f80_0000;

// ---- memory

#[inline]
#[target_feature(enable = "avx512f")]
fn load(values: &[f32; 16]) -> __m512 {
    // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(vector: __m512, values: &mut [f32; 16]) {
    // SAFETY: the reference is to 64 writable bytes; the store takes any alignment.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_32_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load takes any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_32_bytes(vector: __m256i, bytes: &mut [u8; 32]) {
    // SAFETY: the reference is to 32 writable bytes; the store takes any alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_16_bytes(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load takes any alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_16_bytes(vector: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the reference is to 16 writable bytes; the store takes any alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}

// ---- casts

#[target_feature(enable = "avx512f")]
pub(super) fn widen_f16(bytes: &[u8], weights: &mut [f32]) -> usize {
    let (weights, _) = weights.as_chunks_mut();
    for (weights, halves) in weights.iter_mut().zip(bytes.as_chunks().0) {
        store(_mm512_cvtph_ps(load_32_bytes(halves)), weights);
    }
    16 * weights.len()
}

#[target_feature(enable = "avx512f")]
pub(super) fn widen_bf16(bytes: &[u8], weights: &mut [f32]) -> usize {
    let (weights, _) = weights.as_chunks_mut();
    for (weights, brains) in weights.iter_mut().zip(bytes.as_chunks().0) {
        let bits = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_32_bytes(brains)));
        store(_mm512_castsi512_ps(bits), weights);
    }
    16 * weights.len()
}

#[target_feature(enable = "avx512f")]
pub(super) fn narrow_f16(weights: &[f32], bytes: &mut [u8]) -> usize {
    let (weights, _) = weights.as_chunks();
    for (weights, halves) in weights.iter().zip(bytes.as_chunks_mut().0) {
        let rounded = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load(weights));
        store_32_bytes(rounded, halves);
    }
    16 * weights.len()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn narrow_bf16(weights: &[f32], bytes: &mut [u8]) -> usize {
    if is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the processor has this feature too.
        return unsafe { narrow_bf16_at_once(weights, bytes) };
    }
    let (pairs, _) = weights.as_chunks::<32>();
    for (weights, brains) in pairs.iter().zip(bytes.as_chunks_mut().0) {
        store_64_bytes(rounded_to_bf16(pair(weights)), brains);
    }
    32 * pairs.len()
}

/// By the instruction for it, which has zeros for subnormal numbers: vectors that have one are left to
/// [`rounded_to_bf16`].
///
/// # Safety
///
/// The processor has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
unsafe fn narrow_bf16_at_once(weights: &[f32], bytes: &mut [u8]) -> usize {
    const SUBNORMAL: i32 = 0x20;
    let (pairs, _) = weights.as_chunks::<32>();
    for (weights, brains) in pairs.iter().zip(bytes.as_chunks_mut().0) {
        let vectors = pair(weights);
        let [low, high] = vectors.map(|weights| _mm512_fpclass_ps_mask::<SUBNORMAL>(weights));
        let rounded = if low | high == 0 {
            // SAFETY: both are 64 bytes, and every pattern is one of either type.
            unsafe {
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(
                    vectors[1], vectors[0],
                ))
            }
        } else {
            rounded_to_bf16(vectors)
        };
        store_64_bytes(rounded, brains);
    }
    32 * pairs.len()
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pair(weights: &[f32; 32]) -> [__m512; 2] {
    let (vectors, _) = weights.as_chunks();
    [load(&vectors[0]), load(&vectors[1])]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_64_bytes(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_64_bytes(vector: __m512i, bytes: &mut [u8; 64]) {
    // SAFETY: the reference is to 64 writable bytes; the store takes any alignment.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
}

/// 32 weights rounded to BF16, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn rounded_to_bf16(vectors: [__m512; 2]) -> __m512i {
    // The upper half of each element of two vectors, in order.
    let upper: [u16; 32] = std::array::from_fn(|index| 2 * index as u16 + 1);
    // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
    let upper = unsafe { _mm512_loadu_si512(upper.as_ptr().cast()) };
    let mut rounded = vectors.map(|weights| {
        let bits = _mm512_castps_si512(weights);
        // Half a step less one, and one more where the last bit that stays is set.
        let is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
        let sum = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        _mm512_mask_add_epi32(sum, is_odd, sum, _mm512_set1_epi32(1))
    });
    if _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(vectors[0], vectors[1]) != 0 {
        // A NaN is cut off and made quiet.
        for (rounded, weights) in rounded.iter_mut().zip(vectors) {
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(weights, weights);
            let bits = _mm512_castps_si512(weights);
            let quiet = _mm512_set1_epi32(0x40_0000);
            *rounded = _mm512_mask_or_epi32(*rounded, is_nan, bits, quiet);
        }
    }
    _mm512_permutex2var_epi16(rounded[0], upper, rounded[1])
}

/// Rounded to F16 and back.
#[inline]
#[target_feature(enable = "avx512f")]
fn through_f16(weights: __m512) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(weights))
}

// ---- scans

#[target_feature(enable = "avx512f")]
pub(super) fn finite_prefix(weights: &[f32]) -> usize {
    let (blocks, _) = weights.as_chunks::<64>();
    let magnitude = _mm512_set1_epi32(MAGNITUDE);
    let infinity = _mm512_set1_epi32(INFINITY);
    let stop = blocks.iter().position(|block| {
        let mut most = _mm512_setzero_si512();
        for weights in block.as_chunks().0 {
            let bits = _mm512_and_si512(_mm512_castps_si512(load(weights)), magnitude);
            most = _mm512_max_epu32(most, bits);
        }
        _mm512_cmpge_epu32_mask(most, infinity) != 0
    });
    64 * stop.unwrap_or(blocks.len())
}

#[target_feature(enable = "avx512f")]
pub(super) fn error_run(x: &[f32; RUN], y: &[f32; RUN], lanes: &mut RunLanes) -> bool {
    let [mut signal, mut noise, mut cross, mut power, mut most] = [_mm512_setzero_ps(); 5];
    for (x, y) in x.as_chunks().0.iter().zip(y.as_chunks().0) {
        let (x, y) = (load(x), load(y));
        let error = _mm512_sub_ps(x, y);
        signal = _mm512_add_ps(signal, _mm512_mul_ps(x, x));
        noise = _mm512_add_ps(noise, _mm512_mul_ps(error, error));
        cross = _mm512_add_ps(cross, _mm512_mul_ps(x, y));
        power = _mm512_add_ps(power, _mm512_mul_ps(y, y));
        // The second operand stays where the comparison does not hold.
        most = _mm512_max_ps(_mm512_abs_ps(error), most);
    }
    for (lanes, sum) in lanes.iter_mut().zip([signal, noise, cross, power, most]) {
        store(sum, lanes);
    }
    true
}

/// Bits of the magnitudes.
#[inline]
#[target_feature(enable = "avx512f")]
fn magnitude(weights: __m512) -> __m512i {
    _mm512_and_si512(_mm512_castps_si512(weights), _mm512_set1_epi32(MAGNITUDE))
}

// ---- bitsandbytes, 4 bits

/// Two ways to the number of thresholds that a number exceeds.
struct Search {
    /// A tree: where the search stands at i and steps by s, it compares with threshold i + s - 1.
    root: __m512,
    depths: [(__m512, i32); 3],
    /// [`crate::codebook::Intervals`], if the codebook has them: `below` and `inside`.
    intervals: Option<([__m512i; 2], [__m512; 2])>,
}

impl Search {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new(codebook: &Codebook) -> Self {
        let thresholds = &codebook.thresholds;
        let table = |skip: usize| {
            let mut shifted = [0.0; 16];
            shifted[..15 - skip].copy_from_slice(&thresholds[skip..]);
            load(&shifted)
        };
        Search {
            root: _mm512_set1_ps(thresholds[7]),
            depths: [(table(3), 4), (table(1), 2), (table(0), 1)],
            intervals: codebook.intervals.as_ref().map(|intervals| {
                let (below, _) = intervals.below.as_chunks::<16>();
                let (inside, _) = intervals.inside.as_chunks();
                // SAFETY: the reference is to 64 readable bytes; the load takes any alignment.
                let counts = |part: &[i32; 16]| unsafe { _mm512_loadu_si512(part.as_ptr().cast()) };
                (
                    [counts(&below[0]), counts(&below[1])],
                    [load(&inside[0]), load(&inside[1])],
                )
            }),
        }
    }

    /// How many thresholds each number exceeds; all of them for NaN.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn by_tree(&self, y: __m512) -> __m512i {
        // Not below or equal, so that NaN goes up.
        let above = |threshold| _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(y, threshold);
        let mut index = _mm512_maskz_set1_epi32(above(self.root), 8);
        for (thresholds, step) in self.depths {
            let threshold = _mm512_permutexvar_ps(index, thresholds);
            index = _mm512_mask_add_epi32(index, above(threshold), index, _mm512_set1_epi32(step));
        }
        index
    }
}

/// How many thresholds each number from -1 to 1 exceeds.
#[inline]
#[target_feature(enable = "avx512f")]
fn by_interval(below: [__m512i; 2], inside: [__m512; 2], y: __m512) -> __m512i {
    // Adding this number leaves a whole one in the low bits. Where a border lies matters little, as
    // long as a larger number never falls into a lower part; so the sum may be fused.
    let whole = _mm512_set1_ps(1.5 * (1 << 23) as f32);
    let part = _mm512_fmadd_ps(y, _mm512_set1_ps(PARTS_PER_UNIT), whole);
    // Lookups take the low five bits.
    let part = _mm512_castps_si512(part);
    let threshold = _mm512_permutex2var_ps(inside[0], part, inside[1]);
    let index = _mm512_permutex2var_epi32(below[0], part, below[1]);
    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(y, threshold);
    _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(1))
}

#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn encode_4bit(
    codebook: &Codebook,
    least: f32,
    size: usize,
    weights: &[f32],
    absmax: &[[u8; 4]],
    codes: &mut [u8],
) -> usize {
    let search = Search::new(codebook);
    let order = _mm512_broadcast_i32x4(load_16_bytes(&codebook.order));
    let divisor = |absmax: [u8; 4]| {
        let absmax = f32::from_le_bytes(absmax);
        if absmax < least {
            least
        } else {
            absmax
        }
    };
    if size < 64 {
        // Two blocks at a time; the last one of an odd number is left.
        let blocks = weights
            .as_chunks()
            .0
            .iter()
            .zip(codes.as_chunks_mut().0)
            .zip(absmax.as_chunks::<2>().0);
        let done = 2 * blocks.len();
        for ((weights, codes), absmax) in blocks {
            store_32_bytes(
                encode_64(&search, order, absmax.map(divisor), weights),
                codes,
            );
        }
        return done;
    }
    let blocks = weights
        .chunks_exact(size)
        .zip(codes.chunks_exact_mut(size / 2))
        .zip(absmax);
    let done = blocks.len();
    for ((block, codes), absmax) in blocks {
        let absmax = [divisor(*absmax); 2];
        for (weights, codes) in block.as_chunks().0.iter().zip(codes.as_chunks_mut().0) {
            store_32_bytes(encode_64(&search, order, absmax, weights), codes);
        }
    }
    done
}

/// Packed codes of 64 weights, each half of them divided by its `absmax`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn encode_64(search: &Search, order: __m512i, absmax: [f32; 2], weights: &[f32; 64]) -> __m256i {
    let (vectors, _) = weights.as_chunks();
    let [low, high] = absmax.map(|absmax| _mm512_set1_ps(1.0 / absmax));
    let y = [
        _mm512_mul_ps(load(&vectors[0]), low),
        _mm512_mul_ps(load(&vectors[1]), low),
        _mm512_mul_ps(load(&vectors[2]), high),
        _mm512_mul_ps(load(&vectors[3]), high),
    ];
    let [a, b, c, d] = match search.intervals {
        // NaN, which only the tree can place, takes an absmax that is not finite.
        Some((below, inside)) if absmax[0].is_finite() && absmax[1].is_finite() => [
            by_interval(below, inside, y[0]),
            by_interval(below, inside, y[1]),
            by_interval(below, inside, y[2]),
            by_interval(below, inside, y[3]),
        ],
        _ => [
            search.by_tree(y[0]),
            search.by_tree(y[1]),
            search.by_tree(y[2]),
            search.by_tree(y[3]),
        ],
    };
    let packed = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
    // Packing works within quarters: fours of bytes of the same quarter come to lie together.
    let in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let codes = _mm512_shuffle_epi8(order, _mm512_permutexvar_epi32(in_order, packed));
    // The first code of two times 16, and the second.
    let pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));
    _mm512_cvtepi16_epi8(pairs)
}

#[target_feature(enable = "avx512f")]
pub(super) fn decode_4bit(
    values: &[f32; 16],
    size: usize,
    codes: &[u8],
    absmax: &[[u8; 4]],
    weights: &mut [f32],
) -> usize {
    let values = load(values);
    let blocks = weights
        .chunks_exact_mut(size)
        .zip(codes.chunks_exact(size / 2))
        .zip(absmax);
    let done = blocks.len();
    for ((block, codes), absmax) in blocks {
        let absmax = _mm512_set1_ps(f32::from_le_bytes(*absmax));
        for (weights, codes) in block.as_chunks_mut().0.iter_mut().zip(codes.as_chunks().0) {
            let codes = _mm_cvtsi64_si128(i64::from_le_bytes(*codes));
            // Each byte in both halves of 64 bits, the first code of the two moved down; the lookup
            // takes the low four bits.
            let bytes = _mm512_cvtepu8_epi64(codes);
            let pairs = _mm512_or_si512(
                _mm512_slli_epi64::<32>(bytes),
                _mm512_srli_epi64::<4>(bytes),
            );
            let value = _mm512_permutexvar_ps(pairs, values);
            store(_mm512_mul_ps(value, absmax), weights);
        }
    }
    done
}

// ---- bitsandbytes, int8

#[target_feature(enable = "avx512f")]
pub(super) fn most_f16(weights: &[f32]) -> (usize, u32) {
    let (vectors, _) = weights.as_chunks();
    let mut most = _mm512_setzero_si512();
    for weights in vectors {
        most = _mm512_max_epu32(most, magnitude(through_f16(load(weights))));
    }
    (16 * vectors.len(), _mm512_reduce_max_epu32(most))
}

#[target_feature(enable = "avx512f")]
pub(super) fn encode_int8(scale: f32, weights: &[f32], codes: &mut [u8]) -> usize {
    let scale = _mm512_set1_ps(scale);
    let (vectors, _) = weights.as_chunks();
    for (weights, codes) in vectors.iter().zip(codes.as_chunks_mut().0) {
        let value = _mm512_mul_ps(through_f16(load(weights)), scale);
        // Conversion rounds to nearest even; NaN is made zero.
        let is_number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(value, value);
        let rounded = _mm512_maskz_cvtps_epi32(is_number, value);
        store_16_bytes(_mm512_cvtsepi32_epi8(rounded), codes);
    }
    16 * vectors.len()
}

#[target_feature(enable = "avx512f")]
pub(super) fn decode_int8(codes: &[u8], scale: f32, factor: f32, weights: &mut [f32]) -> usize {
    let (scale, factor) = (_mm512_set1_ps(scale), _mm512_set1_ps(factor));
    let (vectors, _) = weights.as_chunks_mut();
    for (weights, codes) in vectors.iter_mut().zip(codes.as_chunks().0) {
        let codes = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16_bytes(codes)));
        store(_mm512_mul_ps(_mm512_mul_ps(codes, scale), factor), weights);
    }
    16 * vectors.len()
}
