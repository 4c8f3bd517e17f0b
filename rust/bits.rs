//! Two 4-bit codes to a byte.

use crate::error::{Error, Result};

/// Which of two codes in a byte comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NibbleOrder {
    /// The first code of a pair is in bits 0-3.
    LowFirst,
    /// The first code of a pair is in bits 4-7.
    HighFirst,
}

impl NibbleOrder {
    /// The order called `low_first` or `high_first`.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "low_first" => Ok(NibbleOrder::LowFirst),
            "high_first" => Ok(NibbleOrder::HighFirst),
            _ => Err(Error::config(format!("unknown nibble order \"{name}\""))
                .hint("known orders: low_first, high_first")),
        }
    }
}

/// Packs `codes` into `packed`, which is half as long, rounded up. The second half of a last odd
/// byte is 0.
///
/// Fails if a code is above 15, or if the lengths do not agree.
pub fn pack_int4(order: NibbleOrder, codes: &[u8], packed: &mut [u8]) -> Result<()> {
    check_int4(codes.len(), packed.len())?;
    if let Some(index) = codes.iter().position(|&code| code > 15) {
        return Err(Error::format(format!(
            "code {} at index {index} does not fit in 4 bits",
            codes[index]
        )));
    }
    for (byte, pair) in packed.iter_mut().zip(codes.chunks(2)) {
        let (first, second) = (pair[0], pair.get(1).copied().unwrap_or(0));
        *byte = match order {
            NibbleOrder::LowFirst => first | second << 4,
            NibbleOrder::HighFirst => first << 4 | second,
        };
    }
    Ok(())
}

/// Unpacks `packed` into `codes`; the second half of a last odd byte is not looked at.
///
/// Fails if the lengths do not agree.
pub fn unpack_int4(order: NibbleOrder, packed: &[u8], codes: &mut [u8]) -> Result<()> {
    check_int4(codes.len(), packed.len())?;
    for (&byte, pair) in packed.iter().zip(codes.chunks_mut(2)) {
        let halves = match order {
            NibbleOrder::LowFirst => [byte & 15, byte >> 4],
            NibbleOrder::HighFirst => [byte >> 4, byte & 15],
        };
        pair.copy_from_slice(&halves[..pair.len()]);
    }
    Ok(())
}

/// Fails unless `packed` bytes are what `codes` codes take.
pub fn check_int4(codes: usize, packed: usize) -> Result<()> {
    if codes.div_ceil(2) == packed {
        return Ok(());
    }
    Err(Error::format(format!(
        "{codes} codes of 4 bits take {} bytes, got {packed}",
        codes.div_ceil(2)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacking_gives_back_what_was_packed(codes in prop::collection::vec(0u8..16, 0..70)) {
            for order in [NibbleOrder::LowFirst, NibbleOrder::HighFirst] {
                let mut packed = vec![0xff; codes.len().div_ceil(2)];
                pack_int4(order, &codes, &mut packed).unwrap();
                let mut again = vec![0xff; codes.len()];
                unpack_int4(order, &packed, &mut again).unwrap();
                prop_assert_eq!(&codes, &again);
            }
        }
    }

    #[test]
    fn orders_and_the_odd_code() {
        let mut packed = [0; 2];
        pack_int4(NibbleOrder::LowFirst, &[1, 2, 3], &mut packed).unwrap();
        assert_eq!(packed, [0x21, 0x03]);
        pack_int4(NibbleOrder::HighFirst, &[1, 2, 3], &mut packed).unwrap();
        assert_eq!(packed, [0x12, 0x30]);
        assert!(pack_int4(NibbleOrder::LowFirst, &[16], &mut [0]).is_err());
        assert!(pack_int4(NibbleOrder::LowFirst, &[1], &mut [0; 2]).is_err());
        assert!(unpack_int4(NibbleOrder::LowFirst, &[1], &mut [0; 3]).is_err());
    }
}
