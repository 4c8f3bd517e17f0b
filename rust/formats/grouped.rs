//! Whole numbers in groups of columns, each group of a row with a scale and a zero: what GPTQ, AWQ and
//! compressed-tensors store for a weight \[N, K\] called `m.weight`. Decoded only.
//!
//! | format | array | type, shape in the file | holds |
//! |---|---|---|---|
//! | GPTQ | `m.qweight` | I32 \[K·b/32, N\] | codes of a column of words: bits of k follow each other, lowest first |
//! | | `m.scales` | F16, BF16 or F32 \[G, N\] | scale of group g |
//! | | `m.qzeros` | I32 \[G, N·b/32\] | zero of group g, bits of n follow each other; one less than the zero in `checkpoint_format` "gptq" |
//! | | `m.g_idx` | I32 \[K\] | group of column k; where it is missing, k ÷ group size |
//! | AWQ | `m.qweight` | I32 \[K, N/8\] | nibble i of a word is row 0 2 4 6 1 3 5 7 of eight |
//! | | `m.scales`, `m.qzeros` | F16 \[G, N\], I32 \[G, N/8\] | as the codes |
//! | compressed-tensors | `m.weight_packed` | I32 \[N, ⌈K·b/32⌉\] | codes of a row: bits of k follow each other, lowest first; the number plus 2^(b−1) |
//! | | `m.weight_scale` | \[N, G\] | scale |
//! | | `m.weight_zero_point` | I32 \[⌈N·b/32⌉, G\] | zero plus 2^(b−1); where it is missing, that alone |
//! | | `m.weight_shape`, `m.weight_g_idx` | I64 \[2\], I32 \[K\] | N and K; group of column k |
//!
//! w = (code − zero)·scale: the difference is exact, the product rounded once to `f32`, and once more where
//! it is stored in 16 bits. For 16-bit scales the product is exact, so that this is the peers' result in
//! the scales' own type.
//!
//! Arrays that the file holds column by column are read with rows and columns exchanged; the components
//! have the shapes of the result.
//!
//! Sources: GPTQModel 4 and AutoGPTQ 0.7 (`pack`, `dequantize`), AutoAWQ 0.2 (`packing_utils`),
//! compressed-tensors 0.13 (`pack_quantized`).

use std::sync::Arc;

use super::{Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, Span};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::{float, shape};

/// Bits of a word.
const WORD: u64 = 32;

/// Which nibble of an AWQ word holds row 0..8.
const AWQ_NIBBLES: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// What one weight says about its codes; told by the arrays' shapes and the model's config.
#[derive(Debug, Clone, PartialEq)]
pub struct Integers {
    /// Bits of a code, 1 to 8.
    pub bits: u64,
    /// Columns of a group where `order` does not say otherwise.
    pub group: u64,
    /// Groups of a row.
    pub groups: u64,
    /// Type of the scales.
    pub scale: Dtype,
    /// Added to a stored zero; `None` where the zero is 2^(bits − 1) everywhere.
    pub zero: Option<i32>,
    /// Group of each column.
    pub order: Option<Arc<[u32]>>,
}

/// How the codes of a family lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Codes {
    /// Bits of a row one after the other.
    Rows,
    /// Words of one column of eight rows.
    Eights,
}

/// One family of files.
pub struct Grouped {
    info: &'static Info,
    codes: Codes,
    /// Names of codes, scales and zeros, and of arrays that only say how these are read.
    names: [&'static str; 3],
    others: &'static [&'static str],
    transposed: bool,
}

const fn info(name: &'static str, peer: &'static str) -> Info {
    Info {
        name,
        short: None,
        container: "safetensors",
        exactness: Exactness::Exact,
        peer,
        reader: "transformers, vLLM",
        bits_per_weight: 4.25,
        encodes: Encodes::Never,
    }
}

static GPTQ_INFO: Info = info("gptq:int", "the published formula");
static AWQ_INFO: Info = info("awq:int", "the published formula");
static COMPRESSED_INFO: Info = info("compressed-tensors:int", "the published formula");

/// GPTQ.
pub static GPTQ: Grouped = Grouped {
    info: &GPTQ_INFO,
    codes: Codes::Rows,
    names: ["qweight", "scales", "qzeros"],
    others: &["g_idx"],
    transposed: true,
};
/// AWQ, in the layout of its GEMM kernels.
pub static AWQ: Grouped = Grouped {
    info: &AWQ_INFO,
    codes: Codes::Eights,
    names: ["qweight", "scales", "qzeros"],
    others: &[],
    transposed: true,
};
/// compressed-tensors, `pack-quantized`.
pub static COMPRESSED: Grouped = Grouped {
    info: &COMPRESSED_INFO,
    codes: Codes::Rows,
    names: ["weight_packed", "weight_scale", "weight_zero_point"],
    others: &["weight_shape", "weight_g_idx"],
    transposed: false,
};

impl Grouped {
    fn integers<'p>(&self, params: &'p Params) -> Result<&'p Integers> {
        params.integers.as_deref().ok_or_else(|| {
            Error::unsupported(format!(
                "{}: is decoded, and not encoded, and only from a checkpoint, which says how it is packed",
                self.info.name
            ))
        })
    }

    /// Rows that share words of zeros or codes, and the words they share.
    fn shared_rows(&self, of: &Integers) -> (u64, u64) {
        match self.codes {
            Codes::Eights => (8, 1),
            Codes::Rows if of.zero.is_none() => (1, 0),
            Codes::Rows => {
                let common = 1 << of.bits.trailing_zeros().min(5);
                (WORD / common, of.bits / common)
            }
        }
    }
}

impl Format for Grouped {
    fn info(&self) -> &'static Info {
        self.info
    }

    fn transposed_element(&self, layout: &Layout, component: usize) -> Option<u64> {
        let array = layout.components.get(component)?;
        (self.transposed && component < 3).then(|| array.dtype.alignment())
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let of = self.integers(params)?;
        let &[rows, columns] = shape else {
            return Err(Error::format(format!(
                "{}: takes 2 dimensions, got shape {shape:?}",
                self.info.name
            )));
        };
        let fits = (1..=8).contains(&of.bits) && of.group > 0 && of.groups > 0;
        let (shared, words) = self.shared_rows(of);
        if !fits || columns == 0 || (words > 1 && !rows.is_multiple_of(shared)) {
            return Err(Error::format(format!(
                "{}: shape {shape:?} in {} groups of {} columns with {} bits",
                self.info.name, of.groups, of.group, of.bits
            )));
        }
        let row_words = shape::multiply(columns, of.bits, "bits of a row")?.div_ceil(WORD);
        let row = |bytes: u64| Span::Blocks {
            weights: columns,
            bytes,
        };
        let unit = shape::multiply(shared, columns, "weights of rows that share words")?;
        let together = |bytes: u64| Span::Blocks {
            weights: unit,
            bytes,
        };
        let array = |position: usize, dtype, shape, span| Component {
            suffix: self.names[position].into(),
            naming: Naming::Sibling,
            dtype,
            shape,
            span,
        };
        let units = rows.div_ceil(shared);
        let (code_shape, code_span) = match self.codes {
            Codes::Rows => (vec![rows, row_words], row(row_words * 4)),
            Codes::Eights => (vec![units, columns], together(columns * 4)),
        };
        let mut components = vec![
            array(0, Dtype::I32, code_shape, code_span),
            array(
                1,
                of.scale,
                vec![rows, of.groups],
                row(of.groups * of.scale.alignment()),
            ),
        ];
        if of.zero.is_some() {
            components.push(array(
                2,
                Dtype::I32,
                vec![units * words, of.groups],
                together(words * of.groups * 4),
            ));
        }
        for name in self.others {
            let (dtype, shape) = match *name {
                "weight_shape" => (Dtype::I64, vec![2]),
                _ => (Dtype::I32, vec![columns]),
            };
            components.push(Component {
                suffix: (*name).into(),
                naming: Naming::Sibling,
                dtype,
                shape,
                span: Span::Whole,
            });
        }
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components,
            unit_weights: unit,
            statistics: None,
        })
    }

    fn decode(
        &self,
        layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let of = self.integers(&layout.params)?;
        let columns = shape::to_usize(shape::row_weights(&layout.shape))?;
        let groups = shape::to_usize(of.groups)?;
        let (shared, _) = self.shared_rows(of);
        let [codes, scales, zeros, ..] = *parts;
        let row_bytes = columns.saturating_mul(of.bits as usize).div_ceil(32) * 4;
        let scale_bytes = groups * of.scale.alignment() as usize;
        for (row, weights) in weights.chunks_exact_mut(columns.max(1)).enumerate() {
            let inside = row as u64 % shared;
            let before = row as u64 / shared;
            let scales = part(scales, row * scale_bytes, scale_bytes)?;
            let values = |group: usize| -> Result<(i32, f32)> {
                let zero = match of.zero {
                    None => 1 << (of.bits - 1),
                    Some(added) => added + self.zero(of, zeros, before, inside, group)? as i32,
                };
                Ok((zero, scale(of.scale, scales, group)?))
            };
            match self.codes {
                Codes::Rows => {
                    let bytes = part(codes, row * row_bytes, row_bytes)?;
                    for (first, run) in runs(of, weights) {
                        let (zero, scale) = values(group_of(of, first, groups)?)?;
                        unpack(bytes, first, of.bits, run, |code| {
                            (code as i32 - zero) as f32 * scale
                        });
                    }
                }
                Codes::Eights => {
                    let words = part(codes, before as usize * columns * 4, columns * 4)?;
                    let (words, _) = words.as_chunks::<4>();
                    let shift = 4 * AWQ_NIBBLES[inside as usize];
                    for (first, run) in runs(of, weights) {
                        let (zero, scale) = values(group_of(of, first, groups)?)?;
                        for (weight, word) in run.iter_mut().zip(&words[first..]) {
                            let code = (u32::from_le_bytes(*word) >> shift) & 15;
                            *weight = (code as i32 - zero) as f32 * scale;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

impl Grouped {
    /// The stored zero of a group, in row `inside` of the rows that share words, `before` such sets
    /// before it.
    fn zero(
        &self,
        of: &Integers,
        zeros: &[u8],
        before: u64,
        inside: u64,
        group: usize,
    ) -> Result<u32> {
        let (_, words) = self.shared_rows(of);
        let word = |index: u64| -> Result<u64> {
            let row = shape::to_usize(before * words + index)?;
            let bytes = part(zeros, (row * of.groups as usize + group) * 4, 4)?;
            Ok(bytes
                .iter()
                .rev()
                .fold(0, |word, byte| word << 8 | u64::from(*byte)))
        };
        let bit = match self.codes {
            Codes::Eights => u64::from(4 * AWQ_NIBBLES[inside as usize]),
            Codes::Rows => inside * of.bits,
        };
        let (index, shift) = (bit / WORD, bit % WORD);
        let mut found = word(index)? >> shift;
        if shift + of.bits > WORD {
            found |= word(index + 1)? << (WORD - shift);
        }
        Ok((found & ((1 << of.bits) - 1)) as u32)
    }
}

/// Runs of columns of one group: each with the first column.
fn runs<'w>(of: &Integers, weights: &'w mut [f32]) -> impl Iterator<Item = (usize, &'w mut [f32])> {
    // Columns in an order of their own are looked up one by one.
    let length = match of.order {
        Some(_) => 1,
        None => usize::try_from(of.group).unwrap_or(usize::MAX),
    };
    weights
        .chunks_mut(length)
        .enumerate()
        .map(move |(number, run)| (number * length, run))
}

fn group_of(of: &Integers, column: usize, groups: usize) -> Result<usize> {
    let group = match &of.order {
        Some(order) => order
            .get(column)
            .map_or(usize::MAX, |group| *group as usize),
        None => column / usize::try_from(of.group).unwrap_or(usize::MAX),
    };
    if group < groups {
        return Ok(group);
    }
    Err(Error::checkpoint(format!(
        "column {column} belongs to group {group} of {groups}"
    )))
}

fn part(bytes: &[u8], first: usize, count: usize) -> Result<&[u8]> {
    bytes
        .get(first..first.saturating_add(count))
        .ok_or_else(|| Error::Internal(String::from("a row of packed codes is cut short")))
}

fn scale(dtype: Dtype, scales: &[u8], group: usize) -> Result<f32> {
    let size = dtype.alignment() as usize;
    let mut found = [0.0];
    float::widen(dtype, part(scales, group * size, size)?, &mut found, false)?;
    let [scale] = found;
    Ok(scale)
}

/// Codes of `bits` bits, lowest first, from code `first` on.
fn unpack(bytes: &[u8], first: usize, bits: u64, weights: &mut [f32], value: impl Fn(u32) -> f32) {
    let bits = bits as usize;
    if bits == 4 && first.is_multiple_of(2) {
        for (pair, byte) in weights.chunks_mut(2).zip(&bytes[first / 2..]) {
            for (weight, code) in pair.iter_mut().zip([byte & 15, byte >> 4]) {
                *weight = value(u32::from(code));
            }
        }
        return;
    }
    let mask = (1u32 << bits) - 1;
    for (number, weight) in weights.iter_mut().enumerate() {
        let bit = (first + number) * bits;
        let (low, shift) = (bit / 8, bit % 8);
        let high = bytes.get(low + 1).copied().unwrap_or(0);
        let both = u32::from(bytes[low]) | u32::from(high) << 8;
        *weight = value((both >> shift) & mask);
    }
}
