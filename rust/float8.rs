//! 8-bit floats: E4M3 without infinities (OCP "fn"), and the power-of-two scales E8M0.
//!
//! | bits | E4M3: sign 1, exponent 4 (bias 7), mantissa 3 | E8M0 |
//! |---|---|---|
//! | value | (−1)ˢ·2^(e−7)·(1 + m/8); e = 0: (−1)ˢ·2^−6·m/8 | 2^(c − 127) |
//! | largest | 448 (0x7e) | 2^127 (0xfe) |
//! | NaN | 0x7f, 0xff | 0xff |
//!
//! Encoding rounds to nearest with ties to even, and what is beyond 448 becomes 448, infinities
//! included: as `Tensor.to(torch.float8_e4m3fn)` of torch 2.13 does. The loops here have no branches,
//! so that the compiler makes vectors of them.

/// The largest E4M3 number.
pub const E4M3_MOST: f32 = 448.0;

/// The nearest E4M3 code; NaN gives that of 448.
#[inline(always)]
pub fn to_e4m3(x: f32) -> u8 {
    /// Bits of 2^-6, the least number that is not subnormal.
    const LEAST_NORMAL: u32 = 121 << 23;
    let sign = x.to_bits() >> 24 & 0x80;
    let size = x.abs().min(E4M3_MOST);
    // 2^e, or 2^-6 if that is larger: the step between codes there is 2^(e-3).
    let power = (size.to_bits() & 0x7f80_0000).max(LEAST_NORMAL);
    // Of a number 2^20 times as large that is the last bit, so the sum is rounded to whole steps, and counts
    // them; what is added besides takes the exponent of 2^-6 off the code.
    let count = size + f32::from_bits(power + (20 << 23) + (256 - (LEAST_NORMAL >> 20) % 256));
    let code = count.to_bits().wrapping_add(power >> 20);
    // The last byte of the code has no sign yet; the bytes above it do not matter.
    (code | sign) as u8
}

/// The value of an E4M3 code.
#[inline(always)]
pub fn of_e4m3(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    let size = u32::from(code & 0x7f);
    // With the bits in place the exponent is 120 too small, for subnormal numbers as well.
    let value = f32::from_bits(size << 20) * f32::from_bits((127 + 120) << 23);
    let bits = if size == 0x7f {
        0x7fc0_0000
    } else {
        value.to_bits()
    };
    f32::from_bits(bits | sign)
}

/// The value of an E8M0 code.
#[inline(always)]
pub fn of_e8m0(code: u8) -> f32 {
    f32::from_bits(match code {
        0 => 1 << 22,
        255 => 0x7fc0_0000,
        _ => u32::from(code) << 23,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearest code by trying all of them.
    fn nearest(x: f32) -> u8 {
        let size = f64::from(x.abs()).min(448.0);
        let distance = |code: u8| (f64::from(of_e4m3(code)) - size).abs();
        let best = (1..0x7f).fold(0u8, |best, code| {
            let (there, here) = (distance(best), distance(code));
            if here < there || here == there && code % 2 == 0 {
                code
            } else {
                best
            }
        });
        best | if x.is_sign_negative() { 0x80 } else { 0 }
    }

    #[test]
    fn codes_survive_the_round_trip() {
        for code in 0..=255u8 {
            let value = of_e4m3(code);
            assert_eq!(value.is_nan(), code & 0x7f == 0x7f);
            if !value.is_nan() {
                assert_eq!(to_e4m3(value), code);
            }
        }
        assert_eq!(of_e4m3(0x7e), 448.0);
        assert_eq!(of_e4m3(1), 1.0 / 512.0);
        assert_eq!(of_e8m0(127), 1.0);
        assert_eq!(f64::from(of_e8m0(0)), 2f64.powi(-127));
        assert!(of_e8m0(255).is_nan());
    }

    #[test]
    fn the_nearest_code_wins_and_ties_go_to_even() {
        for code in 0..0x7eu8 {
            let middle = (of_e4m3(code) + of_e4m3(code + 1)) / 2.0;
            for step in -2i32..=2 {
                let x = f32::from_bits(middle.to_bits().wrapping_add_signed(step));
                assert_eq!(to_e4m3(x), nearest(x), "{x:e}");
                assert_eq!(to_e4m3(-x), nearest(-x), "{x:e}");
            }
        }
        for x in [0.0, -0.0, 1e-40, 449.0, 465.0, 1e30, f32::INFINITY] {
            assert_eq!(to_e4m3(x), nearest(x), "{x:e}");
        }
    }
}
