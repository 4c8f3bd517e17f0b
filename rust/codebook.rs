//! The fixed tables of 4-bit and 8-bit codes, and the 8-bit floats that serve as scales.
//!
//! Values of NF4, FP4 and the dynamic map from bitsandbytes 0.50.2 (`functional.py`: `get_4bit_type`,
//! `create_dynamic_map`), the rest from ggml 0.25.3 (`ggml-common.h`, `ggml-impl.h`); the golden
//! vectors hold the peers' own tables.

/// A 4-bit code: its values and the order in which a number finds its code.
#[derive(Debug)]
pub struct Codebook {
    /// Value of each code.
    pub values: [f32; 16],
    /// The codes, sorted by value.
    pub order: [u8; 16],
    /// Midpoints of neighbouring values in that order. A number takes the code after the last
    /// midpoint it exceeds; one that lies exactly on a midpoint takes the lower value.
    pub thresholds: [f32; 15],
    /// A second way to find the last threshold that a number exceeds, where it is possible.
    pub intervals: Option<Intervals>,
}

/// [`INTERVALS`] parts of the numbers from -1 to 1, none of which holds two thresholds. The part of
/// a number is `x * PARTS_PER_UNIT` rounded to a whole number; its low five bits are the index here.
#[derive(Debug)]
pub struct Intervals {
    /// How many thresholds lie in lower parts.
    pub below: [i32; INTERVALS],
    /// The threshold in this part, infinity if there is none.
    pub inside: [f32; INTERVALS],
}

/// Number of parts, and of different low five bits.
pub const INTERVALS: usize = 32;
/// -1 to 1 gives -15 to 15. Chosen so that no threshold of NF4 lies near the border of a part.
pub const PARTS_PER_UNIT: f32 = 14.6;

impl Intervals {
    const fn new(thresholds: &[f32; 15]) -> Option<Self> {
        let mut below = [0; INTERVALS];
        let mut inside = [f32::INFINITY; INTERVALS];
        let mut i = 0;
        while i < 15 {
            let scaled = thresholds[i] as f64 * PARTS_PER_UNIT as f64;
            // Rounded by way of a positive number.
            let part = (scaled + 32.5) as i32 - 32;
            // Too near to the border, rounding in `f32` could put it into another part.
            let off = scaled - part as f64;
            if inside[(part & 31) as usize] != f32::INFINITY || off < -0.45 || off > 0.45 {
                return None;
            }
            inside[(part & 31) as usize] = thresholds[i];
            let mut above = part + 1;
            while above <= 15 {
                below[(above & 31) as usize] += 1;
                above += 1;
            }
            i += 1;
        }
        Some(Intervals { below, inside })
    }
}

impl Codebook {
    const fn new(values: [f32; 16], order: [u8; 16]) -> Self {
        let mut thresholds = [0.0; 15];
        let mut i = 0;
        while i < 15 {
            thresholds[i] = (values[order[i] as usize] + values[order[i + 1] as usize]) / 2.0;
            i += 1;
        }
        Codebook {
            values,
            order,
            thresholds,
            intervals: Intervals::new(&thresholds),
        }
    }

    /// The code of `x`. NaN takes the last one in order.
    pub fn code(&self, x: f32) -> u8 {
        // Four halvings of the sorted thresholds; `!(x <= t)` lets NaN go up.
        let mut index = 0;
        for step in [8, 4, 2, 1] {
            index += step
                * usize::from(!matches!(
                    x.partial_cmp(&self.thresholds[index + step - 1]),
                    Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)
                ));
        }
        self.order[index]
    }
}

/// NormalFloat4: quantiles of the normal distribution, already in order.
pub static NF4: Codebook = Codebook::new(
    [
        -1.0,
        -0.696_192_8,
        -0.525_073_05,
        -0.394_917_5,
        -0.284_441_38,
        -0.184_773_43,
        -0.091_050_036,
        0.0,
        0.079_580_3,
        0.160_930_2,
        0.246_112_3,
        0.337_915_24,
        0.440_709_83,
        0.562_617,
        0.722_956_84,
        1.0,
    ],
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
);

/// bitsandbytes' FP4: code + 8 is the negative of code. Code 8 is a second zero, which follows
/// code 0 in order: a number in (0, 1/384] takes code 8. Both zeros are positive.
pub static FP4: Codebook = Codebook::new(
    [
        0.0,
        0.0625 / 12.0,
        8.0 / 12.0,
        1.0,
        4.0 / 12.0,
        6.0 / 12.0,
        2.0 / 12.0,
        3.0 / 12.0,
        0.0,
        -0.0625 / 12.0,
        -8.0 / 12.0,
        -1.0,
        -4.0 / 12.0,
        -6.0 / 12.0,
        -2.0 / 12.0,
        -3.0 / 12.0,
    ],
    [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3],
);

/// A table of 16 whole numbers, sorted. A number takes the code of the nearest one, the upper code if
/// it lies just between two: in other words, the number of midpoints that it is not below.
#[derive(Debug)]
pub struct Levels {
    /// Value of each code.
    pub values: [f32; 16],
    /// Midpoints of neighbouring values.
    pub midpoints: [f32; 15],
}

impl Levels {
    /// The table of these values.
    pub const fn new(whole: &[i8; 16]) -> Self {
        let mut values = [0.0; 16];
        let mut midpoints = [0.0; 15];
        let mut i = 0;
        while i < 16 {
            values[i] = whole[i] as f32;
            if i > 0 {
                midpoints[i - 1] = (values[i - 1] + values[i]) / 2.0;
            }
            i += 1;
        }
        Levels { values, midpoints }
    }

    /// The code of `y`. NaN takes the last one.
    pub fn code(&self, y: f32) -> u8 {
        let below = self.midpoints.iter().filter(|&&midpoint| y < midpoint);
        self.midpoints.len() as u8 - below.count() as u8
    }
}

/// The signed dynamic 8-bit map: seven decades, 2^i values in decade i, of both signs, with 0 and
/// 1. Sorted; code 127 is 0.
pub static DYNAMIC: [f32; 256] = dynamic();

const fn dynamic() -> [f32; 256] {
    // Powers of ten as the peer has them: `f64` powers rounded to `f32`.
    const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0; 256];
    map[255] = 1.0;
    let mut decade = 0;
    // Positive values ascend from code 128 on; their negatives descend from code 126 on.
    let mut place = 128;
    while decade < 7 {
        let steps = 1 << decade;
        let mut i = 0;
        while i < steps {
            let middle = (boundary(i, steps) + boundary(i + 1, steps)) / 2.0;
            map[place] = DECADES[decade] * middle;
            map[254 - place] = -map[place];
            place += 1;
            i += 1;
        }
        decade += 1;
    }
    map
}

/// Point `i` of `steps` equal steps from 0.1 to 1, counted from the nearer end and rounded once.
const fn boundary(i: usize, steps: usize) -> f32 {
    const START: f32 = 0.1;
    const END: f32 = 1.0;
    let step = (END - START) / steps as f32;
    // Products of two `f32` are exact in `f64`.
    if i < steps.div_ceil(2) {
        (START as f64 + step as f64 * i as f64) as f32
    } else {
        (END as f64 - step as f64 * (steps - i) as f64) as f32
    }
}

/// E2M1, values doubled so that they are whole; the code of minus zero is plain zero.
pub static E2M1_DOUBLED: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
];

/// Midpoints of the magnitudes of [`E2M1_DOUBLED`]. A magnitude takes the number of midpoints that it
/// exceeds.
pub static E2M1_THRESHOLDS: [f32; 7] = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];

/// The first E2M1 code whose doubled value times `half_scale` is nearest to `weight`; 0 for NaN.
pub fn nearest_e2m1(weight: f32, half_scale: f32) -> u8 {
    let error = |code: u8| (E2M1_DOUBLED[usize::from(code)] * half_scale - weight).abs();
    (1..16).fold(0, |best, code| {
        if error(code) < error(best) {
            code
        } else {
            best
        }
    })
}

/// [`half_of_e8m0`] of every code.
pub static HALVES_OF_E8M0: [f32; 256] = {
    let mut halves = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        halves[code] = half_of_e8m0(code as u8);
        code += 1;
    }
    halves
};

/// [`half_of_ue4m3`] of every code.
pub static HALVES_OF_UE4M3: [f32; 256] = {
    let mut halves = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        halves[code] = half_of_ue4m3(code as u8);
        code += 1;
    }
    halves
};

/// Half of an E8M0 scale: 2^(code − 128). 255 is a number like the others.
pub const fn half_of_e8m0(code: u8) -> f32 {
    f32::from_bits(match code {
        0 | 1 => 0x0020_0000 << code,
        _ => (code as u32 - 1) << 23,
    })
}

/// Half of a UE4M3 scale: four exponent bits of bias 7, three bits of mantissa. 0x7f is 0; otherwise bit
/// 7 is not looked at.
pub const fn half_of_ue4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (code as u32 >> 3 & 15, code as u32 & 7);
    match (code, exponent) {
        (0x7f, _) => 0.0,
        (_, 0) => mantissa as f32 / 1024.0,
        _ => f32::from_bits((exponent + 127 - 8) << 23 | mantissa << 20),
    }
}

/// The UE4M3 code of `x`: mantissa rounded half up; from 256 on that of 448. Just below the least
/// normal number the mantissa stays at 7. 0 for NaN and for what is not above half of the least step.
pub fn to_ue4m3(x: f32) -> u8 {
    const LEAST_NORMAL: f32 = 1.0 / 64.0;
    if x.is_nan() || x <= 0.0 {
        0
    } else if x < LEAST_NORMAL {
        ((x * 512.0 + 0.5) as u8).min(7)
    } else {
        let code = ((x.min(448.0).to_bits() + (1 << 19)) >> 20) - ((127 - 7) << 3);
        if code < 15 << 3 {
            code as u8
        } else {
            0x7e
        }
    }
}

/// ⌊log₂ x⌋ of a number above 0, the logarithm being rounded to `f32` first: a number whose distance
/// to the next power of two is lost in that rounding counts as that power. This is what a correctly
/// rounded `log2f` gives.
pub fn floor_log2(x: f32) -> i32 {
    let bits = f64::from(x).to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    // log₂ is next − (distance / ln 2) with a relative distance far below 1, and rounds to `next` if
    // that is nearer than half of the step below `next`.
    let next = exponent + 1;
    let distance = 1.0 - f64::from_bits(bits & !(0x7ff << 52) | 1022 << 52);
    let below = if next > 0 { next - 1 } else { -next };
    let is_lost = match below.checked_ilog2() {
        Some(size) => {
            let half_step = f64::from_bits((u64::from(size) + 1023 - 24) << 52);
            distance < half_step * std::f64::consts::LN_2
        }
        None => false,
    };
    if is_lost {
        next
    } else {
        exponent
    }
}

/// ⌈log₂ x⌉ of a number above 0, the logarithm being rounded to `f32` first: a number whose distance
/// from the power of two below is lost in that rounding counts as that power. For 0 it is −151.
///
/// Without branches, so that the compiler makes vectors of it.
#[inline(always)]
pub fn ceil_log2(x: f32) -> i32 {
    const UP: i32 = 24;
    let is_subnormal = x < f32::MIN_POSITIVE;
    let normal = if is_subnormal {
        x * (1u32 << UP) as f32
    } else {
        x
    };
    let lowered = if is_subnormal { 127 + UP } else { 127 };
    let exponent = (normal.to_bits() >> 23).cast_signed() - lowered;
    let fraction = (normal.to_bits() & 0x7f_ffff).cast_signed() as f32;
    // The logarithms above this exponent are e and more, or −e − 1 and less, in magnitude; the power of two
    // below has the step of `f32` there. At 0 and −1 no distance is less than half a step.
    let size = (exponent ^ exponent >> 31) as f32;
    let power = f32::from_bits(size.to_bits() & 0x7f80_0000);
    // Half a step, 2^-24 of that power, is ln 2 times as much of `x`; the fraction counts 2^-23.
    let lost = power * (std::f32::consts::LN_2 / 2.0);
    exponent + i32::from(fraction > lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_sorted() {
        assert!(DYNAMIC.is_sorted());
        assert_eq!(DYNAMIC[127], 0.0);
        assert!(NF4.intervals.is_some());
        for codebook in [&NF4, &FP4] {
            assert!(codebook
                .order
                .map(|code| codebook.values[code as usize])
                .is_sorted());
            assert!(codebook.thresholds.is_sorted());
        }
    }

    #[test]
    fn the_nearest_code_wins_and_ties_go_down() {
        for codebook in [&NF4, &FP4] {
            for (index, &threshold) in codebook.thresholds.iter().enumerate() {
                let up = codebook.order[index + 1];
                assert_eq!(codebook.code(threshold), codebook.order[index]);
                assert_eq!(codebook.code(threshold.next_up()), up);
            }
            for (code, &value) in codebook.values.iter().enumerate() {
                assert_eq!(
                    codebook.values[codebook.code(value) as usize],
                    value,
                    "{code}"
                );
            }
            assert_eq!(codebook.code(f32::NAN), codebook.order[15]);
        }
        assert_eq!(FP4.code(0.0), 0);
        assert_eq!(FP4.code(-0.0), 0);
        assert_eq!(FP4.code(f32::MIN_POSITIVE), 8);
        assert_eq!(FP4.code(-f32::MIN_POSITIVE), 0);
    }

    #[test]
    fn scales_survive_the_round_trip() {
        for code in 0..=0x7e {
            let expected = if code < 0x78 { code } else { 0x7e };
            assert_eq!(to_ue4m3(2.0 * half_of_ue4m3(code)), expected);
        }
        assert_eq!(half_of_ue4m3(0x7e), 224.0);
        assert_eq!(half_of_ue4m3(0x7f), 0.0);
        assert_eq!(to_ue4m3(255.0), 0x7e);
        assert_eq!(to_ue4m3(f32::INFINITY), 0x7e);
        assert_eq!(to_ue4m3(-1.0), 0);
        assert_eq!(to_ue4m3(1.0625), to_ue4m3(1.125), "half up");
        assert_eq!(to_ue4m3((1.0f32 / 64.0).next_down()), 7);
        for code in 0..=255 {
            let half = 2f64.powi(i32::from(code) - 128);
            assert_eq!(f64::from(half_of_e8m0(code)), half);
        }
    }

    #[test]
    fn logarithms_are_those_of_a_rounded_log2() {
        for exponent in -149..=128 {
            let power = 2f64.powi(exponent) as f32;
            let mut x = if exponent == 128 { f32::MAX } else { power };
            for _ in 0..100 {
                if x > 0.0 {
                    let rounded = f64::from(x).log2() as f32;
                    assert_eq!(floor_log2(x), rounded.floor() as i32, "{x:e}");
                }
                x = x.next_down();
            }
            if exponent < 128 {
                assert_eq!(floor_log2(power), exponent);
                assert_eq!(
                    floor_log2(power.next_up()),
                    exponent + i32::from(exponent == -149)
                );
            }
        }
    }

    #[test]
    fn logarithms_are_rounded_before_they_go_up() {
        let check = |x: f32| {
            let expected = (f64::from(x).log2() as f32).ceil() as i32;
            assert_eq!(ceil_log2(x), expected, "{x:e}");
        };
        for exponent in -149..=127 {
            let power = 2f64.powi(exponent) as f32;
            for step in 0..64 {
                check(f32::from_bits(power.to_bits() + step));
                check(f32::from_bits(power.to_bits().saturating_sub(step).max(1)));
            }
            for part in [1e-5, 0.1, 0.5, 0.9] {
                check((f64::from(power) * (1.0 + part)) as f32);
            }
        }
        check(f32::MAX);
        assert!(ceil_log2(0.0) < -149);
    }
}
