//! The portable bodies for rows and groups of bytes and of small floats, compiled for the vectors of a level.

/// Defines the kernels with the given target features enabled. Those for blocks take parts that are written
/// for the level from its module.
macro_rules! bodies {
    ($level:ident, $features:literal) => {
        use crate::dtype::Dtype;
        use crate::formats::rows8::{self, Codes, Grouping, Scaling};
        use crate::formats::{fp4_blocks, int4_rows, quanto_groups, scaled, torchao_int4, Weights};

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn measure_squares(
            squares: scaled::Squares,
            start: usize,
            end: usize,
            weights: Weights<'_>,
            largest: &mut [f32],
        ) {
            scaled::measure_squares_body(squares, start, end, weights, largest);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn largest_weight(weights: Weights<'_>) -> f32 {
            rows8::largest_body(weights)
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn encode_row8(
            kind: Codes,
            scaling: Scaling,
            size: usize,
            factors: &[f32],
            weights: Weights<'_>,
            codes: &mut [u8],
            ahead: usize,
        ) {
            rows8::encode_body::<true>(kind, scaling, size, factors, weights, codes, ahead);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn decode_row8(
            kind: Codes,
            zero: i8,
            scale: f32,
            codes: &[u8],
            weights: &mut [f32],
        ) {
            rows8::decode_body(kind, zero, scale, codes, weights);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn encode_groups8(
            grouping: &Grouping,
            weights: Weights<'_>,
            codes: &mut [u8],
            scales: &mut [u8],
        ) {
            rows8::encode_groups_body(grouping, weights, codes, scales);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn decode_groups8(
            size: usize,
            dtype: Dtype,
            codes: &[u8],
            scales: &[u8],
            zeros: &[u8],
            weights: &mut [f32],
        ) {
            rows8::decode_groups_body(size, dtype, codes, scales, zeros, weights);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn encode_shared_groups(
            groups: quanto_groups::Groups,
            sharing: quanto_groups::Sharing,
            lanes: &quanto_groups::Lanes<'_>,
            pairs: &mut [u8],
            codes: &mut [u8],
        ) -> Result<(), quanto_groups::Beyond> {
            quanto_groups::encode_body::<true>(groups, sharing, lanes, pairs, codes)
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn encode_int4_rows(
            block: usize,
            weights: Weights<'_>,
            codes: &mut [u8],
            scales: &mut [u8],
        ) {
            int4_rows::encode_body::<true>(block, weights, codes, scales);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn encode_pairs(
            size: usize,
            dtype: Dtype,
            weights: Weights<'_>,
            pairs: &mut [u8],
            codes: &mut [u8],
        ) -> usize {
            torchao_int4::encode_body::<true>(size, dtype, weights, pairs, codes)
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn take_pairs(
            scale: f32,
            zero: f32,
            codes: &[u8],
            weights: &mut [f32],
        ) {
            torchao_int4::take_body(scale, zero, codes, weights);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn encode_fp4_blocks(
            rule: fp4_blocks::Rule,
            room: &mut fp4_blocks::Room,
            weights: Weights<'_>,
            codes: &mut [u8],
            scales: &mut [u8],
        ) {
            let pack = |rounding, scaling, weights: &[f32], codes: &mut [u8]| {
                crate::kernels::$level::encode_e2m1(rounding, scaling, weights, codes);
            };
            let most = |size, weights: &[f32], largest: &mut [f32]| {
                crate::kernels::$level::most_of_blocks(size, weights, largest);
            };
            fp4_blocks::encode_body(rule, room, weights, codes, scales, most, pack);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels) fn decode_fp4_blocks(
            size: usize,
            keeps_sign: bool,
            kind: fp4_blocks::Scales,
            codes: &[u8],
            scales: &[u8],
            weights: &mut [f32],
        ) {
            let unpack = |scale, codes: &[u8], weights: &mut [f32]| {
                crate::kernels::avx2::decode_e2m1(keeps_sign, scale, codes, weights);
            };
            fp4_blocks::decode_body(size, kind, codes, scales, weights, unpack);
        }
    };
}
pub(super) use bodies;
