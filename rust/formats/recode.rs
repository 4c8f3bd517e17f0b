//! Weights that pass from one format to another without being decoded: both hold the same numbers, and only
//! the order of their bits differs.
//!
//! Blocks of 32 codes of 4 bits (E2M1) that share a power of two (E8M0):
//!
//! | formats | codes in a byte | scales |
//! |---|---|---|
//! | `modelopt:mxfp4`, `compressed-tensors:mxfp4` | of two neighbours, the first in bits 0-3 | in an array of their own |
//! | `gguf:mxfp4` | j in bits 0-3, j + 16 in bits 4-7 | before the codes of the block |
//!
//! The scale and the codes stay what they are. Encoding the decoded weights anew would give the same numbers
//! in most blocks, under a smaller scale where no code is large; where that scale is below the least one,
//! GGUF's encoder loses the block.
//!
//! Special cases:
//! - A code of minus zero stays, and is read as zero by GGUF's readers.
//! - Scale 255 counts as 2^128 in GGUF, and is NaN elsewhere. From GGUF it becomes 254 with codes of twice the
//!   value, as far as these are finite; into GGUF it is refused with the weights, which are NaN.

use super::{Parts, PartsMut};

/// Fills the parts of a tile in the new format from those in the old one.
pub type Recode = fn(&Parts<'_>, &mut PartsMut<'_>);

/// From, to, and how.
static RECODINGS: &[(&str, &str, Recode)] = &[
    ("modelopt:mxfp4", "gguf:mxfp4", to_gguf),
    ("compressed-tensors:mxfp4", "gguf:mxfp4", to_gguf),
    ("gguf:mxfp4", "modelopt:mxfp4", from_gguf),
    ("compressed-tensors:mxfp4", "modelopt:mxfp4", as_they_are),
];

/// How weights of the format called `from` become those of `to` without being decoded, if they can.
pub fn recoding(from: &str, to: &str) -> Option<Recode> {
    RECODINGS
        .iter()
        .find(|(old, new, _)| *old == from && *new == to)
        .map(|(_, _, recode)| *recode)
}

fn to_gguf(parts: &Parts<'_>, out: &mut PartsMut<'_>) {
    let [codes, scales, ..] = parts;
    let [blocks, ..] = out;
    let found = codes.as_chunks::<16>().0.iter().zip(*scales);
    for ([place, split @ ..], (codes, scale)) in
        blocks.as_chunks_mut::<17>().0.iter_mut().zip(found)
    {
        *place = *scale;
        let (low, high) = codes.split_at(8);
        for ((pair, low), high) in split.as_chunks_mut::<2>().0.iter_mut().zip(low).zip(high) {
            *pair = [low & 15 | high << 4, low >> 4 | high & 0xf0];
        }
    }
}

fn from_gguf(parts: &Parts<'_>, out: &mut PartsMut<'_>) {
    let [blocks, ..] = parts;
    let [codes, scales, ..] = out;
    let places = codes
        .as_chunks_mut::<16>()
        .0
        .iter_mut()
        .zip(scales.iter_mut());
    for ([scale, split @ ..], (codes, place)) in blocks.as_chunks::<17>().0.iter().zip(places) {
        *place = *scale;
        let (low, high) = codes.split_at_mut(8);
        for ((pair, low), high) in split.as_chunks::<2>().0.iter().zip(low).zip(high) {
            *low = pair[0] & 15 | pair[1] << 4;
            *high = pair[0] >> 4 | pair[1] & 0xf0;
        }
        if *scale == 255 {
            *place = 254;
            for byte in codes.iter_mut() {
                *byte = doubled(*byte & 15) | doubled(*byte >> 4) << 4;
            }
        }
    }
}

/// The code of twice the value, or of the largest, which is infinite here.
fn doubled(code: u8) -> u8 {
    let magnitude = match code & 7 {
        0 => 0,
        1 => 2,
        _ => 7,
    };
    code & 8 | magnitude
}

fn as_they_are(parts: &Parts<'_>, out: &mut PartsMut<'_>) {
    for (out, part) in out.iter_mut().zip(parts) {
        for (place, byte) in out.iter_mut().zip(*part) {
            *place = *byte;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{find, Params};

    /// Decodes 32 weights.
    fn decoded(format: &str, parts: &Parts<'_>) -> Vec<f32> {
        let format = find(format).unwrap();
        let layout = format.layout(&[1, 32], &Params::default()).unwrap();
        let mut weights = vec![0.0; 32];
        format.decode(&layout, 0, parts, &mut weights).unwrap();
        weights
    }

    #[test]
    fn every_scale_and_code_keeps_its_value_there_and_back() {
        let codes: [u8; 16] = std::array::from_fn(|j| (j * 17) as u8);
        let turned = codes.map(|byte| byte.rotate_left(4) ^ 0x8f);
        for scale in 0..=255u8 {
            for codes in [codes, turned] {
                let own = [&codes[..], &[scale], &[], &[]];
                let mut block = [0u8; 17];
                to_gguf(&own, &mut [&mut block, &mut [], &mut [], &mut []]);
                let found = decoded("gguf:mxfp4", &[&block, &[], &[], &[]]);
                let expected = decoded("modelopt:mxfp4", &own);
                if scale < 255 {
                    assert_eq!(found, expected, "{scale}");
                } else {
                    assert!(expected.iter().all(|weight| weight.is_nan()));
                }
                let (mut again, mut its_scale) = ([0u8; 16], [0u8]);
                let mut out: PartsMut<'_> = [&mut again, &mut its_scale, &mut [], &mut []];
                from_gguf(&[&block, &[], &[], &[]], &mut out);
                if scale < 255 {
                    assert_eq!((again, its_scale[0]), (codes, scale));
                }
                let back = decoded("modelopt:mxfp4", &[&again, &its_scale, &[], &[]]);
                assert_eq!(back, found, "{scale}");
            }
        }
    }

    #[test]
    fn every_row_names_formats_with_the_same_arrays() {
        for (old, new, _) in RECODINGS {
            let sliced = |name: &str| {
                let format = find(name).unwrap();
                let layout = format.layout(&[2, 64], &Params::default()).unwrap();
                let parts = layout
                    .sliced()
                    .map(|(index, _)| layout.component_bytes(index));
                parts.map(Result::unwrap).sum::<u64>()
            };
            assert_eq!(sliced(old), sliced(new));
            assert!(recoding(old, new).is_some());
            assert!(recoding(old, "f32").is_none());
        }
    }
}
