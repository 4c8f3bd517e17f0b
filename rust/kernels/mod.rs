//! The inner loops: which instruction set runs them, and the loops that no format owns.
//!
//! The scalar body of a loop is its definition. It stands where the loop belongs (a format, a
//! cast) and reads like the formula. Modules here hold second versions for one instruction set
//! each, under the same name; they give the same bits, which `tests.rs` stamps out for every
//! level, and they exist only where they are measurably faster.
//!
//! The level is detected once per process, by asking for every feature that its modules use. The
//! Cargo feature `scalar` leaves the scalar bodies only. There are versions for x86-64; other
//! processors run the scalar bodies, which the compiler vectorises for them.

mod sums;
#[cfg(test)]
mod tests;

pub use sums::{error_sums, first_nonfinite, ErrorSums};

use std::sync::OnceLock;

/// An instruction set that this processor has. Values other than [`Level::SCALAR`] come from
/// detection only, so holding one proves that its instructions may be executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level(Tier);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tier {
    Scalar,
}

impl Level {
    /// No instructions beyond those every processor of the architecture has.
    pub const SCALAR: Level = Level(Tier::Scalar);

    /// Every level of this processor, slowest first.
    pub fn available() -> Vec<Level> {
        vec![Level::SCALAR]
    }

    /// `scalar`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Tier::Scalar => "scalar",
        }
    }
}

/// The fastest level of this processor, detected on the first call.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| Level::available().pop().unwrap_or(Level::SCALAR))
}
