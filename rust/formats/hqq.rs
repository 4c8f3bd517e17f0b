//! HQQ: whole numbers in groups, with a scale and a zero that are no whole numbers for each group, the codes
//! of weights that are far apart in one byte or word. Decoded only.
//!
//! A weight \[N, K\] called `m.weight` is seen as a table of L lines of W weights, in memory order. A group
//! has G weights: along axis 1 it is a line (W = G, L = N·K/G), along axis 0 a column (L = G, W = N·K/G). A
//! byte or word holds the codes of P lines; with H = ⌈L/P⌉, line pH + i is in row i of the codes, and the
//! first H lines are in the highest bits:
//!
//! | `packing` | type of `m.W_q` | P | bits of line pH + i |
//! |---|---|---|---|
//! | `8bit_u8` | U8 \[H, W\] | 1 | 0 … 7 |
//! | `4bit_u8` | U8 \[H, W\] | 2 | 4(1 − p) … |
//! | `3bit_32` | I32 \[H, W\] | 10 | 3(9 − p) …, zeros in lines from L on |
//! | `2bit_u8` | U8 \[H, W\] | 4 | 2(3 − p) … |
//! | `1bit_u8` | U8 \[H, W\] | 8 | 7 − p |
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `m.scale`, `m.zero` | F16, BF16 or F32 \[L, 1\], along axis 0 \[1, W\] | s and z of a group |
//! | `m.packing`, `m.shape`, `m.group_size`, `m.axis` | U8 \[…\] (ASCII), I64 \[2\], I32 \[\], I32 \[\] | what is above |
//! | the other names of [`RECORD`] | U8 or I32 | what decoding does not need |
//!
//! Codes that are stored as floats (`m.view_as_float`) are the same bytes. 5 and 6 bits are stored in 8, and
//! three values (1.58 bits) in 2.
//!
//! w = (code − z)·s in 64 bits, rounded to `f32`. hqq computes it in the type of the scales and rounds the
//! difference and the product to it, so that its own weights are a little further from the formula.
//!
//! Source: hqq 0.2.8 (`BitPack`, `Quantizer`, `HQQLinear.state_dict`), whose state transformers 4 saves as it
//! is; transformers 5.23 neither packs nor loads such models.

use super::{Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, Span};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::{float, shape};

/// Arrays beside codes, scales and zeros.
pub const RECORD: &[&str] = &[
    "packing",
    "shape",
    "group_size",
    "axis",
    "nbits",
    "view_as_float",
    "unpack_view_dtype",
    "compute_dtype",
    "quant_scale",
    "quant_zero",
    "channel_wise",
    "optimize",
    "round_zero",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
];

/// Names of the packings, and their numbers of bits.
pub const PACKINGS: &[(&str, u32)] = &[
    ("8bit_u8", 8),
    ("4bit_u8", 4),
    ("3bit_32", 3),
    ("2bit_u8", 2),
    ("1bit_u8", 1),
];

/// Weights whose scales are widened together.
const RUN: usize = 256;

/// What one weight says of its codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Bits of a code, one of [`PACKINGS`].
    pub bits: u32,
    /// Weights of a group.
    pub group: u64,
    /// Whether a group is a line (axis 1), and not a column (axis 0).
    pub is_line: bool,
    /// Type of scales and zeros.
    pub scale: Dtype,
}

impl Record {
    /// Type of the codes.
    pub fn dtype(&self) -> Dtype {
        match self.bits {
            3 => Dtype::I32,
            _ => Dtype::U8,
        }
    }

    /// Lines whose codes share a byte or word.
    fn sharing(&self) -> u64 {
        match self.bits {
            3 => 10,
            bits => u64::from(8 / bits.clamp(1, 8)),
        }
    }

    /// The table that `weights` weights are.
    fn table(&self, weights: u64) -> Result<Table> {
        let (group, sharing) = (self.group, self.sharing());
        let fits = group > 0 && weights > 0 && weights.is_multiple_of(group);
        if !fits {
            return Err(Error::format(format!(
                "{}: {weights} weights are not divided into groups of {group}",
                INFO.name
            )));
        }
        let (lines, width) = match self.is_line {
            true => (weights / group, group),
            false => (group, weights / group),
        };
        if self.bits != 3 && !lines.is_multiple_of(sharing) {
            return Err(Error::format(format!(
                "{}: {lines} lines of codes, expected a multiple of {sharing}, which share a byte",
                INFO.name
            )));
        }
        Ok(Table {
            width,
            rows: lines.div_ceil(sharing),
        })
    }
}

/// How the codes of a weight lie.
struct Table {
    /// Weights of a line.
    width: u64,
    /// Rows of bytes or words.
    rows: u64,
}

/// The format.
pub struct Hqq;

/// HQQ.
pub static HQQ: Hqq = Hqq;

static INFO: Info = Info {
    name: "hqq:int",
    short: None,
    container: "safetensors",
    exactness: Exactness::Exact,
    peer: "the published formula",
    reader: "hqq",
    bits_per_weight: 4.5,
    encodes: Encodes::Never,
};

fn record(params: &Params) -> Result<&Record> {
    params.hqq.as_ref().ok_or_else(|| {
        Error::unsupported(format!(
            "{}: is decoded, and not encoded, and only from a checkpoint, which says how it is packed",
            INFO.name
        ))
    })
}

impl Format for Hqq {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let of = record(params)?;
        if shape.len() != 2 {
            return Err(Error::format(format!(
                "{}: takes 2 dimensions, got shape {shape:?}",
                INFO.name
            )));
        }
        let weights = shape::count_weights(shape)?;
        let table = of.table(weights)?;
        let (element, scale) = (of.dtype().alignment(), of.scale.alignment());
        let codes = shape::multiply(table.rows, table.width, "codes of a weight")?;
        // Along axis 0 neighbours are of different groups, and the scales begin anew with every line.
        let (unit, scale_shape, scale_span) = match of.is_line {
            true => {
                let (weights, bytes) = (of.group, scale);
                let groups = shape::count_weights(shape)? / of.group;
                (weights, vec![groups, 1], Span::Blocks { weights, bytes })
            }
            false => {
                let span = Span::Repeated {
                    weights: 1,
                    bytes: scale,
                    period: shape::multiply(table.width, scale, "bytes of scales")?,
                };
                (1, vec![1, table.width], span)
            }
        };
        let array = |suffix: &'static str, dtype, shape, span| Component {
            suffix: suffix.into(),
            naming: Naming::Sibling,
            dtype,
            shape,
            span,
        };
        let code_span = Span::Repeated {
            weights: unit,
            bytes: shape::multiply(unit, element, "bytes of a line")?,
            period: shape::multiply(codes, element, "bytes of codes")?,
        };
        let mut components = vec![
            array("W_q", of.dtype(), vec![table.rows, table.width], code_span),
            array("scale", of.scale, scale_shape.clone(), scale_span),
            array("zero", of.scale, scale_shape, scale_span),
        ];
        let beside = RECORD.iter();
        components.extend(beside.map(|name| array(name, Dtype::U8, Vec::new(), Span::Whole)));
        Ok(Layout {
            shape: shape.to_vec(),
            weights,
            params: params.clone(),
            components,
            unit_weights: unit,
            statistics: None,
        })
    }

    fn decode(
        &self,
        layout: &Layout,
        first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let of = record(&layout.params)?;
        let table = of.table(layout.weights)?;
        let turn = shape::multiply(table.rows, table.width, "codes of a weight")?.max(1);
        let [mut codes, mut scales, mut zeros, ..] = *parts;
        let element = shape::to_usize(of.dtype().alignment())?;
        let scale = shape::to_usize(of.scale.alignment())?;
        let group = shape::to_usize(of.group)?;
        let (mut index, mut rest) = (first, weights);
        // Codes of one turn begin at the same bit.
        while !rest.is_empty() {
            let count = (turn - index % turn).min(rest.len() as u64);
            let part = index / turn;
            index += count;
            let count = shape::to_usize(count)?;
            let (here, later) = rest.split_at_mut(count);
            rest = later;
            let groups = if of.is_line { count / group } else { count };
            let here_codes = taken(&mut codes, count * element)?;
            let here_scales = taken(&mut scales, groups * scale)?;
            let here_zeros = taken(&mut zeros, groups * scale)?;
            let last = of.sharing().saturating_sub(1);
            let bit = of.bits * last.saturating_sub(part) as u32;
            let codes = Codes {
                bytes: here_codes,
                element,
                bit,
                mask: (1u32 << of.bits) - 1,
            };
            if of.is_line {
                codes.of_lines(of.scale, here_scales, here_zeros, group, here)?;
            } else {
                codes.of_columns(of.scale, here_scales, here_zeros, here)?;
            }
        }
        Ok(())
    }
}

/// Codes that begin at the same bit of bytes or words.
struct Codes<'b> {
    bytes: &'b [u8],
    /// Bytes of a word.
    element: usize,
    bit: u32,
    mask: u32,
}

impl Codes<'_> {
    /// Weights of whole groups, each with one scale and one zero.
    fn of_lines(
        &self,
        dtype: Dtype,
        scales: &[u8],
        zeros: &[u8],
        group: usize,
        weights: &mut [f32],
    ) -> Result<()> {
        let bytes = shape::to_usize(dtype.alignment())?;
        let groups = weights
            .chunks_exact_mut(group)
            .zip(self.bytes.chunks_exact(group * self.element))
            .zip(scales.chunks_exact(bytes).zip(zeros.chunks_exact(bytes)));
        for ((weights, codes), (scale, zero)) in groups {
            let (mut s, mut z) = ([0.0], [0.0]);
            float::widen(dtype, scale, &mut s, false)?;
            float::widen(dtype, zero, &mut z, false)?;
            let (s, z) = (f64::from(s[0]), f64::from(z[0]));
            self.each(codes, weights, |weight, code| {
                *weight = ((f64::from(code) - z) * s) as f32;
            });
        }
        Ok(())
    }

    /// Weights that each have a scale and a zero of their own.
    fn of_columns(
        &self,
        dtype: Dtype,
        scales: &[u8],
        zeros: &[u8],
        weights: &mut [f32],
    ) -> Result<()> {
        let bytes = shape::to_usize(dtype.alignment())?;
        let (mut s, mut z) = ([0.0; RUN], [0.0; RUN]);
        let runs = weights
            .chunks_mut(RUN)
            .zip(self.bytes.chunks(RUN * self.element))
            .zip(scales.chunks(RUN * bytes).zip(zeros.chunks(RUN * bytes)));
        for ((weights, codes), (scales, zeros)) in runs {
            let (s, _) = s.split_at_mut(weights.len());
            let (z, _) = z.split_at_mut(weights.len());
            float::widen(dtype, scales, s, false)?;
            float::widen(dtype, zeros, z, false)?;
            self.each(codes, weights, |weight, code| *weight = code as f32);
            for (weight, (s, z)) in weights.iter_mut().zip(s.iter().zip(z.iter())) {
                let difference = f64::from(*weight) - f64::from(*z);
                *weight = (difference * f64::from(*s)) as f32;
            }
        }
        Ok(())
    }

    /// Calls `take` with each weight and its code.
    #[inline(always)]
    fn each(&self, codes: &[u8], weights: &mut [f32], take: impl Fn(&mut f32, u32)) {
        if self.element == 1 {
            for (weight, code) in weights.iter_mut().zip(codes) {
                take(weight, u32::from(*code) >> self.bit & self.mask);
            }
        } else {
            let (words, _) = codes.as_chunks::<4>();
            for (weight, word) in weights.iter_mut().zip(words) {
                take(weight, u32::from_le_bytes(*word) >> self.bit & self.mask);
            }
        }
    }
}

/// The first `count` bytes, which are taken off.
fn taken<'b>(bytes: &mut &'b [u8], count: usize) -> Result<&'b [u8]> {
    let (taken, rest) = bytes
        .split_at_checked(count)
        .ok_or_else(|| Error::Internal(String::from("codes or scales are cut short")))?;
    *bytes = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(bits: u32, group: u64, is_line: bool, shape: &[u64]) -> Result<Layout> {
        let record = Record {
            bits,
            group,
            is_line,
            scale: Dtype::F32,
        };
        let params = Params {
            hqq: Some(record),
            ..Params::default()
        };
        HQQ.layout(shape, &params)
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    #[test]
    fn the_first_lines_are_in_the_highest_bits() {
        // Two groups of four: line 0 in the high nibbles, line 1 in the low ones.
        let layout = layout(4, 4, true, &[2, 4]).unwrap();
        let codes = [0x1f, 0x2e, 0x3d, 0x4c];
        let (scales, zeros) = (floats(&[1.0, 0.5]), floats(&[0.0, 8.0]));
        let twice = [codes, codes].concat();
        let mut found = [0.0; 8];
        let parts: Parts<'_> = [&twice, &scales, &zeros, &[]];
        HQQ.decode(&layout, 0, &parts, &mut found).unwrap();
        assert_eq!(found, [1.0, 2.0, 3.0, 4.0, 3.5, 3.0, 2.5, 2.0]);
        // The second group by itself.
        let parts: Parts<'_> = [&codes, &scales[4..], &zeros[4..], &[]];
        HQQ.decode(&layout, 4, &parts, &mut found[..4]).unwrap();
        assert_eq!(found[..4], [3.5, 3.0, 2.5, 2.0]);
    }

    #[test]
    fn sizes_that_are_not_divided_are_refused() {
        for (bits, group, shape) in [
            (4, 0, vec![2, 4]),
            (4, 3, vec![2, 4]),
            (4, 8, vec![2, 4]),
            (2, 4, vec![2, 4]),
            (8, 4, vec![0, 4]),
            (8, 4, vec![8]),
            (8, 4, vec![u64::MAX, u64::MAX]),
        ] {
            assert!(
                layout(bits, group, true, &shape).is_err(),
                "{bits} {group} {shape:?}"
            );
        }
        let padded = layout(3, 4, true, &[3, 4]).unwrap();
        assert_eq!(padded.components[0].shape, [1, 4]);
        let columns = layout(3, 12, false, &[3, 8]).unwrap();
        assert_eq!(columns.components[0].shape, [2, 2]);
        assert_eq!(columns.components[1].shape, [1, 2]);
    }
}
