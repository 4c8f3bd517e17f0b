//! E4M3 codes of BF16 weights, looked up by significand.
//!
//! A weight is ±2^e·(1 + s/128). Its code, after a product with or a quotient by one number, is c(s) + 8·e but for
//! a constant, as long as nothing is subnormal: a power of two changes neither how the quotient is rounded nor how
//! the code is. So 128 codes, made by the arithmetic of [`super::rows8`] once for each such number, serve all
//! weights that share it. Smaller weights, of which there are few, and what is not finite are left to that
//! arithmetic.

use std::sync::OnceLock;

use super::rows8::{Codes, Scaling};
use super::weights::Weights;
use crate::float8::to_e4m3;
use crate::kernels::{self, Level};

/// The codes of weights with one exponent.
#[derive(Debug, Clone, Copy)]
// Where no level looks up, nobody reads them.
#[cfg_attr(any(feature = "scalar", not(target_arch = "x86_64")), allow(dead_code))]
pub(crate) struct Significands {
    /// Codes of the significands, in order, with the least exponent.
    pub(crate) codes: [u8; COUNT],
    /// The least exponent (with its bias) whose codes are all normal. Those of the [`EXPONENTS`] beginning with it
    /// are these codes and 8 for each step, but 0x7e at most.
    pub(crate) least: u8,
}

/// Significands of BF16.
pub(crate) const COUNT: usize = 128;
/// E4M3 has as many exponents; beyond them there is nothing but the largest code.
pub(crate) const EXPONENTS: u8 = 16;
/// Weights that are looked up at a time.
pub(crate) const RUN: usize = 64;
/// Blocks of 32 weights whose scales are looked for together.
pub(crate) const MX_BLOCKS: usize = 64;
/// Most runs of a call, each of which has a bit of its answer.
const MOST_RUNS: usize = 64;
/// As many weights are worth a table.
const WORTH: usize = 512;

impl Significands {
    /// Those for `count` of `weights` that share `factor`, where looking up is faster than the arithmetic.
    pub(super) fn new(
        level: Level,
        kind: Codes,
        scaling: Scaling,
        factor: f32,
        weights: Weights<'_>,
        count: usize,
    ) -> Option<Self> {
        /// The least normal number of E4M3.
        const LEAST: f32 = 1.0 / 64.0;
        let is_looked_up = kind == Codes::E4m3 && matches!(weights, Weights::BF16(_));
        if !is_looked_up || count < WORTH || level == Level::SCALAR {
            return None;
        }
        let border = match scaling {
            Scaling::Product => LEAST / factor,
            Scaling::Quotient(_) => LEAST * factor,
        };
        // One more than that of the border, which may itself be rounded.
        let least = (border.to_bits() >> 23) + 1;
        // Neither the border nor any number that is looked up is subnormal, infinite or NaN.
        if !border.is_normal() || border < 0.0 || least + u32::from(EXPONENTS) > 254 {
            return None;
        }
        let bits: [u16; COUNT] = std::array::from_fn(|index| (least << 7) as u16 | index as u16);
        let weights = bits.map(u16::to_le_bytes);
        let mut codes = [0; COUNT];
        let weights = Weights::BF16(&weights);
        let factors = [factor];
        kernels::encode_row8(
            level,
            Codes::E4m3,
            scaling,
            COUNT,
            &factors,
            weights,
            &mut codes,
            0,
        );
        Some(Significands {
            codes,
            least: least as u8,
        })
    }
}

/// The exponent below which weights become zero, given the least of a table. No weight of the latter is more than
/// 2⁻⁴ when it is scaled, and what is 7 exponents less is below half the least number of E4M3, which is 2⁻⁹.
#[inline]
#[cfg_attr(any(feature = "scalar", not(target_arch = "x86_64")), allow(dead_code))]
pub(crate) fn tiny(least: u8) -> u8 {
    least.saturating_sub(6)
}

/// Codes of weights, each `size` of them by a table of their own; if there is more than one, that is a multiple of
/// [`RUN`]. Runs with others than those that can be looked up are left to `compute`, with the number of the table.
pub(super) fn encode(
    level: Level,
    tables: &[Significands],
    size: usize,
    weights: &[[u8; 2]],
    codes: &mut [u8],
    ahead: usize,
    compute: impl Fn(usize, Weights<'_>, &mut [u8]),
) {
    // Several tables at once if they serve few weights, parts of what one serves if these are many.
    let together = (MOST_RUNS * RUN / size).max(1);
    let blocks = weights
        .chunks(size * together)
        .zip(codes.chunks_mut(size * together));
    for (number, ((weights, codes), tables)) in blocks.zip(tables.chunks(together)).enumerate() {
        let parts = weights
            .chunks(MOST_RUNS * RUN)
            .zip(codes.chunks_mut(MOST_RUNS * RUN));
        for (weights, codes) in parts {
            let table = |at: usize| number * together + at / size;
            let mut missed = kernels::look_up_e4m3(level, tables, size, weights, codes, ahead);
            if missed.trailing_ones() as usize >= weights.len() / RUN {
                compute(table(0), Weights::BF16(weights), codes);
                continue;
            }
            while missed != 0 {
                let at = RUN * missed.trailing_zeros() as usize;
                let (weights, codes) = (&weights[at..at + RUN], &mut codes[at..at + RUN]);
                compute(table(at), Weights::BF16(weights), codes);
                missed &= missed - 1;
            }
            let at = weights.len() - weights.len() % RUN;
            if let last @ [_, ..] = &weights[at..] {
                compute(table(at), Weights::BF16(last), &mut codes[at..]);
            }
        }
    }
}

/// Codes and scales of blocks of 32 weights that share a power of two as `torchao:mxfp8` has it, of at most
/// [`MX_BLOCKS`]. Runs with others than those that can be looked up are left to `compute`.
pub(super) fn encode_mxfp8(
    level: Level,
    weights: &[[u8; 2]],
    codes: &mut [u8],
    scales: &mut [u8],
    mut compute: impl FnMut(Weights<'_>, &mut [u8], &mut [u8]),
) {
    let missed = kernels::look_up_mxfp8(level, table_of_one(), weights, codes, scales);
    let runs = weights.len() / RUN;
    if missed.trailing_ones() as usize >= runs {
        return compute(Weights::BF16(weights), codes, scales);
    }
    let parts = weights.chunks(RUN).zip(codes.chunks_mut(RUN));
    for (run, ((weights, codes), scales)) in parts.zip(scales.chunks_mut(2)).enumerate() {
        if run >= runs || missed >> run & 1 == 1 {
            compute(Weights::BF16(weights), codes, scales);
        }
    }
}

/// Codes of the significands as they are, from 1/64 on.
fn table_of_one() -> &'static [u8; COUNT] {
    static TABLE: OnceLock<[u8; COUNT]> = OnceLock::new();
    TABLE.get_or_init(|| {
        std::array::from_fn(|index| to_e4m3((1.0 + index as f32 / COUNT as f32) / 64.0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    #[test]
    fn codes_rise_by_one_and_no_more_than_twice_within_sixteen() {
        for level in Level::available() {
            for bits in (0..1 << 23).step_by(1021) {
                let factor = f32::from_bits(127 << 23 | bits);
                for scaling in [
                    Scaling::Product,
                    Scaling::Quotient(Dtype::F32),
                    Scaling::Quotient(Dtype::BF16),
                    Scaling::Quotient(Dtype::F16),
                ] {
                    let given = Weights::BF16(&[]);
                    let made = Significands::new(level, Codes::E4m3, scaling, factor, given, WORTH);
                    let Some(Significands { codes, .. }) = made else {
                        assert_eq!(level, Level::SCALAR);
                        continue;
                    };
                    assert!(codes[0] >= 8 && codes[COUNT - 1] <= codes[0] + 8);
                    for pair in codes.windows(2) {
                        assert!(pair[1] == pair[0] || pair[1] == pair[0] + 1, "{factor:e}");
                    }
                    for block in codes.chunks(16) {
                        assert!(block[15] <= block[0] + 2, "{factor:e}");
                    }
                }
            }
        }
    }
}
