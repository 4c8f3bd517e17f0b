//! Rows that are far apart in a tensor and lie in the same bytes.

/// Rows in the order in which they share bytes: the first of each part, the second of each part, and so on.
/// A part is a run of equally many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fold {
    row_weights: u64,
    part_rows: u64,
    parts: u64,
}

impl Fold {
    /// The order of `rows` rows of `row_weights` weights in `parts` parts; `None` unless these divide them.
    pub fn new(row_weights: u64, rows: u64, parts: u64) -> Option<Self> {
        let divides = parts > 0 && rows > 0 && row_weights > 0 && rows.is_multiple_of(parts);
        divides.then(|| Fold {
            row_weights,
            part_rows: rows / parts,
            parts,
        })
    }

    /// Weights of a row.
    pub fn row_weights(self) -> u64 {
        self.row_weights
    }

    /// Number of rows.
    pub fn rows(self) -> u64 {
        self.part_rows * self.parts
    }

    /// Number of parts.
    pub fn parts(self) -> u64 {
        self.parts
    }

    /// The row in memory that is row `row` in this order.
    pub fn row(self, row: u64) -> u64 {
        row % self.parts * self.part_rows + row / self.parts
    }

    /// The rows in memory from row `first` in this order on.
    pub fn rows_from(self, first: u64) -> impl Iterator<Item = u64> {
        let (mut part, mut row) = (first % self.parts, first / self.parts);
        std::iter::from_fn(move || {
            let here = part * self.part_rows + row;
            part += 1;
            if part == self.parts {
                (part, row) = (0, row + 1);
            }
            Some(here)
        })
    }

    /// The weight in memory that is weight `weight` in this order.
    pub fn weight(self, weight: u64) -> u64 {
        self.row(weight / self.row_weights) * self.row_weights + weight % self.row_weights
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_weight_comes_once_and_those_of_one_byte_together() {
        let fold = Fold::new(3, 8, 4).unwrap();
        let rows: Vec<u64> = (0..8).map(|row| fold.row(row)).collect();
        assert_eq!(rows, [0, 2, 4, 6, 1, 3, 5, 7]);
        for first in 0..8 {
            let from: Vec<u64> = fold.rows_from(first).take(8 - first as usize).collect();
            assert_eq!(from, rows[first as usize..]);
        }
        let mut weights: Vec<u64> = (0..24).map(|weight| fold.weight(weight)).collect();
        assert_eq!(weights[..6], [0, 1, 2, 6, 7, 8]);
        weights.sort_unstable();
        assert!(weights.into_iter().eq(0..24));
    }

    #[test]
    fn uneven_rows_have_no_such_order() {
        assert_eq!(Fold::new(3, 7, 2), None);
        assert_eq!(Fold::new(3, 8, 0), None);
        assert_eq!(Fold::new(0, 8, 2), None);
        assert_eq!(Fold::new(3, 0, 2), None);
    }
}
