//! How the bytes of a stored array follow from the weights of a tensor.

/// How the bytes of a component follow from the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// Every `weights` weights in memory order take `bytes` bytes; a last partial run takes
    /// `bytes` as well.
    Blocks {
        /// Weights per run.
        weights: u64,
        /// Bytes per run.
        bytes: u64,
    },
    /// As [`Span::Blocks`], in an array that begins anew after its last byte, as weights that are far
    /// apart share bytes. Decoded only: see [`Format::encoding`].
    Repeated {
        /// Weights per run.
        weights: u64,
        /// Bytes per run.
        bytes: u64,
        /// Bytes of the array, a multiple of `bytes`.
        period: u64,
    },
    /// One array for the whole tensor, known once the tensor is encoded.
    Whole,
    /// As [`Span::Whole`], and its length is only known then: the layout's length is the most.
    WholeAtMost,
}

impl Span {
    /// Byte range of the weights `first..first + count`; empty for whole-tensor arrays. `first`
    /// must be a multiple of the run length. Bytes of a repeated array are counted on from one turn
    /// to the next.
    pub fn range(self, first: u64, count: u64) -> std::ops::Range<u64> {
        match self {
            Span::Blocks { weights, bytes } | Span::Repeated { weights, bytes, .. } => {
                let start = first / weights;
                start * bytes..(start + count.div_ceil(weights)) * bytes
            }
            Span::Whole | Span::WholeAtMost => 0..0,
        }
    }

    /// Whether this component is cut into tiles.
    pub fn is_sliced(self) -> bool {
        matches!(self, Span::Blocks { .. } | Span::Repeated { .. })
    }

    /// The bytes of a repeated array, and the weights that one turn of it holds.
    pub fn turn(self) -> Option<(u64, u64)> {
        match self {
            Span::Repeated {
                weights,
                bytes,
                period,
            } if period > 0 => Some((period, (period / bytes.max(1)).saturating_mul(weights))),
            _ => None,
        }
    }
}
