//! Where the codes of [`super::quanto_groups`] begin.
//!
//! However a weight is turned into its code, a larger one never gets a smaller code. So the least weights of each
//! code say as much as the arithmetic does, and a search among them is quicker where they fit in a vector.

use std::sync::OnceLock;

use super::quanto_groups::code_of;

/// Codes but 0.
pub(crate) const COUNT: usize = 15;

/// For each significand s of BF16, the bits of the least BF16 numbers whose codes are 1, 2, … 15 (and the last once
/// more) where the scale of [`super::quanto_groups`] is 1 + s/128. Those of a scale 2^e times as large are larger
/// by as much.
pub(crate) type Dividends = [[u16; COUNT + 1]; 128];

/// The only ones; they are made once.
pub(crate) fn dividends() -> &'static Dividends {
    static DIVIDENDS: OnceLock<Box<Dividends>> = OnceLock::new();
    DIVIDENDS.get_or_init(|| {
        let mut table = Box::new([[0; COUNT + 1]; 128]);
        for (significand, least) in (0u16..).zip(table.iter_mut()) {
            let scale = of_bf16(127 << 7 | significand);
            // No quotient is less than 1/4 here, or has code 0 from 1 on.
            let mut bits = 125 << 7;
            for (code, least) in (1..).zip(least) {
                while code_of(of_bf16(bits), scale) < code.min(COUNT as u8) {
                    bits += 1;
                }
                *least = bits;
            }
        }
        table
    })
}

fn of_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
