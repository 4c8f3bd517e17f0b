//! optimum-quanto's 4-bit and 2-bit weights: codes with a scale and a shift for every group of a row, the
//! codes of two or four groups that are far apart in one byte.
//!
//! A weight of shape \[N, …\] called `m.weight`, of type T (F32, F16 or BF16), has rows of K weights, all that
//! shares the first index. It is seen as R groups of G weights: G is the largest of 128, 96, 64 and 32 that
//! divides K if K is more than 128, and otherwise K, a whole row. b is 4 or 2, P = 8/b, H = ⌈R/P⌉:
//!
//! | array | type, shape | holds |
//! |---|---|---|
//! | `m.weight._data._data` | U8 \[H, G\], \[H, …\] for whole rows | group i + pH in bits pb … pb + b − 1 of row i |
//! | `m.weight._scale` | T \[R, 1\], \[N, 1, …\] for whole rows | s |
//! | `m.weight._shift` | as the scale | z |
//! | `m.input_scale`, `m.output_scale` | T \[\] | 1: activations are not quantized |
//!
//! Encoding, per group, each step rounded to T: s = (max − min)/(2^b − 1), z = −min; q = (w + z)/s, to the
//! nearest whole number limited to 0 … 2^b − 1, ties to even. Decoding: q·s − z, the product and the
//! difference rounded to `f32`.
//!
//! Special cases:
//! - 4-bit BF16 matrices of groups of 128: quanto holds them in the form of a kernel that has the middle of
//!   the range in place of the shift. What it saves went through that: z' = 8s − (8s + min), each step
//!   rounded. So it is here; codes are those of z. For matrices whose rows are no multiple of 16, which quanto
//!   fails to pack, z is stored.
//! - Groups of one number: s = 0, codes 0. They decode to that number, zeros to zero.
//! - Where s is rounded to 0 and the numbers differ (subnormal ones): the largest code, 0 for the least.
//! - One group that is a whole matrix (R = 1): quanto takes a scale for every weight, which is 0, and
//!   shifts that are the weights; the arrays have shape \[1, K\].
//! - A group whose range T does not hold is refused: its scale would be infinite. So are weights that are
//!   not finite.
//! - Where the least of a group is zero and both zeros occur, −0 counts as less: the shift is 0. quanto's may be
//!   −0.
//!
//! Shapes of weights do not follow from those of the arrays where G is less than K.
//!
//! Tiles take the groups that share bytes together. As scales and shifts of these lie apart, they are collected,
//! and written once all codes are. Where P does not divide R the whole weight is one tile.
//!
//! Peer: optimum-quanto 0.2.7 on CPU (`qint4`, `qint2`, axis 0, `MaxOptimizer`).

use super::quanto_groups::{self, Beyond, Groups, Lanes, Sharing, MAX_LANES};
use super::rows8::{self, shortened};
use super::scaled::read_scale;
use super::stored::{Brain, Stored};
use super::{
    Component, Encodes, Exactness, Fold, Format, Info, Layout, Naming, Params, Parts, PartsMut,
    Span, Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::{kernels, shape};

/// Group sizes, the one that is taken first; rows of at most this many weights are one group.
pub const GROUPS: [u64; 4] = [128, 96, 64, 32];

/// One of the two formats.
pub struct QuantoBits {
    info: Info,
    bits: u32,
}

pub static INT4: QuantoBits = QuantoBits::new("quanto:int4", 4, 4.25);
pub static INT2: QuantoBits = QuantoBits::new("quanto:int2", 2, 2.25);

/// Rows that quanto's kernel takes together.
const KERNEL_ROWS: u64 = 16;

impl QuantoBits {
    const fn new(name: &'static str, bits: u32, bits_per_weight: f64) -> Self {
        QuantoBits {
            info: Info {
                name,
                short: None,
                container: "safetensors",
                exactness: Exactness::Exact,
                peer: "optimum-quanto 0.2.7",
                reader: "optimum-quanto, diffusers",
                bits_per_weight,
                encodes: Encodes::Always,
            },
            bits,
        }
    }

    /// Codes in a byte.
    fn parts(&self) -> u64 {
        u64::from(8 / self.bits)
    }

    fn sizes(&self, shape: &[u64], params: &Params) -> Result<Sizes> {
        let refused = |what: &str| {
            Error::format(format!(
                "{}: takes rows of weights, got {what}{shape:?}",
                self.info.name
            ))
        };
        let [rows, inner @ ..] = shape else {
            return Err(refused("shape "));
        };
        let row_weights = shape::count_weights(inner)?;
        if inner.is_empty() || row_weights == 0 {
            return Err(refused("shape "));
        }
        let divides = |size: &u64| row_weights.is_multiple_of(*size);
        let group = match row_weights > GROUPS[0] {
            true => GROUPS.into_iter().find(divides),
            false => None,
        };
        let weights = shape::count_weights(shape)?;
        let groups = weights / group.unwrap_or(row_weights);
        let is_alone = groups == 1;
        let byte_rows = groups.div_ceil(self.parts());
        let group_weights = group.unwrap_or(row_weights);
        if is_alone && inner.len() > 1 {
            return Err(refused("one group of shape "));
        }
        let dtype = rows8::compute_type(params.dtype);
        Ok(Sizes {
            group: group_weights,
            is_whole_row: group.is_none(),
            groups,
            byte_rows,
            code_bytes: shape::multiply(byte_rows, group_weights, "bytes of codes")?,
            scaled: if is_alone {
                1
            } else {
                group.unwrap_or(row_weights)
            },
            scales: if is_alone { weights } else { groups },
            is_through_middle: self.bits == 4
                && dtype == Dtype::BF16
                && group == Some(GROUPS[0])
                && rows.is_multiple_of(KERNEL_ROWS)
                && inner.len() == 1,
            dtype,
        })
    }

    fn sizes_of(&self, layout: &Layout) -> Result<Sizes> {
        self.sizes(&layout.shape, &layout.params)
    }

    /// The codes of a tile of groups, `number` being the first one's in the order of encoding: row of
    /// bytes, counted from the first of the tile, and bit.
    fn place(&self, fold: Option<Fold>, sizes: &Sizes, number: u64, index: u64) -> (u64, u32) {
        let (row, part) = match fold {
            Some(fold) => (index / fold.parts(), index % fold.parts()),
            None => {
                let group = number + index;
                let rows = sizes.byte_rows.max(1);
                (group % rows, group / rows)
            }
        };
        (row, part as u32 * self.bits)
    }
}

/// How a weight is divided.
struct Sizes {
    /// Weights of a group.
    group: u64,
    /// Whether a group is a row.
    is_whole_row: bool,
    groups: u64,
    /// Rows of bytes.
    byte_rows: u64,
    /// Bytes of all codes.
    code_bytes: u64,
    /// Weights that share a scale, and the number of scales.
    scaled: u64,
    scales: u64,
    /// Whether the shift is stored by way of the middle of the range.
    is_through_middle: bool,
    /// Type of scales and shifts, in which everything is computed.
    dtype: Dtype,
}

impl Sizes {
    fn scale_bytes(&self) -> u64 {
        self.dtype.alignment()
    }

    /// Groups of `weights` weights, each with a code of `bits` bits.
    fn groups(&self, bits: u32, weights: u64) -> Result<Groups> {
        Ok(Groups {
            dtype: self.dtype,
            bits,
            size: shape::to_usize(weights)?,
        })
    }

    /// The shift that is stored.
    fn stored_shift(&self, scale: f32, shift: f32) -> f32 {
        if !self.is_through_middle {
            return shift;
        }
        through_middle(scale, shift)
    }

    /// Scale and shift number `number` of the statistics.
    fn read(&self, statistics: &[u8], number: u64) -> Result<(f32, f32)> {
        let pair = self.scale_bytes() * 2;
        let start = shape::to_usize(number * pair)?;
        let bytes = statistics.get(start..start + shape::to_usize(pair)?);
        let (scale, shift) = bytes.ok_or_else(cut_short)?.split_at(pair as usize / 2);
        Ok((read_scale(self.dtype, scale), read_scale(self.dtype, shift)))
    }
}

/// The shift that remains of `shift` in BF16 once it was the middle of the range.
fn through_middle(scale: f32, shift: f32) -> f32 {
    let half = shortened::<16>(8.0 * scale);
    let middle = shortened::<16>(half - shift);
    shortened::<16>(half - middle)
}

fn cut_short() -> Error {
    Error::Internal(String::from("scales and shifts are cut short"))
}

impl Format for QuantoBits {
    fn info(&self) -> &'static Info {
        match self.bits {
            4 => &INT4.info,
            _ => &INT2.info,
        }
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        params.refuse_choices(self.info.name, None)?;
        let sizes = self.sizes(shape, params)?;
        let inner = shape.get(1..).unwrap_or_default();
        let rest: &[u64] = if sizes.is_whole_row {
            inner
        } else {
            &[sizes.group]
        };
        let ones: Vec<u64> = match sizes.scaled {
            1 => rest.to_vec(),
            _ => rest.iter().map(|_| 1).collect(),
        };
        let scale_bytes = sizes.scale_bytes();
        let scales = |suffix: &'static str| Component {
            suffix: suffix.into(),
            naming: Naming::Appended,
            dtype: sizes.dtype,
            shape: [&[sizes.groups], ones.as_slice()].concat(),
            span: Span::Blocks {
                weights: sizes.scaled,
                bytes: scale_bytes,
            },
        };
        let activation = |suffix: &'static str| Component {
            suffix: suffix.into(),
            naming: Naming::Sibling,
            dtype: sizes.dtype,
            shape: Vec::new(),
            span: Span::Whole,
        };
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components: vec![
                Component {
                    suffix: "_data._data".into(),
                    naming: Naming::Appended,
                    dtype: Dtype::U8,
                    shape: [&[sizes.byte_rows], rest].concat(),
                    span: Span::Repeated {
                        weights: sizes.group,
                        bytes: sizes.group,
                        period: sizes.code_bytes,
                    },
                },
                scales("_scale"),
                scales("_shift"),
                activation("input_scale"),
                activation("output_scale"),
            ],
            unit_weights: sizes.group,
            statistics: None,
        })
    }

    fn encoding(&self, layout: &Layout) -> Result<Layout> {
        let sizes = self.sizes_of(layout)?;
        let mut layout = layout.clone();
        let (weights, bytes) = match self.fold(&layout) {
            Some(fold) => (sizes.group * fold.parts(), sizes.group),
            None => (layout.weights.max(1), sizes.code_bytes),
        };
        for component in &mut layout.components {
            component.span = match component.span {
                Span::Repeated { .. } => Span::Blocks { weights, bytes },
                _ => Span::Whole,
            };
        }
        layout.unit_weights = weights;
        layout.statistics = Some(Span::Blocks {
            weights: sizes.scaled,
            bytes: sizes.scale_bytes() * 2,
        });
        Ok(layout)
    }

    fn fold(&self, layout: &Layout) -> Option<Fold> {
        let sizes = self.sizes_of(layout).ok()?;
        Fold::new(sizes.group, sizes.groups, self.parts())
    }

    fn encode_at_once(
        &self,
        layout: &Layout,
        first: u64,
        weights: Weights<'_>,
        statistics: &mut [u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let sizes = self.sizes_of(layout)?;
        let [codes, ..] = parts;
        self.encode_tile(layout, &sizes, first, weights, statistics, codes)?
            .map_err(|Beyond(number)| {
                let (_, rest) = weights.split_at(number * sizes.scaled as usize);
                let (least, greatest) = rest.split_at(sizes.scaled as usize).0.range();
                let index = first + number as u64 * sizes.scaled;
                let index = self.fold(layout).map_or(index, |fold| fold.weight(index));
                Error::format(format!(
                    "{}: weights {index}..{} are from {least:e} to {greatest:e}, a range that {} does not hold",
                    self.info.name,
                    index + sizes.scaled,
                    sizes.dtype
                ))
            })
    }

    fn encode_lanes(
        &self,
        layout: &Layout,
        lanes: [Weights<'_>; MAX_LANES],
        statistics: &mut [u8],
        parts: &mut PartsMut<'_>,
    ) -> Option<Result<()>> {
        let encoded = self.sizes_of(layout).and_then(|sizes| {
            let groups = sizes.groups(self.bits, sizes.group)?;
            let (level, sharing) = (kernels::level(), Sharing::Neighbours);
            let (lanes, [codes, ..]) = (Lanes::apart(groups, lanes), parts);
            quanto_groups::encode(level, groups, sharing, &lanes, statistics, codes)
                .map_err(|_| self.not_finite())
        });
        Some(encoded)
    }

    fn measures_at_once(&self) -> bool {
        true
    }

    fn finds_nonfinite(&self) -> bool {
        true
    }

    fn takes_stored(&self) -> bool {
        true
    }

    fn decode(
        &self,
        layout: &Layout,
        first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let sizes = self.sizes_of(layout)?;
        let [codes, scales, shifts, ..] = *parts;
        let group = shape::to_usize(sizes.group)?;
        let scaled = shape::to_usize(sizes.scaled)?;
        let bytes = shape::to_usize(sizes.scale_bytes())?;
        let each = bytes * (group / scaled);
        let groups = weights
            .chunks_exact_mut(group)
            .zip(codes.chunks_exact(group))
            .zip(scales.chunks_exact(each).zip(shifts.chunks_exact(each)));
        for (number, ((weights, codes), (scales, shifts))) in (first / sizes.group..).zip(groups) {
            let bit = (number / sizes.byte_rows.max(1)) as u32 * self.bits;
            let runs = weights
                .chunks_exact_mut(scaled)
                .zip(codes.chunks_exact(scaled))
                .zip(scales.chunks_exact(bytes).zip(shifts.chunks_exact(bytes)));
            for ((weights, codes), (scale, shift)) in runs {
                let (scale, shift) = (
                    read_scale(sizes.dtype, scale),
                    read_scale(sizes.dtype, shift),
                );
                self.take(codes, bit, scale, shift, weights);
            }
        }
        Ok(())
    }

    fn decode_encoded(
        &self,
        layout: &Layout,
        first: u64,
        parts: &Parts<'_>,
        statistics: &[u8],
        weights: &mut [f32],
    ) -> Result<()> {
        let sizes = self.sizes_of(layout)?;
        let [codes, ..] = *parts;
        let (fold, number) = (self.fold(layout), first / sizes.group);
        let (group, scaled) = (
            shape::to_usize(sizes.group)?,
            shape::to_usize(sizes.scaled)?,
        );
        for (index, weights) in (0..).zip(weights.chunks_exact_mut(group)) {
            let (row, bit) = self.place(fold, &sizes, number, index);
            let start = shape::to_usize(row)? * group;
            let codes = codes.get(start..start + group).ok_or_else(cut_short)?;
            let first = index * (sizes.group / sizes.scaled);
            let runs = weights
                .chunks_exact_mut(scaled)
                .zip(codes.chunks_exact(scaled));
            for (scale, (weights, codes)) in (first..).zip(runs) {
                let (scale, shift) = sizes.read(statistics, scale)?;
                let shift = sizes.stored_shift(scale, shift);
                self.take(codes, bit, scale, shift, weights);
            }
        }
        Ok(())
    }

    fn whole(&self, layout: &Layout, statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        let sizes = self.sizes_of(layout)?;
        let bytes = shape::to_usize(sizes.scale_bytes())?;
        let mut one = vec![0; bytes];
        rows8::put_number(sizes.dtype, 1.0, &mut one);
        let mut whole = vec![(3, one.clone()), (4, one)];
        if statistics.is_empty() {
            return Ok(whole);
        }
        let mut scales = vec![0; shape::to_usize(sizes.scales)? * bytes];
        let mut shifts = scales.clone();
        // Parts that share bytes take turns in the statistics.
        let parts = match self.fold(layout) {
            Some(fold) => shape::to_usize(fold.parts())?,
            None => 1,
        };
        match bytes {
            2 => split_pairs::<2>(parts, statistics, &mut scales, &mut shifts),
            _ => split_pairs::<4>(parts, statistics, &mut scales, &mut shifts),
        }
        if sizes.is_through_middle {
            for (scale, shift) in scales.chunks_exact(2).zip(shifts.chunks_exact_mut(2)) {
                Brain::write(
                    through_middle(Brain::read(scale), Brain::read(shift)),
                    shift,
                );
            }
        }
        whole.extend([(1, scales), (2, shifts)]);
        Ok(whole)
    }
}

impl QuantoBits {
    fn encode_tile(
        &self,
        layout: &Layout,
        sizes: &Sizes,
        first: u64,
        weights: Weights<'_>,
        pairs: &mut [u8],
        codes: &mut [u8],
    ) -> Result<std::result::Result<(), Beyond>> {
        if sizes.scaled == 1 {
            codes.fill(0);
            let groups = sizes.groups(self.bits, 1)?;
            return Ok(quanto_groups::measure(groups, weights, pairs));
        }
        let groups = sizes.groups(self.bits, sizes.group)?;
        let level = kernels::level();
        let fold = self.fold(layout);
        if fold.is_some() {
            let sharing = Sharing::Neighbours;
            let lanes = Lanes::neighbours(groups, sharing, weights);
            return Ok(quanto_groups::encode(
                level, groups, sharing, &lanes, pairs, codes,
            ));
        }
        codes.fill(0);
        let number = first / sizes.group;
        let pairs = pairs.chunks_exact_mut(shape::to_usize(2 * sizes.scale_bytes())?);
        for (index, (weights, pair)) in weights.chunks_exact(groups.size).zip(pairs).enumerate() {
            let (row, bit) = self.place(fold, sizes, number, index as u64);
            let start = shape::to_usize(row)? * groups.size;
            let codes = codes
                .get_mut(start..start + groups.size)
                .ok_or_else(cut_short)?;
            let sharing = Sharing::Others(bit);
            let lanes = Lanes::neighbours(groups, sharing, weights);
            if quanto_groups::encode(level, groups, sharing, &lanes, pair, codes).is_err() {
                return Ok(Err(Beyond(index)));
            }
        }
        Ok(Ok(()))
    }

    /// Weights of the codes that begin at bit `bit` of each byte.
    fn take(&self, codes: &[u8], bit: u32, scale: f32, shift: f32, weights: &mut [f32]) {
        let mask = (1u8 << self.bits) - 1;
        for (weight, code) in weights.iter_mut().zip(codes) {
            *weight = f32::from(code >> bit & mask) * scale - shift;
        }
    }
}

/// Scales and shifts of `BYTES` each, from pairs of which `parts` take turns.
fn split_pairs<const BYTES: usize>(
    parts: usize,
    pairs: &[u8],
    scales: &mut [u8],
    shifts: &mut [u8],
) {
    let (pairs, _) = pairs.as_chunks::<BYTES>().0.as_chunks::<2>();
    let scales = scales.as_chunks_mut::<BYTES>().0;
    let shifts = shifts.as_chunks_mut::<BYTES>().0;
    let of_part = (scales.len() / parts).max(1);
    let places = scales.chunks_mut(of_part).zip(shifts.chunks_mut(of_part));
    for (part, (scales, shifts)) in places.enumerate() {
        let pairs = pairs.iter().skip(part).step_by(parts);
        for ([first, second], (scale, shift)) in pairs.zip(scales.iter_mut().zip(shifts)) {
            (*scale, *shift) = (*first, *second);
        }
    }
}
