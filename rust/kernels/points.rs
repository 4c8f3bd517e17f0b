//! Putting runs of weights on the points of a grid: what is searched, and what is found.
//!
//! A point is a code whose digits, the lowest first, are the levels of 8 weights (2 bits each) or of 4
//! (3 bits each); level l stands for 2l + 1.

/// Codes in a list come in steps of so many.
pub const STEP: usize = 8;
/// Marks a place as the index of a point.
pub const ON_GRID: u32 = 1 << 31;
/// Most groups of a run, and scales tried together.
pub const MOST_GROUPS: usize = 8;
pub const MOST_TRIES: usize = 32;

/// A grid, and the points near each code that is not on it.
#[derive(Debug)]
pub struct Lists {
    /// Bits of a digit; the scalar bodies do without.
    #[cfg_attr(any(feature = "scalar", not(target_arch = "x86_64")), allow(dead_code))]
    pub bits: u32,
    /// By code: [`ON_GRID`] and the index of the point, or where the code's list begins.
    pub places: Vec<u32>,
    /// Lists: a number of steps, then [`STEP`] codes for each. The last step is filled up with the
    /// list's first code, which changes nothing where the first of the best is taken.
    pub near: Vec<u16>,
}

/// A run of weights without signs: 8 or 4 times as many of each as there are groups.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    /// The weights.
    pub x: &'a [f32],
    /// How much each counts.
    pub shares: &'a [f32],
    /// Square roots of that.
    pub roots: &'a [f32],
    /// Highest level.
    pub top: i32,
}

/// What each try gave.
#[derive(Debug)]
pub struct Tried {
    /// Codes, by group and try.
    pub codes: [[u32; MOST_TRIES]; MOST_GROUPS],
    /// A bit per try, by group: set if rounding left the grid.
    pub off_grid: [u32; MOST_GROUPS],
    /// Σ s·x·q and Σ s·q·q.
    pub crosses: [f32; MOST_TRIES],
    /// See `crosses`.
    pub powers: [f32; MOST_TRIES],
}

impl Default for Tried {
    fn default() -> Self {
        Tried {
            codes: [[0; MOST_TRIES]; MOST_GROUPS],
            off_grid: [0; MOST_GROUPS],
            crosses: [0.0; MOST_TRIES],
            powers: [0.0; MOST_TRIES],
        }
    }
}
