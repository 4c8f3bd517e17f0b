//! torchao's small floats that share a scale in blocks of a row, the scales in the order of tensor cores.
//!
//! For a weight of shape \[N, K\] called `m.weight`, with blocks of B weights:
//!
//! | format | B | `m._weight_qdata` | `m._weight_scale` | `m._weight_per_tensor_scale` |
//! |---|---|---|---|---|
//! | `torchao:nvfp4` | 16 | U8 \[N, K/2\]: E2M1 | F8_E4M3 | F32 \[\] |
//! | `torchao:mxfp8` | 32 | F8_E4M3 \[N, K\] | F8_E8M0 | – |
//! | `torchao:mxfp4` | 32 | U8 \[N, K/2\]: E2M1 | F8_E8M0 | – |
//!
//! A byte of E2M1 holds the code of an even weight in bits 0-3 and of the odd one behind it in bits 4-7
//! (see [`super::fp4`] for the codes).
//!
//! The scales are an array \[32·⌈N/128⌉, 16·⌈K/4B⌉\]. Its bytes are tiles of 512, one for every 128 rows
//! and 4 blocks, row of tiles by row of tiles; the scale of row r and block c of a tile is byte
//! 16·(r mod 32) + 4·⌊r/32⌋ + c. Places beyond the last row or block hold 0.
//!
//! NVFP4, a being the largest magnitude of the tensor and m that of a block, each operation rounded to
//! `f32` by itself: g = a/2688 (2688 = 6·448); s = (m/6)/g, held to 2⁻⁶..448, rounded to E4M3; the code is
//! the nearest to w·((1/g)/s), ties to the even code, −0 with its sign. Decoding: value·(g·s).
//!
//! MX, p being the largest value of a code (448 or 6): the exponent is ⌈log₂(m/p)⌉, at least −127, where
//! the quotient is rounded to `f32`, and so is the logarithm (a quotient just above a power of two counts
//! as that power); it is stored with 127 added. The code is the nearest to w/2^exponent, ties to even, at
//! most p. Decoding: value·2^exponent.
//!
//! Special cases:
//! - NVFP4, g = 0 (a tensor of zeros, or of the least subnormals): g = 1, scales 2⁻⁶ and codes of zero.
//!   torchao stores NaN in the scales.
//! - NVFP4, (1/g)/s beyond `f32` (a < 6·10⁻³⁴): codes of zero. torchao stores codes of 6, and of −1½ for
//!   zeros.
//! - MX blocks with exponent −127 (m < p·2⁻¹²⁷, and zeros): their weights are not scaled, as in torchao, so
//!   that all codes are those of zero.
//! - Rows are whole blocks. For NVFP4 torchao's config wants the number of rows to be a multiple of 16 as
//!   well; its tensors and their decoding do not.
//! - F16, F64 and packed sources are encoded as F32 is. torchao takes F32 and BF16 for NVFP4, and for MX
//!   BF16 alone.
//! - Weights that are not finite are refused.
//!
//! Peer: torchao 0.18.0 on CPU (`NVFP4WeightOnlyConfig`; `MXDynamicActivationMXWeightConfig`, whose scales
//! are those of `ScaleCalculationMode.RCEIL`).

use super::fp4_blocks::{self, Room, Rule, Scales};
use super::rows8::{self, Codes};
use super::scaled::{most_measured, put_magnitudes, MAGNITUDES};
use super::{
    Component, Encodes, Exactness, Format, Info, Layout, Naming, Params, Parts, PartsMut, Span,
    Weights,
};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::float8::of_e8m0;
use crate::kernels::{self, Level};
use crate::shape;

/// Rows, and blocks of a row, whose scales are one tile; and the bytes of a tile.
const TILE_ROWS: u64 = 128;
const TILE_BLOCKS: u64 = 4;
const TILE_BYTES: u64 = 512;
/// Blocks that are encoded together: so many that what a run costs by itself is little.
const RUN_BLOCKS: usize = 512;

/// One of the three formats.
pub struct Swizzled {
    info: Info,
    kind: Kind,
}

/// What is in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// 16 E2M1 numbers with an E4M3 scale, on top of one for the tensor.
    NvFp4,
    /// 32 E4M3 numbers with a power of two.
    MxFp8,
    /// 32 E2M1 numbers with a power of two.
    MxFp4,
}

pub static NVFP4: Swizzled = Swizzled::new("torchao:nvfp4", 4.5, Kind::NvFp4);
pub static MXFP8: Swizzled = Swizzled::new("torchao:mxfp8", 8.25, Kind::MxFp8);
pub static MXFP4: Swizzled = Swizzled::new("torchao:mxfp4", 4.25, Kind::MxFp4);

impl Swizzled {
    const fn new(name: &'static str, bits_per_weight: f64, kind: Kind) -> Self {
        Swizzled {
            info: Info {
                name,
                short: None,
                container: "safetensors",
                exactness: Exactness::Exact,
                peer: "torchao 0.18.0",
                reader: "torchao, transformers, diffusers",
                bits_per_weight,
                encodes: Encodes::Always,
            },
            kind,
        }
    }
}

impl Kind {
    /// Weights that share a scale.
    fn block(self) -> u64 {
        match self {
            Kind::NvFp4 => 16,
            Kind::MxFp8 | Kind::MxFp4 => 32,
        }
    }

    /// Weights and bytes of a block.
    fn sizes(self) -> (usize, usize) {
        match self {
            Kind::NvFp4 => (16, 8),
            Kind::MxFp8 => (32, 32),
            Kind::MxFp4 => (32, 16),
        }
    }

    /// Codes in a byte.
    fn per_byte(self) -> u64 {
        match self {
            Kind::MxFp8 => 1,
            Kind::NvFp4 | Kind::MxFp4 => 2,
        }
    }
}

impl Format for Swizzled {
    fn info(&self) -> &'static Info {
        match self.kind {
            Kind::NvFp4 => &NVFP4.info,
            Kind::MxFp8 => &MXFP8.info,
            Kind::MxFp4 => &MXFP4.info,
        }
    }

    fn layout(&self, shape: &[u64], params: &Params) -> Result<Layout> {
        let (name, kind) = (self.info.name, self.kind);
        let block = kind.block();
        params.refuse_choices(name, Some(block))?;
        let &[rows, columns] = shape else {
            return Err(Error::format(format!(
                "{name}: takes 2 dimensions, got shape {shape:?}"
            )));
        };
        if columns == 0 && rows > 0 {
            return Err(Error::format(format!("{name}: rows are empty")));
        }
        if !columns.is_multiple_of(block) {
            return Err(Error::format(format!(
                "{name}: row of {columns} weights is not a multiple of block_size {block}"
            )));
        }
        let unit_weights = shape::multiply(TILE_ROWS, columns.max(1), "weights of a row of tiles")?;
        let tiles = columns.div_ceil(block * TILE_BLOCKS);
        let array = |suffix: &'static str, dtype, shape: [u64; 2], weights, bytes| Component {
            suffix: suffix.into(),
            naming: Naming::Flattened,
            dtype,
            shape: shape.to_vec(),
            span: Span::Blocks { weights, bytes },
        };
        let (codes, scales) = match kind {
            Kind::NvFp4 => (Dtype::U8, Dtype::F8_E4M3),
            Kind::MxFp8 => (Dtype::F8_E4M3, Dtype::F8_E8M0),
            Kind::MxFp4 => (Dtype::U8, Dtype::F8_E8M0),
        };
        let across = kind.per_byte();
        let mut components = vec![
            array("qdata", codes, [rows, columns / across], across, 1),
            array(
                "scale",
                scales,
                [
                    rows.div_ceil(TILE_ROWS) * (TILE_BYTES / 16),
                    shape::multiply(tiles, 16, "scales of a row of tiles")?,
                ],
                unit_weights,
                shape::multiply(tiles, TILE_BYTES, "scales of a row of tiles")?,
            ),
        ];
        if kind == Kind::NvFp4 {
            components.push(Component {
                suffix: "per_tensor_scale".into(),
                naming: Naming::Flattened,
                dtype: Dtype::F32,
                shape: Vec::new(),
                span: Span::Whole,
            });
        }
        Ok(Layout {
            shape: shape.to_vec(),
            weights: shape::count_weights(shape)?,
            params: params.clone(),
            components,
            unit_weights,
            statistics: (kind == Kind::NvFp4).then_some(MAGNITUDES),
        })
    }

    fn measure(
        &self,
        _layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        statistics: &mut [u8],
    ) -> Result<()> {
        match put_magnitudes(weights, statistics) {
            true => Ok(()),
            false => Err(self.not_finite()),
        }
    }

    fn settle(&self, layout: &mut Layout, statistics: &mut [u8]) -> Result<()> {
        layout.params.tensor_scale = fp4_blocks::tensor_scale(most_measured(statistics));
        Ok(())
    }

    fn encode(
        &self,
        layout: &Layout,
        _first: u64,
        weights: Weights<'_>,
        _statistics: &[u8],
        parts: &mut PartsMut<'_>,
    ) -> Result<()> {
        let sizes = Sizes::of(self.kind, layout)?;
        let tensor_scale = layout.params.tensor_scale;
        let mut encoder = RowEncoder::new(kernels::level(), self.kind, tensor_scale);
        let [codes, scales, ..] = parts;
        scales.fill(0);
        let runs = weights
            .chunks(sizes.run_weights)
            .zip(codes.chunks_mut(sizes.run_codes))
            .zip(scales.chunks_exact_mut(sizes.run_scales));
        for ((weights, codes), scales) in runs {
            let rows = weights
                .chunks_exact(sizes.row_weights)
                .zip(codes.chunks_exact_mut(sizes.row_codes));
            for (row, (weights, codes)) in rows.enumerate() {
                if !encoder.encode(row, weights, codes, scales) {
                    return Err(self.not_finite());
                }
            }
        }
        Ok(())
    }

    fn decode(
        &self,
        layout: &Layout,
        _first: u64,
        parts: &Parts<'_>,
        weights: &mut [f32],
    ) -> Result<()> {
        let tensor_scale = layout.params.tensor_scale;
        let sizes = Sizes::of(self.kind, layout)?;
        let level = kernels::level();
        let [codes, scales, ..] = parts;
        let runs = weights
            .chunks_mut(sizes.run_weights)
            .zip(codes.chunks(sizes.run_codes))
            .zip(scales.chunks_exact(sizes.run_scales));
        for ((weights, codes), scales) in runs {
            let rows = weights
                .chunks_exact_mut(sizes.row_weights)
                .zip(codes.chunks_exact(sizes.row_codes));
            for (row, (weights, codes)) in rows.enumerate() {
                decode_row(level, self.kind, tensor_scale, row, codes, scales, weights);
            }
        }
        Ok(())
    }

    fn finds_nonfinite(&self) -> bool {
        true
    }

    fn takes_stored(&self) -> bool {
        true
    }

    fn whole(&self, layout: &Layout, _statistics: &[u8]) -> Result<Vec<(usize, Vec<u8>)>> {
        let scale = layout.params.tensor_scale.to_le_bytes().to_vec();
        Ok(self
            .tensor_scale()
            .map(|index| (index, scale))
            .into_iter()
            .collect())
    }

    fn tensor_scale(&self) -> Option<usize> {
        (self.kind == Kind::NvFp4).then_some(2)
    }
}

/// How many weights and bytes a row has, and the rows whose scales are one row of tiles. None is 0.
struct Sizes {
    row_weights: usize,
    row_codes: usize,
    run_weights: usize,
    run_codes: usize,
    run_scales: usize,
}

impl Sizes {
    fn of(kind: Kind, layout: &Layout) -> Result<Self> {
        let columns = shape::row_weights(&layout.shape).max(1);
        let across = kind.per_byte();
        let tiles = columns.div_ceil(kind.block() * TILE_BLOCKS);
        Ok(Sizes {
            row_weights: shape::to_usize(columns)?,
            row_codes: shape::to_usize(columns.div_ceil(across))?,
            run_weights: shape::to_usize(layout.unit_weights)?,
            run_codes: shape::to_usize(layout.unit_weights.div_ceil(across))?,
            run_scales: shape::to_usize(tiles * TILE_BYTES)?,
        })
    }
}

/// Where the scales of row `row` of a row of tiles begin, four blocks after four.
fn places(row: usize) -> impl Iterator<Item = usize> {
    let first = row % 32 * 16 + row / 32 * 4;
    (0..).map(move |four| four * 512 + first)
}

/// Puts the scales of blocks to the next of `places`.
fn put_scales(run: &[u8], places: &mut impl Iterator<Item = usize>, scales: &mut [u8]) {
    let (fours, rest) = run.as_chunks::<4>();
    for (four, place) in fours.iter().zip(&mut *places) {
        if let Some(bytes) = scales
            .get_mut(place..)
            .and_then(|all| all.first_chunk_mut())
        {
            *bytes = *four;
        }
    }
    // There are none but at the end of a row.
    let place = rest.first().and_then(|_| places.next());
    let last = scales.iter_mut().skip(place.unwrap_or_default());
    for (place, scale) in last.zip(rest) {
        *place = *scale;
    }
}

/// Takes the scales of blocks from the next of `places`; zeros where there are none.
fn take_scales(run: &mut [u8], places: &mut impl Iterator<Item = usize>, scales: &[u8]) {
    for (four, place) in run.chunks_mut(4).zip(places) {
        let found = scales.get(place..).and_then(|all| all.first_chunk());
        let found = found.copied().unwrap_or([0; 4]);
        for (scale, found) in four.iter_mut().zip(found) {
            *scale = found;
        }
    }
}

/// What encodes rows of tiles.
pub struct RowEncoder {
    level: Level,
    kind: Kind,
    rule: Rule,
    room: Room,
}

impl RowEncoder {
    pub fn new(level: Level, kind: Kind, tensor_scale: f32) -> Self {
        let rule = match kind {
            Kind::NvFp4 => Rule::TorchAoNvFp4 { tensor_scale },
            Kind::MxFp8 => Rule::TorchAoMxFp8,
            Kind::MxFp4 => Rule::TorchAoMxFp4,
        };
        RowEncoder {
            level,
            kind,
            rule,
            room: Room::default(),
        }
    }

    /// Encodes row `row` of a row of tiles: all its codes, and its part of the scales of the tiles. Gives
    /// whether the weights are finite, for formats that have not gone over them before.
    pub fn encode(
        &mut self,
        row: usize,
        weights: Weights<'_>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> bool {
        let (level, kind) = (self.level, self.kind);
        let (block, bytes) = kind.sizes();
        let mut places = places(row);
        let mut run = [0; RUN_BLOCKS];
        let runs = weights
            .chunks(block * RUN_BLOCKS)
            .zip(codes.chunks_mut(bytes * RUN_BLOCKS));
        let is_encoded =
            |run: Weights<'_>| kind == Kind::NvFp4 || run.first_nonfinite(level).is_none();
        for (weights, codes) in runs {
            let room = &mut self.room;
            if !fp4_blocks::encode_runs(
                level, self.rule, room, weights, codes, &mut run, is_encoded,
            ) {
                return false;
            }
            let count = weights.len() / block;
            put_scales(&run[..count], &mut places, scales);
        }
        true
    }
}

/// Decodes row `row` of a row of tiles.
fn decode_row(
    level: Level,
    kind: Kind,
    tensor_scale: f32,
    row: usize,
    codes: &[u8],
    scales: &[u8],
    weights: &mut [f32],
) {
    let (block, bytes) = kind.sizes();
    let of_blocks = match kind {
        Kind::NvFp4 => Scales::Times(tensor_scale),
        Kind::MxFp8 | Kind::MxFp4 => Scales::E8m0,
    };
    let mut places = places(row);
    let mut run = [0; RUN_BLOCKS];
    let runs = weights
        .chunks_mut(block * RUN_BLOCKS)
        .zip(codes.chunks(bytes * RUN_BLOCKS));
    for (weights, codes) in runs {
        let count = weights.len() / block;
        take_scales(&mut run[..count], &mut places, scales);
        if kind == Kind::MxFp8 {
            let blocks = weights.chunks_exact_mut(block).zip(codes.chunks(bytes));
            for ((weights, codes), &scale) in blocks.zip(&run) {
                rows8::decode(level, Codes::E4m3, 0, of_e8m0(scale), codes, weights);
            }
        } else {
            fp4_blocks::decode(level, block, true, of_blocks, codes, &run, weights);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_scale_has_a_place_of_its_own() {
        let mut taken = [0u8; 1024];
        for row in 0..128 {
            for place in places(row).take(2) {
                taken[place..place + 4]
                    .iter_mut()
                    .for_each(|times| *times += 1);
            }
        }
        assert_eq!(taken, [1; 1024]);
        assert_eq!(places(33).take(2).collect::<Vec<_>>(), [20, 532]);
    }

    #[test]
    fn long_rows_are_encoded_and_decoded_run_by_run() {
        let blocks = RUN_BLOCKS + 5;
        let level = Level::SCALAR;
        let weights: Vec<f32> = (0..blocks * 16)
            .map(|i| (i * 7919 % 1009) as f32 - 500.0)
            .collect();
        let rule = Rule::TorchAoNvFp4 { tensor_scale: 0.2 };
        let mut expected = (vec![0; blocks * 8], vec![0; blocks]);
        let all = Weights::F32(&weights);
        fp4_blocks::encode(level, rule, all, &mut expected.0, &mut expected.1);

        let mut codes = vec![0; blocks * 8];
        let mut scales = vec![0; blocks.div_ceil(4) * 512];
        RowEncoder::new(level, Kind::NvFp4, 0.2).encode(40, all, &mut codes, &mut scales);
        assert_eq!(codes, expected.0);
        let at = |block: usize| places(40).nth(block / 4).unwrap() + block % 4;
        let placed: Vec<u8> = (0..blocks).map(|block| scales[at(block)]).collect();
        assert_eq!(placed, expected.1);

        let (mut decoded, mut whole) = (vec![0.0; blocks * 16], vec![0.0; blocks * 16]);
        decode_row(level, Kind::NvFp4, 0.2, 40, &codes, &scales, &mut decoded);
        let kind = Scales::Times(0.2);
        fp4_blocks::decode(level, 16, true, kind, &codes, &placed, &mut whole);
        assert_eq!(decoded, whole);
    }

    proptest! {
        #[test]
        fn levels_give_the_same_bytes(
            columns in prop::sample::select(vec![32usize, 96, 160, 1024]),
            row in 0usize..128,
            tensor_scale in prop::sample::select(vec![1.0f32, 0.003, 1e-38, 1e-45]),
            bits in prop::collection::vec(any::<u32>(), 1024),
        ) {
            let number = |&bits: &u32| Some(f32::from_bits(bits)).filter(|x| x.is_finite()).unwrap_or(0.0);
            let weights: Vec<f32> = bits[..columns].iter().map(number).collect();
            for kind in [Kind::NvFp4, Kind::MxFp8, Kind::MxFp4] {
                let encoded = |level| {
                    let mut codes = vec![0u8; columns / kind.per_byte() as usize];
                    let mut scales = vec![0u8; columns.div_ceil(64) * 512];
                    let given = Weights::F32(&weights);
                    let mut encoder = RowEncoder::new(level, kind, tensor_scale);
                    encoder.encode(row, given, &mut codes, &mut scales);
                    (codes, scales)
                };
                let expected = encoded(Level::SCALAR);
                for level in Level::available() {
                    prop_assert_eq!(&encoded(level), &expected, "{}", level.name());
                }
            }
        }
    }

    #[test]
    fn sizes_that_no_tensor_has_are_errors() {
        let params = Params::default();
        for format in [&NVFP4, &MXFP8, &MXFP4] {
            for shape in [
                &[][..],
                &[64],
                &[2, 2, 32],
                &[2, 8],
                &[2, 0],
                &[1, 1 << 60],
                &[1 << 60, 1 << 20],
            ] {
                assert!(format.layout(shape, &params).is_err(), "{shape:?}");
            }
            let layout = format.layout(&[0, 0], &params).unwrap();
            assert_eq!((layout.weights, layout.unit_weights), (0, 128));
        }
    }
}
