//! Checked size arithmetic. Every size that comes from a file passes through here.

use crate::error::{Error, Result};

/// Number of weights of a tensor; the empty shape is a scalar.
pub fn count_weights(shape: &[u64]) -> Result<u64> {
    // A zero anywhere makes the product zero, whatever the rest would overflow to.
    if shape.contains(&0) {
        return Ok(0);
    }
    shape
        .iter()
        .try_fold(1u64, |product, &dim| product.checked_mul(dim))
        .ok_or_else(|| Error::checkpoint(format!("shape {shape:?} holds more than 2^64 weights")))
}

/// Length of one row (the last dimension; a scalar is a row of one).
pub fn row_weights(shape: &[u64]) -> u64 {
    shape.last().copied().unwrap_or(1)
}

/// `a * b`, or an error naming what overflowed.
pub fn multiply(a: u64, b: u64, what: &str) -> Result<u64> {
    a.checked_mul(b)
        .ok_or_else(|| Error::checkpoint(format!("{what}: {a} x {b} does not fit in 64 bits")))
}

/// `a + b`, or an error naming what overflowed.
pub fn add(a: u64, b: u64, what: &str) -> Result<u64> {
    a.checked_add(b)
        .ok_or_else(|| Error::checkpoint(format!("{what}: {a} + {b} does not fit in 64 bits")))
}

/// `offset` moved up to the next multiple of `alignment` (at least 1).
pub fn align_up(offset: u64, alignment: u64) -> Result<u64> {
    let alignment = alignment.max(1);
    let padding = (alignment - offset % alignment) % alignment;
    add(offset, padding, "aligned offset")
}

/// A count as an index of this machine.
pub fn to_usize(count: u64) -> Result<usize> {
    usize::try_from(count)
        .map_err(|_| Error::checkpoint(format!("{count} does not fit in this machine's memory")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_checked() {
        assert_eq!(count_weights(&[]).ok(), Some(1));
        assert_eq!(count_weights(&[3, 0, u64::MAX, u64::MAX]).ok(), Some(0));
        assert!(count_weights(&[1 << 32, 1 << 32]).is_err());
        assert_eq!(align_up(33, 32).ok(), Some(64));
        assert_eq!(align_up(64, 32).ok(), Some(64));
        assert!(align_up(u64::MAX, 32).is_err());
    }
}
