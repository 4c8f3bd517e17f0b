//! Whether stored blocks can be meant: a scale that is infinite or NaN makes a whole block so.
//!
//! What is looked at, by type (ggml 0.25.3, `ggml_validate_row_data`): plain floats every element;
//! block types every f16 or f32 scale and minimum; IQ1_M the f16 that is spread over the four words
//! of its scales; MXFP4 the exponent, of which 255 stands for NaN. The 8-bit scales of NVFP4 have
//! no such value here, and integers are valid whatever they are.

use crate::dtype::Dtype;

/// Where the scales of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scales {
    /// f16 numbers at these bytes of the block.
    F16(&'static [usize]),
    /// One f32 at this byte.
    F32(usize),
    /// One f64.
    F64,
    /// One bf16.
    BF16,
    /// An exponent at this byte; 255 is NaN.
    Exponent(usize),
    /// The top four bits of four words from this byte on are one f16.
    Spread(usize),
    /// Nothing that can be wrong.
    Free,
}

/// `None` for types that GGUF does not have.
fn scales(dtype: Dtype) -> Option<Scales> {
    Some(match dtype {
        Dtype::F32 | Dtype::Q8_K => Scales::F32(0),
        Dtype::F64 => Scales::F64,
        Dtype::BF16 => Scales::BF16,
        Dtype::F16 => Scales::F16(&[0]),
        Dtype::Q4_0 | Dtype::Q5_0 | Dtype::Q8_0 | Dtype::Q1_0 | Dtype::Q2_0 => Scales::F16(&[0]),
        Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4_K | Dtype::Q5_K => Scales::F16(&[0, 2]),
        // Its sum is no part of the weights.
        Dtype::Q8_1 => Scales::F16(&[0]),
        Dtype::Q2_K => Scales::F16(&[80, 82]),
        Dtype::Q3_K => Scales::F16(&[108]),
        Dtype::Q6_K => Scales::F16(&[208]),
        Dtype::IQ1_S | Dtype::IQ2_XXS | Dtype::IQ2_XS | Dtype::IQ2_S => Scales::F16(&[0]),
        Dtype::IQ3_XXS | Dtype::IQ3_S | Dtype::IQ4_NL | Dtype::IQ4_XS => Scales::F16(&[0]),
        Dtype::IQ1_M => Scales::Spread(48),
        Dtype::TQ1_0 => Scales::F16(&[52]),
        Dtype::TQ2_0 => Scales::F16(&[64]),
        Dtype::MXFP4 => Scales::Exponent(0),
        Dtype::NVFP4 | Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64 => Scales::Free,
        _ => return None,
    })
}

/// Number of the first block of `bytes` whose scale is not a finite number, and what the scale is.
/// A last block that is cut short is not looked at.
pub fn first_invalid(dtype: Dtype, bytes: &[u8]) -> Option<(usize, &'static str)> {
    let (_, block_bytes) = dtype.block()?;
    let scales = scales(dtype)?;
    if scales == Scales::Free {
        return None;
    }
    let blocks = bytes.chunks_exact(usize::try_from(block_bytes).ok()?);
    blocks
        .enumerate()
        .find_map(|(index, block)| scales.fault(block).map(|fault| (index, fault)))
}

impl Scales {
    fn fault(self, block: &[u8]) -> Option<&'static str> {
        match self {
            Scales::F16(places) => places.iter().find_map(|place| {
                let word = u16::from_le_bytes(at(block, *place)?);
                not_finite(word & 0x7c00 == 0x7c00, word & 0x03ff)
            }),
            Scales::BF16 => {
                let word = u16::from_le_bytes(at(block, 0)?);
                not_finite(word & 0x7f80 == 0x7f80, word & 0x007f)
            }
            Scales::F32(place) => float(f32::from_le_bytes(at(block, place)?)),
            // What does not fit in f32 is read as infinite.
            Scales::F64 => float(f64::from_le_bytes(at(block, 0)?) as f32),
            Scales::Exponent(place) => match block.get(place) {
                Some(255) => Some("NaN"),
                _ => None,
            },
            Scales::Spread(place) => {
                let mut word = 0;
                for index in 0..4 {
                    let part = u16::from_le_bytes(at(block, place + 2 * index)?);
                    word |= (part >> 12) << (4 * index);
                }
                not_finite(word & 0x7c00 == 0x7c00, word & 0x03ff)
            }
            Scales::Free => None,
        }
    }
}

fn at<const N: usize>(block: &[u8], place: usize) -> Option<[u8; N]> {
    block.get(place..)?.first_chunk().copied()
}

fn float(value: f32) -> Option<&'static str> {
    if value.is_nan() {
        Some("NaN")
    } else if value.is_infinite() {
        Some("infinite")
    } else {
        None
    }
}

fn not_finite(exponent_is_full: bool, fraction: u16) -> Option<&'static str> {
    match (exponent_is_full, fraction) {
        (false, _) => None,
        (true, 0) => Some("infinite"),
        (true, _) => Some("NaN"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{self, Params};

    #[test]
    fn every_type_of_the_container_has_a_row() {
        for dtype in Dtype::all() {
            assert_eq!(
                scales(dtype).is_some(),
                dtype.ggml_id().is_some(),
                "{dtype}"
            );
        }
    }

    /// A block decodes to finite numbers just when nothing is found, whatever its other bytes are.
    #[test]
    fn what_is_found_is_what_spoils_the_weights() {
        let mut state = 5u64;
        for dtype in Dtype::all().filter(|dtype| dtype.ggml_id().is_some()) {
            let Some(format) = formats::for_dtype(dtype) else {
                continue;
            };
            let (weights, bytes) = dtype.block().unwrap();
            // Their scales are decoded to finite numbers, or are so large that weights overflow.
            if matches!(
                dtype,
                Dtype::MXFP4 | Dtype::NVFP4 | Dtype::F64 | Dtype::Q8_K
            ) {
                continue;
            }
            let layout = format.layout(&[1, weights], &Params::default()).unwrap();
            let (mut found, mut decoded) = (0, vec![0.0; weights as usize]);
            for round in 0..4000 {
                let mut block = vec![0; bytes as usize];
                for byte in &mut block {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(99);
                    *byte = (state >> 56) as u8;
                    // Make the special exponents common.
                    if round % 2 == 0 && state >> 40 & 3 == 0 {
                        *byte = 0x7c | *byte & 0x83;
                    }
                }
                let mut parts: formats::Parts<'_> = Default::default();
                parts[0] = &block;
                format.decode(&layout, 0, &parts, &mut decoded).unwrap();
                let finite = decoded.iter().all(|weight| weight.is_finite());
                let fault = first_invalid(dtype, &block);
                found += usize::from(fault.is_some());
                assert_eq!(finite, fault.is_none(), "{dtype}: {block:?}");
            }
            assert!(found > 0, "{dtype}");
        }
    }

    #[test]
    fn the_first_block_is_named() {
        let mut bytes = vec![0; 17 * 5];
        bytes[17 * 3] = 255;
        assert_eq!(first_invalid(Dtype::MXFP4, &bytes), Some((3, "NaN")));
        assert_eq!(first_invalid(Dtype::MXFP4, &bytes[..17 * 3 + 5]), None);
        assert_eq!(first_invalid(Dtype::I8, &bytes), None);
        assert_eq!(first_invalid(Dtype::Unknown(99), &bytes), None);
    }
}
