//! The inner loops: which instruction set runs them, and the loops that no format owns.
//!
//! The scalar body of a loop is its definition. It stands where the loop belongs (a format, a
//! cast) and reads like the formula. It first offers its work to the function of the same name
//! here, which does as much of it as a faster version can, and says how much that was: nothing at
//! the scalar level, all but a tail that does not fill a vector otherwise. What a faster version
//! does is bit-identical (no other order of operations, and fused ones only where they are proved to
//! give the same), which `tests.rs` stamps out for every level; one exists only where it measures at
//! least 1.3 times as fast. Portable bodies that the compiler makes vectors of are compiled for each
//! level (`bodies`).
//!
//! The level is detected once per process, by asking for every feature that its modules use; the
//! few functions for what fewer processors have (AVX-512 BF16, VBMI) are asked for by themselves. The
//! Cargo feature `scalar` leaves the scalar bodies only. There are faster versions for x86-64;
//! other processors run the scalar bodies, as the compiler vectorises them.

#[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
mod avx2;
#[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
mod avx512;
#[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
mod bodies;
pub(crate) mod points;
pub mod search;
pub(crate) mod splits;
mod sums;
#[cfg(test)]
mod tests;

pub use sums::{error_sums, first_nonfinite, ErrorSums};

use std::sync::OnceLock;

use crate::formats::borders;
use crate::formats::significands::{self, Significands};
use crate::formats::{
    e2m1, fp4_blocks, int4_rows, quanto_groups, rows8, scaled, torchao_int4, Weights,
};

/// An instruction set that this processor has. Values other than [`Level::SCALAR`] come from
/// detection only, so holding one proves that its instructions may be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(Tier);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tier {
    Scalar,
    #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
    Avx2,
    #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
    Avx512,
}

impl Level {
    /// No instructions beyond those every processor of the architecture has.
    pub const SCALAR: Level = Level(Tier::Scalar);

    /// Every level of this processor, slowest first.
    pub fn available() -> Vec<Level> {
        #[allow(unused_mut)]
        let mut levels = vec![Level::SCALAR];
        #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("fma")
        {
            levels.push(Level(Tier::Avx2));
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                levels.push(Level(Tier::Avx512));
            }
        }
        levels
    }

    /// `scalar`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Tier::Scalar => "scalar",
            #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
            Tier::Avx2 => "avx2",
            #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
            Tier::Avx512 => "avx512",
        }
    }
}

/// The fastest level of this processor, detected on the first call.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| Level::available().pop().unwrap_or(Level::SCALAR))
}

/// Groups of BF16 that [`encode_bf16_groups`] and [`encode_bf16_pairs`] take at a time: as many scales fill a vector.
pub(crate) const GROUPS: usize = 16;
/// They are of a multiple of as many weights.
pub(crate) const GROUP_STEP: usize = 64;

/// Scales of blocks of `torchao:mxfp8`, up to [`significands::MX_BLOCKS`], and the codes of whole runs of BF16 weights;
/// the bits that are set in what it gives are those of runs with weights that cannot be looked up.
#[allow(unused_variables)]
pub(crate) fn look_up_mxfp8(
    level: Level,
    table: &[u8; significands::COUNT],
    weights: &[[u8; 2]],
    codes: &mut [u8],
    scales: &mut [u8],
) -> u32 {
    match level.0 {
        // SAFETY: this level comes from detection only.
        #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
        Tier::Avx512 => unsafe { avx512::look_up_mxfp8(table, weights, codes, scales) },
        _ => u32::MAX,
    }
}

/// `quanto_groups::encode` for BF16 whose groups lie as `Sharing::Neighbours` says, by comparing with the borders of
/// codes; gives the number of groups done of each lane, [`GROUPS`] of all lanes at a time.
#[allow(unused_variables)]
pub(crate) fn encode_bf16_groups(
    level: Level,
    groups: quanto_groups::Groups,
    dividends: &borders::Dividends,
    lanes: &quanto_groups::Lanes<'_>,
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    match level.0 {
        // SAFETY: this level comes from detection only.
        #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
        Tier::Avx512 => unsafe {
            avx512::encode_bf16_groups(groups, dividends, lanes, pairs, codes)
        },
        _ => 0,
    }
}

/// `torchao_int4::encode` for BF16; gives the number of groups done, [`GROUPS`] at a time.
#[allow(unused_variables)]
pub(crate) fn encode_bf16_pairs(
    level: Level,
    size: usize,
    dtype: crate::dtype::Dtype,
    weights: &[[u8; 2]],
    pairs: &mut [u8],
    codes: &mut [u8],
) -> usize {
    match level.0 {
        // SAFETY: this level comes from detection only.
        #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
        Tier::Avx512 => unsafe { avx512::encode_bf16_pairs(size, dtype, weights, pairs, codes) },
        _ => 0,
    }
}

/// Asks for the memory that lies `bytes` behind `values`, so that it is nearer once it is read.
#[inline(always)]
#[allow(unused_variables)]
pub(crate) fn ahead<T>(values: &[T], bytes: usize) {
    #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
    for line in (0..std::mem::size_of_val(values)).step_by(64) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        let address = values.as_ptr().cast::<i8>().wrapping_add(bytes + line);
        // SAFETY: a hint, which takes any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
}

/// Defines the functions that scalar bodies offer their work to. After the name stand the modules
/// that have a version: for AVX2, and for AVX-512 (where the AVX2 version may serve as well).
macro_rules! offers {
    ($(
        $(#[$doc:meta])*
        fn $name:ident [$avx2:ident $avx512:ident] ($($arg:ident: $type:ty),* $(,)?)
            -> $done:ty = $none:expr;
    )*) => {$(
        $(#[$doc])*
        #[allow(unused_variables, clippy::too_many_arguments)]
        pub(crate) fn $name(level: Level, $($arg: $type),*) -> $done {
            match level.0 {
                Tier::Scalar => $none,
                // SAFETY: this level comes from detection only, so the processor has every
                // feature that the function is compiled for.
                #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
                Tier::Avx2 => unsafe { $avx2::$name($($arg),*) },
                // SAFETY: as above; this level includes the features of the one below.
                #[cfg(all(target_arch = "x86_64", not(feature = "scalar")))]
                Tier::Avx512 => unsafe { $avx512::$name($($arg),*) },
            }
        }
    )*};
}

offers! {
    /// `crate::float::widen` for F16; gives the number of weights done.
    fn widen_f16 [avx2 avx512] (bytes: &[u8], weights: &mut [f32]) -> usize = 0;
    /// `crate::float::widen` for BF16; gives the number of weights done.
    fn widen_bf16 [avx2 avx512] (bytes: &[u8], weights: &mut [f32]) -> usize = 0;
    /// `crate::float::narrow` for F16; gives the number of weights done.
    fn narrow_f16 [avx2 avx512] (weights: &[f32], bytes: &mut [u8]) -> usize = 0;
    /// `crate::float::narrow` for BF16; gives the number of weights done.
    fn narrow_bf16 [avx2 avx512] (weights: &[f32], bytes: &mut [u8]) -> usize = 0;
    /// Number of weights at the front that were looked at and are finite.
    fn finite_prefix [avx2 avx512] (weights: &[f32]) -> usize = 0;
    /// Error sums of a run, lane by lane; whether it was done.
    fn error_run [avx2 avx512] (
        x: &[f32; sums::RUN],
        y: &[f32; sums::RUN],
        lanes: &mut sums::RunLanes,
    ) -> bool = false;
    /// Largest magnitude of whole blocks of 4-bit weights; gives the number of blocks done.
    fn measure_4bit [avx2 avx2] (size: usize, weights: &[f32], absmax: &mut [[u8; 4]])
        -> usize = 0;
    /// Codes of whole blocks of 4-bit weights; gives the number of blocks done. `absmax` is at
    /// least `least` before it is divided by.
    fn encode_4bit [avx2 avx512] (
        codebook: &crate::codebook::Codebook,
        least: f32,
        size: usize,
        weights: &[f32],
        absmax: &[[u8; 4]],
        codes: &mut [u8],
    ) -> usize = 0;
    /// Weights of whole blocks of 4-bit codes; gives the number of blocks done.
    fn decode_4bit [avx2 avx512] (
        values: &[f32; 16],
        size: usize,
        codes: &[u8],
        absmax: &[[u8; 4]],
        weights: &mut [f32],
    ) -> usize = 0;
    /// Number of weights done, and bits of their largest magnitude after rounding to F16.
    fn most_f16 [avx2 avx512] (weights: &[f32]) -> (usize, u32) = (0, 0);
    /// Codes of an int8 row, given the scale; gives the number of weights done.
    fn encode_int8 [avx2 avx512] (scale: f32, weights: &[f32], codes: &mut [u8]) -> usize = 0;
    /// Weights of an int8 row: (code·scale)·factor; gives the number of weights done.
    fn decode_int8 [avx2 avx512] (codes: &[u8], scale: f32, factor: f32, weights: &mut [f32])
        -> usize = 0;
    /// `rows8::largest`, `rows8::encode` and `rows8::decode`, whose bodies are compiled for each level.
    fn largest_weight [avx2 avx512] (weights: Weights<'_>) -> f32 = rows8::largest_body(weights);
    fn encode_row8 [avx2 avx512] (
        kind: rows8::Codes,
        scaling: rows8::Scaling,
        size: usize,
        factors: &[f32],
        weights: Weights<'_>,
        codes: &mut [u8],
        ahead: usize,
    ) -> () = rows8::encode_body::<false>(kind, scaling, size, factors, weights, codes, ahead);
    fn decode_row8 [avx2 avx512] (
        kind: rows8::Codes,
        zero: i8,
        scale: f32,
        codes: &[u8],
        weights: &mut [f32],
    ) -> () = rows8::decode_body(kind, zero, scale, codes, weights);
    /// `rows8::encode_groups` and `rows8::decode_groups`, likewise.
    fn encode_groups8 [avx2 avx512] (
        grouping: &rows8::Grouping,
        weights: Weights<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> () = rows8::encode_groups_body(grouping, weights, codes, scales);
    fn decode_groups8 [avx2 avx512] (
        size: usize,
        dtype: crate::dtype::Dtype,
        codes: &[u8],
        scales: &[u8],
        zeros: &[u8],
        weights: &mut [f32],
    ) -> () = rows8::decode_groups_body(size, dtype, codes, scales, zeros, weights);
    /// E4M3 codes of whole runs of BF16 weights, up to 64 of them, each `size` weights by a table of their own; the
    /// bits that are set in what it gives are those of runs with weights that cannot be looked up.
    fn look_up_e4m3 [avx2 avx512] (
        tables: &[Significands],
        size: usize,
        weights: &[[u8; 2]],
        codes: &mut [u8],
        ahead: usize,
    ) -> u64 = u64::MAX;
    /// Largest magnitudes of the squares of `scaled`, likewise.
    fn measure_squares [avx2 avx512] (
        squares: scaled::Squares,
        start: usize,
        end: usize,
        weights: Weights<'_>,
        largest: &mut [f32],
    ) -> () = scaled::measure_squares_body(squares, start, end, weights, largest);
    /// `quanto_groups::encode`, likewise.
    fn encode_shared_groups [avx2 avx512] (
        groups: quanto_groups::Groups,
        sharing: quanto_groups::Sharing,
        lanes: &quanto_groups::Lanes<'_>,
        pairs: &mut [u8],
        codes: &mut [u8],
    ) -> Result<(), quanto_groups::Beyond>
        = quanto_groups::encode_body::<false>(groups, sharing, lanes, pairs, codes);
    /// The encoder of `int4_rows`, likewise.
    fn encode_int4_rows [avx2 avx512] (
        block: usize,
        weights: Weights<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> () = int4_rows::encode_body::<false>(block, weights, codes, scales);
    /// Encoder of groups of `torchao_int4`, and its decoder of one, likewise.
    fn encode_pairs [avx2 avx512] (
        size: usize,
        dtype: crate::dtype::Dtype,
        weights: Weights<'_>,
        pairs: &mut [u8],
        codes: &mut [u8],
    ) -> usize = torchao_int4::encode_body::<false>(size, dtype, weights, pairs, codes);
    fn take_pairs [avx2 avx512] (scale: f32, zero: f32, codes: &[u8], weights: &mut [f32]) -> ()
        = torchao_int4::take_body(scale, zero, codes, weights);
    /// `e2m1::encode` and `e2m1::decode`; give the number of weights done.
    fn encode_e2m1 [avx2 avx512] (
        rounding: e2m1::Rounding,
        scaling: e2m1::Scaling,
        weights: &[f32],
        packed: &mut [u8],
    ) -> usize = 0;
    fn decode_e2m1 [avx2 avx2] (
        keeps_sign: bool,
        scale: f32,
        packed: &[u8],
        weights: &mut [f32],
    ) -> usize = 0;
    /// `fp4_blocks::encode` and `fp4_blocks::decode`, whose bodies are compiled for each level.
    fn encode_fp4_blocks [avx2 avx512] (
        rule: fp4_blocks::Rule,
        room: &mut fp4_blocks::Room,
        weights: Weights<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> () = fp4_blocks::encode_body(rule, room, weights, codes, scales, fp4_blocks::most_of_blocks, |rounding, scaling, weights, codes| {
        e2m1::encode(Level::SCALAR, rounding, scaling, weights, codes);
    });
    fn decode_fp4_blocks [avx2 avx512] (
        size: usize,
        keeps_sign: bool,
        kind: fp4_blocks::Scales,
        codes: &[u8],
        scales: &[u8],
        weights: &mut [f32],
    ) -> () = fp4_blocks::decode_body(size, kind, codes, scales, weights, |scale, codes, weights| {
        e2m1::decode(Level::SCALAR, keeps_sign, scale, codes, weights);
    });
    /// Q4_0 blocks; gives the number of blocks done, as all below.
    fn encode_q4_0 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_q4_0 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn encode_q4_1 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_q4_1 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn encode_q5_0 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_q5_0 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn encode_q5_1 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_q5_1 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn encode_q8_0 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_q8_0 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    /// Scales of runs of 32 weights, given their shares in the loss; gives the number of runs done.
    fn search_levels [avx2 avx512] (
        levels: &crate::codebook::Levels,
        epsilon: f32,
        tries: i8,
        weights: &[f32],
        shares: &[f32],
        scales: &mut [f32],
    ) -> usize = 0;
    /// Packed codes of runs of 32 weights, given inverse scales; gives the number of runs done.
    fn pack_levels [avx2 avx512] (
        levels: &crate::codebook::Levels,
        weights: &[f32],
        inverses: &[f32],
        packed: &mut [u8],
    ) -> usize = 0;
    /// Points for a run at up to [`points::MOST_TRIES`] scales, and their inverses; whether it was
    /// done.
    fn try_points [avx2 avx2] (
        lists: &points::Lists,
        run: points::Run<'_>,
        inverses: &[f32],
        scales: &[f32],
        tried: &mut points::Tried,
    ) -> bool = false;
    /// The point near a group of eight weights that is the best, given the three levels times the
    /// scale (and any number behind them), if it was looked for.
    fn nearest_point [avx2 avx2] (
        near: &[u16],
        x: &[f32; 8],
        shares: &[f32; 8],
        scaled: &[f32; 4],
    ) -> Option<u16> = None;
    /// The best cut of an IQ1_S run, given sums over the sorted weights; whether it was done.
    fn cut_s [avx2 avx2] (
        crosses: &[f32; splits::RUN_S + 1],
        powers: &[f32; splits::RUN_S + 1],
        shifted: &splits::Shifted,
        best: &mut splits::Best,
    ) -> bool = false;
    /// The best cut of an IQ1_M run, given sums over the sorted weights of each half; whether it was
    /// done.
    fn cut_m [avx2 avx2] (
        crosses: &[[f32; splits::RUN_M + 1]; 2],
        powers: &[[f32; splits::RUN_M + 1]; 2],
        shifted: &splits::Shifted,
        best: &mut splits::Best,
    ) -> bool = false;
    /// Searches over runs of 16 or 32 weights (`crate::formats::ggml_search`); whether it was done.
    fn fit_affine [avx2 avx512] (
        size: usize,
        search: &search::AffineSearch,
        weigh: search::Weigh<'_>,
        weights: &[f32],
        fits: &mut [search::Fit],
    ) -> bool = false;
    fn fit_symmetric [avx2 avx512] (
        size: usize,
        limit: u8,
        weigh: search::Weigh<'_>,
        weights: &[f32],
        fits: &mut [search::Fit],
    ) -> bool = false;
    fn fit_descent [avx2 avx512] (limit: u8, weights: &[f32], fits: &mut [search::Fit])
        -> bool = false;
    fn fit_positive [avx2 avx512] (
        size: usize,
        limit: u8,
        scales: &[f32],
        counts: &[f32],
        steps: &mut [f32],
        codes: &mut [u8],
    ) -> bool = false;
    /// Codes of sub-blocks of `size` weights; whether it was done.
    fn divided_codes [avx2 avx2] (
        size: usize,
        low: i32,
        high: i32,
        weights: &[f32],
        mins: &[f32],
        steps: &[f32],
        codes: &mut [u8],
    ) -> bool = false;
    /// K types; gives the number of blocks done, as all below.
    fn decode_q2_k [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn decode_q3_k [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn decode_q4_k [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn decode_q5_k [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn decode_q6_k [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    /// IQ types, given the points of the grid as numbers.
    fn decode_iq2_xxs [avx2 avx2] (grid: &[u16; 256], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn decode_iq2_xs [avx2 avx2] (grid: &[u16; 512], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn decode_iq2_s [avx2 avx2] (grid: &[u16; 1024], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn decode_iq3_xxs [avx2 avx2] (grid: &[u16; 256], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn decode_iq3_s [avx2 avx2] (grid: &[u16; 512], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn decode_iq1_s [avx2 avx2] (grid: &[u16; 2048], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn decode_iq1_m [avx2 avx2] (grid: &[u16; 2048], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    /// IQ types, given the levels.
    fn decode_iq4_nl [avx2 avx2] (levels: &[i8; 16], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn decode_iq4_xs [avx2 avx2] (levels: &[i8; 16], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    /// Microscaling types; to decode them, half of every scale is given.
    fn encode_mxfp4 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_mxfp4 [avx2 avx2] (scales: &[f32; 256], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    fn encode_nvfp4 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_nvfp4 [avx2 avx2] (scales: &[f32; 256], blocks: &[u8], weights: &mut [f32])
        -> usize = 0;
    /// Ternary types and their kin, and types for activations.
    fn encode_tq1_0 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_tq1_0 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn encode_tq2_0 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_tq2_0 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn encode_q1_0 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_q1_0 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn encode_q2_0 [avx2 avx2] (weights: &[f32], blocks: &mut [u8]) -> usize = 0;
    fn decode_q2_0 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn decode_q8_1 [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
    fn decode_q8_k [avx2 avx2] (blocks: &[u8], weights: &mut [f32]) -> usize = 0;
}
